"""The output of a run: an AnnData in Zarr or HDF5, or Parquet, and the files beside it.

When every field has rows or has failed, `assemble` writes the rows of the ledger to the output, block by block, so that
memory does not grow with the number of plates. The output is written in the ledger's folder and renamed at the end; the
ledger remains until the manifest is written too. A run that is killed in between repeats this part, to the same bytes.

The output contains nothing that depends on who made it, when, where or in how many pieces. This is recorded in the
manifest, ``<output>.manifest.json``.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cellvim.anndata_io import check_output
from cellvim.embedding.ledger import (
    DamagedError,
    Failure,
    Key,
    Ledger,
    Rows,
    Session,
    ledger_storage,
    locked,
    read_log,
    read_run,
    read_sessions,
)
from cellvim.errors import InputError, OutputError, listing, suggestion
from cellvim.files import (
    Storage,
    check_folder_writable,
    exists,
    is_url,
    read_bytes,
    remove,
    replace_path,
    upload,
    write_atomic,
)

if TYPE_CHECKING:
    from cellvim.embedding.plan import EmbeddingPlan, PlatePlan

FORMATS = ("zarr", "h5ad", "parquet")
SUFFIXES = {".zarr": "zarr", ".h5ad": "h5ad", ".h5": "h5ad", ".parquet": "parquet", ".pq": "parquet"}
OBJECT_COLUMN = "Metadata_ObjectNumber"
KEY_COLUMNS = ["Metadata_Plate", "Metadata_Well", "Metadata_Site"]
ROWS_PER_BLOCK = 8192  # also the number of rows of a chunk
RENAMING = "naming"  # file in the ledger: from here on, an existing output was written by this run
RENAMING_MAPS = "naming-maps"  # the same for token maps, which are written before
TOKEN_MAPS = "token maps"  # kind in the metadata of token maps: other plates are not replaced
OWN_COLUMNS = {"Metadata_ObjectNumber", "area_px", "area_um2", "touches_border", "region"}
PACKAGES = (
    *("cellvim", "torch", "numpy", "scipy", "pandas", "scikit-image", "zarr", "anndata", "h5py", "pyarrow", "ray"),
)


def format_of(output: str | Path, format: str | None = None) -> str:
    """Return the format of an output: ``format`` if given, else that of the suffix, else Zarr.

    Raises
    ------
    InputError
        The format is unknown, or contradicts the suffix.
    """
    suffix = "." + str(output).rstrip("/").rpartition(".")[2].lower()
    by_suffix = SUFFIXES.get(suffix)
    if format is None:
        return by_suffix or "zarr"
    if format not in FORMATS:
        raise InputError(
            f"The format '{format}' is not known; expected {listing(FORMATS)}.{suggestion(format, FORMATS)}"
        )
    if by_suffix not in (None, format):
        raise InputError(f"The format is {format}, but the output is named {Path(output).name}. Omit --format.")
    return format


def check_free(output: str | Path, *, overwrite: bool, plates: Sequence[str] = ()) -> bool:
    """Check that an output, and the token maps of ``plates``, can be written; return whether they may be replaced.

    Raises
    ------
    InputError
        Token maps are requested for an output at a URL.
    OutputError
        Something exists at one of the paths and may not be replaced, or the folder is not writable.
    """
    if not is_url(output):
        check_folder_writable(Path(output).absolute().parent)
    storage = ledger_storage(output)
    replaces = overwrite or _replaces(storage)
    if exists(output):
        check_output(output, overwrite=replaces)
    if plates:
        check_token_maps(output, plates, overwrite=replaces or storage.read(RENAMING_MAPS) is not None)
    return replaces


def _replaces(storage: Storage) -> bool:
    """Return whether an unfinished run may replace an existing output, which may be its own."""
    run = read_run(storage)
    return run is not None and bool(run.get("replaces") or storage.read(RENAMING) is not None)


def finished_before(output: str | Path, digest: str, *, shard: bool) -> dict[str, Any] | None:
    """Return the manifest of an output that this run has already finished, else None.

    Such an output exists if a run was killed before it removed its ledger, or if another shard finished the run.
    """
    manifest = read_manifest(output)
    if manifest is None or manifest.get("digest") != digest or not exists(output):
        return None
    storage = ledger_storage(output)
    if not storage.exists():
        return manifest if shard else None
    run = read_run(storage)
    return manifest if run is None or run.get("run") == manifest.get("run") else None


def was_removing_ledger(output: str | Path) -> bool:
    """Return whether a run was killed while it removed the ledger of a finished output."""
    storage = ledger_storage(output)
    return storage.exists() and read_run(storage) is None and exists(output) and read_manifest(output) is not None


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
) -> list[Key]:
    """Write the output and the files beside it, unless another session is doing so.

    Returns
    -------
    list of keys
        Fields whose rows were damaged and have been removed: they must be embedded again.

    Raises
    ------
    OutputError
        The output cannot be written.
    """
    storage = ledger.storage
    with locked(storage, session) as held:
        if not held:
            session.log("left", reason="another session writes the output")
            return []
        session.log("assemble")
        damaged: list[Key] = []

        def load(key: Key, n_rows: int) -> Rows:
            try:
                return ledger.load(key, n_rows)
            except DamagedError:
                ledger.remove(key, n_rows)
                damaged.append(key)
                raise

        def open_rows(number: int) -> PlateRows:
            plate = plan.plates[number]
            counts = {key[1]: n for key, n in ledger.done([number]).items()}
            rows = PlateRows(field_table(plate, regions=spatialdata), counts, lambda i: load((number, i), counts[i]))
            if len(plan.plates) > 1:
                plate.close()
            return rows

        replaces = _replaces(storage)

        def before_rename() -> None:
            if plan.tokens:
                names = [plate.name for plate in plan.plates]
                check_token_maps(output, names, overwrite=replaces or storage.read(RENAMING_MAPS) is not None)
                storage.write(RENAMING_MAPS, b"")
                write_token_maps(plan, ledger, output, load)
            storage.write(RENAMING, b"")

        for abandoned in [] if storage.path is None else storage.path.glob(".output-*"):  # by a killed session
            remove(abandoned)
        try:
            n_rows = write_embeddings(
                output,
                [partial(open_rows, number) for number in range(len(plan.plates))],
                plan.n_features,
                describe_run(plan, failures, spatialdata=spatialdata),
                format=format,
                folder=storage.path,
                overwrite=replaces,
                before_rename=before_rename,
            )
        except DamagedError as error:
            for key in damaged:
                plate, name = plan.field_name(key)
                session.log("damaged", plate=plate, field=name, reason=str(error))
            return damaged
        session.log("assembled", rows=n_rows)
        write_records(plan, ledger, session, output, failures, format=format, n_rows=n_rows, log=log)
        return []


def describe_run(plan: EmbeddingPlan, failures: Sequence[Failure], *, spatialdata: bool = False) -> dict[str, Any]:
    """Return ``uns``: everything needed to reproduce the rows, and with ``spatialdata`` what SpatialData requires."""
    first = plan.plates[0]
    config = plan.model.config
    about: dict[str, Any] = {
        "model": {"name": plan.model_name, "config": json.dumps(config.to_dict())},
        "weights": {
            "trained": plan.trained,
            "sha256": plan.weights_sha256,
            **({} if plan.trained else {"seed": plan.seed, "warning": untrained_remark(plan)}),
        },
        "options": json.dumps(plan.options),
        "unit": plan.unit,
        "precision": plan.precision,
        "seed": plan.seed,
        "spatial_unit": "pixel" if any(p.pixel_size_um is None for p in plan.plates) else "micrometer",
        "versions": plan.versions,
        "plates": pd.DataFrame(
            [
                {
                    "name": p.name,
                    "path": p.path,
                    "n_fields": p.n_fields,
                    "pixel_size_um": np.nan if p.pixel_size_um is None else p.pixel_size_um,
                    "channels": json.dumps(dict(zip(p.channels, p.meanings, strict=True))),
                    "model_ids": json.dumps(p.channel_ids),
                    "nuclei": p.dna or "not used",
                    "cells": p.cells_name,
                    "crop": json.dumps(_crop(plan, p)),
                    "intensity": json.dumps(p.scale.to_dict()),
                }
                for p in plan.plates
            ]
        ),
        "failed_fields": pd.DataFrame(
            {
                name: np.array([getattr(failure, name) for failure in failures], dtype=object)
                for name in ("plate", "field", "reason")
            }
        ),
    }
    if plan.class_names:
        about["class_names"] = np.array(plan.class_names, dtype=object)
    if len(plan.plates) == 1:
        about |= {
            "plate": {
                "name": first.name,
                "path": first.path,
                "pixel_size_um": "unknown" if first.pixel_size_um is None else first.pixel_size_um,
                "wells": first.chosen_wells,
            },
            "cells": first.cells_name,
            "cell_notes": first.cell_notes,
            "channels": {
                "plate": first.channels,
                "model": [config.channel_names[i] for i in first.channel_ids],
                "model_ids": first.channel_ids,
                "nuclei": first.dna or "not used",
            },
            "preprocessing": {"intensity": first.scale.to_dict(), "crop": _crop(plan, first)},
        }
        if first.illumination is not None:
            about["preprocessing"]["illumination"] = {
                "channel_names": list(first.illumination.channel_names),
                "coarse": first.illumination.coarse,
            }
    found: dict[str, Any] = {"cellvim": about}
    if spatialdata:
        regions = [name for plate in plan.plates for name in region_names(plate)]
        found["spatialdata_attrs"] = {
            "region": np.array(regions, dtype=object),
            "region_key": "region",
            "instance_key": "Metadata_ObjectNumber",
        }
    return found


def untrained_remark(plan: EmbeddingPlan) -> str | None:
    """Return a warning about untrained weights; None if they are trained."""
    if plan.trained:
        return None
    return (
        f"{plan.model_name} has UNTRAINED weights (random, seed {plan.seed}). They show that everything works and are "
        "a baseline to beat; they are no basis for a finding. --model takes the path of a trained checkpoint."
    )


def _crop(plan: EmbeddingPlan, plate: PlatePlan) -> dict[str, Any]:
    """Describe how crops were cut; values that do not differ from the defaults are omitted."""
    cutting = plate.cutting
    pixel_um = cutting.um_per_px or plate.pixel_size_um
    if plate.crop_px is None:
        crop = {"size_px": "whole field", "um_per_px": cutting.um_per_px}
    else:
        crop = {
            "size_px": plate.crop_px,
            "input_px": plan.input_px,
            "size_um": None if pixel_um is None else plate.crop_px * pixel_um,
            "um_per_px": cutting.um_per_px,
            "overlap": cutting.overlap,
            "border": None if cutting.border == "pad" else cutting.border,
            "mask_neighbours": cutting.mask_neighbours,
        }
    return {name: value for name, value in crop.items() if value}


def field_table(plan: PlatePlan, *, regions: bool = False) -> pd.DataFrame:
    """Return one row per field: plate, well, site, columns of the plate map and, with ``regions``, ``region``."""
    sites = [f.site for f in plan.fields]
    wells = [f.well for f in plan.fields]
    table = pd.DataFrame(
        {
            "Metadata_Plate": plan.name,
            "Metadata_Well": wells,
            "Metadata_Site": [int(s) for s in sites] if all(str(s).isdigit() for s in sites) else sites,
        }
    )
    plate_map = plan.plate.well_metadata.reindex(wells)
    for name in plate_map.columns:
        own = name in OWN_COLUMNS or str(name).startswith(("mean_intensity_", "qc_"))
        column = f"Metadata_{name}" if own else str(name)
        if column not in table:
            table[column] = plate_map[name].to_numpy()
    if "pert_type" in table and "Metadata_pert_type" not in table:
        table["Metadata_pert_type"] = table["pert_type"]
    if regions:
        table["region"] = region_names(plan)
    return table


def region_names(plan: PlatePlan) -> list[str]:
    """Return the name of each field's image for SpatialData: plate, well and site."""
    return [f"{plan.name}_{f.well}_{f.site}" for f in plan.fields]


def write_embeddings(
    output: str | Path,
    plates: Plates,
    n_features: int,
    uns: Mapping[str, Any],
    *,
    format: str,
    folder: Path | None = None,
    overwrite: bool = False,
    before_rename: Callable[[], None] = lambda: None,
) -> int:
    """Write the rows of all plates, field by field; the output is created atomically.

    Parameters
    ----------
    output, format, overwrite
        As in `RunOptions`.
    plates
        Functions that open the rows of one plate each. They are called more than once; nothing of a plate is kept when
        the next one is opened.
    n_features, uns
        Width of the embeddings, and description of the run, see `describe_run`.
    folder
        Folder for a temporary copy, on the file system of the output; by default that of the output.
    before_rename
        Called when everything is written, before the output is renamed to its final name.

    Returns
    -------
    int
        Number of rows.

    Raises
    ------
    OutputError
        The output exists and may not be replaced, or cannot be written.
    """
    if folder is None and not is_url(output):
        folder = Path(output).absolute().parent
    layout = Layout.of(plates)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".output-", ignore_cleanup_errors=True) as temporary:
            written = Path(temporary) / f"output.{format}"
            WRITERS[format](written, plates, layout, n_features, uns)
            if exists(output):  # perhaps created in the meantime
                check_output(output, overwrite=overwrite)
            before_rename()
            if is_url(output):
                upload(written, str(output))
            else:
                replace_path(written, output, aside=Path(temporary) / "replaced")
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error
    return layout.n_rows


@dataclass(frozen=True)
class PlateRows:
    """The rows of one plate, read field by field.

    Attributes
    ----------
    fields
        One row per field, in the order of the output. ``Metadata_Plate``, ``Metadata_Well`` and ``Metadata_Site``
        identify the field; these and all others become columns.
    counts
        Index of a field -> its number of rows; fields that are not included have none.
    load
        Reads the rows of a field.
    """

    fields: pd.DataFrame
    counts: Mapping[int, int]
    load: Callable[[int], Rows]

    @property
    def with_rows(self) -> list[int]:
        """Indices of the fields that have rows, in order."""
        return [f for f in range(len(self.fields)) if self.counts.get(f, 0) > 0]


Plates = Sequence[Callable[[], PlateRows]]


@dataclass
class Layout:
    """Columns, arrays and length of the table."""

    columns: dict[str, np.dtype | pd.CategoricalDtype]  # text is categorical
    obsm: dict[str, tuple[int, np.dtype]]  # name -> width and type
    n_rows: int

    @classmethod
    def of(cls, plates: Plates) -> Layout:
        """Open every plate once, and derive columns whose types suit the values of all plates."""
        samples: list[pd.DataFrame] = []  # one row with the types of each plate
        categories: dict[str, set[str]] = {}
        obsm: dict[str, tuple[int, np.dtype]] = {"spatial": (2, np.dtype(np.float64))}
        n_rows = 0
        for open_plate in plates:
            plate = open_plate()
            used = plate.with_rows
            n_rows += sum(plate.counts[f] for f in used)
            types: dict[str, Any] = {}
            for name, column in (plate.fields.iloc[used] if used else plate.fields).items():
                types[name] = _type_of(column)
                if types[name].kind == "O" and used:
                    categories.setdefault(name, set()).update(column.dropna().astype(str).unique())
            sample = next(iter(used or sorted(plate.counts)), None)
            if sample is not None:
                rows = plate.load(sample)
                types |= dict(rows.objects.dtypes)
                obsm |= {name: (values.shape[1], values.dtype) for name, values in rows.obsm.items()}
            if used or not n_rows:
                samples.append(pd.DataFrame({name: np.zeros(1, dtype) for name, dtype in types.items()}))
        # pandas finds the common type: numbers that a plate does not have become floating-point, and booleans objects.
        common = dict(pd.concat(samples, ignore_index=True).dtypes)
        common.setdefault(OBJECT_COLUMN, np.dtype(np.int64))
        columns: dict[str, np.dtype | pd.CategoricalDtype] = {}
        for name in dict.fromkeys([*KEY_COLUMNS, OBJECT_COLUMN, *common]):
            kinds = {sample[name].dtype.kind for sample in samples if name in sample}
            columns[name] = common[name]
            if common[name].kind == "O" or (len(kinds) > 1 and "b" in kinds):
                if kinds != {"O"}:  # numbers in some plates
                    categories[name] = _values_as_text(plates, name)
                columns[name] = pd.CategoricalDtype(sorted(categories.get(name, ())))
        return cls(columns, obsm, n_rows)

    def empty_obs(self) -> pd.DataFrame:
        """Return ``obs`` without rows, with the type and categories of every column."""
        columns = {name: pd.Series([], dtype=dtype) for name, dtype in self.columns.items()}
        return pd.DataFrame(columns, index=pd.Index([], dtype=object))


def _type_of(column: pd.Series) -> np.dtype:
    """Return the NumPy type of a column of the table of fields; object for text."""
    is_bool = pd.api.types.is_bool_dtype(column)
    if is_bool and not column.isna().any():
        return np.dtype(bool)
    if pd.api.types.is_numeric_dtype(column) and not is_bool:
        return np.dtype(np.float64) if column.isna().any() else column.to_numpy().dtype
    return np.dtype(object)


def _values_as_text(plates: Plates, name: str) -> set[str]:
    found: set[str] = set()
    for open_plate in plates:
        plate = open_plate()
        if name in plate.fields:
            parts = [plate.fields.iloc[plate.with_rows]]
        else:
            parts = (plate.load(number).objects for number in plate.with_rows)
        for part in parts:
            found |= set(part[name].dropna().astype(str)) if name in part else set()
    return found


Block = dict[str, np.ndarray]  # some rows of each array, by its path in the file; categorical codes for text


def blocks(plates: Plates, layout: Layout, n_features: int) -> Iterator[Block]:
    """Yield the table in blocks of `ROWS_PER_BLOCK` rows; the last one may be shorter."""
    waiting: list[Block] = []
    n = 0
    for open_plate in plates:
        plate = open_plate()
        constants = {
            name: _stored(values, layout.columns[name])
            for name, values in plate.fields.items()
            if name in layout.columns
        }
        for number in plate.with_rows:
            waiting.append(_block(plate, number, constants, layout, n_features))
            n += plate.counts[number]
            while n >= ROWS_PER_BLOCK:
                joined = _joined(waiting)
                yield {name: values[:ROWS_PER_BLOCK] for name, values in joined.items()}
                waiting = [{name: values[ROWS_PER_BLOCK:] for name, values in joined.items()}]
                n -= ROWS_PER_BLOCK
    if n:
        yield _joined(waiting)


def _joined(parts: list[Block]) -> Block:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _block(plate: PlateRows, number: int, constants: Block, layout: Layout, n_features: int) -> Block:
    """Return the rows of one field."""
    rows = plate.load(number)
    n = plate.counts[number]
    if rows.embeddings.shape != (n, n_features) or rows.spatial.shape != (n, 2) or len(rows.objects) != n:
        raise ValueError(
            f"field {number}: embeddings {rows.embeddings.shape}, objects {rows.objects.shape} and spatial "
            f"{rows.spatial.shape} do not match; expected {n} rows and {n_features} features"
        )
    keys = "__".join(str(plate.fields[name].iloc[number]) for name in KEY_COLUMNS)
    numbers = rows.objects[OBJECT_COLUMN].to_numpy().astype(str).astype(object)
    block = {"X": rows.embeddings, "obs/_index": f"{keys}__" + numbers}
    for name, dtype in layout.columns.items():
        if name in rows.objects:
            values = _stored(rows.objects[name], dtype)
        elif name in constants:
            values = np.repeat(constants[name][number : number + 1], n)
        else:
            values = _stored(pd.Series(np.full(n, np.nan)), dtype)
        block[f"obs/{name}"] = values
    for name, (width, dtype) in layout.obsm.items():
        values = rows.spatial if name == "spatial" else rows.obsm.get(name)
        block[f"obsm/{name}"] = np.full((n, width), np.nan, dtype) if values is None else values.astype(dtype)
    return block


def _stored(values: pd.Series, dtype: np.dtype | pd.CategoricalDtype) -> np.ndarray:
    """Return a column as it is stored: codes of categories, or numbers."""
    if isinstance(dtype, pd.CategoricalDtype):
        return pd.Categorical(values.where(values.isna(), values.astype(str)), dtype=dtype).codes
    if dtype.kind == "f":
        return pd.to_numeric(values).to_numpy(np.float64, na_value=np.nan).astype(dtype)
    return values.fillna(0).to_numpy().astype(dtype)  # missing only for fields without rows, whose values are not used


def write_zarr(path: Path, plates: Plates, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write an AnnData in Zarr format 2, which all current readers support."""
    import zarr

    group = zarr.open_group(path, mode="w", zarr_format=2)
    _write_anndata(group, plates, layout, n_features, uns)
    zarr.consolidate_metadata(group.store)


def write_h5ad(path: Path, plates: Plates, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write an AnnData as HDF5.

    Raises
    ------
    OSError
        The disk has too little space. This is checked before writing: HDF5 ends the process when a disk is full.
    """
    import h5py

    needed, free = hdf5_size(layout, n_features), shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"about {needed / 1e6:,.0f} MB are needed, and {free / 1e6:,.1f} MB are free")
    with h5py.File(path, "w") as file:
        _write_anndata(file, plates, layout, n_features, uns)


def hdf5_size(layout: Layout, n_features: int) -> int:
    """Return the approximate size of the file in bytes; arrays are not compressed and grow by blocks of rows."""
    row = n_features * 4 + sum(width * dtype.itemsize for width, dtype in layout.obsm.values())
    row += 8 * len(layout.columns) + 16
    filled = -(-layout.n_rows // ROWS_PER_BLOCK) * ROWS_PER_BLOCK
    return filled * row + 60 * layout.n_rows + 300_000  # 60: the name of a row


def _write_anndata(group: Any, plates: Plates, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write an AnnData without rows with anndata itself, so that it has anndata's own format; then add the rows."""
    import anndata
    from anndata.experimental import write_dispatched

    def with_chunks(write, store, name, element, *, dataset_kwargs, iospec):
        if iospec.encoding_type in ("array", "string-array") and len(element) == 0:  # rows are added later
            dataset_kwargs = {**dataset_kwargs, "chunks": (ROWS_PER_BLOCK, *element.shape[1:])}
            if type(group).__module__.startswith("h5py"):
                dataset_kwargs["maxshape"] = (None, *element.shape[1:])
        write(store, name, element, dataset_kwargs=dataset_kwargs)

    empty = anndata.AnnData(
        X=np.zeros((0, n_features), np.float32),
        obs=layout.empty_obs(),
        var=pd.DataFrame(index=_features(n_features)),
        obsm={name: np.zeros((0, width), dtype) for name, (width, dtype) in layout.obsm.items()},
        uns=dict(uns),
    )
    group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    write_dispatched(group, "/", empty, with_chunks)
    arrays = {name: group[name] for name in (*(f"obsm/{name}" for name in layout.obsm), "X", "obs/_index")}
    for name, dtype in layout.columns.items():
        arrays[f"obs/{name}"] = group[f"obs/{name}{'/codes' if isinstance(dtype, pd.CategoricalDtype) else ''}"]
    for array in arrays.values():
        array.resize((layout.n_rows, *array.shape[1:]))
    first = 0
    for block in blocks(plates, layout, n_features):
        rows = slice(first, first + len(block["X"]))
        for name, values in block.items():
            arrays[name][rows] = values
        first = rows.stop


def write_parquet(path: Path, plates: Plates, layout: Layout, n_features: int, uns: Mapping[str, Any]) -> None:
    """Write a table for pycytominer: metadata in columns ``Metadata_…``, then the features; one row group per block.

    ``uns`` is stored in the metadata of the file, as JSON under ``cellvim``.

    Raises
    ------
    OutputError
        pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise OutputError("--format parquet requires pyarrow: pip install 'cellvim[tables]'.") from error

    def plain(value: Any) -> Any:
        return value.to_dict(orient="list") if isinstance(value, pd.DataFrame) else value.tolist()

    tables = (
        pyarrow.Table.from_pandas(_frame(block, layout, n_features), preserve_index=False)
        for block in blocks(plates, layout, n_features)
    )
    first = next(tables, None)
    if first is None:
        features = pd.DataFrame(np.zeros((0, n_features), np.float32), columns=_features(n_features))
        empty = pd.concat([layout.empty_obs().rename(columns=_metadata_name), features], axis=1)
        schema = pyarrow.Table.from_pandas(empty, preserve_index=False).schema
    else:
        schema = first.schema
    schema = schema.with_metadata({key: json.dumps(value, sort_keys=True, default=plain) for key, value in uns.items()})
    with pyarrow.parquet.ParquetWriter(str(path), schema) as writer:
        for table in () if first is None else chain([first], tables):
            writer.write_table(table.cast(schema))


def _frame(block: Block, layout: Layout, n_features: int) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name, dtype in layout.columns.items():
        values = block[f"obs/{name}"]
        if isinstance(dtype, pd.CategoricalDtype):
            values = pd.Categorical.from_codes(values, categories=dtype.categories)
        columns[_metadata_name(name)] = values
    for name, (width, _) in layout.obsm.items():
        base = "Metadata_spatial" if name == "spatial" else name.removeprefix("X_")
        axes = ("x", "y") if name == "spatial" else [f"{i:04d}" for i in range(width)]
        columns |= {f"{base}_{axis}": block[f"obsm/{name}"][:, i] for i, axis in enumerate(axes)}
    return pd.concat([pd.DataFrame(columns), pd.DataFrame(block["X"], columns=_features(n_features))], axis=1)


def _features(n: int) -> list[str]:
    return [f"emb_{i:04d}" for i in range(n)]


def _metadata_name(name: str) -> str:
    return name if name.startswith("Metadata_") else f"Metadata_{name}"


WRITERS = {"zarr": write_zarr, "h5ad": write_h5ad, "parquet": write_parquet}


def token_maps_name(output: str | Path, plate: str, n_plates: int) -> Path:
    """Return the path of the token maps of a plate, beside the output."""
    base = str(output).rstrip("/")
    base = base.removesuffix("." + base.rpartition(".")[2]) if "." in Path(base).name else base
    return Path(f"{base}.tokens.zarr" if n_plates == 1 else f"{base}.{plate}.tokens.zarr")


def check_token_maps(output: str | Path, plates: Sequence[str], *, overwrite: bool) -> None:
    """Check that the token maps of these plates can be written.

    Raises
    ------
    InputError
        The output is a URL: token maps are written to folders only.
    OutputError
        One exists and ``overwrite`` is False, or it does not contain token maps.
    """
    if is_url(output):
        raise InputError("Token maps are written to folders, not to a URL. Choose another --output.")
    for plate in plates:
        path = token_maps_name(output, plate, len(plates))
        if not os.path.lexists(path):
            continue
        if not overwrite:
            raise OutputError(f"{path} exists already. Choose another --output, or replace both with --overwrite.")
        if not _is_token_maps(path):
            raise OutputError(
                f"{path} exists and does not contain token maps, so it is not replaced. Move it, or choose another "
                "--output."
            )


def write_token_maps(plan: EmbeddingPlan, ledger: Ledger, output: str | Path, load: Callable[[Key, int], Rows]) -> None:
    """Write the token maps of each field as an OME-Zarr image: one channel per stain and feature, one pixel per patch.

    ``load`` returns the rows of a field by its key and number of rows.
    """
    from cellvim.data.plate_writer import PlateWriter

    for number, plate in enumerate(plan.plates):
        counts = ledger.done([number])
        patch = plan.model.config.patch_size
        pixel = plate.cutting.um_per_px or plate.pixel_size_um
        stains = plate.meanings if plan.model.config.tokens == "per_channel" else ["all"]
        names = [f"{stain} emb_{i:04d}" for stain in stains for i in range(plan.n_features)]
        with PlateWriter(
            token_maps_name(output, plate.name, len(plan.plates)),
            name=f"{plate.name} tokens",
            channel_names=names,
            pixel_size_um=None if pixel is None else pixel * patch,
            overwrite=True,
        ) as writer:
            for key, n in sorted(counts.items()):
                maps = load(key, n).tokens.swapaxes(0, 1)  # (C, D, rows, columns)
                one = plate.fields[key[1]]
                writer.write_field(one.well, str(one.site), maps.reshape(-1, *maps.shape[2:]))
            writer.finish(provenance={"kind": TOKEN_MAPS})


def _is_token_maps(path: Path) -> bool:
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        return not path.is_symlink() and attributes["cellvim"]["provenance"]["kind"] == TOKEN_MAPS
    except (OSError, ValueError, KeyError, TypeError):
        return False


def manifest_name(output: str | Path) -> str:
    """Return the path or URL of the manifest of an output."""
    return f"{str(output).rstrip('/')}.manifest.json"


def read_manifest(output: str | Path) -> dict[str, Any] | None:
    """Return the manifest of an output, or None if there is none."""
    try:
        content = read_bytes(manifest_name(output))
        return None if content is None else json.loads(content)
    except (OutputError, ValueError):
        return None


def write_records(
    plan: EmbeddingPlan,
    ledger: Ledger,
    session: Session,
    output: str | Path,
    failures: Sequence[Failure],
    *,
    format: str,
    n_rows: int,
    log: bool,
) -> None:
    """Write the files beside an output: failures, the log if requested, and at last the manifest."""
    base = str(output).rstrip("/")
    session.write("finished")
    sessions = [s for s in read_sessions(ledger.storage) if s["fields"] or s["failed"] or s["id"] == session.id]
    if failures:
        write_atomic(f"{base}.failures.csv", pd.DataFrame([asdict(f) for f in failures]).to_csv(index=False))
    else:
        remove(f"{base}.failures.csv")
    if log:
        write_atomic(f"{base}.log.jsonl", "".join(f"{line}\n" for line in read_log(ledger.storage)))
    manifest = {
        "run": (read_run(ledger.storage) or {}).get("run"),
        "output": str(output),
        "format": format,
        "rows": n_rows,
        "fields": plan.n_fields,
        "failed": [asdict(f) for f in failures],
        "weights_sha256": ledger.identity.get("weights"),
        "digest": ledger.digest,
        "started": min((s["started"] for s in sessions), default=None),
        "seconds": round(sum(s["seconds"] for s in sessions), 3),
        "sessions": [{k: v for k, v in s.items() if k != "alive"} for s in sessions],
        "identity": ledger.identity,
    }
    write_atomic(manifest_name(output), json.dumps(manifest, indent=1, default=str) + "\n")


def hardware() -> dict[str, Any]:
    """Describe the machine: processor, number of cores, memory, operating system, GPUs."""
    import torch

    memory = 0
    with suppress(ValueError, OSError, AttributeError):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found: dict[str, Any] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "system": platform.platform(),
    }
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def processor_name() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    names = [] if not info.is_file() else [s for s in info.read_text().splitlines() if s.startswith("model name")]
    return names[0].split(":", 1)[1].strip() if names else platform.processor() or platform.machine()


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages involved."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
