"""The main job on a drawn plate: what the AnnData holds, what can be repeated, and what a bad field does."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import warnings
from dataclasses import dataclass, fields, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from synthetic_plate import break_chunk, draw_field, write_plate

import cellvim
from cellvim.embedding import EmbeddingOptions, EmbeddingPlan, embed_field, plan_embedding, run_embedding
from cellvim.embedding.ledger import identity_digest
from cellvim.embedding.options import option, with_options
from cellvim.embedding.output import describe_run
from cellvim.embedding.plan import make_plan
from cellvim.errors import ChannelError, InputError, ModelError, OutputError, PlateError

CHANNELS = ["GFP", "Hoechst"]
PLATE_MAP = {
    "A01": {"compound": "dmso", "dose": 0.0, "pert_type": "negcon"},
    "A02": {"compound": "wortmannin", "dose": 3.5, "pert_type": "trt"},
}


def small_encoder(channel_names=("DNA", "GFP", "Mito"), image_size=32, **changes) -> cellvim.Encoder:
    """Three channels in another order than the plate's two, which it also calls otherwise."""
    torch.manual_seed(3)
    names = None if channel_names is None else tuple(channel_names)
    config = cellvim.EncoderConfig(
        image_size=image_size, patch_size=8, in_channels=3, embed_dim=24, depth=2, num_classes=0, channel_names=names
    )
    return cellvim.Encoder(config.replace(**changes)).eval()


@pytest.fixture(scope="module")
def images() -> dict[str, list[np.ndarray]]:
    return {"A01": [draw_field(0, 5), draw_field(1, 3)], "A02": [draw_field(2, 0), draw_field(3, 7)]}


@pytest.fixture(scope="module")
def plate_path(images, tmp_path_factory):
    return write_plate(tmp_path_factory.mktemp("plates") / "drawn.zarr", images, CHANNELS, plate_map=PLATE_MAP)


@pytest.fixture(scope="module")
def encoder():
    return small_encoder()


@pytest.fixture(scope="module")
def adata(plate_path, encoder):
    with pytest.warns(UserWarning, match="UNTRAINED"):
        return cellvim.embed(plate_path, model=encoder)


def test_every_drawn_nucleus_is_one_row(adata):
    counts = adata.obs.groupby(["Metadata_Well", "Metadata_Site"], observed=True).size()
    assert counts.to_dict() == {("A01", 0): 5, ("A01", 1): 3, ("A02", 1): 7}


def test_rows_are_as_the_design_says(adata):
    assert adata.X.dtype == np.float32 and adata.shape == (15, 24)
    assert np.isfinite(adata.X).all()
    assert adata.var_names[0] == "emb_0000"
    assert adata.obs_names.is_unique and adata.obs_names[0] == "drawn__A01__0__1"
    assert adata.obs["Metadata_Plate"].unique().tolist() == ["drawn"]
    for name in ("Metadata_Plate", "Metadata_Well", "compound", "Metadata_pert_type"):
        assert isinstance(adata.obs[name].dtype, pd.CategoricalDtype), name
    dmso = adata.obs["Metadata_Well"] == "A01"
    assert (adata.obs.loc[dmso, "compound"] == "dmso").all()
    assert (adata.obs.loc[~dmso, "dose"] == 3.5).all()
    assert adata.obs["touches_border"].dtype == bool
    # discs of radius 9 to 11 px on 0.5 µm pixels are 64 to 95 µm²; segmentation may shave or add a rim of a pixel
    assert adata.obs["area_um2"].between(45, 125).all()
    assert (adata.obs["mean_intensity_GFP"] > 2 * adata.obs["mean_intensity_Hoechst"] * 0.5).all()


def test_positions_are_micrometres_in_x_and_y(adata, plate_path):
    field = cellvim.open_plate(plate_path).fields[0]
    gfp = field.read(["GFP"])[0]
    x, y = adata.obsm["spatial"][:5].T / 0.5
    assert (gfp[y.round().astype(int), x.round().astype(int)] > 600).all()  # background is 200


def test_channels_meet_the_model_by_name(adata, plate_path, encoder):
    """The plate has (GFP, Hoechst), the model (DNA, GFP, Mito): crops are looked up and embedded by hand."""
    from cellvim.data.crops import cut_crops, place_windows
    from cellvim.data.intensity import estimate_intensity_scale

    plate = cellvim.open_plate(plate_path)
    centers = adata.obsm["spatial"][:5, ::-1] / 0.5
    scale = estimate_intensity_scale(plate, ["Hoechst", "GFP"], seed=0)
    image = scale.apply(plate.fields[0].read(["Hoechst", "GFP"]))
    first, _ = place_windows(centers, 32, image.shape[1:])
    crops = torch.from_numpy(cut_crops(image, first, 32))
    with torch.inference_mode():
        right = encoder.forward_features(crops, channels=[0, 1]).numpy()
        wrong = encoder.forward_features(crops, channels=[1, 0]).numpy()
    np.testing.assert_array_equal(adata.X[:5], right)
    assert np.abs(wrong - right).max() > 1e-2


def test_order_of_the_plates_channels_does_not_matter(images, tmp_path, encoder, adata):
    turned = {well: [image[::-1] for image in sites] for well, sites in images.items()}
    path = write_plate(tmp_path / "drawn.zarr", turned, CHANNELS[::-1], plate_map=PLATE_MAP)
    with pytest.warns(UserWarning, match="UNTRAINED"):
        result = cellvim.embed(path, model=encoder)
    np.testing.assert_array_equal(result.X, adata.X)


def test_uns_is_enough_to_repeat_the_run(adata, plate_path, encoder):
    uns = adata.uns["cellvim"]
    assert cellvim.EncoderConfig.from_dict(json.loads(uns["model"]["config"])) == encoder.config
    assert not uns["weights"]["trained"] and "UNTRAINED" in uns["weights"]["warning"]
    assert len(uns["weights"]["sha256"]) == 64
    assert list(uns["channels"]["plate"]) == ["Hoechst", "GFP"]  # in the model's order
    assert list(uns["channels"]["model"]) == ["DNA", "GFP"]
    assert uns["channels"]["nuclei"] == "Hoechst"
    assert uns["preprocessing"]["crop"] == {"size_px": 32, "input_px": 32, "size_um": 16.0}
    assert set(uns["preprocessing"]["intensity"]) >= {"channel_names", "low", "high"}
    assert uns["plate"]["path"] == str(plate_path.resolve())
    assert uns["versions"]["cellvim"] and uns["versions"]["torch"]
    assert uns["spatial_unit"] == "micrometer"
    assert len(uns["failed_fields"]) == 0


def test_repeating_gives_the_same_numbers(plate_path, tmp_path, recwarn):
    """Random weights too: by name and seed."""
    options = {"model": "fastchannelvim_tiny_patch16", "wells": ["A01"], "crop_size": 32}
    runs = [cellvim.embed(plate_path, **options, seed=5) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].X, runs[1].X)
    hashes = [run.uns["cellvim"]["weights"]["sha256"] for run in runs]
    assert hashes[0] == hashes[1]
    assert plan_embedding(plate_path, **options, seed=6).weights_sha256 != hashes[0]


def test_making_a_model_leaves_the_callers_random_numbers_alone(plate_path):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    plan_embedding(plate_path, model="fastchannelvim_tiny_patch16", crop_size=32)
    assert torch.equal(torch.rand(3), expected)


def test_a_field_does_not_depend_on_the_others(plate_path, encoder, adata):
    plan = plan_embedding(plate_path, model=encoder)
    embeddings, objects, spatial = embed_field(plan, plan.plates[0].fields[3])
    rows = (adata.obs["Metadata_Well"] == "A02").to_numpy()
    np.testing.assert_array_equal(embeddings, adata.X[rows])
    np.testing.assert_array_equal(spatial, adata.obsm["spatial"][rows])
    np.testing.assert_array_equal(objects["area_um2"], adata.obs["area_um2"][rows])


def test_batches_off_the_cpu_are_always_full(plate_path, adata):
    """There a library's choice of kernel, and so the last digits, would follow the batch size."""
    encoder, sizes = small_encoder(), set()
    features = encoder.forward_features
    encoder.forward_features = lambda images, **options: sizes.add(len(images)) or features(images, **options)
    plan = replace(plan_embedding(plate_path, model=encoder, batch_size=4), device="cpu:0")
    embeddings, objects, _ = embed_field(plan, plan.plates[0].fields[3])
    assert sizes == {4} and len(objects) == 7
    np.testing.assert_array_equal(embeddings, adata.X[(adata.obs["Metadata_Well"] == "A02").to_numpy()])


def test_checkpoint_gives_what_the_model_in_memory_gives(plate_path, encoder, adata, tmp_path):
    cellvim.save_checkpoint(encoder, tmp_path / "model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = cellvim.embed(plate_path, model=tmp_path / "model.safetensors")
    np.testing.assert_array_equal(again.X, adata.X)
    assert again.uns["cellvim"]["model"]["name"] == "model.safetensors"
    assert again.uns["cellvim"]["weights"]["sha256"] == adata.uns["cellvim"]["weights"]["sha256"]


def test_trained_weights_are_not_warned_about(plate_path, tmp_path):
    trained = small_encoder()
    trained.is_trained = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = cellvim.embed(plate_path, model=trained, wells=["A01"])
    assert result.uns["cellvim"]["weights"]["trained"]
    assert "warning" not in result.uns["cellvim"]["weights"]


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
class TestUnits:
    def test_tiles_cover_the_field(self, plate_path, encoder):
        tiles = cellvim.embed(plate_path, model=encoder, unit="tile", crop_size=64)
        assert tiles.n_obs == 4 * 4  # 128 px in tiles of 64
        assert tiles.obs["Metadata_ObjectNumber"].max() == 4
        assert "area_um2" not in tiles.obs
        assert dict(tiles.uns["cellvim"]["preprocessing"]["crop"]) == {
            "size_px": 64,
            "input_px": 32,
            "size_um": 32.0,
        }

    def test_a_field_is_embedded_whole(self, plate_path, encoder):
        fields = cellvim.embed(plate_path, model=encoder, unit="field")
        assert fields.n_obs == 4
        np.testing.assert_allclose(fields.obsm["spatial"], 63.5 * 0.5)

    def test_a_named_model_fits_the_field(self, plate_path):
        plan = plan_embedding(plate_path, model="fastchannelvim_tiny_patch16", unit="field")
        assert plan.model.config.image_size == (128, 128)

    def test_cells_are_about_forty_micrometres_by_default(self, plate_path):
        assert plan_embedding(plate_path).plates[0].crop_px == 80

    def test_pixels_when_the_size_is_unknown(self, images, tmp_path, encoder):
        path = write_plate(tmp_path / "p.zarr", {"A01": images["A01"]}, CHANNELS, pixel_size_um=None)
        result = cellvim.embed(path, model=encoder)
        assert result.uns["cellvim"]["spatial_unit"] == "pixel"
        assert result.uns["cellvim"]["plate"]["pixel_size_um"] == "unknown"
        assert "size_um" not in result.uns["cellvim"]["preprocessing"]["crop"]
        assert result.obsm["spatial"].max() > 64
        assert result.obs["area_um2"].isna().all()
        assert (result.obs["area_px"] > 0).all()


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
class TestChannels:
    def test_a_chosen_channel_alone(self, plate_path, encoder):
        result = cellvim.embed(plate_path, model=encoder, channels=["GFP"])
        assert list(result.uns["cellvim"]["channels"]["plate"]) == ["GFP"]
        assert result.n_obs == 15  # nuclei are still found in Hoechst

    def test_the_user_says_what_a_channel_shows(self, images, tmp_path, encoder, adata):
        path = write_plate(tmp_path / "drawn.zarr", images, ["ch1", "ch2"])
        with pytest.raises(ChannelError, match="ch1"):
            cellvim.embed(path, model=encoder)
        for channels in ({"GFP": "ch1", "DNA": "ch2"}, "GFP=ch1,DNA=ch2"):
            result = cellvim.embed(path, model=encoder, channels=channels)
            np.testing.assert_array_equal(result.X, adata.X)

    def test_an_unknown_channel_lists_what_there_is(self, plate_path, encoder):
        with pytest.raises(ChannelError, match=r"ER.*GFP, Hoechst"):
            cellvim.embed(plate_path, model=encoder, channels=["ER"])

    def test_a_channel_the_model_does_not_know(self, plate_path):
        with pytest.raises(ChannelError, match=r"GFP.*DNA, ER, Mito"):
            cellvim.embed(plate_path, model=small_encoder(("DNA", "ER", "Mito")))

    def test_a_model_that_does_not_name_its_channels(self, plate_path):
        with pytest.raises(ModelError, match="does not name"):
            cellvim.embed(plate_path, model=small_encoder(None))

    def test_joint_tokens_need_all_channels(self, plate_path):
        with pytest.raises(ModelError, match="requires all"):
            cellvim.embed(plate_path, model=small_encoder(tokens="joint"))


def test_an_unreadable_field_is_recorded_and_the_rest_goes_on(images, tmp_path, encoder, adata):
    path = write_plate(tmp_path / "drawn.zarr", images, CHANNELS, plate_map=PLATE_MAP)
    plan = plan_embedding(path, model=encoder)
    break_chunk(path, "A01", 1)
    summary = run_embedding(plan, tmp_path / "out.zarr")
    result = anndata.read_zarr(tmp_path / "out.zarr")
    kept = ((adata.obs["Metadata_Well"] != "A01") | (adata.obs["Metadata_Site"] != 1)).to_numpy()
    np.testing.assert_array_equal(result.X, adata.X[kept])
    failed = result.uns["cellvim"]["failed_fields"]
    assert failed["field"].tolist() == ["A01/1"]
    assert "A01/1" in failed["reason"].iloc[0]
    assert any("A01/1" in remark for remark in summary.remarks())


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
def test_a_well_that_vanished_is_recorded_too(images, tmp_path, encoder):
    path = write_plate(tmp_path / "drawn.zarr", images, CHANNELS)
    shutil.rmtree(path / "A" / "1")
    with pytest.warns(UserWarning, match="1 of 3 fields could not be read"):
        result = cellvim.embed(path, model=encoder)
    assert result.uns["cellvim"]["failed_fields"]["field"].tolist() == ["A01"]
    assert result.obs["Metadata_Well"].unique().tolist() == ["A02"]


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
def test_no_cell_anywhere_is_said_and_gives_an_empty_anndata(tmp_path, encoder):
    path = write_plate(tmp_path / "p.zarr", {"A01": [draw_field(0, 0)]}, CHANNELS, plate_map=PLATE_MAP)
    with pytest.warns(UserWarning, match="No cell was found"):
        result = cellvim.embed(path, tmp_path / "out.zarr", model=encoder)
    assert result.shape == (0, 24)
    assert "compound" in result.obs and "area_um2" in result.obs


def test_nothing_half_written_on_interrupt(plate_path, tmp_path, encoder):
    plan = plan_embedding(plate_path, model=encoder)

    def interrupt(done, total, rows):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="2 of 4 fields are done and kept"):
        run_embedding(plan, tmp_path / "out.zarr", progress=interrupt)
    assert os.listdir(tmp_path) == ["out.zarr.partial"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"unit": "cells"}, InputError, "Did you mean cell"),
        ({"crop_size": 64, "unit": "field"}, InputError, "embedded whole"),
        ({"crop_size": 2}, InputError, "at least 8"),
        ({"batch_size": 0}, InputError, "at least 1"),
        ({"wells": ["H12"]}, InputError, "A01, A02"),
        ({"wells": ["nonsense"]}, InputError, "is not a well"),
        ({"device": "tpu9"}, InputError, "tpu9"),
        ({"device": "cuda:99"}, InputError, "cuda:99"),
        ({"model": "fastchanelvim_tiny_patch16"}, ModelError, "fastchannelvim_tiny_patch16"),
        ({"model": "missing.safetensors"}, ModelError, "missing.safetensors"),
    ],
)
def test_what_cannot_be_used_is_said(plate_path, options, error, message):
    with pytest.raises(error, match=message):
        cellvim.embed(plate_path, **options)


def test_existing_output_stops_before_any_work(plate_path, tmp_path):
    (tmp_path / "out.zarr").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        cellvim.embed(plate_path, tmp_path / "out.zarr", model="this would fail too")


def test_no_such_plate():
    with pytest.raises(PlateError, match=r"nowhere\.zarr does not exist"):
        cellvim.embed("nowhere.zarr")


def test_plan_is_made_once(plate_path, encoder):
    plan = plan_embedding(plate_path, model=encoder)
    assert isinstance(plan, EmbeddingPlan)
    with pytest.raises(AttributeError):
        plan.seed = 1


def test_option_that_there_is_not_is_refused(tmp_path):
    with pytest.raises(TypeError, match="crop_sizes"):
        plan_embedding(tmp_path / "plate.zarr", crop_sizes=64)


@dataclass(frozen=True, kw_only=True)
class ExtendedOptions(EmbeddingOptions):
    """The options and one more, defined in one place only."""

    blur_um: float = option(0.0, "Standard deviation of a Gaussian filter. Not applied here.", metavar="UM")


def test_a_new_option_reaches_signature_command_line_record_and_identity(plate_path, encoder):
    @with_options(ExtendedOptions)
    def embed(plate, **options):
        """Embed.

        Parameters
        ----------
        plate
            A plate.
        **options
            See `ExtendedOptions`.
        """

    parameter = inspect.signature(embed).parameters["blur_um"]
    assert (parameter.default, parameter.kind) == (0.0, parameter.KEYWORD_ONLY)
    assert "Standard deviation of a Gaussian filter" in embed.__doc__ and "**options" not in embed.__doc__

    plans = [make_plan(plate_path, ExtendedOptions(model=encoder, blur_um=blur)) for blur in (0.0, 1.5)]
    assert json.loads(describe_run(plans[1], [])["cellvim"]["options"])["blur_um"] == 1.5
    assert identity_digest(plans[0].identity) != identity_digest(plans[1].identity)


def test_embed_has_every_option_that_affects_the_rows():
    parameters = inspect.signature(cellvim.embed).parameters
    for each in fields(EmbeddingOptions):
        assert parameters[each.name].default == each.default
        assert f"\n    {each.name}\n" in cellvim.embed.__doc__
    assert inspect.signature(plan_embedding).parameters.keys() > {each.name for each in fields(EmbeddingOptions)}
    record = EmbeddingOptions().record()
    assert record.keys() == {f.name for f in fields(EmbeddingOptions)} - {"batch_size", "device"}


def test_equivalent_options_have_the_same_record():
    python = EmbeddingOptions(channels={"DNA": "ch5", "ER": "ch4"}, wells=("A01", "B07"), cells=Path("table.csv"))
    command_line = EmbeddingOptions(channels="DNA=ch5,ER=ch4", wells=["A01", "B07"], cells="table.csv")
    assert python.record() == command_line.record()


@pytest.mark.parametrize("seed", [-5, 2**63])
def test_seeds_that_no_library_accepts_are_refused_before_any_work(plate_path, seed):
    with pytest.raises(InputError, match="seed"):
        plan_embedding(plate_path, seed=seed)
