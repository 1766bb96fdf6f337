"""End to end on real images: the demo from TIFFs to scanpy, and the controls of the 96-well plate."""

from __future__ import annotations

import os

import anndata
import matplotlib.image
import numpy as np
import pytest

import cellvim
from cellvim import demo
from cellvim.cli import main
from cellvim.data.importers import import_plate
from cellvim.evaluate.controls import separate_controls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The output folder of one run of ``cellvim demo``."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--output", str(folder)]) == 0
    return folder


def test_demo_leaves_an_anndata_of_the_plate(folder):
    adata = anndata.read_zarr(folder / "embeddings.zarr")
    assert adata.obs["Metadata_Well"].nunique() == 29
    assert adata.n_obs > 29 * 100
    assert set(adata.obs["Metadata_pert_type"]) == {"negcon", "poscon", "trt"}
    assert np.isfinite(adata.X).all()
    assert adata.uns["cellvim"]["weights"]["trained"]
    assert sorted(os.listdir(folder)) == [
        *("demo.png", "embeddings.zarr", "embeddings.zarr.manifest.json", "plate.zarr")
    ]


def test_demo_draws_cells_and_a_dot_per_well(folder):
    """The UMAP is computed by scanpy from the unmodified AnnData."""
    picture = matplotlib.image.imread(folder / "demo.png")
    assert picture.shape[1] > 1000
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 1000  # not blank


def test_demo_separates_the_controls(folder):
    adata = anndata.read_zarr(folder / "embeddings.zarr")
    embedding, *_ = separate_controls(adata, "Metadata_pert_type", negative="negcon", positive="poscon")
    assert embedding.n_wells == 24
    _above_chance(embedding)


def test_repeated_demo_keeps_existing_results(folder, capsys):
    before = os.stat(folder / "embeddings.zarr").st_mtime_ns
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "find_spec", lambda name: None)  # without the last step, tested above
        assert main(["demo", "--output", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "--overwrite" in out and "read_zarr" in out
    assert os.stat(folder / "embeddings.zarr").st_mtime_ns == before


def test_demo_without_scanpy_prints_how_to_install_it(folder, capsys, monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", "--output", str(folder)]) == 0
    assert "pip install 'cellvim[analysis]'" in capsys.readouterr().out


def test_demo_in_a_folder_that_cannot_be_created(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["demo", "--output", str(tmp_path / "file" / "demo")]) == 2
    assert capsys.readouterr().err.startswith("Error: The folder")


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
def test_controls_of_the_96_well_plate_differ(shared_data, tmp_path, capsys):
    """Three wells of each control, of the complete imported plate; FastChannelVim-T/16 with random weights.

    The figures are printed beside those of mean intensities and of cell counts; nothing is tuned to pass.
    """
    source = shared_data / "sbs_fkhr_translocation_96well"
    plate = import_plate(
        source,
        tmp_path / "plate.zarr",
        metadata=source / "1049_Metadata.csv",
        channel_names="Channel1=GFP,Channel2=DNA",
        pert_type="SBS_Controls:-1=negcon,0=trt,1=poscon",
    )
    assert len(plate.wells) == 96
    wells = ["A02", "D01", "F12", "A12", "D12", "F01"]
    adata = cellvim.embed(plate, wells=wells, crop_size=48)
    results = separate_controls(adata, "Metadata_pert_type", negative="negcon", positive="poscon")
    with capsys.disabled():
        print(f"\n96-well plate, {results[0].n_rows} cells of {len(wells)} control wells, wells held out:")
        for result in results:
            print(f"  {result}")
    _above_chance(results[0])


def _above_chance(result) -> None:
    """By two standard errors of the mean over the folds."""
    assert result.balanced_accuracy - 2 * result.balanced_accuracy_std / np.sqrt(result.n_folds) > 0.5
