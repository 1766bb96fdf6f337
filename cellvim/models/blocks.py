"""The blocks of every model and the layers inside them: `Mixer`, `Block`, `AttentionBlock` and `Norm`.

Blocks pass on the residual stream as ``(hidden, residual)``: the output of the previous mixer, which has not been added
yet, and the sum of everything before it. They are independent of rows, columns, channels and masks; the `ScanPlan`
describes how to visit the tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cellvim.ops as ops
from cellvim.models.config import EncoderConfig
from cellvim.ops import reference
from cellvim.ops.scan_plan import ScanPlan

ATTENTION_EPS = 1e-6  # of the LayerNorms of the published ViT and ChannelViT


class Mixer(nn.Module):
    """Mix tokens by convolution and a selective scan over pooled tokens, in both directions.

    Per direction: ``u = SiLU(conv(x))``, ``p = pool(u)``, ``y = scan(p)`` and ``o = expand(y) + D·u``. The output is
    ``out_proj(norm((o_forward + o_backward) / 2) · SiLU(z))``. FastVim, FastChannelVim, Vim, ChannelVim and FastMaskVim
    differ only in the `ScanPlan`.

    The parameters have the names used in the published checkpoints; the suffix ``_b`` marks the backward direction.

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), §3, Fig. 2; Zhu et al., Vision Mamba (2024), Alg. 1.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        D, E, N, r = config.embed_dim, config.inner_dim, config.d_state, config.delta_rank

        self.in_proj = nn.Linear(D, 2 * E, bias=config.projection_bias)
        if config.d_conv > 0:
            self.conv1d = nn.Conv1d(E, E, config.d_conv, groups=E)
            self.conv1d_b = nn.Conv1d(E, E, config.d_conv, groups=E)
        if config.pool == "attention":
            self.pool_score = nn.Linear(E, 1)
            self.pool_score_b = nn.Linear(E, 1)
        self.x_proj = nn.Linear(E, r + 2 * N, bias=False)
        self.x_proj_b = nn.Linear(E, r + 2 * N, bias=False)
        self.dt_proj = nn.Linear(r, E)
        self.dt_proj_b = nn.Linear(r, E)
        self.A_log = nn.Parameter(torch.empty(E, N))
        self.A_b_log = nn.Parameter(torch.empty(E, N))
        self.D = nn.Parameter(torch.ones(E))
        self.D_b = nn.Parameter(torch.ones(E))
        if config.ssm_norm != "none":
            self.layernorm = Scale(E, bias=config.ssm_norm == "layer")
        self.out_proj = nn.Linear(E, D, bias=config.projection_bias)
        if config.layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((D,), float(config.layer_scale)))
        self.reset_parameters()

    def forward(self, hidden: Tensor, plan: ScanPlan) -> Tensor:
        """Mix (B, L, D) tokens, given in stored order and visited as described by ``plan``; return (B, L, D)."""
        x, z = ops.linear(hidden, self.in_proj.weight, self.in_proj.bias).chunk(2, dim=-1)  # (B, L, E) each
        conv, conv_bias = self._convolution(x)
        skip = torch.stack([self.D, self.D_b])

        pooled = ops.conv_pool(x, conv, conv_bias, plan, self.config.pool, *self._score())  # (2, B, P, E)
        y = self._scan(pooled)  # (2, B, P, E)
        if self.config.skip == "pooled":
            y, skip = y + skip[:, None, None].to(y.dtype) * pooled, None
        norm = (None, None) if self.config.ssm_norm == "none" else (self.layernorm.weight, self.layernorm.bias)
        out = ops.expand_gate(x, z, y, conv, conv_bias, skip, plan, self.config.ssm_norm, *norm)  # (B, L, E)
        del x, z, y, pooled  # frees their memory at inference

        out = ops.linear(out, self.out_proj.weight, self.out_proj.bias)  # (B, L, D)
        return out * self.gamma if self.config.layer_scale is not None else out

    def pooling_shares(self, hidden: Tensor, plan: ScanPlan) -> Tensor:
        """Return the attention-pooling weights of (B, L, D) tokens: (2, B, L), summing to 1 over each slot."""
        x = ops.linear(hidden, self.in_proj.weight, self.in_proj.bias).chunk(2, dim=-1)[0]  # (B, L, E)
        return reference.attention_shares(x, *self._convolution(x), plan, *self._score())

    def _scan(self, pooled: Tensor) -> Tensor:
        """Project the pooled tokens to Δ, B and C and scan them; (2, B, P, E) -> (2, B, P, E)."""
        r, N = self.config.delta_rank, self.config.d_state
        parts = [ops.linear(pooled[0], self.x_proj.weight), ops.linear(pooled[1], self.x_proj_b.weight)]
        delta, B, C = torch.stack(parts).split([r, N, N], dim=-1)  # (2, B, P, r), (2, B, P, N) twice
        delta = torch.stack([ops.linear(delta[0], self.dt_proj.weight), ops.linear(delta[1], self.dt_proj_b.weight)])
        delta_bias = torch.stack([self.dt_proj.bias, self.dt_proj_b.bias])
        A_log = torch.stack([self.A_log, self.A_b_log])
        A = -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))  # (2, E, N)
        return ops.pooled_scan(pooled, delta, delta_bias, A, B, C)

    def _convolution(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the taps (2, E, W) and biases (2, E); without convolution a single tap of weight 1 (Table 7)."""
        if self.config.d_conv == 0:
            return torch.ones(2, x.shape[-1], 1, dtype=self.D.dtype, device=x.device), None
        weight = torch.stack([self.conv1d.weight[:, 0], self.conv1d_b.weight[:, 0]])
        return weight, torch.stack([self.conv1d.bias, self.conv1d_b.bias])

    def _score(self) -> tuple[Tensor, ...]:
        """Return the weights (2, E) and biases (2,) of attention pooling (Table 20); empty for other pools."""
        if self.config.pool != "attention":
            return ()
        heads = (self.pool_score, self.pool_score_b)
        return torch.stack([h.weight[0] for h in heads]), torch.cat([h.bias for h in heads])

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise as in the published models: A = −1…−N and Δ in [0.001, 0.1].

        The published code leaves the backward Δ bias at 0, so that Δ starts near 0.7 in that direction. Here both
        directions are initialised alike unless ``config.initialization == "reference"``.
        """
        if self.A_log.is_meta:
            return  # no values to initialise
        config = self.config
        for A_log in (self.A_log, self.A_b_log):
            A_log.copy_(torch.arange(1, config.d_state + 1, dtype=A_log.dtype).log().expand_as(A_log))
        for delta in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(delta.weight, -(config.delta_rank**-0.5), config.delta_rank**-0.5)
            _initialise_delta_bias(delta.bias)
        if config.initialization == "reference":
            self.dt_proj_b.bias.zero_()
        self.out_proj.weight.div_(math.sqrt(config.depth))
        for projection in (self.in_proj, self.out_proj):
            if projection.bias is not None:
                projection.bias.zero_()


class Scale(nn.Module):
    """The learned scale, and for a LayerNorm the offset, of a norm that a fused op computes."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None


class Norm(Scale):
    """Residual addition followed by RMSNorm or LayerNorm, in one op."""

    def __init__(self, width: int, kind: str, eps: float = 1e-5) -> None:
        super().__init__(width, bias=kind == "layer")
        self.kind, self.eps = kind, eps

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the normalised sum and the sum, each (B, L, D)."""
        return ops.add_norm(hidden, residual, self.weight, self.bias, self.eps, self.kind)


class Block(nn.Module):
    """Add the previous mixer's output to the residual stream, normalise and mix (paper Fig. 2)."""

    def __init__(self, config: EncoderConfig, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.norm = Norm(config.embed_dim, config.input_norm)
        self.mixer = Mixer(config)
        self.drop_rate = drop_rate

    def forward(self, hidden: Tensor, residual: Tensor | None, plan: ScanPlan) -> tuple[Tensor, Tensor]:
        """Return this block's output and the updated residual stream, both (B, L, D)."""
        normed, residual = self.norm(hidden, residual)
        return _drop_path(self.mixer(normed, plan), self.drop_rate, self.training), residual


class AttentionBlock(nn.Module):
    """Pre-norm attention and MLP of the ViT and ChannelViT baselines, with the interface of `Block`.

    With ``config.pool="mean"`` attention runs on tokens pooled along the plan's axes, and its result is broadcast back
    to the tokens (FastVim paper, Table 7).

    References
    ----------
    Dosovitskiy et al., An Image is Worth 16x16 Words (2021); Bao et al., Channel Vision Transformers (2024).
    """

    def __init__(self, config: EncoderConfig, drop_rate: float = 0.0) -> None:
        super().__init__()
        D, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.heads = config.heads
        self.drop_rate = drop_rate
        self.norm1 = nn.LayerNorm(D, eps=ATTENTION_EPS)
        self.qkv = nn.Linear(D, 3 * D)
        self.proj = nn.Linear(D, D)
        self.norm2 = nn.LayerNorm(D, eps=ATTENTION_EPS)
        self.fc1 = nn.Linear(D, hidden)
        self.fc2 = nn.Linear(hidden, D)
        for linear in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor, residual: Tensor | None, plan: ScanPlan) -> tuple[Tensor, Tensor]:
        """Return this block's output and the updated residual stream, both (B, L, D)."""
        residual = hidden if residual is None else residual + hidden
        mixed = self._attend(self.norm1(residual), plan)
        residual = residual + _drop_path(mixed, self.drop_rate, self.training)
        hidden = _apply(self.fc2, F.gelu(_apply(self.fc1, self.norm2(residual))))
        return _drop_path(hidden, self.drop_rate, self.training), residual

    def _attend(self, tokens: Tensor, plan: ScanPlan) -> Tensor:
        if plan.pools:
            tokens = reference.pool_mean(tokens, plan)  # (B, P, D)
        qkv = _apply(self.qkv, tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, B, heads, L, d)
        out = F.scaled_dot_product_attention(*qkv.unbind(0), attn_mask=_present_keys(plan))
        out = _apply(self.proj, out.transpose(1, 2).flatten(2))
        return reference.expand(out, plan) if plan.pools else out


def _apply(layer: nn.Linear, x: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias)


def _present_keys(plan: ScanPlan) -> Tensor | None:
    """Return a mask (B, 1, 1, keys) of the tokens or slots that exist; None when all do."""
    if plan.is_dense:
        return None
    keys, index = (plan.slots, plan.slot[0]) if plan.pools else (plan.order.shape[1], plan.order)
    index = index.masked_fill(plan.order < 0, keys)  # absent tokens mark an extra key, which is cut off
    present = plan.order.new_zeros(plan.order.shape[0], keys + 1, dtype=bool).scatter_(1, index, True)
    return present[:, None, None, :keys]


def _drop_path(x: Tensor, rate: float, training: bool) -> Tensor:
    """In training, zero samples of (B, …) with probability ``rate`` and scale the others by 1 / (1 − rate).

    References
    ----------
    Huang et al., Deep Networks with Stochastic Depth (2016).
    """
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)


def _initialise_delta_bias(bias: Tensor, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> None:
    """Set the bias so that softplus(bias) is log-uniform in [low, high] (Mamba, §3.6)."""
    delta = torch.exp(torch.empty_like(bias).uniform_(math.log(low), math.log(high))).clamp_min(floor)
    bias.copy_(delta + torch.log(-torch.expm1(-delta)))  # the inverse of softplus
