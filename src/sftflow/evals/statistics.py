"""Uncertainty of scores and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean: sample standard deviation / sqrt(n); 0 for fewer than two scores."""
    n = len(scores)
    return float(np.std(scores, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def paired_interval(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of mean(after - before) by the paired bootstrap (Efron and Tibshirani 1993).

    Items are resampled, each with both of its scores, 10,000 times from a fixed seed.
    """
    delta = np.asarray(after, float) - np.asarray(before, float)
    if len(delta) == 0:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for start in range(0, RESAMPLES, 1000):
        means[start : start + 1000] = delta[rng.integers(0, len(delta), (1000, len(delta)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def mcnemar(before: Sequence[float], after: Sequence[float]) -> float:
    """Exact two-sided McNemar p-value over the items whose right/wrong verdict changed (McNemar 1947).

    >>> round(mcnemar([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]), 4)
    0.0625
    """
    gained = sum(1 for b, a in zip(before, after, strict=True) if a > b)
    lost = sum(1 for b, a in zip(before, after, strict=True) if a < b)
    n, k = gained + lost, min(gained, lost)
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


def centred_mean(scores: Sequence[float], chances: Sequence[float]) -> float:
    """ChatCORE: the mean over tasks of (score - chance) / (1 - chance); 0 is guessing, 1 is perfect."""
    if not scores:
        return 0.0
    return sum((s - c) / (1 - c) for s, c in zip(scores, chances, strict=True)) / len(scores)


def verdict(interval: tuple[float, float], n: int) -> str:
    """Plain words for a paired interval."""
    low, high = interval
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return f"cannot tell at n={n}"
