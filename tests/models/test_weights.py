"""Published checkpoints load strictly, in every published layout, and never run code; saving is atomic."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from cellvim import Encoder, EncoderConfig, MaskedAutoencoder, load_reference, save_checkpoint
from cellvim.errors import ModelError, OutputError

CONFIG = EncoderConfig(image_size=16, patch_size=8, in_channels=3, embed_dim=16, depth=1, num_classes=2, d_state=4)


@pytest.fixture
def published() -> dict[str, torch.Tensor]:
    """Return a published state dict: our parameter names, without the state of the generator."""
    torch.manual_seed(1)
    return {k: torch.randn_like(p) for k, p in Encoder(CONFIG).named_parameters()}


def prefixed(weights: dict, prefix: str) -> dict:
    return {prefix + k: v for k, v in weights.items()}


def other(weights: dict) -> dict:
    return {k: torch.full_like(v, 7.0) for k, v in weights.items()}


LAYOUTS = {
    "bare": lambda w: w,
    "pth": lambda w: {"model": w, "epoch": 300, "optimizer": {"lr": 1.0}},
    "data_parallel": lambda w: {"model": prefixed(w, "module.")},
    "lightning": lambda w: {"state_dict": prefixed(w, "model."), "pytorch-lightning_version": "2.1.0"},
    "lightning_compiled": lambda w: {"state_dict": prefixed(w, "model._orig_mod.")},
    "lightning_with_a_loss": lambda w: {"state_dict": prefixed(w, "model.") | {"criterion.weight": torch.ones(2)}},
    "lightning_with_average": lambda w: {"state_dict": prefixed(other(w), "model.") | prefixed(w, "model_ema.module.")},
    "timm_average": lambda w: {"model": other(w), "model_ema": w},
    "timm_state_dict_ema": lambda w: {"state_dict": other(w), "state_dict_ema": prefixed(w, "module.")},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_loads(layout: str, published, tmp_path) -> None:
    torch.save(LAYOUTS[layout](published), tmp_path / "weights.ckpt")
    model = load_reference(Encoder(CONFIG), tmp_path / "weights.ckpt")
    assert model.is_trained
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, published[key]), key


def test_raw_weights_are_taken_when_asked(published, tmp_path) -> None:
    for layout in ("timm_average", "lightning_with_average", "timm_state_dict_ema"):
        model = load_reference(Encoder(CONFIG), LAYOUTS[layout](published), use_ema=False)
        assert (model.head.weight == 7).all(), layout


def test_autoencoder_loads_too(tmp_path) -> None:
    model = MaskedAutoencoder(CONFIG, decoder_dim=16, decoder_depth=1)
    weights = {k: torch.randn_like(p) for k, p in model.named_parameters()}
    load_reference(model, {"model": weights})
    assert torch.equal(model.mask_token, weights["mask_token"])


def test_unknown_missing_and_misshapen_entries_are_named_and_nothing_is_loaded(published) -> None:
    model = Encoder(CONFIG)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    published["layers.0.mixer.extra"] = torch.ones(1)
    del published["norm_f.weight"]
    published["head.bias"] = torch.ones(3)
    with pytest.raises(ModelError) as caught:
        load_reference(model, published)
    for part in ("layers.0.mixer.extra", "norm_f.weight", r"head.bias is (3,), expected (2,)"):
        assert part in str(caught.value)
    assert not model.is_trained
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickled_code_is_refused_and_never_run(tmp_path, capsys) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ModelError, match="never runs"):
        load_reference(Encoder(CONFIG), tmp_path / "evil.ckpt")
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ModelError):
        load_reference(Encoder(CONFIG), tmp_path / "evil.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04broken"])
def test_damaged_file_is_refused(content: bytes, tmp_path) -> None:
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(ModelError, match=r"weights\.pth cannot be read"):
        load_reference(Encoder(CONFIG), tmp_path / "weights.pth")


def test_missing_file_and_a_file_without_weights_are_refused(tmp_path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        load_reference(Encoder(CONFIG), tmp_path / "none.pth")
    torch.save({"epoch": 3, "args": {"lr": 1.0}}, tmp_path / "empty.pth")
    with pytest.raises(ModelError, match="no weights"):
        load_reference(Encoder(CONFIG), tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="list"):
        load_reference(Encoder(CONFIG), tmp_path / "list.pth")


@pytest.mark.skipif(not hasattr(os, "umask"), reason="needs POSIX permissions")
def test_a_saved_model_has_the_permissions_of_other_new_files(tmp_path) -> None:
    (tmp_path / "other").touch()
    path = save_checkpoint(Encoder(CONFIG), tmp_path / "model.safetensors")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["model.safetensors", "other"]


def test_from_pretrained_refuses_the_checkpoint_of_another_class(tmp_path) -> None:
    MaskedAutoencoder(CONFIG, decoder_dim=16, decoder_depth=1).save_pretrained(tmp_path)
    assert isinstance(MaskedAutoencoder.from_pretrained(tmp_path), MaskedAutoencoder)
    with pytest.raises(ModelError, match=r"contains a MaskedAutoencoder.*cellvim\.load_checkpoint"):
        Encoder.from_pretrained(tmp_path)


def test_a_failed_save_leaves_the_existing_file_and_no_other(tmp_path, monkeypatch) -> None:
    path = save_checkpoint(Encoder(CONFIG), tmp_path / "model.safetensors")
    before = path.read_bytes()

    def fail_halfway(tensors, file, header) -> None:
        file.write_bytes(b"incomplete")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cellvim.models.checkpoints.save_file", fail_halfway)
    with pytest.raises(OutputError, match="No space left"):
        save_checkpoint(Encoder(CONFIG), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
