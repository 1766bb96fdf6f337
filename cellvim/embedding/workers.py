"""Working through fields: one loop that every engine calls, in this process or in several that are spawned.

A worker asks for one field after the other, so that none waits for a slower one, and writes each field's rows down
itself. One that dies, because the system had no memory left for it, takes nothing with it but the fields that it had
in hand: these are tried once more, each in a process of its own.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from typing import Any, Protocol

from cellvim.embedding.ledger import TRIES, Failure, Key, Ledger, Rows
from cellvim.errors import CellvimError, InputError

MOST_DEATHS_AT_START = 3  # workers that die before they have done anything: then it is not the fields' fault


class Plan(Protocol):
    """What a worker needs to know: how a field becomes rows."""

    def embed(self, keys: Iterable[Key], *, threads: int) -> Iterator[tuple[Key, Rows | str]]:
        """Yield each field's rows, or why it has none."""
        ...

    def on(self, device: str, *, threads: int | None = None) -> Plan:
        """Return the plan for another device, on which this process may use so many threads for computing."""
        ...

    def field_name(self, key: Key) -> tuple[str, str]:
        """Return the names of a field's plate and of the field."""
        ...


@dataclass(frozen=True)
class Done:
    """What became of one field: rows in the ledger, or a failure there, or (``final`` is False) another try ahead."""

    key: Key
    rows: int = 0
    reason: str | None = None
    final: bool = True


def work(plan: Plan, ledger: Ledger, keys: Iterable[Key], *, threads: int = 2, tries: int = TRIES) -> Iterator[Done]:
    """Embed fields and write their rows down; those that fail are tried again when the others are through.

    Parameters
    ----------
    plan, ledger
        Of the job.
    keys
        The fields; taken one at a time, as they are needed.
    threads
        That read fields and find cells.
    tries
        How often a field is tried before it counts as failed.

    Raises
    ------
    OutputError
        Rows cannot be written.
    """
    for attempt in range(1, tries + 1):
        again: list[Key] = []
        for key, result in plan.embed(keys, threads=threads):
            if isinstance(result, Rows):
                ledger.keep(key, result)
                yield Done(key, len(result))
            elif attempt < tries:
                again.append(key)
                yield Done(key, reason=result, final=False)
            else:
                ledger.fail(key, Failure(*plan.field_name(key), result, attempt))
                yield Done(key, reason=result)
        if not again:
            return
        keys = again


def work_in_processes(
    plan: Plan, ledger: Ledger, keys: Iterable[Key], *, workers: int, devices: Sequence[str], threads: int = 1
) -> Iterator[Done]:
    """Do what `work` does in several processes, which are spawned.

    Parameters
    ----------
    plan, ledger, keys
        As in `work`.
    workers
        How many processes.
    devices
        Devices that they take in turn.
    threads
        Of each, that read fields and find cells.

    Raises
    ------
    CellvimError
        A worker met what concerns all: the disk is full, or workers die before they have done anything.
    """
    team = _Team(plan, ledger, keys, workers, devices, threads)
    try:
        yield from team.run()
    finally:
        team.stop()


class _Worker:
    """A spawned process, the line to it, and the fields that it has in hand."""

    def __init__(self, process: Any, line: connection.Connection, careful: bool) -> None:
        self.process, self.line, self.careful = process, line, careful
        self.in_hand: list[Key] = []
        self.waits = False  # it asked for a field, and there was none yet


class _Team:
    def __init__(
        self, plan: Plan, ledger: Ledger, keys: Iterable[Key], size: int, devices: Sequence[str], threads: int
    ) -> None:
        self.plan, self.ledger, self.size, self.threads = plan, ledger, size, threads
        self.devices = list(devices)
        self._keys = iter(keys)
        self.following = next(self._keys, None)  # the next field to give away
        self.suspects: deque[Key] = deque()  # in hand when a worker died
        self.workers: list[_Worker] = []
        self.started = 0
        self.deaths_at_start = 0
        self._job = pickle.dumps((plan.on("cpu"), ledger))  # once: the weights are in it

    def run(self) -> Iterator[Done]:
        """Start the workers and yield what becomes of the fields."""
        for _ in range(self.size if self.following is not None else 0):
            self._start()
        while self.workers:
            lines = {w.line: w for w in self.workers}
            for line in connection.wait(list(lines)):
                worker = lines[line]
                try:
                    message, content = line.recv()
                except (EOFError, OSError):
                    yield from self._died(worker)
                    continue
                if message == "next":
                    self._give(worker)
                elif message == "done":
                    yield from self._note(worker, content)
                elif message == "error":
                    raise content if isinstance(content, CellvimError) else RuntimeError(content)
            if self.following is None and self.suspects and not any(w.careful for w in self.workers):
                self._start(careful=True)

    def stop(self) -> None:
        """End all workers that are left."""
        for worker in self.workers:
            worker.process.terminate()
        for worker in self.workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.line.close()
        self.workers = []

    def _start(self, careful: bool = False) -> None:
        context = get_context("spawn")  # a fork hangs once OpenMP or Zarr has run threads
        ours, theirs = context.Pipe()
        device = self.devices[self.started % len(self.devices)]
        cores = os.cpu_count() or 1
        settings = {"device": device, "threads": self.threads, "computing": max(1, cores // self.size)}
        process = context.Process(target=_worker_main, args=(theirs, settings), name=f"cellvim-{self.started}")
        with _main_not_run_again():
            process.start()
        theirs.close()
        self.started += 1
        worker = _Worker(process, ours, careful)
        self.workers.append(worker)
        with suppress(OSError):  # it is dead already: the next look at its line says so
            ours.send_bytes(self._job)

    def _give(self, worker: _Worker) -> None:
        key: Key | None = None
        if worker.careful:
            if self.suspects and not worker.in_hand:
                key = self.suspects[0]
        elif self.following is not None:
            key, self.following = self.following, next(self._keys, None)
        if key is not None:
            worker.in_hand.append(key)
        with suppress(OSError):  # dead: the fields in hand are dealt with when its line is read
            worker.line.send(key)

    def _note(self, worker: _Worker, done: Done) -> Iterator[Done]:
        self.deaths_at_start = 0
        if done.final:
            worker.in_hand.remove(done.key)
            if worker.careful:
                self.suspects.popleft()
        yield done

    def _died(self, worker: _Worker) -> Iterator[Done]:
        """Deal with a worker whose line is closed: it is through with its work, or it died."""
        worker.process.join()
        self.workers.remove(worker)
        worker.line.close()
        if worker.process.exitcode == 0 and not worker.in_hand:
            return
        why = _how_it_died(worker.process.exitcode)
        done = self.ledger.done({key[0] for key in worker.in_hand})
        lost = [key for key in worker.in_hand if key not in done]
        for key in worker.in_hand:
            if key in done:  # it died between writing it down and saying so
                yield Done(key, done[key])
        if worker.careful:
            if lost:
                key = self.suspects.popleft()
                reason = f"Field {self.plan.field_name(key)[1]}: {why} while it was embedded, twice."
                self.ledger.fail(key, Failure(*self.plan.field_name(key), reason))
                yield Done(key, reason=reason)
            elif worker.in_hand:
                self.suspects.popleft()
            return
        for key in lost:
            self.suspects.append(key)
            yield Done(key, reason=f"{why}; it is tried again in a process of its own.", final=False)
        if not lost:
            self.deaths_at_start += 1
            if self.deaths_at_start >= MOST_DEATHS_AT_START:
                raise InputError(
                    f"Workers end before they have done anything ({why}). Try fewer --workers, or none, to see why."
                )
        if self.following is not None:
            self._start()


def _how_it_died(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else str(-code)
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its worker was killed ({name}{hint})"
    return f"its worker ended with the exit code {code}"


def _worker_main(line: connection.Connection, settings: dict[str, Any]) -> None:
    """Run in each spawned process: ask for fields until there are none left."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent deals with it
    _end_with_parent()
    try:
        plan, ledger = pickle.loads(line.recv_bytes())
        plan = plan.on(settings["device"], threads=settings["computing"])

        def keys() -> Iterator[Key]:
            while True:
                line.send(("next", None))
                key = line.recv()
                if key is None:
                    return
                yield key

        for done in work(plan, ledger, keys(), threads=settings["threads"]):
            line.send(("done", done))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the parent is gone
        os._exit(1)
    except CellvimError as error:
        line.send(("error", type(error)(str(error))))
    except MemoryError:
        os._exit(137)  # as if the system had ended it
    except Exception:
        line.send(("error", f"a worker failed:\n{traceback.format_exc()}"))
    finally:
        line.close()


def _end_with_parent() -> None:
    """End this process when its parent dies: a killed run must not go on in the background."""
    parent = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=watch, name="cellvim-parent-watch", daemon=True).start()


class _main_not_run_again:
    """Keep spawned workers from running the caller's script again: they need nothing of it.

    Else `cellvim.embed(…, workers=2)` in a plain script would start itself over and over.
    """

    def __enter__(self) -> None:
        main = sys.modules["__main__"]
        self.main, self.kept = main, {n: getattr(main, n) for n in ("__file__", "__spec__") if hasattr(main, n)}
        if "__file__" in self.kept:
            del main.__file__
        main.__spec__ = None

    def __exit__(self, *_: object) -> None:
        for name, value in self.kept.items():
            setattr(self.main, name, value)
