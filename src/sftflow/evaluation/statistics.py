"""Uncertainty of scores and of paired differences. Scores lie in 0..1, so that differences lie in -1..1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
Z95, Z80 = 1.959963984540054, 0.8416212335729143
"""97.5% and 80% points of the normal distribution: two-sided 5% level, 80% power"""
FEW_VALUES = 32
"""up to so many different values, resamples are drawn as counts of the values instead of as items"""
EXACT_FLIPS = 13
"""up to so many differences that are not 0, all their signs are tried (8,192 ways)"""
FEWEST_CHANGES = 6
"""fewer changed items cannot give an exact two-sided p below 0.05, even all one way: 2 / 2**5 > 0.05 > 2 / 2**6"""

Floats = NDArray[np.float64]


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean: sample standard deviation / sqrt(n); 0 for fewer than two scores."""
    n = len(scores)
    return float(np.std(scores, ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of `k` replies is right, estimated from `n` of which `right` are: the unbiased
    1 - C(n - right, k) / C(n, k) (Chen et al. 2021), for k up to n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def wilson(mean: float, n: int) -> tuple[float, float]:
    """95% score interval of a share (Wilson 1927): all p with |mean - p| <= z sqrt(p (1 - p) / n), z = 1.96.

    A share of 0 or 1 gets an honest width, too. `mean` may be that of fractional scores in 0..1: of all scores with
    that mean, right/wrong ones vary most, so that the interval is then rather too wide. (0, 1) where n is 0.

    >>> [round(x, 3) for x in wilson(0.9, 10)]
    [0.596, 0.982]
    """
    if n == 0:
        return 0.0, 1.0
    z2 = Z95**2 / n
    centre = (mean + z2 / 2) / (1 + z2)
    half = math.sqrt(max(0.0, mean * (1 - mean)) * z2 + z2**2 / 4) / (1 + z2)
    # Rounding must not put a mean of 0 or 1 outside.
    return max(0.0, min(centre - half, mean)), min(1.0, max(centre + half, mean))


def paired_interval(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of mean(after - before) by the paired bootstrap (Efron and Tibshirani 1993).

    Items are resampled, each with both of its scores, 10,000 times from a fixed seed. Swapping the two arms mirrors
    the interval. Resamples are drawn from the items and two made-up ones: half a loss and half a gain as large as the
    largest difference, and an item without change (after Agresti and Min 2005). Without them a resample cannot hold a
    loss where none was seen, and four gains among 100 items, which a coin could have given, would exclude 0.

    How often it holds the true difference, in 1,000 simulations each with 60 to 200 items, right or wrong, 35% right
    before and 8% lost: 95.5% (no effect), 95.2% (effect 0.1), 94.4% (effect 0.3); with 1% lost 99.6%, 95.8% and 95.4%,
    for so few changes come in whole items; fractional scores 95.0%. Without the made-up items, over 6,000 simulations
    of the first three: 95.8%, 93.9%, 94.7% against 96.5%, 94.5%, 95.1% with them.

    Where all differences are equal, resampling shows no width at all. Then the part of all items that is different
    is bounded instead: at most b = 1 - 0.025 ** (1 / n), about 3.7 / n, or else one of n would have been seen with
    97.5% probability. That part could be anything in -1..1, so a difference c spans c - b (1 + c) to c + b (1 - c).

    >>> [round(x, 3) for x in paired_interval([0] * 100, [0] * 100)]
    [-0.036, 0.036]
    """
    delta = _differences(before, after)
    n = len(delta)
    if n == 0:
        return -1.0, 1.0
    largest = float(np.abs(delta).max())
    if delta.min() == delta.max():
        c, b = float(delta[0]), 1 - 0.025 ** (1 / n)
        return c - b * (1 + c), c + b * (1 - c)
    pool = np.concatenate([delta, delta, [largest, -largest, 0.0, 0.0]])  # of everything two halves
    rng = np.random.default_rng(seed)
    values, counts = np.unique(pool, return_counts=True)
    if len(values) > FEW_VALUES:
        means = np.empty(RESAMPLES)
        for start in range(0, RESAMPLES, step := max(1, 1_000_000 // n)):
            drawn = rng.integers(0, len(pool), (min(step, RESAMPLES - start), n))
            means[start : start + step] = pool[drawn].mean(1)
        return _middle95(means)
    # How often each value is drawn is multinomial: the same distribution of means for far fewer draws. Drawn in one
    # orientation, whichever arm comes first.
    turned = (*-values[::-1], *counts[::-1]) > (*values, *counts)
    if turned:
        values, counts = -values[::-1], counts[::-1]
    low, high = _middle95(rng.multinomial(n, counts / len(pool), RESAMPLES) @ values / n)
    if np.array_equal(values, -values[::-1]) and np.array_equal(counts, counts[::-1]):
        high = (high - low) / 2
        low = -high
    return (0.0 - high, 0.0 - low) if turned else (low, high)


def _middle95(means: Floats) -> tuple[float, float]:
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low) + 0.0, float(high) + 0.0  # no -0.0


def _differences(before: Sequence[float], after: Sequence[float]) -> Floats:
    """after - before, freed of rounding: 0.3 - 0.1 and 0.4 - 0.2 are one value."""
    if len(before) != len(after):
        raise ValueError(f"{len(before)} scores before, {len(after)} after")
    return np.round(np.asarray(after, float) - np.asarray(before, float), 12) + 0.0  # no -0.0


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


def sign_flip(before: Sequence[float], after: Sequence[float], seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test on the mean (Fisher 1935).

    Had a coin swapped the arms on each item, how often would the mean difference be as large?

    All ways are counted up to 13 changed items; for more, 10,000 are drawn, and p is (1 + as large) / (1 + drawn)
    (Phipson and Smyth 2010). For right/wrong scores the exact one is McNemar's p-value.

    >>> sign_flip([0.0] * 6, [0.5, 0.25, 0.5, 1.0, 0.25, 0.5])
    0.03125
    """
    delta = _differences(before, after)
    delta = delta[delta != 0]
    if len(delta) == 0:
        return 1.0
    at_least = abs(float(delta.sum())) - 1e-9
    if len(delta) <= EXACT_FLIPS:
        signs = np.array(list(product((1.0, -1.0), repeat=len(delta))))
        return float(np.mean(np.abs(signs @ delta) >= at_least))
    # Of c differences of one size, a Binomial(c, 1/2) number keeps its sign: one draw for all of them.
    sizes, counts = np.unique(np.abs(delta), return_counts=True)
    rng = np.random.default_rng(seed)
    as_large, step = 0, max(1, 1_000_000 // len(sizes))
    for start in range(0, RESAMPLES, step):
        kept = rng.binomial(counts, 0.5, (min(step, RESAMPLES - start), len(sizes)))
        as_large += int(np.sum(np.abs((2 * kept - counts) @ sizes) >= at_least))
    return (1 + as_large) / (1 + RESAMPLES)


def task_p_value(before: Sequence[float], after: Sequence[float], seed: int = 0) -> float:
    """p-value of a task's paired difference: exact McNemar for right/wrong scores, sign flips for fractional ones."""
    if {*before, *after} <= {0, 1}:
        return mcnemar(before, after)
    return sign_flip(before, after, seed)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, step-down (Holm 1979), in the given order.

    The i-th smallest of m is multiplied by m - i + 1; none comes out smaller than one before it, or above 1.

    >>> holm([0.03, 0.01, 0.5])
    [0.06, 0.03, 0.5]
    """
    out, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        out[i] = largest
    return out


def detectable(before: Sequence[float], after: Sequence[float]) -> float:
    """The smallest true difference that so many items, differing as these do, show with 80% probability.

    At a two-sided level of 5%: (1.96 + 0.84) s / sqrt(n), s the standard deviation of the paired differences. It is at
    least what the exact tests need: they call nothing significant below 6 changed items, so with changes all one
    way, and as large as the largest here, a share d of items must change with P(Binomial(n, d) >= 6) = 80%, about
    7.9 / n. Where all differences are equal (s = 0) that bound alone is the answer. 1 where n items can show nothing.

    >>> round(detectable([0, 1] * 50, [0, 1] * 50), 3)  # 100 items, none changed
    0.078
    """
    delta = _differences(before, after)
    n, s = len(delta), standard_error(delta.tolist())
    largest = float(np.abs(delta).max()) if s > 0 else 1.0
    return min(1.0, max((Z95 + Z80) * s, largest * _share_to_change(n)))


def _share_to_change(n: int) -> float:
    """The d with P(Binomial(n, d) >= 6) = 0.8, by bisection; 1 for n < 6."""
    low, high = 0.0, 1.0
    for _ in range(40):
        d = (low + high) / 2
        fewer = sum(math.comb(n, k) * d**k * (1 - d) ** (n - k) for k in range(min(n + 1, FEWEST_CHANGES)))
        low, high = (d, high) if fewer > 0.2 else (low, d)
    return high


def centred_mean(scores: Sequence[float], chances: Sequence[float]) -> float | None:
    """ChatCORE: the mean over tasks of (score - chance) / (1 - chance); 0 is guessing, 1 is perfect. None: no tasks."""
    if not scores:
        return None
    return sum((s - c) / (1 - c) for s, c in zip(scores, chances, strict=True)) / len(scores)


def verdict(interval: tuple[float, float], n: int, p_adjusted: float | None = None) -> str:
    """Plain words for a paired interval. With an adjusted p-value, a change is one only where that is below 0.05, too.

    >>> verdict((0.01, 0.2), 200), verdict((0.01, 0.2), 200, p_adjusted=0.08)
    ('better', 'cannot tell at n=200')
    """
    low, high = interval
    if p_adjusted is None or p_adjusted < 0.05:
        if low > 0:
            return "better"
        if high < 0:
            return "worse"
    return f"cannot tell at n={n}"
