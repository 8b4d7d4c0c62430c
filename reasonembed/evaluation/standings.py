"""Several systems on the collections of a benchmark, each compared with the first.

Reads results (`evaluation.results`); refuses to put into one table what does not stand under one
protocol, on the same data.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.compare import Comparison, holm, resample, summarise
from reasonembed.evaluation.results import Result
from reasonembed.schemas import stable_hash


@dataclass(frozen=True)
class System:
    """One system's results, one for every collection and seed.

    Attributes:
        name: What it is called in tables.
        results: Its results, in any order.
        folders: Where they lie, in the same order; empty where that does not matter.
    """

    name: str
    results: Sequence[Result]
    folders: Sequence[Path] = ()


@dataclass(frozen=True)
class Standing:
    """What a system reached; the mean of its seeds where it has several.

    Attributes:
        system: Its name.
        seeds: Of its training; (None,) for one result without a seed.
        by_collection: Mean over queries by collection.
        overall: Mean over collections.
        spread: Standard deviation of `overall` over the seeds; None for one seed. What the seed of
            training changes is no part of the intervals of `Difference`.
        spread_by_collection: The same by collection; empty for one seed.
    """

    system: str
    seeds: tuple[int | None, ...]
    by_collection: dict[str, float]
    overall: float
    spread: float | None
    spread_by_collection: dict[str, float]


@dataclass(frozen=True)
class Difference:
    """A system minus the baseline, on one collection or overall.

    Attributes:
        system: Compared with the baseline.
        collection: None for the mean over collections: its bootstrap draws queries within each
            collection, its randomisation test swaps within each, its wins are counted over all.
        found: Difference, interval, p and counts.
        p_corrected: `found.p_value` by Holm's method; see `compare_systems`.
    """

    system: str
    collection: str | None
    found: Comparison
    p_corrected: float


@dataclass(frozen=True)
class Standings:
    """Several systems compared with a baseline on the same collections.

    Attributes:
        metric: What is compared.
        protocol: Under which all results stand.
        revisions: Of the data, by collection.
        num_queries: By collection, in order.
        standings: Of the systems, the baseline first.
        differences: Of each system, overall first where there are several collections.
        families: Number of comparisons that p values were corrected for: overall, by collection.
        num_samples: Of the randomisation test; p is at least 1 / (1 + this).
        values: Of each query, the mean over seeds, by system and collection.
    """

    metric: str
    protocol: str
    revisions: dict[str, str]
    num_queries: dict[str, int]
    standings: tuple[Standing, ...]
    differences: tuple[Difference, ...]
    families: tuple[int, int]
    num_samples: int
    values: dict[str, dict[str, dict[str, float]]]


def compare_systems(
    systems: Sequence[System],
    *,
    metric: str | None = None,
    num_samples: int = 10_000,
    seed: int = 42,
) -> Standings:
    """Compares each system with the first, on each collection and over all of them.

    A query's value is its mean over a system's seeds. The overall figure is the mean over
    collections, so that each counts the same however many queries it has.

    p values are corrected by Holm's method within two families: the comparisons over all
    collections (is a system better?), one for each system beside the baseline, and those on single
    collections (where is it better?), one for each system and collection. In each family the
    chance of any false finding is kept below the level that is read off. Pairs without the
    baseline are not looked at, so they are in no family.

    Args:
        systems: Two or more, the baseline first, with results for the same collections.
        metric: Default: the results' headline.
        num_samples: Of the bootstrap and of the randomisation test; p is at least 1 / (1 + this).
        seed: Of both; a collection's draws depend on it and on the collection's name alone.

    Raises:
        EvaluationError: Results differ in protocol, benchmark, revision, judgments, corpus,
            queries or collections, one stands twice, or one lacks the metric.
    """
    if len(systems) < 2:
        raise EvaluationError(f"a comparison needs two systems or more, got {len(systems)}")
    check_comparable(systems)
    metric = metric or _headline(systems)
    by_seed = [_by_seed(system, metric) for system in systems]
    values = {
        system.name: {name: _means(seeds) for name, seeds in own.items()}
        for system, own in zip(systems, by_seed, strict=True)
    }
    rows, families = _differences(values, num_samples=num_samples, seed=seed)
    return Standings(
        metric=metric,
        protocol=systems[0].results[0].protocol,
        revisions={one.collection: one.provenance["revision"] for one in _ordered(systems[0])},
        num_queries={name: len(of) for name, of in values[systems[0].name].items()},
        standings=tuple(map(_standing, systems, by_seed)),
        differences=rows,
        families=families,
        num_samples=num_samples,
        values=values,
    )


_BySeed = dict[str, dict[int | None, dict[str, float]]]
"""Values of a system by collection, seed and query."""


def _by_seed(system: System, metric: str) -> _BySeed:
    values: _BySeed = {}
    for result in _ordered(system):
        if metric not in result.metrics.mean:
            raise EvaluationError(
                f"{system.name} has no {metric!r} on {result.collection}; it has "
                f"{', '.join(result.metrics.mean)}"
            )
        by_query = {query: of[metric] for query, of in result.metrics.per_query.items()}
        values.setdefault(result.collection, {})[result.seed] = by_query
    return values


def _means(by_seed: Mapping[int | None, Mapping[str, float]]) -> dict[str, float]:
    """Mean over the seeds of each query; queries sorted."""
    runs = list(by_seed.values())
    return {query: statistics.fmean(run[query] for run in runs) for query in sorted(runs[0])}


def _headline(systems: Sequence[System]) -> str:
    headlines = {one.headline: one.collection for system in systems for one in system.results}
    if len(headlines) > 1:
        told = ", ".join(f"{metric} on {collection}" for metric, collection in headlines.items())
        raise EvaluationError(f"the results have several headlines: {told}; choose one metric")
    return next(iter(headlines))


def _standing(system: System, values: _BySeed) -> Standing:
    by_collection_and_seed = {
        name: {seed: statistics.fmean(of.values()) for seed, of in by_seed.items()}
        for name, by_seed in values.items()
    }
    seeds = tuple(next(iter(by_collection_and_seed.values())))
    of_seeds = [
        statistics.fmean(means[seed] for means in by_collection_and_seed.values()) for seed in seeds
    ]
    several = len(seeds) > 1
    return Standing(
        system=system.name,
        seeds=seeds,
        by_collection={
            name: statistics.fmean(means.values()) for name, means in by_collection_and_seed.items()
        },
        overall=statistics.fmean(of_seeds),
        spread=statistics.stdev(of_seeds) if several else None,
        spread_by_collection={
            name: statistics.stdev(means.values())
            for name, means in by_collection_and_seed.items()
            if several
        },
    )


def _differences(
    values: Mapping[str, Mapping[str, Mapping[str, float]]], *, num_samples: int, seed: int
) -> tuple[tuple[Difference, ...], tuple[int, int]]:
    (_, baseline), *others = values.items()
    strata = {
        name: resample(
            np.array([[own[name][query] - of[query] for _, own in others] for query in of]),
            # Another stream for each, or collections of one size would share their draws.
            np.random.default_rng([seed, int(stable_hash(name), 16)]),
            num_samples=num_samples,
        )
        for name, of in baseline.items()
    }
    names = list(strata)
    single = {name: summarise([one]) for name, one in strata.items()}
    overall = summarise(list(strata.values())) if len(names) > 1 else []
    overall_corrected = holm([one.p_value for one in overall])
    flat = iter(holm([one.p_value for row in single.values() for one in row]))
    single_corrected = {name: [next(flat) for _ in others] for name in names}
    rows = []
    for column, (system, _) in enumerate(others):
        if overall:
            p_corrected = overall_corrected[column]
            rows.append(Difference(system, None, overall[column], p_corrected))
        rows += [
            Difference(system, name, single[name][column], single_corrected[name][column])
            for name in names
        ]
    return tuple(rows), (len(overall), len(names) * len(others))


_FACTS = {
    "revision": "revision",
    "collection": "fingerprint of queries, judgments and exclusions",
    "corpus": "fingerprint of the searched documents",
}
"""What has to be equal on a collection, by field of the provenance."""


def check_comparable(systems: Sequence[System]) -> None:
    """Makes sure that all results may stand in one table.

    Raises:
        EvaluationError: See `compare_systems`; both values are named.
    """
    names = [system.name for system in systems]
    if len(set(names)) != len(names):
        raise EvaluationError(f"every system needs a name of its own, got {', '.join(names)}")
    protocols = {result.protocol: system.name for system in systems for result in system.results}
    if len(protocols) > 1:
        (a, of_a), (b, of_b) = list(protocols.items())[:2]
        raise EvaluationError(
            f"{of_a} stands under protocol {a!r} and {of_b} under {b!r}; figures of two protocols "
            "are not comparable: measure both under one"
        )
    _check_one_benchmark(systems)
    for system in systems:
        _check_complete(system, systems[0])
    check_same_data(systems)


def check_same_data(systems: Sequence[System]) -> None:
    """Makes sure that on each collection all results stand on the same data and queries.

    Raises:
        EvaluationError: Two do not; both values are named.
    """
    first: dict[str, tuple[str, Result]] = {}
    for system in systems:
        for result in system.results:
            name, other = first.setdefault(result.collection, (system.name, result))
            _check_pair(name, other, system.name, result)


def _check_one_benchmark(systems: Sequence[System]) -> None:
    benchmarks = sorted({result.benchmark for system in systems for result in system.results})
    if len(benchmarks) > 1:
        raise EvaluationError(
            f"the results are of {len(benchmarks)} benchmarks: {', '.join(benchmarks)}; a mean "
            "over several is a figure of none of them: choose with --on"
        )


def _check_complete(system: System, baseline: System) -> None:
    """Refuses collections that only one of them has; see `check_seeds`."""
    wanted = {result.collection for result in baseline.results}
    found = {result.collection for result in system.results}
    if not found or found != wanted:
        only = sorted(wanted - found), sorted(found - wanted)
        raise EvaluationError(
            f"{baseline.name} has results on {len(wanted)} collections and {system.name} on "
            f"{len(found)}; only {baseline.name} has {only[0]}, only {system.name} has {only[1]}: "
            "measure what is missing, or name the collections that both have"
        )
    check_seeds(system)


def check_seeds(system: System) -> None:
    """Makes sure that a mean over a system's seeds is one.

    Raises:
        EvaluationError: A collection and seed stands twice, or collections have other seeds.
    """
    seeds: dict[str, dict[int | None, int]] = {}
    for number, result in enumerate(system.results):
        first = seeds.setdefault(result.collection, {}).setdefault(result.seed, number)
        if first != number:
            pair = " and ".join(
                str(system.folders[one]) for one in (first, number) if system.folders
            )
            raise EvaluationError(
                f"{system.name} has two results on {result.collection} with the same seed, "
                f"{result.seed}{pair and f': {pair}'}; leave one, or give its seeds different "
                "numbers"
            )
    kinds = {frozenset(own): collection for collection, own in seeds.items()}
    if len(kinds) > 1:
        (a, on_a), (b, on_b) = list(kinds.items())[:2]
        raise EvaluationError(
            f"{system.name} has seeds {sorted(map(str, a))} on {on_a} and {sorted(map(str, b))} on "
            f"{on_b}; its mean needs the same seeds on every collection"
        )


def _check_pair(of_a: str, a: Result, of_b: str, b: Result) -> None:
    for field, what in _FACTS.items():
        ours, theirs = a.provenance[field], b.provenance[field]
        if ours != theirs:
            raise EvaluationError(
                f"{a.collection}: {what} is {ours!r} for {of_a} and {theirs!r} for {of_b}; their "
                "figures are not comparable: measure both on the same data"
            )
    queries = a.metrics.per_query.keys() ^ b.metrics.per_query.keys()
    if queries:
        raise EvaluationError(
            f"{a.collection}: {of_a} has {len(a.metrics.per_query)} queries and {of_b} "
            f"{len(b.metrics.per_query)}, {len(queries)} of them only one, such as "
            f"{sorted(queries)[:5]}"
        )


def _ordered(system: System) -> list[Result]:
    return sorted(system.results, key=lambda one: (one.collection, one.seed or 0))
