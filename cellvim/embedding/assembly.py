"""The end of a run: every field is settled, and their rows become the output, whoever of several is the last.

Until the output has its name, and its manifest beside it, the ledger stays; a run that is killed in between does this
part again, to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from cellvim.anndata_io import check_output
from cellvim.embedding.export import PlateRows, write_embeddings
from cellvim.embedding.ledger import MARKER, DamagedError, Failure, Key, Ledger, Rows, ledger_storage, read_run
from cellvim.embedding.lock import locked
from cellvim.embedding.manifest import (
    failures_name,
    log_name,
    make_manifest,
    manifest_name,
    read_manifest,
)
from cellvim.embedding.provenance import field_table, provenance
from cellvim.embedding.sessions import Session, read_log, read_sessions
from cellvim.embedding.token_maps import check_token_maps, write_token_maps
from cellvim.files import check_folder_writable, exists, is_url, remove, write_atomic

if TYPE_CHECKING:
    from cellvim.embedding.plan import EmbeddingPlan

NAMING = "naming"  # in the ledger: the output is being given its name, and what bears it is this job's
MAPS = "naming-maps"  # the same of maps of tokens, which get theirs before


def check_free(output: str | Path, *, overwrite: bool, maps_of: Sequence[str] = ()) -> bool:
    """Check that an output may be written, and return whether it may replace one that exists.

    Parameters
    ----------
    output
        What is to be written.
    overwrite
        Whatever exists may be replaced, if it is of its kind.
    maps_of
        Names of the plates whose maps of tokens are to be written beside it.

    Raises
    ------
    InputError
        Maps of tokens are wanted beside a URL.
    OutputError
        It exists and ``overwrite`` is off, or it is something else than embeddings; or so do maps of tokens. Or its
        folder cannot be written.
    """
    if not is_url(output):
        check_folder_writable(Path(output).absolute().parent)
    storage = ledger_storage(output)
    before = None if overwrite else read_run(storage)
    replaces = overwrite or bool(before and (before.get("replaces") or storage.read(NAMING) is not None))
    check_output(output, overwrite=replaces)
    if maps_of:
        check_token_maps(output, maps_of, overwrite=replaces or storage.read(MAPS) is not None)
    return replaces


def finished_before(output: str | Path, digest: str, *, shard: bool) -> dict[str, Any] | None:
    """Return the manifest of an output that this very job has made already; None where it has not.

    A run that was killed while it cleared up, or another shard that did the last part, leaves such an output.
    """
    manifest = read_manifest(output)
    if manifest is None or manifest.get("digest") != digest or not exists(output):
        return None
    storage = ledger_storage(output)
    if not storage.exists():
        return manifest if shard else None
    run = read_run(storage)
    return manifest if run is None or run.get("run") == manifest.get("run") else None


def was_being_cleared(output: str | Path) -> bool:
    """Return whether a run was killed while it cleared up behind an output that was whole.

    Whether that output is of the job at hand is then known once there is a plan (`finished_before`).
    """
    storage = ledger_storage(output)
    is_left = storage.exists() and read_run(storage) is None
    return is_left and exists(output) and read_manifest(output) is not None


def assemble(
    plan: EmbeddingPlan,
    ledger: Ledger,
    session: Session,
    output: str | Path,
    failures: Sequence[Failure],
    *,
    format: str,
    spatialdata: bool,
    log: bool,
) -> list[Key] | None:
    """Put all rows together and give the output its name, unless another session is at it.

    Returns
    -------
    list of keys, or None
        Fields whose rows turned out to be damaged, and were removed: they are to be embedded again.

    Raises
    ------
    OutputError
        The output cannot be written.
    """
    with locked(ledger.storage, session) as held:
        if not held:
            session.log("left", reason="another session puts the rows together")
            return None
        session.log("assemble")
        damaged: list[Key] = []
        try:
            rows = _write(plan, ledger, session, output, failures, format, spatialdata, damaged)
        except DamagedError as error:
            for key in damaged:
                plate, field = plan.field_name(key)
                session.log("damaged", plate=plate, field=field, reason=str(error))
            return damaged
        session.log("assembled", rows=rows)
        _write_beside(plan, ledger, session, output, failures, format, rows, log)
        return None


def clear(ledger: Ledger) -> None:
    """Remove the ledger: the output is whole and has its manifest."""
    ledger.storage.remove_all(MARKER)


def failures_of(plan: EmbeddingPlan, failed: Sequence[Failure]) -> list[Failure]:
    """Return fields that failed, and with them wells that the plates list and have no field of."""
    lost = [
        Failure(plate.name, well, f"Well {well} is listed by the plate, but has no field.", 0)
        for plate in plan.plates
        for well in plate.lost_wells
    ]
    return [*lost, *failed]


def _write(plan, ledger, session, output, failures, format, spatialdata, damaged: list[Key]) -> int:
    storage = ledger.storage
    run = read_run(storage) or {}
    uns = provenance(plan, [(f.plate, f.field, f.reason) for f in failures], spatialdata=spatialdata)
    workplace = None
    if storage.path is not None:
        for left in storage.path.glob("whole-*"):  # of a session that was killed
            remove(left)
        workplace = storage.path / f"whole-{session.id}"
        workplace.mkdir()

    def naming() -> None:
        if plan.tokens:
            replaces = bool(run.get("replaces")) or named_before or storage.read(MAPS) is not None
            check_token_maps(output, [plate.name for plate in plan.plates], overwrite=replaces)
            storage.write(MAPS, b"")  # from here on they are ours, also for the session that goes on after a kill
            write_token_maps(plan, ledger, output, lambda key, n: _load(ledger, key, n, damaged), overwrite=True)
        storage.write(NAMING, b"")

    named_before = storage.read(NAMING) is not None
    return write_embeddings(
        output,
        [_opener(plan, ledger, number, spatialdata, damaged) for number in range(len(plan.plates))],
        plan.n_features,
        uns,
        format=format,
        workplace=workplace,
        overwrite=bool(run.get("replaces")) or named_before,
        before_naming=naming,
    )


def _opener(
    plan: EmbeddingPlan, ledger: Ledger, number: int, spatialdata: bool, damaged: list[Key]
) -> Callable[[], PlateRows]:
    """Return what opens the rows of one plate; its fields' table is made anew each time, and kept by nobody."""

    def open_rows() -> PlateRows:
        plate = plan.plates[number]
        counts = {key[1]: n for key, n in ledger.done([number]).items()}

        def load(field: int) -> Rows:
            return _load(ledger, (number, field), counts[field], damaged)

        rows = PlateRows(field_table(plate, regions=spatialdata), counts, load)
        if len(plan.plates) > 1:
            plate.close()
        return rows

    return open_rows


def _load(ledger: Ledger, key: Key, n_rows: int, damaged: list[Key]) -> Rows:
    """Return a field's rows; where they are damaged remove them, note the field and raise `DamagedError`."""
    try:
        return ledger.load(key, n_rows)
    except DamagedError:
        ledger.forget(key, n_rows)
        damaged.append(key)
        raise


def _write_beside(plan, ledger, session, output, failures, format, rows: int, log: bool) -> None:
    storage = ledger.storage
    session.write("finished")
    sessions = [s for s in read_sessions(storage) if s["fields"] or s["failed"] or s["id"] == session.id]
    manifest = make_manifest(
        output, ledger.identity, ledger.digest, sessions, failures, format=format, n_rows=rows, n_fields=plan.n_fields
    )
    manifest = {"run": (read_run(storage) or {}).get("run"), **manifest}
    table = pd.DataFrame([asdict(f) for f in failures]).to_csv(index=False) if failures else None
    remove(failures_name(output)) if table is None else write_atomic(failures_name(output), table)
    if log:
        write_atomic(log_name(output), "".join(f"{line}\n" for line in read_log(storage)))
    write_atomic(manifest_name(output), json.dumps(manifest, indent=1, default=str) + "\n")
