"""Learning rates and weight decays step by step."""

from __future__ import annotations

import numpy as np


def cosine_schedule(
    first: float, last: float, steps: int, *, warmup_steps: int = 0, warmup_from: float = 0.0
) -> np.ndarray:
    """Return one value a step: a straight line up to ``first``, then half a cosine down (or up) to ``last``.

    Parameters
    ----------
    first, last
        Values where the cosine starts and where it would end, one step after the last.
    steps
        Steps in all, the warm-up among them.
    warmup_steps, warmup_from
        Length of the straight line, and the value of its first step.

    Returns
    -------
    (steps,) float64

    References
    ----------
    Loshchilov & Hutter, SGDR (2017), §3; Goyal et al., Accurate, Large Minibatch SGD (2017), §2.2.
    """
    warmup_steps = min(warmup_steps, steps)
    warmup = np.linspace(warmup_from, first, warmup_steps)
    turn = np.arange(steps - warmup_steps) / max(1, steps - warmup_steps)
    return np.concatenate([warmup, last + 0.5 * (first - last) * (1 + np.cos(np.pi * turn))])
