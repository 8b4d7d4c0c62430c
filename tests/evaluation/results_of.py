"""Results that are made of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reasonembed.evaluation.metrics import Metrics
from reasonembed.evaluation.results import Result
from reasonembed.evaluation.standings import System

DATA = {"revision": "current", "collection": "queries-1", "corpus": "documents-1"}


def metrics_of(values: Sequence[float], *, metric: str = "ndcg@10") -> Metrics:
    return Metrics(
        mean={metric: sum(values) / len(values)},
        per_query={f"q{number}": {metric: float(value)} for number, value in enumerate(values)},
        num_missing=0,
        num_ties=0,
    )


def result_of(
    values: Sequence[float], *, metric: str = "ndcg@10", data: Mapping[str, str] = DATA, **changed
) -> Result:
    fields = {
        "system": "bm25",
        "seed": None,
        "collection": "bright/pony",
        "benchmark": "bright",
        "protocol": "bright",
        "headline": metric,
    }
    return Result(
        **fields | changed,
        metrics=metrics_of(values, metric=metric),
        credited=None,
        provenance=dict(data),
    )


def system_of(name: str, by_collection: Mapping[str, Sequence[float]], **changed) -> System:
    return System(
        name,
        [
            result_of(values, system=name, collection=collection, **changed)
            for collection, values in by_collection.items()
        ],
    )
