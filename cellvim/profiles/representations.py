"""Representations of the rows of an AnnData: ``X``, layers and matrices of ``obsm``, by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from cellvim.errors import InputError, MetadataError, listing

if TYPE_CHECKING:
    from anndata import AnnData


def representations(adata: AnnData) -> list[str]:
    """Return the names of the representations: "X", layers, and two-dimensional entries of ``obsm``."""
    found = ["X"] if adata.X is not None else []
    found += [str(name) for name in adata.layers]
    return found + [str(name) for name in adata.obsm if name != "spatial" and getattr(adata.obsm[name], "ndim", 0) == 2]


def latest_representation(adata: AnnData) -> str:
    """Return the name of the representation that `cellvim.profiles` computed last, or "X"; raise if it was removed."""
    latest = str(adata.uns.get("cellvim", {}).get("profile", {}).get("latest", "X"))
    if latest not in (known := representations(adata)):
        raise InputError(
            f"The latest representation, '{latest}', does not exist; expected one of {listing(known)}. Choose with "
            "--use."
        )
    return latest


def matrix(adata: AnnData, use: str = "X", *, dtype: type | None = np.float64) -> np.ndarray:
    """Return "X", a layer or an entry of ``obsm`` as (n, D); with ``dtype=None``, as stored. Raise if there is none."""
    values = adata.X if use == "X" else adata.layers.get(use, adata.obsm.get(use))
    if values is None:
        raise MetadataError(f"There is no representation '{use}'; expected one of {listing(representations(adata))}.")
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=dtype)


def feature_names(adata: AnnData, use: str) -> np.ndarray:
    """Return the names of the columns of a representation, (D,)."""
    if use == "X" or use in adata.layers:
        return adata.var_names.to_numpy(dtype=object)
    return np.array([f"{use}_{i}" for i in range(adata.obsm[use].shape[1])], dtype=object)


def store(
    adata: AnnData,
    key: str,
    values: np.ndarray,
    settings: Mapping[str, Any],
    fitted: Mapping[str, np.ndarray],
    *,
    as_layer: bool = False,
) -> None:
    """Add ``values``, (n, D), as float32 to ``obsm["X_" + key]``, or to ``layers[key]`` if its features are those of X.

    ``uns["cellvim"]["profile"][key]`` records the settings as JSON, and the ``fitted`` arrays.
    """
    name = key if as_layer else f"X_{key}"
    (adata.layers if as_layer else adata.obsm)[name] = values.astype(np.float32, copy=False)
    profile = adata.uns.setdefault("cellvim", {}).setdefault("profile", {})
    arrays = {array_name: np.asarray(array) for array_name, array in fitted.items()}
    profile[key] = {"settings": json.dumps(dict(settings))} | arrays
    profile["latest"] = name


def settings_of(adata: AnnData, key: str) -> dict[str, Any]:
    """Return the settings with which a representation was computed."""
    return json.loads(str(adata.uns["cellvim"]["profile"][key]["settings"]))
