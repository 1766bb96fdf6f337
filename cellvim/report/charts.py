"""Where the marks of the page's small charts lie; the template draws them, so that they print and need no script."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

MAX_CURVES = 24
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 200, 46, 308, 12, 166


def dot_chart(rows: Sequence[tuple[str, float, float]], *, label: str, zero: float | None) -> dict[str, Any]:
    """Return a chart of a dot and its spread for each row, on a scale from the least to 1.

    Parameters
    ----------
    rows
        Name, value and standard deviation.
    label
        What the chart shows, for those who do not see it.
    zero
        Where to draw the line of chance; None for none.
    """
    width, left, right = 640, 150, 620
    ends = [v + s * d for _, v, d in rows for s in (-1, 1) if np.isfinite(v)]
    low = min([0.4, *ends]) if ends else 0.0
    low = max(0.0, np.floor(low * 10) / 10)

    def x(value: float) -> float:
        return round(float(left + (np.clip(value, low, 1.0) - low) / (1 - low) * (right - left)), 1)

    ticks = [{"x": x(t), "text": f"{t:.1f}"} for t in np.arange(round(low * 10), 11) / 10]
    return {
        "width": width,
        "height": 34 * len(rows) + 34,
        "left": left,
        "label": label,
        "zero": None if zero is None else x(zero),
        "ticks": ticks,
        "rows": [
            {
                "name": name,
                "y": 24 + 34 * i,
                "x": x(value),
                "low": x(value - spread) if np.isfinite(spread) else None,
                "high": x(value + spread) if np.isfinite(spread) else None,
            }
            for i, (name, value, spread) in enumerate(rows)
            if np.isfinite(value)
        ],
    }


def dose_charts(curves: pd.DataFrame, points: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a chart for each perturbation with a curve, the surest response first.

    Parameters
    ----------
    curves, points
        By `cellvim.evaluate.dose_response.dose_response`.
    """
    order = curves.sort_values(["p_value", "perturbation"], na_position="last", kind="stable")
    charts = []
    for curve in order.head(MAX_CURVES).to_dict("records"):
        own = points[points["perturbation"] == curve["perturbation"]]
        if len(own):
            charts.append(_dose_chart(curve, own))
    return charts


def _dose_chart(curve: dict[str, Any], points: pd.DataFrame) -> dict[str, Any]:
    from cellvim.evaluate.dose_response import logistic

    doses, means = points["dose"].to_numpy(float), points["mean"].to_numpy(float)
    positive = doses[doses > 0]
    first, last = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
    has_zero = bool((doses == 0).any())
    start = np.log10(first) - (0.6 if has_zero else 0.1)  # a dose of 0 stands left of the lowest
    stop = np.log10(last) + 0.1
    shown = np.append(means[np.isfinite(means)], [0.0, 1.0])
    low, high = shown.min() - 0.08 * np.ptp(shown), shown.max() + 0.08 * np.ptp(shown)

    def x(dose: float) -> float:
        place = start if dose <= 0 else np.log10(dose)
        return round(float(_LEFT + 6 + (place - start) / (stop - start) * (_RIGHT - _LEFT - 12)), 1)

    def y(value: float) -> float:
        return round(float(_BOTTOM - (np.clip(value, low, high) - low) / (high - low) * (_BOTTOM - _TOP)), 1)

    line = ""
    if all(_is_number(curve.get(k)) for k in ("bottom", "top", "ec50", "hill")):
        at = np.geomspace(first, last, 60) if last > first else np.array([first])
        fitted = logistic(at, curve["bottom"], curve["top"], curve["ec50"], curve["hill"])
        line = " ".join(f"{x(d)},{y(v)}" for d, v in zip(at, fitted, strict=True))
    name = str(curve["perturbation"])
    xticks = [{"x": x(d), "text": f"{d:g}"} for d in _spread([*([0.0] if has_zero else []), *sorted(set(positive))])]
    return {
        "name": name,
        "label": f"Dose response of {name}: activity against dose on a logarithmic scale",
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _RIGHT,
        "top": _TOP,
        "bottom": _BOTTOM,
        "xticks": xticks,
        "yticks": [],
        "levels": [{"y": y(0), "text": "negative control, 0"}, {"y": y(1), "text": "positive control, 1"}],
        "curve": line,
        "dots": [{"x": x(d), "y": y(m)} for d, m in zip(doses, means, strict=True) if np.isfinite(m)],
        "facts": _facts(curve),
    }


def _facts(curve: dict[str, Any]) -> str:
    if not _is_number(curve.get("ec50")):
        return str(curve.get("remark") or "No curve was fitted.")
    parts = [f"EC50 {curve['ec50']:.3g}" + ("" if curve.get("in_range") else " (beyond the doses)")]
    parts += [f"R² {curve['r_squared']:.2f}"] if _is_number(curve.get("r_squared")) else []
    parts += [f"p {curve['p_value']:.2g}"] if _is_number(curve.get("p_value")) else []
    return ", ".join([*parts, f"{curve['n_wells']} wells"])


def _spread(values: list[float], most: int = 6) -> list[float]:
    """Return up to ``most`` of the values, the first and the last among them."""
    if len(values) <= most:
        return values
    return [values[i] for i in np.unique(np.linspace(0, len(values) - 1, most).round().astype(int))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and np.isfinite(value)
