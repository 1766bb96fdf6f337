"""Running an embedding: `embed`, `run_embedding` and `embed_plates`.

A run follows the modules of this package: options → plan → remaining fields of the ledger → workers → output. The unit
of work is a field: its rows depend on the plan and on its pixels, never on which worker embeds it, when, or after which
other field. The output therefore has the same bytes for any number of workers and interruptions.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from dataclasses import field as default
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellvim.embedding.encode import FieldEmbedder, with_batch_size
from cellvim.embedding.ledger import (
    MARKER,
    Failure,
    Key,
    Ledger,
    Rows,
    Session,
    check_ours,
    identity_digest,
    ledger_storage,
    needs_isolation,
    open_ledger,
    read_run,
)
from cellvim.embedding.options import EmbeddingOptions, Plates, RunOptions, Unit, split_options, with_options
from cellvim.embedding.output import (
    assemble,
    check_free,
    check_token_maps,
    finished_before,
    format_of,
    hardware,
    package_versions,
    read_manifest,
    untrained_remark,
    was_removing_ledger,
)
from cellvim.embedding.plan import EmbeddingPlan, make_plan, usable_device
from cellvim.embedding.workers import (
    FieldResult,
    RemainingFields,
    Shard,
    embed_here,
    embed_in_processes,
    embed_on_ray,
)
from cellvim.errors import FieldReadError, InputError, Interrupted, OutputError, listing
from cellvim.files import check_folder_writable, is_url

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from anndata import AnnData

    from cellvim.data.plate import Field

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
    """Result of `run_embedding`."""

    output: str | Path
    unit: Unit
    n_fields: int
    n_units: int = 0
    seconds: float = 0.0
    failed: list[tuple[str, str]] = default(default_factory=list)  # name of the field, reason
    untrained: str | None = None  # warning about untrained weights
    notes: Sequence[str] = ()  # further warnings of the plan
    n_resumed: int = 0  # fields finished by earlier sessions
    n_waiting: int = 0  # fields that other shards have not finished
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
        """Return warnings about the result, one line each."""
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


@with_options(RunOptions)
def run_embedding(
    plan: EmbeddingPlan,
    output: str | Path,
    *,
    progress: Callable[[int, int, int], None] | None = None,
    **options: Any,
) -> EmbeddingSummary:
    """Embed the fields of a plan and write the output; resume an interrupted run of the same plan.

    Parameters
    ----------
    plan
        Plan made by `plan_embedding`.
    output
        Path or URL of the output, which is created atomically. Until then rows are in ``<output>.partial``.
    progress
        Called at the start and after each field with the number of finished fields, of all fields, and of rows so far.
    **options
        See `RunOptions`.

    Raises
    ------
    OutputError
        The output exists or cannot be written, or the folder beside it does not belong to this run.
    Interrupted
        Ctrl-C; finished fields are kept.
    """
    start = time.perf_counter()
    run = RunOptions(**options)
    format = format_of(output, run.format)
    shard = None if run.shard is None else Shard.parse(run.shard)
    plan = with_batch_size_of(None if run.overwrite else read_run(ledger_storage(output)), plan)
    if not run.overwrite:
        manifest = finished_before(output, identity_digest(plan.identity), shard=shard is not None)
        if manifest is not None and manifest.get("format", format) == format:
            return _summarize_manifest(plan, output, manifest)
    replaces = check_free(
        output, overwrite=run.overwrite, plates=[plate.name for plate in plan.plates] if plan.tokens else ()
    )
    ledger = open_ledger(
        output,
        plan.identity,
        overwrite=run.overwrite,
        replaces=replaces,
        form={"format": format, "spatialdata": run.spatialdata},
    )
    devices = [usable_device(d) for d in run.devices] or [plan.device]
    isolated = needs_isolation(ledger.storage, run.shard)
    about = {
        "engine": run.engine,
        "workers": run.workers,
        "devices": devices,
        "batch_size": plan.batch_size,
        "isolated": isolated,
        "hardware": hardware(),
        "versions": package_versions(),
    }
    session = Session(ledger, shard=run.shard, about=about)
    if isolated:
        session.log("isolated", reason="the last two sessions were killed: fields are embedded in an isolated process")
    summary = EmbeddingSummary(
        output, plan.unit, plan.n_fields, untrained=untrained_remark(plan), notes=plan.notes, shard=run.shard
    )
    part = None if shard is None else shard.part(plan.n_fields)
    damaged: list[Key] | None = None
    state = "stopped"
    try:
        while damaged is None or damaged:
            remaining = RemainingFields(plan, ledger, part=part, keys=damaged)
            summary.n_resumed = summary.n_resumed or remaining.n_done
            results = _embed_fields(plan, ledger, remaining, run, devices, isolated=isolated)
            _follow(plan, session, remaining, results, progress)
            failures = _count(plan, ledger, summary)
            if summary.n_waiting:
                if shard is None:
                    raise RuntimeError(f"{summary.n_waiting} fields were not embedded: this is a bug")
                summary.n_units, summary.n_fields = session.record["rows"], session.record["fields"]
                summary.failed = []
                break
            damaged = assemble(
                plan, ledger, session, output, failures, format=format, spatialdata=run.spatialdata, log=run.log
            )
        state = "finished"
    except KeyboardInterrupt as error:
        state = "interrupted"
        n_done = len(ledger.done(range(len(plan.plates))))
        raise Interrupted(
            f"Interrupted: {n_done:,} of {plan.n_fields:,} fields are done and kept in {ledger.storage.name}. "
            f"The same command {'without --overwrite ' if run.overwrite else ''}resumes the run."
        ) from error
    finally:
        session.close(state)
    if not summary.n_waiting and read_manifest(output) is not None:
        ledger.delete()
    summary.seconds = time.perf_counter() - start
    return summary


def _embed_fields(
    plan: EmbeddingPlan,
    ledger: Ledger,
    remaining: RemainingFields,
    run: RunOptions,
    devices: Sequence[str],
    *,
    isolated: bool,
) -> Iterator[FieldResult]:
    """Embed the remaining fields where the options say; with ``isolated``, not in this process in any case."""
    embedder = FieldEmbedder(plan)
    if run.engine == "ray":
        return embed_on_ray(embedder, ledger, remaining, workers=run.workers, address=run.address)
    n_workers = max(run.workers, len(devices))
    if n_workers > 1 or isolated:
        return embed_in_processes(embedder, ledger, remaining, workers=n_workers, devices=devices)
    return embed_here(embedder.on(devices[0]), ledger, remaining)


def _follow(
    plan: EmbeddingPlan,
    session: Session,
    remaining: RemainingFields,
    results: Iterator[FieldResult],
    progress: Callable[[int, int, int], None] | None,
) -> None:
    """Report results as they come: to the log, the session and the progress bar."""
    n_done, n_rows = remaining.n_done, remaining.n_rows
    if progress is not None:
        progress(n_done, remaining.n_fields, n_rows)
    for result in results:
        plate, field = plan.field_name(result.key)
        if result.reason is None:
            session.log("done", plate=plate, field=field, rows=result.rows)
            session.count(fields=1, rows=result.rows)
        else:
            session.log("failed" if result.final else "retry", plate=plate, field=field, reason=result.reason)
            session.count(failed=int(result.final))
        if result.final:
            n_done, n_rows = n_done + 1, n_rows + result.rows
            if progress is not None:
                progress(n_done, remaining.n_fields, n_rows)


def _count(plan: EmbeddingPlan, ledger: Ledger, summary: EmbeddingSummary) -> list[Failure]:
    """Count the finished, failed and waiting fields of all shards in the summary, and return the failures."""
    n_done = n_rows = 0
    failed = ledger.failures()
    for number in range(len(plan.plates)):
        done = ledger.done([number])
        n_done, n_rows = n_done + len(done), n_rows + sum(done.values())
        ledger.clear_failures(key for key in failed if key in done)  # another session succeeded
        failed = {key: failure for key, failure in failed.items() if key not in done}
    empty_wells = [
        Failure(plate.name, well, f"Well {well} is listed by the plate, but has no field.", 0)
        for plate in plan.plates
        for well in plate.lost_wells
    ]
    failures = [*empty_wells, *failed.values()]
    summary.n_units = n_rows
    summary.n_fields = plan.n_fields + len(empty_wells)
    summary.failed = _named(plan, failures)
    summary.n_waiting = plan.n_fields - n_done - len(failed)
    return failures


def _named(plan: EmbeddingPlan, failures: Sequence[Failure]) -> list[tuple[str, str]]:
    return [(f.field if len(plan.plates) == 1 else f"{f.plate} {f.field}", f.reason) for f in failures]


def _summarize_manifest(plan: EmbeddingPlan, output: str | Path, manifest: Mapping[str, Any]) -> EmbeddingSummary:
    """Return the summary of a run that had finished before, and remove its ledger if it is still there."""
    storage = ledger_storage(output)
    if storage.exists():
        check_ours(storage)
        storage.remove_all(MARKER)
    return EmbeddingSummary(
        output,
        plan.unit,
        plan.n_fields + sum(len(plate.lost_wells) for plate in plan.plates),
        n_units=manifest["rows"],
        failed=_named(plan, [Failure(**failure) for failure in manifest["failed"]]),
        untrained=untrained_remark(plan),
        notes=plan.notes,
        n_resumed=plan.n_fields,
    )


def embed_plates(
    plates: Sequence[str],
    output: str,
    options: EmbeddingOptions,
    run: RunOptions,
    *,
    per_plate: bool = False,
    progress: Callable[[int, int, int], None] | None = None,
) -> Iterator[EmbeddingSummary]:
    """Embed plates into one output, or each into its own output.

    Parameters
    ----------
    plates
        Paths or URLs.
    output
        Path or URL of the output; with ``per_plate`` of the folder for the outputs.
    options, run
        See `EmbeddingOptions` and `RunOptions`.
    per_plate
        Write one output per plate. Existing outputs of the same run are kept.
    progress
        See `run_embedding`.

    Yields
    ------
    EmbeddingSummary
        One per output.
    """
    suffix = format_of("" if per_plate else output, run.format)
    if run.shard is not None:
        Shard.parse(run.shard)
    if options.tokens:
        check_token_maps(output, (), overwrite=run.overwrite)
    settings = {each.name: getattr(run, each.name) for each in fields(run)}
    if not per_plate:
        if not was_removing_ledger(output):
            # The token maps of one plate are named after the output; those of several also after the plates.
            names = [""] if options.tokens and len(plates) == 1 else ()
            check_free(output, overwrite=run.overwrite or run.shard is not None, plates=names)
        plan = make_plan(list(plates), options, cache=cache_folder(output))
        yield run_embedding(plan, output, progress=progress, **settings)
        return
    if not is_url(output):
        check_folder_writable(output)
        try:
            Path(output).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder {output} cannot be created: {error.strerror}. Choose another.") from error
    if len(plates) > 1:
        _check_names(plates, options.view)
    for source in plates:
        plan = make_plan(source, options, cache=cache_folder(f"{output}/plates"))
        target = f"{output}/{plan.plates[0].name}.{suffix}"
        plan = with_batch_size_of(None if run.overwrite else read_run(ledger_storage(target)), plan)
        manifest = None if run.overwrite else finished_before(target, identity_digest(plan.identity), shard=True)
        if manifest is not None:
            yield _summarize_manifest(plan, target, manifest)
        else:
            yield run_embedding(plan, target, progress=progress, **settings)


def _check_names(plates: Sequence[str], view: Mapping[str, Any]) -> None:
    """Check that the plates have different names, since their outputs are named after them."""
    from cellvim.data.plate import open_plate

    sources: dict[str, str] = {}
    for source in plates:
        name = open_plate(source, **view).name
        if name in sources:
            raise InputError(
                f"{sources[name]} and {source} are both called {name}, so they would have the same output. Embed them "
                "into one output, which distinguishes them by their folders, or with separate commands."
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
        (n, 2) position (x, y) within the field, in µm, or in pixels if the pixel size is unknown.

    Raises
    ------
    FieldReadError
        The field cannot be embedded.
    """
    key = next(key for key in plan.all_keys() if plan.plates[key[0]].fields[key[1]] is field)
    [(_, rows)] = FieldEmbedder(plan).embed([key], threads=1)
    if not isinstance(rows, Rows):
        raise FieldReadError(rows)
    return rows.embeddings, rows.objects, rows.spatial


def cache_folder(output: str | Path) -> Path | None:
    """Return the folder for estimates such as intensity scales, beside the output; None if the output is a URL."""
    return None if is_url(output) else Path(f"{str(output).rstrip('/')}.intensities")


def with_batch_size_of(run: Mapping[str, Any] | None, plan: EmbeddingPlan) -> EmbeddingPlan:
    """Return the plan with a batch size: that of an interrupted run if the rows depend on it, as on a GPU."""
    size = None if run is None else run["identity"].get("batch_size")
    return with_batch_size(plan, size if isinstance(size, int) else None)
