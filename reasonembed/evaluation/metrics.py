"""Metrics of a run by trec_eval's own code.

trec_eval orders a query's documents by score as float32, descending, and equal scores by doc id,
descending, whatever order the run was made in. It leaves out of the mean every query that a run
lacks; here such a query counts 0, so that no system gains by staying silent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytrec_eval

from reasonembed.errors import EvaluationError

Run = dict[str, dict[str, float]]
"""Score by query id and doc id; documents in the order in which the system ranked them."""

CUTOFFS = (1, 5, 10, 25, 50, 100)
_CUT_MEASURES = {"ndcg": "ndcg_cut", "recall": "recall", "map": "map_cut", "p": "P"}


@dataclass(frozen=True)
class Metrics:
    """Figures of one run, from 0 to 1.

    Attributes:
        mean: Mean over all queries of the qrels by metric: "ndcg@10", "recall@100", "map@10",
            "p@10" for each cutoff, and "recip_rank".
        per_query: The same metrics by query id.
        num_missing: Queries of the qrels that the run lacks; they count 0.
        num_ties: Documents whose score, as float32, another document of their query had already.
    """

    mean: dict[str, float]
    per_query: dict[str, dict[str, float]]
    num_missing: int
    num_ties: int


def evaluate_run(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ks: Sequence[int] = CUTOFFS,
) -> Metrics:
    """Measures a run against relevance judgments.

    Args:
        run: Score by query id and doc id; numbers of any kind. A query may have no documents.
        qrels: Relevance by query id and doc id; 0 and below earn nothing.
        ks: Cutoffs.

    Raises:
        EvaluationError: There are no qrels, a query of the run or of the qrels has no judgment, or
            a score is not finite.
    """
    _check(run, qrels, ks=ks)
    scores = {
        query_id: {doc_id: float(score) for doc_id, score in run.get(query_id, {}).items()}
        for query_id in qrels
    }
    names = {f"{name}@{k}": f"{measure}_{k}" for name, measure in _CUT_MEASURES.items() for k in ks}
    names["recip_rank"] = "recip_rank"
    cuts = ",".join(str(k) for k in ks)
    measures = {f"{measure}.{cuts}" for measure in _CUT_MEASURES.values()} | {"recip_rank"}
    judged = {query_id: dict(judgments) for query_id, judgments in qrels.items()}
    found = pytrec_eval.RelevanceEvaluator(judged, measures).evaluate(scores)
    per_query = {
        query_id: {name: float(found[query_id][theirs]) for name, theirs in names.items()}
        for query_id in qrels
    }
    mean = {
        name: math.fsum(values[name] for values in per_query.values()) / len(per_query)
        for name in names
    }
    return Metrics(mean, per_query, len(set(qrels) - set(run)), _num_ties(scores))


def _check(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ks: Sequence[int],
) -> None:
    if not ks or min(ks) < 1:
        raise ValueError(f"cutoffs must be 1 or more, got {ks}")
    if not qrels:
        raise EvaluationError("there are no relevance judgments to measure against")
    unjudged = [query_id for query_id, judgments in qrels.items() if not judgments]
    if unjudged:
        raise EvaluationError(f"queries without any judgment in the qrels: {unjudged[:5]}")
    unknown = sorted(set(run) - set(qrels))
    if unknown:
        raise EvaluationError(
            f"{len(unknown)} queries of the run are not in the qrels, such as {unknown[:5]}; "
            "were another collection's queries searched?"
        )
    for query_id, scores in run.items():
        for doc_id, score in scores.items():
            if not math.isfinite(score):
                raise EvaluationError(
                    f"query {query_id!r}, document {doc_id!r}: score {score} is not finite"
                )


def _num_ties(run: Run) -> int:
    return sum(
        len(scores) - len(np.unique(np.fromiter(scores.values(), dtype=np.float32)))
        for scores in run.values()
    )
