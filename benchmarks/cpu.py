"""Compare the CPU kernels with their lower bound, a model's matrix products, measured in the same run.

The lower bound of a forward pass is the time of the two matrix products of each block at the model's shapes, by MKL or
oneDNN, whichever is faster here; that of a training step includes their four gradients. Everything is float32.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import check_output, clock, fastest, machine, parser, write_results
from cellvim import ops
from cellvim.models.encoder import Encoder
from cellvim.models.registry import create_model
from cellvim.ops import native, reference
from cellvim.ops.scan_plan import ScanPlan

MODEL = "fastchannelvim_small_patch16"
CHANNELS, SIDE = 8, 224
TARGETS = {"forward / floor": 1.25, "training / floor": 1.5, "reference / fused": 5.0}


def keep_freed_memory() -> bool:
    """Configure glibc to reuse freed arrays instead of returning their pages to the system; return whether it does.

    The token arrays of a block take tens of megabytes. If every block allocates them from the system, zeroing the pages
    takes longer than the kernels. The setting applies to the whole process.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))


def run(quick: bool = False, threads: int | None = None) -> dict:
    """Run all measurements that `tables` shows.

    Parameters
    ----------
    quick
        Fewer rounds, one batch size, patch 16 only: about a minute.
    threads
        Number of threads of PyTorch and the kernels; chosen by PyTorch if None.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    keep_freed_memory()
    rounds = 3 if quick else 7
    return {
        "machine": machine(),
        "model": f"{MODEL}, {SIDE}² × {CHANNELS}",
        "targets": TARGETS,
        "forward": [forward(batch, rounds) for batch in ((1,) if quick else (1, 4))],
        "parts": parts(rounds),
        "ops": fused_ops(rounds),
        "training": training(1 if quick else 2, max(2, rounds // 2)),
        "models": models((16,) if quick else (16, 8), max(2, rounds // 2)),
        "memory": memory(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def forward(batch: int, rounds: int) -> dict[str, float]:
    """Time an inference forward pass and its matrix products; milliseconds per image."""
    model, images = _model(), torch.randn(batch, CHANNELS, SIDE, SIDE)
    functions = {"forward": partial(model, images)}
    for name, product in _products().items():
        functions[name] = _matrix_products(model, batch, product)
    with torch.inference_mode():
        times = fastest(functions, rounds)
    floor = min(times[name] for name in _products())
    milliseconds = {name: 1e3 * t / batch for name, t in times.items()}
    return {"batch": batch, **milliseconds, "forward / floor": times["forward"] / floor}


def parts(rounds: int) -> dict[str, float]:
    """Split the time of a forward pass (ms) into each op's sum over the blocks, and the rest."""
    model, images = _model(), torch.randn(1, CHANNELS, SIDE, SIDE)
    best: dict[str, float] = {}
    now = clock()
    with torch.inference_mode():
        model(images)
        for _ in range(rounds):
            with _timed_ops() as spent:
                start = now()
                model(images)
                spent["everything else"] = now() - start - sum(spent.values())
            best = {name: min(t, best.get(name, t)) for name, t in spent.items()}
    return {name: 1e3 * t for name, t in best.items()}


def fused_ops(rounds: int) -> dict[str, dict[str, float]]:
    """Compare each op of one block with the plain PyTorch reference, without and with backward; milliseconds."""
    results = {}
    for name, (inputs, options) in _block_inputs().items():
        leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
        functions = {}
        for backend in (native, reference):
            op = partial(getattr(backend, name), **options)
            functions[f"{backend.__name__} forward"] = partial(_without_grad, op, inputs)
            functions[f"{backend.__name__} step"] = partial(_with_backward, op, leaves)
        times = {k.removeprefix("cellvim.ops."): v for k, v in fastest(functions, max(2, rounds // 2)).items()}
        results[name] = {k: 1e3 * v for k, v in times.items()}
        for what in ("forward", "step"):
            results[name][f"{what} reference / fused"] = times[f"reference {what}"] / times[f"native {what}"]
    total = {k: sum(r[k] for r in results.values()) for k in next(iter(results.values())) if "/" not in k}
    for what in ("forward", "step"):
        total[f"{what} reference / fused"] = total[f"reference {what}"] / total[f"native {what}"]
    return results | {"all four": total}


def training(batch: int, rounds: int) -> dict[str, float]:
    """Time forward and backward passes and their matrix products; milliseconds per image."""
    model = _model().train()
    images, labels = torch.randn(batch, CHANNELS, SIDE, SIDE), torch.randint(0, 161, (batch,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()

    functions: dict[str, Callable] = {"training": step}
    for name, product in _products().items():
        functions[name] = _matrix_products(model, batch, product, with_gradients=True)
    times = fastest(functions, rounds)
    floor = min(times[name] for name in _products())
    milliseconds = {name: 1e3 * t / batch for name, t in times.items()}
    return {"batch": batch, **milliseconds, "training / floor": times["training"] / floor}


def models(patches: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Compare the inference of models of the same size, in ms per image; ViT and Vim use joint tokens."""
    results = {}
    for patch in patches:
        functions = {}
        for family in ("fastchannelvim", "channelvim", "channelvit", "fastvim", "vim", "vit"):
            model = _model(f"{family}_small_patch{patch}")
            functions[family] = partial(model, torch.randn(1, CHANNELS, SIDE, SIDE))
        with torch.inference_mode():
            times = fastest(functions, rounds)
        results[f"patch {patch}"] = {family: 1e3 * t for family, t in times.items()}
    return results


def memory() -> dict[str, dict[str, float]]:
    """Measure the peak memory of an inference forward pass without the weights, in token arrays of width 2E.

    The C library returns freed blocks at once during this measurement; by default glibc keeps some, which would count
    towards the resident size of the process.
    """
    results = {}
    for batch in (1, 4):
        for label, threshold in (("arrays alone", "262144"), ("resident, default malloc", None)):
            environment = dict(os.environ) | ({"MALLOC_MMAP_THRESHOLD_": threshold} if threshold else {})
            command = [sys.executable, "-c", f"from benchmarks.cpu import print_peak; print_peak({batch})"]
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            results[f"batch {batch}, {label}"] = json.loads(done.stdout.splitlines()[-1])
    return results


def print_peak(batch: int) -> None:
    """Print the peak memory of one forward pass as JSON; runs in a separate process (Linux)."""
    model, images = _model(), torch.randn(batch, CHANNELS, SIDE, SIDE)
    with torch.inference_mode():
        model(images[:1])  # libraries, thread pools and generated code are loaded before the measurement
        ctypes.CDLL(None).malloc_trim(0)  # return freed memory to the system
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the high-water mark
        before = _resident("VmRSS")
        model(images)
        extra = _resident("VmHWM") - before
    config = model.config
    array = batch * (SIDE // config.patch_size) ** 2 * CHANNELS * 2 * config.inner_dim * 4
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"weights MB": weights / 1e6, "beyond weights MB": extra / 1e6, "in token arrays": extra / array}))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of the measurements


def _model(name: str = MODEL) -> Encoder:
    """Return a model by name, for inference or for training with all channels."""
    changes = {"in_channels": CHANNELS, "image_size": SIDE, "num_classes": 161, "channel_sampling": "none"}
    return create_model(name, **changes).eval()


def _products() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    products = {"MKL": F.linear}
    if torch.backends.mkldnn.is_available():
        products["oneDNN"] = lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return products


def _matrix_products(model: Encoder, batch: int, product: Callable, with_gradients: bool = False) -> Callable:
    """Return a function that runs the two matrix products of every block, and their gradients."""
    config = model.config
    length = (SIDE // config.patch_size) ** 2 * CHANNELS
    tokens, mixed = torch.randn(batch, length, config.embed_dim), torch.randn(batch, length, config.inner_dim)

    @torch.no_grad()
    def multiply() -> None:
        for block in model.layers:
            for x, weight in ((tokens, block.mixer.in_proj.weight), (mixed, block.mixer.out_proj.weight)):
                y = product(x, weight)
                if with_gradients:
                    y @ weight
                    y.flatten(0, 1).T @ x.flatten(0, 1)

    return multiply


def _block_inputs() -> dict[str, tuple[dict[str, Tensor], dict]]:
    """Return inputs for the ops of one block at the model's shapes, for one image."""
    config = _model().config
    D, E, N, n = config.embed_dim, config.inner_dim, config.d_state, SIDE // config.patch_size
    L = n * n * CHANNELS
    plan = ScanPlan((n, n, CHANNELS), (n * CHANNELS, CHANNELS, 1), (False, True, False))
    P = plan.slots
    x, z = torch.randn(1, L, 2 * E).chunk(2, dim=-1)
    taps = {"weight": torch.randn(2, E, config.d_conv) * 0.5, "bias": torch.randn(2, E)}
    scan = {"pooled": (2, 1, P, E), "delta": (2, 1, P, E), "delta_bias": (2, E), "B": (2, 1, P, N), "C": (2, 1, P, N)}
    return {
        "add_norm": (
            {"hidden": torch.randn(1, L, D), "residual": torch.randn(1, L, D), "weight": torch.ones(D)},
            {"bias": None},
        ),
        "conv_pool": ({"x": x, **taps}, {"plan": plan}),
        "pooled_scan": ({k: torch.randn(s) for k, s in scan.items()} | {"A": -torch.rand(2, E, N) * 16}, {}),
        "expand_gate": (
            {
                **{"x": x, "z": z, "y": torch.randn(2, 1, P, E), "skip": torch.ones(2, E)},
                **taps,
                **{"norm_weight": torch.ones(E), "norm_bias": torch.zeros(E)},
            },
            {"plan": plan},
        ),
    }


def _without_grad(op: Callable, inputs: dict[str, Tensor]) -> None:
    with torch.inference_mode():
        op(**inputs)


def _with_backward(op: Callable, leaves: dict[str, Tensor]) -> None:
    out = op(**leaves)
    outputs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad(outputs, list(leaves.values()), [torch.ones_like(o) for o in outputs])


@contextmanager
def _timed_ops() -> Iterator[dict[str, float]]:
    """Sum the time spent in each op of `cellvim.ops` within the block."""
    names = ("linear", "add_norm", "conv_pool", "pooled_scan", "expand_gate")
    originals = {name: getattr(ops, name) for name in names}
    spent, now = dict.fromkeys(names, 0.0), clock()

    def timed(name: str, *args, **kwargs):
        start = now()
        result = originals[name](*args, **kwargs)
        spent[name] += now() - start
        return result

    try:
        for name in names:
            setattr(ops, name, partial(timed, name))
        yield spent
    finally:
        for name, original in originals.items():
            setattr(ops, name, original)


def _resident(field: str) -> int:
    """Return the bytes of this process in memory now ("VmRSS") or at most ("VmHWM")."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def tables(results: dict) -> list:
    """Return the results as rich tables."""
    from rich.table import Table

    def table(title: str, *columns: str) -> Table:
        made = Table(title=title, title_justify="left", title_style="bold")
        for i, column in enumerate(columns):
            made.add_column(column, justify="right" if i else "left")
        return made

    made = []
    where = results["machine"]
    title = f"{results['model']} on {where['processor']}, threads: {where['threads']}"
    made.append(table(title, "what", "×", "target"))
    for row in results["forward"]:
        ratio = row["forward / floor"]
        made[-1].add_row(f"forward / its matrix products, batch {row['batch']}", f"{ratio:.2f}", "≤ 1.25")
    made[-1].add_row("training step / its matrix products", f"{results['training']['training / floor']:.2f}", "≤ 1.5")
    for what, label in (("forward", "forward"), ("step", "with backward")):
        ratio = results["ops"]["all four"][f"{what} reference / fused"]
        made[-1].add_row(f"plain PyTorch / fused ops, {label}", f"{ratio:.1f}", "≥ 5")
    for batch, row in results["memory"].items():
        made[-1].add_row(f"peak beyond weights, token arrays of 2E, {batch}", f"{row['in token arrays']:.2f}", "≤ 3")

    made.append(table("Where a forward goes", "part", "ms", "share"))
    total = sum(results["parts"].values())
    for name, spent in results["parts"].items():
        made[-1].add_row(name, f"{spent:.1f}", f"{spent / total:.0%}")

    made.append(table("Ops of one block", "op", "forward ms", "× plain", "with backward ms", "× plain"))
    for name, row in results["ops"].items():
        cells = [row[k] for k in ("native forward", "forward reference / fused", "native step")]
        made[-1].add_row(name, *(f"{c:.2f}" for c in cells), f"{row['step reference / fused']:.2f}")

    columns = [c for patch in results["models"] for c in (f"{patch}, ms", "×")]
    made.append(table("Models of the same size, one image", "model", *columns))
    rows = list(results["models"].values())
    for family in rows[0]:
        cells = [c for row in rows for c in (f"{row[family]:.0f}", f"{row[family] / row['fastchannelvim']:.2f}")]
        made[-1].add_row(family, *cells)
    return made


def main() -> None:
    """Measure, print the tables and write the figures."""
    from rich.console import Console

    options = parser(__doc__)
    options.add_argument("--quick", action="store_true", help="fewer repetitions: about a minute")
    arguments = options.parse_args()
    check_output(arguments.output)
    results = run(quick=arguments.quick)
    for table in tables(results):
        Console().print(table)
    write_results(results, arguments.output)


if __name__ == "__main__":
    main()
