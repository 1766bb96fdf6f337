"""The command line: derived options, printed results, exit codes, and that outputs are complete or absent."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import anndata
import numpy as np
import pytest
import tifffile
from synthetic_plate import break_chunk, draw_field, write_plate

import cellvim
from cellvim.cli import main
from cellvim.embedding import run as embedding

CHANNELS = ["GFP", "DNA"]


@pytest.fixture(scope="module")
def images():
    return {"A01": [draw_field(0, 4)], "A02": [draw_field(1, 5)]}


@pytest.fixture(scope="module")
def plate(images, tmp_path_factory):
    return write_plate(tmp_path_factory.mktemp("plate") / "plate.zarr", images, CHANNELS)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small checkpoint, so that embedding takes no time."""
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    config = cellvim.EncoderConfig(
        image_size=32, patch_size=8, in_channels=2, channel_names=("DNA", "GFP"), embed_dim=16, depth=2, num_classes=0
    )
    cellvim.save_checkpoint(cellvim.Encoder(config), path)
    return path


@pytest.fixture
def tiffs(images, tmp_path):
    folder = tmp_path / "tiffs"
    folder.mkdir()
    for well, sites in images.items():
        for site, image in enumerate(sites):
            for channel, plane in enumerate(image):
                tifffile.imwrite(folder / f"{well}_s{site + 1}_w{channel + 1}.tif", plane)
    return folder


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Run the command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return run


def _error(result: tuple[int, str, str], code: int = 2) -> str:
    """Return the one line that a failed command prints."""
    assert result[0] == code, result
    lines = [line for line in result[2].splitlines() if line]
    assert len(lines) == 1 and lines[0].startswith("Error: "), result
    assert "Traceback" not in result[2]
    return lines[0]


def test_embed_writes_says_where_and_warns_of_random_weights(run, plate, weights):
    code, out, err = run("embed", plate, "-o", "out.zarr", "--model", weights)
    assert code == 0
    assert out.startswith("9 cells from 2 fields in ") and out.rstrip().endswith("cells/s) → out.zarr")
    assert "UNTRAINED" in err
    adata = anndata.read_zarr("out.zarr")
    assert adata.shape == (9, 16)
    assert not adata.uns["cellvim"]["weights"]["trained"]


@pytest.mark.parametrize(("unit", "rows"), [("tile", 32), ("field", 2)])
def test_other_units(run, plate, weights, unit, rows):
    code, out, _ = run("embed", plate, "--unit", unit, "--model", weights)
    assert code == 0 and out.startswith(f"{rows} {unit}s")
    assert anndata.read_zarr("embeddings.zarr").n_obs == rows


def test_options_reach_the_run(run, plate, weights):
    code, *_ = run(
        *("embed", plate, "--model", weights, "--channels", "GFP", "--wells", "A02", "--crop-size", 40),
        *("--batch-size", 2, "--device", "cpu", "--seed", 7),
    )
    assert code == 0
    uns = anndata.read_zarr("embeddings.zarr").uns["cellvim"]
    assert list(uns["channels"]["plate"]) == ["GFP"]
    assert list(uns["plate"]["wells"]) == ["A02"]
    assert uns["preprocessing"]["crop"]["size_px"] == 40
    assert uns["seed"] == 7
    session = json.loads(Path("embeddings.zarr.manifest.json").read_text())["sessions"][0]
    assert (session["batch_size"], session["devices"]) == (2, ["cpu"])


def test_import_info_embed(run, tiffs, weights):
    Path("map.csv").write_text("Well,compound\nA01,dmso\nA02,drug\n")
    code, out, _ = run(
        *("import", tiffs, "plate.zarr", "--metadata", "map.csv", "--channel-names", "w1=GFP,w2=DNA"),
        *("--pixel-size", 0.5),
    )
    assert code == 0 and "2 wells, 2 fields, channels GFP, DNA" in out
    code, out, _ = run("info", "plate.zarr")
    assert code == 0
    for text in ("2 (A01 to A02)", "GFP, DNA", "128 x 128", "0.5", "compound"):
        assert text in out
    assert run("embed", "plate.zarr", "--model", weights)[0] == 0
    obs = anndata.read_zarr("embeddings.zarr").obs
    assert obs.groupby("compound", observed=True).size().to_dict() == {"dmso": 4, "drug": 5}


def test_info_says_what_is_odd(run, images, tmp_path):
    path = write_plate(tmp_path / "p.zarr", images, CHANNELS, pixel_size_um=None)
    code, out, _ = run("info", path)
    assert code == 0
    assert "unknown" in out and "note" in out and "no pixel size" in out


def test_models_and_backends(run):
    code, out, _ = run("models", "fastchannelvim")
    assert code == 0 and "fastchannelvim_tiny_patch16" in out and "random weights" in out
    assert "fastchannelvim_multichannel  TRAINED" in out
    code, out, _ = run("backends")
    assert code == 0 and "reference" in out and "selected" in out


def test_version(run):
    assert run("--version")[1].strip() == f"cellvim {cellvim.__version__}"


# --- bad input: one clear line, exit code 2 ---


@pytest.mark.parametrize("command", ["embed", "info"])
def test_no_such_path(run, command):
    assert "nowhere.zarr does not exist" in _error(run(command, "nowhere.zarr"))


def test_not_a_plate(run, tiffs):
    Path("empty").mkdir()
    assert "not an OME-Zarr plate" in _error(run("embed", "empty"))
    assert "cellvim import" in _error(run("embed", tiffs))
    assert "no TIFF" in _error(run("import", "empty", "plate.zarr"))
    assert not Path("plate.zarr").exists()


def test_a_missing_channel(run, tiffs):
    (tiffs / "A02_s1_w2.tif").unlink()
    assert "A02" in _error(run("import", tiffs, "plate.zarr"))
    assert not Path("plate.zarr").exists()


def test_an_unknown_channel(run, plate, weights):
    line = _error(run("embed", plate, "--model", weights, "--channels", "DNA2"))
    assert "'DNA2' is not in plate.zarr; it has GFP, DNA" in line


def test_a_plate_map_without_wells(run, tiffs):
    Path("map.csv").write_text("compound,dose\ndmso,0\n")
    assert "well" in _error(run("import", tiffs, "plate.zarr", "--metadata", "map.csv")).lower()
    assert not Path("plate.zarr").exists()


def test_an_output_that_exists(run, plate, weights, tiffs):
    assert run("embed", plate, "--model", weights)[0] == 0
    before = sorted(os.stat(p).st_mtime_ns for p in Path("embeddings.zarr").rglob("*"))
    assert "--overwrite" in _error(run("embed", plate, "--model", weights))
    assert sorted(os.stat(p).st_mtime_ns for p in Path("embeddings.zarr").rglob("*")) == before
    assert run("embed", plate, "--model", weights, "--overwrite", "--wells", "A01")[0] == 0
    assert anndata.read_zarr("embeddings.zarr").n_obs == 4
    assert run("import", tiffs, "p.zarr")[0] == 0
    assert "--overwrite" in _error(run("import", tiffs, "p.zarr"))


def test_the_plate_is_never_overwritten_by_its_embeddings(run, images, weights, tmp_path):
    path = write_plate(tmp_path / "p.zarr", images, CHANNELS)
    assert "not an AnnData" in _error(run("embed", path, "-o", path, "--overwrite", "--model", weights))
    assert len(cellvim.open_plate(path).fields) == 2


def test_an_unreadable_chunk(run, images, weights, tmp_path):
    path = write_plate(tmp_path / "p.zarr", images | {"B01": [draw_field(4, 6)]}, CHANNELS)
    break_chunk(path, "A02")
    code, out, err = run("embed", path, "--model", weights)
    assert code == 3
    assert out.startswith("10 cells from 2 fields")
    lines = [line for line in err.splitlines() if "A02/0" in line]
    assert len(lines) == 1 and "1 of 3 fields could not be read" in lines[0]
    adata = anndata.read_zarr("embeddings.zarr")
    assert adata.obs["Metadata_Well"].unique().tolist() == ["A01", "B01"]
    assert adata.uns["cellvim"]["failed_fields"]["field"].tolist() == ["A02/0"]


def test_no_field_can_be_read(run, images, weights, tmp_path):
    path = write_plate(tmp_path / "p.zarr", images, CHANNELS)
    for well in images:
        break_chunk(path, well)
    _error(run("embed", path, "--model", weights))
    assert not Path("embeddings.zarr").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--unit", "nucleus"], "cell, tile, field"),
        (["--device", "abacus"], "abacus"),
        (["--device", "meta"], "not known"),
        (["--model", "resnet50"], "resnet50"),
        (["--model", "."], "."),
        (["--crop-size", "1"], "at least 8"),
        (["--unit", "tile", "--crop-size", "1000000"], "expected at most"),
        (["--z", "7"], "z=7"),
        (["--wells", "Z99"], "Z99"),
        (["--z", "two"], "--z"),
    ],
)
def test_options_that_cannot_be_used(run, plate, arguments, message):
    assert message in _error(run("embed", plate, *arguments))
    assert not Path("embeddings.zarr").exists()


def test_weights_that_are_none(run, plate):
    Path("broken.safetensors").write_bytes(b"not weights at all")
    assert "broken.safetensors" in _error(run("embed", plate, "--model", "broken.safetensors"))


def test_an_output_folder_that_cannot_be_written(run, plate, weights):
    Path("file").write_text("")
    assert "cannot be written" in _error(run("embed", plate, "-o", "file/out.zarr", "--model", weights))


def test_unknown_commands_and_options_name_themselves(run):
    code, _, err = run("embedd")
    assert code == 2 and "embedd" in err
    code, _, err = run("embed", "plate.zarr", "--colour", "red")
    assert code == 2 and "--colour" in err


def test_interrupt_is_one_line_and_130(run, plate, weights, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedding, "embed_here", interrupt)
    code, _, err = run("embed", plate, "--model", weights)
    assert code == 130 and len(err.splitlines()) == 1
    assert err.startswith("Interrupted: 0 of 2 fields are done") and "resumes" in err
    assert not Path("embeddings.zarr").exists()


def test_bugs_keep_their_traceback(run, plate, weights, monkeypatch):
    def bug(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(embedding, "embed_here", bug)
    with pytest.raises(ZeroDivisionError):
        run("embed", plate, "--model", weights)
    assert not Path("embeddings.zarr").exists()


def test_help_lists_the_commands(run):
    out = run("--help")[1]
    for command in ("import", "info", "embed", "status", "report", "attribute", "models", "backends", "demo"):
        assert command in out


OPTIONS = {  # of every command; names are part of the public interface
    "import": "metadata channel-names pixel-size pert-type plate-name format pattern compounds load-data z t overwrite",
    "info": "",
    "embed": "output unit model channels wells crop-size crop-um um-per-px overlap cells border mask-neighbours "
    "scale-by illumination batch-size device devices precision workers shard engine address per-plate format "
    "per-channel probabilities tokens spatialdata log seed z t level overwrite",
    "status": "json",
    "profile": "output aggregate by normalize fit-on per select-features min-cells control batch seed overwrite",
    "evaluate": "output use tasks label control positive perturbation dose mechanism plate well batch null-size seed "
    "overwrite",
    "report": "output plate profiles evaluation color-by title max-cells control positive perturbation dose mechanism "
    "seed overwrite",
    "attribute": "well site number output model method target steps unit channels crop-size cells device seed "
    "overwrite",
    "models": "",
    "backends": "",
    "datasets": "",
    "demo": "output overwrite",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_of_commands(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert set(re.findall(r"--([a-z-]+)", "\n".join(re.findall(r"^  +-.*", out, re.M)))) == {
        *OPTIONS[command].split(),
        "help",
    }


def test_options_are_derived_from_a_signature_and_its_docstring():
    from cellvim import cli

    def blur(
        image: str, *, size_um: float | None = None, mode: Literal["mean", "median"] = "mean", wells: Sequence[str] = ()
    ):
        """Blur an image.

        Parameters
        ----------
        image
            A picture.
        size_um
            Size of the ``window``. It is square.
        mode
            Statistic.
        wells
            Wells to blur.
        """

    image, size, mode, wells = cli.parameters_of(blur)
    assert (image.name, image.required, image.help) == ("image", True, "A picture.")
    assert (size.opts, size.default, size.help, size.type.name) == (["--size-um"], None, "Size of the window.", "float")
    assert (mode.metavar, mode.default) == ("[mean|median]", "mean")
    assert wells.type.convert("A01, B02", wells, None) == ["A01", "B02"] and wells.type.convert("", wells, None) == []


@pytest.mark.parametrize("arguments", [["--help"], ["embed", "--help"]])
def test_help_answers_at_once(arguments):
    """Under half a second of processor time: wall time would depend on what else the machine does."""
    code = (
        f"import json, sys, time; from cellvim.cli import main; main({arguments}); "
        "print(json.dumps([time.process_time(), sorted(m for m in sys.modules if '.' not in m)]), file=sys.stderr)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
        for _ in range(3)
    ]
    seconds, modules = zip(*(json.loads(run.stderr) for run in runs), strict=True)
    assert "embed" in runs[0].stdout
    assert min(seconds) < 0.5
    assert not {"torch", "zarr", "anndata", "numpy", "pandas", "skimage", "sklearn", "scipy"} & set(modules[0])


def test_progress_is_silent_but_on_a_terminal(run, plate, weights):
    _, _, err = run("embed", plate, "--model", weights)
    assert [line for line in err.splitlines() if not line.startswith("Warning")] == []


def test_rows_are_the_same_from_python_and_from_the_command_line(run, plate, weights):
    run("embed", plate, "--model", weights)
    with pytest.warns(UserWarning, match="UNTRAINED"):
        adata = cellvim.embed(plate, model=weights)
    np.testing.assert_array_equal(adata.X, anndata.read_zarr("embeddings.zarr").X)
