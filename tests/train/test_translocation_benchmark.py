"""The parts of `benchmarks.translocation`: no test well is learned from, and its figures are what their names say."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from benchmarks import translocation as benchmark
from benchmarks import translocation_cells as cells_of
from benchmarks import translocation_tables as tables


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, pd.DataFrame]:
    """The plate's layout, with 4 cells a well: noise, and GFP in the nucleus from dose 5 on."""
    rng = np.random.default_rng(0)
    rows = []
    for row in "ABCDEFGH":
        for column in range(1, 13):
            dose = column - 2 if 3 <= column <= 11 else 10 if (column == 12) == (row < "E") and column != 2 else 0
            kind = {0: "negcon", 10: "poscon"}.get(dose, "trt")
            rows += [(f"{row}{column:02d}", dose, kind, 100 + column)] * 4
    table = pd.DataFrame(rows, columns=["well", "dose", "kind", "cells_of_well"])
    images = rng.uniform(0, 0.1, (len(table), 2, 56, 56))
    images[:, 1, 20:36, 20:36] += 0.8
    inside = (table["dose"] >= 5).to_numpy()
    images[inside, 0, 20:36, 20:36] += 0.6
    return images.astype(np.float16), table


def test_the_layout_has_eight_wells_a_dose(cells):
    wells = cells[1].drop_duplicates("well")
    assert wells["dose"].value_counts().to_dict() == {0: 16, 10: 8} | dict.fromkeys(range(1, 10), 8)


def test_wells_are_dealt_once_and_evenly(cells):
    wells = cells_of.split_wells(cells[1])
    assert len(wells["train"]) == 60 and len(wells["test"]) == 36 and not wells["train"] & wells["test"]
    assert wells["val"] < wells["train"]
    dose = cells[1].drop_duplicates("well").set_index("well")["dose"]
    assert dose[sorted(wells["test"])].value_counts().to_dict() == {0: 6, 10: 3} | dict.fromkeys(range(1, 10), 3)
    assert set(dose[sorted(wells["val"])]) == set(range(11))


@pytest.mark.parametrize("task", cells_of.TASKS)
@pytest.mark.parametrize("part", ["test", "val"])
@pytest.mark.parametrize(("shots", "unlabelled"), [(None, "none"), (None, "all"), (1, "none"), (1, "half")])
def test_no_judged_or_test_well_is_trained_on(cells, task, part, shots, unlabelled):
    data = cells_of.WellCells(cells, task, part=part, shots=shots, unlabelled=unlabelled, seed=1)
    data.setup()
    wells = cells[1]["well"].to_numpy()
    split = cells_of.split_wells(cells[1])
    trained, evaluated = set(wells[data.rows["train"]]), set(wells[data.rows["test"]])
    assert not trained & split["test"] and not trained & evaluated
    assert evaluated <= split[part]
    assert (data.labels[data.rows["test"]] >= 0).all()
    kinds = 9 if task == "dose" else 2
    assert len(np.unique(data.labels[data.labelled_rows])) == kinds == len(data.description.class_names)
    labelled_wells = set(wells[data.labelled_rows])
    if shots:
        assert len(labelled_wells) == kinds
    if unlabelled == "none":
        assert trained == labelled_wells
    else:
        assert trained == split["train"] - (split["val"] if part == "val" else set())
    if unlabelled == "half":
        assert (data.labels[data.rows["train"]] >= 0).mean() == 0.5
    names = np.array(data.description.class_names)[data.labels[data.labelled_rows]]
    column = cells[1]["dose"].astype(str) if task == "dose" else cells[1]["kind"]
    assert (names == column.to_numpy(str)[data.labelled_rows]).all()


def test_test_wells_are_the_same_for_every_seed_and_shots_are_not(cells):
    made = [cells_of.WellCells(cells, "controls", shots=1, seed=seed) for seed in range(6)]
    for data in made:
        data.setup()
    assert len({tuple(d.rows["test"]) for d in made}) == 1
    assert len({tuple(d.rows["train"]) for d in made}) > 1


def test_scores_of_doses_by_hand():
    probability = np.array([[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.0, 0.0, 1.0], [0.0, 0.9, 0.1]])
    labels, wells = np.array([0, 1, 2, 2]), np.array(["A1", "B1", "C1", "C1"])
    found = cells_of.dose_scores(probability, labels, wells, ("1", "2", "3"))
    assert found["cell_accuracy"] == 0.5
    # class 1: precision 1/2, recall 1; class 2: none right; class 3: precision 1, recall 1/2
    assert found["cell_macro_f1"] == pytest.approx((2 / 3 + 0 + 2 / 3) / 3)
    assert found["cell_weighted_f1"] == pytest.approx((2 / 3 * 1 + 0 * 1 + 2 / 3 * 2) / 4)
    # expected doses 1.2, 1.4, 3, 2.1 have ranks 1, 2, 4, 3; the true ones 1, 2, 3.5, 3.5
    assert found["cell_spearman"] == pytest.approx(np.corrcoef([1, 2, 4, 3], [1, 2, 3.5, 3.5])[0, 1])
    assert found["cell_error"] == pytest.approx((0.2 + 0.6 + 0 + 0.9) / 4)
    # C1 is the mean of its cells: 0, 0.45, 0.55
    assert found["well_accuracy"] == pytest.approx(2 / 3)
    assert found["well_error"] == pytest.approx((0.2 + 0.6 + 0.45) / 3)
    assert found["well_spearman"] == pytest.approx(1)
    assert found["wells"] == {"A1": [1, 1.2, 1.0], "B1": [2, 1.4, 0.0], "C1": [3, 2.55, 0.5]}


def test_scores_of_controls_by_hand():
    positive = np.array([0.1, 0.6, 0.4, 0.8, 0.9])
    labels, wells = np.array([0, 0, 0, 1, 1]), np.array(["A1", "A1", "A1", "B1", "B2"])
    found = cells_of.control_scores(np.stack([1 - positive, positive], 1), labels, wells, ("negcon", "poscon"))
    assert found["cell_balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["cell_auc"] == 1 and found["well_balanced_accuracy"] == 1
    flipped = cells_of.control_scores(np.stack([positive, 1 - positive], 1), labels, wells, ("negcon", "poscon"))
    assert flipped["cell_auc"] == 0


def test_nucleus_and_ring_see_where_gfp_is(cells):
    images, table = cells
    found = cells_of.nucleus_and_ring(cells_of.middle(images[::16]))
    translocated = (table["dose"].to_numpy() >= 5)[::16]
    assert (found[translocated, 2] > 1).all() and (np.abs(found[~translocated, 2]) < 0.2).all()
    np.testing.assert_allclose(found[:, 2], found[:, 0] - found[:, 1])
    assert np.isfinite(cells_of.nucleus_and_ring(np.zeros((1, 2, 48, 48), np.float32))).all()


def test_steps_take_the_budget():
    for kind, milliseconds in benchmark.CROP_MS.items():
        seconds = benchmark.steps_of(kind, 45) * benchmark.BATCH * milliseconds / 1000
        assert seconds == pytest.approx(45, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*benchmark.SIMPLE, *benchmark.TRAINED])
def test_every_method_runs(cells, tmp_path, monkeypatch, method):
    monkeypatch.setitem(benchmark.BUDGET_S, "dose", 0.3)
    found = benchmark.measure(method, cells, "dose", 0, tmp_path)
    assert 0 <= found["cell_accuracy"] <= 1 and -1 <= found["well_spearman"] <= 1
    assert ("channels" in found) == (method in benchmark.TRAINED)
    assert len(found["wells"]) == 27


def test_tables_show_means_and_spreads():
    assert tables.spread([0.1, 0.2, 0.3]) == "0.200 ± 0.100"
    assert tables.interval(np.full(5, 0.25)) == "+0.250 (+0.250 to +0.250)"
    run = {"method": "FastChannelVim", "task": "dose", "parameters": 500_000, "crops_seen": 9000, "cpu_seconds": 45.0}
    run |= dict.fromkeys(tables.DOSE, 0.5) | {"wells": {"A03": [1, 1.5, 0.5], "A04": [2, 2.0, 1.0]}}
    other = run | {"method": "ChannelViT", "wells": {"A03": [1, 1.0, 0.75], "A04": [2, 2.0, 1.0]}}
    assert "| FastChannelVim (1 of 3 seeds) | 0.50 M | 9.0 k | 45 | 0.500 ± 0.000 |" in tables.dose_table([run, other])
    assert "| ChannelViT | +0.125 (+0.000 to +0.250) | -0.250 (-0.500 to +0.000) |" in tables.difference_table(
        [run, other]
    )
