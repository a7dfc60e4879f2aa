"""Statistics against closed forms, known values, SciPy and statsmodels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sftflow.evaluation.statistics import (
    centred_mean,
    detectable,
    holm,
    mcnemar,
    paired_interval,
    sign_flip,
    standard_error,
    task_p_value,
    verdict,
    wilson,
)

RIGHT = st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60)
FRACTIONS = st.lists(st.tuples(*[st.floats(0, 1).map(lambda x: round(x, 2))] * 2), min_size=1, max_size=60)


def arms(n: int, lost: float, effect: float, rng: np.random.Generator) -> tuple[list[float], list[float]]:
    """Right/wrong scores of n items: 35% right before, `lost` of all items lost and `lost + effect` gained."""
    before, u = rng.random(n) < 0.35, rng.random(n)
    after = np.where(before, u >= lost / 0.35, u < (lost + effect) / 0.65)
    return before.astype(float).tolist(), after.astype(float).tolist()


def test_standard_error_is_the_textbook_one() -> None:
    scores = [1.0, 0.0, 1.0, 1.0, 0.0]
    p = 0.6
    assert standard_error(scores) == pytest.approx((p * (1 - p) / 4) ** 0.5)  # sample variance of a 0/1 sample
    assert standard_error([1.0]) == 0.0


# ---- the paired interval


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


@pytest.mark.parametrize("fractional", [False, True])
def test_paired_interval_is_scipys(fractional: bool) -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(2)
    before, after = (np.array(a) for a in arms(1500, 0.08, 0.05, rng))
    if fractional:  # many different values, so that items are drawn and not counts
        before, after = 0.5 * before + 0.5 * rng.random(1500), 0.5 * after + 0.5 * rng.random(1500)
    theirs = stats.bootstrap(
        (before, after),
        lambda b, a, axis: (a - b).mean(axis),
        paired=True,
        method="percentile",
        n_resamples=10_000,
        batch=500,
        rng=np.random.default_rng(3),
    ).confidence_interval
    low, high = paired_interval(before.tolist(), after.tolist())
    assert low == pytest.approx(theirs.low, abs=1.5e-3)
    assert high == pytest.approx(theirs.high, abs=1.5e-3)


@pytest.mark.parametrize(("effect", "lost"), [(0.0, 0.08), (0.1, 0.08), (0.3, 0.08)])
def test_paired_interval_holds_the_true_difference_in_93_to_97_percent(effect: float, lost: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(1000):
        low, high = paired_interval(*arms(int(rng.integers(60, 201)), lost, effect, rng), seed=seed)
        held += low - 1e-9 <= effect <= high + 1e-9
    assert 930 <= held <= 970


def test_paired_interval_never_pretends_certainty() -> None:
    for before, after in [([0] * 50, [0] * 50), ([1] * 50, [1] * 50), ([0] * 50, [1] * 50), ([0.5] * 50, [0.75] * 50)]:
        low, high = paired_interval(before, after)
        assert -1 <= low < high <= 1
        assert low <= after[0] - before[0] <= high
    bound = 1 - 0.025 ** (1 / 50)  # so many could be different and none of 50 seen, in 2.5% of samples
    assert (1 - bound) ** 50 == pytest.approx(0.025)
    assert paired_interval([0] * 50, [0] * 50) == pytest.approx((-bound, bound))
    assert paired_interval([0] * 50, [1] * 50) == pytest.approx((1 - 2 * bound, 1))
    assert paired_interval([], []) == (-1, 1)
    assert paired_interval([0], [1])[0] < 0
    # four gains among 100 items: a coin gives four of one kind in one of eight tries
    low, high = paired_interval([0] * 100, [1] * 4 + [0] * 96)
    assert low <= 0 < high
    # one item more or less does not tear the interval apart
    all_gained, all_but_one = (paired_interval([0] * 100, [1] * k + [0] * (100 - k)) for k in (100, 99))
    assert all_gained == pytest.approx(all_but_one, abs=0.02)


def test_arms_of_different_length_are_our_bug() -> None:
    with pytest.raises(ValueError, match="2 scores before, 1 after"):
        paired_interval([0, 1], [1])


@settings(deadline=None, max_examples=60)
@given(RIGHT | FRACTIONS)
def test_swapping_the_arms_mirrors_the_interval(pairs: list[tuple[float, float]]) -> None:
    before, after = (list(x) for x in zip(*pairs, strict=True))
    low, high = paired_interval(before, after)
    assert (-high, -low) == pytest.approx(paired_interval(after, before), abs=1e-12)
    assert low < high and low >= -1 and high <= 1
    assert task_p_value(before, after) == pytest.approx(task_p_value(after, before))
    assert detectable(before, after) == detectable(after, before)


# ---- p-values


def test_mcnemar_is_the_binomial_test() -> None:
    assert mcnemar([0] * 5 + [1], [1] * 6) == pytest.approx(2 * 0.5**5)
    assert mcnemar([0, 1], [1, 0]) == 1.0
    assert mcnemar([1, 1], [1, 1]) == 1.0


def test_mcnemar_is_statsmodels_exact_one() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    rng = np.random.default_rng(4)
    for effect in (0.0, 0.05, 0.2):
        before, after = arms(150, 0.05, effect, rng)
        table = np.zeros((2, 2))
        for b, a in zip(before, after, strict=True):
            table[int(b), int(a)] += 1
        assert mcnemar(before, after) == pytest.approx(tables.mcnemar(table, exact=True).pvalue)


def test_sign_flips_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")

    def theirs(delta: np.ndarray, resamples: float) -> float:
        return float(
            stats.permutation_test(
                (delta,),
                lambda x, axis: x.mean(axis),
                permutation_type="samples",
                n_resamples=resamples,
                rng=np.random.default_rng(5),
            ).pvalue
        )

    rng = np.random.default_rng(6)
    few = rng.normal(0.2, 0.4, 11).clip(-1, 1).round(2)
    assert sign_flip([0] * 11, few.tolist()) == pytest.approx(theirs(few, math.inf))  # both exact
    many = rng.normal(0.06, 0.3, 120).clip(-1, 1)
    p = theirs(many, 20_000)
    assert 0.005 < p < 0.5  # where a wrong test would differ
    assert sign_flip([0] * 120, many.tolist()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 10_000))
    rounded = many.round(1)  # equal sizes are drawn together
    p = theirs(rounded, 20_000)
    assert sign_flip([0] * 120, rounded.tolist()) == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 10_000))


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), max_size=13))
def test_sign_flips_of_right_and_wrong_are_mcnemars(pairs: list[tuple[int, int]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    assert sign_flip(before, after) == pytest.approx(mcnemar(before, after))
    assert 0 < mcnemar(before, after) <= 1


def test_a_task_is_tested_by_the_kind_of_its_scores() -> None:
    rng = np.random.default_rng(7)
    before, after = arms(100, 0.05, 0.2, rng)
    assert task_p_value(before, after) == mcnemar(before, after) < 0.01
    halves = [0.5 * a for a in after]  # McNemar would only see which is larger
    assert task_p_value(before, halves) == sign_flip(before, halves) != mcnemar(before, halves)
    assert task_p_value(before, halves, seed=1) == pytest.approx(task_p_value(before, halves, seed=2), abs=0.02)
    assert task_p_value([0.5] * 9, [0.5] * 9) == 1.0
    assert task_p_value([], []) == 1.0


@settings(deadline=None, max_examples=50)
@given(FRACTIONS)
def test_p_values_are_probabilities(pairs: list[tuple[float, float]]) -> None:
    assert 0 < sign_flip([b for b, _ in pairs], [a for _, a in pairs]) <= 1


def test_holm_is_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(8)
    for m in (1, 2, 7, 20):
        p = (rng.random(m) ** 3).round(3).tolist()
        assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1].tolist())
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_never_lowers(p: list[float]) -> None:
    adjusted = holm(p)
    assert all(x <= y <= 1 for x, y in zip(p, adjusted, strict=True))
    ranked = [adjusted[i] for i in sorted(range(len(p)), key=lambda i: p[i])]
    assert ranked == sorted(ranked)
    assert sum(y < 0.05 for y in adjusted) <= sum(x < 0.05 for x in p)


# ---- one score


def test_wilson_is_statsmodels() -> None:
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    for right, n in [(0, 10), (3, 10), (10, 10), (77, 200), (1, 14_000)]:
        theirs = proportion.proportion_confint(right, n, method="wilson")
        assert wilson(right / n, n) == pytest.approx(theirs, abs=1e-12)
    assert wilson(0.0, 0) == (0, 1)


@given(st.floats(0, 1), st.integers(1, 20_000))
def test_wilson_holds_the_mean_and_is_mirrored(mean: float, n: int) -> None:
    low, high = wilson(mean, n)
    assert 0 <= low <= mean <= high <= 1 and low < high
    assert wilson(1 - mean, n) == pytest.approx((1 - high, 1 - low), abs=1e-9)


# ---- power


def test_detectable_differences_are_detected_in_80_percent() -> None:
    rng = np.random.default_rng(9)
    effect = detectable(*arms(200, 0.1, 0.08, rng))
    assert 0.06 < effect < 0.13
    found = 0
    for _ in range(600):
        before, after = (np.array(a) for a in arms(200, 0.1, effect, rng))
        delta = after - before
        found += abs(delta.mean()) > 1.96 * delta.std(ddof=1) / math.sqrt(200)
    assert 0.72 < found / 600 < 0.88


def test_detectable_is_its_formula_and_falls_with_n() -> None:
    before, after = [0.0, 1.0, 0.0, 0.0] * 50, [1.0, 0.0, 0.0, 0.0] * 50
    s = np.std(np.subtract(after, before), ddof=1)
    assert detectable(before, after) == pytest.approx((1.959964 + 0.841621) * s / math.sqrt(200), abs=1e-6)
    assert detectable(before * 4, after * 4) == pytest.approx(detectable(before, after) / 2, rel=0.01)


def test_detectable_without_a_change_is_what_mcnemar_could_find() -> None:
    binom = pytest.importorskip("scipy.stats").binom
    share = detectable([1] * 300, [1] * 300)
    assert mcnemar([0] * 6, [1] * 6) < 0.05 < mcnemar([0] * 5, [1] * 5)
    assert binom.sf(5, 300, share) == pytest.approx(0.8)
    assert detectable([0] * 300, [1] + [0] * 299) == share  # one change says no more
    assert detectable([0] * 5, [0] * 5) == detectable([], []) == 1
    assert detectable([0, 0.01] * 500, [0.01, 0] * 500) < 0.001  # small changes need not be few


# ---- in words


def test_centred_mean_is_chatcore() -> None:
    assert centred_mean([0.25, 1.0], [0.25, 0.0]) == pytest.approx(0.5)
    assert centred_mean([], []) is None


def test_cannot_tell() -> None:
    assert verdict((-0.1, 0.2), 50) == "cannot tell at n=50"
    assert verdict((-0.2, -0.1), 50) == "worse"


def test_a_verdict_needs_the_adjusted_p_value_too() -> None:
    assert verdict((0.01, 0.2), 200, 0.049) == "better"
    assert verdict((-0.2, -0.01), 200, 0.049) == "worse"
    assert verdict((0.01, 0.2), 200, 0.05) == verdict((-0.2, -0.01), 200, 0.2) == "cannot tell at n=200"
    assert verdict((-0.01, 0.2), 200, 0.001) == "cannot tell at n=200"
