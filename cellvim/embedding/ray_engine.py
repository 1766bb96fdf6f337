"""Working through fields on a Ray cluster: the loop of `cellvim.embedding.workers`, in actors.

Rows go from the actors straight into the ledger; only what became of each field comes back.
"""

from __future__ import annotations

import os
import pickle
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

from cellvim.embedding.ledger import Failure, Key, Ledger
from cellvim.embedding.workers import MOST_DEATHS_AT_START, Done, Plan, work
from cellvim.errors import CellvimError, InputError

FIELDS_AT_ONCE = 8  # given to an actor: enough that reading one overlaps the embedding of another
LOCAL_STORE_BYTES = 200_000_000  # of the object store of a Ray that we start; the rows do not go through it


def work_on_ray(
    plan: Plan, ledger: Ledger, keys: Iterable[Key], *, workers: int, address: str | None = None
) -> Iterator[Done]:
    """Do what `work` does, in actors of a Ray cluster.

    Parameters
    ----------
    plan, ledger, keys
        As in `work`. The ledger must lie where every node can reach it.
    workers
        How many actors.
    address
        Of the cluster, or "auto"; None starts Ray on this machine, unless it runs in this process already.

    Raises
    ------
    InputError
        Ray is not installed, or there is no such cluster.
    CellvimError
        An actor met what concerns all: the disk is full, or actors die before they have done anything.
    """
    ray = _ray()
    ours = not ray.is_initialized()
    if ours:
        _start(ray, address)
    try:
        yield from _Cast(ray, plan, ledger, keys, workers).run()
    finally:
        if ours:
            ray.shutdown()


class _Cast:
    """The actors, and the fields that each has in hand."""

    def __init__(self, ray: Any, plan: Plan, ledger: Ledger, keys: Iterable[Key], size: int) -> None:
        self.ray, self.plan, self.ledger, self.size = ray, plan, ledger, size
        self.keys = iter(keys)
        self.suspects: deque[Key] = deque()  # in hand when an actor died
        self.calls: dict[Any, tuple[Any, list[Key], bool]] = {}  # result to come -> actor, fields, alone
        self.deaths_at_start = 0
        device = getattr(plan, "device", "cpu")
        on_gpu = device.startswith("cuda")  # Ray shows each actor its own GPU, as the first
        options: dict[str, Any] = {"num_cpus": 1, "max_restarts": 0, "max_task_retries": 0}
        self.actor = ray.remote(**options | ({"num_gpus": 1} if on_gpu else {}))(_Worker)
        self.settings = {"device": "cuda" if on_gpu else device, "folder": os.getcwd(), "threads": 1}
        self.job = ray.put(pickle.dumps((plan.on("cpu"), ledger)))

    def run(self) -> Iterator[Done]:
        """Yield what becomes of the fields."""
        for _ in range(self.size):
            if not self._give(self._new_actor()):
                break
        while self.calls:
            ready, _ = self.ray.wait(list(self.calls), num_returns=1)
            actor, keys, alone = self.calls.pop(ready[0])
            try:
                results = self.ray.get(ready[0])
            except self.ray.exceptions.RayActorError as error:
                yield from self._died(keys, alone, error)
                continue
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, CellvimError) else error from None
            self.deaths_at_start = 0
            yield from results
            if alone or not self._give(actor):
                self.ray.kill(actor)
            self._look_at_suspects()

    def _new_actor(self) -> Any:
        return self.actor.remote(self.job, self.settings)

    def _give(self, actor: Any) -> bool:
        keys = list(islice(self.keys, FIELDS_AT_ONCE))
        if keys:
            self.calls[actor.embed.remote(keys)] = (actor, keys, False)
        return bool(keys)

    def _look_at_suspects(self) -> None:
        if self.suspects and not any(alone for _, _, alone in self.calls.values()):
            key = self.suspects.popleft()
            actor = self._new_actor()
            self.calls[actor.embed.remote([key])] = (actor, [key], True)

    def _died(self, keys: list[Key], alone: bool, error: Exception) -> Iterator[Done]:
        done = self.ledger.done({key[0] for key in keys})
        for key in keys:
            if key in done:
                yield Done(key, done[key])
            elif alone:
                reason = f"Field {self.plan.field_name(key)[1]}: its actor died while it was embedded, twice."
                self.ledger.fail(key, Failure(*self.plan.field_name(key), reason))
                yield Done(key, reason=reason)
            else:
                self.suspects.append(key)
                yield Done(key, reason="its actor died; it is tried again in one of its own.", final=False)
        self.deaths_at_start += not any(key in done for key in keys)
        if self.deaths_at_start > MOST_DEATHS_AT_START * (1 + self.size):
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"Ray's actors end before they have done anything: {reason}")
        self._look_at_suspects()
        if not alone:
            self._give(self._new_actor())


class _Worker:
    """An actor: keeps the model, and works through the fields that it is given."""

    def __init__(self, job: bytes, settings: dict[str, Any]) -> None:
        with suppress(OSError):  # paths of plates may be relative; on another node they must not be
            os.chdir(settings["folder"])
        plan, self.ledger = pickle.loads(job)
        self.plan = plan.on(settings["device"], threads=1)
        self.threads = settings["threads"]

    def embed(self, keys: list[Key]) -> list[Done]:
        """Embed fields and write their rows down."""
        return list(work(self.plan, self.ledger, keys, threads=self.threads))


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--engine ray needs Ray: pip install 'cellvim[ray]'.") from error
    return ray


def _start(ray: Any, address: str | None) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address is None:
        options |= {"include_dashboard": False, "object_store_memory": LOCAL_STORE_BYTES}
        if os.environ.get("RAY_ADDRESS"):  # the user's own way to name a cluster
            options = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address=address, **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"Ray cannot be reached at {address or 'this machine'}: {reason}") from error
