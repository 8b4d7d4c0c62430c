from __future__ import annotations

import itertools

import numpy as np
import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.compare import compare


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
