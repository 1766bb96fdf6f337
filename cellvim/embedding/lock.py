"""One at a time: a lock in the ledger, held by a session, and worth nothing once that session is dead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cellvim.embedding.sessions import Session, read_sessions
from cellvim.files import Storage

LOCK = "lock"


@contextmanager
def locked(storage: Storage, session: Session) -> Iterator[bool]:
    """Hold the lock within the block; yields False where another session that is alive holds it.

    Where an object store cannot promise that only one gets it, several may: what is done under it must be the same
    bytes whoever does it.
    """
    held = _take(storage, session)
    try:
        yield held
    finally:
        if held and storage.read(LOCK) == session.id.encode():
            storage.remove(LOCK)


def _take(storage: Storage, session: Session) -> bool:
    for _ in range(3):
        if storage.create(LOCK, session.id.encode()):
            return True
        holder = (storage.read(LOCK) or b"").decode()
        alive = [s for s in read_sessions(storage) if s["alive"] and s["id"] == holder]
        if alive:
            return False
        storage.remove_if_equal(LOCK, holder.encode())  # of one that was killed; only one of several succeeds in this
    return False
