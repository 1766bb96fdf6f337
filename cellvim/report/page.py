"""`cellvim report`: embeddings summarised on one HTML page that works offline."""

from __future__ import annotations

import base64
import gzip
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import cellvim
from cellvim.errors import ChannelError, InputError, OutputError, PlateError
from cellvim.files import write_atomic
from cellvim.report.projection import MAX_CELLS, project_cells
from cellvim.report.record import untrained_warning

if TYPE_CHECKING:
    from anndata import AnnData

    from cellvim.evaluate.evaluation import Evaluation

TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class ReportSummary:
    """Summary of a report.

    Attributes
    ----------
    output
        Path of the page.
    n_rows, n_shown, n_crops
        Number of rows of the AnnData, of cells on the map, and of crops.
    n_bytes
        Size of the page.
    seconds
        Elapsed time.
    remarks
        Warnings for the user.
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
    """Write a report on embeddings as one self-contained HTML page.

    Parameters
    ----------
    embeddings
        AnnData with one row per cell (tile, field), or its path.
    output
        Path of the page.
    plate
        Plate or plates to cut crops from, if they were moved after embedding.
    profiles
        Well profiles, as written by ``cellvim profile``; computed from the embeddings by default.
    evaluation
        Result of ``cellvim evaluate``; computed from the profiles by default.
    color_by
        Column of ``obs`` that colours the map initially.
    title
        Title of the page; the name of the plate by default.
    max_cells
        Maximum number of cells for UMAP; 20,000 by default. Coordinates in ``obsm["X_umap"]`` are used as they are.
    control
        Value of the control column for negative controls, or COLUMN:VALUE.
    positive
        Value of the control column for positive controls, or COLUMN:VALUE.
    seed
        Random seed for samples and for UMAP.
    overwrite
        Replace ``output`` if it exists.
    progress
        Function that receives the number of completed parts and their total number.
    **columns
        ``plate``, ``well``, ``batch``, ``perturbation``, ``dose``, ``mechanism`` or ``pert_type``: names of columns of
        ``obs`` (``plate`` as ``plate_column``); found by their usual names if not given.

    Returns
    -------
    ReportSummary

    Raises
    ------
    CellvimError
        An input is invalid, or the page cannot be written. Missing parts do not raise: the page states the reason.
    """
    try:
        import jinja2  # noqa: F401  # for `render`

        from cellvim.report.sections import Sections
    except ImportError as error:
        raise InputError("A report requires Bokeh and Jinja2. Install it: pip install 'cellvim[report]'") from error
    from cellvim.report.findings import find
    from cellvim.report.source import open_source
    from cellvim.report.thumbnails import make_thumbnails

    start = time.perf_counter()
    output = Path(output)
    check_page(output, overwrite=overwrite)
    if max_cells is not None and max_cells < 1:
        raise InputError(f"max_cells is {max_cells}; expected at least 1.")
    if "plate_column" in columns:
        columns["plate"] = columns.pop("plate_column")
    columns = {name: value for name, value in columns.items() if value is not None}
    columns |= {"negative": control, "positive": positive}
    paths = [str(p) for p in ([plate] if isinstance(plate, str | Path) else plate)]
    progress = progress or (lambda done, total: None)
    with open_source(embeddings, **columns) as source:
        found = find(source, embeddings, profiles=profiles, evaluation=evaluation, seed=seed, **columns)
        progress(1, 4)
        try:
            thumbnails = make_thumbnails(source, paths, seed=seed)
        except (PlateError, ChannelError):  # of a plate that the user named
            raise
        except InputError as error:
            thumbnails = error
        try:
            projection = project_cells(
                source.store.take,
                source.wells(),
                existing=source.matrix("X_umap"),
                keep=getattr(thumbnails, "rows", None),
                max_cells=MAX_CELLS if max_cells is None else max_cells,
                seed=seed,
            )
        except InputError as error:
            projection = error
        progress(2, 4)
        sections = Sections(source, found, projection, thumbnails, color_by, seed)
        content = sections.content(title)
        progress(3, 4)
        n_rows = source.n_rows
    page = render(content, sections.data)
    write_atomic(output, page)
    progress(4, 4)
    no_crops = content["crops"]["missing"]
    warning = untrained_warning(source.uns)
    return ReportSummary(
        output=output,
        n_rows=n_rows,
        n_shown=len(getattr(projection, "rows", ())),
        n_crops=len(getattr(thumbnails, "rows", ())),
        n_bytes=len(page.encode()),
        seconds=time.perf_counter() - start,
        remarks=([warning] if warning else []) + ([f"No crops: {no_crops}"] if no_crops else content["crops"]["notes"]),
    )


def render(content: dict[str, Any], data: dict[str, Any]) -> str:
    """Return the page.

    Its content security policy permits no network access, and only the page's own scripts and styles: scripts by their
    hash, styles also by a nonce, which is set on the style elements that BokehJS creates. BokehJS is compressed in the
    page and decompressed by the page's script.

    Parameters
    ----------
    content
        Values for the template, which escapes all text.
    data
        Values for the page's script.
    """
    import bokeh
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css, script = ((TEMPLATES / name).read_text("utf-8") for name in ("report.css", "report.js"))
    library = (Path(bokeh.__file__).parent / "server" / "static" / "js" / "bokeh.min.js").read_bytes()
    encoded = to_json(data)
    nonce = _digest(encoded.encode())
    policy = (
        f"default-src 'none'; img-src data:; style-src 'nonce-{nonce}'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{_digest(script.encode())}' 'sha256-{_digest(library)}'"
    )
    page = environment.get_template("report.html").render(
        **content,
        css=css,
        library=base64.b64encode(gzip.compress(library, mtime=0)).decode(),
        script=script,
        data=encoded,
        nonce=nonce,
        policy=policy,
        version=cellvim.__version__,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return page.lstrip()


def to_json(data: Any) -> str:
    """Return JSON for a ``<script>`` element, without the characters ``<``, ``>`` and ``&``.

    Parameters
    ----------
    data
        Dicts, lists, strings, numbers (NaN and infinity become null), NumPy scalars and arrays (become lists).
    """
    text = json.dumps(_plain(data), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def check_page(output: Path, *, overwrite: bool) -> None:
    """Raise if the page cannot be written.

    Raises
    ------
    OutputError
        The page exists and ``overwrite`` is off, its name is not that of a page, or its folder does not exist.
    """
    if output.is_dir():
        raise OutputError(f"{output} is a folder; expected the name of a page, such as {output / 'report.html'}.")
    if output.suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"{output} is not the name of a page; expected a name that ends with .html.")
    if output.exists() and not overwrite:
        raise OutputError(f"{output} exists already. Choose another --output, or replace it with --overwrite.")
    if not output.absolute().parent.is_dir():
        raise OutputError(f"The folder {output.parent} for the page does not exist.")


def _digest(data: bytes) -> str:
    return base64.b64encode(sha256(data).digest()).decode()


def _plain(data: Any) -> Any:
    if isinstance(data, dict):
        return {str(key): _plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_plain(value) for value in data]
    if isinstance(data, np.ndarray | np.generic):
        return _plain(data.tolist())
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    return data if data is None or isinstance(data, bool | int) else str(data)
