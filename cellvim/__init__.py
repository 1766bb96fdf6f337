"""CellVim turns microscopy plates into embeddings.

Notebooks use ``open_plate``, ``embed``, ``profile``, ``evaluate_profiles``, ``create_model`` and ``load_checkpoint``.
Names are imported on first use, so that ``import cellvim`` and ``cellvim --help`` are fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {  # public name -> the module that defines it
    "CellvimError": "cellvim.errors",
    "Encoder": "cellvim.models.encoder",
    "EncoderConfig": "cellvim.models.config",
    "MaskedAutoencoder": "cellvim.models.mae",
    "create_model": "cellvim.models.registry",
    "evaluate_profiles": "cellvim.evaluate",
    "embed": "cellvim.embedding",  # not embed.py: importing such a module would hide this function
    "export_onnx": "cellvim.models.onnx",
    "from_pycytominer": "cellvim.profiles",
    "list_models": "cellvim.models.registry",
    "load_checkpoint": "cellvim.models.registry",
    "load_reference": "cellvim.models.checkpoints",
    "open_plate": "cellvim.data.plate",
    "profile": "cellvim.profiles",
    "save_checkpoint": "cellvim.models.checkpoints",
    "to_pycytominer": "cellvim.profiles",
    "to_spatialdata_table": "cellvim.profiles",
}

__all__ = [
    "CellvimError",
    "Encoder",
    "EncoderConfig",
    "MaskedAutoencoder",
    "__version__",
    "create_model",
    "embed",
    "evaluate_profiles",
    "export_onnx",
    "from_pycytominer",
    "list_models",
    "load_checkpoint",
    "load_reference",
    "open_plate",
    "pl",
    "profile",
    "save_checkpoint",
    "to_pycytominer",
    "to_spatialdata_table",
]

if TYPE_CHECKING:
    from cellvim.data.plate import open_plate
    from cellvim.embedding import embed
    from cellvim.errors import CellvimError
    from cellvim.evaluate import evaluate_profiles
    from cellvim.models.checkpoints import load_reference, save_checkpoint
    from cellvim.models.config import EncoderConfig
    from cellvim.models.encoder import Encoder
    from cellvim.models.mae import MaskedAutoencoder
    from cellvim.models.onnx import export_onnx
    from cellvim.models.registry import create_model, list_models, load_checkpoint
    from cellvim.profiles import from_pycytominer, profile, to_pycytominer, to_spatialdata_table


def __getattr__(name: str):
    if name == "pl":
        return import_module("cellvim.pl")
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'cellvim' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
