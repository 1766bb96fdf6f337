"""A plan without pixels or a model, for tests of workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from cellvim.embedding.ledger import Key, Rows


def rows_of(key: Key) -> Rows:
    """Rows whose values identify their field."""
    n = 1 + key[1] % 3
    objects = pd.DataFrame({"Metadata_ObjectNumber": np.arange(1, n + 1), "area_px": np.full(n, float(key[1]))})
    return Rows(np.full((n, 4), key[1], np.float32), objects, np.zeros((n, 2)))


@dataclass
class FakePlan:
    """Fields of one plate; numbers of fields that kill their process, fail, or run out of memory.

    With ``once`` (a folder) they do so the first time only. ``starts`` is False if workers end while they start.
    """

    n_fields: int = 12
    deadly: tuple[int, ...] = ()
    unreadable: tuple[int, ...] = ()
    hungry: tuple[int, ...] = ()
    once: Path | None = None
    device: str = "cpu"
    starts: bool = True
    seen: list[Key] = field(default_factory=list)

    def on(self, device: str, *, threads: int | None = None) -> FakePlan:
        if threads is not None and not self.starts:
            os._exit(3)
        return self

    def field_name(self, key: Key) -> tuple[str, str]:
        return "plate", f"A01/{key[1]}"

    def all_keys(self, part: range | None = None) -> Iterator[Key]:
        return ((0, i) for i in part or range(self.n_fields))

    def embed(self, keys: Iterable[Key], *, threads: int = 2) -> Iterator[tuple[Key, Rows | str]]:
        for key in keys:
            self.seen.append(key)
            if self._strikes(key, self.deadly):
                os.kill(os.getpid(), signal.SIGKILL)
            if self._strikes(key, self.hungry):
                raise MemoryError("no more")
            yield key, f"Field {key[1]} is broken." if self._strikes(key, self.unreadable) else rows_of(key)

    def _strikes(self, key: Key, numbers: tuple[int, ...]) -> bool:
        if key[1] not in numbers:
            return False
        if self.once is None:
            return True
        mark = self.once / str(key[1])
        if mark.exists():
            return False
        mark.touch()
        return True
