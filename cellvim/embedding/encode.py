"""From fields to rows: crops as they are read and cut, through the model, in batches that change nothing.

While a field is in the model, the next ones are read and their cells found and cut, in threads. A row depends on the
plan and on its field's own pixels alone. On the CPU the kernels give a row the same bits whatever stands beside it, so
a batch is of one field. A GPU's libraries choose kernels by the batch size: there batches go across fields, and all
are full, the last one with zeros, so that a row's bits depend on neither its place nor its neighbours.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from cellvim.data.crops import FieldCrops, resize_on_device, stream_crops
from cellvim.embedding.ledger import Key, Rows
from cellvim.errors import CellvimError, DeviceError

if TYPE_CHECKING:
    from cellvim.data.plate import Field
    from cellvim.embedding.plan import EmbeddingPlan, PlatePlan

AHEAD = 2  # fields for each thread, read before the one in use
MOST_ON_CPU, MOST_ON_GPU = 64, 1024  # crops at once; more gains nothing
SHARE_OF_MEMORY = 0.5  # that a batch may take of what is free


def embed_fields(plan: EmbeddingPlan, keys: Iterable[Key], *, threads: int = 2) -> Iterator[tuple[Key, Rows | str]]:
    """Yield each field's rows, or why it has none, in the order of the fields.

    Parameters
    ----------
    plan
        What becomes of a field.
    keys
        (number of the plate, number of the field), taken as they are needed; a plate's fields one after the other.
    threads
        That read fields and find cells.
    """
    for number, group in itertools.groupby(keys, key=lambda key: key[0]):
        plate = plan.plates[number]
        yield from _embed_plate(plan, plate, group, threads)
        if len(plan.plates) > 1:
            plate.close()


def _embed_plate(
    plan: EmbeddingPlan, plate: PlatePlan, keys: Iterator[Key], threads: int
) -> Iterator[tuple[Key, Rows | str]]:
    """One stream of fields; begun again behind a field that breaks it."""
    in_hand: deque[Key] = deque()  # taken from the keys, and without a result yet
    encode = _encode_packed if plan.batch_size > 1 and plan.device != "cpu" else _encode_by_field
    model = plan.model
    if plan.device.startswith("cuda"):
        from cellvim.models.graphs import replayed

        model = replayed(model, autocast=_lower(plan))  # batches have few shapes
    features_of = model.forward_features
    left: Iterator[Key] | None = keys
    while left is not None:
        taken, left = left, None

        stream = stream_crops(
            _fields(plate, taken, in_hand),
            plate.channels,
            plate.cutting,
            scale=plate.scale,
            cells=plate.cells,
            device=plan.device,
            workers=threads,
            ahead=AHEAD * threads,
            extra_channels=plate.extra_channels,
            illumination=plate.illumination,
        )
        try:
            for cut, features in encode(plan, plate, stream, features_of):
                yield in_hand.popleft(), cut.failed if features is None else _rows(plan, cut, features)
        except DeviceError:
            raise
        except (CellvimError, MemoryError) as error:  # what concerns this field alone
            if not in_hand:
                raise
            reason = f"{type(error).__name__}: {error}" if isinstance(error, MemoryError) else str(error)
            broken = in_hand.popleft()
            rest = list(in_hand)
            in_hand.clear()
            yield broken, plate.fields[broken[1]].error(reason.rstrip(".")).args[0]
            left = itertools.chain(rest, taken)


def _fields(plate: PlatePlan, keys: Iterator[Key], in_hand: deque[Key]) -> Iterator[Field]:
    for key in keys:
        in_hand.append(key)
        yield plate.fields[key[1]]


@dataclass
class _Features:
    """What the model says of one field's crops: (n, D), by channel (n, D) each, and maps of tokens."""

    main: np.ndarray
    channels: dict[str, np.ndarray] = field(default_factory=dict)
    probabilities: np.ndarray | None = None  # (n, K)
    tokens: np.ndarray | None = None


def _encode_by_field(
    plan: EmbeddingPlan, plate: PlatePlan, stream: Iterator[FieldCrops], features_of: Callable
) -> Iterator[tuple[FieldCrops, _Features | None]]:
    """Batches of one field each, none of them filled up."""
    for cut in stream:
        if cut.failed is not None:
            yield cut, None
            continue
        batches = cut.crops.split(plan.batch_size) if len(cut.crops) else []
        parts = [_run(plan, plate, crops, features_of) for crops in batches]
        yield cut, _gathered(plan, plate, parts)


def _encode_packed(
    plan: EmbeddingPlan, plate: PlatePlan, stream: Iterator[FieldCrops], features_of: Callable
) -> Iterator[tuple[FieldCrops, _Features | None]]:
    """Batches that go across fields, all of the same size; results are fetched one batch later."""
    waiting: deque[tuple[FieldCrops, int]] = deque()  # fields that are not complete, and their last row
    crops: list[torch.Tensor] = []  # resized, less than a batch
    results: deque[tuple[int, list[torch.Tensor]]] = deque()  # first row, and what the model said
    taken = given = ready = 0  # rows: that came in, that went to the model, that may be fetched

    def launch(batch: torch.Tensor, n: int) -> None:
        nonlocal given
        results.append((given, [values[:n] for values in _run(plan, plate, batch, features_of)]))
        given += n

    def complete() -> Iterator[tuple[FieldCrops, _Features | None]]:
        while waiting and waiting[0][1] <= ready:
            cut, last = waiting.popleft()
            if cut.failed is not None:
                yield cut, None
                continue
            first = last - len(cut.table)
            while results and results[0][0] + len(results[0][1][0]) <= first:
                results.popleft()
            parts = []
            for start, values in results:
                a, b = max(first, start), min(last, start + len(values[0]))
                if a < b:
                    parts.append([v[a - start : b - start] for v in values])
            yield cut, _gathered(plan, plate, parts)

    for cut in stream:
        taken += len(cut.table) if cut.failed is None else 0
        if cut.failed is None and len(cut.crops):
            crops.append(resize_on_device(cut.crops, plan.input_px))
            cut = FieldCrops(cut.index, cut.field, cut.crops[:0], cut.table)  # crops are let go
        waiting.append((cut, taken))
        if taken - given >= plan.batch_size:
            joined = torch.cat(crops)
            while len(joined) >= plan.batch_size:
                ready = given
                launch(joined[: plan.batch_size], plan.batch_size)
                joined = joined[plan.batch_size :]
            crops = [joined.clone()] if len(joined) else []
        elif taken == given:
            ready = given  # nothing is under way that a fetch would wait for
        yield from complete()
    if crops:
        rest = torch.cat(crops)
        filled = torch.cat([rest, rest.new_zeros(plan.batch_size - len(rest), *rest.shape[1:])])
        launch(filled, len(rest))
    ready = given
    yield from complete()


def _lower(plan: EmbeddingPlan) -> torch.dtype | None:
    """The type that matrix products are to be computed in, None for the model's own."""
    return torch.bfloat16 if plan.precision == "bfloat16" else None


def _run(plan: EmbeddingPlan, plate: PlatePlan, crops: torch.Tensor, features_of: Callable) -> list[torch.Tensor]:
    """Return what the model says of a batch, each (n, …) float32: features; then by channel; then maps of tokens."""
    images = crops if plan.input_px is None else resize_on_device(crops, plan.input_px)
    kind = plan.device.split(":")[0]
    lower = torch.autocast(kind, _lower(plan)) if _lower(plan) else nullcontext()
    try:
        with torch.inference_mode(), lower:
            said = [features_of(images, channels=plate.channel_ids)]
            if plan.per_channel or plan.tokens:
                maps = plan.model.forward_token_maps(images, channels=plate.channel_ids)  # (n, D, C, h, w)
                said += list(maps.float().mean((3, 4)).unbind(2)) if plan.per_channel else []
                said += [maps] if plan.tokens else []
            if plan.class_names:
                said.insert(1, _probabilities(plan, images, plate.channel_ids, said[0]))
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{plan.device} has no memory for {len(images)} crops at once. Choose a smaller --batch-size."
        ) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise MemoryError(f"{len(images)} crops at once need more than there is; a smaller --batch-size") from error
        raise
    return [values.float() for values in said]


def _probabilities(
    plan: EmbeddingPlan, images: torch.Tensor, channels: list[int], features: torch.Tensor
) -> torch.Tensor:
    """(n, K) probabilities of the model's classes, from the features where its head reads them."""
    model = plan.model
    reads_tokens = model.config.readout == "max" and model.config.class_token == "none"  # the head is on every token
    logits = model(images, channels=channels) if reads_tokens else model.classify(features)
    return logits.float().softmax(1)


def _gathered(plan: EmbeddingPlan, plate: PlatePlan, parts: list[list[torch.Tensor]]) -> _Features:
    width = plan.n_features
    if not parts:
        nothing = np.zeros((0, width), np.float32)
        none = np.zeros((0, len(plan.class_names)), np.float32) if plan.class_names else None
        return _Features(nothing, dict.fromkeys(plate.meanings, nothing) if plan.per_channel else {}, none)
    values = [torch.cat(v).cpu().numpy() for v in zip(*parts, strict=True)]
    probabilities = values.pop(1) if plan.class_names else None
    n = len(plate.meanings) if plan.per_channel else 0
    channels = dict(zip(plate.meanings, values[1 : 1 + n], strict=True)) if n else {}
    return _Features(values[0], channels, probabilities, values[1 + n][0] if plan.tokens else None)


def _rows(plan: EmbeddingPlan, cut: FieldCrops, features: _Features) -> Rows:
    table = cut.table
    scale = cut.field.pixel_size_um or 1.0
    objects = table.drop(columns=["y_px", "x_px"]).rename(columns={"object_number": "Metadata_ObjectNumber"})
    obsm = {f"X_emb_{name}": values for name, values in features.channels.items()}
    obsm |= {} if features.probabilities is None else {"probabilities": features.probabilities}
    return Rows(features.main, objects, _positions(table) * scale, obsm, features.tokens)


def _positions(table: pd.DataFrame) -> np.ndarray:
    """(n, 2) float64 as (x, y)."""
    return table[["x_px", "y_px"]].to_numpy(np.float64)


def automatic_batch_size(plan: EmbeddingPlan) -> int:
    """Return how many crops go into the model at once: what half of the free memory holds, a power of two.

    On a GPU the need of a crop is measured, on the CPU it is told from the number of tokens.
    """
    most = MOST_ON_CPU if plan.device == "cpu" else MOST_ON_GPU
    if plan.device.startswith("cuda"):
        need, free = _need_on_gpu(plan), torch.cuda.mem_get_info(plan.device)[0]
    else:
        need, free = _need_on_cpu(plan), available_memory()
    fits = max(1, int(SHARE_OF_MEMORY * free / need))
    return min(most, 1 << (fits.bit_length() - 1))


def _need_on_cpu(plan: EmbeddingPlan) -> int:
    """Bytes of one crop: itself twice, and its tokens in a block, six times as wide as the model at most."""
    config = plan.model.config
    side = plan.input_px or config.image_height
    rows, columns = config.grid_size(side, side)
    n_channels = max(len(p.channels) for p in plan.plates)
    tokens = rows * columns * (n_channels if config.tokens == "per_channel" else 1)
    return 4 * (2 * n_channels * side**2 + 12 * tokens * config.embed_dim * config.expand)


def _need_on_gpu(plan: EmbeddingPlan) -> int:
    plate = max(plan.plates, key=lambda p: len(p.channels))
    needs = []
    for n in (8, 16):  # the difference leaves out what does not grow
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(plan.device)
        crops = torch.zeros(n, len(plate.channels), plan.input_px, plan.input_px, device=plan.device)
        _run(plan, plate, crops, plan.model.forward_features)
        torch.cuda.synchronize(plan.device)
        needs.append(torch.cuda.max_memory_allocated(plan.device))
        del crops
    return max(1, (needs[1] - needs[0]) // 8)


def available_memory() -> int:
    """Return how many bytes can still be had on this machine, within the limit of its container."""
    from pathlib import Path

    found = []
    info = Path("/proc/meminfo")
    if info.is_file():
        found += [int(s.split()[1]) * 1024 for s in info.read_text().splitlines() if s.startswith("MemAvailable")]
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        group = Path("/sys/fs/cgroup")
        try:
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):
            continue
    return max(256 << 20, min(found, default=4 << 30))
