"""Run checks and measurements in child processes: a crash or a hang costs one row, and the next row continues.

An illegal memory access makes the CUDA context of a process unusable, so every group of rows has its own process. When
it dies, the row that it was working on is recorded as crashed, and a new process continues with the next row. Rows are
appended to a file of JSON lines as they are measured; a repeated run skips the rows that the file contains.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
UNUSABLE = 70  # exit code of a child process whose CUDA context no longer works
_EVENTS = "CELLVIM_BENCHMARK_EVENTS"  # environment variable: the file descriptor that a child process writes events to


@dataclass(frozen=True)
class Task:
    """A named part of a group. ``run`` yields rows: dicts with at least ``what``."""

    group: str
    what: str
    run: Callable[[], Iterable[dict]]


def run_tasks(tasks: Sequence[Task], is_usable: Callable[[], bool] = lambda: True) -> None:
    """Run tasks in this (child) process and report each event to the parent process as a line of JSON.

    Parameters
    ----------
    tasks
        The tasks of one group.
    is_usable
        Called after a task raised an exception. If False, the process exits with `UNUSABLE`, and the parent process
        starts another one for the remaining tasks.
    """
    events = os.fdopen(int(os.environ.pop(_EVENTS)), "w", buffering=1)

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")

    for task in tasks:
        send(begin=task.what)
        try:
            for row in task.run():
                send(row=row)
        except Exception as error:  # any failure of a row is a result
            message = next(iter(str(error).splitlines()), "")
            send(row={"what": task.what, "failed": True, "note": f"failed: {type(error).__name__}: {message}"[:500]})
            if not is_usable():
                send(end=task.what)
                os._exit(UNUSABLE)
        send(end=task.what)


def supervise(
    command: Sequence[str],
    tasks: Sequence[tuple[str, str]],
    indices: range,
    *,
    seconds: float,
    seconds_per_task: float | None = None,
) -> Iterator[tuple[int, dict | None]]:
    """Run tasks in child processes, one for each run of tasks of the same group, and yield their rows.

    Parameters
    ----------
    command
        Command of the child process. It is called with two more arguments, the indices of the first task and one past
        the last task, and calls `run_tasks` with these tasks.
    tasks
        (group, what) of every task, in order.
    indices
        The tasks to run.
    seconds
        Time limit for everything. Afterwards the process group of the child is killed, and the remaining tasks are left
        out.
    seconds_per_task
        Time limit for each task, None for no limit.

    Yields
    ------
    index : int
        Index of the task.
    row : dict or None
        ``what`` and the results; ``failed`` is True for a row that failed, crashed or exceeded its time limit. None
        when the task is finished.
    """
    deadline = time.monotonic() + seconds
    first = indices.start
    while first < indices.stop and time.monotonic() < deadline:
        group = tasks[first][0]
        last = next((i for i in range(first, indices.stop) if tasks[i][0] != group), indices.stop)
        begun = first
        for event in _events([*command, str(first), str(last)], deadline, seconds_per_task):
            if "row" in event:
                yield first, event["row"]
            elif "end" in event:
                yield first, None
                first += 1
            elif event.get("died") and first < last:
                note = f"{event['died']}; the next row runs in a new process"
                yield first, {"what": tasks[first][1], "failed": True, "note": note}
                yield first, None
                first += 1
        if first == begun:
            raise RuntimeError(f"The process for '{group}' ended without running anything.")


def record(
    command: Sequence[str],
    tasks: Sequence[tuple[str, str]],
    output: Path,
    *,
    seconds: float,
    seconds_per_task: float | None = None,
    say: Callable[[str, dict], None] = lambda group, row: None,
) -> list[dict]:
    """Run the tasks that ``output`` does not contain yet, append their rows to it, and return all of its rows.

    Parameters
    ----------
    command, tasks, seconds, seconds_per_task
        As for `supervise`; the command receives indices into ``tasks``.
    output
        File of JSON lines. Each row has its ``group``. A line with ``finished`` marks a finished task.
    say
        Called with the group and each new row.
    """
    finished = {tuple(row["finished"]) for row in read_rows(output) if "finished" in row}
    first = 0
    end = time.monotonic() + seconds
    while first < len(tasks):
        if tasks[first] in finished:
            first += 1
            continue
        last = next((i for i in range(first, len(tasks)) if tasks[i] in finished), len(tasks))
        left = end - time.monotonic()
        for index, row in supervise(
            command, tasks, range(first, last), seconds=left, seconds_per_task=seconds_per_task
        ):
            group, what = tasks[index]
            if row is None:
                append_row(output, {"finished": [group, what]})
            else:
                append_row(output, {"group": group} | row)
                say(group, row)
        first = last
    return [row for row in read_rows(output) if "finished" not in row]


def _events(command: Sequence[str], deadline: float, seconds_per_task: float | None) -> Iterator[dict]:
    """Yield the events of a child process, and at its end one event ``died``: how it ended, or None if it was done."""
    reading, writing = os.pipe()
    environment = os.environ | {_EVENTS: str(writing)}
    reason, pending, limit = None, b"", deadline
    child = subprocess.Popen(command, cwd=REPOSITORY, env=environment, pass_fds=(writing,), start_new_session=True)
    os.close(writing)
    try:
        while True:
            if not select.select([reading], [], [], max(0.0, limit - time.monotonic()))[0]:
                reason = "stopped: its time limit was reached"
                break
            content = os.read(reading, 1 << 16)
            if not content:
                break
            *lines, pending = (pending + content).split(b"\n")
            for line in lines:
                event = json.loads(line)
                if "begin" in event and seconds_per_task is not None:
                    limit = min(deadline, time.monotonic() + seconds_per_task)
                yield event
        if reason is None:
            child.wait(max(1.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        reason = "stopped: its process did not end"
    finally:
        if child.returncode is None:
            kill_process_group(child)
            child.wait()
        os.close(reading)
    if reason is None and child.returncode not in (0, UNUSABLE):
        code = -child.returncode
        how = f"was killed by {signal.Signals(code).name}" if code in set(signal.Signals) else f"exited with {-code}"
        reason = f"crashed: its process {how}"
    yield {"died": reason}


def kill_process_group(child: subprocess.Popen) -> None:
    """Kill a child process that leads a session, and everything it started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def append_row(output: Path, row: dict) -> None:
    """Append one JSON line to a file, on disk before this returns."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(output: Path) -> list[dict]:
    """Return the complete rows of a file of JSON lines; empty if it does not exist."""
    rows = []
    if output.is_file():
        for line in output.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:  # the run was killed while it wrote this line
                continue
    return rows
