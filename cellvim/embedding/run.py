"""The main job: embed the cells, tiles or fields of plates into an AnnData.

Reads as it runs: plan → take up what is done already → embed the fields that are left, here or in workers → put all
rows together. A field is the unit of work: its rows depend on the plan and on its own pixels, never on who embeds it,
when, or after what. So the result is the same bytes whatever the workers, their order and the interruptions.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.embedding.account import Account, FieldsLeft
from cellvim.embedding.ledger import (
    MARKER,
    Failure,
    Key,
    Ledger,
    Rows,
    check_ours,
    identity_digest,
    ledger_storage,
    open_ledger,
    read_run,
)
from cellvim.embedding.options import EmbeddingOptions, Plates, RunOptions, Unit, split_options, with_options
from cellvim.embedding.plan import EmbeddingPlan, make_plan, plan_embedding, usable_device
from cellvim.embedding.provenance import untrained_remark
from cellvim.errors import FieldReadError, InputError, Interrupted, OutputError, listing, suggestion
from cellvim.files import check_folder_writable, is_url

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from cellvim.data.plate import Field
    from cellvim.embedding.workers import Done

ENGINES = ("processes", "ray")
EMBED_OPTIONS = {f.name for f in fields(EmbeddingOptions)} | {"workers", "overwrite"}  # of `embed`


@with_options(EmbeddingOptions, RunOptions, only=EMBED_OPTIONS)
def embed(plate: Plates, output: str | Path | None = None, **options: Any) -> AnnData:
    """Embed the cells, tiles or fields of plates into an AnnData.

    Parameters
    ----------
    plate
        An OME-Zarr plate: path or URL, or a plate opened with `open_plate`. A list of plates is embedded into one
        AnnData.
    output
        Path of the AnnData to write, .zarr or .h5ad. By default the result is only returned. If a run was interrupted,
        the same call resumes it.
    **options
        See `EmbeddingOptions` and `RunOptions`.

    Returns
    -------
    AnnData
        ``X`` (n, D) float32; ``obs`` with plate, well, site, object number, the columns of the plate map and
        measurements; ``obsm["spatial"]`` (x, y) within the field; ``uns["cellvim"]`` with everything needed to
        reproduce the run.

    Warns
    -----
    UserWarning
        The weights are untrained, a field could not be read, or no unit was found.

    Raises
    ------
    CellvimError
        An option, plate or model cannot be used.
    """
    import anndata

    from cellvim.anndata_io import format_of
    from cellvim.embedding.assembly import check_free

    embedding, run = split_options(options, EmbeddingOptions, RunOptions)
    if output is None and embedding.tokens:
        raise InputError("Token maps are written beside the output; tokens requires an output.")
    if output is not None:
        check_free(output, overwrite=run.overwrite)
        if format_of(output) == "parquet":
            raise InputError("cellvim.embed returns an AnnData; write Parquet with `cellvim embed`, or name a .zarr.")
    plan = make_plan(plate, embedding, cache=None if output is None else cache_folder(output))
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(output) if output is not None else Path(temporary) / "embeddings.zarr"
        summary = run_embedding(plan, target, overwrite=run.overwrite, workers=run.workers)
        for remark in summary.remarks():
            warnings.warn(remark, stacklevel=2)
        return anndata.read_h5ad(target) if format_of(target) == "h5ad" else anndata.read_zarr(target)


@dataclass
class EmbeddingSummary:
    """What a run of `run_embedding` did."""

    output: str | Path
    unit: Unit
    n_fields: int
    n_units: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = default(default_factory=list)  # name of the field, and why
    untrained: str | None = None  # what to say about the weights
    notes: Sequence[str] = ()  # what else to say about the plan
    n_resumed: int = 0  # fields that were done before
    n_waiting: int = 0  # fields that other shards have not done yet
    shard: str | None = None

    def __str__(self) -> str:
        rate = self.n_units / self.seconds if self.seconds else 0.0
        counts = ((self.n_units, self.unit), (self.n_fields - len(self.failed), "field"))
        units, fields = (f"{n:,} {name}{'s' * (n != 1)}" for n, name in counts)
        done = f"{units} from {fields} in {self.seconds:.1f} s ({rate:,.1f} {self.unit}s/s)"
        if self.n_waiting:
            left = (
                "1 field of other shards is"
                if self.n_waiting == 1
                else f"{self.n_waiting:,} fields of other shards are"
            )
            return f"Shard {self.shard}: {done}. {left} left for {self.output}"
        return f"{done} → {self.output}"

    def remarks(self) -> list[str]:
        """Return what the user must know about the result, a line each; empty if all is as it should be."""
        lines = [*([self.untrained] if self.untrained else []), *self.notes]
        if self.failed:
            names, are = listing(name for name, _ in self.failed), "is" if len(self.failed) == 1 else "are"
            lines.append(
                f"{len(self.failed)} of {self.n_fields} fields could not be read and {are} missing from the output: "
                f"{names}. First reason: {self.failed[0][1]} All reasons: {self.output}.failures.csv, and "
                'uns["cellvim"]["failed_fields"].'
            )
        if self.n_units == 0 and len(self.failed) < self.n_fields and not self.n_waiting:
            lines.append(
                f"No {self.unit} was found in any field, so the output has no rows. Is the right channel named DNA, "
                "and are the images in focus? Try `cellvim info`, or --unit tile."
            )
        return lines


def run_embedding(
    plan: EmbeddingPlan,
    output: str | Path,
    *,
    overwrite: bool = False,
    format: str | None = None,
    workers: int = 1,
    devices: Sequence[str] = (),
    engine: str = "processes",
    address: str | None = None,
    shard: str | None = None,
    spatialdata: bool = False,
    log: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> EmbeddingSummary:
    """Embed field by field and write the result; go on where an earlier run of the same plan was stopped.

    Parameters
    ----------
    plan
        From `plan_embedding`.
    output
        What to write; it gets its name only when it is whole. Until then rows are in ``<output>.partial``.
    overwrite
        Start anew, and replace ``output`` when it exists.
    format
        zarr, h5ad or parquet; by the output's suffix if None.
    workers, devices
        Processes, and the devices that they take in turn; one process is this one.
    engine, address
        "processes" of this machine, or "ray" and the address of its cluster.
    shard
        ``i/n``: embed only the i-th of n equal parts of the fields. Whichever shard is done last puts all together.
    spatialdata
        Add what SpatialData needs to know.
    log
        Keep the log beside the output.
    progress
        Called at the start and after each field with the fields done, the fields in all and the rows so far.

    Raises
    ------
    OutputError
        The output exists or cannot be written, or what lies beside it is not of this job.
    Interrupted
        Ctrl-C; what is done is kept.
    """
    from cellvim.anndata_io import format_of
    from cellvim.embedding.assembly import assemble, check_free, clear, failures_of, finished_before
    from cellvim.embedding.manifest import hardware, read_manifest, versions
    from cellvim.embedding.sessions import Session, killed_again
    from cellvim.embedding.shards import parse_shard

    start = time.perf_counter()
    _check_running(engine, workers, address, shard, overwrite)
    format = format_of(output, format)
    part = None if shard is None else parse_shard(shard)
    plan = plan if overwrite else _with_batch_size_of(read_run(ledger_storage(output)), plan)
    made = None if overwrite else finished_before(output, identity_digest(plan.identity), shard=part is not None)
    if made is not None and made.get("format", format) == format:
        return _summary_of(plan, output, made)
    maps_of = [one.name for one in plan.plates] if plan.tokens else ()
    replaces = check_free(output, overwrite=overwrite, maps_of=maps_of)
    form = {"format": format, "spatialdata": spatialdata}
    ledger = _ledger(plan, output, form, overwrite=overwrite, replaces=replaces)
    devices = [usable_device(d) for d in devices] or [plan.device]
    about = {"engine": engine, "workers": workers, "devices": devices, "batch_size": plan.batch_size}
    apart = killed_again(ledger.storage, part and str(part))
    about |= {"apart": apart}
    session = Session(ledger, shard=part and str(part), about=about | {"hardware": hardware(), "versions": versions()})
    summary = EmbeddingSummary(
        output, plan.unit, plan.n_fields, untrained=untrained_remark(plan), notes=plan.notes, shard=shard
    )
    state = "stopped"
    if apart:
        session.log("apart", reason="the last two sessions were killed: fields are embedded in a process of their own")
    try:
        stretch = None if part is None else part.stretch(plan.n_fields)
        again: list[Key] | None = None
        while True:
            left = FieldsLeft(plan, ledger, stretch, again)
            note = Account(session, summary, left, progress)
            for done in _engine(plan, ledger, left, engine, workers, devices, address, apart):
                note(done)
            if not _is_settled(plan, ledger, summary):
                if part is None:
                    raise RuntimeError(f"{summary.n_waiting} fields were given to no worker: a bug of the engine")
                summary.n_units, summary.n_fields = session.record["rows"], session.record["fields"]
                summary.failed = []
                break
            failures = failures_of(plan, list(ledger.failures().values()))
            options = {"format": format, "spatialdata": spatialdata, "log": log}
            again = assemble(plan, ledger, session, output, failures, **options)
            if not again:  # else rows turned out to be damaged
                break
        state = "finished"
    except KeyboardInterrupt as error:
        state = "interrupted"
        raise Interrupted(_interruption(plan, ledger, overwrite)) from error
    finally:
        session.close(state)
    if not summary.n_waiting and read_manifest(output) is not None:
        clear(ledger)
    summary.seconds = time.perf_counter() - start
    return summary


def embed_plates(
    plates: Sequence[str],
    output: str,
    planned: Mapping[str, Any],
    run: Mapping[str, Any],
    *,
    per_plate: bool,
    overwrite: bool,
    progress: Callable[[int, int, int], None] | None = None,
) -> Iterator[EmbeddingSummary]:
    """Plan and run the embedding of plates, into one output or, in a folder of that name, into one a plate.

    Parameters
    ----------
    plates
        Paths or URLs.
    output
        What to write, or with ``per_plate`` the folder.
    planned, run
        Options of `plan_embedding` and of `run_embedding`.
    per_plate
        One output a plate. Those that are there already, made by the same job, are left as they are.
    overwrite, progress
        As in `run_embedding`.

    Yields
    ------
    EmbeddingSummary
        One an output.
    """
    from cellvim.anndata_io import format_of
    from cellvim.embedding.assembly import check_free, finished_before, was_being_cleared
    from cellvim.embedding.shards import parse_shard
    from cellvim.embedding.token_maps import check_token_maps

    shard, tokens = run.get("shard"), bool(planned.get("tokens"))
    _check_running(run.get("engine", ENGINES[0]), run.get("workers", 1), run.get("address"), shard, overwrite)
    suffix = format_of("" if per_plate else output, run.get("format"))
    if shard is not None:
        parse_shard(shard)
    if not per_plate:
        # One plate's maps are named after the output alone; those of several wait until their names are known.
        maps_of = [""] if tokens and len(plates) == 1 else ()
        if not was_being_cleared(output):
            check_free(output, overwrite=overwrite or shard is not None, maps_of=maps_of)
        if tokens:
            check_token_maps(output, (), overwrite=overwrite)
        plan = plan_embedding(list(plates), **planned, cache=cache_folder(output))
        yield run_embedding(plan, output, **run, overwrite=overwrite, progress=progress)
        return
    if tokens:
        check_token_maps(output, (), overwrite=overwrite)
    if not is_url(output):
        check_folder_writable(output)
        try:
            Path(output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {output} cannot be made: {error.strerror}. Choose another.") from error
    if len(plates) > 1:
        _check_names(plates, EmbeddingOptions(**planned).view)
    for source in plates:
        plan = plan_embedding(source, **planned, cache=cache_folder(f"{output}/plates"))
        target = f"{output}/{plan.plates[0].name}.{suffix}"
        made = None if overwrite else finished_before(target, identity_digest(plan.identity), shard=True)
        if made is not None:
            yield _summary_of(plan, target, made)
            continue
        yield run_embedding(plan, target, **run, overwrite=overwrite, progress=progress)


def _check_names(plates: Sequence[str], view: Mapping[str, Any]) -> None:
    """Refuse plates of one name, whose outputs would be one, before the first is embedded."""
    from cellvim.data.plate import open_plate

    sources: dict[str, str] = {}
    for source in plates:
        name = open_plate(source, **view).name
        if name in sources:
            raise InputError(
                f"{sources[name]} and {source} are both called {name}, so their outputs would be one. Embed them into "
                "one output, where the folder is made part of the name, or apart."
            )
        sources[name] = source


def embed_field(plan: EmbeddingPlan, field: Field) -> tuple[np.ndarray, pd.DataFrame, np.ndarray]:
    """Embed the units of one field of the plan.

    Returns
    -------
    embeddings : np.ndarray
        (n, D) float32.
    objects : pd.DataFrame
        (n rows) number and measurements of each unit.
    spatial : np.ndarray
        (n, 2) position (x, y) within the field, in µm, or in pixels where the pixel size is unknown.

    Raises
    ------
    FieldReadError
        The field cannot be embedded.
    """
    key = next(key for key in plan.all_keys() if plan.plates[key[0]].fields[key[1]] is field)
    [(_, rows)] = plan.embed([key], threads=1)
    if not isinstance(rows, Rows):
        raise FieldReadError(rows)
    return rows.embeddings, rows.objects, rows.spatial


def cache_folder(output: str | Path) -> Path | None:
    """Return where what is estimated of the plates is kept: a folder beside the output; None beside a URL."""
    return None if is_url(output) else Path(f"{str(output).rstrip('/')}.intensities")


def _check_running(engine: str, workers: int, address: str | None, shard: str | None, overwrite: bool) -> None:
    if engine not in ENGINES:
        raise InputError(
            f"The engine '{engine}' is not known; expected {listing(ENGINES)}.{suggestion(engine, ENGINES)}"
        )
    if shard is not None and overwrite:
        raise InputError(
            "Each shard with --overwrite would remove what the others have done. Remove the output and its .partial "
            "folder before the shards begin, or choose another --output."
        )
    if workers < 1:
        raise InputError(f"There are to be {workers} workers; expected at least 1.")
    if address is not None and engine != "ray":
        raise InputError("--address is that of a Ray cluster: it goes with --engine ray.")


def _with_batch_size_of(run: dict[str, Any] | None, plan: EmbeddingPlan) -> EmbeddingPlan:
    """Return the plan with an unfinished job's batch size: on a GPU rows depend on it, and free memory varies."""
    size = None if run is None else run["identity"].get("batch_size")
    if not plan.batch_size_is_automatic or not isinstance(size, int):
        return plan
    return replace(plan, batch_size=size)


def _ledger(
    plan: EmbeddingPlan, output: str | Path, form: Mapping[str, Any], *, overwrite: bool, replaces: bool
) -> Ledger:
    from cellvim.embedding.sessions import read_sessions

    if overwrite:
        for other in read_sessions(ledger_storage(output)):
            if other["alive"]:
                raise OutputError(
                    f"Another cellvim embed is at work on this output (process {other['pid']} on {other['host']}), so "
                    "it cannot be started anew. Stop that one first."
                )
    return open_ledger(output, plan.identity, overwrite=overwrite, replaces=replaces, form=form)


def _engine(
    plan: EmbeddingPlan,
    ledger: Ledger,
    left: FieldsLeft,
    engine: str,
    workers: int,
    devices: Sequence[str],
    address: str | None,
    apart: bool,
) -> Iterator[Done]:
    """Return what works through the fields that are left: this process, several of this machine, or a cluster.

    ``apart``: in any case another process than this one, which then outlives a field that takes too much memory.
    """
    from cellvim.embedding.workers import work, work_in_processes

    if engine == "ray":
        from cellvim.embedding.ray_engine import work_on_ray

        return work_on_ray(plan, ledger, left, workers=workers, address=address)
    if workers > 1 or len(devices) > 1 or apart:
        return work_in_processes(plan, ledger, left, workers=max(workers, len(devices)), devices=devices)
    return work(plan.on(devices[0]), ledger, left, threads=2)


def _is_settled(plan: EmbeddingPlan, ledger: Ledger, summary: EmbeddingSummary) -> bool:
    """Return whether every field, of all shards, is done or has failed for good; and sum up."""
    from cellvim.embedding.assembly import failures_of

    n_done = n_rows = 0
    failed = ledger.failures()
    for number in range(len(plan.plates)):
        done = ledger.done([number])
        n_done, n_rows = n_done + len(done), n_rows + sum(done.values())
        ledger.forgive(key for key in failed if key in done)  # it went well after all, elsewhere
        failed = {key: failure for key, failure in failed.items() if key not in done}
    failures = failures_of(plan, list(failed.values()))
    summary.n_units = n_rows
    summary.n_fields = plan.n_fields + sum(len(plate.lost_wells) for plate in plan.plates)
    summary.failed = [_named(plan, failure) for failure in failures]
    summary.n_waiting = plan.n_fields - n_done - len(failed)
    return summary.n_waiting == 0


def _named(plan: EmbeddingPlan, failure: Failure) -> tuple[str, str]:
    return (failure.field if len(plan.plates) == 1 else f"{failure.plate} {failure.field}", failure.reason)


def _summary_of(plan: EmbeddingPlan, output: str | Path, manifest: dict[str, Any]) -> EmbeddingSummary:
    """Return the summary of a run that was through already, and clear up behind it."""
    storage = ledger_storage(output)
    if storage.exists():
        check_ours(storage)
        storage.remove_all(MARKER)
    failures = [Failure(**failure) for failure in manifest["failed"]]
    return EmbeddingSummary(
        output,
        plan.unit,
        plan.n_fields + sum(len(plate.lost_wells) for plate in plan.plates),
        n_units=manifest["rows"],
        failed=[_named(plan, failure) for failure in failures],
        untrained=untrained_remark(plan),
        notes=plan.notes,
        n_resumed=plan.n_fields,
    )


def _interruption(plan: EmbeddingPlan, ledger: Ledger, overwrite: bool) -> str:
    n = len(ledger.done(range(len(plan.plates))))
    how = "The same command without --overwrite goes on from there" if overwrite else "The same command goes on there"
    return f"Interrupted: {n:,} of {plan.n_fields:,} fields are done and kept in {ledger.storage.name}. {how}."
