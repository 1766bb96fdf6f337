"""Shards: which part of a job's fields one of several machines takes, as in a job array."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cellvim.errors import InputError


@dataclass(frozen=True)
class Shard:
    """The ``number``-th of ``count`` equal stretches of the fields, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def stretch(self, n: int) -> range:
        """Return which of n fields are its own: neighbours, so that it opens few plates."""
        return range(n * (self.number - 1) // self.count, n * self.number // self.count)


def parse_shard(text: str) -> Shard:
    """Read ``i/n``.

    Raises
    ------
    InputError
        It is not of that form, or i is not among 1 to n.
    """
    found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
    if found is None:
        raise InputError(f"--shard is '{text}'; expected i/n, such as 3/8 for the third of eight.")
    number, count = map(int, found.groups())
    if count < 1:
        raise InputError(f"--shard is '{text}'; expected i/n with n of at least 1, such as 3/8 for the third of eight.")
    if not 1 <= number <= count:
        raise InputError(
            f"--shard is '{text}'; expected 1 to {count} of {count}. Number a SLURM array from 1: --array=1-{count}."
        )
    return Shard(number, count)
