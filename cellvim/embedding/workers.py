"""Embedding the fields of a run: in this process, in worker processes, or in actors of a Ray cluster.

The unit of work is a field. One loop (`_Team`) submits a few fields at a time to workers with the interface of
`concurrent.futures`, and records what becomes of them. Workers write rows to the ledger themselves; only `FieldResult`
objects come back. The result does not depend on which worker embeds a field, or when.

Each worker process is a `ProcessPoolExecutor` of its own with a single process, so that a process killed by the system
(usually because memory runs out) breaks only its own executor and is replaced. Loky, the alternative, was not chosen:
the death of one of its processes also ends all others, and it restarts workers whose memory grows by more than 300 MB
after their first task, as PyTorch's does. The fields that a killed worker was given are tried again, one by one, in an
isolated process; a field that kills that as well is recorded as failed.
"""

from __future__ import annotations

import math
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import cycle, groupby
from multiprocessing import connection, parent_process
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cellvim.embedding.ledger import TRIES, Failure, Key, Ledger, Rows
from cellvim.errors import CellvimError, InputError

if TYPE_CHECKING:
    from cellvim.embedding.encode import FieldEmbedder
    from cellvim.embedding.plan import EmbeddingPlan

MAX_FAILED_STARTS = 3  # consecutive workers that die before they are ready
TASK_SECONDS = 10.0  # duration of a task: short for progress, long enough to read ahead and to fill batches
MAX_FIELDS_PER_TASK = 256
RAY_OBJECT_STORE_BYTES = 200_000_000  # when Ray is started here; rows do not pass through the object store


@dataclass(frozen=True)
class FieldResult:
    """What became of a field: its rows are in the ledger, or it failed; if not ``final``, it will be tried again."""

    key: Key
    rows: int = 0
    reason: str | None = None
    final: bool = True


@dataclass(frozen=True)
class Shard:
    """The ``number``-th of ``count`` equal parts of the fields, counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def part(self, n: int) -> range:
        """Return the indices of this part among n fields: neighbours, so that a shard opens few plates."""
        return range(n * (self.number - 1) // self.count, n * self.number // self.count)

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``.

        Raises
        ------
        InputError
            The text does not have this form, or i is not between 1 and n.
        """
        found = re.fullmatch(r"\s*(\d+)\s*/\s*(\d+)\s*", text)
        number, count = map(int, found.groups()) if found else (0, 0)
        if count < 1:
            raise InputError(f"--shard is '{text}'; expected i/n, such as 3/8 for the third of eight parts.")
        if not 1 <= number <= count:
            raise InputError(
                f"--shard is '{text}'; expected a number from 1 to {count}. Number a SLURM array from 1: "
                f"--array=1-{count}."
            )
        return cls(number, count)


class RemainingFields:
    """The fields of a run, or of one shard, that are not finished; iterated plate by plate.

    Failures recorded by earlier sessions are cleared, so that these fields are tried again.

    Attributes
    ----------
    n_fields, n_done, n_rows
        Number of fields, and of finished fields and their rows at the start.
    """

    def __init__(
        self, plan: EmbeddingPlan, ledger: Ledger, *, part: range | None = None, keys: Sequence[Key] | None = None
    ) -> None:
        self.plan, self.ledger, self.part, self.keys = plan, ledger, part, keys
        self.n_fields = self.n_done = self.n_rows = 0
        for plate, own in self._by_plate():
            done = ledger.done([plate])
            counts = [done[key] for key in own if key in done]
            self.n_fields += len(own)
            self.n_done += len(counts)
            self.n_rows += sum(counts)
        failed = ledger.failures()
        if failed:
            own = set(plan.all_keys(part))
            ledger.clear_failures(key for key in failed if key in own)

    def _by_plate(self) -> Iterator[tuple[int, list[Key]]]:
        keys = self.plan.all_keys(self.part) if self.keys is None else sorted(self.keys)
        for plate, group in groupby(keys, key=lambda key: key[0]):
            yield plate, list(group)

    def __len__(self) -> int:
        return self.n_fields - self.n_done

    def __iter__(self) -> Iterator[Key]:
        for plate, keys in self._by_plate():
            done = self.ledger.done([plate])
            yield from (key for key in keys if key not in done)


Keys = RemainingFields | Sequence[Key]


def embed_here(
    embedder: FieldEmbedder, ledger: Ledger, keys: Iterable[Key], *, threads: int = 2
) -> Iterator[FieldResult]:
    """Embed fields in this process, with ``threads`` that read fields and find cells; retry failed fields at the end.

    Raises
    ------
    OutputError
        Rows cannot be written.
    """
    for attempt in range(1, TRIES + 1):
        again: list[Key] = []
        for result in _embed_and_store(embedder, ledger, keys, attempt, threads):
            again += [] if result.final else [result.key]
            yield result
        keys = again


def _embed_and_store(
    embedder: FieldEmbedder, ledger: Ledger, keys: Iterable[Key], attempt: int, threads: int
) -> Iterator[FieldResult]:
    for key, result in embedder.embed(keys, threads=threads):
        if isinstance(result, Rows):
            ledger.store(key, result)
            yield FieldResult(key, len(result))
        elif attempt < TRIES:
            yield FieldResult(key, reason=result, final=False)
        else:
            ledger.add_failure(key, Failure(*embedder.field_name(key), result, attempt))
            yield FieldResult(key, reason=result)


def embed_in_processes(
    embedder: FieldEmbedder, ledger: Ledger, keys: Keys, *, workers: int, devices: Sequence[str]
) -> Iterator[FieldResult]:
    """Embed fields in ``workers`` spawned processes of this machine, to which ``devices`` are assigned in turn.

    Raises
    ------
    CellvimError
        A worker met an error that concerns all fields, such as a full disk, or workers cannot be started.
    """
    job = pickle.dumps((embedder.on("cpu"), ledger))  # once: it contains the weights
    threads = max(1, (os.cpu_count() or 1) // workers)
    device = cycle(devices)
    yield from _Team(embedder, ledger, keys, workers, lambda: ProcessWorker(job, next(device), threads)).run()


def embed_on_ray(
    embedder: FieldEmbedder, ledger: Ledger, keys: Keys, *, workers: int, address: str | None = None
) -> Iterator[FieldResult]:
    """Embed fields in ``workers`` actors of a Ray cluster. Every node must have access to the ledger and the plates.

    Without an address, Ray is started on this machine unless it is already running in this process.

    Raises
    ------
    InputError
        Ray is not installed, or the cluster cannot be reached.
    CellvimError
        As in `embed_in_processes`.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray requires Ray: pip install 'cellvim[ray]'.") from error
    started_here = not ray.is_initialized()
    if started_here:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None and not os.environ.get("RAY_ADDRESS"):
            options |= {"include_dashboard": False, "object_store_memory": RAY_OBJECT_STORE_BYTES}
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"Ray cannot be reached at {address or 'this machine'}: {reason}") from error
    try:
        device = embedder.device
        on_gpu = device.startswith("cuda")
        options = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0} | ({"num_gpus": 1} if on_gpu else {})
        actor = ray.remote(**options)(Embedder)
        job = ray.put(pickle.dumps((embedder.on("cpu"), ledger)))
        device = "cuda" if on_gpu else device  # Ray makes one GPU visible to each actor
        yield from _Team(embedder, ledger, keys, workers, lambda: RayWorker(actor, job, device, os.getcwd())).run()
    finally:
        if started_here:
            ray.shutdown()


class WorkerDiedError(Exception):
    """A worker ended before it returned a result; the message is the reason."""


class Embedder:
    """Runs in a worker: holds the embedder with its model, and embeds the fields that are submitted."""

    def __init__(self, job: bytes, device: str, threads: int, folder: str | None = None) -> None:
        self.job, self.device, self.threads, self.folder = job, device, threads, folder

    def load(self) -> None:
        """Load the embedder, and move the model to its device."""
        if self.folder is not None:  # paths of plates may be relative
            with suppress(OSError):
                os.chdir(self.folder)
        embedder, self.ledger = pickle.loads(self.job)
        self.embedder = embedder.on(self.device, threads=self.threads)

    def embed(self, keys: Sequence[Key], attempt: int) -> tuple[list[FieldResult], float]:
        """Embed fields and write their rows; return the results and the duration in seconds."""
        start = time.perf_counter()
        try:
            results = list(_embed_and_store(self.embedder, self.ledger, keys, attempt, threads=1))
        except MemoryError:
            os._exit(137)  # as if the system had killed the process
        return results, time.perf_counter() - start


class ProcessWorker:
    """A spawned process, as an executor with a single process.

    Attributes
    ----------
    ready
        Future that is done when the model is loaded.
    """

    def __init__(self, job: bytes, device: str, threads: int) -> None:
        self.context = _Context()
        self.executor = ProcessPoolExecutor(
            1, mp_context=self.context, initializer=_start_process, initargs=(job, device, threads)
        )
        self.ready = self.executor.submit(_call, "load")

    def submit(self, keys: Sequence[Key], attempt: int) -> Future:
        """Embed fields; see `Embedder.embed`."""
        try:
            return self.executor.submit(_call, "embed", keys, attempt)
        except BrokenExecutor as error:
            future: Future = Future()
            future.set_exception(error)
            return future

    def result(self, future: Future) -> Any:
        """Return the result of a future of this worker; raises `WorkerDiedError` if the worker died."""
        try:
            return future.result()
        except BrokenExecutor:
            self.executor.shutdown()  # waits for the process, so that its exit code is known
            raise WorkerDiedError(_describe_exit(self.context.process.exitcode)) from None

    def stop(self) -> None:
        """End the process at once: rows are written atomically."""
        with suppress(ValueError, AttributeError):  # it ended, or was never started
            self.context.process.kill()
        self.executor.shutdown(cancel_futures=True)


class RayWorker:
    """An actor of a Ray cluster, with the interface of `ProcessWorker`."""

    def __init__(self, actor: Any, job: Any, device: str, folder: str) -> None:
        self.actor = actor.remote(job, device, 1, folder)
        self.ready = self.actor.load.remote().future()

    def submit(self, keys: Sequence[Key], attempt: int) -> Future:
        """Embed fields; see `Embedder.embed`."""
        return self.actor.embed.remote(keys, attempt).future()

    def result(self, future: Future) -> Any:
        """Return the result of a future of this worker; raises `WorkerDiedError` if the worker died."""
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return future.result()
        except RayActorError as error:
            raise WorkerDiedError(f"its actor died ({' '.join(str(error).split())[:300]})") from None
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, CellvimError) else error from None

    def stop(self) -> None:
        """End the actor at once."""
        import ray

        ray.kill(self.actor)


Worker = ProcessWorker | RayWorker


class _Team:
    """Workers, and the fields that each was given."""

    def __init__(
        self,
        embedder: FieldEmbedder,
        ledger: Ledger,
        keys: Keys,
        n_workers: int,
        start: Callable[[], Worker],
    ) -> None:
        self.embedder, self.ledger, self.n_workers, self.start = embedder, ledger, n_workers, start
        self.n_left = len(keys)
        self.keys = iter(keys)
        self.next_key = next(self.keys, None)
        self.fields_per_task = 1
        self.again: list[Key] = []  # failed once
        self.suspects: list[Key] = []  # given to a worker that died
        self.workers: list[Worker] = []
        self.tasks: dict[Future, tuple[Worker, Sequence[Key]]] = {}
        self.n_failed_starts = 0

    def run(self) -> Iterator[FieldResult]:
        """Yield what becomes of the fields."""
        try:
            for _ in range(min(self.n_workers, self.n_left) if self.next_key is not None else 0):
                self._start_worker()
            while self.next_key is not None or self.again or any(keys for _, keys in self.tasks.values()):
                finished, _ = wait(self.tasks, return_when=FIRST_COMPLETED)
                for future in finished:
                    worker, keys = self.tasks.pop(future)
                    try:
                        result = worker.result(future)
                    except WorkerDiedError as error:
                        yield from self._replace(worker, keys, str(error))
                        continue
                    self.n_failed_starts = 0
                    if keys:
                        yield from self._collect(keys, *result)
                    self._assign(worker)
            yield from self._run_isolated()
        finally:
            for worker in self.workers:
                worker.stop()

    def _start_worker(self) -> Worker:
        worker = self.start()
        self.workers.append(worker)
        self.tasks[worker.ready] = worker, ()
        return worker

    def _stop_worker(self, worker: Worker) -> None:
        self.workers.remove(worker)
        worker.stop()

    def _assign(self, worker: Worker) -> None:
        """Give the next fields to a worker, or those that failed once, or end it."""
        keys: list[Key] = []
        while self.next_key is not None and len(keys) < self.fields_per_task:
            keys.append(self.next_key)
            self.next_key = next(self.keys, None)
        attempt = 1 if keys else TRIES
        if not keys:
            keys, self.again = self.again[: self.fields_per_task], self.again[self.fields_per_task :]
        if keys:
            self.n_left -= len(keys)
            self.tasks[worker.submit(keys, attempt)] = worker, keys
        else:
            self._stop_worker(worker)

    def _collect(self, keys: Sequence[Key], results: list[FieldResult], seconds: float) -> Iterator[FieldResult]:
        self.again += [result.key for result in results if not result.final]
        per_task = int(TASK_SECONDS * len(keys) / max(seconds, 1e-3))
        share = math.ceil(self.n_left / (2 * self.n_workers))  # smaller tasks at the end, so that all end together
        self.fields_per_task = max(1, min(per_task, share, MAX_FIELDS_PER_TASK))
        yield from results

    def _replace(self, worker: Worker, keys: Sequence[Key], reason: str) -> Iterator[FieldResult]:
        """Start another worker in place of one that died; its unfinished fields are tried again at the end."""
        self._stop_worker(worker)
        if not keys:
            self._count_failed_start(reason)
        done = self.ledger.done({key[0] for key in keys})
        for key in keys:
            if key in done:
                yield FieldResult(key, done[key])
            else:
                self.suspects.append(key)
                yield FieldResult(key, reason=f"{reason}; it is tried again in an isolated process.", final=False)
        if self.next_key is not None or self.again:
            self._start_worker()

    def _run_isolated(self) -> Iterator[FieldResult]:
        """Embed the fields of workers that died, one by one; one that kills its worker again has failed."""
        for worker in self.workers.copy():
            self._stop_worker(worker)
        for key in self.suspects:
            worker = self.workers[0] if self.workers else self._start_isolated()
            try:
                results, _ = worker.result(worker.submit([key], TRIES))
                yield from results
            except WorkerDiedError as error:
                self._stop_worker(worker)
                reason = f"Field {self.embedder.field_name(key)[1]}: {error} while it was embedded, twice."
                self.ledger.add_failure(key, Failure(*self.embedder.field_name(key), reason))
                yield FieldResult(key, reason=reason)

    def _start_isolated(self) -> Worker:
        while True:
            worker = self._start_worker()
            try:
                worker.result(worker.ready)
                return worker
            except WorkerDiedError as error:
                self._stop_worker(worker)
                self._count_failed_start(str(error))

    def _count_failed_start(self, reason: str) -> None:
        self.n_failed_starts += 1
        if self.n_failed_starts >= max(MAX_FAILED_STARTS, self.n_workers):
            raise InputError(
                f"Workers end before they have embedded anything ({reason}). Reduce --workers, or omit it to see why."
            )


class _Process(SpawnProcess):
    def start(self) -> None:
        """Start without running the caller's script again, as a script without ``if __name__ == "__main__"`` would."""
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            super().start()
        finally:
            sys.modules["__main__"] = main


class _Context(SpawnContext):
    """Spawns processes (forks hang once OpenMP or Zarr have started threads), and keeps the last one."""

    process: _Process | None = None

    def Process(self, *args: Any, **kwargs: Any) -> _Process:
        self.process = _Process(*args, **kwargs)
        return self.process


_embedder: Embedder | None = None  # of a worker process


def _start_process(job: bytes, device: str, threads: int) -> None:
    """Initialise a worker process."""
    global _embedder
    _embedder = Embedder(job, device, threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    parent = parent_process()

    def end_with_parent() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:  # a killed run must not continue in the background
        threading.Thread(target=end_with_parent, name="cellvim-parent-watch", daemon=True).start()


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_embedder, method)(*arguments)


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in signal.Signals._value2member_map_ else str(-code)
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its worker was killed ({name}{hint})"
    return f"its worker ended with exit code {code}"
