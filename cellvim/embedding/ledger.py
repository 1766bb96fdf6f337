"""The ledger: finished rows, failures and sessions of a run, in the folder ``<output>.partial``.

The rows of each field are one file, written atomically and named by plate, field and number of rows, with a checksum.
A field is finished exactly if its file exists, so a run may be interrupted at any moment, by anything, and any number
of processes may add to it at once. A session is one process that runs ``cellvim embed``: a small file in the ledger
that is renewed while the process lives. Sessions keep two identical commands from working on one output, show progress
in `cellvim status`, and become part of the manifest.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from dataclasses import field as default
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from cellvim.errors import OutputError, listing
from cellvim.files import Storage, storage_at

if TYPE_CHECKING:
    import pandas as pd

MARKER = "cellvim-partial"  # a folder without this file is not ours to delete
RUN = "run.json"
LOCK = "lock"
TRIES = 2
HEARTBEAT_S = 10.0
FRESH_S = 60.0  # a session whose file is older is dead
_MAGIC = b"cellvim-rows-1 "  # followed by the SHA-256 of the payload in hex, a line feed, and the payload

Key = tuple[int, int]  # index of the plate, and of the field within it


class DamagedError(Exception):
    """The file of a field does not have the content that was written: a node was lost, or a disk was full."""


@dataclass(frozen=True)
class Rows:
    """The rows of one field.

    Attributes
    ----------
    embeddings
        (n, D) float32.
    objects
        (n rows) numbers that describe each unit; ``Metadata_ObjectNumber`` is one of the columns.
    spatial
        (n, 2) position (x, y) within the field.
    obsm
        Further arrays (n, k), by name.
    tokens
        (D, C, rows, columns) float32 token maps of a field, if requested.
    """

    embeddings: np.ndarray
    objects: pd.DataFrame
    spatial: np.ndarray
    obsm: Mapping[str, np.ndarray] = default(default_factory=dict)
    tokens: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.objects)

    def to_bytes(self) -> bytes:
        """Return the rows as bytes with a checksum."""
        arrays = {f"obs/{name}": self.objects[name].to_numpy() for name in self.objects.columns}
        arrays |= {f"obsm/{name}": values for name, values in self.obsm.items()}
        arrays |= {} if self.tokens is None else {"tokens": self.tokens}
        file = io.BytesIO()
        np.savez(file, X=self.embeddings.astype(np.float32, copy=False), spatial=self.spatial, **arrays)
        payload = file.getvalue()
        return _MAGIC + sha256(payload).hexdigest().encode() + b"\n" + payload

    @classmethod
    def from_bytes(cls, content: bytes) -> Rows:
        """Read the result of `to_bytes`.

        Raises
        ------
        DamagedError
            The checksum does not match.
        """
        import pandas as pd

        head, _, payload = content[:256].partition(b"\n")
        payload = memoryview(content)[len(head) + 1 :]
        if not head.startswith(_MAGIC) or sha256(payload).hexdigest().encode() != head[len(_MAGIC) :]:
            raise DamagedError("the checksum does not match")
        with np.load(io.BytesIO(payload), allow_pickle=False) as arrays:
            loaded = {name: arrays[name] for name in arrays.files}
        objects = {n.removeprefix("obs/"): v for n, v in loaded.items() if n.startswith("obs/")}
        obsm = {n.removeprefix("obsm/"): v for n, v in loaded.items() if n.startswith("obsm/")}
        return cls(loaded["X"], pd.DataFrame(objects), loaded["spatial"], obsm, loaded.get("tokens"))


@dataclass(frozen=True)
class Failure:
    """A field without rows, and the reason."""

    plate: str
    field: str
    reason: str
    tries: int = TRIES


class Ledger:
    """Finished rows and failures of a run. Created by `open_ledger`; can be pickled to other processes.

    Attributes
    ----------
    storage
        The files of the ledger.
    identity
        Everything that determines the rows, as nested dicts of plain values.
    """

    def __init__(self, storage: Storage, identity: Mapping[str, Any]) -> None:
        self.storage, self.identity = storage, identity
        self.digest = identity_digest(identity)
        # With --overwrite, a process of an earlier run that still writes does so into other folders.
        self._rows = f"fields-{self.digest[:12]}"
        self._failed = f"failed-{self.digest[:12]}"

    def begin(self, *, replaces: bool, form: Mapping[str, Any] | None = None) -> None:
        """Create the ledger, or continue an existing one of the same run; see `open_ledger`."""
        if self.storage.exists():
            check_ours(self.storage)
            self._check_same_run(form)
        self.storage.make_folders()
        self.storage.write(MARKER, b"")  # before anything else
        self.storage.make_folders(self._rows, self._failed, "sessions", "log")
        if read_run(self.storage) is None:
            unreadable = self.storage.read(RUN)
            if unreadable is not None:  # of another version
                self.storage.remove_if_equal(RUN, unreadable)
            run = {
                "run": uuid4().hex,
                "replaces": replaces,
                "digest": self.digest,
                "form": dict(form or {}),
                "output": self.storage.name.removesuffix(".partial"),
                "identity": self.identity,
            }
            if not self.storage.create(RUN, json.dumps(run, indent=1).encode()):
                self._check_same_run(form)  # another session created it in the meantime

    def _check_same_run(self, form: Mapping[str, Any] | None) -> None:
        before = read_run(self.storage)
        if before is None:
            return
        changes = differences(before["identity"], self.identity)
        changes += differences(before.get("form") or {}, form) if form and before.get("form") else []
        if changes:
            raise OutputError(
                f"{self.storage.name} holds the unfinished rows of another run, which this one cannot resume. "
                f"Differences: {listing(changes, 6)}. Repeat the earlier command, discard its rows with --overwrite, "
                "or choose another --output."
            )

    def done(self, plates: Iterable[int]) -> dict[Key, int]:
        """Return the finished fields of these plates, with their numbers of rows."""
        found = {}
        for plate in plates:
            for name in self.storage.names(f"{self._rows}/{plate:05d}"):
                field, _, rows = name.removesuffix(".rows").partition("-")
                if name.endswith(".rows"):
                    found[plate, int(field)] = int(rows)
        return found

    def store(self, key: Key, rows: Rows) -> None:
        """Write the rows of a field.

        Raises
        ------
        OutputError
            They cannot be written.
        """
        self.storage.write(self._name(key, len(rows)), rows.to_bytes())

    def load(self, key: Key, n_rows: int) -> Rows:
        """Read the rows of a field.

        Raises
        ------
        DamagedError
            They are not as they were written.
        """
        content = self.storage.read(self._name(key, n_rows))
        if content is None:
            raise DamagedError("the file is missing")
        rows = Rows.from_bytes(content)
        if len(rows) != n_rows:
            raise DamagedError("the number of rows does not match the name of the file")
        return rows

    def remove(self, key: Key, n_rows: int) -> None:
        """Remove the rows of a field, so that it is embedded again."""
        self.storage.remove(self._name(key, n_rows))

    def add_failure(self, key: Key, failure: Failure) -> None:
        """Record why a field has no rows."""
        name = f"{self._failed}/{key[0]:05d}-{key[1]:06d}.json"
        self.storage.write(name, json.dumps(asdict(failure)).encode())

    def failures(self) -> dict[Key, Failure]:
        """Return the failed fields, in order."""
        found = {}
        for name in self.storage.names(self._failed):
            content = self.storage.read(f"{self._failed}/{name}")
            plate, _, field = name.removesuffix(".json").partition("-")
            if content:
                found[int(plate), int(field)] = Failure(**json.loads(content))
        return found

    def clear_failures(self, keys: Iterable[Key]) -> None:
        """Remove the failures of these fields, so that they are tried again."""
        for plate, field in keys:
            self.storage.remove(f"{self._failed}/{plate:05d}-{field:06d}.json")

    def delete(self) -> None:
        """Remove the ledger with all its files."""
        self.storage.remove_all(MARKER)

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
    """Create the ledger of a run beside its output, or continue an existing one.

    Parameters
    ----------
    output
        Path or URL of the output.
    identity
        Everything that determines the rows. A ledger with another identity is refused.
    overwrite
        Discard an existing ledger.
    replaces
        Whether the run may replace an existing output.
    form
        Options that do not affect the rows, such as the format. A ledger with other values is refused.

    Raises
    ------
    OutputError
        The existing folder was not created by CellVim, or belongs to another run or, with ``overwrite``, to a running
        process.
    """
    storage = ledger_storage(output)
    if overwrite and storage.exists():
        check_ours(storage)
        for other in read_sessions(storage):
            if other["alive"]:
                raise OutputError(
                    f"Another cellvim embed is writing this output (process {other['pid']} on {other['host']}), so it "
                    "cannot be overwritten. Stop that process first."
                )
        storage.remove_all(MARKER)
    ledger = Ledger(storage, identity)
    ledger.begin(replaces=replaces, form=form)
    return ledger


def check_ours(storage: Storage) -> None:
    """Raise `OutputError` if a partial folder was not created by CellVim: it is neither used nor removed."""
    if storage.read(MARKER) is None and storage.names():
        raise OutputError(f"{storage.name} was not created by CellVim. Move it, or choose another --output.")


def read_run(storage: Storage) -> dict[str, Any] | None:
    """Return the identity and options of the run in a ledger; None if there is none."""
    content = storage.read(RUN)
    try:
        return None if content is None else json.loads(content)
    except ValueError:  # of another version
        return None


def identity_digest(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an identity."""
    return sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two identities, each with name, old value and new value."""
    was, is_ = dict(_flatten(before)), dict(_flatten(json.loads(json.dumps(now, default=str))))
    names = [name for name in [*was, *(name for name in is_ if name not in was)] if was.get(name) != is_.get(name)]
    found = []
    for name in names:
        old, new = _shorten(was.get(name, "missing")), _shorten(is_.get(name, "missing"))
        plate = re.fullmatch(r"(plates\.\d+)\.fields\.(count|sha256)", name)
        if plate is None or name not in was or name not in is_:
            found.append(f"{name} was {old}, is {new}")
        elif plate[2] == "count":
            found.append(f"wells/fields of {is_.get(f'{plate[1]}.name', plate[1])}: {old} fields before, {new} now")
        elif f"{plate[1]}.fields.count" not in names:
            found.append(f"wells/fields of {is_.get(f'{plate[1]}.name', plate[1])}: same number, different fields")
    return found


def _flatten(node: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _flatten(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, node


def _shorten(value: Any, limit: int = 60) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


class Session:
    """One process that works on a run: a status file in the ledger, renewed while the process lives, and a log.

    Parameters
    ----------
    ledger
        The ledger of the run.
    shard
        The part of the fields that the session embeds, as ``i/n``; None for all.
    about
        Further values for the record: engine, workers, devices, versions.

    Raises
    ------
    OutputError
        Another living session works on the same fields.
    """

    def __init__(self, ledger: Ledger, *, shard: str | None, about: dict[str, Any]) -> None:
        self.storage = ledger.storage
        started = datetime.now(UTC)
        self.id = f"{started:%Y%m%dT%H%M%S%f}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
        self.record: dict[str, Any] = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _process_start(os.getpid()),
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "shard": shard,
            "started": started.isoformat(timespec="seconds"),
            **about,
            "state": "running",
            "fields": 0,
            "rows": 0,
            "failed": 0,
            "seconds": 0.0,
        }
        self._start = time.perf_counter()
        self._stop = threading.Event()
        self._lines: list[str] = []
        self._writing = threading.Lock()  # the heartbeat and the main thread must not both append the same lines
        for other in read_sessions(self.storage):
            if other["alive"] and not (shard and other["shard"] and shard != other["shard"]):
                raise OutputError(
                    f"Another cellvim embed is writing this output: process {other['pid']} on {other['host']}, since "
                    f"{other['started']}. Wait for it (cellvim status), stop it, or divide the work with --shard."
                )
        self.write()
        self._thread = threading.Thread(target=self._beat, name="cellvim-heartbeat", daemon=True)
        self._thread.start()
        self.log("start", **{k: v for k, v in self.record.items() if k in ("command", "shard", "host", "pid")})

    def log(self, event: str, **values: Any) -> None:
        """Add a line to the log: time, event and values, as JSON."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        self._lines.append(json.dumps(line, default=str))

    def count(self, *, fields: int = 0, rows: int = 0, failed: int = 0) -> None:
        """Add to the counts of the session; the first field is recorded at once, see `needs_isolation`."""
        first = not (self.record["fields"] or self.record["failed"]) and (fields or failed)
        for name, n in (("fields", fields), ("rows", rows), ("failed", failed)):
            self.record[name] += n
        if first:
            self.write()

    def close(self, state: str) -> None:
        """End the session with a state: finished, interrupted or stopped (by an error)."""
        self.record["state"] = state
        self.log("end", state=state, fields=self.record["fields"], rows=self.record["rows"])
        self._stop.set()
        self._thread.join()
        self.write()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self.write()

    def write(self, state: str | None = None) -> None:
        """Write the record and the log."""
        self.record["state"] = state or self.record["state"]
        self.record["seconds"] = round(time.perf_counter() - self._start, 3)
        # A failure here must not stop the run: a full disk is reported when rows are written.
        with self._writing, suppress(OutputError, OSError):
            self.storage.write(f"sessions/{self.id}.json", json.dumps(self.record, default=str).encode())
            lines = self._lines.copy()
            text = "".join(f"{line}\n" for line in lines)
            if lines and self.storage.path is None:  # objects cannot be appended to
                self.storage.write(f"log/{self.id}.jsonl", text.encode())
            elif lines:
                with open(self.storage.path / "log" / f"{self.id}.jsonl", "a", encoding="utf-8") as file:
                    file.write(text)
                del self._lines[: len(lines)]  # `log` may have added more


def read_sessions(storage: Storage) -> list[dict[str, Any]]:
    """Return the records of all sessions, oldest first, each with whether it is ``alive``."""
    found = []
    for name in storage.names("sessions"):
        content = storage.read(f"sessions/{name}")
        try:
            record = json.loads(content or b"")
        except ValueError:
            continue
        age = storage.age_seconds(f"sessions/{name}")
        fresh = age is not None and age < FRESH_S
        elsewhere = record["host"] != socket.gethostname()
        lives = elsewhere or _process_start(record["pid"]) == record["born"] is not None
        record["alive"] = record["state"] == "running" and fresh and lives
        if record["state"] == "running" and not record["alive"]:
            record["state"] = "killed"
        found.append(record)
    return found


def needs_isolation(storage: Storage, shard: str | None) -> bool:
    """Return whether the last two sessions of this shard were killed, the last one before it finished a field.

    The cause may be a field that needs more memory than is available, which would kill every further session.
    A session that embedded in an isolated process and was killed nevertheless was not killed by a field.
    """
    last = [s for s in read_sessions(storage) if s["shard"] == shard][-2:]
    killed = len(last) == 2 and all(s["state"] == "killed" and not s.get("isolated") for s in last)
    return killed and not (last[-1]["fields"] or last[-1]["failed"])


def read_log(storage: Storage) -> list[str]:
    """Return the lines of the logs of all sessions, sorted by time."""
    lines: list[str] = []
    for name in storage.names("log"):
        lines += (storage.read(f"log/{name}") or b"").decode("utf-8", "replace").splitlines()
    return sorted(lines, key=lambda line: line.partition('", "event"')[0])  # stable within one instant


@contextmanager
def locked(storage: Storage, session: Session) -> Iterator[bool]:
    """Hold the lock of the ledger within the block; yields False if another living session holds it.

    The lock of a dead session is void. On object stores without conditional writes several sessions may get the lock:
    they must write the same bytes.
    """
    held = False
    for _ in range(3):
        held = storage.create(LOCK, session.id.encode())
        holder = b"" if held else storage.read(LOCK) or b""
        if held or any(s["alive"] and s["id"] == holder.decode() for s in read_sessions(storage)):
            break
        storage.remove_if_equal(LOCK, holder)
    try:
        yield held
    finally:
        if held and storage.read(LOCK) == session.id.encode():
            storage.remove(LOCK)


def _process_start(pid: int) -> str | None:
    """Return the start time of a process on this machine, in the system's own unit; None if it is not alive.

    It distinguishes processes that were given the same number. Without ``/proc`` it is "unknown".
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            return "unknown"  # it belongs to another user
        return "unknown"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # Z: dead, not yet waited for
