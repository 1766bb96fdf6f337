"""`cellvim report`: everything about a plate's embeddings on one HTML page that asks no network for anything."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cellvim
from cellvim.errors import InputError, OutputError
from cellvim.report import sections
from cellvim.report.encoding import to_json

if TYPE_CHECKING:
    from anndata import AnnData

    from cellvim.evaluate.evaluation import Evaluation

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = (
    *("data.js", "colors.js", "tip.js", "crops.js", "platemaps.js", "cells.js", "inspect.js"),
    *("neighbours.js", "tables.js", "main.js"),
)


@dataclass(frozen=True)
class ReportSummary:
    """What a page holds.

    Attributes
    ----------
    output
        The page.
    n_rows, n_shown, n_crops
        Rows of the AnnData, those on the map, and crops.
    n_bytes
        Size of the page.
    seconds
        How long it took.
    remarks
        What the user must know, a line each.
    """

    output: Path
    n_rows: int
    n_shown: int
    n_crops: int
    n_bytes: int
    seconds: float
    remarks: list[str]

    def __str__(self) -> str:
        return (
            f"{self.n_rows:,} rows, {self.n_shown:,} on the map, {self.n_crops:,} crops, "
            f"{self.n_bytes / 1e6:.1f} MB in {self.seconds:.1f} s → {self.output}"
        )


def write_report(
    embeddings: str | Path | AnnData,
    output: str | Path = "report.html",
    *,
    plate: str | Path | Sequence[str | Path] = (),
    profiles: str | Path | AnnData | None = None,
    evaluation: str | Path | Evaluation | None = None,
    color_by: str | None = None,
    title: str | None = None,
    max_cells: int | None = None,
    control: str = "negcon",
    positive: str = "poscon",
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **columns: str | None,
) -> ReportSummary:
    """Write a report of embeddings as one self-contained HTML page.

    Parameters
    ----------
    embeddings
        Rows are cells (tiles, fields): an AnnData, or the path of one.
    output
        The page to write.
    plate
        Plates to cut crops from, where they are no longer where they were embedded.
    profiles
        Profiles of the wells as `cellvim.profile` makes them; made here if None.
    evaluation
        What ``cellvim evaluate`` wrote; computed here if None.
    color_by
        Column of ``obs`` that colours the map at first.
    title
        Of the page; the name of the plate by default.
    max_cells
        Cells that are laid out by UMAP at most; 20,000 by default. Coordinates in ``obsm["X_umap"]`` are taken as they
        are.
    control, positive
        Values of the column of controls, or COLUMN:VALUE.
    seed
        Of what is drawn.
    overwrite
        Replace ``output`` when it exists.
    progress
        Takes the parts done and their number.
    **columns
        ``plate``, ``well``, ``batch``, ``perturbation``, ``dose``, ``mechanism`` or ``pert_type``: names of columns of
        ``obs`` (``plate`` as ``plate_column``); found by their usual names if not given.

    Returns
    -------
    ReportSummary

    Raises
    ------
    CellvimError
        Something given cannot be used, or the page cannot be written. What is merely missing is said on the page.
    """
    from cellvim.report.embedding_map import MAX_CELLS
    from cellvim.report.source import open_source

    start = time.perf_counter()
    output = Path(output)
    check_page(output, overwrite=overwrite)
    if max_cells is not None and max_cells < 1:
        raise InputError(f"The map is of {max_cells} cells; expected at least 1.")
    if "plate_column" in columns:
        columns["plate"] = columns.pop("plate_column")
    columns = {name: value for name, value in columns.items() if value is not None}
    paths = [plate] if isinstance(plate, str | Path) else list(plate)
    with open_source(embeddings, negative=control, positive=positive, **columns) as source:
        content, data, summary = sections.make(
            source,
            embeddings,
            paths=[str(path) for path in paths],
            profiles=profiles,
            evaluation=evaluation,
            color_by=color_by,
            title=title,
            max_cells=MAX_CELLS if max_cells is None else max_cells,
            seed=seed,
            progress=progress or (lambda done, total: None),
            columns={"negative": control, "positive": positive, **columns},
        )
    page = render(content, data)
    _write(output, page)
    return ReportSummary(output=output, n_bytes=len(page.encode()), seconds=time.perf_counter() - start, **summary)


def render(content: dict[str, Any], data: dict[str, Any]) -> str:
    """Put a page together.

    Parameters
    ----------
    content
        What the template shows; every text in it is escaped.
    data
        What the page's script draws from.

    Raises
    ------
    InputError
        jinja2 is not installed.
    """
    try:
        import jinja2
    except ImportError as error:
        raise InputError("A report needs jinja2. Install it: pip install 'cellvim[report]'") from error

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css = (TEMPLATES / "report.css").read_text("utf-8")
    script = '"use strict";\n' + "\n".join((TEMPLATES / name).read_text("utf-8") for name in SCRIPTS)
    return (
        environment.get_template("report.html")
        .render(
            **content,
            css=css,
            script=script,
            data=to_json(data),
            policy=_policy(css, script),
            version=cellvim.__version__,
            made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        )
        .lstrip()
    )


def check_page(output: Path, *, overwrite: bool) -> None:
    """Raise when the page exists and may not be replaced, or its folder is not there.

    Raises
    ------
    OutputError
    """
    if output.is_dir():
        raise OutputError(f"{output} is a folder; expected the name of a page, such as {output / 'report.html'}.")
    if output.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{output} is no name of a page; expected .html at its end.")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"The folder {output.parent} for the page does not exist.")


def _policy(css: str, script: str) -> str:
    """Return the page's content security policy: nothing from elsewhere, and no style or script but our own."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'"

    return f"default-src 'none'; img-src data:; style-src {digest(css)}; script-src {digest(script)}; base-uri 'none'"


def _write(output: Path, page: str) -> None:
    partial = output.with_name(f".{output.name}.partial")
    try:
        partial.write_text(page, "utf-8")
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{output} cannot be written: {error.strerror or error}.") from error
