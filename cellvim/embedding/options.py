"""Options of embedding, each defined once.

A field of `PlateOptions`, `EmbeddingOptions` or `RunOptions` is an option: its type, default, description and whether
it affects the rows. The signatures and docstrings of `cellvim.embed` and `plan_embedding`, the options of
``cellvim embed``, the record in ``uns["cellvim"]["options"]`` and the identity of an unfinished run are derived from
these fields, so adding an option is adding a field. `cellvim.train` shares `PlateOptions`.
"""

# ruff: noqa: RUF009 -- `option` is a dataclass field
from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

from cellvim.errors import InputError, check_seed, listing, suggestion

if TYPE_CHECKING:
    from cellvim.models.encoder import Encoder

Unit = Literal["cell", "tile", "field"]
Channels = str | Sequence[str] | Mapping[str, str] | None
Plates = "str | Path | Plate | Sequence[str | Path | Plate]"
Function = TypeVar("Function", bound=Callable[..., Any])

UNITS: tuple[str, ...] = get_args(Unit)
DEFAULT_MODEL = "fastchannelvim_tiny_patch16"


def option(default: Any, help: str, *, metavar: str | None = None, affects_rows: bool = True) -> Any:
    """Define an option: a dataclass field with its description.

    Parameters
    ----------
    default
        Default value.
    help
        Description for docstrings. Its first sentence is the help of the command line.
    metavar
        Placeholder for the value in the help of the command line.
    affects_rows
        Whether the rows depend on the option. If so, it is recorded in the output and in the identity of the run.
    """
    return field(default=default, metadata={"help": help, "metavar": metavar, "affects_rows": affects_rows})


@dataclass(frozen=True, kw_only=True)
class PlateOptions:
    """Options that select and prepare the images of plates; shared by embedding and training.

    Raises
    ------
    InputError
        A value is invalid, or two values contradict each other.
    """

    unit: Unit = option("cell", "What one row represents: a cell, a tile of the field, or the entire field.")
    channels: Channels = option(
        None,
        "Names of the channels to use, such as DNA,ER, or NAME=CHANNEL to state what a channel shows, such as "
        "DNA=ch5,ER=ch4; all by default. A list (``['DNA', 'ER']``) or a mapping (``{'DNA': 'ch5'}``) in Python.",
    )
    wells: Sequence[str] | None = option(None, "Wells to use, such as A01,B07; all by default.")
    crop_size: int | None = option(
        None,
        "Side of the crop around a cell, or of a tile, in pixels of the plate. By default the size that the model was "
        "trained on; for an untrained model 40 µm around a cell (64 pixels if the pixel size is unknown) and 224 "
        "pixels for a tile.",
        metavar="PX",
    )
    crop_um: float | None = option(
        None,
        "Side of the crop in µm instead of pixels. Crops of plates with different pixel sizes are resized to one size.",
        metavar="UM",
    )
    um_per_px: float | None = option(
        None, "Pixel size to which every field is resampled before cropping.", metavar="UM"
    )
    overlap: float = option(0.0, "Overlap of neighbouring tiles, as a fraction of their side.", metavar="FRACTION")
    cells: str | Path = option(
        "nuclei",
        "Source of the cells: nuclei, cells or cellpose (segmentation), labels:NAME (a label image of the plate), or "
        "the path of a table of positions or of a folder of masks. See `cellvim.data.cells.open_cells`.",
        metavar="SOURCE",
    )
    border: Literal["pad", "reflect", "shift", "drop"] = option(
        "pad",
        "Treatment of cells whose crop extends beyond the field: pad with zeros, reflect the image, shift the crop "
        "inside, or drop the cell.",
    )
    mask_neighbours: bool = option(False, "Set the pixels of other cells to zero.")
    scale_by: Literal["auto", "all", "controls", "model"] = option(
        "auto",
        "Reference for scaling intensities: percentiles of all wells, percentiles of the negative controls of the "
        "plate map, or the levels stored in the model. auto uses what the model was trained with.",
    )
    illumination: bool = option(
        False, "Estimate the uneven illumination of the plate and correct it in the embedded images."
    )
    z: int | str | None = option(
        None, "Plane of a z-stack, counted from 0, or max for the maximum projection.", metavar="N|max"
    )
    t: int | None = option(None, "Time point, counted from 0.", metavar="N")
    level: int = option(0, "Resolution level of the plate; 0 is the full resolution.", metavar="N")
    seed: int = option(0, "Random seed for untrained weights and for the pixels that intensities are estimated from.")

    def __post_init__(self) -> None:
        _check_choices(self)
        check_crop_size(self.unit, self.crop_size)
        check_seed(self.seed)

    @property
    def view(self) -> dict[str, Any]:
        """Arguments of `open_plate` for plates given as paths."""
        return {"z": self.z, "t": self.t, "level": self.level}

    def record(self) -> dict[str, Any]:
        """Return the options that affect the rows, as plain values; equivalent inputs give the same record."""
        return {
            each.name: _plain(each.name, getattr(self, each.name))
            for each in fields(self)
            if each.metadata["affects_rows"]
        }


@dataclass(frozen=True, kw_only=True)
class EmbeddingOptions(PlateOptions):
    """Options that, together with the plates, determine an embedding.

    Raises
    ------
    InputError
        A value is invalid, or two values contradict each other.
    """

    model: str | Path | Encoder = option(
        DEFAULT_MODEL,
        "Name of a model (see `cellvim models`), or path of a checkpoint. An `Encoder` in Python. The weights are "
        "random unless the name is that of a trained model that ships with CellVim.",
        metavar="NAME|PATH",
    )
    per_channel: bool = option(
        False, "Also return an embedding of each channel, the mean of its tokens, in ``obsm['X_emb_<channel>']``."
    )
    probabilities: bool = option(
        False,
        "Also return the probabilities of the model's classes, in ``obsm['probabilities']``. Their names are "
        "``uns['cellvim']['class_names']``.",
    )
    tokens: bool = option(False, "Also write token maps beside the output; requires --unit field.")
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Numerical precision; auto selects bfloat16 on GPUs that support it, float32 elsewhere."
    )
    batch_size: int | None = option(
        None, "Number of crops per batch; chosen from the available memory by default.", metavar="N", affects_rows=False
    )
    device: str = option("auto", "Device: auto, cpu, cuda, cuda:1, mps or xpu.", affects_rows=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size is not None and self.batch_size < 1:
            raise InputError(f"The batch size is {self.batch_size}; expected at least 1.")
        if self.tokens and self.unit != "field":
            raise InputError(
                f"Token maps are written for entire fields: --tokens requires --unit field, not {self.unit}."
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of how a run is executed and stored; the rows do not depend on them.

    Raises
    ------
    InputError
        A value is invalid, or two values contradict each other.
    """

    workers: int = option(1, "Number of worker processes on this machine.", metavar="N", affects_rows=False)
    devices: Sequence[str] = option(
        (), "Devices assigned to the workers in turn, such as cuda:0,cuda:1.", metavar="D,D…", affects_rows=False
    )
    engine: Literal["processes", "ray"] = option(
        "processes", "Where the workers run: processes of this machine, or actors of a Ray cluster.", affects_rows=False
    )
    address: str | None = option(
        None, "Address of the Ray cluster; Ray is started on this machine by default.", affects_rows=False
    )
    shard: str | None = option(
        None,
        "Embed only the I-th of N equal parts of the fields, as one job of a job array. The shard that finishes last "
        "writes the output.",
        metavar="I/N",
        affects_rows=False,
    )
    format: Literal["zarr", "h5ad", "parquet"] | None = option(
        None, "File format of the output; derived from its suffix by default.", affects_rows=False
    )
    spatialdata: bool = option(False, "Add the attributes that SpatialData requires.", affects_rows=False)
    log: bool = option(False, "Keep the log beside the output, as JSON lines.", affects_rows=False)
    overwrite: bool = option(False, "Discard unfinished work and replace an existing output.", affects_rows=False)

    def __post_init__(self) -> None:
        _check_choices(self)
        if self.shard is not None and self.overwrite:
            raise InputError(
                "--overwrite would make each shard discard the rows of the others. Remove the output and its .partial "
                "folder before starting the shards, or choose another --output."
            )
        if self.workers < 1:
            raise InputError(f"The number of workers is {self.workers}; expected at least 1.")
        if self.address is not None and self.engine != "ray":
            raise InputError("--address is the address of a Ray cluster; it requires --engine ray.")


def check_crop_size(unit: str, crop_size: int | None) -> None:
    """Check a crop size in pixels.

    Raises
    ------
    InputError
        The unit has no crops, or the size is too small.
    """
    if unit == "field" and crop_size is not None:
        raise InputError("A crop size applies to the units cell and tile; a field is embedded whole.")
    if crop_size is not None and crop_size < 8:
        raise InputError(f"The crop size is {crop_size} pixels; expected at least 8.")


def with_options(*classes: type, only: Collection[str] | None = None) -> Callable[[Function], Function]:
    """Give a function that takes ``**options`` the signature and docstring of the options.

    Parameters
    ----------
    *classes
        Dataclasses of options.
    only
        Names of the options that the function accepts; all by default. Parameters that the function itself defines,
        for instance with another default, are kept.

    Returns
    -------
    callable
        A decorator. It replaces the entry ``**options`` of the docstring by the descriptions of the options, and adds
        the attribute ``metavars`` for the command line.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        known = {p.name for p in own}
        taken = [(c, f) for c in classes for f in fields(c) if f.name not in known and (only is None or f.name in only)]
        parameters = [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=annotation_of(c, f))
            for c, f in taken
        ]
        function.metavars = {f.name: f.metadata["metavar"] for _, f in taken}
        function.__signature__ = signature.replace(parameters=[*own, *parameters])
        entries = "".join(
            f"    {f.name}\n{fill(f.metadata['help'], 120, initial_indent=' ' * 8, subsequent_indent=' ' * 8)}\n"
            for _, f in taken
        )
        function.__doc__ = re.sub(r" *\*\*options\n(?: {8,}.*\n)*", lambda _: entries, function.__doc__ or "", count=1)
        return function

    return decorate


def split_options(options: Mapping[str, Any], *classes: type) -> list[Any]:
    """Return one instance of each class of options, made from its share of ``options``.

    Raises
    ------
    TypeError
        An option belongs to none of the classes.
    """
    known = [{f.name for f in fields(c)} for c in classes]
    unknown = [name for name in options if not any(name in names for names in known)]
    if unknown:
        raise TypeError(f"unexpected keyword argument '{unknown[0]}'")
    return [c(**{n: v for n, v in options.items() if n in names}) for c, names in zip(classes, known, strict=True)]


def annotation_of(cls: type, each: Field) -> Any:
    """Return the type of an option, as a string if it refers to a module that is not imported."""
    if not isinstance(each.type, str):
        return each.type
    home = next(base for base in cls.__mro__ if each.name in inspect.get_annotations(base))
    try:
        return eval(each.type, vars(sys.modules[home.__module__]))
    except NameError:
        return each.type


def choices_of(annotation: Any) -> tuple[str, ...]:
    """Return the values of a ``Literal``, also of an optional one; empty for other types."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    members = [a for a in get_args(annotation) if a is not type(None)]
    return choices_of(members[0]) if len(members) == 1 else ()


def _check_choices(options: PlateOptions | RunOptions) -> None:
    for each in fields(options):
        choices, value = choices_of(annotation_of(type(options), each)), getattr(options, each.name)
        if choices and value not in (*choices, each.default):
            name = each.name.replace("_", "-")
            raise InputError(
                f"--{name} '{value}' is not known; expected {listing(choices)}.{suggestion(str(value), choices)}"
            )


def _plain(name: str, value: Any) -> Any:
    """Return a value for JSON; for equivalent ways to name channels, wells and files the same one."""
    if name == "channels" and value is not None:
        if isinstance(value, Mapping):
            return ",".join(f"{meaning}={channel}" for meaning, channel in value.items())
        return value if isinstance(value, str) else ",".join(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    return [_plain(name, item) for item in value] if isinstance(value, Sequence) else "given in memory"
