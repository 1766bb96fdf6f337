"""Plots return axes that show what the table says, with names as they are."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from profile_tables import make_profiles

import cellvim
from cellvim.errors import CellvimError, InputError, MetadataError
from cellvim.pl.canvas import plain

HOSTILE = "<script>alert('$x_{1}$')</script>\n& \"é\" [bold]"


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def profiles():
    adata = make_profiles(compounds=4, doses=(1.0, 2.0, 3.0, 4.0), positives=6, effect=8, plates=2)
    adata.obs["Metadata_Compound"] = adata.obs["Metadata_Compound"].cat.rename_categories({"compound 1": HOSTILE})
    adata.obs["Metadata_moa"] = adata.obs["Metadata_moa"].cat.rename_categories({"mechanism 1": HOSTILE + "!"})
    return adata


def _drawn(axes: Axes) -> np.ndarray:
    axes.figure.canvas.draw()
    return np.asarray(axes.figure.canvas.buffer_rgba())


def test_a_plate_map_has_each_wells_value_in_its_place(profiles):
    axes = cellvim.pl.plate_map(profiles, "Metadata_Object_Count", plate="P1")
    grid = axes.images[0].get_array()
    assert grid.shape == (8, 12)
    own = profiles.obs[profiles.obs["Metadata_Plate"] == "P1"]
    for well, count in zip(own["Metadata_Well"], own["Metadata_Object_Count"], strict=True):
        assert grid["ABCDEFGH".index(well[0]), int(well[1:]) - 1] == count
    assert grid.mask.sum() == 96 - len(own)


def test_plate_maps_of_names_features_and_large_plates(profiles):
    axes = cellvim.pl.plate_map(profiles, "Metadata_Compound", plate="P0")
    assert len(axes.get_legend().get_texts()) == 6
    _drawn(axes)
    cellvim.pl.plate_map(profiles, "emb_0003", plate="P0")
    large = profiles[:3].copy()
    large.obs["Metadata_Well"] = ["A01", "P24", "B02"]
    assert cellvim.pl.plate_map(large, "Metadata_Dose").images[0].get_array().shape == (16, 24)
    large.obs["Metadata_Well"] = ["A01", "AF48", "B02"]
    assert cellvim.pl.plate_map(large, "Metadata_Dose").images[0].get_array().shape == (32, 48)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"color": "Metadata_Dose"}, "There are 2 plates.*P0, P1.*plate="),
        ({"color": "Metadata_Dose", "plate": "P9"}, "no plate 'P9'.* P0, P1"),
        ({"color": "colour", "plate": "P0"}, "'colour' is neither a column of obs nor a feature"),
    ],
)
def test_plate_maps_say_what_is_missing(profiles, options, message):
    with pytest.raises(MetadataError, match=message):
        cellvim.pl.plate_map(profiles, **options)


def test_wells_that_are_no_wells_are_named(profiles):
    adata = profiles[:2].copy()
    adata.obs["Metadata_Well"] = ["A01", "well 7"]
    with pytest.raises(MetadataError, match="'well 7' is not a well"):
        cellvim.pl.plate_map(adata, "Metadata_Dose")


def test_controls_are_drawn_by_plate_with_their_z_prime(profiles):
    axes = cellvim.pl.controls(profiles)
    labels = [t.get_text() for t in axes.get_xticklabels()]
    assert [text.split("\n")[0] for text in labels] == ["P0", "P1"]
    assert all("Z′" in text for text in labels)
    assert sum(len(c.get_offsets()) for c in axes.collections) == profiles.n_obs
    _drawn(axes)


def test_dose_response_draws_wells_and_curves(profiles):
    axes = cellvim.pl.dose_response(profiles)
    assert any(t.get_text().startswith("<script>") for t in axes.get_legend().get_texts())
    _drawn(axes)
    one = cellvim.pl.dose_response(profiles, "compound 0")
    dots = next(line for line in one.lines if line.get_marker() == "o")
    assert len(dots.get_xdata()) == 16  # 4 doses, 2 replicates, 2 plates
    with pytest.raises(MetadataError, match="no doses of aspirin"):
        cellvim.pl.dose_response(profiles, "aspirin")


def test_without_positive_controls_the_distance_is_drawn(profiles):
    axes = cellvim.pl.dose_response(profiles[profiles.obs["Metadata_pert_type"] != "poscon"].copy())
    assert "distance" in axes.get_ylabel()


def test_retrieval_draws_every_treatment(profiles):
    axes = cellvim.pl.retrieval(profiles)
    assert len(axes.collections[0].get_offsets()) == 17  # positive controls are treated, too
    _drawn(axes)
    result = cellvim.evaluate_profiles(profiles, tasks=["retrieval"], null_size=100)
    assert len(cellvim.pl.retrieval(profiles, evaluation=result).collections[0].get_offsets()) == 17
    with pytest.raises(InputError, match="no retrieval of 'X_pca'"):
        copy = profiles.copy()
        copy.obsm["X_pca"] = copy.X
        cellvim.pl.retrieval(copy, use="X_pca", evaluation=result)


def test_mechanisms_draw_a_confusion_matrix(profiles):
    axes = cellvim.pl.mechanisms(profiles)
    assert sum(int(t.get_text()) for t in axes.texts) == 16
    assert "NSC accuracy" in axes.get_title()
    _drawn(axes)
    with pytest.raises(InputError, match="nsx"):
        cellvim.pl.mechanisms(profiles, scheme="nsx")


def test_a_map_draws_every_row_and_says_how_to_make_one(profiles):
    adata = profiles.copy()
    with pytest.raises(InputError, match=r"no 'X_umap' in obsm.*scanpy.tl.umap"):
        cellvim.pl.umap(adata)
    adata.obsm["X_umap"] = np.asarray(adata.X)[:, :2]
    for color in (None, "Metadata_Dose", "Metadata_Compound", "emb_0001"):
        axes = cellvim.pl.umap(adata, color)
        assert len(axes.collections[0].get_offsets()) == adata.n_obs
        _drawn(axes)


def test_axes_that_are_given_are_drawn_on(profiles):
    _, ax = plt.subplots()
    assert cellvim.pl.plate_map(profiles, "Metadata_Dose", plate="P0", ax=ax) is ax
    assert cellvim.pl.mechanisms(profiles, ax=ax) is ax


def test_crops_are_cut_where_the_cells_are(tmp_path):
    from synthetic_plate import draw_field, write_plate

    image = draw_field(0, 4)
    plate = write_plate(tmp_path / "plate.zarr", {"A01": [image]}, ["GFP", "DNA"])
    adata = make_profiles(plates=1, controls=2, compounds=0)
    adata.obs["Metadata_Well"], adata.obs["Metadata_Site"] = "A01", 0
    site = str(cellvim.open_plate(plate).fields[0].site)
    adata.obs["Metadata_Site"] = site
    adata.obsm["spatial"] = np.array([[20.0, 30.0], [40.0, 25.0]])
    low, high = image.min(axis=(1, 2)).astype(float), image.max(axis=(1, 2)).astype(float)
    intensity = {"channel_names": ["GFP", "DNA"], "low": low, "high": high, "ceiling": 2.0}
    adata.uns["cellvim"] = {"preprocessing": {"crop": {"size_px": 16}, "intensity": intensity}, "spatial_unit": "pixel"}
    axes = cellvim.pl.crops(adata, plate, rows=list(adata.obs_names))
    assert axes.shape == (2, 3)
    expected = (image[1, 22:38, 12:28] - low[1]) / (high[1] - low[1])
    np.testing.assert_allclose(axes[0, 1].images[0].get_array(), expected, atol=1e-5)
    with pytest.raises(MetadataError, match="no rows nobody"):
        cellvim.pl.crops(adata, plate, rows=["nobody"])
    del adata.uns["cellvim"]
    with pytest.raises(CellvimError, match="does not describe"):
        cellvim.pl.crops(adata, plate)


def test_text_is_shown_as_it_is():
    assert plain("a$b$\nc") == r"a\$b\$ c"
    assert len(plain("x" * 100)) == 40
