"""Content of the page, reasons for missing sections, and escaping of names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import anndata
import numpy as np
import pytest
from html_page import Page
from report_rows import CELLS_EACH, CLOSING, HOSTILE, QUOTES, SCRIPT, WELLS, make_embeddings
from synthetic_plate import break_chunk, draw_field, write_plate

import cellvim
from cellvim.cli import main
from cellvim.errors import CellvimError, InputError, OutputError, PlateError
from cellvim.report import write_report

N_CELLS = CELLS_EACH * len(WELLS)


@pytest.fixture
def make(tmp_path):
    """Write a report and read it back: (page, summary, HTML)."""
    count = iter(range(99))

    def make(source, **options):
        path = tmp_path / f"report{next(count)}.html"
        summary = write_report(source, path, **options)
        html = path.read_text("utf-8")
        return Page(html), summary, html

    return make


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """The page of a plate with all sections: (page, summary, HTML)."""
    folder = tmp_path_factory.mktemp("complete")
    plate = write_plate(
        folder / "plate.zarr", {well: [draw_field(i, 6)] for i, well in enumerate(WELLS)}, ["DNA", "GFP"]
    )
    summary = write_report(make_embeddings(plate), folder / "report.html")
    html = (folder / "report.html").read_text("utf-8")
    return Page(html), summary, html


def test_every_section_has_content(complete):
    page, summary, _ = complete
    assert page.sections["header"].count("UNTRAINED") == 1
    assert summary.n_rows == summary.n_shown == summary.n_crops == N_CELLS
    assert "too few for UMAP" in page.sections["map"]
    assert f"{N_CELLS} crops of 32 px (16 µm)" in page.sections["map"]
    assert "logistic regression on 15 cells of 5 wells" in page.sections["controls"]
    assert "Z′" in page.sections["controls"] and "robust z scores" not in page.sections["controls"]
    assert "mAP" in page.sections["activity"] and "All measures" in page.sections["activity"]
    assert "EC50" in page.sections["doses"]
    assert "Cosine similarity" in page.sections["neighbors"]
    assert "ab" * 32 in page.sections["record"] and "1300" in page.sections["record"]
    assert f"unreadable {SCRIPT}" in page.sections["failures"]
    assert not [a for a in page.tags("p") if a.get("class") == "absent"]


def test_values_match_the_rows(complete):
    page, _, _ = complete
    adata = make_embeddings()
    (plate,) = page.data["plates"]["list"]
    measures = [measure["label"] for measure in page.data["plates"]["measures"]]
    assert (plate["rows"], plate["columns"]) == (8, 12)
    assert {well["name"] for well in plate["wells"]} == set(WELLS)
    assert plate["values"][measures.index("Cells")] == [CELLS_EACH] * len(WELLS)
    focus = adata.obs.groupby("Metadata_Well", observed=True)["qc_focus"].mean()
    drawn = dict(zip([w["name"] for w in plate["wells"]], plate["values"][measures.index("Focus")], strict=True))
    assert drawn == pytest.approx(focus.to_dict(), rel=1e-4)
    marks = {well["name"]: well["mark"] for well in plate["wells"]}
    assert marks == {w: {"negcon": "negative", "poscon": "positive"}.get(k, "") for w, (k, *_) in WELLS.items()}
    assert {"Activity", "Distance from controls", "mAP of the treatment"} <= set(measures)


def test_activity_and_precision_match_cellvim_evaluate(complete):
    from cellvim.evaluate.evaluation import evaluate_profiles
    from cellvim.profiles import profile

    page, _, _ = complete
    profiles = profile(make_embeddings())
    found = evaluate_profiles(profiles, tasks=["retrieval", "assay"])
    measures = [measure["label"] for measure in page.data["plates"]["measures"]]
    (plate,) = page.data["plates"]["list"]
    activity = found.tables["activity"].set_index("row")["activity"]
    drawn = plate["values"][measures.index("Activity")]
    expected = [activity[f"plate__{well['name']}"] for well in plate["wells"]]
    np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5)
    precision = found.tables["retrieval"].set_index("compound")["mean_average_precision"]
    drawn = dict(
        zip([w["name"] for w in plate["wells"]], plate["values"][measures.index("mAP of the treatment")], strict=True)
    )
    of_dose_2 = found.tables["retrieval"].query("features == 'robustmad'").set_index(["compound", "dose"])
    assert drawn["D01"] == pytest.approx(of_dose_2.loc[(QUOTES, 2.0), "mean_average_precision"], rel=1e-4)
    assert drawn["A01"] is None and len(precision)


def test_names_are_escaped(complete):
    """No other scripts and no event attributes; names are text, and the JSON of the data contains them unchanged."""
    page, _, html = complete
    assert [a.get("type") for a in page.tags("script")] == ["application/json", "application/gzip", None]
    assert not page.tags("img")
    assert all(not attributes for attributes in page.tags("b"))  # those of the tiles
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "<script>window" not in html and "</script><img" not in html and "<b onmouseover" not in html
    assert SCRIPT in page.sections["activity"] or SCRIPT in page.sections["doses"]
    categories = next(c["categories"] for c in page.data["map"]["columns"] if c["name"] == "compound")
    assert set(categories) == {*HOSTILE, "DMSO"}
    assert {one["name"] for one in page.data["neighbors"]["list"]} == {*HOSTILE, "DMSO"}
    assert not set(re.findall(r"[<>&\u2028]", page.scripts[0]))


@pytest.mark.parametrize("name", HOSTILE)
def test_names_of_wells_plates_channels_and_columns(make, tmp_path, name):
    plate = write_plate(tmp_path / "p.zarr", {"A01": [draw_field(0, 6)], "A02": [draw_field(1, 6)]}, ["DNA", name])
    adata = make_embeddings(plate, channels=["DNA", name])
    adata = adata[adata.obs["Metadata_Well"].isin(["A01", "A02", "C01"])].copy()
    adata.obs["Metadata_Plate"] = name
    adata.obs["Metadata_Well"] = adata.obs["Metadata_Well"].astype(object).replace({"C01": name})
    adata.obs[name] = 1.5
    adata.uns["cellvim"]["unit"] = "cell"
    page, _, html = make(adata, title=name, color_by=name)
    assert len(page.tags("script")) == 3 and "window.pwned=1>" not in html.replace("window.pwned=1&gt;", "")
    assert name in page.sections["header"] and name in page.sections["record"]
    assert page.data["map"]["columns"][page.data["map"]["initial"]]["name"] == name
    assert all(not attribute.startswith("on") for _, attributes in page.elements for attribute in attributes)


def test_the_page_needs_no_network(complete):
    page, _, html = complete
    (policy,) = [a["content"] for a in page.tags("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    for tag, attributes in page.elements:
        for name in ("src", "href", "action", "data", "poster"):
            assert not attributes.get(name) or attributes[name].startswith("#"), (tag, attributes)
    code = html.split("<script>")[1]
    assert not re.search(
        r"\bfetch\(|XMLHttpRequest|import\(|url\(|@import", code + html.split("<style")[1].split("</style>")[0]
    )


def test_the_policy_permits_only_the_scripts_and_styles_of_the_page(complete):
    import base64
    import gzip
    from hashlib import sha256

    page, _, _ = complete
    (policy,) = [a["content"] for a in page.tags("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    _, library, script = page.scripts
    for code in (gzip.decompress(base64.b64decode(library)), script.encode()):
        assert base64.b64encode(sha256(code).digest()).decode() in policy
    (style,) = page.tags("style")
    assert f"style-src 'nonce-{style['nonce']}'" in policy and len(style["nonce"]) > 40
    assert not [attributes for _, attributes in page.elements if "style" in attributes]  # the policy forbids them


def test_the_page_is_reproducible(complete, make, plate):
    embeddings = make_embeddings(plate)
    embeddings.uns["cellvim"]["plate"]["path"] = "somewhere"
    parts = [
        re.sub(r"on \d{4}-\d\d-\d\d \d\d:\d\d UTC", "", html)
        for html in (complete[2], make(embeddings, plate=plate)[2])
    ]
    parts = [re.sub(r"path</dt><dd>.*?</dd>", "", part) for part in parts]
    assert parts[0] == parts[1]


# --- missing sections state the reason


def _absent(page: Page, section: str) -> str:
    return page.sections[section]


def test_nothing_but_embeddings(make):
    bare = anndata.AnnData(np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32))
    page, summary, _ = make(bare)
    assert "does not record whether the weights were trained" in page.sections["header"]
    assert "column" in page.sections["plates"] and "well" in page.sections["plates"].lower()
    assert "There is no column to colour by" in page.sections["map"] and "No crops" in page.sections["map"]
    assert "No column of controls" in page.sections["controls"]
    for section in ("activity", "doses", "neighbors"):
        assert len(page.sections[section].strip()) > 40, section
    assert "no provenance" in page.sections["record"]
    assert summary.n_shown == 20 and summary.n_crops == 0


def test_no_rows(make, embeddings):
    page, summary, _ = make(embeddings[:0].copy())
    assert summary.n_rows == 0 and "no rows" in page.sections["header"]
    for section in ("plates", "map", "controls", "activity", "doses", "neighbors"):
        assert "rows" in page.sections[section], section


def test_one_cell(make, embeddings):
    page, summary, _ = make(embeddings[:1].copy())
    assert summary.n_rows == summary.n_shown == 1
    assert "too few for UMAP" in page.sections["map"]
    assert "not scaled" in page.sections["plates"] or "fewer" in page.sections["plates"]


def test_values_that_are_not_finite(make, embeddings):
    embeddings.X[3:5] = np.nan
    embeddings.X[7, 2] = np.inf
    embeddings.obs["qc_focus"] = np.nan
    page, summary, _ = make(embeddings)
    assert summary.n_shown == N_CELLS - 3
    assert "3 cells are excluded" in page.sections["map"]
    assert "3 cells" in page.sections["controls"]
    assert "Not available as colours: qc_focus (no values)" in page.sections["map"]
    embeddings.X[:] = np.nan
    page, summary, _ = make(embeddings)
    assert summary.n_shown == 0 and "No cell has finite values" in page.sections["map"]


def test_no_controls(make, embeddings):
    embeddings.obs["Metadata_pert_type"] = "trt"
    page, _, _ = make(embeddings)
    assert "'Metadata_pert_type' is never 'negcon'" in page.sections["controls"]
    labels = [measure["label"] for measure in page.data["plates"]["measures"]]
    assert "Distance from the plate's center" in labels and "Distance from controls" not in labels
    assert "--control" in page.sections["controls"]
    assert "scaled by all wells" in page.sections["plates"]
    assert "No row is a negative control" in page.sections["activity"]


def test_no_doses_and_no_perturbations(make, embeddings):
    del embeddings.obs["dose"], embeddings.obs["compound"]
    page, _, _ = make(embeddings)
    assert "No column of the dose" in page.sections["doses"]
    assert (
        "--perturbation" in page.sections["neighbors"] and "No column of the perturbation" in page.sections["activity"]
    )


def test_columns_can_be_named(make, embeddings):
    embeddings.obs = embeddings.obs.rename(columns={"compound": "what was done", "Metadata_pert_type": "role"})
    page, _, _ = make(embeddings, perturbation="what was done", control="role:negcon", positive="role:poscon")
    assert "5 wells" in page.sections["controls"]
    assert "what was done" in page.sections["activity"]
    with pytest.raises(CellvimError, match="no column 'nothing'"):
        make(embeddings, dose="nothing")


# --- plates


def test_a_plate_that_was_moved(make, plate, tmp_path):
    page, summary, _ = make(make_embeddings(tmp_path / "gone.zarr"))
    assert summary.n_crops == 0 and "crops" not in page.data
    assert f"no longer at {tmp_path / 'gone.zarr'}" in page.sections["map"] and "--plate" in page.sections["map"]
    assert any("--plate" in remark for remark in summary.remarks)
    _, summary, _ = make(make_embeddings(tmp_path / "gone.zarr"), plate=plate)
    assert summary.n_crops == N_CELLS


def test_a_plate_with_other_wells(make, tmp_path):
    other = write_plate(tmp_path / "plate.zarr", {"A01": [draw_field(0, 4)], "H12": [draw_field(1, 4)]}, ["DNA", "GFP"])
    page, summary, _ = make(make_embeddings(other))
    assert summary.n_crops == CELLS_EACH
    assert "The plate has no field for A02" in page.sections["map"]


def test_a_plate_with_another_name_is_noted(make, tmp_path):
    other = write_plate(tmp_path / "stranger.zarr", {"A01": [draw_field(0, 4)]}, ["DNA", "GFP"])
    page, _, _ = make(make_embeddings(other))
    assert "the crops from a plate called stranger" in page.sections["map"]


def test_fields_that_cannot_be_read(make, tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", {w: [draw_field(i, 4)] for i, w in enumerate(WELLS)}, ["DNA", "GFP"])
    break_chunk(plate, "A01")
    page, summary, _ = make(make_embeddings(plate))
    assert summary.n_crops == N_CELLS - CELLS_EACH
    assert "1 fields could not be read. First: Field A01/0" in page.sections["map"]


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
def test_embeddings_of_several_plates(make, tmp_path):
    """Crops are from both plates, channels from the record, and failures are listed."""
    plates = [
        write_plate(tmp_path / f"p{i}.zarr", {"A01": [draw_field(i, 5)], "A02": [draw_field(9, 4)]}, ["DNA", "GFP"])
        for i in range(2)
    ]
    break_chunk(plates[1], "A02")
    model = cellvim.create_model(
        "fastchannelvim_tiny_patch16",
        image_size=32,
        depth=1,
        in_channels=2,
        channel_names=("DNA", "GFP"),
        num_classes=0,
    )
    adata = cellvim.embed(plates, model=model)
    page, summary, _ = make(adata)
    assert summary.n_crops == adata.n_obs == 14
    assert {name.split()[0] for name in page.data["crops"]["names"]} == {"p0", "p1"}
    assert [c["name"] for c in page.data["crops"]["channels"]] == ["DNA", "GFP"]
    assert "use the scaling of p0" in page.sections["map"]
    assert "A02/0" in page.sections["failures"] and "p1" in page.sections["failures"]


def test_an_invalid_plate_is_an_error(make, embeddings, tmp_path):
    with pytest.raises(PlateError, match="does not exist"):
        make(embeddings, plate=tmp_path / "nothing.zarr")


def test_a_plate_without_the_channel_is_an_error(make, tmp_path):
    plate = write_plate(tmp_path / "plate.zarr", {w: [draw_field(0, 4)] for w in WELLS}, ["DNA", "RNA"])
    with pytest.raises(CellvimError, match="'GFP' is not in plate"):
        make(make_embeddings(plate), plate=plate)
    page, _, _ = make(make_embeddings(plate))  # not named by the user: the page states the reason
    assert "'GFP' is not in plate.zarr" in page.sections["map"]


@pytest.mark.parametrize("n_channels", [1, pytest.param(12, marks=pytest.mark.slow)])
def test_any_number_of_channels(make, tmp_path, n_channels):
    names = [f"c{i}" for i in range(n_channels)]
    fields = {well: [draw_field(i, 4, n_channels=n_channels)] for i, well in enumerate(WELLS)}
    plate = write_plate(tmp_path / "plate.zarr", fields, names)
    page, summary, _ = make(make_embeddings(plate, channels=names))
    assert summary.n_crops == N_CELLS and len(page.data["crops"]["sheets"]) == n_channels
    colors = [channel["color"] for channel in page.data["crops"]["channels"]]
    assert all(re.fullmatch("[0-9A-F]{6}", color) for color in colors)
    assert len(set(colors)) >= min(n_channels, 8)


# --- given results are used


def test_given_profiles_and_evaluation_are_used(make, embeddings, tmp_path):
    from cellvim.evaluate.evaluation import evaluate_profiles
    from cellvim.profiles import profile

    profiles = profile(embeddings, tmp_path / "profiles.h5ad", normalize=["standardize"])
    evaluate_profiles(profiles, tasks=["retrieval"]).save(tmp_path / "evaluation.json")
    page, _, _ = make(embeddings, profiles=tmp_path / "profiles.h5ad", evaluation=tmp_path / "evaluation.json")
    assert "from standardized" in page.sections["activity"]
    assert "It was not computed" in page.sections["doses"]
    (tmp_path / "evaluation.json").write_text("{}")
    with pytest.raises(InputError, match="not an evaluation"):
        make(embeddings, evaluation=tmp_path / "evaluation.json")


def test_stored_coordinates_are_used(make, embeddings):
    embeddings.obsm["X_umap"] = np.column_stack([np.arange(N_CELLS), -np.arange(N_CELLS)]).astype(float)
    page, _, _ = make(embeddings)
    assert f"UMAP of {N_CELLS} cells" in page.sections["map"] and "obsm['X_umap']" in page.sections["map"]


def test_a_sample_is_noted(make, embeddings):
    del embeddings.obsm["spatial"]  # without crops, whose cells are always shown
    page, summary, _ = make(embeddings, max_cells=20)
    assert summary.n_shown == 20 and f"20 of {N_CELLS} cells are shown, sampled evenly" in page.sections["map"]


# --- the command


@pytest.fixture(scope="module")
def stored(tmp_path_factory, plate):
    """A folder with emb.zarr and plate.zarr."""
    folder = tmp_path_factory.mktemp("stored")
    shutil.copytree(plate, folder / "plate.zarr")
    make_embeddings(folder / "plate.zarr").write_zarr(folder / "emb.zarr")
    return folder


def test_the_command(stored, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(stored / "emb.zarr"), "--color-by", "dose", "--title", "A plate"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{N_CELLS} rows, {N_CELLS} on the map, {N_CELLS} crops") and "→ report.html" in out
    assert "UNTRAINED" in err
    page = Page(Path("report.html").read_text("utf-8"))
    assert page.data["map"]["columns"][page.data["map"]["initial"]]["name"] == "dose"
    assert "A plate" in page.sections["header"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.zarr"], "does not exist"),
        (["emb.zarr", "-o", "page.pdf"], ".html"),
        (["emb.zarr", "-o", "no/such/page.html"], "does not exist"),
        (["emb.zarr", "-o", "there.html"], "--overwrite"),
        (["emb.zarr", "--color-by", "nothing"], "'nothing'"),
        (["emb.zarr", "--perturbation", "nothing"], "'nothing'"),
        (["emb.zarr", "--max-cells", "0"], "at least 1"),
        (["emb.zarr", "--plate", "nothing.zarr"], "nothing.zarr does not exist"),
        (["emb.zarr", "--profiles", "nothing.h5ad"], "nothing.h5ad"),
        (["plate.zarr"], "plate of images"),
    ],
)
def test_invalid_input_is_reported_in_one_line(stored, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("emb.zarr", "plate.zarr"):
        Path(name).symlink_to(stored / name)
    Path("there.html").write_text("mine")
    assert main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0]
    assert sorted(p.name for p in Path().iterdir()) == ["emb.zarr", "plate.zarr", "there.html"]
    assert Path("there.html").read_text() == "mine"


def test_a_folder_is_never_replaced(tmp_path, embeddings):
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        write_report(embeddings, tmp_path / "folder.html", overwrite=True)


def test_json_of_odd_values():
    from cellvim.report.page import to_json

    text = to_json({"a": np.float32("nan"), "b": [np.int64(3), True, None], "</script>": np.array(["&\u2029"])})
    assert "<" not in text and "&" not in text and text.isascii()
    assert json.loads(text) == {"a": None, "b": [3, True, None], "</script>": ["&\u2029"]}
    assert CLOSING not in to_json(CLOSING)
