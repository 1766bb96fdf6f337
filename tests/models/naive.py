"""The mixer written as the paper's text reads: one token at a time, no tensors of ours, float64.

An independent definition to hold the vectorised code against; slow on purpose.
"""

from __future__ import annotations

import itertools
import math

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def block_order(config, block, rows, columns, channels):
    """Coordinates (row, column, channel) in the order in which a block reads them, and the key of each one's group."""
    swap = config.alternate and block % (3 if config.pool_axes == 2 else 2) == 1
    outer, inner = (columns, rows) if swap else (rows, columns)
    spatial = [(o, i) for o in range(outer) for i in range(inner)]
    if config.scan_order == "channel_first":
        places = [(o, i, c) for (o, i) in spatial for c in range(channels)]
    else:
        places = [(o, i, c) for c in range(channels) for (o, i) in spatial]
    coordinates = [(i, o, c) if swap else (o, i, c) for (o, i, c) in places]
    if config.pool == "none":
        keys = places
    elif config.pool_axes == 1:
        channel_first = config.scan_order == "channel_first"
        keys = [(o, c) if channel_first else (c, o) for (o, i, c) in places]
    elif block % 3 == 2:
        keys = [(c,) for (o, i, c) in places]
    else:
        keys = [(o,) for (o, i, c) in places]
    return coordinates, keys


def mix(mixer, hidden, coordinates, keys):
    """``hidden``: dict from coordinate to (D,) vectors; returns the same."""
    config = mixer.config
    p = {k: v.detach().double().numpy() for k, v in mixer.named_parameters()}
    E, N, r = config.inner_dim, config.d_state, config.delta_rank
    x, z = {}, {}
    for place in coordinates:
        both = p["in_proj.weight"] @ hidden[place] + p.get("in_proj.bias", 0)
        x[place], z[place] = both[:E], both[E:]
    total = {place: np.zeros(E) for place in coordinates}
    for suffix, a_name, d_name in (("", "A_log", "D"), ("_b", "A_b_log", "D_b")):
        places, groups = list(coordinates), list(keys)
        if suffix:
            places, groups = places[::-1], groups[::-1]
        u = {}
        for t, place in enumerate(places):
            if config.d_conv == 0:
                u[place] = silu(x[place])
                continue
            acc = p[f"conv1d{suffix}.bias"].copy()
            for back in range(config.d_conv):
                if t - back >= 0:
                    acc += p[f"conv1d{suffix}.weight"][:, 0, config.d_conv - 1 - back] * x[places[t - back]]
            u[place] = silu(acc)
        steps = sorted(set(groups))
        if suffix:
            steps = steps[::-1]
        if config.pool == "none":
            steps = groups
        state, A = np.zeros((E, N)), -np.exp(p[a_name])
        for step in steps:
            members = [u[place] for place, g in zip(places, groups, strict=True) if g == step]
            pooled = pool(members, config, p, suffix)
            projected = p[f"x_proj{suffix}.weight"] @ pooled
            delta = softplus(p[f"dt_proj{suffix}.weight"] @ projected[:r] + p[f"dt_proj{suffix}.bias"])
            B, C = projected[r : r + N], projected[r + N :]
            state = np.exp(delta[:, None] * A) * state + (delta * pooled)[:, None] * B
            y = state @ C
            for place, g in zip(places, groups, strict=True):
                if g == step:
                    total[place] += y + p[d_name] * (pooled if config.skip == "pooled" else u[place])
    out = {}
    for place in coordinates:
        h = total[place] / 2
        if config.ssm_norm == "layer":
            h = (h - h.mean()) / math.sqrt(h.var() + 1e-5) * p["layernorm.weight"] + p["layernorm.bias"]
        elif config.ssm_norm == "rms":
            h = h / math.sqrt((h**2).mean() + 1e-5) * p["layernorm.weight"]
        out[place] = (p["out_proj.weight"] @ (h * silu(z[place])) + p.get("out_proj.bias", 0)) * p.get("gamma", 1.0)
    return out


def pool(members, config, p, suffix):
    if config.pool == "max":
        return np.max(members, axis=0)
    if config.pool == "attention":
        score = np.array([p[f"pool_score{suffix}.weight"][0] @ m for m in members]) + p[f"pool_score{suffix}.bias"]
        share = np.exp(score - score.max())
        return (share / share.sum()) @ np.array(members)
    return np.mean(members, axis=0) * (config.pool_scale if config.pool == "mean" else 1)


def stored_order(config, rows, columns, channels):
    if config.scan_order == "channel_first":
        return list(itertools.product(range(rows), range(columns), range(channels)))
    return [(r, c, ch) for ch, r, c in itertools.product(range(channels), range(rows), range(columns))]


def normalise(h, norm, kind):
    weight = norm.weight.detach().double().numpy()
    if kind == "rms":
        return h / math.sqrt((h**2).mean() + 1e-5) * weight
    return (h - h.mean()) / math.sqrt(h.var() + 1e-5) * weight + norm.bias.detach().double().numpy()


def encode(model, embedded, rows, columns, channels):
    """Tokens (L, D) after patch embedding -> tokens after the final norm, both in stored order."""
    config = model.config
    order = stored_order(config, rows, columns, channels)
    residual = {place: vector.copy() for place, vector in zip(order, embedded, strict=True)}
    for i, block in enumerate(model.layers):
        normed = {place: normalise(v, block.norm, config.input_norm) for place, v in residual.items()}
        mixed = mix(block.mixer, normed, *block_order(config, i, rows, columns, channels))
        residual = {place: residual[place] + mixed[place] for place in order}
    return np.array([normalise(residual[place], model.norm_f, config.input_norm) for place in order])
