"""The ledger of a job: which fields are done, with their rows, and which failed, and why.

It lies in ``<output>.partial``. Each field's rows are one file, named by plate, field and number of rows, with a
checksum in it: that the file is there says that the field is done, so nothing can be done and not recorded. A job may
be stopped at any moment, by anything, and any number of processes may add to it at once.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import field as default
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from cellvim.errors import OutputError, listing
from cellvim.files import Storage, storage_at

if TYPE_CHECKING:
    import pandas as pd

MARKER = "cellvim-partial"  # a folder without it is not ours to delete
RUN = "run.json"
_MAGIC = b"cellvim-rows-1 "  # then the payload's SHA-256 in hex, a line end, and the payload
TRIES = 2

Key = tuple[int, int]  # number of the plate, and of the field on it


class DamagedError(Exception):
    """A field's file is not what was written: a node was lost, or a disk was full."""


@dataclass(frozen=True)
class Rows:
    """The rows of one field.

    Attributes
    ----------
    embeddings
        (n, D) float32.
    objects
        n rows of numbers about each unit; ``Metadata_ObjectNumber`` among them.
    spatial
        (n, 2) position (x, y) within the field.
    obsm
        Further arrays (n, k), by name.
    tokens
        (D, C, rows, columns) float32 of a whole field, where maps of tokens are wanted.
    """

    embeddings: np.ndarray
    objects: pd.DataFrame
    spatial: np.ndarray
    obsm: Mapping[str, np.ndarray] = default(default_factory=dict)
    tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def to_bytes(self) -> bytes:
        """Return the rows as one block of bytes that knows when it is damaged."""
        arrays = {f"obs/{name}": self.objects[name].to_numpy() for name in self.objects.columns}
        arrays |= {f"obsm/{name}": values for name, values in self.obsm.items()}
        arrays |= {} if self.tokens is None else {"tokens": self.tokens}
        file = io.BytesIO()
        np.savez(file, X=self.embeddings.astype(np.float32, copy=False), spatial=self.spatial, **arrays)
        payload = file.getvalue()
        return _MAGIC + sha256(payload).hexdigest().encode() + b"\n" + payload

    @classmethod
    def from_bytes(cls, content: bytes) -> Rows:
        """Read what `to_bytes` made.

        Raises
        ------
        DamagedError
            It is not whole.
        """
        import pandas as pd

        head, _, payload = content[:256].partition(b"\n")
        payload = memoryview(content)[len(head) + 1 :]
        if not head.startswith(_MAGIC) or sha256(payload).hexdigest().encode() != head[len(_MAGIC) :]:
            raise DamagedError("its checksum is not that of its content")
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        objects = {n.removeprefix("obs/"): v for n, v in loaded.items() if n.startswith("obs/")}
        obsm = {n.removeprefix("obsm/"): v for n, v in loaded.items() if n.startswith("obsm/")}
        return cls(loaded["X"], pd.DataFrame(objects), loaded["spatial"], obsm, loaded.get("tokens"))


@dataclass(frozen=True)
class Failure:
    """A field without rows, and why."""

    plate: str
    field: str
    reason: str
    tries: int = TRIES


class Ledger:
    """What is done of a job, and what failed. Made by `open_ledger`; may be pickled to other processes.

    Attributes
    ----------
    storage
        Where it lies.
    identity
        All that decides the rows, as nested dicts of plain values.
    """

    def __init__(self, storage: Storage, identity: Mapping[str, Any]) -> None:
        self.storage, self.identity = storage, identity
        self.digest = identity_digest(identity)
        # What a process of an earlier job still writes, after --overwrite, lands in another folder.
        self._rows = f"fields-{self.digest[:12]}"
        self._failed = f"failed-{self.digest[:12]}"

    def begin(self, *, replaces: bool, form: Mapping[str, Any] | None = None) -> None:
        """Make the ledger, or take up the one that is there and is of the same job.

        Parameters
        ----------
        replaces
            The job may replace an output that exists.
        form
            Of the output, such as its format: it decides no row, but all who work on the job must want the same.

        Raises
        ------
        OutputError
            What is there is not ours, or of another job; the message says what differs.
        """
        if self.storage.exists():
            check_ours(self.storage)
            self._check_same(form)
        self.storage.make_folders()
        self.storage.write(MARKER, b"")  # before anything else: a folder without it is not ours
        self.storage.make_folders(self._rows, self._failed, "sessions", "log")
        if read_run(self.storage) is None:
            unread = self.storage.read(RUN)
            if unread is not None:  # of a version that is not ours
                self.storage.remove_if_equal(RUN, unread)
            run = {
                "run": uuid4().hex,
                "replaces": replaces,
                "digest": self.digest,
                "form": dict(form or {}),
                "output": self.storage.name.removesuffix(".partial"),
                "identity": self.identity,
            }
            if not self.storage.create(RUN, json.dumps(run, indent=1).encode()):
                self._check_same(form)  # another began at the same instant, and was first

    def _check_same(self, form: Mapping[str, Any] | None) -> None:
        before = read_run(self.storage)
        if before is None:
            return
        changes = differences(before["identity"], self.identity)
        changes += differences(before.get("form") or {}, form) if form and before.get("form") else []
        if changes:
            raise OutputError(
                f"{self.storage.name} holds the unfinished rows of another job, so this one cannot go on from "
                f"there. What differs: {listing(changes, 6)}. Run what was run before, start anew with "
                "--overwrite, or choose another --output."
            )

    def done(self, plates: Iterable[int]) -> dict[Key, int]:
        """Return the fields that are done, with their numbers of rows."""
        found = {}
        for plate in plates:
            for name in self.storage.names(f"{self._rows}/{plate:05d}"):
                field, _, rows = name.removesuffix(".rows").partition("-")
                if name.endswith(".rows"):
                    found[plate, int(field)] = int(rows)
        return found

    def keep(self, key: Key, rows: Rows) -> None:
        """Write down a field's rows.

        Raises
        ------
        OutputError
            They cannot be written.
        """
        self.storage.write(self._name(key, len(rows)), rows.to_bytes())

    def load(self, key: Key, n_rows: int) -> Rows:
        """Read a field's rows.

        Raises
        ------
        DamagedError
            They are not as they were written.
        """
        content = self.storage.read(self._name(key, n_rows))
        if content is None:
            raise DamagedError("its file has vanished")
        rows = Rows.from_bytes(content)
        if len(rows) != n_rows:
            raise DamagedError("it has another number of rows than its name says")
        return rows

    def forget(self, key: Key, n_rows: int) -> None:
        """Remove a field's rows, so that it is embedded again."""
        self.storage.remove(self._name(key, n_rows))

    def fail(self, key: Key, failure: Failure) -> None:
        """Write down why a field has no rows."""
        self.storage.write(f"{self._failed}/{key[0]:05d}-{key[1]:06d}.json", json.dumps(asdict(failure)).encode())

    def failures(self) -> dict[Key, Failure]:
        """Return the fields that failed, in their order."""
        found = {}
        for name in self.storage.names(self._failed):
            content = self.storage.read(f"{self._failed}/{name}")
            plate, _, field = name.removesuffix(".json").partition("-")
            if content:
                found[int(plate), int(field)] = Failure(**json.loads(content))
        return found

    def forgive(self, keys: Iterable[Key]) -> None:
        """Forget that fields failed: they are tried again."""
        for plate, field in keys:
            self.storage.remove(f"{self._failed}/{plate:05d}-{field:06d}.json")

    def _name(self, key: Key, n_rows: int) -> str:
        return f"{self._rows}/{key[0]:05d}/{key[1]:06d}-{n_rows}.rows"


def ledger_storage(output: str | Path) -> Storage:
    """Return the storage of an output's ledger, ``<output>.partial``."""
    return storage_at(f"{str(output).rstrip('/')}.partial")


def open_ledger(
    output: str | Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool = False,
    replaces: bool = False,
    form: Mapping[str, Any] | None = None,
) -> Ledger:
    """Begin a job's ledger beside its output, or take it up where it was left.

    Parameters
    ----------
    output
        What the job makes.
    identity
        All that decides the rows. A ledger of another identity is refused.
    overwrite
        Start anew: remove what is there.
    replaces
        The job may replace an output that exists.
    form
        Of the output, such as its format. A ledger of another form is refused.

    Raises
    ------
    OutputError
        Beside the output lies something that is not ours, or the ledger of another job.
    """
    storage = ledger_storage(output)
    if overwrite and storage.exists():
        check_ours(storage)
        storage.remove_all(MARKER)
    ledger = Ledger(storage, identity)
    ledger.begin(replaces=replaces, form=form)
    return ledger


def check_ours(storage: Storage) -> None:
    """Raise where a partial folder was not made by CellVim: it is neither used nor removed."""
    if storage.read(MARKER) is None and storage.names(""):
        raise OutputError(
            f"{storage.name} is in the way and was not made by CellVim. Move it, or choose another --output."
        )


def read_run(storage: Storage) -> dict[str, Any] | None:
    """Return what the job is: its identity, and whether it may replace its output; None where there is none."""
    content = storage.read(RUN)
    try:
        return None if content is None else json.loads(content)
    except ValueError:  # of a version that is not ours
        return None


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return a hash of an identity."""
    return sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two identities, one sentence each: the name, what it was and what it is."""
    was, is_ = dict(_flat(before)), dict(_flat(json.loads(json.dumps(now, default=str))))
    names = [name for name in [*was, *(name for name in is_ if name not in was)] if was.get(name) != is_.get(name)]
    found = []
    for name in names:
        old, new = _short(was.get(name, "not there")), _short(is_.get(name, "not there"))
        plate = re.fullmatch(r"(plates\.\d+)\.fields\.(count|sha256)", name)
        if plate is None or name not in was or name not in is_:
            found.append(f"{name} was {old}, is {new}")
        elif plate[2] == "count":
            found.append(f"wells/fields of {is_.get(f'{plate[1]}.name', plate[1])}: {old} fields before, {new} now")
        elif f"{plate[1]}.fields.count" not in names:  # else it is said already
            found.append(f"wells/fields of {is_.get(f'{plate[1]}.name', plate[1])}: others than before, as many")
    return found


def _flat(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flat(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _short(value: Any, most: int = 60) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= most else text[: most - 1] + "…"
