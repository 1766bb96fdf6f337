"""Check the CUDA kernels on this GPU: ``python -m benchmarks.gpu_check`` from the root of the repository.

The checks compare every op and gradient at random shapes and plans with the definition in float64 on the CPU. They
cover determinism, extreme values, arrays of more than 2³¹ elements, streams, the published (golden) numbers, CUDA
graphs and, where installed, compute-sanitizer's memcheck and racecheck (``pip install nvidia-cuda-sanitizer-api``).

Each group of checks runs in its own process, so that a crash costs one check (see `benchmarks.isolation`). Rows are
appended to a file of JSON lines; a repeated run skips the checks that the file contains. Requires PyTorch, numpy, and
nvcc unless CellVim is installed with its CUDA library or ``CELLVIM_CUDA_LIBRARY`` names one. The exit code is 1 if a
check failed and 2 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "ops"), str(REPOSITORY / "tests" / "models")]

import cases  # noqa: E402

import cellvim  # noqa: E402
from benchmarks import cuda_library, isolation  # noqa: E402
from cellvim import ops  # noqa: E402
from cellvim.ops import cuda, reference  # noqa: E402
from cellvim.ops.scan_plan import ScanPlan  # noqa: E402

RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu_check.jsonl"
FLOAT32_TOLERANCE = 1e-5
ROUNDING = {torch.bfloat16: 2**-9, torch.float16: 2**-12}
LOW_PRECISION = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW_PRECISION)
SANITIZER_WIDTHS = (384, 768)  # several warps work on a row, so that a missing barrier would show
POOLED = [(a, b, c) for a in (False, True) for b in (False, True) for c in (False, True) if not (a and b and c)]
GPU = torch.device("cuda")


def main(argv: list[str] | None = None) -> int:
    """Run the checks in child processes, print them and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=24, help="random shapes per op (default: 24)")
    parser.add_argument("--only", metavar="GROUP,…", help=f"groups of checks: {', '.join(groups(1))}")
    parser.add_argument("--skip", metavar="GROUP,…", default="", help="groups of checks to leave out")
    parser.add_argument("--seconds", type=float, default=3600, help="time limit (default: 3600)")
    parser.add_argument(
        "-o", "--output", type=Path, default=RESULTS, help="file of JSON lines; a repeated run continues"
    )
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    known = groups(options.examples)
    chosen = options.only.split(",") if options.only else list(known)
    unknown = {*chosen, *filter(None, options.skip.split(","))} - set(known)
    if unknown:
        parser.error(f"there are no checks called {', '.join(sorted(unknown))}; the groups are {', '.join(known)}")
    tasks = [task for group in chosen if group not in options.skip.split(",") for task in known[group]]
    if options.child:
        isolation.run_tasks(tasks[slice(*options.child)], is_usable=context_is_usable)
        return 0
    reason = unavailable()
    if reason is not None:
        print(f"{reason}\nNothing was checked.", file=sys.stderr)
        return 2
    start = time.perf_counter()
    if not any("machine" in row for row in isolation.read_rows(options.output)):
        isolation.append_row(options.output, {"machine": machine()})
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--examples", str(options.examples)]
    command += [*(["--only", options.only] if options.only else []), "--skip", options.skip, "--child"]
    names = [(task.group, task.what) for task in tasks]
    rows = isolation.record(command, names, options.output, seconds=options.seconds, say=print_row)
    rows = [row for row in rows if "machine" not in row]
    failed = [row for row in rows if not row.get("ok")]
    finished = {tuple(row["finished"]) for row in isolation.read_rows(options.output) if "finished" in row}
    left = [what for group, what in names if (group, what) not in finished]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed in {time.perf_counter() - start:.0f} s")
    for row in failed:
        print_row(row["group"], row)
    if left:
        print(f"Not run within the time limit: {', '.join(left)}")
    print(f"Wrote {options.output}")
    return int(bool(failed or left or not rows))


def unavailable() -> str | None:
    """Return why no CUDA kernels run here, None if they do.

    If CellVim is installed without its CUDA library, builds the library and lets the child processes find it.
    """
    try:
        print(f"CUDA library: {cuda_library.provide()}", flush=True)
    except RuntimeError as error:
        return str(error)
    code = "from cellvim.ops import cuda; print(cuda.available(), cuda.reason())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return (
        None if done.stdout.startswith("True") else f"No CUDA kernels run here: {done.stdout[6:]}{done.stderr[-500:]}"
    )


def context_is_usable() -> bool:
    """Return whether this process can still use the GPU: after an illegal access every call fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def groups(examples: int) -> dict[str, list[isolation.Task]]:
    """Return the checks by group, in the order in which they run."""

    def one(name: str, check: Callable[[], Iterator[dict]]) -> list[isolation.Task]:
        return [isolation.Task(name, name, check)]

    return {
        "smoke": [isolation.Task("smoke", f"{op} at S/16's shape", partial(_check_smoke, op)) for op in _smoke_ops()],
        "ops": _op_tasks("ops", examples),
        "determinism": one("determinism", _check_determinism),
        "batch": one("batch", _check_batch_mates),
        "extremes": one("extremes", _check_extremes),
        "streams": one("streams", _check_streams),
        "large": one("large", _check_large),
        "golden": one("golden", _check_golden),
        "precision": one("precision", _check_precision),
        "graphs": one("graphs", _check_graphs),
        "memcheck": one("memcheck", partial(_check_sanitizer, "memcheck")),
        "racecheck": one("racecheck", partial(_check_sanitizer, "racecheck")),
    }


def print_row(group: str, row: dict) -> None:
    """Print one check."""
    numbers = f"{row['error']:9.1e} ≤ {row['allowed']:.1e}" if "error" in row else row.get("note", "")
    print(f"{'ok    ' if row.get('ok') else 'FAILED'} {group}: {row['what']:<58} {numbers}", flush=True)


@cache
def machine() -> dict[str, object]:
    """What a result depends on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "command": shlex.join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]]),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
        "driver": _driver(),
        "torch": torch.__version__,
        "cuda of torch": torch.version.cuda,
        "cellvim": cellvim.__version__,
        "python": sys.version.split()[0],
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Ops


def _op_tasks(group: str, examples: int, widths: tuple[int, ...] = ()) -> list[isolation.Task]:
    """Worst error of each op, type and kind of plan over random shapes: outputs and every gradient.

    With ``widths``, the tensors are small except for that number of channels, as compute-sanitizer is slow.
    """
    draws = {
        "add_norm": _draw_add_norm,
        "conv_pool dense": partial(_draw_conv_pool, indexed=False),
        "conv_pool indexed": partial(_draw_conv_pool, indexed=True),
        "pooled_scan": _draw_pooled_scan,
        "expand_gate dense": partial(_draw_expand_gate, indexed=False),
        "expand_gate indexed": partial(_draw_expand_gate, indexed=True),
    }
    tasks = []
    for name, draw in draws.items():
        for dtype in DTYPES:
            what = f"{name}, {str(dtype).removeprefix('torch.')}"
            tasks.append(
                isolation.Task(f"{group} {name}", what, partial(_check_op, what, draw, dtype, examples, widths))
            )
    return tasks


def _check_op(
    what: str, draw: Callable, dtype: torch.dtype, examples: int, widths: tuple[int, ...] = ()
) -> Iterator[dict]:
    worst: dict[str, tuple[float, float, str]] = {}
    for seed in range(examples):
        inputs, options = draw(random.Random(seed), widths)
        for array, error, allowed in _errors(what.partition(",")[0].split()[0], inputs, options, dtype, seed):
            found = worst.get(array, (0.0, 1.0, ""))
            if error / allowed >= found[0] / found[1]:
                worst[array] = error, allowed, _describe(inputs, options)
    for array, (error, allowed, example) in worst.items():
        yield {
            "what": f"{what}: {array}",
            "error": error,
            "allowed": allowed,
            "ok": error <= allowed,
            "example": example,
        }


def _errors(op: str, inputs: dict, options: dict, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, float, float]]:
    """(array, error, allowed error) of outputs and gradients, relative to the largest exact value."""
    inputs = {k: None if t is None else t.to(dtype).float() for k, t in inputs.items()}
    exact = _run(getattr(reference, op), inputs, options, torch.float64, "cpu", seed)
    actual = _run(getattr(cuda, op), inputs, options, dtype, GPU, seed)
    plain = {} if dtype == torch.float32 else _run(getattr(reference, op), inputs, options, dtype, GPU, seed)
    for name, array in exact.items():
        if name == "grad score_bias":  # zero by definition: only rounding is left of it
            yield name, actual[name].double().abs().max().item(), 1e-3 if dtype == torch.float32 else 1.0
        elif dtype == torch.float32:
            yield name, cases.error(actual[name].cpu(), array), FLOAT32_TOLERANCE
        else:
            allowed = 2 * max(cases.error(plain[name].cpu(), array), ROUNDING[dtype])
            yield name, cases.error(actual[name].cpu(), array), allowed


def _run(op: Callable, inputs: dict, options: dict, dtype: torch.dtype, device, seed: int) -> dict[str, Tensor]:
    """Outputs and every gradient of an op by name; poisoned memory, gradients from a fixed random direction."""
    torch.use_deterministic_algorithms(True)  # with it, fresh memory is filled with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    options = {k: _plan_on(v, device) if isinstance(v, ScanPlan) else v for k, v in options.items()}
    leaves = {k: t.to(device, dtype).detach().requires_grad_() for k, t in inputs.items() if t is not None}
    outputs = op(**{k: leaves.get(k) for k in inputs}, **options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(seed + 1)
    # Numbers that every type holds exactly, so that all of them start from the same direction.
    directions = [torch.randn(o.shape, generator=g).bfloat16().to(o.device, o.dtype) for o in outputs]
    grads = torch.autograd.grad(outputs, list(leaves.values()), directions, allow_unused=True)
    torch.use_deterministic_algorithms(False)
    results = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"grad {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def _plan_on(plan: ScanPlan, device) -> ScanPlan:
    if plan.is_dense:
        return plan
    return replace(
        plan, order=plan.order.to(device), slot=plan.slot.to(device), slot_weight=plan.slot_weight.to(device)
    )


def _draw_plan(r: random.Random, batch: int, indexed: bool, small: bool) -> tuple[ScanPlan, int]:
    if indexed:
        tokens, slots = r.randint(1, 60 if small else 300), r.randint(1, 20)
        return cases.indexed_plan(r.randrange(2**16), batch, tokens, slots, r.random() < 0.5), tokens
    most = (6, 5, 4) if small else (17, 15, 9)
    sizes = [r.randint(1, n) for n in most]
    if r.random() < 0.2:
        sizes = [1, r.randint(100, 600), r.randint(1, 3)]  # cells that several blocks share
    stored = r.sample(range(3), 3)
    return cases.dense_plan(sizes, stored, r.choice(POOLED), r.choice([1.0, 0.25])), sizes[0] * sizes[1] * sizes[2]


def _draw_width(r: random.Random, widths: tuple[int, ...]) -> int:
    return r.choice(widths or [16, 17, 64, 70, 131, 192, 384, 768, 1030])


def _draw_conv_pool(r: random.Random, widths: tuple[int, ...], indexed: bool) -> tuple[dict, dict]:
    batch = r.randint(1, 3)
    plan, length = _draw_plan(r, batch, indexed, bool(widths))
    pool = r.choice(["mean", "max", "attention"])
    inputs = cases.conv_pool_inputs(r.randrange(2**20), batch, length, _draw_width(r, widths), r.randint(1, 4))
    if pool == "max":
        inputs["weight"] = inputs["weight"] + 0.1  # distinct maxima: ties may be split in other ways
    if pool != "attention":
        del inputs["score_weight"], inputs["score_bias"]
    return inputs, {"plan": plan, "pool": pool}


def _draw_expand_gate(r: random.Random, widths: tuple[int, ...], indexed: bool) -> tuple[dict, dict]:
    batch = r.randint(1, 3)
    plan, length = _draw_plan(r, batch, indexed, bool(widths))
    norm = r.choice(["layer", "rms", "none"])
    inputs = cases.expand_gate_inputs(
        r.randrange(2**20), batch, length, plan.slots, _draw_width(r, widths), r.randint(1, 4)
    )
    if norm == "none":
        inputs["norm_weight"] = None
    if norm != "layer":
        inputs["norm_bias"] = None
    if r.random() < 0.25:
        inputs["skip"] = None
    return inputs, {"plan": plan, "norm": norm}


def _draw_pooled_scan(r: random.Random, widths: tuple[int, ...]) -> tuple[dict, dict]:
    steps = r.choice([1, 7, 16] if widths else [1, 2, 7, 14, 63, 112, 128, 300, 700])
    states = r.choice([16, 16, 16, 1, 5, 64])
    inputs = cases.pooled_scan_inputs(r.randrange(2**20), r.randint(1, 3), steps, _draw_width(r, widths), states)
    return inputs, {}


def _draw_add_norm(r: random.Random, widths: tuple[int, ...]) -> tuple[dict, dict]:
    kind, width = r.choice(["layer", "rms"]), _draw_width(r, widths)
    new = cases.tensors(r.randrange(2**20))
    shape = (r.randint(1, 3), r.randint(1, 70), width)
    inputs = {"hidden": new(*shape), "residual": new(*shape) if r.random() < 0.8 else None}
    return inputs | {"weight": new(width), "bias": new(width) if kind == "layer" else None}, {"kind": kind}


def _describe(inputs: dict, options: dict) -> str:
    plan = options.get("plan")
    shapes = {k: list(t.shape) for k, t in inputs.items() if t is not None}
    rest = {k: v for k, v in options.items() if k != "plan"}
    grid = "" if plan is None else f"sizes {plan.sizes} strides {plan.strides} pooled {plan.pooled} P {plan.slots}"
    return f"{shapes} {rest} {grid}"


# ---------------------------------------------------------------------------------------------------------------------
# Everything else


def _row(what: str, ok: bool, note: str = "") -> dict:
    return {"what": what, "ok": bool(ok), "note": note}


def _large_cases() -> Iterator[tuple[str, dict, dict]]:
    """One block of FastChannelVim-S/16 at 224² and 8 channels, on the transposed grid."""
    plan = cases.dense_plan((14, 14, 8), (1, 0, 2), (False, True, False))
    conv = cases.conv_pool_inputs(0, 4, 1568, 768, 4)
    yield "conv_pool", {k: v for k, v in conv.items() if "score" not in k}, {"plan": plan}
    yield "pooled_scan", cases.pooled_scan_inputs(0, 4, plan.slots, 768, 16), {}
    yield "expand_gate", cases.expand_gate_inputs(0, 4, 1568, plan.slots, 768, 4), {"plan": plan}


def _smoke_ops() -> list[str]:
    return ["add_norm", *(op for op, _, _ in _large_cases())]


def _check_smoke(op: str) -> Iterator[dict]:
    """Check one op and its gradients in bfloat16 at the shape of a block of FastChannelVim-S/16."""
    new = cases.tensors(0)
    add_norm = {"hidden": new(4, 1568, 384), "residual": new(4, 1568, 384), "weight": new(384), "bias": None}
    large = {"add_norm": (add_norm, {"kind": "rms"})} | {
        name: (inputs, options) for name, inputs, options in _large_cases()
    }
    inputs, options = large[op]
    for array, error, allowed in _errors(op, inputs, options, torch.bfloat16, 0):
        yield {"what": f"{op}: {array}", "error": error, "allowed": allowed, "ok": error <= allowed}


def _check_determinism() -> Iterator[dict]:
    for op, inputs, options in _large_cases():
        for dtype in (torch.float32, torch.bfloat16):
            first, second = (_run(getattr(cuda, op), inputs, options, dtype, GPU, 0) for _ in range(2))
            same = all(torch.equal(first[name], second[name]) for name in first)
            yield _row(f"{op}, {str(dtype).removeprefix('torch.')}: bitwise the same twice", same)


def _check_batch_mates() -> Iterator[dict]:
    for op, inputs, options in _large_cases():
        on_gpu = {k: v.to(GPU) for k, v in inputs.items()}
        axis = {4: 1, 3: 0}  # of the batch, by the number of dimensions
        tokens = {"x", "z", "y", "pooled", "delta", "B", "C"}
        alone = {k: v.narrow(axis[v.ndim], 2, 1) if k in tokens else v for k, v in on_gpu.items()}
        together = getattr(cuda, op)(**on_gpu, **options)
        same = torch.equal(together.narrow(axis[together.ndim], 2, 1), getattr(cuda, op)(**alone, **options))
        yield _row(f"{op}: an image does not depend on its batch", same)


def _check_extremes() -> Iterator[dict]:
    for name in ("fastchannelvim_tiny_patch16", "channelvim_tiny_patch16", "fastvim_tiny_patch16"):
        torch.manual_seed(0)
        config = {"image_size": 64, "in_channels": 3, "depth": 4, "num_classes": 5, "channel_sampling": "none"}
        model = cellvim.create_model(name, **config).to(GPU)
        for value in (0.0, 65_535.0):
            for autocast in (False, True):
                images = torch.full((2, 3, 64, 64), value, device=GPU)
                with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                    logits = model(images)
                model.zero_grad()
                logits.float().sum().backward()
                finite = logits.isfinite().all() and all(
                    p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
                )
                yield _row(f"{name}, images of {value:.0f}{', autocast' if autocast else ''}: finite", finite)


def _check_streams() -> Iterator[dict]:
    """Ops wait for the stream that they are enqueued on, and for no other; other GPUs than the current one work too."""
    for op, inputs, options in _large_cases():
        on_gpu = {k: v.to(GPU) for k, v in inputs.items()}
        expected = getattr(cuda, op)(**on_gpu, **options)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        late = {k: torch.zeros_like(v) for k, v in on_gpu.items()}
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # inputs arrive after the op has been enqueued
            for k, v in late.items():
                v.copy_(on_gpu[k])
            actual = getattr(cuda, op)(**late, **options)
        torch.cuda.synchronize()
        yield _row(f"{op}: on a stream of its own", torch.equal(actual, expected))
        if torch.cuda.device_count() > 1:
            other = {k: v.to("cuda:1") for k, v in inputs.items()}
            actual = getattr(cuda, op)(**other, **options)
            yield _row(f"{op}: on another GPU", torch.equal(actual.cpu(), expected.cpu()))


def _check_large() -> Iterator[dict]:
    """Arrays of more than 2³¹ elements, blocks of a 2048² image: the last sample as by itself."""
    need = 20e9
    if torch.cuda.mem_get_info()[0] < need:
        yield _row("more than 2³¹ elements", True, f"left out: needs {need / 1e9:.0f} GB of free memory")
        return
    batch, side, E = 172, 128, 384  # x and z together are 2,164,260,864 elements
    plan = cases.dense_plan((side, side, 1), (1, 0, 2), (False, True, False))
    new = partial(torch.randn, device=GPU)
    x, z = new(batch, side * side, 2 * E, dtype=torch.bfloat16).chunk(2, dim=-1)
    taps = {"weight": new(2, E, 4), "bias": new(2, E)}
    norm = {"skip": new(2, E), "norm_weight": new(E), "norm_bias": new(E)}
    y = cuda.conv_pool(x, **taps, plan=plan)
    yield _row("conv_pool, 2³¹ elements", torch.equal(y[:, -1:], cuda.conv_pool(x[-1:], **taps, plan=plan)))
    out = cuda.expand_gate(x, z, y, **taps, **norm, plan=plan)
    alone = cuda.expand_gate(x[-1:], z[-1:], y[:, -1:].contiguous(), **taps, **norm, plan=plan)
    yield _row("expand_gate, 2³¹ elements", torch.equal(out[-1:], alone))
    del out, z
    grads = {}
    for name, part in {"all": x, "last": x[-1:]}.items():
        leaf = part.detach().requires_grad_()
        pooled = cuda.conv_pool(leaf, **taps, plan=plan)
        grads[name] = torch.autograd.grad(pooled, leaf, torch.ones_like(pooled))[0]
    yield _row("conv_pool's gradient, 2³¹ elements", torch.equal(grads["all"][-1:], grads["last"]))
    del x, y, grads, leaf, pooled, part
    torch.cuda.empty_cache()


def _check_golden() -> Iterator[dict]:
    """Logits and the gradient of the images of every published case, in float32 within 5e-5 of the largest value."""
    import golden_cases

    for case in golden_cases.ENCODER_CASES:
        description, arrays = golden_cases.read_case(case)
        model = golden_cases.load_model(description, arrays).to(GPU)
        for prefix in golden_cases.prefixes(case):
            images = arrays[f"{prefix}x"].to(GPU).requires_grad_()
            channels = golden_cases.subset(images, model)
            logits = model(images, channels)
            (logits * arrays["loss_weight"][: len(images)].to(GPU)).sum().backward()
            for what, actual in (("logits", logits), ("grad/x", images.grad)):
                expected = arrays[f"{prefix}{what}"]
                error = cases.error(actual.detach().cpu(), expected)
                ok = error <= 5e-5
                yield {"what": f"golden {case} {prefix}{what}", "error": error, "allowed": 5e-5, "ok": ok}


def _check_precision() -> Iterator[dict]:
    """Whole models under bfloat16 autocast: at most twice the error of plain PyTorch ops under the same autocast."""
    for name in ("fastchannelvim_tiny_patch16", "fastvim_tiny_patch16", "vim_tiny_patch16"):
        torch.manual_seed(0)
        changes = {"image_size": 64, "in_channels": 3, "depth": 4, "num_classes": 5, "channel_sampling": "none"}
        model = cellvim.create_model(name, **changes).eval()
        images = torch.randn(4, 3, 64, 64)
        with torch.no_grad():
            exact = model.double()(images.double())
            model.float().to(GPU)
            errors = {}
            for label, backend in (("ours", None), ("plain", "reference")):
                with torch.autocast(GPU.type, torch.bfloat16), ops.use_backend(backend) if backend else nullcontext():
                    errors[label] = cases.error(model(images.to(GPU)).cpu(), exact)
        allowed = 2 * max(errors["plain"], ROUNDING[torch.bfloat16])
        ok = errors["ours"] <= allowed
        yield {"what": f"{name}, autocast: logits", "error": errors["ours"], "allowed": allowed, "ok": ok}


def _check_graphs() -> Iterator[dict]:
    from cellvim.models.graphs import GraphedEncoder

    model = cellvim.create_model("fastchannelvim_tiny_patch16", image_size=64, in_channels=5, depth=4).to(GPU).eval()
    encode = GraphedEncoder(model, autocast=None)
    for batch, channels in ((2, None), (3, None), (2, [0, 3, 4]), (2, [1, 2, 3]), (2, None), (3, None)):
        images = torch.rand(batch, 5 if channels is None else 3, 64, 64, device=GPU)
        with torch.no_grad():
            expected = model(images, channels)
        error = cases.error(encode(images, channels), expected)  # cuBLAS may choose other kernels within a graph
        what = f"CUDA graph, batch {batch}, channels {channels}: as without"
        yield {"what": what, "error": error, "allowed": FLOAT32_TOLERANCE, "ok": error <= FLOAT32_TOLERANCE}
    yield _row("CUDA graphs are captured once a shape", len(encode._graphs) == 3, f"{len(encode._graphs)} graphs")


def _check_sanitizer(tool: str) -> Iterator[dict]:
    """Run the ops at widths with several warps per row under a tool of compute-sanitizer."""
    program = _find_sanitizer()
    if program is None:
        yield _row(tool, True, "left out: compute-sanitizer is not installed (pip install nvidia-cuda-sanitizer-api)")
        return
    # Every tensor gets its own memory, so that the ends are known.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = "from benchmarks.gpu_check import run_sanitized; run_sanitized()"
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    last = " ".join(line for line in done.stdout.splitlines() if "SUMMARY" in line)
    yield _row(tool, done.returncode == 0, last or f"exit code {done.returncode}: {done.stderr[-300:]}")


def run_smoke() -> None:
    """Run each op once, forward and backward, at the shape of S/16. Called under Nsight Compute."""
    for task in groups(1)["smoke"]:
        list(task.run())


def run_sanitized() -> None:
    """Run the ops at `SANITIZER_WIDTHS`; exit with 1 if a result is wrong. Called under compute-sanitizer."""
    rows = [row for task in _op_tasks("", 3, SANITIZER_WIDTHS) for row in task.run()]
    sys.exit(int(not all(row["ok"] for row in rows)))


def _find_sanitizer() -> str | None:
    """compute-sanitizer of the CUDA toolkit, or of NVIDIA's package on PyPI."""
    places = [Path(p) / "nvidia" for p in sys.path if p.endswith("-packages")]
    found = [str(p) for place in places for p in place.glob("*/bin/compute-sanitizer")]
    return next((p for p in [shutil.which("compute-sanitizer"), *found] if p), None)


if __name__ == "__main__":
    if "CELLVIM_BACKEND" in os.environ:
        sys.exit("CELLVIM_BACKEND is set, but the checks choose the back ends themselves. Unset it.")
    sys.exit(main())
