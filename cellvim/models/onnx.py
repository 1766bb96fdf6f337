"""Export of encoders to ONNX graphs with a variable batch size and, for per-channel tokens, variable channels."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from cellvim.errors import InputError
from cellvim.files import atomic_path
from cellvim.models.encoder import Encoder


def export_onnx(model: Encoder, path: str | Path) -> Path:
    """Write the model to an ONNX file.

    The inputs of the graph are ``images`` (batch, channels, height, width) float32 and, for per-channel tokens, the
    channel ids ``channels`` (channels,) int64. Its output is ``features``: the logits if the model has a head.
    Height and width are fixed to the model's. The scan is exported without a loop, so that its length may vary.

    Parameters
    ----------
    model
        Encoder in evaluation mode.
    path
        Output file, ending in ``.onnx``.

    Returns
    -------
    The path.

    Raises
    ------
    InputError
        The path does not end in ``.onnx``, the model is in training mode, or the extra ``cellvim[onnx]`` is not
        installed.
    OutputError
        The file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise InputError(f"The ONNX file {path} must end in .onnx.")
    if model.training:
        raise InputError("The model is in training mode; call model.eval() before export_onnx.")
    if find_spec("onnxscript") is None:  # torch.onnx needs it, but its own message is unclear
        raise InputError("ONNX export needs an extra: pip install 'cellvim[onnx]'.")

    config = model.config
    batch = torch.export.Dim("batch", min=1, max=4096)
    images = torch.zeros(2, config.in_channels, config.image_height, config.image_width)
    if config.tokens == "per_channel" and config.in_channels > 2:
        count = torch.export.Dim("channels", min=1, max=config.in_channels)
        ids = torch.arange(1, config.in_channels)  # ids other than 0 … C − 1 remain an input
        inputs = (images[:, 1:].contiguous(), ids)
        shapes = {"images": {0: batch, 1: count}, "channels": {0: count}}
    elif config.tokens == "per_channel":
        inputs, shapes = (images, torch.arange(config.in_channels)), {"images": {0: batch}, "channels": None}
    else:
        inputs, shapes = (images,), {"images": {0: batch}}
    names = {"input_names": list(shapes), "output_names": ["features"]}
    program = torch.onnx.export(model, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False, **names)
    with atomic_path(path) as partial:
        program.save(str(partial))
    return path
