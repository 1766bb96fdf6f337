"""Registration of CellVim's models with timm: ``timm.create_model("cellvim_fastvim_tiny_patch16")``."""

from __future__ import annotations

from cellvim.errors import ModelError
from cellvim.models.registry import create_model, list_models


def register_with_timm() -> list[str]:
    """Register every named architecture with timm, prefixed with ``cellvim_``, and return the names.

    timm's ``img_size``, ``in_chans`` and ``drop_path_rate`` are supported. ``pretrained=True`` is an error: no weights
    of these architectures are published under a licence that permits redistribution.

    Raises
    ------
    ModelError
        timm cannot be imported.
    """
    try:
        from timm.models import register_model
    except ImportError as error:
        raise ModelError(f"timm cannot be imported ({error}); install it with: pip install timm.") from error

    names = []
    for name in list_models():
        entry = _entry_point(name)
        register_model(entry)
        names.append(entry.__name__)
    return names


def _entry_point(name: str):
    def create(pretrained: bool = False, **options):
        if pretrained:
            raise ModelError(f"There are no pretrained weights of {name}; use pretrained=False.")
        for theirs, ours in (("img_size", "image_size"), ("in_chans", "in_channels")):
            if theirs in options:
                options[ours] = options.pop(theirs)
        # timm also passes options of its own loading code.
        options = {k: v for k, v in options.items() if not k.startswith("pretrained_") and v is not None}
        return create_model(name, **options)

    create.__name__ = f"cellvim_{name}"
    create.__module__ = __name__
    create.__doc__ = f"CellVim's {name}."
    return create
