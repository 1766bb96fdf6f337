"""Learning rates and weight decays equal the published ones, step by step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cellvim.train.schedules import cosine_schedule

GOLDEN = Path(__file__).parents[1] / "golden" / "_schedules.npz"


@pytest.mark.parametrize(
    ("name", "first", "last", "steps", "options"),
    [
        ("lr_linear_bs256_epochs100_warm10_iters7", 1e-3, 1e-6, 700, {"warmup_steps": 70}),
        ("wd_0p04_to_0p4_epochs100_iters7", 0.04, 0.4, 700, {}),
        ("lr_deit_bs1024_epochs300_warm5_iters3", 2e-3, 1e-5, 900, {"warmup_steps": 15, "warmup_from": 1e-6}),
    ],
)
def test_schedules_are_the_published_ones(name, first, last, steps, options):
    np.testing.assert_allclose(cosine_schedule(first, last, steps, **options), np.load(GOLDEN)[name], rtol=1e-12)


def test_a_warmup_longer_than_the_training_is_cut():
    np.testing.assert_allclose(cosine_schedule(1.0, 0.0, 3, warmup_steps=10), [0.0, 0.5, 1.0])


def test_a_constant_stays():
    assert set(cosine_schedule(0.05, 0.05, 9)) == {0.05}
