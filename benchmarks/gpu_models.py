"""Complete models on a GPU: images per second in inference and training, peak memory, ratio to the lower bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_ops import small_config
from benchmarks.gpu_timing import PRECISIONS, Bench, fit_batch
from cellvim.models.config import EncoderConfig
from cellvim.models.encoder import Encoder
from cellvim.models.flops import count_flops
from cellvim.models.graphs import GraphedEncoder

_ATTENTION = {  # the first that supports the tensors; flash attention has no float32
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "plain": SDPBackend.MATH,
}


def inference(
    bench: Bench, name: str, side: int, batch: int, precision: str = "bfloat16", backend: str | None = None
) -> dict:
    """Measure images per second of forward passes replayed as a CUDA graph; the batch is halved until it fits."""
    config, side = small_config(bench, name, side)
    model = Encoder(config).to(bench.device).eval()

    def measure(batch: int) -> dict:
        images = torch.randn(batch, config.in_channels, side, side, device=bench.device)
        with (
            torch.no_grad(),
            bench.using(precision, backend),
            attention_of(bench, model, images, precision) as attention,
        ):
            peak = bench.peak_memory(lambda: model(images))
            encode = _replayed(bench, model, precision)
            time = bench.milliseconds(lambda: encode(images))
        row = {"img/s": 1e3 * batch / time, "ms": time, "peak GB": peak}
        return row | ({"attention": attention} if attention else {})

    row = fit_batch(bench, batch, measure)
    floor = floor_milliseconds(config, side, precision, bench.rates)
    if floor and "img/s" in row:
        row |= {"floor img/s": 1e3 / floor, "of the floor": row["img/s"] * floor / 1e3}
    return row


def _replayed(bench: Bench, model: Encoder, precision: str) -> Callable[[Tensor], Tensor]:
    """Return the model as a CUDA graph, or the model itself without a GPU."""
    return GraphedEncoder(model, autocast=PRECISIONS[precision][0]) if bench.on_gpu else model


@contextmanager
def attention_of(bench: Bench, model: Encoder, images: Tensor, precision: str) -> Iterator[str | None]:
    """Restrict a transformer to the fastest attention that supports it; return its name, or None for other models."""
    if model.config.mixer != "attention":
        yield None
        return
    for name, kernel in _ATTENTION.items():
        with sdpa_kernel(kernel):
            try:
                with torch.no_grad(), bench.using(precision):
                    model(images[:1])
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # no such kernel for these tensors
                continue
            yield name
            return
    raise RuntimeError("No attention of PyTorch takes these tensors.")


def floor_milliseconds(config: EncoderConfig, side: int, precision: str, rates: dict[str, float]) -> float | None:
    """Return the lower bound of the time per image from its products and arrays; None before the rates are measured.

    For Mamba blocks: the two products of each at the matrix rate, and the arrays of each fused op and product read and
    written once at the copy rate. For transformers: all products and the attention at the matrix rate.
    """
    copy, products = rates.get("copy GB/s"), rates.get(f"{precision} TFLOP/s")
    if not copy or not products:
        return None
    rate = products * 1e9  # operations per millisecond
    counted = count_flops(config, side, side)
    if config.mixer == "attention":
        return 2 * counted["total"] / rate
    size = 2 if PRECISIONS[precision][0] else 4
    grid = side // config.patch_size
    L = grid * grid * (config.in_channels if config.tokens == "per_channel" else 1)
    P = L if config.pool == "none" else L // grid
    D, E = config.embed_dim, config.inner_dim
    bytes_of_block = 2 * L * D * size + 2 * L * D * 4  # add_norm; the residual stream is float32
    bytes_of_block += (L * E + 2 * P * E) * size  # conv_pool
    bytes_of_block += 6 * P * E * size + 4 * P * config.d_state * 4  # pooled_scan
    bytes_of_block += (3 * L * E + 2 * P * E) * size  # expand_gate
    bytes_of_block += (2 * L * D + 3 * L * E) * size  # the two products
    return 2 * counted["projections"] / rate + config.depth * bytes_of_block / copy / 1e6


def training(
    bench: Bench, name: str, side: int, batch: int, precision: str = "bfloat16", backend: str | None = None
) -> dict:
    """Measure images per second of forward, backward and AdamW with all channels, including Python's time."""
    config, side = small_config(bench, name, side)

    def measure(batch: int) -> dict:
        torch.manual_seed(0)
        model = Encoder(config).to(bench.device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=bench.on_gpu)
        images = torch.randn(batch, config.in_channels, side, side, device=bench.device)
        labels = torch.randint(0, config.num_classes, (batch,), device=bench.device)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            with bench.using(precision, backend):
                loss = F.cross_entropy(model(images).float(), labels)
            with bench.using(backend=backend):
                loss.backward()
            optimizer.step()

        with attention_of(bench, model, images, precision) as attention:
            peak = bench.peak_memory(step)
            time = bench.milliseconds(step, calls=1)
        row = {"img/s": 1e3 * batch / time, "ms": time, "peak GB": peak}
        return row | ({"attention": attention} if attention else {})

    return fit_batch(bench, batch, measure)


def training_ratio(bench: Bench, name: str, side: int, batch: int, precision: str = "bfloat16") -> dict:
    """Compare a training step on our kernels with one on plain PyTorch ops, at the same batch size."""
    plain = training(bench, name, side, batch, precision, "reference")
    if "img/s" not in plain:
        return plain
    bench.free()
    ours = training(bench, name, side, plain["batch"], precision)
    row = {"batch": plain["batch"], "img/s": ours.get("img/s"), "plain img/s": plain["img/s"]}
    row |= {"peak GB": ours.get("peak GB"), "plain peak GB": plain["peak GB"]}
    if not ours.get("img/s") or ours["batch"] != plain["batch"]:
        return row | {"note": "ours needed a smaller batch than plain PyTorch"}
    return row | {"ratio": ours["img/s"] / plain["img/s"]}
