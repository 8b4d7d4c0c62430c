"""Is one system better than another on the same queries, beyond chance?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reasonembed.errors import EvaluationError

_Floats = npt.NDArray[np.float64]
_BLOCK = 1_000  # samples drawn at a time, to bound memory
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
    differences = np.array([a[query_id] - b[query_id] for query_id in sorted(a)])
    mean = float(differences.mean())
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_bootstrap_means(differences, num_samples, rng), [0.025, 0.975])
    swapped = _swapped_means(differences, num_samples, rng)
    as_large = int((np.abs(swapped) >= abs(mean) - _ROUNDING).sum())
    return Comparison(
        mean_difference=mean,
        low=float(low),
        high=float(high),
        # The observed assignment is one of the possible ones, so p is never 0.
        p_value=(as_large + 1) / (num_samples + 1),
        wins=int((differences > 0).sum()),
        ties=int((differences == 0).sum()),
        losses=int((differences < 0).sum()),
    )


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


def _bootstrap_means(differences: _Floats, num_samples: int, rng: np.random.Generator) -> _Floats:
    size = len(differences)
    parts = [
        differences[rng.integers(0, size, size=(block, size))].mean(axis=1)
        for block in _blocks(num_samples)
    ]
    return np.concatenate(parts)


def _swapped_means(differences: _Floats, num_samples: int, rng: np.random.Generator) -> _Floats:
    size = len(differences)
    parts = [
        (rng.integers(0, 2, size=(block, size)) * 2 - 1) @ differences / size
        for block in _blocks(num_samples)
    ]
    return np.concatenate(parts)


def _blocks(num_samples: int) -> Iterator[int]:
    for start in range(0, num_samples, _BLOCK):
        yield min(_BLOCK, num_samples - start)
