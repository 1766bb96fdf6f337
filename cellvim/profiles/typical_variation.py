"""Typical variation normalisation (TVN): what varies among controls is made small, and batches are aligned on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError
from cellvim.profiles.columns import Columns, matrix
from cellvim.profiles.fitting import feature_names, finite_features, note, reference

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
    """Centre each batch on its controls, whiten by the controls' principal components, align the batches by CORAL.

    With m_b the mean of batch b's controls, V and Λ the principal axes and variances of the controls of all batches
    after that centring, and C_b the covariance of batch b's controls after whitening::

        z = Λ^(−1/2) Vᵀ (x − m_b)                        so that all controls together have covariance I
        z ← (1 + λ)^(1/2) (C_b + λ I)^(−1/2) z           so that each batch's controls have nearly so

    Whitening is from [1]_, the second step is CORAL [2]_ towards the pooled covariance, which is I. Controls need not
    outnumber features: only components in which they vary are kept.

    Parameters
    ----------
    adata
        Profiles; changed in place.
    fit_on
        "negcon" or "all".
    per
        What is aligned: "batch", "plate", a column of ``obs``, or "all" for no alignment.
    use
        "X", a layer, or an entry of ``obsm``.
    key
        Name of the result.
    n_components
        Components to keep; all in which the controls vary if not given.
    shrinkage
        λ. Each batch has few controls, so its covariance is drawn towards the identity.
    columns
        Which columns say plate, batch and controls.

    Returns
    -------
    None
        Sets

        ``obsm["X_" + key]``
            (n, K) float32.
        ``uns["cellvim"]["profile"][key]``
            ``settings`` (JSON); ``groups`` (G,), ``center`` (G, D'), ``components`` (D', K), V Λ^(−1/2), and
            ``transform`` (G, K, K): the result is (x − center) @ components @ transform; ``features`` (D',).

    Raises
    ------
    CellvimError
        A column is not there, or there are too few controls.

    References
    ----------
    .. [1] Ando, McLean and Berndl, "Improving phenotypic measurements in high-content imaging screens", bioRxiv, 2017.
    .. [2] Sun, Feng and Saenko, "Return of frustratingly easy domain adaptation", AAAI, 2016.
    """
    if shrinkage < 0:
        raise InputError(f"The shrinkage is {shrinkage}; expected 0 or more.")
    values = matrix(adata, use)
    names = feature_names(adata, use)
    kept = finite_features(values, names, "TVN")
    groups = reference(adata, fit_on=fit_on, per=per, columns=columns, at_least=3)
    values = values[:, kept]
    center = np.stack([values[fitted].mean(axis=0) for _, _, fitted in groups])
    centred = values - center[groups.codes]
    components = _whitening(centred[groups.fitted], n_components, rank=int(groups.fitted.sum()) - len(center))
    z = centred @ components
    identity = np.eye(z.shape[1])
    transform = np.stack(
        [
            np.sqrt(1 + shrinkage) * _inverse_root(_covariance(z[fitted]) + shrinkage * identity)
            for _, _, fitted in groups
        ]
        if len(center) > 1
        else [identity]
    )
    result = np.empty(z.shape, np.float32)
    for (_, rows, _), matrix_of_group in zip(groups, transform, strict=True):
        result[rows] = z[rows] @ matrix_of_group
    adata.obsm[f"X_{key}"] = result
    settings = {"method": "tvn", "use": use, "fit_on": fit_on, "per": per, "shrinkage": shrinkage}
    arrays = {"groups": groups.groups, "center": center, "components": components, "transform": transform}
    note(adata, key, f"X_{key}", settings | {"n_components": z.shape[1]}, arrays | {"features": names[kept]})


def _whitening(centred: np.ndarray, n_components: int | None, rank: int) -> np.ndarray:
    """Return V Λ^(−1/2), (D, K), of the at most ``rank`` components in which the rows vary."""
    _, singular, axes = np.linalg.svd(centred, full_matrices=False)
    varying = int((singular > 1e-6 * singular[0]).sum()) if singular[0] > 0 else 0  # float32 has no more digits
    most = min(rank, varying)
    if most < 1:
        raise InputError("The rows that TVN is fitted on are all alike, so there is no variation to normalise by.")
    if n_components is not None and not 1 <= n_components <= most:
        raise InputError(f"TVN has 1 to {most} components here; {n_components} were asked for.")
    k = n_components or most
    return axes[:k].T / singular[:k] * np.sqrt(rank)


def _covariance(centred: np.ndarray) -> np.ndarray:
    return centred.T @ centred / max(1, len(centred) - 1)


def _inverse_root(symmetric: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(symmetric)
    # without shrinkage, a batch with few controls has directions without variance: they are left as they are
    values = np.where(values > 1e-9 * values.max(), values, 1)
    return (vectors / np.sqrt(values)) @ vectors.T
