"""Rows in child processes: a process that really dies or hangs costs one row."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks import isolation

CHILD = """
import os, signal, subprocess, sys, time
from benchmarks.isolation import Task, run_tasks

def works(name):
    return lambda: [{"what": name, "value": 1}]

def segfaults():
    yield {"what": "before the crash", "value": 2}
    os.kill(os.getpid(), signal.SIGSEGV)

def hangs():
    subprocess.Popen(["sleep", "61.5"])
    time.sleep(60)

def fails():
    raise RuntimeError("CUDA error: an illegal memory access")

tasks = [
    Task("a", "one", works("one")), Task("a", "segfaults", segfaults), Task("a", "three", works("three")),
    Task("b", "fails", fails), Task("b", "five", works("five")), Task("b", "hangs", hangs),
    Task("c", "seven", works("seven")),
]
print("library output")
run_tasks(tasks[int(sys.argv[1]) : int(sys.argv[2])], is_usable=lambda: False)
"""
TASKS = [
    ("a", "one"),
    ("a", "segfaults"),
    ("a", "three"),
    ("b", "fails"),
    ("b", "five"),
    ("b", "hangs"),
    ("c", "seven"),
]


def is_running(path: Path, command: bytes) -> bool:
    try:
        return path.read_bytes() == command
    except OSError:  # the process ended in the meantime
        return False


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "child.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(isolation.REPOSITORY)!r})\n{CHILD}")
    return [sys.executable, str(script)]


def test_a_crash_and_a_hang_cost_one_row_each(command, tmp_path):
    output = tmp_path / "rows.jsonl"
    rows = isolation.record(command, TASKS, output, seconds=60, seconds_per_task=2)
    assert [(row["group"], row["what"], bool(row.get("failed"))) for row in rows] == [
        ("a", "one", False),
        ("a", "before the crash", False),
        ("a", "segfaults", True),
        ("a", "three", False),
        ("b", "fails", True),
        ("b", "five", False),
        ("b", "hangs", True),
        ("c", "seven", False),
    ]
    notes = {row["what"]: row.get("note", "") for row in rows}
    assert "SIGSEGV" in notes["segfaults"]
    assert "illegal memory access" in notes["fails"]
    assert "time limit" in notes["hangs"]


def test_a_run_that_is_repeated_continues_after_the_last_finished_task(command, tmp_path):
    output = tmp_path / "rows.jsonl"
    isolation.append_row(output, {"group": "a", "what": "one", "value": "earlier"})
    for done in (TASKS[0], TASKS[1], TASKS[5]):
        isolation.append_row(output, {"finished": list(done)})
    rows = isolation.record(command, TASKS, output, seconds=60)
    assert [row["what"] for row in rows] == ["one", "three", "fails", "five", "seven"]
    assert rows[0]["value"] == "earlier"
    assert isolation.record(command, TASKS, output, seconds=60) == rows


def test_after_the_time_limit_the_process_group_is_gone(command, tmp_path):
    start = time.monotonic()
    rows = isolation.record(command, TASKS, tmp_path / "rows.jsonl", seconds=4)
    assert time.monotonic() - start < 20
    assert rows[-1]["what"] == "hangs" and "time limit" in rows[-1]["note"]
    assert not any(row["what"] == "seven" for row in rows)
    assert not any(is_running(path, b"sleep\x0061.5\x00") for path in Path("/proc").glob("[0-9]*/cmdline"))


def test_incomplete_lines_are_skipped(tmp_path):
    output = tmp_path / "rows.jsonl"
    isolation.append_row(output, {"what": "a"})
    with open(output, "a") as file:
        file.write('{"what": "b", "val')
    assert isolation.read_rows(output) == [{"what": "a"}]
