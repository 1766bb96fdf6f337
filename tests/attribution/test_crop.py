"""`cellvim attribute`: the crop equals the embedded one, the figure shows it, and errors are one line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from synthetic_plate import draw_field, write_plate

import cellvim
from cellvim.attribution import AttentionScores, attention_scores, attribute, draw_attribution, read_crop
from cellvim.cli import main
from cellvim.embedding import plan_embedding
from cellvim.errors import InputError

NAMES = ("DNA", "GFP")


def save_model(path: Path, **changes) -> Path:
    options = {
        "image_size": 32, "patch_size": 8, "in_channels": 2, "channel_names": NAMES, "embed_dim": 16, "depth": 2,
        "num_classes": 0,
    }  # fmt: skip
    torch.manual_seed(0)
    cellvim.save_checkpoint(cellvim.Encoder(cellvim.EncoderConfig(**options | changes)), path)
    return path


@pytest.fixture(scope="module")
def plate(tmp_path_factory):
    fields = {"A01": [draw_field(0, 5), draw_field(2, 4)], "A02": [draw_field(1, 5)], "B01": [draw_field(3, 0)]}
    return write_plate(tmp_path_factory.mktemp("plate") / "plate.zarr", fields, ["GFP", "DNA"])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "small.safetensors")


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        return main([str(a) for a in arguments]), *capsys.readouterr()

    return run


@pytest.mark.filterwarnings("ignore:.*UNTRAINED")
@pytest.mark.parametrize("options", [{"crop_size": 48}, {"unit": "tile", "crop_size": 64}, {"mask_neighbours": True}])
def test_the_crop_equals_the_embedded_one(plate, model, options):
    """The features of the crop equal its row from `cellvim.embed`."""
    adata = cellvim.embed(plate, model=model, **options)
    plan = plan_embedding(plate, model=model, **options)
    row = adata.obs.iloc[-1 if "unit" in options else 3]
    crop = read_crop(plan, row["Metadata_Well"], str(row["Metadata_Site"]), int(row["Metadata_ObjectNumber"]))
    assert crop.name == row.name
    assert crop.channel_names == ["DNA", "GFP"]  # the model's order
    with torch.inference_mode():
        feature = plan.model.forward_features(torch.from_numpy(crop.image[None]), channels=plan.plates[0].channel_ids)
    np.testing.assert_allclose(feature[0], adata[row.name].X[0], atol=1e-5)


def test_the_default_is_the_cell_at_the_centre(plate, model):
    crop = read_crop(plan_embedding(plate, model=model), "a1")
    assert crop.name.startswith("plate__A01__0__")
    assert crop.image.shape == (2, 32, 32) and crop.um_per_px == 0.5


def test_the_figure_shows_all_channels_and_special_characters():
    torch.manual_seed(0)
    config = {"image_size": 20, "patch_size": 8, "in_channels": 8, "embed_dim": 8, "depth": 1, "num_classes": 0}
    encoder = cellvim.Encoder(cellvim.EncoderConfig(**config, pool="attention"))
    image = np.random.default_rng(0).random((8, 20, 20), np.float32)
    names = ["$\\frac{DNA", "<b>ER</b>", "名前", "a" * 60, "x_1", "y^2", "z", ""]
    for found in (attribute(encoder, image[None], steps=2), attention_scores(encoder, image[None])):
        figure = draw_attribution(found, image, names, title="$x <script>", um_per_px=0.5)
        figure.canvas.draw()
        shown = [axis for axis in _axes(figure) if axis.images]
        assert len(shown) == 16
        drawn = np.asarray(figure.canvas.buffer_rgba())
        assert drawn.shape[2] == 4 and drawn[..., :3].std() > 10
        has_bars = any(axis.get_title() == "by channel" for axis in _axes(figure))
        assert has_bars == (not isinstance(found, AttentionScores))  # scores do not compare channels
    with pytest.raises(InputError, match="expected \\(7"):
        draw_attribution(found, image, names[:7])


def test_patches_are_plotted_over_their_pixels():
    """Only the relevant patch is coloured; the patch size does not divide the image size."""

    class TopLeft(cellvim.Encoder):
        def forward_features(self, images, channels=None, keep=None):
            seen = torch.zeros_like(images)
            seen[:, :, 8:16, 16:] = images[:, :, 8:16, 16:]
            return super().forward_features(seen, channels, keep)

    torch.manual_seed(0)
    config = cellvim.EncoderConfig(image_size=20, patch_size=8, in_channels=1, embed_dim=8, depth=1, num_classes=0)
    image = np.random.default_rng(0).random((1, 20, 20), np.float32) + 0.1
    found = attribute(TopLeft(config), image[None], method="occlusion")
    figure = draw_attribution(found, image, ["DNA"])
    overlay = next(axis for axis in _axes(figure) if axis.images and axis.images[0].get_array().ndim == 3)
    pixels = np.asarray(overlay.images[0].get_array())
    colored = np.ptp(pixels, axis=2) > 1e-6
    expected = np.zeros((20, 20), bool)
    expected[8:16, 16:] = True
    np.testing.assert_array_equal(colored, expected)


def _axes(figure):
    found = list(figure.axes)
    for part in figure.subfigs:
        found += [axis for axis in part.axes if axis not in found]
    return found


@pytest.mark.parametrize("method", ["integrated_gradients", "occlusion"])
def test_the_command_writes_a_picture(run, plate, model, method):
    code, out, err = run("attribute", plate, "--well", "A01", "--model", model, "--method", method, "--steps", 8)
    assert code == 0, err
    assert "plate__A01__0__" in out and "DNA" in out and "GFP" in out and "→ attribution.png" in out
    assert "UNTRAINED" in err
    assert Path("attribution.png").read_bytes().startswith(b"\x89PNG")
    code, _, err = run("attribute", plate, "--well", "A01", "--model", model)
    assert code == 2 and "--overwrite" in err


def test_the_command_with_attention_scores(run, plate, tmp_path, model):
    pooled = save_model(tmp_path / "attention.safetensors", pool="attention")
    code, out, err = run("attribute", plate, "--well", "A02", "--model", pooled, "--method", "attention", "-o", "a.svg")
    assert code == 0 and "times an equal share" in out and "do not compare channels" in err
    assert Path("a.svg").read_text().lstrip().startswith("<?xml")
    code, _, err = run("attribute", plate, "--well", "A02", "--model", model, "--method", "attention")
    assert code == 2 and "pools by 'mean'" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--well", "C05"], "no well C05"),
        (["--well", "nonsense"], "not a well"),
        (["--well", "A01", "--site", "9"], "no site '9'; it has 0, 1"),
        (["--well", "A01", "--number", "99"], "number 99"),
        (["--well", "B01"], "No cell was found"),
        (["--well", "A01", "--method", "magic"], "magic"),
        (["--well", "A01", "--target", "3"], "no classes"),
        (["--well", "A01", "--target", "logit"], "'logit'"),
        (["--well", "A01", "-o", "picture.doc"], "not a supported picture"),
        (["--well", "A01", "-o", "nowhere/picture.png"], "does not exist"),
    ],
)
def test_errors_are_one_line(run, plate, model, arguments, message):
    code, out, err = run("attribute", plate, "--model", model, *arguments)
    assert code == 2 and out == ""
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("Error: ") and message in lines[0]
    assert not list(Path().glob("*.png"))
