from __future__ import annotations

import itertools

import numpy as np
import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.compare import compare, compare_seeds, holm, resample, summarise


def values(numbers) -> dict[str, float]:
    return {f"q{number}": float(value) for number, value in enumerate(numbers)}


def test_counts_and_mean():
    result = compare(values([1, 0.5, 0, 0.2]), values([0, 0.5, 0, 0.6]))
    assert (result.wins, result.ties, result.losses) == (1, 2, 1)
    assert result.mean_difference == pytest.approx(0.15)
    assert result.low <= result.mean_difference <= result.high


def test_p_is_that_of_all_sign_flips():
    rng = np.random.default_rng(0)
    differences = rng.normal(0.15, 0.3, size=10)
    flips = np.array(list(itertools.product([1, -1], repeat=10)))
    exact = np.mean(np.abs(flips @ differences / 10) >= abs(differences.mean()) - 1e-12)
    result = compare(values(differences), values(np.zeros(10)), num_samples=20_000)
    # Three standard errors of a share estimated from 20,000 draws.
    assert result.p_value == pytest.approx(exact, abs=3 * (0.25 / 20_000) ** 0.5)


def test_the_interval_is_that_of_the_mean():
    differences = np.random.default_rng(1).normal(0.1, 0.5, size=400)
    result = compare(values(differences), values(np.zeros(400)))
    half_width = 1.96 * differences.std() / 20
    assert result.low == pytest.approx(differences.mean() - half_width, abs=0.1 * half_width)
    assert result.high == pytest.approx(differences.mean() + half_width, abs=0.1 * half_width)


def test_equal_systems_do_not_differ():
    result = compare(values([0.3, 0.7]), values([0.3, 0.7]))
    assert (result.mean_difference, result.low, result.high, result.p_value) == (0, 0, 0, 1)


def test_the_seed_and_not_the_order_of_queries_decides():
    a, b = values(np.linspace(0, 1, 30)), values(np.linspace(0, 0.9, 30) ** 2)
    assert compare(a, b) == compare(dict(reversed(a.items())), b)
    assert compare(a, b).low != compare(a, b, seed=1).low


def test_swapping_the_systems_swaps_the_signs():
    a, b = values([0.1, 0.9, 0.4]), values([0.3, 0.2, 0.2])
    there, back = compare(a, b), compare(b, a)
    assert there.mean_difference == -back.mean_difference
    assert (there.wins, there.losses) == (back.losses, back.wins)
    assert there.p_value == back.p_value


def test_both_need_the_same_queries():
    with pytest.raises(EvaluationError, match=r"2 and 1 given, 1 differ, such as \['q1'\]"):
        compare(values([0.1, 0.2]), values([0.1]))
    with pytest.raises(EvaluationError, match="at least one"):
        compare({}, {})


def test_seeds_are_averaged_by_query_and_compared_in_pairs():
    a = [values([0.4, 0.6, 0.8]), values([0.6, 0.8, 0.4])]
    b = [values([0.1, 0.2, 0.3]), values([0.3, 0.2, 0.1])]
    result = compare_seeds(a, b)
    assert result.over_queries == compare(values([0.5, 0.7, 0.6]), values([0.2, 0.2, 0.2]))
    assert result.by_seed == pytest.approx([0.4, 0.4])
    assert (result.low, result.high) == pytest.approx((0.4, 0.4))


def test_the_interval_over_seeds_is_students():
    scipy_stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(3)
    for seeds in (2, 5, 12):
        differences = rng.normal(0.1, 0.05, size=seeds)
        result = compare_seeds(
            [values([one, one]) for one in differences], [values([0, 0])] * seeds
        )
        expected = scipy_stats.t.interval(
            0.95, seeds - 1, loc=differences.mean(), scale=scipy_stats.sem(differences)
        )
        assert (result.low, result.high) == pytest.approx(expected, rel=1e-3)  # table of 4 digits


def test_one_seed_says_nothing_about_seeds():
    result = compare_seeds([values([0.4, 0.6])], [values([0.1, 0.2])])
    assert (result.low, result.high) == (None, None)


def test_other_seeds_or_queries_cannot_be_compared():
    with pytest.raises(EvaluationError, match="same seeds"):
        compare_seeds([values([1])], [values([1]), values([1])])
    with pytest.raises(EvaluationError, match="same queries"):
        compare_seeds([values([1])], [values([1, 2])])


def test_rounding_is_no_win():
    third = [0.1 + 0.2, 0.5, 0.5 + 1e-9]
    result = compare(values(third), values([0.3, 0.5, 0.5]))
    assert (result.wins, result.ties, result.losses) == (1, 2, 0)


def test_the_interval_is_that_of_all_resamples():
    differences = np.array([0.31, -0.12, 0.05, 0.77, -0.4])
    every = np.array(list(itertools.product(differences, repeat=5))).mean(axis=1)
    result = compare(values(differences), values(np.zeros(5)), num_samples=20_000)
    # A quantile of 20,000 draws lies where the true distribution reaches its level, give or take
    # three standard errors.
    error = 3 * (0.025 * 0.975 / 20_000) ** 0.5
    for end, level in ((result.low, 0.025), (result.high, 0.975)):
        assert np.mean(every < end - 1e-12) <= level + error
        assert np.mean(every <= end + 1e-12) >= level - error


def test_p_over_strata_is_that_of_all_swaps_within_them():
    rng = np.random.default_rng(4)
    small, large = rng.normal(0.3, 0.3, size=4), rng.normal(0.1, 0.3, size=7)
    flips = np.array(list(itertools.product([1, -1], repeat=11)))
    means = (flips[:, :4] @ small / 4 + flips[:, 4:] @ large / 7) / 2
    observed = (small.mean() + large.mean()) / 2
    exact = np.mean(np.abs(means) >= abs(observed) - 1e-12)
    rngs = np.random.default_rng(5).spawn(2)
    strata = [
        resample(stratum[:, None], rng, num_samples=20_000)
        for stratum, rng in zip((small, large), rngs, strict=True)
    ]
    (result,) = summarise(strata)
    assert result.mean_difference == pytest.approx(observed)
    assert result.p_value == pytest.approx(exact, abs=3 * (0.25 / 20_000) ** 0.5)
    assert result.wins + result.losses == 11


def test_the_interval_is_near_that_of_another_implementation():
    stats = pytest.importorskip("scipy.stats")
    differences = np.random.default_rng(6).normal(0.05, 0.2, size=80)
    theirs = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=20_000, rng=7
    ).confidence_interval
    result = compare(values(differences), values(np.zeros(80)), num_samples=20_000)
    width = theirs.high - theirs.low
    # Both ends are estimated from 20,000 draws: their error is about 1 % of the width.
    assert (result.low, result.high) == pytest.approx((theirs.low, theirs.high), abs=0.03 * width)


NUM_NULLS = 1_000
# A share of 1,000 that is 0.05 lies within 3.3 standard errors of it 999 times of 1,000.
FEW, MANY = 0.05 - 3.3 * 0.0069, 0.05 + 3.3 * 0.0069


def draws(rng, queries):
    """The same system twice: each query is as hard in both, and noise differs."""
    hard = rng.beta(0.6, 1.2, size=queries)
    return hard + rng.normal(0, 0.15, size=queries), hard + rng.normal(0, 0.15, size=queries)


def test_no_difference_is_found_at_the_nominal_rate():
    rng = np.random.default_rng(8)
    rejected = outside = 0
    for number in range(NUM_NULLS):
        a, b = draws(rng, 60)
        result = compare(values(a), values(b), num_samples=199, seed=number)
        rejected += result.p_value <= 0.05
        outside += not result.low <= 0 <= result.high
    assert FEW <= rejected / NUM_NULLS <= MANY
    # The interval of a mean of 60 is a little narrow, and its ends stem from 199 draws.
    assert FEW <= outside / NUM_NULLS <= MANY + 0.02


def test_many_ties_do_not_raise_the_rate():
    rng = np.random.default_rng(9)
    rejected = 0
    for number in range(NUM_NULLS):
        a, b = (np.round(np.clip(one, 0, 1) * 3) / 3 for one in draws(rng, 30))
        rejected += compare(values(a), values(b), num_samples=199, seed=number).p_value <= 0.05
    assert rejected / NUM_NULLS <= MANY


def test_no_difference_over_strata_is_found_at_the_nominal_rate():
    rng = np.random.default_rng(10)
    rejected = 0
    for number in range(NUM_NULLS):
        strata = []
        for stratum, queries in enumerate((12, 40, 25)):
            a, b = draws(rng, queries)
            own = np.random.default_rng([number, stratum])
            strata.append(resample((a - b)[:, None], own, num_samples=199))
        rejected += summarise(strata)[0].p_value <= 0.05
    assert FEW <= rejected / NUM_NULLS <= MANY


def test_the_interval_over_strata_covers_the_true_difference():
    rng = np.random.default_rng(11)
    true = np.mean([0.3, -0.1, 0.1])
    covered = 0
    for number in range(500):
        strata = []
        for stratum, (queries, mean) in enumerate(((50, 0.3), (80, -0.1), (60, 0.1))):
            differences = rng.normal(mean, 0.1 + 0.2 * stratum, size=(queries, 1))
            own = np.random.default_rng([number, stratum])
            strata.append(resample(differences, own, num_samples=299))
        result = summarise(strata)[0]
        covered += result.low <= true <= result.high
    # 3.3 standard errors of a share of 500; the interval of a mean of 50 is a hundredth too short.
    assert 0.95 - 0.032 - 0.01 <= covered / 500 <= 0.95 + 0.032


def test_holm_as_worked_by_hand():
    # 4 × 0.005, 3 × 0.01, 2 × 0.03, and 0.04, which may not fall below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.4, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []


def test_holm_is_that_of_another_implementation():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p_values = np.random.default_rng(12).random(20) ** 3
    theirs = multitest.multipletests(p_values, method="holm")[1]
    assert holm(p_values.tolist()) == pytest.approx(theirs.tolist())
