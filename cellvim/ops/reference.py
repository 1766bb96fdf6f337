"""The definition of every op in plain PyTorch, and the back end "reference": any device and dtype, differentiable.

B batch, L tokens, P scan steps, E inner width, N states, W convolution taps. Direction 0 reads the block's sequence
forwards, direction 1 backwards; arrays of both directions have a leading axis of 2. In both directions, tokens are in
stored order and scan steps in the order of the grid.

The arithmetic is in float32 (float64 for float64 inputs). Results have the type of ``x``.

References
----------
FastVim: pooling before the scan, §3; Vim: the bidirectional block, Alg. 1; Mamba: the selective scan, §3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cellvim.ops.scan_plan import ScanPlan

POOLS = ("none", "mean", "max", "attention")

name = "reference"


def available() -> bool:
    """Return True."""
    return True


def reason() -> str:
    """Return what it runs on."""
    return "plain PyTorch: any device, every dtype"


def refusal(*tokens: Tensor, taps: int = 1, states: int = 1) -> str | None:
    """Return None: all inputs are supported."""
    return None


def add_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float = 1e-5, kind: str = "rms"
) -> tuple[Tensor, Tensor]:
    """Add ``hidden`` to the residual stream and normalise the sum.

    Parameters
    ----------
    hidden
        (B, L, D), output of the previous block.
    residual
        (B, L, D) in float32 (or float64), or None before the first block.
    weight, bias
        (D,). ``bias`` is None for ``kind="rms"``.

    Returns
    -------
    normed, residual
        (B, L, D) in the type of ``hidden``, and (B, L, D) the new residual.
    """
    compute = _compute_type(hidden)
    total = hidden.to(compute) if residual is None else hidden.to(compute) + residual
    return _normalise(total, weight, bias, eps, kind).to(hidden.dtype), total


def conv_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ScanPlan,
    pool: str = "mean",
    score_weight: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """Convolve along the block's sequence in both directions, apply SiLU, and pool.

    Parameters
    ----------
    x
        (B, L, E) tokens in stored order.
    weight, bias
        (2, E, W) and (2, E): depthwise causal convolution; the last tap applies to the current token.
    pool
        "mean" (multiplied by ``plan.pool_scale``), "max", "attention", or "none" for a plan without pooled axes.
    score_weight, score_bias
        (2, E) and (2,): linear score of attention pooling; a softmax over the tokens of a slot follows.

    Returns
    -------
    (2, B, P, E)
        Slots without tokens are zero.
    """
    u = _convolve(x, weight, bias, plan)  # (2, B, L, E), the block's order
    if pool == "none" or (plan.is_dense and not plan.pools):
        pooled = u if plan.is_dense else _scatter_sum(u, plan)
    elif pool == "mean":
        pooled = _pool_mean(u, plan)
    elif pool == "max":
        pooled = _pool_max(u, plan)
    elif pool == "attention":
        pooled = _pool_attention(u, _score(u, score_weight, score_bias), plan)
    else:
        raise ValueError(f"pool is {pool!r}; expected one of {POOLS}")
    return pooled.to(x.dtype)


def attention_shares(
    x: Tensor, weight: Tensor, bias: Tensor | None, plan: ScanPlan, score_weight: Tensor, score_bias: Tensor
) -> Tensor:
    """Return the weight of each token in attention pooling; parameters as in `conv_pool`.

    Returns
    -------
    (2, B, L)
        In stored order. The weights of a slot sum to 1; missing tokens of ragged samples have weight 0.
    """
    u = _convolve(x, weight, bias, plan)  # (2, B, L, E), the block's order
    score = _score(u, score_weight, score_bias)
    if plan.is_dense:
        grid, pooled = score.unflatten(2, plan.sizes), _pool_axes(plan)
        largest = grid.amax(pooled, keepdim=True) if pooled else grid
        share = torch.exp(grid - largest)
        share = (share / share.sum(pooled, keepdim=True) if pooled else share).flatten(2)
    else:
        share, total = _slot_softmax(score, plan)
        share = share / total.gather(2, plan.slot.expand(-1, len(x), -1))
    return torch.stack([_to_stored_order(direction[..., None], plan)[..., 0] for direction in share])


def pooled_scan(pooled: Tensor, delta: Tensor, delta_bias: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Run the selective scan over the pooled steps, direction 1 from the last step to the first.

    ``h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t p_t``, ``y_t = C_t · h_t`` with Δ = softplus(delta + delta_bias).

    Parameters
    ----------
    pooled, delta
        (2, B, P, E).
    delta_bias
        (2, E).
    A
        (2, E, N), negative.
    B, C
        (2, B, P, N).

    Returns
    -------
    (2, B, P, E)
    """
    compute = _compute_type(pooled)
    step = F.softplus(delta.to(compute) + delta_bias.to(compute)[:, None, None])  # (2, B, P, E)
    drive = step * pooled.to(compute)
    step, drive, B, C = (_scan_order(t.to(compute)) for t in (step, drive, B, C))
    A = A.to(compute)[:, None]  # (2, 1, E, N)
    if isinstance(pooled.shape[2], torch.SymInt):  # an exported graph with a variable number of steps
        states = _scan_by_doubling(torch.exp(step[..., None] * A[:, :, None]), drive[..., None] * B[:, :, :, None])
        return _scan_order((states * C[:, :, :, None]).sum(-1)).to(pooled.dtype)
    state = A.new_zeros(2, pooled.shape[1], pooled.shape[3], A.shape[-1])  # (2, B, E, N)
    outputs = []
    for t in range(pooled.shape[2]):  # the pooled steps are the only loop
        decay = torch.exp(step[:, :, t, :, None] * A)
        state = decay * state + drive[:, :, t, :, None] * B[:, :, t, None, :]
        # Not a matrix product, whose order of summation may depend on the batch size.
        outputs.append((state * C[:, :, t, None, :]).sum(-1))
    return _scan_order(torch.stack(outputs, dim=2)).to(pooled.dtype)


def expand_gate(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    plan: ScanPlan,
    norm: str = "layer",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Expand the scanned steps to their tokens, add the skip, average the directions, normalise and gate.

    ``out = norm((Σ_k expand(y_k) + D_k · u_k) / 2) · SiLU(z)`` where u is the unpooled convolution of `conv_pool`.

    Parameters
    ----------
    x, z
        (B, L, E) in stored order.
    y
        (2, B, P, E), output of `pooled_scan`.
    weight, bias
        (2, E, W) and (2, E), as in `conv_pool`.
    skip
        (2, E), D of both directions; None for no skip.
    norm
        "layer", "rms" or "none", over E, with ``norm_weight`` and ``norm_bias`` (E,).

    Returns
    -------
    (B, L, E)
        In stored order; zero for missing tokens of ragged samples.
    """
    compute = _compute_type(x)
    out = _expand(y.to(compute), plan)  # (2, B, L, E), the block's order
    if skip is not None:
        out = out + skip.to(compute)[:, None, None] * _convolve(x, weight, bias, plan)
    out = _to_stored_order(out.mean(0), plan)  # (B, L, E)
    if norm != "none":
        out = _normalise(out, norm_weight, norm_bias, eps, norm)
    return (out * F.silu(z.to(compute))).to(x.dtype)


def pool_mean(x: Tensor, plan: ScanPlan) -> Tensor:
    """Return the mean of each slot's tokens, (B, L, D) in stored order -> (B, P, D)."""
    x = _to_block_order(x, plan).expand(2, -1, -1, -1)
    return (_pool_mean(x, plan) if plan.pools else x)[0]


def expand(y: Tensor, plan: ScanPlan) -> Tensor:
    """Copy the value of each slot to its tokens, (B, P, D) -> (B, L, D) in stored order."""
    return _to_stored_order(_expand(y.expand(2, -1, -1, -1), plan)[0], plan)


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _scan_by_doubling(decay: Tensor, drive: Tensor) -> Tensor:
    """Solve h_t = decay_t h_{t−1} + drive_t without a loop over t, for graphs with variable P.

    The arguments and the result are (2, B, P, E, N). Round k combines every step with the 2^k steps before it (Hillis
    and Steele, 1986), so that twelve rounds cover 4,096 steps.
    """
    rounds = 12
    torch._check(decay.shape[2] <= 2**rounds, lambda: f"An exported graph scans at most {2**rounds} steps.")
    t = torch.arange(decay.shape[2], device=decay.device)
    for k in range(rounds):
        reaches = (t >= 2**k)[:, None, None]
        earlier = (t - 2**k).clamp_min(0)
        drive = drive + decay * drive.index_select(2, earlier) * reaches
        decay = decay * torch.where(reaches, decay.index_select(2, earlier), 1.0)
    return drive


def _scan_order(t: Tensor) -> Tensor:
    """Reverse the steps of direction 1; the function is its own inverse."""
    return torch.stack([t[0], t[1].flip(1)])


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    weight = weight.to(x.dtype)
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, None if bias is None else bias.to(x.dtype), eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, plan: ScanPlan) -> Tensor:
    """Return SiLU(causal convolution) of both directions, (2, B, L, E), in the block's order."""
    x = _to_block_order(x.to(_compute_type(x)), plan)
    length, (_, E, taps) = x.shape[1], weight.shape
    weight = weight.to(x.dtype)
    bias = x.new_zeros(2, E) if bias is None else bias.to(x.dtype)
    padded = F.pad(x, (0, 0, taps - 1, taps - 1))
    # Tap j applies to the token taps − 1 − j steps before; in the backward direction, to the token after.
    forward = sum(weight[0, :, j] * padded[:, j : j + length] for j in range(taps))
    backward = sum(weight[1, :, j] * padded[:, 2 * (taps - 1) - j :][:, :length] for j in range(taps))
    u = F.silu(torch.stack([forward + bias[0], backward + bias[1]]))
    return u if plan.is_dense else u * _present(plan)[None, ..., None]


def _present(plan: ScanPlan) -> Tensor:
    """Return the steps of the block's order that have a token, (B or 1, L) bool."""
    return plan.order >= 0


def _to_block_order(x: Tensor, plan: ScanPlan) -> Tensor:
    """Convert (B, L, E) from stored order to the block's order; missing tokens are zero."""
    if plan.is_dense:
        axes = plan.stored_axes
        if axes == (0, 1, 2):
            return x
        grid = x.unflatten(1, [plan.sizes[a] for a in axes])
        return grid.permute(0, *(1 + axes.index(a) for a in range(3)), 4).flatten(1, 3)
    index = plan.order.clamp_min(0).expand(x.shape[0], -1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1])) * _present(plan)[..., None]


def _to_stored_order(x: Tensor, plan: ScanPlan) -> Tensor:
    """Invert `_to_block_order`; tokens that no step visits are zero."""
    if plan.is_dense:
        axes = plan.stored_axes
        if axes == (0, 1, 2):
            return x
        return x.unflatten(1, plan.sizes).permute(0, *(1 + a for a in axes), 4).flatten(1, 3)
    index = plan.order.clamp_min(0).expand(x.shape[0], -1)
    x = x * _present(plan)[..., None]
    return torch.zeros_like(x).scatter_add(1, index[..., None].expand(-1, -1, x.shape[-1]), x)


def _pool_axes(plan: ScanPlan) -> list[int]:
    return [2 + a for a in range(3) if plan.pooled[a]]


def _grouped(u: Tensor, plan: ScanPlan) -> Tensor:
    """Group the tokens of each slot, (2, B, L, E) -> (2, B, P, G, E)."""
    kept = [2 + a for a in range(3) if not plan.pooled[a]]
    grid = u.unflatten(2, plan.sizes).permute(0, 1, *kept, *_pool_axes(plan), 5)
    return grid.reshape(*u.shape[:2], plan.slots, plan.group, u.shape[-1])


def _pool_mean(u: Tensor, plan: ScanPlan) -> Tensor:
    if plan.is_dense:
        return u.unflatten(2, plan.sizes).mean(_pool_axes(plan)).flatten(2, -2) * plan.pool_scale
    return _scatter_sum(u, plan) * plan.slot_weight.to(u.dtype)[None, ..., None]


def _pool_max(u: Tensor, plan: ScanPlan) -> Tensor:
    if plan.is_dense:
        return _grouped(u, plan).max(dim=3).values
    lowest = u.masked_fill(~_present(plan)[None, ..., None], float("-inf"))
    index = _slot_index(u, plan)
    best = u.new_full((*u.shape[:2], plan.slots, u.shape[-1]), float("-inf")).scatter_reduce(2, index, lowest, "amax")
    return torch.where(best.isinf(), torch.zeros_like(best), best)


def _pool_attention(u: Tensor, score: Tensor, plan: ScanPlan) -> Tensor:
    """Sum the tokens of each slot, weighted by the softmax of ``score`` (2, B, L)."""
    if plan.is_dense:
        share = _grouped(score[..., None], plan).softmax(dim=3)  # (2, B, P, G, 1)
        return (share * _grouped(u, plan)).sum(3)
    share, total = _slot_softmax(score, plan)
    return _scatter_sum(u * share[..., None], plan) / total[..., None]


def _score(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the linear score of attention pooling, (2, B, L, E) -> (2, B, L)."""
    # Not a matrix product, whose order of summation may depend on the batch size.
    return (u * weight.to(u.dtype)[:, None, None]).sum(-1) + bias.to(u.dtype)[:, None, None]


def _slot_softmax(score: Tensor, plan: ScanPlan) -> tuple[Tensor, Tensor]:
    """Return exp(score − maximum of the slot), (2, B, L), 0 for missing tokens; and its sum per slot, (2, B, P)."""
    score = score.masked_fill(~_present(plan)[None], float("-inf"))
    slot = plan.slot.expand(-1, score.shape[1], -1)
    top = score.new_full((*score.shape[:2], plan.slots), float("-inf")).scatter_reduce(2, slot, score, "amax")
    top = torch.where(top.isinf(), torch.zeros_like(top), top).detach()
    share = torch.exp(score - top.gather(2, slot))
    total = torch.zeros_like(top).scatter_add(2, slot, share)
    return share, torch.where(total == 0, torch.ones_like(total), total)


def _slot_index(u: Tensor, plan: ScanPlan) -> Tensor:
    return plan.slot.expand(-1, u.shape[1], -1)[..., None].expand(-1, -1, -1, u.shape[-1])


def _scatter_sum(u: Tensor, plan: ScanPlan) -> Tensor:
    return u.new_zeros(*u.shape[:2], plan.slots, u.shape[-1]).scatter_add(2, _slot_index(u, plan), u)


def _expand(y: Tensor, plan: ScanPlan) -> Tensor:
    """Copy the value of each slot to its tokens, (2, B, P, E) -> (2, B, L, E) in the block's order."""
    if plan.is_dense:
        if not plan.pools:
            return y
        kept = [1 if away else n for n, away in zip(plan.sizes, plan.pooled, strict=True)]
        return y.unflatten(2, kept).expand(-1, -1, *plan.sizes, -1).flatten(2, 4)
    return y.gather(2, _slot_index(y, plan))
