"""What is left to do of a job, and an account of what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cellvim.embedding.ledger import Key, Ledger

if TYPE_CHECKING:
    from cellvim.embedding.sessions import Session
    from cellvim.embedding.workers import Done


class FieldsLeft:
    """The fields that are left to do: iterated over once, plate by plate, so that few are in memory."""

    def __init__(self, plan: Any, ledger: Ledger, stretch: range | None, again: Sequence[Key] | None) -> None:
        self.plan, self.ledger = plan, ledger
        self.again, self.stretch = again, stretch
        self.n_fields = self.n_done = self.n_rows = 0
        for number, keys in self._by_plate():
            done = ledger.done([number])
            mine = [done[key] for key in keys if key in done]
            self.n_fields += len(keys)
            self.n_done += len(mine)
            self.n_rows += sum(mine)
        failed = ledger.failures()
        own = set(plan.all_keys(stretch)) if failed else set()
        ledger.forgive(key for key in failed if key in own)  # tried again; those of other shards are theirs

    def _by_plate(self) -> Iterator[tuple[int, list[Key]]]:
        if self.again is not None:
            keys = sorted(self.again)
            for number in sorted({key[0] for key in keys}):
                yield number, [key for key in keys if key[0] == number]
            return
        first = 0
        for number, plate in enumerate(self.plan.plates):
            within = range(first, first + plate.n_fields)
            first = within.stop
            own = within
            if self.stretch is not None:
                own = range(max(within.start, self.stretch.start), min(within.stop, self.stretch.stop))
            yield number, [(number, i - within.start) for i in own]

    def __iter__(self) -> Iterator[Key]:
        for number, keys in self._by_plate():
            done = self.ledger.done([number])
            yield from (key for key in keys if key not in done)


class Account:
    """Keeps account of what becomes of fields: for the session, the log, the summary and the progress bar."""

    def __init__(
        self,
        session: Session,
        summary: Any,
        left: FieldsLeft,
        progress: Callable[[int, int, int], None] | None,
    ) -> None:
        self.session, self.progress = session, progress
        self.n_done, self.n_fields, self.n_rows = left.n_done, left.n_fields, left.n_rows
        self.plan = left.plan
        summary.n_resumed = summary.n_resumed or left.n_done
        self._show()

    def __call__(self, done: Done) -> None:
        plate, field = self.plan.field_name(done.key)
        if done.reason is None:
            self.session.log("done", plate=plate, field=field, rows=done.rows)
            self.session.count(fields=1, rows=done.rows)
        else:
            self.session.log("failed" if done.final else "retry", plate=plate, field=field, reason=done.reason)
            self.session.count(failed=int(done.final))
        if done.final:
            self.n_done += 1
            self.n_rows += done.rows
            self._show()

    def _show(self) -> None:
        if self.progress is not None:
            self.progress(self.n_done, self.n_fields, self.n_rows)
