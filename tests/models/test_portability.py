"""Models move: copies, pickles, checkpoints, compiled graphs, exported programs, ONNX, hub folders, timm."""

from __future__ import annotations

import copy
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import torch

import cellvim
from cellvim import Encoder, EncoderConfig, load_checkpoint, save_checkpoint
from cellvim.errors import InputError, ModelError

TINY = {
    "image_size": 16,
    "patch_size": 8,
    "in_channels": 3,
    "embed_dim": 16,
    "depth": 2,
    "num_classes": 0,
    "d_state": 4,
}


@pytest.fixture
def model() -> Encoder:
    torch.manual_seed(0)
    return Encoder(EncoderConfig(**TINY)).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def test_copies_and_pickles_embed_alike(model, images) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(images), model(images))
    config = model.config.replace(image_size=(16, 24), channel_names=("DNA", "ER", "RNA"))
    assert pickle.loads(pickle.dumps(config)) == config
    assert EncoderConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("tokens", ["joint", "per_channel"])
def test_compiles_to_one_graph(tokens: str, images) -> None:
    model = Encoder(EncoderConfig(**TINY | {"tokens": tokens})).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), model(images))


def test_compiled_graph_learns_alike(model, images) -> None:
    model.train()
    model.config = model.config.replace(channel_sampling="none")
    for block in model.layers:
        block.drop_rate = 0.0
    model(images).square().sum().backward()
    expected = {k: p.grad.clone() for k, p in model.named_parameters()}
    model.zero_grad()
    torch.compile(model, fullgraph=True, backend="aot_eager")(images).square().sum().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], msg=key)


@pytest.mark.slow
def test_inductor_embeds_alike(model, images) -> None:
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-5)


def test_exported_program_takes_any_batch_and_channels(model, images) -> None:
    batch, count = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("channels", min=1, max=3)
    program = torch.export.export(
        model,
        (images[:, :2].contiguous(), torch.tensor([0, 2])),
        dynamic_shapes={"images": {0: batch, 1: count}, "channels": {0: count}},
    ).module()
    for ids in ([0, 1, 2], [2], [1, 0]):
        for size in (1, 2):
            some = images[:size, : len(ids)].contiguous()
            expected = model(some, channels=ids)
            torch.testing.assert_close(program(some, torch.tensor(ids)), expected, rtol=1e-4, atol=1e-5)


def test_scan_without_a_loop_equals_the_loop() -> None:
    from cellvim.ops.reference import _scan_by_doubling

    generator = torch.Generator().manual_seed(0)
    decay = torch.rand(2, 1, 37, 3, 2, generator=generator, dtype=torch.float64)
    drive = torch.randn(2, 1, 37, 3, 2, generator=generator, dtype=torch.float64)
    state, expected = torch.zeros(2, 1, 3, 2, dtype=torch.float64), []
    for t in range(37):
        state = decay[:, :, t] * state + drive[:, :, t]
        expected.append(state)
    torch.testing.assert_close(_scan_by_doubling(decay, drive), torch.stack(expected, 2), rtol=1e-12, atol=1e-12)


def test_onnx_graph_embeds_alike_for_any_batch_and_channels(model, images, tmp_path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = cellvim.export_onnx(model, tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(path))
    for ids in ([0, 1, 2], [2], [0, 2]):
        for size in (1, 2):
            some = images[:size, : len(ids)]
            (out,) = session.run(None, {"images": some.numpy(), "channels": np.array(ids)})
            np.testing.assert_allclose(out, model(some, channels=ids).detach().numpy(), atol=1e-5)


def test_onnx_export_of_a_training_model_or_to_another_ending_is_refused(model, tmp_path) -> None:
    with pytest.raises(InputError, match=r"\.onnx"):
        cellvim.export_onnx(model, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"eval\(\)"):
        cellvim.export_onnx(model.train(), tmp_path / "model.onnx")


def test_checkpoint_keeps_weights_configuration_and_card(model, images, tmp_path) -> None:
    model.is_trained = True
    path = save_checkpoint(model, tmp_path / "a" / "model.safetensors", card={"licence": "BSD-3-Clause"})
    loaded = load_checkpoint(path)
    assert torch.equal(loaded(images), model(images))
    assert (loaded.config, loaded.is_trained, loaded.card) == (model.config, True, {"licence": "BSD-3-Clause"})
    assert not loaded.training
    assert torch.equal(load_checkpoint(path.parent)(images), model(images))


def test_hub_folder_round_trip(model, images, tmp_path) -> None:
    model.save_pretrained(tmp_path / "hub")
    assert torch.equal(Encoder.from_pretrained(tmp_path / "hub")(images), model(images))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="has no"):
        Encoder.from_pretrained(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_bytes(b"no"), "not a complete safetensors file"),
        (lambda p: p.write_bytes(b""), "not a complete safetensors file"),
    ],
)
def test_damaged_checkpoint_is_refused(tmp_path, write, message: str) -> None:
    write(tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        load_checkpoint(tmp_path / "model.safetensors")


def test_bare_safetensors_is_told_apart_from_our_checkpoint(model, tmp_path) -> None:
    from safetensors.torch import save_file

    save_file(dict(model.state_dict()), tmp_path / "bare.safetensors")
    with pytest.raises(ModelError, match="load_reference"):
        load_checkpoint(tmp_path / "bare.safetensors")


def test_timm_gets_every_model(monkeypatch) -> None:
    from cellvim.models.timm_registration import register_with_timm

    registered = {}
    timm, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    models.register_model = lambda f: registered.setdefault(f.__name__, f)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.models", models)
    assert set(register_with_timm()) == set(registered)
    model = registered["cellvim_fastvim_tiny_patch16"](img_size=32, in_chans=4, num_classes=2, depth=1)
    assert model(torch.rand(1, 4, 32, 32)).shape == (1, 2)
    with pytest.raises(ModelError, match="no pretrained weights"):
        registered["cellvim_fastvim_tiny_patch16"](pretrained=True)


def test_model_modules_need_only_torch_and_numpy() -> None:
    import subprocess

    code = (
        "import sys, cellvim.models.mae, cellvim.models.registry, cellvim.ops\n"
        "heavy = {'zarr', 'anndata', 'lightning', 'torchvision', 'pandas', 'skimage', 'scanpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
