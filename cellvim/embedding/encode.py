"""From fields to rows: crops are read and cut in threads, and the model encodes them in batches.

While the model processes one field, the next ones are read, their cells are found and their crops are cut. The rows of
a field depend only on the plan and on the pixels of that field. On a CPU the result for a crop does not depend on its
batch, so each batch has the crops of one field. GPU libraries choose kernels by the batch size: there, batches extend
across fields and all have the same size, the last one padded with zeros.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from cellvim.data.crops import FieldCrops, resize_crops, stream_crops
from cellvim.embedding.ledger import Key, Rows
from cellvim.embedding.plan import EmbeddingPlan, PlatePlan
from cellvim.errors import CellvimError, DeviceError

if TYPE_CHECKING:
    from cellvim.data.plate import Field

FIELDS_AHEAD = 2  # fields per thread that are read ahead of the one in the model
MAX_BATCH_ON_CPU, MAX_BATCH_ON_GPU = 64, 1024  # larger batches are not faster
MEMORY_FRACTION = 0.5  # of the free memory that a batch may occupy

FeaturesOf = Callable[..., torch.Tensor]
Encoded = tuple[FieldCrops, list[list[torch.Tensor]]]  # a field, and the outputs of its batches


class FieldEmbedder:
    """Embeds fields as described by a plan. Can be pickled to worker processes.

    Parameters
    ----------
    plan
        The plan; its batch size is chosen from the available memory if it is None.
    """

    def __init__(self, plan: EmbeddingPlan) -> None:
        self.plan = with_batch_size(plan)

    @property
    def device(self) -> str:
        """Device of the model."""
        return self.plan.device

    def field_name(self, key: Key) -> tuple[str, str]:
        """Return the names of a field's plate and of the field."""
        return self.plan.field_name(key)

    def on(self, device: str, *, threads: int | None = None) -> FieldEmbedder:
        """Return an embedder for another device; ``threads`` sets the number of compute threads of this process."""
        if threads is not None:
            torch.set_num_threads(threads)
        if device == self.device:
            return self
        return FieldEmbedder(replace(self.plan, model=copy.deepcopy(self.plan.model).to(device), device=device))

    def embed(self, keys: Iterable[Key], *, threads: int = 2) -> Iterator[tuple[Key, Rows | str]]:
        """Yield each field's rows, or the reason why it failed, in the order of the fields.

        Parameters
        ----------
        keys
            (index of the plate, index of the field), consumed as needed; the fields of a plate are consecutive.
        threads
            Number of threads that read fields and find cells.
        """
        for number, group in itertools.groupby(keys, key=lambda key: key[0]):
            plate = self.plan.plates[number]
            yield from self._embed_plate(plate, group, threads)
            if len(self.plan.plates) > 1:
                plate.close()

    def features_of(self) -> FeaturesOf:
        """Return the function that computes features; on CUDA it replays graphs, since batches have few shapes."""
        model = self.plan.model
        if self.device.startswith("cuda"):
            from cellvim.models.graphs import replayed

            model = replayed(model, autocast=torch.bfloat16 if self.plan.precision == "bfloat16" else None)
        return model.forward_features

    def encode_batch(self, plate: PlatePlan, crops: torch.Tensor, features_of: FeaturesOf) -> list[torch.Tensor]:
        """Encode crops (n, C, H, W) of a plate.

        Returns
        -------
        list of torch.Tensor
            (n, …) float32: features, probabilities of the classes, features of each channel, and token maps; those
            that were not requested are left out.

        Raises
        ------
        DeviceError
            The memory of the GPU does not suffice.
        MemoryError
            The memory of the machine does not suffice.
        """
        plan = self.plan
        images = crops if plan.input_px is None else resize_crops(crops, plan.input_px)
        lower = plan.precision == "bfloat16"
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.split(":")[0], torch.bfloat16) if lower else nullcontext(),
            ):
                outputs = [features_of(images, channels=plate.channel_ids)]
                if plan.class_names:
                    config = plan.model.config
                    if config.readout == "max" and config.class_token == "none":  # the head is applied to every token
                        logits = plan.model(images, channels=plate.channel_ids)
                    else:
                        logits = plan.model.classify(outputs[0])
                    outputs.append(logits.float().softmax(1))
                if plan.per_channel or plan.tokens:
                    maps = plan.model.forward_token_maps(images, channels=plate.channel_ids)  # (n, D, C, h, w)
                    outputs += list(maps.float().mean((3, 4)).unbind(2)) if plan.per_channel else []
                    outputs += [maps] if plan.tokens else []
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"The memory of {self.device} does not suffice for {len(images)} crops per batch. "
                "Choose a smaller --batch-size."
            ) from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):
                raise MemoryError(
                    f"{len(images)} crops per batch need more memory than is available; choose a smaller --batch-size"
                ) from error
            raise
        return [values.float() for values in outputs]

    def _embed_plate(self, plate: PlatePlan, keys: Iterator[Key], threads: int) -> Iterator[tuple[Key, Rows | str]]:
        """Embed fields of one plate. If a field breaks the stream, a new stream starts after it."""
        pending: deque[Key] = deque()  # fields that entered the stream and have no result yet
        encode = self._encode_across_fields if self.plan.batch_size > 1 and self.device != "cpu" else self._encode
        features_of = self.features_of()
        remaining: Iterator[Key] | None = keys

        def fields_of(keys: Iterator[Key]) -> Iterator[Field]:
            for key in keys:
                pending.append(key)
                yield plate.fields[key[1]]

        while remaining is not None:
            current, remaining = remaining, None
            stream = stream_crops(
                fields_of(current),
                plate.channels,
                plate.cutting,
                scale=plate.scale,
                cells=plate.cells,
                device=self.device,
                workers=threads,
                ahead=FIELDS_AHEAD * threads,
                extra_channels=plate.extra_channels,
                illumination=plate.illumination,
            )
            try:
                for cut, outputs in encode(plate, stream, features_of):
                    yield pending.popleft(), self._rows(plate, cut, outputs) if cut.failed is None else cut.failed
            except DeviceError:
                raise
            except (CellvimError, MemoryError) as error:  # concerns this field only
                if not pending:
                    raise
                reason = f"{type(error).__name__}: {error}" if isinstance(error, MemoryError) else str(error)
                broken, *rest = pending
                pending.clear()
                yield broken, plate.fields[broken[1]].error(reason.rstrip(".")).args[0]
                remaining = itertools.chain(rest, current)

    def _encode(self, plate: PlatePlan, stream: Iterator[FieldCrops], features_of: FeaturesOf) -> Iterator[Encoded]:
        """Encode the crops of each field in batches of their own."""
        for cut in stream:
            batches = cut.crops.split(self.plan.batch_size) if cut.failed is None and len(cut.crops) else []
            yield cut, [self.encode_batch(plate, crops, features_of) for crops in batches]

    def _encode_across_fields(
        self, plate: PlatePlan, stream: Iterator[FieldCrops], features_of: FeaturesOf
    ) -> Iterator[Encoded]:
        """Encode batches of equal size that extend across fields; results are fetched one batch later."""
        size = self.plan.batch_size
        waiting: deque[tuple[FieldCrops, int]] = deque()  # incomplete fields, and the end of their rows
        crops: list[torch.Tensor] = []  # resized, fewer than a batch
        results: deque[tuple[int, list[torch.Tensor]]] = deque()  # first row of each batch, and its output
        n_read = n_encoded = n_ready = 0  # rows that were read, are in the model, and can be fetched

        def launch(batch: torch.Tensor, n: int) -> None:
            nonlocal n_encoded
            results.append((n_encoded, [values[:n] for values in self.encode_batch(plate, batch, features_of)]))
            n_encoded += n

        def complete() -> Iterator[Encoded]:
            while waiting and waiting[0][1] <= n_ready:
                cut, stop = waiting.popleft()
                start = stop - (len(cut.table) if cut.failed is None else 0)
                while results and results[0][0] + len(results[0][1][0]) <= start:
                    results.popleft()
                parts = []
                for first, values in results:
                    a, b = max(start, first), min(stop, first + len(values[0]))
                    if a < b:
                        parts.append([v[a - first : b - first] for v in values])
                yield cut, parts

        for cut in stream:
            n_read += len(cut.table) if cut.failed is None else 0
            if cut.failed is None and len(cut.crops):
                crops.append(resize_crops(cut.crops, self.plan.input_px))
                cut = FieldCrops(cut.index, cut.field, cut.crops[:0], cut.table)  # releases the crops
            waiting.append((cut, n_read))
            if n_read - n_encoded >= size:
                joined = torch.cat(crops)
                while len(joined) >= size:
                    n_ready = n_encoded
                    launch(joined[:size], size)
                    joined = joined[size:]
                crops = [joined.clone()] if len(joined) else []
            elif n_read == n_encoded:
                n_ready = n_encoded  # no batch is running that fetching would wait for
            yield from complete()
        if crops:
            rest = torch.cat(crops)
            launch(torch.cat([rest, rest.new_zeros(size - len(rest), *rest.shape[1:])]), len(rest))
        n_ready = n_encoded
        yield from complete()

    def _rows(self, plate: PlatePlan, cut: FieldCrops, outputs: list[list[torch.Tensor]]) -> Rows:
        """Join the outputs of the batches of a field, see `encode_batch`."""
        plan = self.plan
        names = plate.meanings if plan.per_channel else []
        if outputs:
            main, *values = [torch.cat(v).cpu().numpy() for v in zip(*outputs, strict=True)]
        else:
            main = np.zeros((0, plan.n_features), np.float32)
            values = [np.zeros((0, len(plan.class_names)), np.float32)] if plan.class_names else []
            values += [*[main] * len(names), *[None] * plan.tokens]
        obsm = {"probabilities": values.pop(0)} if plan.class_names else {}
        tokens = values.pop() if plan.tokens else None
        if tokens is not None:
            tokens = tokens[0]  # (D, C, rows, columns): a field is one unit
        obsm = {f"X_emb_{name}": channel for name, channel in zip(names, values, strict=True)} | obsm
        objects = cut.table.drop(columns=["y_px", "x_px"]).rename(columns={"object_number": "Metadata_ObjectNumber"})
        spatial = cut.table[["x_px", "y_px"]].to_numpy(np.float64) * (cut.field.pixel_size_um or 1.0)
        return Rows(main, objects, spatial, obsm, tokens)


def with_batch_size(plan: EmbeddingPlan, size: int | None = None) -> EmbeddingPlan:
    """Return the plan with a batch size.

    Parameters
    ----------
    plan
        A plan. If it has a batch size, it is returned unchanged.
    size
        Number of crops per batch. By default the largest power of two that fits into half of the free memory: the
        memory per crop is measured on a GPU, and computed from the number of tokens on a CPU.
    """
    if plan.batch_size is not None:
        return plan
    if size is None:
        on_gpu = plan.device.startswith("cuda")
        free = torch.cuda.mem_get_info(plan.device)[0] if on_gpu else available_memory()
        fits = max(1, int(MEMORY_FRACTION * free / (_measured_bytes(plan) if on_gpu else _estimated_bytes(plan))))
        size = min(MAX_BATCH_ON_CPU if plan.device == "cpu" else MAX_BATCH_ON_GPU, 1 << (fits.bit_length() - 1))
    return replace(plan, batch_size=size)


def _estimated_bytes(plan: EmbeddingPlan) -> int:
    """Return the bytes per crop: the crop twice, and its tokens in a block, at most six times as wide as the model."""
    config = plan.model.config
    side = plan.input_px or config.image_height
    rows, columns = config.grid_size(side, side)
    n_channels = max(len(p.channels) for p in plan.plates)
    tokens = rows * columns * (n_channels if config.tokens == "per_channel" else 1)
    return 4 * (2 * n_channels * side**2 + 12 * tokens * config.embed_dim * config.expand)


def _measured_bytes(plan: EmbeddingPlan) -> int:
    """Return the bytes per crop on a GPU: the difference between batches of 8 and 16, which excludes constant parts."""
    plate = max(plan.plates, key=lambda p: len(p.channels))
    peaks = []
    for n in (8, 16):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(plan.device)
        crops = torch.zeros(n, len(plate.channels), plan.input_px, plan.input_px, device=plan.device)
        FieldEmbedder(replace(plan, batch_size=n)).encode_batch(plate, crops, plan.model.forward_features)
        torch.cuda.synchronize(plan.device)
        peaks.append(torch.cuda.max_memory_allocated(plan.device))
        del crops
    return max(1, (peaks[1] - peaks[0]) // 8)


def available_memory() -> int:
    """Return the bytes of memory that are available on this machine, within the limit of its container."""
    found = []
    info = Path("/proc/meminfo")
    if info.is_file():
        found += [int(s.split()[1]) * 1024 for s in info.read_text().splitlines() if s.startswith("MemAvailable")]
    names = ("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")
    for limit, used in names:
        group = Path("/sys/fs/cgroup")
        try:
            found.append(int((group / limit).read_text()) - int((group / used).read_text()))
        except (OSError, ValueError):
            continue
    return max(256 << 20, min(found, default=4 << 30))
