"""Typical variation normalisation (TVN): whiten by the variation among controls, and align batches on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError
from cellvim.profiles.columns import Columns
from cellvim.profiles.normalization import finite_matrix, reference_rows
from cellvim.profiles.representations import store

if TYPE_CHECKING:
    from anndata import AnnData


def tvn(
    adata: AnnData,
    *,
    fit_on: str = "negcon",
    per: str = "batch",
    use: str = "X",
    key: str = "tvn",
    n_components: int | None = None,
    shrinkage: float = 1.0,
    columns: Columns | None = None,
) -> None:
    """Centre each batch on its controls, whiten by the principal components of the controls, align batches by CORAL.

    With m_b the mean of the controls of batch b, V and Λ the principal axes and variances of the centred controls of
    all batches, and C_b the covariance of the controls of batch b after whitening::

        z = Λ^(−1/2) Vᵀ (x − m_b)                        all controls together have covariance I
        z ← (1 + λ)^(1/2) (C_b + λ I)^(−1/2) z           the controls of each batch nearly do

    Whitening is from [1]_; the second step is CORAL [2]_ towards the pooled covariance, which is I. There may be fewer
    controls than features: only components in which the controls vary are kept.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    fit_on
        Reference rows: "negcon" or "all".
    per
        Groups to align: "batch", "plate", a column of ``obs``, or "all" for no alignment.
    use
        "X", a layer, or an entry of ``obsm``.
    key
        Name of the result.
    n_components
        Number of components; by default all in which the controls vary.
    shrinkage
        λ: shrinks the covariance of each batch, estimated from few controls, towards the identity.
    columns
        Columns by role; found by their common names by default.

    Returns
    -------
    None
        Sets

        ``obsm["X_" + key]``
            (n, K) float32.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON); ``groups`` (G,), ``center`` (G, D'), ``components`` (D', K), V Λ^(−1/2), and
            ``transform`` (G, K, K); the result is (x − center) @ components @ transform; ``features`` (D',).

    Raises
    ------
    CellvimError
        A column does not exist, or there are too few controls.

    References
    ----------
    .. [1] Ando, McLean and Berndl, "Improving phenotypic measurements in high-content imaging screens", bioRxiv, 2017.
    .. [2] Sun, Feng and Saenko, "Return of frustratingly easy domain adaptation", AAAI, 2016.
    """
    if shrinkage < 0:
        raise InputError(f"The shrinkage is {shrinkage}; expected 0 or more.")
    values, kept, names = finite_matrix(adata, use, "TVN")
    groups = reference_rows(adata, fit_on=fit_on, per=per, columns=columns, at_least=3)
    center = np.stack([values[fitted].mean(axis=0) for _, _, fitted in groups])
    centred = values - center[groups.codes]
    components = _whitening(centred[groups.fitted], n_components, rank=int(groups.fitted.sum()) - len(center))
    z = centred @ components
    identity = np.eye(z.shape[1])
    transform = np.stack(
        [
            np.sqrt(1 + shrinkage)
            * _inverse_root(z[fitted].T @ z[fitted] / max(1, fitted.sum() - 1) + shrinkage * identity)
            for _, _, fitted in groups
        ]
        if len(center) > 1
        else [identity]
    )
    result = np.empty(z.shape, np.float32)
    for (_, rows, _), matrix_of_group in zip(groups, transform, strict=True):
        result[rows] = z[rows] @ matrix_of_group
    settings = {"method": "tvn", "use": use, "fit_on": fit_on, "per": per, "shrinkage": shrinkage}
    settings["n_components"] = z.shape[1]
    arrays = {"groups": groups.groups, "center": center, "components": components, "transform": transform}
    store(adata, key, result, settings, arrays | {"features": names[kept]})


def _whitening(centred: np.ndarray, n_components: int | None, rank: int) -> np.ndarray:
    """Return V Λ^(−1/2), (D, K), for the at most ``rank`` components in which the rows vary."""
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    varying = int((singular > 1e-6 * singular[0]).sum()) if singular[0] > 0 else 0  # the precision of float32
    most = min(rank, varying)
    if most < 1:
        raise InputError("The reference rows of TVN are all equal, so there is no variation to normalise by.")
    if n_components is not None and not 1 <= n_components <= most:
        raise InputError(f"{n_components} components are not possible; TVN has 1 to {most} components here.")
    k = n_components or most
    return axes[:k].T / singular[:k] * np.sqrt(rank)


def _inverse_root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    # without shrinkage, a batch with few controls has directions without variance: they are left unchanged
    values = np.where(values > 1e-9 * values.max(), values, 1)
    return (vectors / np.sqrt(values)) @ vectors.T
