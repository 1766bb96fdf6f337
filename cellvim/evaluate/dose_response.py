"""Dose response: a four-parameter logistic curve of activity against dose for each perturbation, fitted by scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.assay import ACTIVITY
from cellvim.profiles.columns import Columns, column_of, text

MIN_DOSES = 4
HILL = (0.1, 20.0)


def dose_response(scores: pd.DataFrame, obs: pd.DataFrame, columns: Columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit a curve to each perturbation with at least four doses.

    Parameters
    ----------
    scores
        Returned by `cellvim.evaluate.assay.activity_scores` or `distance_scores`.
    obs
        Table of the same rows.
    columns
        Columns of doses and perturbations; without a perturbation column, all doses belong to one curve.

    Returns
    -------
    curves : pandas.DataFrame
        One row per perturbation: ``perturbation``, ``n_wells``, ``n_doses``, ``lowest_dose``, ``highest_dose``, the
        parameters ``bottom``, ``top``, ``ec50`` and ``hill`` (see `logistic`), ``log10_ec50_se`` (standard error),
        ``r_squared``, ``p_value`` of the F test against no response, ``spearman`` (rank correlation of dose and
        activity), ``in_range`` (whether the EC50 is within the doses), and ``remark``, why there is no curve.
    points : pandas.DataFrame
        One row per perturbation and dose: ``perturbation``, ``dose``, ``n_wells``, ``mean`` and ``std`` of activity.

    Raises
    ------
    MetadataError
        There is no column of doses, it has no numbers, or no perturbation has four doses.
    """
    wells = dosed_wells(scores, obs, columns)
    points = wells.groupby(["perturbation", "dose"])[ACTIVITY].agg(n_wells="size", mean="mean", std="std").reset_index()
    curves = [
        {"perturbation": name} | _curve(table["dose"].to_numpy(), table[ACTIVITY].to_numpy())
        for name, table in wells.groupby("perturbation", sort=True)
    ]
    curves = pd.DataFrame(curves)
    if not (curves["n_doses"] >= MIN_DOSES).any():
        raise MetadataError(
            f"No perturbation has {MIN_DOSES} doses above 0; the maximum is {curves['n_doses'].max()} in column "
            f"'{columns.dose}'."
        )
    return curves, points


def logistic(dose: np.ndarray, bottom: float, top: float, ec50: float, hill: float) -> np.ndarray:
    """Return the four-parameter logistic curve, bottom + (top − bottom) / (1 + (ec50 / dose)^hill)."""
    dose = np.asarray(dose, dtype=np.float64)
    with np.errstate(divide="ignore", over="ignore"):
        share = 1 / (1 + np.exp(-hill * (np.log(dose) - np.log(ec50))))
    return bottom + (top - bottom) * share


def fit_logistic(dose: np.ndarray, response: np.ndarray) -> tuple[np.ndarray, float]:
    """Fit `logistic` to ``dose`` and ``response``, (n,), by least squares, starting from the best point of a grid.

    Returns bottom, top, ec50 and hill, (4,), and the standard error of log10(ec50). Bottom may be above top. The EC50
    is between a tenth of the lowest and ten times the highest dose.

    Raises
    ------
    InputError
        There are fewer than four doses above 0, or the fit does not converge.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    positive = np.unique(dose[dose > 0])
    if len(positive) < MIN_DOSES:
        raise InputError(f"{len(positive)} doses above 0; a curve requires {MIN_DOSES}.")
    if np.ptp(response) == 0:
        raise InputError("The response is the same at every dose.")
    log_range = np.log10(positive[0]) - 1, np.log10(positive[-1]) + 1
    span = np.ptp(response)
    limits = response.min() - span, response.max() + span
    bounds = ([limits[0], limits[0], log_range[0], HILL[0]], [limits[1], limits[1], log_range[1], HILL[1]])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # if the covariance cannot be estimated, the error is NaN
            found, covariance = curve_fit(
                lambda x, bottom, top, log_ec50, hill: logistic(x, bottom, top, 10**log_ec50, hill),
                dose,
                response,
                p0=np.clip(_start(dose, response, log_range), *bounds),
                bounds=bounds,
                max_nfev=2000,
            )
    except RuntimeError as error:
        raise InputError("The fit of the curve does not converge.") from error
    error = float(np.sqrt(covariance[2, 2])) if np.isfinite(covariance[2, 2]) else np.nan
    return np.array([found[0], found[1], 10 ** found[2], found[3]]), error


def _start(dose: np.ndarray, response: np.ndarray, log_range: tuple[float, float]) -> np.ndarray:
    """Return the best point of a grid of EC50s and Hill slopes; bottom and top of each by linear least squares."""
    log_ec50, hill = np.meshgrid(np.linspace(*log_range, 41)[1:-1], np.geomspace(0.3, 10, 9), indexing="ij")
    log_ec50, hill = log_ec50.ravel()[:, None], hill.ravel()[:, None]
    share = logistic(dose[None], 0, 1, 10**log_ec50, hill)  # (grid, n)
    centred = share - share.mean(axis=1, keepdims=True)
    variance = (centred**2).sum(axis=1)
    slope = np.where(variance > 1e-12, centred @ response / np.maximum(variance, 1e-12), 0)
    bottom = response.mean() - slope * share.mean(axis=1)
    # a large difference of top and bottom is an extrapolation from a part of the curve
    slope_is_sane = np.abs(slope) <= 2 * np.ptp(response)
    cost = ((bottom[:, None] + slope[:, None] * share - response) ** 2).sum(axis=1)
    best = int(np.argmin(np.where(slope_is_sane, cost, np.inf)))
    return np.array([bottom[best], bottom[best] + slope[best], log_ec50[best, 0], hill[best, 0]])


def dosed_wells(scores: pd.DataFrame, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    """Return ``perturbation``, ``dose`` and ``activity`` of the treated rows with a dose; raise if there are none."""
    name = column_of(columns, "dose", obs)
    dose = pd.to_numeric(text(obs[name]), errors="coerce").to_numpy(np.float64)
    if columns.perturbation is not None and columns.perturbation != name:
        perturbation = text(obs[columns.perturbation]).to_numpy()
    else:
        perturbation = np.full(len(obs), "all doses", dtype=object)
    wells = pd.DataFrame({"perturbation": perturbation, "dose": dose, ACTIVITY: scores[ACTIVITY].to_numpy()})
    is_control = (scores["kind"] != "").to_numpy()
    wells = wells[~is_control & np.isfinite(dose) & (dose >= 0) & wells["perturbation"].notna() & (perturbation != "")]
    wells = wells[np.isfinite(wells[ACTIVITY])]
    if wells.empty:
        raise MetadataError(f"No treated row has a dose in '{name}' and an activity.")
    return wells


def _curve(dose: np.ndarray, response: np.ndarray) -> dict[str, object]:
    from scipy.stats import f as f_distribution
    from scipy.stats import spearmanr

    positive = np.unique(dose[dose > 0])
    varies = len(np.unique(dose)) > 1 and np.ptp(response) > 0
    result: dict[str, object] = {
        "n_wells": len(dose),
        "n_doses": len(positive),
        "lowest_dose": positive[0] if len(positive) else np.nan,
        "highest_dose": positive[-1] if len(positive) else np.nan,
        **dict.fromkeys(("bottom", "top", "ec50", "hill", "log10_ec50_se", "r_squared", "p_value"), np.nan),
        "spearman": spearmanr(dose, response).statistic if varies else np.nan,
        "in_range": False,
        "remark": "",
    }
    try:
        (bottom, top, ec50, hill), error = fit_logistic(dose, response)
    except InputError as reason:
        return result | {"remark": str(reason)}
    residual = ((logistic(dose, bottom, top, ec50, hill) - response) ** 2).sum()
    total = ((response - response.mean()) ** 2).sum()
    freedom = len(dose) - 4
    p = np.nan
    if freedom > 0:
        p = f_distribution.sf((total - residual) / 3 / (residual / freedom), 3, freedom) if residual > 0 else 0.0
    result |= {"bottom": bottom, "top": top, "ec50": ec50, "hill": hill, "log10_ec50_se": error, "p_value": p}
    return result | {"r_squared": 1 - residual / total, "in_range": bool(positive[0] <= ec50 <= positive[-1])}
