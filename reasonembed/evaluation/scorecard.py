"""The figures of several systems on one collection, with what is sure and what is not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from reasonembed.evaluation.compare import compare
from reasonembed.evaluation.datasets import Collection
from reasonembed.evaluation.metrics import Run, evaluate_run

METRIC = "ndcg@10"
SHOWN = ("ndcg@10", "recall@10", "recall@100", "recip_rank")


def scorecard(
    runs: Mapping[str, Run], collection: Collection, *, baseline: str, system: str, seed: int = 0
) -> dict[str, Any]:
    """Measures every run and compares one system with one baseline.

    Returns:
        JSON values: `systems` (means by name), `per_query` (nDCG@10 by name and query),
        `comparison` (system minus baseline, paired over queries), and the collection's name and
        number of queries.
    """
    measured = {name: evaluate_run(run, collection.qrels) for name, run in runs.items()}
    per_query = {
        name: {query: figures[METRIC] for query, figures in metrics.per_query.items()}
        for name, metrics in measured.items()
    }
    return {
        "collection": collection.name,
        "queries": len(collection.queries),
        "systems": {
            name: {metric: metrics.mean[metric] for metric in SHOWN}
            | {"missing": metrics.num_missing, "ties": metrics.num_ties}
            for name, metrics in measured.items()
        },
        "per_query": per_query,
        "comparison": {
            "metric": METRIC,
            "system": system,
            "baseline": baseline,
            **asdict(compare(per_query[system], per_query[baseline], seed=seed)),
        },
    }
