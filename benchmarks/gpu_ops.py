"""Single fused ops on a GPU: their rates relative to the copy rate, and the parts of a block's time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_timing import PRECISIONS, Bench, fit_batch
from cellvim import ops
from cellvim.models.config import EncoderConfig
from cellvim.models.grid import TokenGrid
from cellvim.models.registry import model_config
from cellvim.ops import mamba_ssm

OPS = ("add_norm", "conv_pool", "pooled_scan", "expand_gate")
_PARTS = ("add_norm", "in_proj", "conv_pool", "delta", "pooled_scan", "expand_gate", "out_proj")  # in their order
PAPER_BLOCK = {"pool": 3.5, "repeat": 3.9, "skip": 12.2, "all": 20.1}  # ms, Table 23; published, not run here


def small_config(bench: Bench, name: str, side: int) -> tuple[EncoderConfig, int]:
    """Return a model's configuration for an image side in pixels, and that side; tiny in a dry run."""
    if not bench.is_dry:
        return model_config(name, image_size=side, channel_sampling="none"), side
    config = model_config(name, channel_sampling="none")
    side = 4 * config.patch_size
    changes = {"image_size": side, "depth": 2, "embed_dim": 48, "num_classes": 5}
    changes |= {"in_channels": min(3, config.in_channels)}
    return config.replace(**changes, **({"num_heads": 3} if config.mixer == "attention" else {})), side


def block_inputs(bench: Bench, config: EncoderConfig, side: int, batch: int, block: int, dtype: torch.dtype) -> dict:
    """Return random inputs of the four ops of a model's block: {op: (tensors, other arguments)}."""
    rows, columns = config.grid_size(side, side)
    grid = TokenGrid(config, rows, columns, config.in_channels if config.tokens == "per_channel" else 1)
    plan = grid.plan(block)
    D, E, N, L, P = config.embed_dim, config.inner_dim, config.d_state, grid.count, plan.slots
    new = partial(torch.randn, device=bench.device)
    x, z = new(batch, L, 2 * E, dtype=dtype).chunk(2, dim=-1)
    taps = {"weight": new(2, E, 4) * 0.5, "bias": new(2, E)}
    scan = {k: new(2, batch, P, E, dtype=dtype) for k in ("pooled", "delta")}
    scan |= {"delta_bias": new(2, E) - 4, "A": -torch.rand(2, E, N, device=bench.device) * 16}
    scan |= {k: new(2, batch, P, N) for k in ("B", "C")}
    gate = {"x": x, "z": z, "y": new(2, batch, P, E, dtype=dtype), **taps, "skip": new(2, E)}
    return {
        "add_norm": (
            {"hidden": new(batch, L, D, dtype=dtype), "residual": new(batch, L, D), "weight": new(D), "bias": None},
            {},
        ),
        "conv_pool": ({"x": x, **taps}, {"plan": plan, "pool": config.pool}),
        "pooled_scan": (scan, {}),
        "expand_gate": (gate | {"norm_weight": new(E), "norm_bias": new(E)}, {"plan": plan}),
    }


def op_rate(bench: Bench, op: str, name: str, side: int, batch: int, precision: str, block: int) -> dict:
    """Measure forward and backward of one op of one block: bytes, time, and the rate relative to the copy rate.

    Bytes are those of all arguments and results, each read or written once. Arrays smaller than the GPU's cache, 50 MB,
    may exceed the copy rate. The time of backward is that of both minus that of forward.
    """
    config, side = small_config(bench, name, side)
    dtype = PRECISIONS[precision][0] or torch.float32

    def measure(batch: int) -> dict:
        inputs, options = block_inputs(bench, config, side, batch, block, dtype)[op]
        run = getattr(ops, op)
        with torch.no_grad():
            outputs = _tuple(run(**inputs, **options))
            forward = bench.milliseconds(lambda: run(**inputs, **options))
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None}
        wanted, directions = list(leaves.values()), [torch.randn_like(o) for o in outputs]

        def both() -> None:
            results = _tuple(run(**{k: leaves.get(k) for k in inputs}, **options))
            torch.autograd.grad(results, wanted, directions)

        read = sum(t.nbytes for t in wanted)
        written = sum(t.nbytes for t in outputs)
        backward = max(bench.milliseconds(both) - forward, 1e-6)
        row = _rate(bench, "forward", read + written, forward)
        return row | _rate(bench, "backward", 2 * read + written, backward)

    with bench.using(backend=bench.backend):
        return fit_batch(bench, batch, measure)


def _tuple(outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _rate(bench: Bench, which: str, size: int, time: float) -> dict:
    rate = size / time / 1e6
    row = {f"{which} MB": size / 1e6, f"{which} ms": time, f"{which} GB/s": rate}
    copy = bench.rates.get("copy GB/s")
    return row | ({f"{which} of copy": rate / copy} if copy else {})


def block_parts(bench: Bench, name: str, side: int, batch: int, precision: str) -> dict:
    """Split the time of one block at inference (ms) into its ops, and the products before and after them.

    Two blocks are measured, which pool along different axes; a part is their mean.
    """
    config, side = small_config(bench, name, side)
    dtype = PRECISIONS[precision][0] or torch.float32

    def measure(batch: int) -> dict:
        parts = dict.fromkeys(_PARTS, 0.0)
        for block in range(2):
            inputs = block_inputs(bench, config, side, batch, block, dtype)
            for op in OPS:
                tensors, options = inputs.pop(op)
                parts[op] += bench.milliseconds(partial(getattr(ops, op), **tensors, **options)) / 2
                if op == "conv_pool":
                    P = options["plan"].slots
                del tensors
        rows = batch * _tokens(config, side)
        for part, function in _products(bench, config, rows, batch * P, dtype).items():
            parts[part] = bench.milliseconds(function)
        ssm = parts["conv_pool"] + parts["pooled_scan"] + parts["expand_gate"]
        return {"ms": parts, "SSM part, ms": ssm, "block, ms": sum(parts.values()), "depth": config.depth}

    with torch.no_grad(), bench.using(precision):
        return fit_batch(bench, batch, measure)


def _tokens(config: EncoderConfig, side: int) -> int:
    rows, columns = config.grid_size(side, side)
    return rows * columns * (config.in_channels if config.tokens == "per_channel" else 1)


def _products(bench: Bench, config: EncoderConfig, rows: int, pooled: int, dtype) -> dict[str, Callable[[], object]]:
    """Return a block's matrix products as functions: in, out, and from pooled tokens to Δ, B, C of both directions."""
    D, E, r, N = config.embed_dim, config.inner_dim, config.delta_rank, config.d_state
    new = partial(torch.randn, device=bench.device, dtype=dtype)
    tokens, mixed, scanned, low = new(rows, D), new(rows, E), new(2, pooled, E), new(2, pooled, r)
    w_in, w_out, w_x, w_dt = new(2 * E, D), new(D, E), new(r + 2 * N, E), new(E, r)

    def delta() -> None:
        for k in range(2):
            F.linear(scanned[k], w_x)
            F.linear(low[k], w_dt)

    return {
        "in_proj": lambda: F.linear(tokens, w_in),
        "delta": delta,
        "out_proj": lambda: F.linear(mixed, w_out),
    }


def plain_parts(bench: Bench, name: str, side: int, batch: int) -> dict:
    """Time the three parts of Table 23 that are fused here as single PyTorch ops: float32, ms, both directions.

    References
    ----------
    Kapse et al., Fast Vision Mamba (2025), Table 23: pool, repeat, and the skip.
    """
    config, side = small_config(bench, name, side)
    rows, columns = config.grid_size(side, side)
    E = config.inner_dim

    def measure(batch: int) -> dict:
        u = torch.randn(batch, rows, columns, E, device=bench.device)
        y, skip = torch.randn(batch, rows, 1, E, device=bench.device), torch.randn(E, device=bench.device)
        parts = {
            "pool": lambda: u.mean(2),
            "repeat": lambda: y.expand_as(u).contiguous(),
            "skip": lambda: u + skip * u,
        }
        times = {part: 2 * bench.milliseconds(function) for part, function in parts.items()}
        return {"ms": times, "together, ms": sum(times.values()), "the paper's, ms": PAPER_BLOCK}

    with torch.no_grad():
        return fit_batch(bench, batch, measure)


def scan_times(bench: Bench, steps: int, batch: int, width: int, precision: str) -> dict:
    """Time the scan, without and with backward: ours, mamba-ssm's if installed, plain PyTorch."""
    steps, batch, width = bench.size(steps, 5), bench.size(batch, 2), bench.size(width, 16)
    dtype = PRECISIONS[precision][0] or torch.float32

    def measure(batch: int) -> dict:
        new = partial(torch.randn, device=bench.device)
        inputs = {k: new(2, batch, steps, width, dtype=dtype) for k in ("pooled", "delta")}
        inputs |= {"delta_bias": new(2, width) - 4, "A": -torch.rand(2, width, 16, device=bench.device) * 16}
        inputs |= {k: new(2, batch, steps, 16) for k in ("B", "C")}
        leaves = {k: v.requires_grad_() for k, v in inputs.items()}
        direction = new(2, batch, steps, width, dtype=dtype)
        row: dict = {}
        for label, backend in {"ours": bench.backend, "mamba-ssm": "mamba_ssm", "plain": "reference"}.items():
            if backend == "mamba_ssm" and not mamba_ssm.available():
                continue
            if backend == "reference" and steps > 512:
                continue  # at least one launch per step: takes seconds
            with bench.using(backend=backend):
                with torch.no_grad():
                    row[f"{label}, ms"] = bench.milliseconds(lambda: ops.pooled_scan(**leaves))
                row[f"{label} with backward, ms"] = bench.milliseconds(
                    lambda: torch.autograd.grad(ops.pooled_scan(**leaves), list(leaves.values()), direction)
                )
        return row

    return fit_batch(bench, batch, measure)
