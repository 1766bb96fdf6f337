"""Maps of tokens: what the model says of each patch of a field, as images of an OME-Zarr plate of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cellvim.errors import InputError, OutputError
from cellvim.files import is_url

_KIND = "token maps"  # in the metadata: what does not say so is not ours to replace


def token_maps_name(output: str | Path, plate: str, n_plates: int) -> Path:
    """Return where the maps of a plate's fields lie: beside the output."""
    base = str(output).rstrip("/")
    base = base.removesuffix("." + base.rpartition(".")[2]) if "." in Path(base).name else base
    return Path(f"{base}.tokens.zarr" if n_plates == 1 else f"{base}.{plate}.tokens.zarr")


def check_token_maps(output: str | Path, plates: Sequence[str], *, overwrite: bool) -> None:
    """Check that the maps of plates of these names may be written.

    Raises
    ------
    InputError
        The output is behind a URL: maps are written to folders only.
    OutputError
        One exists and ``overwrite`` is off, or it is something else than maps of tokens.
    """
    if is_url(output):
        raise InputError("Maps of tokens are written to folders, not to a URL. Choose another --output.")
    for plate in plates:
        path = token_maps_name(output, plate, len(plates))
        if not os.path.lexists(path):
            continue
        if not overwrite:
            raise OutputError(f"{path} exists already. Choose another --output, or replace both with --overwrite.")
        if not _is_token_maps(path):
            raise OutputError(
                f"{path} exists and holds no maps of tokens, so it is not replaced. Move it, or choose another "
                "--output."
            )


def write_token_maps(
    plan: Any, ledger: Any, output: str | Path, load: Callable[[tuple[int, int], int], Any], *, overwrite: bool
) -> None:
    """Write each field's maps as an image of one channel a feature and stain, a pixel a patch.

    ``load`` returns the rows of a field of the ledger by its key and number of rows.
    """
    from cellvim.data.plate_writer import PlateWriter

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
            for key, n in sorted(counts.items()):
                maps = load(key, n).tokens.swapaxes(0, 1)  # (C, D, rows, columns)
                one = plate.fields[key[1]]
                writer.write_field(one.well, str(one.site), maps.reshape(-1, *maps.shape[2:]))
            writer.finish(provenance={"kind": _KIND})


def _is_token_maps(path: Path) -> bool:
    try:
        attributes = json.loads((path / "zarr.json").read_text(encoding="utf-8"))["attributes"]
        return not path.is_symlink() and attributes["cellvim"]["provenance"]["kind"] == _KIND
    except (OSError, ValueError, KeyError, TypeError):
        return False
