"""Dose response: a four-parameter logistic curve through the activity of each perturbation's doses, by scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd

from cellvim.errors import InputError, MetadataError
from cellvim.evaluate.assay import ACTIVITY
from cellvim.profiles.columns import Columns, role, text

MIN_DOSES = 4
HILL = (0.1, 20.0)


def dose_response(scores: pd.DataFrame, obs: pd.DataFrame, columns: Columns) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fit a curve to each perturbation that has four or more doses.

    Parameters
    ----------
    scores
        By `cellvim.evaluate.assay.activity_scores`: 0 is the negative, 1 the positive control.
    obs
        The table of the same rows.
    columns
        Dose, and perturbation; where there is none, all doses are of one.

    Returns
    -------
    curves : pandas.DataFrame
        One row a perturbation: ``perturbation``, ``n_wells``, ``n_doses``, ``lowest_dose``, ``highest_dose``, the
        parameters ``bottom``, ``top``, ``ec50`` and ``hill`` (see `logistic`), ``log10_ec50_se`` (standard error),
        ``r_squared``, ``p_value`` of the F test against no response, ``spearman`` (rank correlation of dose and
        activity), ``in_range``, whether the EC50 lies within the doses, and ``remark``, why there is no curve.
    points : pandas.DataFrame
        One row a perturbation and dose: ``perturbation``, ``dose``, ``n_wells``, ``mean`` and ``std`` of the activity.

    Raises
    ------
    MetadataError
        There is no column of doses, it holds no numbers, or no perturbation has four doses.
    """
    wells = _dosed_wells(scores, obs, columns)
    points = wells.groupby(["perturbation", "dose"])[ACTIVITY].agg(n_wells="size", mean="mean", std="std").reset_index()
    curves = [
        {"perturbation": name} | _curve(table["dose"].to_numpy(), table[ACTIVITY].to_numpy())
        for name, table in wells.groupby("perturbation", sort=True)
    ]
    curves = pd.DataFrame(curves)
    if not (curves["n_doses"] >= MIN_DOSES).any():
        raise MetadataError(
            f"No perturbation has {MIN_DOSES} doses above 0; the most is {curves['n_doses'].max()} in column "
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
    """Fit `logistic` by least squares, from several starts.

    Parameters
    ----------
    dose, response
        (n,) each; at least four doses above 0.

    Returns
    -------
    numpy.ndarray
        (4,) bottom, top, ec50, hill. The curve rises or falls from bottom to top as the data do; the EC50 is sought
        from a tenth of the lowest to ten times the highest dose.
    float
        Standard error of log10(ec50).

    Raises
    ------
    InputError
        There are too few doses, or no start converges.
    """
    from scipy.optimize import OptimizeWarning, curve_fit

    positive = np.unique(dose[dose > 0])
    if len(positive) < MIN_DOSES:
        raise InputError(f"{len(positive)} doses above 0; a curve needs {MIN_DOSES}.")
    if np.ptp(response) == 0:
        raise InputError("The response is the same at every dose.")

    def curve(x, bottom, top, log_ec50, hill):
        return logistic(x, bottom, top, 10**log_ec50, hill)

    log_range = np.log10(positive[0]) - 1, np.log10(positive[-1]) + 1
    span = np.ptp(response)
    limits = response.min() - span, response.max() + span
    bounds = ([limits[0], limits[0], log_range[0], HILL[0]], [limits[1], limits[1], log_range[1], HILL[1]])
    at_low, at_high = (response[dose == d].mean() for d in (dose.min(), positive[-1]))
    best, best_cost, best_covariance = None, np.inf, None
    for start in np.log10(np.quantile(positive, [0.2, 0.5, 0.8])):
        for hill in (1.0, 4.0):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", OptimizeWarning)
                    found, covariance = curve_fit(
                        curve, dose, response, p0=(at_low, at_high, start, hill), bounds=bounds, max_nfev=5000
                    )
            except (RuntimeError, ValueError):
                continue
            cost = float(((curve(dose, *found) - response) ** 2).sum())
            if cost < best_cost * (1 - 1e-9):
                best, best_cost, best_covariance = found, cost, covariance
    if best is None:
        raise InputError("No curve fits: the least squares do not converge.")
    error = float(np.sqrt(best_covariance[2, 2])) if np.isfinite(best_covariance[2, 2]) else np.nan
    return np.array([best[0], best[1], 10 ** best[2], best[3]]), error


def _dosed_wells(scores: pd.DataFrame, obs: pd.DataFrame, columns: Columns) -> pd.DataFrame:
    name = role(columns, "dose", obs)
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
    return result | {
        "bottom": bottom,
        "top": top,
        "ec50": ec50,
        "hill": hill,
        "log10_ec50_se": error,
        "r_squared": 1 - residual / total,
        "p_value": p,
        "in_range": bool(positive[0] <= ec50 <= positive[-1]),
    }
