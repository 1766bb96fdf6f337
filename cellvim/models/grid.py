"""TokenGrid: the position of each token, and the order in which each block visits and pools the tokens.

Blocks are independent of rows, columns, channels and masks: they mix tokens as a `ScanPlan` of this module describes.
Only code that converts pixels to tokens or tokens to pixels (patch embedding, decoder, dense maps) also uses the grid.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from cellvim.errors import InputError, ModelError
from cellvim.models.config import EncoderConfig
from cellvim.ops.scan_plan import ScanPlan, sequence_plan


@dataclass(eq=False)
class TokenGrid:
    """The tokens of a batch: a full grid or any subset of it per sample, with or without a class token."""

    config: EncoderConfig
    rows: int  # after the transposition for scan_path="colwise"
    columns: int
    channels: int  # 1 for joint tokens
    # None for the full grid. Otherwise (B, K) int64: ascending ids of each sample's tokens, in the scan order of the
    # full grid, padded with −1 at the end.
    kept: Tensor | None = None
    # With `kept`: (B,) int64, the number of channels of each sample; None for all. Channels that a sample lacks take no
    # scan steps; masked tokens of its own channels do.
    channel_count: Tensor | None = None
    # Index of the class token in the stored sequence. For a full grid its index in a block's order is the same. In a
    # ragged batch it is stored first and visited at its own position.
    class_position: int | None = None
    device: torch.device | str = "cpu"  # of the plans' indices
    dtype: torch.dtype = torch.float32  # of the plans' weights; float64 for a model in float64
    is_ragged: bool = field(default=False, init=False)  # whether some samples have fewer tokens than others
    _plans: dict[tuple, ScanPlan] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.is_ragged = self.kept is not None and bool((self.kept[:, -1:] < 0).any())
        if self.is_ragged and self.config.mask_reverse == "reference":
            raise ModelError(
                "mask_reverse='reference' needs the same number of tokens in every sample of a batch, as in the "
                "published models. Use mask_reverse='mirrored' or batches of equal counts."
            )

    @property
    def axes(self) -> tuple[str, str, str]:
        """Names of the axes in stored order, slowest first."""
        if self.config.scan_order == "spatial_first":
            return ("channel", "row", "column")
        return ("row", "column", "channel")

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each axis."""
        return {"row": self.rows, "column": self.columns, "channel": self.channels}

    @property
    def count(self) -> int:
        """Number of tokens of the full grid, without a class token."""
        return self.rows * self.columns * self.channels

    @property
    def mask(self) -> Tensor | None:
        """(B, L) bool: the tokens of the full grid that exist; None for all."""
        if self.kept is None:
            return None
        mask = torch.zeros(self.kept.shape[0], self.count + 1, dtype=torch.bool, device=self.kept.device)
        return mask.scatter(1, torch.where(self.kept < 0, self.count, self.kept), True)[:, : self.count]

    @property
    def stored_mask(self) -> Tensor | None:
        """(B, K) bool: the stored tokens that exist, including the class token; None for all."""
        if not self.is_ragged:
            return None
        present = self.kept >= 0
        if self.class_position is None:
            return present
        return torch.cat([present.new_ones(len(present), 1), present], dim=1)  # ragged batches store it first

    def gather(self, tokens: Tensor) -> Tensor:
        """Select the kept tokens, (B, L, D) of the full grid -> (B, K, D)."""
        if self.kept is None:
            return tokens
        return tokens.gather(1, self.kept.clamp_min(0)[..., None].expand(-1, -1, tokens.shape[-1]))

    def scatter(self, tokens: Tensor, background: Tensor | None = None) -> Tensor:
        """Put kept tokens into the full grid, (B, K, D) -> (B, L, D); the others are ``background`` (D,) or zero."""
        if self.kept is None:
            return tokens
        shape = (tokens.shape[0], self.count + 1, tokens.shape[2])  # an extra token for absent ones, which is cut off
        full = tokens.new_zeros(shape) if background is None else background.to(tokens.dtype).expand(shape)
        ids = torch.where(self.kept < 0, self.count, self.kept)
        return full.scatter(1, ids[..., None].expand_as(tokens), tokens)[:, : self.count]

    def plan(self, block: int) -> ScanPlan:
        """Return the `ScanPlan` of block number ``block``."""
        key = self._order_and_pooled(block)
        if key not in self._plans:
            self._plans[key] = self._make_plan(*key)
        return self._plans[key]

    def pooled_axes(self, block: int) -> frozenset[str]:
        """Return the axes that block number ``block`` pools."""
        return self._order_and_pooled(block)[1]

    def _order_and_pooled(self, block: int) -> tuple[tuple[str, ...], frozenset[str]]:
        """Return the block's axes, slowest first, and the pooled ones (paper §3.1 and §3.4)."""
        two_axes = self.config.pool_axes == 2
        turn = block % (3 if two_axes else 2)
        swap = turn == 1 and self.config.alternate
        order = tuple({"row": "column", "column": "row"}.get(a, a) for a in self.axes) if swap else self.axes
        if self.config.pool == "none":
            return order, frozenset()
        if two_axes and turn == 2:
            return order, frozenset({"row", "column"})
        inner = "row" if swap else "column"
        return order, frozenset({inner, "channel"}) if two_axes else frozenset({inner})

    def _make_plan(self, order: tuple[str, ...], pooled: frozenset[str]) -> ScanPlan:
        if self.kept is None and self.class_position is None:
            strides, step = {}, 1
            for axis in reversed(self.axes):
                strides[axis] = step
                step *= self.sizes[axis]
            return ScanPlan(
                sizes=tuple(self.sizes[a] for a in order),
                strides=tuple(strides[a] for a in order),
                pooled=tuple(a in pooled for a in order),
                pool_scale=self.config.pool_scale,
                stored_axes=tuple(order.index(a) for a in self.axes),
            )
        if self.kept is None and not pooled and order == self.axes:
            return sequence_plan(self.count + 1)  # the class token is one more step of the sequence
        return self._indexed_plan(order, pooled)

    def _indexed_plan(self, order: tuple[str, ...], pooled: frozenset[str]) -> ScanPlan:
        """Return the plan of an irregular set of tokens: their order in the block and the scan step of each."""
        ids = torch.arange(self.count, device=self.device)[None] if self.kept is None else self.kept
        present = ids >= 0
        coordinates, rest = {}, ids.clamp_min(0)  # the row, column and channel of each token, (B, K) each
        for axis in reversed(self.axes):
            coordinates[axis], rest = rest % self.sizes[axis], rest // self.sizes[axis]
        lengths = {a: torch.tensor([[n]], device=ids.device) for a, n in self.sizes.items()}
        if self.channel_count is not None:
            lengths["channel"] = self.channel_count[:, None]

        key = _mixed_radix([(coordinates[a], self.sizes[a]) for a in order])
        stored = key.masked_fill(~present, prod(self.sizes.values())).argsort(dim=1, stable=True)  # (B, K)
        order_present = present.gather(1, stored)

        if pooled:
            steps = _mixed_radix([(coordinates[a], lengths[a]) for a in order if a not in pooled])
            steps = steps.gather(1, stored).clamp_min(0)
            slots = prod([n for a, n in self.sizes.items() if a not in pooled])
            weight = self._slot_weight(steps, order_present, slots, pooled, lengths)
        else:
            steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
            slots = ids.shape[1]
            weight = torch.ones(1, slots, device=ids.device, dtype=self.dtype)
        backward = steps
        if pooled and self.config.mask_reverse == "reference":
            # The published code labels the reversed sequence with the rows of the unreversed one.
            backward = slots - 1 - steps.flip(1)
        stored = stored.masked_fill(~order_present, -1)
        slot = torch.stack([steps, backward])
        if self.class_position is not None:
            own_steps = torch.ones(1, 1, dtype=torch.int64, device=ids.device)
            for axis in self.sizes:
                own_steps = own_steps * (1 if axis in pooled else lengths[axis])
            stored, slot, weight = self._add_class_token(stored, slot, weight, own_steps, bool(pooled))
            slots += 1
        return ScanPlan(
            sizes=(stored.shape[1], 1, 1),
            strides=(1, 1, 1),
            pooled=(bool(pooled), False, False),
            pool_scale=self.config.pool_scale,
            order=stored,
            slot=slot,
            slot_weight=weight,
            slot_count=slots,
        )

    def _slot_weight(
        self, steps: Tensor, present: Tensor, slots: int, pooled: frozenset[str], lengths: dict[str, Tensor]
    ) -> Tensor:
        """Return one over the number of all tokens of a slot, or of the kept ones (paper Table 12), (B, P)."""
        if self.config.masked_pool == "mean":
            none = torch.zeros(steps.shape[0], slots, device=steps.device, dtype=self.dtype)
            kept = none.scatter_add(1, steps, present.to(self.dtype))
            return self.config.pool_scale / kept.clamp_min(1)
        full = torch.ones(1, 1, device=steps.device, dtype=self.dtype)
        for axis in pooled:
            full = full * lengths[axis]
        return (self.config.pool_scale / full).expand(-1, slots)

    def _add_class_token(self, stored: Tensor, slot: Tensor, weight: Tensor, steps: Tensor, pooled: bool) -> tuple:
        """Insert the class token into the block's order and, as a separate step, into the scan.

        "first": at the start of both. "middle": after half of a sample's tokens and half of its ``steps`` (B or 1, 1).
        Unless tokens are ``pooled``, a token's step is its position.
        """
        first = self.config.class_token == "first"
        tokens = (stored >= 0).sum(1, keepdim=True)  # (B, 1)
        place = torch.zeros_like(tokens) if first else tokens // 2
        step = (torch.zeros_like(steps) if first else steps // 2) if pooled else place
        stored = torch.where(stored >= self.class_position, stored + 1, stored)  # tokens stored after it move by one
        stored = _insert(stored, place, torch.full_like(place, self.class_position))
        batch = max(slot.shape[1], step.shape[0])
        slot = torch.where(slot >= step, slot + 1, slot).expand(2, batch, -1)
        slot = torch.stack([_insert(direction, place, step.expand(batch, 1)) for direction in slot])
        return stored, slot, _insert(weight, step, weight.new_ones(1, 1))


def kept_ids(keep: Tensor, batch: int, count: int) -> Tensor:
    """Convert a mask of kept tokens (B, L) bool, or ids (B, K) padded with −1, to ascending ids padded with −1.

    Raises
    ------
    InputError
        The mask does not fit the images, or a sample has no token.
    """
    keep = kept_mask(keep, (batch, count))
    longest = int(keep.sum(1).max()) if batch else 0
    order = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]
    ids = torch.where(keep.gather(1, order), order, -1)
    if batch and (ids.shape[1] == 0 or bool((ids[:, 0] < 0).any())):
        raise InputError("keep selects no token of a sample; expected at least one.")
    return ids


def kept_mask(keep: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a mask (B, L) bool of kept tokens, given as a mask or as ids (B, K) padded with −1."""
    batch, count = shape
    if not isinstance(keep, Tensor):
        raise InputError(f"keep is a {type(keep).__name__}; expected a torch.Tensor of shape {tuple(shape)}.")
    if keep.ndim != 2 or keep.shape[0] != batch:
        raise InputError(f"keep has shape {tuple(keep.shape)}; expected one row for each of the {batch} samples.")
    if keep.dtype == torch.bool:
        if keep.shape[1] != count:
            raise InputError(f"keep has shape {tuple(keep.shape)}; expected ({batch}, {count}), one value per token.")
        return keep
    if keep.is_floating_point():
        raise InputError(f"keep is {keep.dtype}; expected bool, or ids as integers.")
    ids = torch.where(keep < 0, count, keep).long()
    mask = torch.zeros(batch, count + 1, dtype=torch.int64, device=keep.device)
    if bool((keep >= count).any()) or bool((mask.scatter_add(1, ids, torch.ones_like(ids))[:, :count] > 1).any()):
        raise InputError(f"keep has ids above {count - 1}, or repeats a token of a sample.")
    return mask.scatter(1, ids, 1)[:, :count].bool()


def _insert(row: Tensor, place: Tensor, value: Tensor) -> Tensor:
    """Insert ``value`` (B, 1) into each row of (B, K) at index ``place`` (B, 1)."""
    batch = max(row.shape[0], place.shape[0])
    row, place, value = row.expand(batch, -1), place.expand(batch, 1), value.expand(batch, 1)
    old = torch.arange(row.shape[1], device=row.device)
    new = old + (old >= place)
    longer = row.new_zeros(batch, row.shape[1] + 1)
    return longer.scatter(1, new, row).scatter(1, place, value)


def _mixed_radix(digits: list[tuple[Tensor, Tensor | int]]) -> Tensor:
    """Combine (digit, base) pairs, most significant first, into one number."""
    number = torch.zeros_like(digits[0][0])
    for digit, base in digits:
        number = number * base + digit
    return number
