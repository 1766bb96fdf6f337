"""Parts of a report against their definitions: samples, projections, colours, crops, neighbours, charts, tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from cellvim.errors import InputError
from cellvim.evaluate.features import sample_rows
from cellvim.report.figures import cell_map, dose_charts, encode_columns, separation_chart, to_document
from cellvim.report.findings import nearest_perturbations, typical_cells
from cellvim.report.projection import project_cells
from cellvim.report.sections import format_value, make_table
from cellvim.report.thumbnails import choose_cells, max_thumbnails


def test_a_sample_is_even_over_the_groups():
    groups = np.repeat([0, 1, 2, -1], [1000, 30, 5, 10])
    rows = sample_rows(groups, 60, keep=np.array([3, 1001]), seed=1)
    assert len(rows) == 60 and (np.diff(rows) > 0).all() and {3, 1001} <= set(rows)
    counts = {g: int((groups[rows] == g).sum()) for g in (0, 1, 2, -1)}
    assert counts[2] == 5 and counts[-1] == 10 and abs(counts[0] - counts[1]) <= 3
    assert sample_rows(groups, 10_000).tolist() == list(range(len(groups)))
    np.testing.assert_array_equal(rows, sample_rows(groups, 60, keep=np.array([3, 1001]), seed=1))


def test_few_cells_are_projected_to_principal_components():
    values = np.random.default_rng(0).normal(size=(20, 5)) * [9, 5, 1, 1, 1]
    found = project_cells(lambda rows: values[rows], np.zeros(20, int))
    centred = values - values.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(np.abs(found.coordinates), np.abs((u * s)[:, :2]), rtol=1e-4)
    assert found.method == "PCA"


@pytest.mark.slow  # numba compiles UMAP for ten seconds
def test_umap_separates_groups_and_is_reproducible():
    rng = np.random.default_rng(0)
    group = np.arange(300) % 3
    values = rng.normal(size=(300, 20)) + 12 * rng.normal(size=(3, 20))[group]
    found, again = (project_cells(lambda rows: values[rows], np.zeros(300, int)) for _ in range(2))
    np.testing.assert_array_equal(found.coordinates, again.coordinates)
    assert found.method == "UMAP" and found.coordinates.shape == (300, 2)
    centers = np.stack([found.coordinates[group == g].mean(0) for g in range(3)])
    distance = np.linalg.norm(found.coordinates[:, None] - centers, axis=2)
    assert (distance.argmin(1) == group).all()
    same = project_cells(lambda rows: np.ones((len(rows), 4)), np.zeros(100, int))
    assert (same.coordinates == 0).all()


def decode(column: dict, codes: np.ndarray) -> list:
    """Return the values of a column as the page's script computes them."""
    if column["kind"] == "category":
        return [None if code == column["missing"] else column["categories"][code] for code in codes]
    if "levels" in column:
        return [np.nan if code == column["missing"] else column["levels"][code] for code in codes]
    return [np.nan if code == column["missing"] else column["low"] + code * column["step"] for code in codes]


def test_columns_keep_their_values():
    table = pd.DataFrame(
        {
            "text": pd.Categorical(["b", None, "a", "b"]),
            "flag": [True, False, True, True],
            "number": [1.5, np.nan, -2.0, np.inf],
            "count": pd.array([3, None, 2, 9], "Int64"),
            "nothing": [np.nan] * 4,
        }
    )
    columns, codes, excluded = encode_columns(table)
    assert [c["name"] for c in columns] == ["text", "flag", "number", "count"]
    assert excluded == [("nothing", "no values")]
    found = [decode(column, of_column) for column, of_column in zip(columns, codes, strict=True)]
    assert found[0] == ["b", None, "a", "b"] and found[1] == ["True", "False", "True", "True"]
    np.testing.assert_array_equal(found[2], [1.5, np.nan, -2.0, np.nan])
    np.testing.assert_array_equal(found[3], [3, np.nan, 2, 9])


@pytest.mark.parametrize("n", [3000, 50_000])
def test_many_different_numbers_are_accurate_to_half_a_step(n):
    values = np.random.default_rng(0).normal(size=n) * 1e3
    values[[5, 7]] = np.nan, np.inf
    (column,), (codes,), _ = encode_columns(pd.DataFrame({"number": values}))
    assert codes.dtype == (np.uint16 if n == 3000 else np.uint8)
    found = np.array(decode(column, codes))
    good = np.isfinite(values)
    np.testing.assert_allclose(found[good], values[good], atol=column["step"] / 2 * (1 + 1e-9))
    assert np.isnan(found[~good]).all()
    assert (column["dark"], column["bright"]) == pytest.approx(np.percentile(values[good], [1, 99]))


def test_identifiers_are_not_available_as_colours():
    columns, _, excluded = encode_columns(pd.DataFrame({"id": [f"cell {i}" for i in range(5000)]}))
    assert not columns and "4,000 different values" in excluded[0][1]


def test_the_same_figures_make_the_same_document():
    made = [
        to_document({"a": separation_chart([("x", 0.8, 0.1)]), "b": cell_map(9, "PCA", {"x": np.arange(9)})})
        for _ in range(2)
    ]
    assert json.dumps(made[0]) == json.dumps(made[1])
    assert set(made[0]["roots"].values()) == {"a", "b"}


def test_crops_are_spread_over_perturbations_and_wells_from_few_fields():
    rows = [
        ("p", f"A{w:02d}", str(s), "many" if w < 20 else "rare", n % 3 > 0)
        for w in range(1, 22)
        for s in range(5)
        for n in range(12)
    ]
    table = pd.DataFrame(rows, columns=["plate", "well", "site", "perturbation", "good"])
    chosen = choose_cells(table, 42, seed=0)
    assert len(chosen) == 42 and (np.diff(chosen) > 0).all()
    assert table.loc[chosen, "good"].all()  # whole cells first
    assert table.loc[chosen].groupby("well").size().nunique() <= 2  # even over the wells
    few = table.loc[choose_cells(table, 4, seed=0), "perturbation"]
    assert (few == "rare").sum() >= 2  # of 19 and 2 wells
    assert len(choose_cells(table[:0], 9)) == 0
    missing = table.assign(perturbation=None, plate=None)
    assert len(choose_cells(missing, 42)) == 42


def test_fewer_crops_with_more_channels_or_larger_crops():
    counts = [max_thumbnails(c, s) for c, s in ((1, 32), (2, 48), (5, 64), (12, 72))]
    assert counts == sorted(counts, reverse=True) and counts[-1] >= 40 and counts[0] == 2000


def test_nearest_perturbations_by_cosine():
    values = np.array([[1.0, 0.0], [1.0, 0.2], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [5.0, 0.0]])
    names = np.array(["a", "a", "b", "c", "d", None], dtype=object)
    found, nearest, similarity = nearest_perturbations(names, values)
    assert found == ["a", "b", "c", "d"]
    means = np.array([[1, 0.1], [0.9, 0.1], [-1, 0], [0, 1]])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    cosine = unit @ unit.T
    for i in range(4):
        expected = sorted((j for j in range(4) if j != i), key=lambda j: -cosine[i, j])
        assert nearest[i].tolist() == expected
        np.testing.assert_allclose(similarity[i], cosine[i, expected], atol=1e-12)
    with pytest.raises(InputError, match="is 1 perturbation"):
        nearest_perturbations(np.array(["a", None], dtype=object), values[:2])
    with pytest.raises(InputError, match="finite"):
        nearest_perturbations(names, np.full((6, 2), np.nan))


def test_typical_crops_are_nearest_to_the_mean():
    embeddings = np.array([[0.0], [1.0], [10.0], [np.nan], [5.0]])
    found = typical_cells(np.array(["a", "a", "a", "a", "b"], dtype=object), embeddings, 2)
    assert found == {"a": [1, 0], "b": [4]}


def test_a_dose_of_zero_and_a_failed_fit_are_drawn():
    curves = pd.DataFrame(
        [
            {"perturbation": "x", "n_wells": 5, "bottom": 0.0, "top": 1.0, "ec50": 2.0, "hill": 1.0, "p_value": 0.01,
             "r_squared": 0.9, "in_range": True, "remark": ""},
            {"perturbation": "y", "n_wells": 1, "bottom": np.nan, "top": np.nan, "ec50": np.nan, "hill": np.nan,
             "p_value": np.nan, "r_squared": np.nan, "in_range": False, "remark": "1 doses above 0"},
        ]
    )  # fmt: skip
    points = pd.DataFrame(
        {"perturbation": ["x"] * 4 + ["y"], "dose": [0.0, 1, 10, 100, 3], "mean": [0.0, 0.3, 0.9, 1.0, 0.5]}
    )
    (_, fit, first), (name, failed, second) = dose_charts(curves, points)
    dots = glyph(first, "Scatter")
    assert (np.diff(dots["x"]) > 0).all() and 0 < dots["x"][0] < 1  # the dose of 0, on a logarithmic axis
    assert list(dots["y"]) == [0.0, 0.3, 0.9, 1.0]
    assert first.xaxis.major_label_overrides[dots["x"][0]] == "0"
    line = glyph(first, "Line")
    np.testing.assert_allclose(line["y"], line["x"] / (line["x"] + 2), rtol=1e-6)
    assert "EC50 2" in fit
    assert (name, failed) == ("y", "1 doses above 0") and glyph(second, "Line") is None


def glyph(figure, kind: str) -> dict | None:
    """Return the data of the first glyph of a kind."""
    return next((r.data_source.data for r in figure.renderers if type(r.glyph).__name__ == kind), None)


def test_accuracies_are_drawn_with_their_deviations():
    chart = separation_chart([("a", 0.9, 0.01), ("b", 0.5, np.nan), ("c", np.nan, 0.1)])
    dots, bars = glyph(chart, "Scatter"), glyph(chart, "Segment")
    assert list(chart.y_range.factors) == ["b", "a"] and list(dots["x"]) == [0.9, 0.5]
    np.testing.assert_allclose([bars["x0"], bars["x1"]], [[0.89, 0.5], [0.91, 0.5]])
    assert chart.x_range.start <= 0.4


def test_tables_sort_by_numbers_and_note_omitted_rows():
    table = make_table("All.", ["name", "value"], [["x", 1234.5], ["y", None], ["z", np.nan], ["w", 1e-9]])
    assert [c["number"] for c in table["columns"]] == [False, True]
    assert [row[1]["value"] for row in table["rows"]] == ["1234.5", "", "", "1e-09"]
    assert [row[1]["text"] for row in table["rows"]] == ["1,234.500", "–", "–", "1.00e-09"]
    long = make_table("All.", ["n"], [[i] for i in range(3000)])
    assert len(long["rows"]) == 2000 and "first 2,000 of 3,000" in long["caption"] and long["search"]
    assert format_value(True) == "yes" and format_value("<b>") == "<b>"
