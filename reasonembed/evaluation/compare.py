"""Is one system better than another on the same queries, beyond chance?

Two systems are compared by `compare`, over seeds of training by `compare_seeds`. Several systems
on the collections of a benchmark are the business of `evaluation.standings`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reasonembed.errors import EvaluationError

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]
_BLOCK_CELLS = 2**20  # numbers drawn at a time, to bound memory
_ROUNDING = 1e-12  # means of the same numbers in another order differ by less


@dataclass(frozen=True)
class Comparison:
    """System A minus system B in one metric over the same queries.

    Attributes:
        mean_difference: Of A minus B.
        low: Lower end of the 95 % percentile interval of a bootstrap over queries.
        high: Upper end.
        p_value: Two-sided, of a paired randomisation test: the share of random swaps of A and B
            that give at least this difference.
        wins: Queries where A is better.
        ties: Queries where both are equal.
        losses: Queries where B is better.
    """

    mean_difference: float
    low: float
    high: float
    p_value: float
    wins: int
    ties: int
    losses: int


def compare(
    a: Mapping[str, float],
    b: Mapping[str, float],
    *,
    num_samples: int = 10_000,
    seed: int = 42,
) -> Comparison:
    """Compares two systems' values of one metric, query by query.

    The interval says how much the mean depends on which queries were asked; it knows nothing of
    training seeds.

    Args:
        a: Value by query id.
        b: Value by query id; the same queries.
        num_samples: Of the bootstrap and of the randomisation test.
        seed: Of both; equal arguments give equal results.

    Raises:
        EvaluationError: The queries differ, or there are none.
    """
    if not a or a.keys() != b.keys():
        differing = sorted(a.keys() ^ b.keys())
        raise EvaluationError(
            f"both systems need values for the same queries, at least one: {len(a)} and {len(b)} "
            f"given, {len(differing)} differ, such as {differing[:5]}"
        )
    differences_Q1 = np.array([[a[query_id] - b[query_id]] for query_id in sorted(a)])
    rng = np.random.default_rng(seed)
    return summarise([resample(differences_Q1, rng, num_samples=num_samples)])[0]


@dataclass(frozen=True)
class SeedComparison:
    """System A minus system B, both trained with the same seeds and asked the same queries.

    Attributes:
        over_queries: Of each query's mean over the seeds: how far the difference depends on which
            queries were asked.
        by_seed: Mean difference of each seed.
        low: Lower end of the 95 % interval of their mean by Student's t: how far the difference
            depends on the seed. None for one seed.
        high: Upper end.
    """

    over_queries: Comparison
    by_seed: tuple[float, ...]
    low: float | None
    high: float | None


# Quantile 0.975 of Student's t for 1 to 30 degrees of freedom; more get the last, a little wide.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def compare_seeds(
    a: Sequence[Mapping[str, float]],
    b: Sequence[Mapping[str, float]],
    *,
    num_samples: int = 10_000,
    seed: int = 42,
) -> SeedComparison:
    """Compares two systems that were each trained with several seeds.

    Args:
        a: Value by query id for each seed.
        b: The same seeds in the same order, the same queries.
        num_samples: See `compare`.
        seed: See `compare`; not of training.

    Raises:
        EvaluationError: The numbers of seeds or the queries differ, or there are none.
    """
    if not a or len(a) != len(b) or len({frozenset(values) for values in (*a, *b)}) != 1:
        raise EvaluationError(
            f"both systems need the same seeds, at least one, and the same queries: {len(a)} and "
            f"{len(b)} seeds given"
        )
    means = [
        {query_id: sum(values[query_id] for values in side) / len(side) for query_id in side[0]}
        for side in (a, b)
    ]
    over_queries = compare(*means, num_samples=num_samples, seed=seed)
    differences = np.array(
        [np.mean([one[q] - other[q] for q in one]) for one, other in zip(a, b, strict=True)]
    )
    low, high = _student_interval(differences)
    return SeedComparison(over_queries, tuple(map(float, differences)), low, high)


def _student_interval(values: _Floats) -> tuple[float | None, float | None]:
    if len(values) < 2:
        return None, None
    factor = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
    half = factor * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values that keep the chance of any false finding in a family below the level.

    The smallest is multiplied by the number of comparisons, the next by one less, and so on; none
    falls below the one before it, none passes 1 (Holm 1979).
    """
    adjusted = [1.0] * len(p_values)
    highest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = highest
    return adjusted


@dataclass(frozen=True)
class Resampled:
    """Differences of systems to a baseline on one collection, and what chance makes of them.

    Attributes:
        differences_QS: By query and system; float64.
        drawn_RS: Their means over queries that were drawn with replacement; by sample and system.
        swapped_RS: Their means where both systems changed places in random queries.
    """

    differences_QS: _Floats
    drawn_RS: _Floats
    swapped_RS: _Floats


def resample(differences_QS: _Floats, rng: np.random.Generator, *, num_samples: int) -> Resampled:
    """Draws and swaps queries; all systems share the draws."""
    return Resampled(
        differences_QS,
        _weighted_means(_draw, differences_QS, rng, num_samples=num_samples),
        _weighted_means(_swap, differences_QS, rng, num_samples=num_samples),
    )


def summarise(strata: Sequence[Resampled]) -> list[Comparison]:
    """Compares every system; the statistic is the mean over collections of the mean over queries.

    Args:
        strata: One for each collection; their random draws must not depend on each other.
    """
    means = np.mean([one.differences_QS.mean(axis=0) for one in strata], axis=0)
    drawn_RS = np.mean([one.drawn_RS for one in strata], axis=0)
    low, high = np.quantile(drawn_RS, [0.025, 0.975], axis=0)
    swapped_RS = np.mean([one.swapped_RS for one in strata], axis=0)
    as_large = (np.abs(swapped_RS) >= np.abs(means) - _ROUNDING).sum(axis=0)
    # The observed assignment is one of the possible ones, so p is never 0.
    p_values = (as_large + 1) / (len(swapped_RS) + 1)
    pooled_QS = np.concatenate([one.differences_QS for one in strata])
    wins, losses = (pooled_QS > _ROUNDING).sum(axis=0), (pooled_QS < -_ROUNDING).sum(axis=0)
    return [
        Comparison(
            mean_difference=float(means[system]),
            low=float(low[system]),
            high=float(high[system]),
            p_value=float(p_values[system]),
            wins=int(wins[system]),
            ties=int(len(pooled_QS) - wins[system] - losses[system]),
            losses=int(losses[system]),
        )
        for system in range(pooled_QS.shape[1])
    ]


def _weighted_means(
    weights: Callable[[int, int, np.random.Generator], _Integers],
    differences_QS: _Floats,
    rng: np.random.Generator,
    *,
    num_samples: int,
) -> _Floats:
    size = len(differences_QS)
    block = max(1, _BLOCK_CELLS // size)
    parts = [
        weights(min(block, num_samples - start), size, rng).astype(np.float64) @ differences_QS
        for start in range(0, num_samples, block)
    ]
    means: _Floats = np.concatenate(parts) / size
    return means


def _draw(block: int, size: int, rng: np.random.Generator) -> _Integers:
    """How often each query is drawn when as many are drawn as there are."""
    drawn = rng.integers(0, size, size=(block, size)) + size * np.arange(block)[:, None]
    return np.bincount(drawn.ravel(), minlength=block * size).reshape(block, size)


def _swap(block: int, size: int, rng: np.random.Generator) -> _Integers:
    """-1 where the two systems change places in a query, else 1."""
    return rng.integers(0, 2, size=(block, size)) * 2 - 1
