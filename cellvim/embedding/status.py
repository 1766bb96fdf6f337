"""Progress of a run: from its ledger while it runs or is interrupted, from its manifest when it is finished."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cellvim.embedding.ledger import Ledger, check_ours, ledger_storage, read_run, read_sessions
from cellvim.embedding.output import manifest_name, read_manifest
from cellvim.errors import InputError
from cellvim.files import is_url

_SHOWN = ("host", "pid", "command", "shard", "started", "state", "alive", "fields", "rows", "failed", "seconds")


def read_status(output: str | Path) -> dict[str, Any]:
    """Return the progress of the run that writes ``output``.

    Returns
    -------
    dict
        ``state``: running, stopped, waiting (for shards that have not been run) or done;
        ``fields``, ``done``, ``failed``, ``rows``, and the same per plate in ``plates``;
        ``failures``; ``sessions``; ``seconds_left`` if a session is running.

    Raises
    ------
    InputError
        There is neither a ledger nor a manifest.
    """
    storage = ledger_storage(output)
    run = None
    if storage.exists():
        check_ours(storage)
        run = read_run(storage)
    if run is None:
        return _of_manifest(output)
    ledger = Ledger(storage, run["identity"])
    sessions = [{k: s[k] for k in _SHOWN} for s in read_sessions(storage)]
    failures = ledger.failures()
    plates = []
    for number, (_, plate) in enumerate(sorted(run["identity"]["plates"].items())):
        done = ledger.done([number])
        failed = sum(1 for key in failures if key[0] == number and key not in done)
        total = plate["fields"]["count"]
        plates.append(
            {"name": plate["name"], "fields": total, "done": len(done), "failed": failed, "rows": sum(done.values())}
        )
    sums = {name: sum(plate[name] for plate in plates) for name in ("fields", "done", "failed", "rows")}
    alive = [s for s in sessions if s["alive"]]
    left = sums["fields"] - sums["done"] - sums["failed"]
    rate = sum(s["fields"] / s["seconds"] for s in alive if s["seconds"] and s["fields"])
    return {
        "output": str(output),
        "state": "running" if alive else "waiting" if left and _shards_have_finished(sessions) else "stopped",
        **sums,
        "seconds_left": round(left / rate) if rate else None,
        "plates": plates,
        "failures": [vars(f) for f in failures.values()],
        "sessions": sessions,
    }


def outputs_of(output: str | Path) -> list[str | Path]:
    """Return the outputs in a folder written by ``cellvim embed --per-plate``; else the output itself."""
    folder = Path(output)
    if is_url(output) or not folder.is_dir() or ledger_storage(output).exists() or read_manifest(output) is not None:
        return [output]
    ends = (".partial", ".manifest.json")
    names = {p.name.removesuffix(end) for p in folder.iterdir() for end in ends if p.name.endswith(end)}
    return [folder / name for name in sorted(names)] or [output]


def describe(status: dict[str, Any]) -> str:
    """Return the result of `read_status` as text."""
    share = 100 * status["done"] / status["fields"] if status["fields"] else 100.0
    left = status["fields"] - status["done"] - status["failed"]
    what = {
        "waiting": f"is waiting for other shards, which have {_fields(left)} left",
        "running": "is running",
        "stopped": "was stopped; the same command resumes it",
        "done": "is done",
    }[status["state"]]
    lines = [
        f"{status['output']} {what}",
        f"{'fields':<9} {status['done']:,} of {status['fields']:,} done ({share:.1f} %), {status['failed']:,} failed",
        f"{'rows':<9} {status['rows']:,}",
    ]
    if status.get("seconds_left") is not None:
        lines.append(f"{'left':<9} about {_duration(status['seconds_left'])}")
    plates = status.get("plates", [])
    if len(plates) > 1:
        lines += [
            f"{'plate':<9} {p['name']}: {p['done']:,} of {p['fields']:,}, {p['rows']:,} rows" for p in plates[:50]
        ]
        if len(plates) > 50:
            lines.append(f"{'':<9} and {len(plates) - 50} more plates")
    for session in status["sessions"]:
        shard = f", shard {session['shard']}" if session["shard"] else ""
        rate = session["fields"] / session["seconds"] if session["seconds"] else 0.0
        lines.append(
            f"{'session':<9} {session['state']}: process {session['pid']} on {session['host']}{shard}, since "
            f"{_local(session['started'])}, {_fields(session['fields'])} in {_duration(session['seconds'])} "
            f"({rate:.2f} fields/s)"
        )
    for failure in status["failures"][:20]:
        lines.append(f"{'failed':<9} {failure['plate']} {failure['field']}: {failure['reason']}")
    if len(status["failures"]) > 20:
        lines.append(f"{'':<9} and {len(status['failures']) - 20} more")
    return "\n".join(lines)


def _shards_have_finished(sessions: list[dict[str, Any]]) -> bool:
    """Return whether every shard that was started has finished, so that the rest belongs to the other shards."""
    last = {s["shard"]: s["state"] for s in sorted(sessions, key=lambda s: s["started"])}
    return bool(last) and None not in last and set(last.values()) == {"finished"}


def _fields(n: int) -> str:
    return f"{n:,} field{'s' * (n != 1)}"


def _of_manifest(output: str | Path) -> dict[str, Any]:
    manifest = read_manifest(output)
    if manifest is None:
        raise InputError(
            f"There is no run for {output}: neither the ledger of an unfinished run ({output}.partial) nor the "
            f"manifest of a finished one ({manifest_name(output)}) exists."
        )
    failed = [f for f in manifest["failed"] if f["tries"]]  # without wells that have no fields
    return {
        "output": str(output),
        "state": "done",
        "fields": manifest["fields"],
        "done": manifest["fields"] - len(failed),
        "failed": len(failed),
        "rows": manifest["rows"],
        "plates": [],
        "failures": manifest["failed"],
        "sessions": [{k: s.get(k) for k in _SHOWN} for s in manifest["sessions"]],
    }


def _duration(seconds: float) -> str:
    seconds = round(seconds)
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 7200:
        return f"{seconds // 60} min"
    return f"{seconds / 3600:.1f} h"


def _local(stamp: str) -> str:
    return datetime.fromisoformat(stamp).astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
