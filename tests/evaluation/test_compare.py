from __future__ import annotations

import itertools

import numpy as np
import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.compare import compare, compare_seeds


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
