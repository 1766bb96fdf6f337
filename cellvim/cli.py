"""The command line. Each command is a function below; its options are derived from signatures and docstrings.

A command takes positional parameters as arguments and keyword parameters as options. With ``like``, it also has the
options of that public function, which is imported only when the command is used: ``cellvim --help`` imports neither
PyTorch nor pandas. The first sentence of a parameter's description is the help of its option.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from shlex import quote
from typing import Any

import click

from cellvim import __version__
from cellvim.embedding.options import EmbeddingOptions, RunOptions, split_options, with_options
from cellvim.errors import CellvimError, InputError, ModelError, listing, suggestion

INTERRUPTED = 130  # exit code of shells for Ctrl-C
SOME_FAILED = 3
SHORT = {"output": "-o", "metadata": "-m"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns
    -------
    int
        Exit code: 0 success, 2 unusable input, 3 some fields failed, 130 interrupted by Ctrl-C.
    """
    # OpenMP threads wait for each other by spinning. If other programs need the processor, long spinning makes a model
    # on the CPU up to ten times slower; short spinning costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(args=argv, prog_name="cellvim")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt as stop:  # before or after a command
        return _interrupted(stop)
    return 0


def _interrupted(stop: KeyboardInterrupt) -> int:
    print(str(stop) or "Interrupted. Outputs are written atomically; none is incomplete.", file=sys.stderr)
    return INTERRUPTED


# --- from functions to commands ---


@dataclass(frozen=True)
class _Command:
    """A function, the public function whose options it shares, and options that are left out or renamed."""

    run: Callable[..., None]
    like: str | None = None
    omit: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def help(self) -> str:
        return inspect.getdoc(self.run).split("\n\n")[0].replace("\n", " ").replace("`", "")

    def build(self, name: str) -> click.Command:
        parameters = parameters_of(self.run)
        known = {parameter.name for parameter in parameters}
        if self.like is not None:
            module, _, function = self.like.partition(":")
            shared = parameters_of(getattr(import_module(module), function), only_options=True)
            parameters += [p for p in shared if p.name not in known.union(self.omit)]
        for parameter in parameters:
            if parameter.name in self.names:
                parameter.opts = [f"--{self.names[parameter.name]}"]
        return click.Command(name, params=parameters, callback=self.run, help=self.help, **self.settings)


COMMANDS: dict[str, _Command] = {}


def command(name: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command."""

    def register(run: Callable[..., None]) -> Callable[..., None]:
        COMMANDS[name] = _Command(run, **settings)
        return run

    return register


def parameters_of(function: Callable[..., Any], *, only_options: bool = False) -> list[click.Parameter]:
    """Return arguments and options derived from a signature and a numpydoc docstring."""
    described = _descriptions(function)
    metavars = getattr(function, "metavars", {})
    found: list[click.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD or name == "progress":
            continue
        text = inspect.formatannotation(parameter.annotation).strip("'")
        default = None if parameter.default is parameter.empty else parameter.default
        settings = _settings(text, default) | {"help": described.get(name)}
        settings |= {"metavar": metavars[name]} if metavars.get(name) else {}
        if parameter.kind is parameter.KEYWORD_ONLY or only_options:
            flags = [*([SHORT[name]] if name in SHORT else []), f"--{name.replace('_', '-')}", name]
            required = parameter.default is parameter.empty
            is_shown = default is not None and default is not False and default != ()
            found.append(click.Option(flags, required=required, show_default=is_shown, **settings))
        else:
            settings = {k: v for k, v in settings.items() if k not in ("multiple", "is_flag")}
            if text.startswith("list"):
                settings |= {"nargs": -1, "type": str, "default": None}
            found.append(click.Argument([name], required=parameter.default is parameter.empty, **settings))
    return found


def _settings(annotation: str, default: Any) -> dict[str, Any]:
    """Return the settings of a click parameter for an annotation."""
    members = {member.strip() for member in re.sub(r"\[.*\]", "[]", annotation).split("|")} - {"None"}
    choices = re.search(r"Literal\[(.*?)\]", annotation)
    if members == {"bool"}:
        return {"is_flag": True, "default": bool(default)}
    if "Sequence[" in annotation and "Path" in annotation:
        return {"multiple": True, "type": str}
    if "Sequence[str]" in annotation and "Mapping" not in annotation:
        return {"type": _List(), "default": None if default is None else ",".join(default)}
    if members == {"int", "str"} and default is None:
        return {"type": _Plane(), "default": default}
    if members in ({"int"}, {"float"}):
        return {"type": int if members == {"int"} else float, "default": default}
    names = re.findall(r"'(\w+)'", choices[1]) if choices else ()
    kind = click.Path(path_type=Path) if members == {"Path"} else str
    return {"type": kind, "default": default, **({"metavar": f"[{'|'.join(names)}]"} if names else {})}


class _List(click.ParamType):
    """Values separated by commas."""

    name = "A,B,…"

    def convert(self, value, param, ctx):
        """Split the text; an empty one is the default."""
        if not value:
            return None if param.default is None else []
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


class _Plane(click.ParamType):
    """Number of a plane, or max."""

    name = "N|max"

    def convert(self, value, param, ctx):
        """Return the number or "max"."""
        if str(value) != "max" and not str(value).isdigit():
            raise InputError(f"--{param.name} is '{value}'; expected the number of a plane, or max.")
        return int(value) if str(value).isdigit() else value


def _descriptions(function: Callable[..., Any]) -> dict[str, str]:
    """Return the first sentence of each parameter's description in a numpydoc docstring."""
    found = {}
    section = re.search(r"Parameters\n-+\n(.*?)(?:\n\n\w+\n-+|\Z)", inspect.getdoc(function) or "", flags=re.S)
    for names, text in re.findall(r"^(\S.*)\n((?:    .*\n?|\n)+)", section[1] + "\n" if section else "", flags=re.M):
        sentence = re.split(r"(?<=\.)\s+", " ".join(text.split()))[0].replace("`", "")
        found |= dict.fromkeys((name.strip("* ") for name in names.split(":")[0].split(",")), sentence)
    return found


class _Commands(click.Group):
    """Commands that are built when they are used. A `CellvimError` is reported as one line, bugs with a traceback."""

    def list_commands(self, ctx):
        return list(COMMANDS)

    def get_command(self, ctx, name):
        return COMMANDS[name].build(name) if name in COMMANDS else None

    def format_commands(self, ctx, formatter):
        with formatter.section("Commands"):
            formatter.write_dl([(name, one.help) for name, one in COMMANDS.items()])

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except CellvimError as error:
            print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
            raise click.exceptions.Exit(error.exit_code) from None
        except click.UsageError as error:
            path = "cellvim" if error.ctx is None else error.ctx.command_path
            print(f"Error: {' '.join(error.format_message().split())} See {path} --help.", file=sys.stderr)
            raise click.exceptions.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            raise click.exceptions.Exit(_interrupted(stop)) from None


app = _Commands(
    "cellvim",
    help="Turn microscopy plates (OME-Zarr) into embeddings (AnnData) with FastChannelVim.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    params=[
        click.Option(
            ["--version"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            help="Print the version.",
            callback=lambda ctx, _, wanted: wanted and (print(f"cellvim {__version__}"), ctx.exit()),
        )
    ],
)


# --- output on the terminal ---


def warn(line: str) -> None:
    """Print a highlighted warning to stderr."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("Warning: " + line, style="bold yellow"))


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Print each `CellvimWarning` as one line, and suppress warnings of other packages."""
    import warnings

    from cellvim.errors import CellvimWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", CellvimWarning)
        yield
    for warning in caught:
        warn(" ".join(str(warning.message).split()))


@contextmanager
def progress_bar(what: str, units: str = "") -> Iterator[Callable[..., None]]:
    """Yield a function of (done, total, rows) that updates a progress bar, which is shown on terminals only."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    rows = TextColumn("{task.fields[rows]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rows, TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None, rows="")

        def update(done: int, total: int, rows: int | None = None) -> None:
            bar.update(task, completed=done, total=total, rows="" if rows is None else f"{rows:,} {units}")

        yield update


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


# --- the commands ---


@command(
    "import",
    like="cellvim.data.importers:import_plate",
    omit=("source", "target", "resume", "verify", "workers"),
    names={"pixel_size_um": "pixel-size"},
)
def import_(source: Path, target: Path, **options: Any) -> None:
    """Make an OME-Zarr plate from a folder of TIFFs.

    Parameters
    ----------
    source
        Folder of images as written by the microscope.
    target
        The OME-Zarr plate to create.
    """
    from cellvim.channels import canonical_name
    from cellvim.data.importers import import_plate

    with progress_bar("Importing") as progress:
        plate = import_plate(source, target, **options, progress=progress)
    has_dna = any(canonical_name(name) == "DNA" for name in plate.channel_names)
    hint = "" if has_dna else " --channels DNA=NAME  (NAME: the channel that shows nuclei; or --unit tile)"
    print(
        f"{_count(len(plate.wells), 'well')}, {_count(len(plate.fields), 'field')}, "
        f"channels {', '.join(plate.channel_names)} → {target}\n"
        f"Next: cellvim embed {quote(str(target))} -o embeddings.zarr{hint}"
    )
    for note in plate.cellvim_attributes.get("notes", ()):
        print(f"Note: {note}.", file=sys.stderr)


@command("info")
def info(plate: str) -> None:
    """Describe a plate and its irregularities.

    Parameters
    ----------
    plate
        An OME-Zarr plate: folder, zip file or URL.
    """
    from cellvim.data.plate import describe, open_plate

    found = describe(open_plate(plate))
    pixel, wells = found["pixel_size_um"], found["wells"]
    per_well = ", ".join(f"{fields} in each of {_count(w, 'well')}" for fields, w in found["fields_per_well"].items())
    for name, value in {
        "plate": f"{found['name']} (OME-Zarr {found['ome_zarr_version']})",
        "wells": f"{found['n_wells']} ({wells[0] if len(wells) == 1 else f'{wells[0]} to {wells[-1]}'})",
        "fields": f"{found['n_fields']} ({per_well})",
        "channels": ", ".join(found["channel_names"]),
        "size": ", ".join(f"{size} ({_count(n, 'field')})" for size, n in found["sizes"].items()),
        "pixels": ", ".join(found["dtypes"]),
        "µm/px": "unknown" if pixel is None else f"{pixel:g}",
        "plate map": ", ".join(found["well_metadata_columns"]) or "none",
    }.items():
        print(f"{name:<10} {value}")
    for oddity in found["oddities"]:
        print(f"{'note':<10} {oddity}")


@command("embed")
@with_options(EmbeddingOptions, RunOptions)
def embed(plates: list[str], *, output: str = "embeddings.zarr", per_plate: bool = False, **options: Any) -> None:
    """Embed the cells, tiles or fields of plates into an AnnData; an interrupted run resumes.

    Parameters
    ----------
    plates
        OME-Zarr plates: folders, zip files or URLs.
    output
        Path or URL of the output: .zarr or .h5ad (AnnData), or .parquet.
    per_plate
        Write one output per plate into the folder --output.
    **options
        See `EmbeddingOptions` and `RunOptions`.
    """
    from cellvim.embedding.run import embed_plates

    if options["devices"]:
        options["device"] = options["devices"][0]
    embedding, run = split_options(options, EmbeddingOptions, RunOptions)
    failed = False
    with progress_bar("Embedding", f"{embedding.unit}s") as progress:
        for summary in embed_plates(plates, output, embedding, run, per_plate=per_plate, progress=progress):
            for remark in summary.remarks():
                warn(remark)
            print(summary)
            failed = failed or bool(summary.failed)
    if failed:
        raise click.exceptions.Exit(SOME_FAILED)


@command("status")
def status(output: str, *, json: bool = False) -> None:
    """Report the progress of a run of `cellvim embed`: running, interrupted or finished.

    Parameters
    ----------
    output
        The output of `cellvim embed`.
    json
        Print JSON.
    """
    from json import dumps

    from cellvim.embedding.status import describe, outputs_of, read_status

    found = [read_status(one) for one in outputs_of(output)]  # several with --per-plate
    if json:
        print(dumps(found[0] if len(found) == 1 else found, indent=1))
    else:
        print("\n\n".join(describe(one) for one in found))


@command(
    "profile",
    like="cellvim.profiles.pipeline:profile",
    omit=("source",),
    names={"aggregate_by": "by", "statistic": "aggregate", "select": "select-features"},
)
def profile(embeddings: list[str], *, output: Path = Path("profiles.h5ad"), **options: Any) -> None:
    """Make normalised profiles of wells from the embeddings of their cells.

    Parameters
    ----------
    embeddings
        AnnData (.zarr, .h5ad), tables, or folders of these.
    output
        The profiles: .h5ad, .zarr, .parquet or .csv.
    """
    from cellvim.profiles import pipeline

    options["statistic"] = None if options["statistic"] == "none" else options["statistic"]
    options["normalize"] = [] if options["normalize"] == ["none"] else options["normalize"]
    with warnings_shown(), progress_bar("Aggregating") as progress:
        profiles = pipeline.profile(embeddings, output, **options, progress=progress)
    made = [*profiles.layers, *profiles.obsm]
    print(
        f"{_count(profiles.n_obs, 'profile')} of {_count(profiles.n_vars, 'feature')}"
        f"{', normalised: ' + ', '.join(made) if made else ''} → {output}\nNext: cellvim evaluate {quote(str(output))}"
    )


@command("evaluate", like="cellvim.evaluate.evaluation:evaluate_profiles", omit=("adata",))
def evaluate(
    profiles: Path,
    *,
    output: Path | None = None,
    perturbation: str | None = None,
    dose: str | None = None,
    mechanism: str | None = None,
    plate: str | None = None,
    well: str | None = None,
    batch: str | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Evaluate profiles: retrieval, mechanisms, classification, batch effects, Z′, dose response.

    Parameters
    ----------
    profiles
        Profiles: .h5ad, .zarr or a table.
    output
        JSON file for the results.
    perturbation
        Column of perturbations. By default this and the other columns are found by their usual names.
    dose
        Column of doses.
    mechanism
        Column of mechanisms of action.
    plate, well, batch
        Column of plates, wells or batches.
    overwrite
        Replace an existing output.
    """
    from rich.console import Console

    from cellvim.evaluate.evaluation import evaluate_profiles, summary_tables
    from cellvim.profiles import read_profiles

    if output is not None and output.exists() and not overwrite:
        raise InputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if output is not None and (output.is_dir() or not os.access(output.absolute().parent, os.W_OK)):
        raise InputError(f"{output} cannot be written: it is a folder, or its folder does not exist or is read-only.")
    columns = {"perturbation": perturbation, "dose": dose, "mechanism": mechanism}
    columns |= {"plate": plate, "well": well, "batch": batch}
    with warnings_shown(), progress_bar("Evaluating") as progress:
        result = evaluate_profiles(read_profiles(profiles), **options, **columns, progress=progress)
    console = Console()
    if not console.is_terminal:
        console.width = 120  # rich assumes 80 columns for files and pipes
    for table in summary_tables(result):
        console.print(table)
        console.print()
    roles = ("plate", "well", "batch", "perturbation", "dose", "mechanism", "pert_type")
    print(f"Columns: {', '.join(f'{role} {c}' for role in roles if (c := result.settings['columns'][role]))}")
    for row in result.left_out.itertuples():
        print(f"Not computed: {row.task}: {row.reason}")
    if output is not None:
        result.save(output)
        print(f"Wrote {output}")


@command("report", like="cellvim.report:write_report", omit=("embeddings",))
def report(
    embeddings: Path,
    *,
    output: Path = Path("report.html"),
    perturbation: str | None = None,
    dose: str | None = None,
    mechanism: str | None = None,
    **options: Any,
) -> None:
    """Summarise embeddings on one HTML page: plates, a map with crops, controls, activity, dose response.

    Parameters
    ----------
    embeddings
        Output of `cellvim embed` or another .h5ad or .zarr.
    output
        The page.
    perturbation
        Column of perturbations. By default this and the other columns are found by their usual names.
    dose
        Column of doses.
    mechanism
        Column of mechanisms of action.
    """
    from cellvim.report import write_report

    columns = {"perturbation": perturbation, "dose": dose, "mechanism": mechanism}
    with progress_bar("Reporting") as progress:
        summary = write_report(embeddings, output, **options, **columns, progress=progress)
    for remark in summary.remarks:
        warn(remark)
    print(summary)


ATTRIBUTE_OPTIONS = ("model", "unit", "channels", "crop_size", "cells", "device", "seed")


@command("attribute", like="cellvim.attribution.crop:explain_crop", omit=("plan",))
@with_options(EmbeddingOptions, only=ATTRIBUTE_OPTIONS)
def attribute(
    plate: str, *, output: Path = Path("attribution.png"), well: str, overwrite: bool = False, **options: Any
) -> None:
    """Show which patches and channels of a crop contribute most to its embedding, or to a class.

    Parameters
    ----------
    plate
        An OME-Zarr plate: folder, zip file or URL.
    output
        The picture: .png, .pdf or .svg.
    well
        The well of the crop, such as B03.
    overwrite
        Replace an existing output.
    **options
        See `EmbeddingOptions`.
    """
    from cellvim.attribution.crop import explain_crop
    from cellvim.attribution.picture import check_picture, save_picture
    from cellvim.embedding.plan import plan_embedding

    check_picture(output, overwrite=overwrite)
    plan = plan_embedding(plate, **{name: options.pop(name) for name in ATTRIBUTE_OPTIONS})
    explained = explain_crop(plan, well, **options)
    for remark in explained.remarks:
        warn(remark)
    save_picture(explained.figure, output)
    print(f"{explained.summary} → {output}")


@command("train", settings={"context_settings": {"ignore_unknown_options": True, "help_option_names": []}})
def train(arguments: list[str] = ()) -> None:  # parses its own options
    """Train a model: a recipe, a configuration, or your own plate and a column of labels."""
    from cellvim.train.recipes import USAGE, recipe_descriptions

    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    if "--list" in arguments:
        for name, description in recipe_descriptions().items():
            print(f"{name:<34} {description}")
        return
    try:
        from cellvim.train.training import train
    except ModuleNotFoundError as error:
        raise InputError(f"Training requires {error.name}. Install it: pip install 'cellvim[train]'") from error
    model = train([a if a != "--help_all" else "--help" for a in arguments])
    if model is not None:
        print(f"{model}\nNext: cellvim embed PLATE.zarr -o embeddings.zarr --model {quote(str(model))}")


@command("models")
def models(name: str | None = None) -> None:
    """List the available models with their number of parameters and operations.

    Parameters
    ----------
    name
        List only this family, or show the card of a trained model.
    """
    from rich.console import Console
    from rich.table import Table

    from cellvim.models.checkpoints import model_card, shipped_models
    from cellvim.models.flops import count_flops, count_parameters
    from cellvim.models.registry import DESCRIPTIONS, FAMILIES, list_models, model_config

    if name in shipped_models():
        print(model_card(name))
        return
    if name is not None and name not in FAMILIES:
        raise ModelError(f"The family {name!r} is not known; expected {listing(FAMILIES)}.{suggestion(name, FAMILIES)}")
    for family in FAMILIES if name is None else (name,):
        table = Table("name", title=f"{family}: {DESCRIPTIONS[family]}", title_justify="left", box=None)
        for column in ("blocks × width", "parameters", "operations"):
            table.add_column(column, justify="right")
        for model in (n for n in list_models() if n.split("_")[0] == family):
            config = model_config(model)
            parameters, operations = count_parameters(config) / 1e6, count_flops(config)["total"] / 1e9
            table.add_row(model, f"{config.depth} × {config.embed_dim}", f"{parameters:,.1f} M", f"{operations:,.2f} G")
        Console().print(table, "")
    print(
        "Operations for one image of 224 × 224 pixels with 3 channels, or 8 with per-channel tokens (docs/models.md)."
    )
    print("Other patch sizes are possible, as in fastvim_tiny_patch14.")
    print("These names give random weights. `cellvim embed --model` takes the path of a trained checkpoint, or the")
    print("name of a trained model that ships with CellVim:")
    for model, path in shipped_models().items():
        print(f"  {model}  TRAINED, {path.stat().st_size / 1e6:.1f} MB (card: cellvim models {model})")


@command("backends")
def backends() -> None:
    """List the backends of the kernels and their availability on this machine."""
    from cellvim.ops.dispatch import describe_backends

    for backend in describe_backends():
        state = "selected" if backend.selected else "available" if backend.available else "not available"
        print(f"{backend.name:<12} {state:<14} {backend.reason}")


@command("datasets")
def datasets(name: str | None = None) -> None:
    """List the documented datasets and those that ship with CellVim.

    Parameters
    ----------
    name
        Show the card of this dataset.
    """
    from cellvim.data.bundled import bundled_dataset, bundled_datasets

    if name is not None:
        print((bundled_dataset(name) / "card.md").read_text(encoding="utf-8"))
        return
    for known, folder in bundled_datasets().items():
        heading = (folder / "card.md").read_text(encoding="utf-8").partition("\n")[0]
        title = heading.lstrip("# ").partition(": ")[2] or known
        print(f"{known:<20} {'included' if (folder / 'images').is_dir() else 'to download':<14} {title}")
    print("`cellvim datasets NAME` shows the card: source, licence, channels, download.")


@command("demo")
def demo(*, output: Path = Path("demo"), overwrite: bool = False) -> None:
    """Run the main steps on a small real plate: import, embed, inspect the result.

    Parameters
    ----------
    output
        Folder for the results.
    overwrite
        Repeat all steps and replace existing results.
    """
    from cellvim.demo import run_demo

    run_demo(output, overwrite=overwrite, say=print, warn=warn, progress=progress_bar)


if __name__ == "__main__":
    sys.exit(main())
