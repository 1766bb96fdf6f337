"""CUDA graphs of encoders: one launch per inference, so that small batches are not limited by Python.

A forward pass enqueues a few hundred kernels, and with small batches the GPU finishes each before the next is enqueued.
A graph records the kernels once per input shape and replays all of them in one launch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import cellvim.ops as ops
from cellvim.errors import BackendError, ModelError
from cellvim.models.encoder import Encoder
from cellvim.models.patch_embed import Channels, resolve_channels

_WARM_UPS = 3  # passes before the capture, in which libraries allocate memory and choose their kernels


def replayed(model: Encoder, autocast: torch.dtype | None = None) -> Encoder | GraphedEncoder:
    """Return a `GraphedEncoder` of the model if it runs on the CUDA kernels, otherwise the model itself."""
    device = _device_of(model)
    if device.type != "cuda" or ops.selected_backend(device) != "cuda":
        return model
    return GraphedEncoder(model, autocast)


class GraphedEncoder:
    """An `Encoder` whose inference is captured once per input shape and replayed.

    Parameters
    ----------
    model
        Encoder on a CUDA GPU, in evaluation mode. Its weights may change in place; replacing them needs a new
        `GraphedEncoder`.
    autocast
        Type of the matrix products and tokens; None for the model's own.
    most_graphs
        Number of graphs to keep, each with the memory of its activations. The least recently used is dropped first.

    Raises
    ------
    BackendError
        The model is not on a CUDA GPU.

    Examples
    --------
    >>> model = cellvim.create_model("fastchannelvim_small_patch16").cuda().eval()  # doctest: +SKIP
    >>> encode = GraphedEncoder(model)  # doctest: +SKIP
    >>> features = encode.forward_features(images)  # doctest: +SKIP
    """

    def __init__(self, model: Encoder, autocast: torch.dtype | None = torch.bfloat16, most_graphs: int = 8) -> None:
        device = _device_of(model)
        if device.type != "cuda":
            raise BackendError(f"The model is on {device.type}, but CUDA graphs need a CUDA GPU. Call model.cuda().")
        self.model = model
        self.autocast = autocast
        self.most_graphs = most_graphs
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, images: Tensor, channels: Channels = None) -> Tensor:
        """See `Encoder.forward`."""
        return self._run(self.model.forward, images, channels)

    def forward_features(self, images: Tensor, channels: Channels = None) -> Tensor:
        """See `Encoder.forward_features`."""
        return self._run(self.model.forward_features, images, channels)

    def _run(self, method: Callable, images: Tensor, channels: Channels) -> Tensor:
        if self.model.training:
            raise ModelError("The model is in training mode; CUDA graphs are for inference. Call model.eval().")
        device = _device_of(self.model)
        # Lists are checked on the CPU, which does not synchronise with the GPU; only the shape of the images matters.
        stand_in = images if isinstance(channels, Tensor) else torch.empty(0).expand(*images.shape[:2], 0)
        ids = resolve_channels(channels, stand_in, self.model.config)
        if ids is not None and ids.ndim == 2:  # channels per sample: their indices are data
            return self._forward(method, images.to(device), ids.to(device))
        key = method.__name__, tuple(images.shape), images.dtype, None if ids is None else len(ids)
        if key not in self._graphs:
            self._graphs[key] = self._capture(method, images.to(device), None if ids is None else ids.to(device))
            while len(self._graphs) > self.most_graphs:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key].replay(images, ids)

    # Inference tensors could not be written to by later calls outside of torch.inference_mode().
    @torch.inference_mode(False)
    @torch.no_grad()
    def _capture(self, method: Callable, images: Tensor, channels: Tensor | None) -> _Graph:
        device = images.device
        images, channels = images.clone(), None if channels is None else channels.clone()
        with torch.cuda.device(device):  # the model's GPU need not be the current one
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(_WARM_UPS):
                    self._forward(method, images, channels)
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may read and copy images meanwhile.
            try:
                with torch.cuda.graph(graph, pool=self._memory, stream=side, capture_error_mode="thread_local"):
                    output = self._forward(method, images, channels)
            except RuntimeError as error:
                # Running out of memory breaks the capture, whose end then fails as well.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                raise
        return _Graph(graph, images, channels, output)

    @torch.no_grad()
    def _forward(self, method: Callable, images: Tensor, channels: Tensor | None) -> Tensor:
        # Without the cache of autocast: weights cast outside the graph would be missing when it is replayed. The
        # caller's own autocast is overridden.
        lower = self.autocast or torch.bfloat16
        with torch.autocast("cuda", lower, enabled=self.autocast is not None, cache_enabled=False):
            return method(images, channels)


def _device_of(model: Encoder) -> torch.device:
    return next(model.parameters()).device


@dataclass(frozen=True)
class _Graph:
    """A captured forward pass with its input and output memory."""

    graph: torch.cuda.CUDAGraph
    images: Tensor
    channels: Tensor | None
    output: Tensor

    @torch.inference_mode(False)
    @torch.no_grad()
    def replay(self, images: Tensor, channels: Tensor | None) -> Tensor:
        self.images.copy_(images, non_blocking=True)
        if channels is not None:
            self.channels.copy_(channels, non_blocking=True)
        self.graph.replay()
        return self.output.clone()  # the next replay overwrites it
