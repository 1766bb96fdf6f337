"""Tables of the translocation plate's results, in Markdown: means ± standard deviations over seeds, and differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

DOSE = {
    "cell_weighted_f1": "weighted F1, cells", "cell_spearman": "Spearman, cells",
    "well_macro_f1": "macro F1, wells", "well_spearman": "Spearman, wells", "well_error": "error in doses, wells",
}  # fmt: skip
CONTROLS = {
    "cell_balanced_accuracy": "balanced accuracy, cells", "cell_auc": "AUC, cells",
    "well_balanced_accuracy": "balanced accuracy, wells", "well_auc": "AUC, wells",
}  # fmt: skip
SUBSETS = ("GFP,DNA", "GFP", "DNA")
REFERENCE = "FastChannelVim"


def tables(results: dict[str, Any]) -> str:
    """Return all tables of a results file."""
    runs = results["runs"]
    dose = [r for r in runs if r["task"] == "dose"]
    parts = [
        "Dose (9 classes), all training wells labelled:", dose_table(dose),
        f"Difference to {REFERENCE}, paired by test well:", difference_table(dose),
        "Weighted F1 of the dose for cells, by the channels given to the model:", channel_table(dose),
        "Positive against negative control:", control_table([r for r in runs if r["task"] == "controls"]),
        "Chosen on validation wells:", tuning_table(results["tuned"]["runs"]),
    ]  # fmt: skip
    return "\n\n".join(parts)


def dose_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return one row per method."""
    rows = []
    for method, own in _by(runs, "method").items():
        figures = [spread([r[key] for r in own]) for key in DOSE]
        if method == "cell count":  # defined for wells only
            figures[:2] = ["–", "–"]
        size = f"{own[0]['parameters'] / 1e6:.2f} M" if own[0]["parameters"] else "–"
        crops = f"{own[0]['crops_seen'] / 1000:.1f} k" if "crops_seen" in own[0] else "–"
        rows.append([_name(method, own), size, crops, f"{np.mean([r['cpu_seconds'] for r in own]):.0f}", *figures])
    return _markdown(["method", "parameters", "crops seen", "CPU s", *DOSE.values()], rows)


def difference_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return differences to the reference, paired by well, with 95% intervals over wells."""
    found = {method: _well_figures(own) for method, own in _by(runs, "method").items()}
    rows = []
    for method, figures in found.items():
        if method not in (REFERENCE, "cell count") and REFERENCE in found:
            rows.append([method, *(interval(b - a) for a, b in zip(found[REFERENCE], figures, strict=True))])
    return _markdown(["method", "accuracy of cells", "error in doses, wells"], rows)


def _well_figures(runs: Sequence[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return each well's accuracy and the error of its expected dose, (wells,) each, averaged over seeds."""
    wells = sorted(runs[0]["wells"])
    values = np.array([[r["wells"][w] for w in wells] for r in runs])  # (seeds, wells, 3)
    return values[:, :, 2].mean(0), np.abs(values[:, :, 1] - values[:, :, 0]).mean(0)


def interval(differences: np.ndarray, draws: int = 10_000) -> str:
    """Return the mean and its 95% bootstrap interval over wells."""
    picks = np.random.default_rng(0).integers(len(differences), size=(draws, len(differences)))
    low, high = np.percentile(differences[picks].mean(1), (2.5, 97.5))
    return f"{differences.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def channel_table(runs: Sequence[dict[str, Any]], score: str = "weighted_f1") -> str:
    """Return one row per trained method, one column per subset of the channels."""
    rows = [
        [_name(method, own), *(spread([r["channels"][s][score] for r in own]) for s in SUBSETS)]
        for method, own in _by([r for r in runs if "channels" in r], "method").items()
    ]
    return _markdown(["method", *(s.replace(",", " and ") for s in SUBSETS)], rows)


def control_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return one row per method and number of labelled wells."""
    rows = []
    for shots, some in _by(runs, "shots").items():
        for method, own in _by(some, "method").items():
            rows.append([str(shots or "all"), _name(method, own), *(spread([r[key] for r in own]) for key in CONTROLS)])
    return _markdown(["labelled wells per class", "method", *CONTROLS.values()], rows)


def tuning_table(runs: Sequence[dict[str, Any]]) -> str:
    """Return one row per setting."""
    keys = ("cell_weighted_f1", "cell_spearman", "well_spearman")
    rows = [
        [r["method"], ", ".join(f"{k} {v}" for k, v in r["choices"].items()), *(f"{r[k]:.3f}" for k in keys)]
        for r in runs
    ]
    return _markdown(["method", "choice", *(DOSE[k] for k in keys)], rows)


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation (n − 1)."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.3f}"


def _name(method: str, runs: Sequence[dict[str, Any]], seeds: int = 3) -> str:
    return method if len(runs) == seeds else f"{method} ({len(runs)} of {seeds} seeds)"


def _by(runs: Sequence[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault(one[key], []).append(one)
    return groups


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
