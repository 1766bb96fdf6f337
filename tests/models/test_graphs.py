"""Which calls are captured and which captures are replayed; what a GPU makes of them is `benchmarks.gpu_check`'s."""

from __future__ import annotations

import pytest
import torch

from cellvim import Encoder, EncoderConfig
from cellvim.errors import BackendError, ModelError
from cellvim.models import graphs


def small_encoder() -> Encoder:
    return Encoder(EncoderConfig(image_size=32, in_channels=5, embed_dim=16, depth=2, num_classes=3)).eval()


@pytest.fixture
def captured(monkeypatch) -> list[tuple]:
    """Pretend that there is a GPU; shapes and channels of each capture, which is replayed by running the model."""
    shapes: list[tuple] = []

    class Replay:
        def __init__(self, method, images, channels):
            shapes.append((tuple(images.shape), None if channels is None else len(channels)))
            self.method = method

        def replay(self, images, channels):
            with torch.no_grad():
                return self.method(images, channels)

    monkeypatch.setattr(graphs.GraphedEncoder, "_capture", lambda self, *call: Replay(*call))
    monkeypatch.setattr(graphs, "_device_of", lambda model: OnGpu())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.Tensor, "to", _stay)
    return shapes


class OnGpu:
    """Pretends to be a GPU."""

    type = "cuda"


_to = torch.Tensor.to


def _stay(tensor, *args, **kwargs):
    return tensor if args and isinstance(args[0], OnGpu) else _to(tensor, *args, **kwargs)


def test_a_shape_is_captured_once_and_channels_are_data(captured):
    model = small_encoder()
    encode = graphs.GraphedEncoder(model, autocast=None)
    for batch, channels in ((2, None), (2, None), (3, None), (2, [0, 1, 2]), (2, [4, 3, 1]), (2, None)):
        images = torch.rand(batch, 5 if channels is None else 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(encode(images, channels), model(images, channels))
    assert captured == [((2, 5, 32, 32), None), ((3, 5, 32, 32), None), ((2, 3, 32, 32), 3)]


def test_features_and_logits_have_graphs_of_their_own(captured):
    model = small_encoder()
    encode, images = graphs.GraphedEncoder(model, autocast=None), torch.rand(2, 5, 32, 32)
    assert encode(images).shape == (2, 3) and encode.forward_features(images).shape == (2, 16)
    assert len(captured) == 2


def test_the_graph_that_was_used_longest_ago_goes_first(captured):
    encode = graphs.GraphedEncoder(small_encoder(), autocast=None, most_graphs=2)
    for batch in (1, 2, 1, 3, 1, 2):
        encode(torch.rand(batch, 5, 32, 32))
    assert [shape[0] for shape, _ in captured] == [1, 2, 3, 2]


def test_channels_of_each_sample_run_without_a_graph(captured):
    encode, images = graphs.GraphedEncoder(small_encoder(), autocast=None), torch.rand(2, 3, 32, 32)
    assert encode(images, [[0, 1, 2], [3, 4]]).shape == (2, 3)
    assert not captured


def test_a_model_in_training_is_refused(captured):
    encode = graphs.GraphedEncoder(small_encoder().train(), autocast=None)
    with pytest.raises(ModelError, match=r"model.eval\(\)"):
        encode(torch.rand(1, 5, 32, 32))


def test_a_model_on_the_cpu_is_refused_and_left_as_it_is():
    model = small_encoder()
    with pytest.raises(BackendError, match="on cpu"):
        graphs.GraphedEncoder(model)
    assert graphs.replayed(model) is model
