"""The whole evaluation: baselines beside everything, what cannot be computed is listed, hostile tables."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from profile_tables import make_cells, make_profiles

from cellvim.errors import CellvimError, InputError, MetadataError
from cellvim.evaluate import TASKS, Evaluation, evaluate_profiles
from cellvim.evaluate.evaluation import summary_tables
from cellvim.profiles import profile


@pytest.fixture(scope="module")
def evaluated() -> Evaluation:
    adata = make_profiles(compounds=4, doses=(1.0, 2.0, 3.0, 4.0), positives=6, effect=8)
    adata.obs["mean_intensity_DNA"] = np.random.default_rng(0).normal(size=adata.n_obs)
    return evaluate_profiles(profile(adata, statistic=None), null_size=200)


def test_every_measure_has_its_baselines(evaluated):
    assert list(evaluated.wide().columns) == ["robustmad", "mean intensities", "cell count", "random"]
    assert not evaluated.wide().isna().any().any()
    assert set(evaluated.summary["task"]) == {
        *("retrieval", "consistency", "mechanism", "classification", "batch effects", "assay", "dose response")
    }
    assert set(evaluated.tables) == {
        *("retrieval", "consistency", "mechanism", "mechanism_retrieval", "classification", "batch_effects"),
        *("activity", "assay", "dose_response", "dose_points"),
    }
    for name, table in evaluated.tables.items():
        expected = {"robustmad"} if name == "activity" else set(evaluated.wide().columns)
        assert set(table["features"]) == expected, name


def test_profiles_with_an_effect_beat_their_baselines(evaluated):
    for measure in ("mean average precision", "NSC accuracy", "|rank correlation| with the dose, median"):
        for baseline in ("mean intensities", "cell count", "random"):
            assert evaluated.value(measure) > evaluated.value(measure, baseline) + 0.2, (measure, baseline)


def test_the_json_comes_back(evaluated, tmp_path):
    evaluated.save(tmp_path / "evaluation.json")
    again = Evaluation.load(tmp_path / "evaluation.json")
    pd.testing.assert_frame_equal(again.summary, evaluated.summary)
    assert set(again.tables) == set(evaluated.tables)
    assert again.settings == evaluated.settings
    assert "NaN" not in (tmp_path / "evaluation.json").read_text()
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(InputError, match="not an evaluation"):
        Evaluation.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="cannot be read"):
        Evaluation.load(tmp_path / "none.json")


def test_the_same_seed_gives_the_same_figures():
    adata = make_profiles()
    tasks = ["retrieval", "consistency", "classification", "batch_effects"]
    first, second = (evaluate_profiles(adata, tasks=tasks, null_size=50, seed=7) for _ in range(2))
    pd.testing.assert_frame_equal(first.summary, second.summary)


def test_what_cannot_be_computed_is_listed_with_its_reason():
    adata = make_profiles(plates=1)
    adata.obs = adata.obs[["Metadata_Plate", "Metadata_Well", "Metadata_pert_type", "Metadata_Compound"]].copy()
    result = evaluate_profiles(adata, null_size=100)
    reasons = dict(zip(result.left_out["task"], result.left_out["reason"], strict=True))
    assert "no Metadata_Object_Count" in reasons["baselines"]
    assert "--mechanism" in reasons["mechanism"]
    assert "1 batches" in reasons["batch effects of negative controls"]
    assert "positive control" in reasons["assay"]
    assert "--dose" in reasons["dose response"]
    assert any("plates held out" in task for task in reasons)
    assert result.value("mean average precision") > 0


def test_nothing_at_all_is_an_error():
    adata = make_profiles()
    adata.obs = adata.obs[[]].copy()
    with pytest.raises(InputError, match=r"Nothing can be evaluated.*--perturbation"):
        evaluate_profiles(adata)


def test_rows_of_one_well_are_no_replicates():
    adata = make_profiles()
    adata.obs["Metadata_Well"] = "A01"
    with pytest.raises(MetadataError, match=r"3 wells have more than one row \(P0 A01.*Aggregate first"):
        evaluate_profiles(adata)
    with pytest.raises(MetadataError, match="Aggregate first"):
        evaluate_profiles(make_cells())


def test_hostile_names_and_features():
    adata = make_profiles(positives=3)
    names = {"compound 0": "<script>alert(1)</script>", "compound 1": "[bold]x[/bold]", "compound 2": "a\nb"}
    adata.obs["Metadata_Compound"] = adata.obs["Metadata_Compound"].cat.rename_categories(names)
    adata.obs["Metadata_Plate"] = adata.obs["Metadata_Plate"].cat.rename_categories({"P0": "</td>", "P1": "é 板"})
    adata.X[:, 0] = np.nan
    adata.X[:, 1] = 3
    result = evaluate_profiles(adata, null_size=100)
    assert "<script>alert(1)</script>" in set(result.tables["retrieval"]["Metadata_Compound"])
    assert result.left_out["reason"].str.contains("1 features are not finite").any()
    json.dumps(result.to_dict(), allow_nan=False)
    assert summary_tables(result)


def test_features_that_say_nothing_are_an_error():
    adata = make_profiles()
    adata.X[:] = 1
    with pytest.raises(InputError, match="'X' is the same in every row"):
        evaluate_profiles(adata)
    adata.X[:] = np.nan
    with pytest.raises(InputError, match="no feature that is finite"):
        evaluate_profiles(adata)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use": "X_umap"}, "no representation 'X_umap'.* X"),
        ({"tasks": ["umap"]}, "no task umap"),
        ({"perturbation": "cmpd"}, r"no column 'cmpd'.*--perturbation"),
        ({"control": "kind:negcon"}, r"no column 'kind'.*--control"),
        ({"label": "phase"}, r"no column 'phase'.*--label"),
    ],
)
def test_what_was_named_has_to_be_there(options, message):
    with pytest.raises(CellvimError, match=message):
        evaluate_profiles(make_profiles(), **options)


def test_zero_rows_are_an_error():
    with pytest.raises(InputError, match="no rows"):
        evaluate_profiles(make_profiles()[:0])


def test_tasks_can_be_chosen():
    result = evaluate_profiles(make_profiles(), tasks=["consistency"], null_size=50)
    assert set(result.summary["task"]) == {"consistency"}
    assert set(TASKS) >= {"retrieval", "assay"}
