"""Statistics against scipy-free closed forms and known values."""

from __future__ import annotations

import numpy as np
import pytest

from sftflow.evals.statistics import centred_mean, mcnemar, paired_interval, standard_error, verdict


def test_standard_error_is_the_textbook_one() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.0]
    p = 0.6
    assert standard_error(scores) == pytest.approx((p * (1 - p) / 4) ** 0.5)  # sample variance of a 0/1 sample
    assert standard_error([1.0]) == 0.0


def test_paired_interval_agrees_with_the_normal_one() -> None:
    rng = np.random.default_rng(1)
    before = (rng.random(400) < 0.3).astype(float)
    after = np.maximum(before, (rng.random(400) < 0.4).astype(float))
    low, high = paired_interval(before.tolist(), after.tolist())
    delta = after - before
    half = 1.96 * delta.std(ddof=1) / 20
    assert low == pytest.approx(delta.mean() - half, abs=0.01)
    assert high == pytest.approx(delta.mean() + half, abs=0.01)
    assert (low, high) == paired_interval(before.tolist(), after.tolist())  # seeded
    assert verdict((low, high), 400) == "better"


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar([0] * 5 + [1], [1] * 6) == pytest.approx(2 * 0.5**5)
    assert mcnemar([0, 1], [1, 0]) == 1.0
    assert mcnemar([1, 1], [1, 1]) == 1.0


def test_centred_mean_is_chatcore() -> None:
    assert centred_mean([0.25, 1.0], [0.25, 0.0]) == pytest.approx(0.5)
    assert centred_mean([], []) == 0.0


def test_cannot_tell() -> None:
    assert verdict((-0.1, 0.2), 50) == "cannot tell at n=50"
    assert verdict((-0.2, -0.1), 50) == "worse"
