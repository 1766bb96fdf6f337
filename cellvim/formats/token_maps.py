"""Maps of tokens: what the model says of each patch of a field, as images of an OME-Zarr plate of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cellvim.errors import InputError


def token_maps_name(output: str | Path, plate: str, n_plates: int) -> Path:
    """Return where the maps of a plate's fields lie: beside the output."""
    base = str(output).rstrip("/")
    base = base.removesuffix("." + base.rpartition(".")[2]) if "." in Path(base).name else base
    return Path(f"{base}.tokens.zarr" if n_plates == 1 else f"{base}.{plate}.tokens.zarr")


def write_token_maps(plan: Any, ledger: Any, output: str | Path, *, overwrite: bool) -> None:
    """Write each field's maps as an image of one channel a feature and stain, a pixel a patch.

    Raises
    ------
    InputError
        The output is behind a URL: plates of maps are written to folders only.
    """
    from cellvim.data.writer import PlateWriter

    if "://" in str(output):
        raise InputError("Maps of tokens are written to folders, not to a URL. Choose another --output.")
    for number, plate in enumerate(plan.plates):
        counts = ledger.done([number])
        patch = plan.model.config.patch_size
        pixel = plate.cutting.um_per_px or plate.pixel_size_um
        stains = plate.meanings if plan.model.config.tokens == "per_channel" else ["all"]
        names = [f"{stain} emb_{i:04d}" for stain in stains for i in range(plan.n_features)]
        with PlateWriter(
            token_maps_name(output, plate.name, len(plan.plates)),
            name=f"{plate.name} tokens",
            channel_names=names,
            pixel_size_um=None if pixel is None else pixel * patch,
            overwrite=overwrite,
        ) as writer:
            for (_, field), n in sorted(counts.items()):
                rows = ledger.load((number, field), n)
                maps = rows.tokens.swapaxes(0, 1)  # (C, D, rows, columns)
                one = plate.fields[field]
                writer.write_field(one.well, str(one.site), maps.reshape(-1, *maps.shape[2:]))
            writer.finish()
