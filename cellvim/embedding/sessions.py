"""Sessions: each process that works on a job says so, and shows that it is alive, in a small file of the ledger.

They keep two of the same command from working side by side unasked, tell `cellvim status` who is at work, and become
part of the run's manifest.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cellvim.errors import OutputError
from cellvim.files import Storage

if TYPE_CHECKING:
    from cellvim.embedding.ledger import Ledger

HEARTBEAT_S = 10.0
FRESH_S = 60.0  # a file that was written since belongs to a session that is alive
DEATHS = 2  # of sessions, one after the other; the next one embeds fields in a process apart


class Session:
    """One process at work on a job: a file that says who and what, renewed while it lives, and a log.

    Parameters
    ----------
    ledger
        Of the job.
    shard
        Which part of the fields it takes, as ``i/n``; None for all.
    about
        What else to say: the engine, workers, devices, versions.

    Raises
    ------
    OutputError
        Another process that is alive works on the same fields.
    """

    def __init__(self, ledger: Ledger, *, shard: str | None, about: dict[str, Any]) -> None:
        self.storage = ledger.storage
        started = datetime.now(UTC)
        self.id = f"{started:%Y%m%dT%H%M%S%f}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:6]}"
        self.record: dict[str, Any] = {
            "id": self.id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _birth(os.getpid()),
            "command": command_line(),
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
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # of the heartbeat and the work: else both would add the same lines to the log
        self._refuse_company(shard)
        self.write()
        self._thread = threading.Thread(target=self._beat, name="cellvim-heartbeat", daemon=True)
        self._thread.start()
        self.log("start", **{k: v for k, v in self.record.items() if k in ("command", "shard", "host", "pid")})

    def log(self, event: str, **values: Any) -> None:
        """Add a line to the log: time, event and values, as JSON."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **values}
        with self._lock:
            self._lines.append(json.dumps(line, default=str))

    def count(self, *, fields: int = 0, rows: int = 0, failed: int = 0) -> None:
        """Add to what this session did; the first field is written down at once, for `killed_again` to see."""
        first = not (self.record["fields"] or self.record["failed"]) and (fields or failed)
        for name, n in (("fields", fields), ("rows", rows), ("failed", failed)):
            self.record[name] += n
        if first:
            self.write()

    def close(self, state: str) -> None:
        """Say how it ended: finished, interrupted or stopped by an error."""
        self.record["state"] = state
        self.log("end", state=state, fields=self.record["fields"], rows=self.record["rows"])
        self._stop.set()
        self._thread.join()
        self.write()

    def _refuse_company(self, shard: str | None) -> None:
        for other in read_sessions(self.storage):
            if other["alive"] and not (shard and other["shard"] and shard != other["shard"]):
                raise OutputError(
                    f"Another cellvim embed is at work on this output: process {other['pid']} on {other['host']}, "
                    f"since {other['started']}. Wait for it (cellvim status), stop it, or share the work with --shard."
                )

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            self.write()

    def write(self, state: str | None = None) -> None:
        """Show that it is alive, and what it has done so far; and, at the end, how it ended."""
        self.record["state"] = state or self.record["state"]
        self.record["seconds"] = round(time.perf_counter() - self._start, 3)
        # A sign of life is worth no run: a full disk will be met by the rows.
        with self._writing, suppress(OutputError, OSError):
            self.storage.write(f"sessions/{self.id}.json", json.dumps(self.record, default=str).encode())
            self._write_log()

    def _write_log(self) -> None:
        with self._lock:
            lines = list(self._lines)
        if not lines:
            return
        text = "".join(f"{line}\n" for line in lines)
        if self.storage.path is None:  # which cannot be added to
            self.storage.write(f"log/{self.id}.jsonl", text.encode())
            return
        with open(self.storage.path / "log" / f"{self.id}.jsonl", "a", encoding="utf-8") as file:
            file.write(text)
        with self._lock:
            del self._lines[: len(lines)]


def read_sessions(storage: Storage) -> list[dict[str, Any]]:
    """Return what every session says of itself, oldest first, and whether it is ``alive``."""
    found = []
    for name in storage.names("sessions"):
        content = storage.read(f"sessions/{name}")
        try:
            record = json.loads(content or b"")
        except ValueError:
            continue
        age = storage.age_seconds(f"sessions/{name}")
        here = record["host"] == socket.gethostname()
        fresh = age is not None and age < FRESH_S
        lives = not here or _birth(record["pid"]) == record["born"] is not None
        record["alive"] = record["state"] == "running" and fresh and lives
        if record["state"] == "running" and not record["alive"]:
            record["state"] = "killed"
        found.append(record)
    return found


def killed_again(storage: Storage, shard: str | None) -> bool:
    """Return whether the last two sessions at this part of the fields were killed, and the last one got nowhere.

    It may be one field that takes more memory than there is, and would be met again by each session to come. A session
    that had its fields in a process apart, and was killed all the same, was not killed by a field.
    """
    last = [s for s in read_sessions(storage) if s["shard"] == shard][-DEATHS:]
    killed = len(last) == DEATHS and all(s["state"] == "killed" and not s.get("apart") for s in last)
    return killed and not (last[-1]["fields"] or last[-1]["failed"])


def read_log(storage: Storage) -> list[str]:
    """Return the lines of all sessions' logs, by time."""
    lines: list[str] = []
    for name in storage.names("log"):
        lines += (storage.read(f"log/{name}") or b"").decode("utf-8", "replace").splitlines()
    return sorted(lines, key=lambda line: line.partition('", "event"')[0])  # those of one moment stay in order


def command_line() -> str:
    """Return the command as it was typed, but for the path of the program."""
    import shlex

    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def _birth(pid: int) -> str | None:
    """Return when a process of this machine was started, by the system's own count; None where it does not live.

    So that another process of the same number is not taken for it. Where the system does not say, any lives.
    """
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except OSError:
            return "unknown"  # of another user: it is there
        return "unknown"
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if fields[0] in "ZX" else fields[19]  # dead, and not yet asked after by its parent
