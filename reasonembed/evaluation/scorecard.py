"""The figures of several systems on one collection, with what is sure and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from reasonembed.evaluation.compare import compare
from reasonembed.evaluation.datasets import Collection
from reasonembed.evaluation.metrics import Metrics

METRIC = "ndcg@10"
DEEP_METRIC = "recall@100"  # where a weak model's progress shows first
SHOWN = ("ndcg@10", "recall@10", "recall@100", "recip_rank")


def scorecard(
    measured: Mapping[str, Metrics],
    collection: Collection,
    *,
    baseline: str,
    system: str,
    seed: int = 0,
) -> dict[str, Any]:
    """Puts the figures of several systems together and compares one with one baseline.

    Returns:
        JSON values: `systems` (means by name), `per_query` (nDCG@10 by name and query),
        `comparison` and `deep_comparison` (system minus baseline, paired over queries, in nDCG@10
        and in recall@100), and the collection's name and number of queries.
    """

    def by_query(name: str, metric: str) -> dict[str, float]:
        return {query: figures[metric] for query, figures in measured[name].per_query.items()}

    def paired(metric: str) -> dict[str, Any]:
        pair = {"metric": metric, "system": system, "baseline": baseline}
        found = compare(by_query(system, metric), by_query(baseline, metric), seed=seed)
        return pair | asdict(found)

    return {
        "collection": collection.name,
        "queries": len(collection.queries),
        "systems": {
            name: {metric: metrics.mean[metric] for metric in SHOWN}
            | {"missing": metrics.num_missing, "ties": metrics.num_ties}
            for name, metrics in measured.items()
        },
        "per_query": {name: by_query(name, METRIC) for name in measured},
        "comparison": paired(METRIC),
        "deep_comparison": paired(DEEP_METRIC),
    }
