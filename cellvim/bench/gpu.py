"""How near the CUDA kernels run to the floor of one GPU, and the paper's throughput comparisons.

Two rates are measured first, in the same run: a large copy in device memory (bytes read and written) and a large
bfloat16 matrix product, both on random data. The floor of a fused op is its arrays, each read and written once, over
the copy rate; that of a forward pass adds the matrix products of every block over the matrix rate. Times are medians of
CUDA events; models at inference are replayed as CUDA graphs.
"""

from __future__ import annotations

import gc
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import cellvim
from cellvim import ops
from cellvim.errors import BackendError
from cellvim.models.encoder import Encoder
from cellvim.models.flops import count_flops
from cellvim.models.graphs import GraphedEncoder
from cellvim.models.registry import create_model
from cellvim.ops import cuda
from cellvim.ops.plan import ScanPlan

GPU = torch.device("cuda")
TARGETS = {  # on one H200, bfloat16
    "fastchannelvim_small_patch16, 224 px": 3_400,
    "fastchannelvim_small_patch8, 224 px": 860,
    "fastvim_tiny_patch16, 224 px": 45_000,
    "SSM part, ms": 3.0,
    "training / plain PyTorch": 3.0,
}
PAPER_BLOCK = {"pool": 3.5, "repeat": 3.9, "skip": 12.2, "all": 20.1}  # ms, Table 23; published, not run here
IMAGE_SIZES = (224, 512, 1024, 1536, 2048)  # Fig. 5, 8–11


def run(quick: bool = False) -> dict:
    """Measure everything that `tables` shows.

    Parameters
    ----------
    quick
        Fewer repetitions, models and image sizes: under three minutes.

    Raises
    ------
    BackendError
        The CUDA kernels do not run here.
    """
    if not cuda.available():
        raise BackendError(f"cellvim bench gpu needs the CUDA kernels: {cuda.reason()}.")
    torch.manual_seed(0)
    rounds = 5 if quick else 20
    rates = {"copy GB/s": copy_rate(rounds), "matrix TFLOP/s": matrix_rate(rounds)}
    channels = [*_per_channel_models(quick)]
    images = [*_joint_models(quick)]
    return {
        "machine": machine(),
        "targets": TARGETS,
        "rates": rates,
        "ops": fused_ops(rates["copy GB/s"], rounds),
        "block": block_breakdown(rounds),
        "channels": [measure_model(*model, rates, rounds) for model in channels],
        "images": [measure_model(*model, rates, rounds) for model in images],
        "training": [training_step(name, batch, rounds) for name, batch in _trained_models(quick)],
        "plain": plain_training(rounds),
    }


def _per_channel_models(quick: bool) -> Iterator[tuple]:
    """(name, image side, batch, autocast) of the models of one token a patch and channel, 8 channels."""
    for autocast in (True,) if quick else (True, False):
        yield "fastchannelvim_small_patch16", 224, 64, autocast
        yield "fastchannelvim_small_patch8", 224, 16, autocast
        yield "fastchannelvim_tiny_patch16", 224, 128, autocast
        yield "channelvim_small_patch16", 224, 64, autocast
        yield "channelvit_small_patch16", 224, 64, autocast
        yield "channelvit_small_patch8", 224, 16, autocast
        if not quick:
            yield "channelvim_small_patch8", 224, 16, autocast


def _joint_models(quick: bool) -> Iterator[tuple]:
    """The same of the models of one token a patch, against the image's side (Fig. 5, 8–11)."""
    for autocast in (True,) if quick else (True, False):
        for side in (224, 2048) if quick else IMAGE_SIZES:
            for family in ("fastvim", "vim", "vit"):
                yield f"{family}_tiny_patch16", side, max(4, 1024 * 224**2 // side**2), autocast
        if not quick:
            for size, batch in (("small", 512), ("base", 256)):
                for family in ("fastvim", "vim", "vit"):
                    yield f"{family}_{size}_patch16", 224, batch, autocast


def _trained_models(quick: bool) -> Iterator[tuple[str, int]]:
    yield "fastchannelvim_small_patch16", 32
    if not quick:
        yield "channelvim_small_patch16", 32
        yield "channelvit_small_patch16", 32
        yield "fastchannelvim_small_patch8", 8
        yield "fastvim_tiny_patch16", 512
        yield "vim_tiny_patch16", 512
        yield "vit_tiny_patch16", 512


def machine() -> dict[str, object]:
    """Describe the GPU and the versions that a result depends on."""
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        state = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        state = "unknown"
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GB": round(properties.total_memory / 1e9, 1),
        "driver, clocks, power limit": state,
        "cellvim": cellvim.__version__,
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "python": platform.python_version(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Rates and times


def milliseconds(function: Callable[[], object], rounds: int) -> float:
    """Median time of a function on the GPU."""
    for _ in range(3):
        function()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_rate(rounds: int) -> float:
    """GB/s of a copy of 2 GB within the GPU's memory, bytes read and written."""
    source = torch.randn(2**29, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), rounds) / 1e6


def matrix_rate(rounds: int) -> float:
    """TFLOP/s of a bfloat16 matrix product of 8,192³, random data."""
    n = 8192
    a, b = (torch.randn(n, n, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b, rounds) / 1e9


# ---------------------------------------------------------------------------------------------------------------------
# Ops


def fused_ops(copy_rate: float, rounds: int) -> list[dict]:
    """Each op of one block of FastChannelVim-S/16, forward and backward: bytes, time, rate over the copy rate."""
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for transposed in (False, True):
            for name, (inputs, options) in _block_inputs(64, 384, 14, 8, transposed, dtype).items():
                if transposed and "plan" not in options:
                    continue
                grid = ", transposed grid" if transposed else ""
                label = f"{name}, {str(dtype).removeprefix('torch.')}{grid}"
                rows += _op_rows(label, getattr(cuda, name), inputs, options, copy_rate, rounds)
    return rows


def _op_rows(label: str, op: Callable, inputs: dict, options: dict, copy_rate: float, rounds: int) -> Iterator[dict]:
    with torch.no_grad():
        outputs = op(**inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        forward = milliseconds(lambda: op(**inputs, **options), rounds)
    size = sum(t.nbytes for t in (*_tensors(inputs), *outputs))
    yield _rate_row(f"{label}, forward", size, forward, copy_rate)

    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items() if v is not None}
    results = op(**{k: leaves.get(k) for k in inputs}, **options)
    results = results if isinstance(results, tuple) else (results,)
    directions = [torch.randn_like(r) for r in results]
    wanted = list(leaves.values())
    backward = milliseconds(
        lambda: torch.autograd.grad(results, wanted, directions, retain_graph=True, allow_unused=True), rounds
    )
    read = sum(t.nbytes for t in (*_tensors(inputs), *directions))
    yield _rate_row(f"{label}, backward", read + sum(t.nbytes for t in wanted), backward, copy_rate)


def _tensors(inputs: dict) -> list[Tensor]:
    return [t for t in inputs.values() if t is not None]


def _rate_row(what: str, size: int, time: float, copy_rate: float) -> dict:
    rate = size / time / 1e6
    return {"what": what, "MB": size / 1e6, "ms": time, "GB/s": rate, "of the copy rate": rate / copy_rate}


def _block_inputs(batch: int, D: int, side: int, channels: int, transposed: bool, dtype) -> dict:
    """Inputs of one block's ops: ``side``² patches, rows pooled over columns or, transposed, columns over rows."""
    E, N, L = 2 * D, 16, side * side * channels
    rows, columns = side * channels, channels
    strides = (columns, rows, 1) if transposed else (rows, columns, 1)
    plan = ScanPlan((side, side, channels), strides, (False, True, False))
    P = plan.slots
    new = partial(torch.randn, device=GPU)
    x, z = new(batch, L, 2 * E, dtype=dtype).chunk(2, dim=-1)
    taps = {"weight": new(2, E, 4) * 0.5, "bias": new(2, E)}
    scan = {k: new(2, batch, P, E, dtype=dtype) for k in ("pooled", "delta")}
    scan |= {"delta_bias": new(2, E) - 4, "A": -torch.rand(2, E, N, device=GPU) * 16}
    scan |= {k: new(2, batch, P, N) for k in ("B", "C")}
    return {
        "add_norm": (
            {"hidden": new(batch, L, D, dtype=dtype), "residual": new(batch, L, D), "weight": new(D), "bias": None},
            {},
        ),
        "conv_pool": ({"x": x, **taps}, {"plan": plan}),
        "pooled_scan": (scan, {}),
        "expand_gate": (
            {"x": x, "z": z, "y": new(2, batch, P, E, dtype=dtype), **taps, "skip": new(2, E)}
            | {"norm_weight": new(E), "norm_bias": new(E)},
            {"plan": plan},
        ),
    }


def block_breakdown(rounds: int) -> dict:
    """A block of FastVim-T at 2048², batch 128, float32, at inference: the paper's Table 23; milliseconds."""
    D, side, batch = 192, 128, 128
    parts = {}
    with torch.no_grad():
        for name, (inputs, options) in _block_inputs(batch, D, side, 1, False, torch.float32).items():
            parts[name] = milliseconds(partial(getattr(cuda, name), **inputs, **options), rounds)
        del inputs
        tokens = torch.randn(batch * side * side, D, device=GPU)
        weight = torch.randn(4 * D, D, device=GPU)
        parts["in_proj"] = milliseconds(lambda: F.linear(tokens, weight), rounds)
        mixed, weight = torch.randn(batch * side * side, 2 * D, device=GPU), torch.randn(D, 2 * D, device=GPU)
        parts["out_proj"] = milliseconds(lambda: F.linear(mixed, weight), rounds)
    _free()
    ssm = sum(parts[name] for name in ("conv_pool", "pooled_scan", "expand_gate"))
    return {"ms": parts, "SSM part, ms": ssm, "paper, ms": PAPER_BLOCK}


# ---------------------------------------------------------------------------------------------------------------------
# Models


def measure_model(name: str, side: int, batch: int, autocast: bool, rates: dict[str, float], rounds: int) -> dict:
    """Images a second at inference, peak memory, and the ratio to the floor; the batch is halved until it fits."""
    model = _model(name, side).eval()
    what = f"{name}, {side} px"
    while True:
        try:
            time, peak = _time_inference(model, side, batch, autocast, rounds)
            break
        except torch.OutOfMemoryError:
            _free()
            if batch == 1:
                return {"what": what, "autocast": autocast, "batch": 1, "note": "out of memory"}
            batch //= 2
    _free()
    floor = floor_milliseconds(model, side, autocast, rates)
    rate = 1e3 * batch / time
    row = {"what": what, "autocast": autocast, "batch": batch, "img/s": rate, "peak GB": peak / 1e9}
    return row | {"floor img/s": 1e3 / floor, "of the floor": rate * floor / 1e3}


def _time_inference(model: Encoder, side: int, batch: int, autocast: bool, rounds: int) -> tuple[float, int]:
    images = torch.randn(batch, model.config.in_channels, side, side, device=GPU)
    dtype = torch.bfloat16 if autocast else None
    cast = torch.autocast("cuda", dtype) if autocast else nullcontext()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), cast:
        model(images)
    peak = torch.cuda.max_memory_allocated()
    encode = GraphedEncoder(model, autocast=dtype)
    return milliseconds(lambda: encode(images), max(3, rounds // 2)), peak


def floor_milliseconds(model: Encoder, side: int, autocast: bool, rates: dict[str, float]) -> float:
    """Time of one image if nothing but its products and its arrays counted.

    For Mamba blocks: the two products of each at the matrix rate (for float32, a sixteenth of it: the H200's plain
    float32 against its bfloat16), and the arrays of each fused op and each product once at the copy rate. For
    transformers: all products and the attention at the matrix rate alone.
    """
    config = model.config
    rate = rates["matrix TFLOP/s"] * 1e9 / (1 if autocast else 16)  # operations a millisecond
    counted = count_flops(config, side, side)
    if config.mixer == "attention":
        return 2 * counted["total"] / rate
    size = 2 if autocast else 4
    grid = side // config.patch_size
    L = grid * grid * (config.in_channels if config.tokens == "per_channel" else 1)
    P = L if config.pool == "none" else L // grid
    D, E = config.embed_dim, config.inner_dim
    bytes_of_block = 2 * L * D * size + 2 * L * D * 4  # add_norm; the residual stream is float32
    bytes_of_block += (L * E + 2 * P * E) * size  # conv_pool
    bytes_of_block += 6 * P * E * size + 4 * P * config.d_state * 4  # pooled_scan
    bytes_of_block += (3 * L * E + 2 * P * E) * size  # expand_gate
    bytes_of_block += (2 * L * D + 3 * L * E) * size  # the two products
    return 2 * counted["projections"] / rate + config.depth * bytes_of_block / rates["copy GB/s"] / 1e6


def training_step(name: str, batch: int, rounds: int, backend: str = "cuda") -> dict:
    """Images a second of forward, backward and AdamW under bfloat16 autocast."""
    model = _model(name, 224).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(batch, model.config.in_channels, 224, 224, device=GPU)
    labels = torch.randint(0, model.config.num_classes, (batch,), device=GPU)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()

    torch.cuda.reset_peak_memory_stats()
    with ops.use_backend(backend):
        try:
            time = milliseconds(step, max(2, rounds // 4))
        except torch.OutOfMemoryError:
            del model, optimizer
            _free()
            if batch == 1:
                return {"what": name, "batch": 1, "note": "out of memory"}
            return training_step(name, batch // 2, rounds, backend)
    peak = torch.cuda.max_memory_allocated() / 1e9
    _free()
    return {"what": name, "batch": batch, "img/s": 1e3 * batch / time, "peak GB": peak}


def plain_training(rounds: int) -> dict:
    """A training step of FastChannelVim-S/16 on our kernels against the same on plain PyTorch ops, same batch."""
    name = "fastchannelvim_small_patch16"
    plain = training_step(name, 16, rounds, "reference")
    ours = training_step(name, plain["batch"], rounds)
    return {"batch": plain["batch"], "plain": plain, "ours": ours, "ratio": ours["img/s"] / plain["img/s"]}


def _model(name: str, side: int) -> Encoder:
    """The named model for this image size; in training all channels stay."""
    return create_model(name, image_size=side, channel_sampling="none").to(GPU)


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def tables(results: dict) -> list:
    """The results as rich tables."""
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left")
        return made

    rates = results["rates"]
    title = f"{results['machine']['gpu']}: copy {rates['copy GB/s']:,.0f} GB/s, "
    title += f"bfloat16 products {rates['matrix TFLOP/s']:,.0f} TFLOP/s"
    made = [table(title, "op of a block of FastChannelVim-S/16, batch 64", "MB", "ms", "GB/s", "of the copy rate")]
    for row in results["ops"]:
        cells = f"{row['MB']:.0f}", f"{row['ms']:.3f}", f"{row['GB/s']:,.0f}", f"{row['of the copy rate']:.0%}"
        made[-1].add_row(row["what"], *cells)

    block = results["block"]
    made.append(table("Block of FastVim-T, 2048², batch 128, float32 (Table 23)", "part", "ms"))
    for name, time in block["ms"].items():
        made[-1].add_row(name, f"{time:.2f}")
    made[-1].add_row(f"SSM part (target {TARGETS['SSM part, ms']})", f"{block['SSM part, ms']:.2f}")
    made[-1].add_row("the paper's, on its GPU", f"{block['paper, ms']['all']}")

    for key, title in (("channels", "224² × 8 channels, inference"), ("images", "RGB images, inference")):
        columns = ("autocast", "batch", "img/s", "target", "of the floor", "peak GB")
        made.append(table(title, "model", *columns))
        for row in results[key]:
            made[-1].add_row(row["what"], *_model_cells(row))

    made.append(table("Training step, bfloat16 autocast, 224²", "model", "batch", "img/s", "peak GB"))
    for row in results["training"]:
        numbers = ("–", "–") if "note" in row else (f"{row['img/s']:,.0f}", f"{row['peak GB']:.1f}")
        made[-1].add_row(row["what"], str(row["batch"]), *numbers)
    plain = results["plain"]
    ratio = f"{plain['ratio']:.1f} × (target {TARGETS['training / plain PyTorch']:.0f})"
    made[-1].add_row("fastchannelvim_small_patch16 / plain PyTorch", str(plain["batch"]), ratio, "")
    return made


def _model_cells(row: dict) -> tuple[str, ...]:
    precision = "bfloat16" if row["autocast"] else "no"
    if "note" in row:
        return precision, str(row["batch"]), row["note"], "", "", ""
    target = TARGETS.get(row["what"]) if row["autocast"] else None
    rates = f"{row['img/s']:,.0f}", f"{target:,}" if target else "", f"{row['of the floor']:.0%}"
    return precision, str(row["batch"]), *rates, f"{row['peak GB']:.1f}"
