"""Metrics of a run by trec_eval's own code, behind checks that it does not make.

trec_eval orders a query's documents by score as float32, descending, and equal scores by doc id,
descending, whatever order the run was made in. It leaves out of the mean every query that a run
lacks; here such a query counts 0, so that no system gains by staying silent.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import numpy.typing as npt
import pytrec_eval

from reasonembed.errors import ConfigError, EvaluationError

Run = dict[str, dict[str, float]]
"""Score by query id and doc id; documents in the order in which the system ranked them."""

Qrels = dict[str, dict[str, int]]
"""Relevance by query id and doc id; 1 and more is gold, 0 and less was judged and is not."""

CUTOFFS = (1, 5, 10, 25, 50, 100)
_CUT_MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "p": "P"}
_SHOWN = 5  # ids named in a message


def metric_names(ks: Sequence[int]) -> tuple[str, ...]:
    """Names of the metrics that are measured at these cutoffs."""
    return (*(f"{measure}@{k}" for measure in _CUT_MEASURES for k in ks), "recip_rank")


METRICS = metric_names(CUTOFFS)
"""All metrics at the usual cutoffs."""


@dataclass(frozen=True)
class Metrics:
    """Figures of one run, from 0 to 1, unrounded.

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
        EvaluationError: There are no qrels, a query of the run or of the qrels has no judgment, an
            id is no string, a relevance no whole number, or a score no finite number.
    """
    _check_queries(run, qrels, ks=ks)
    judged = {query_id: _judgments(query_id, given) for query_id, given in qrels.items()}
    deciding: Run = {}
    num_ties = 0
    for query_id, judgments in judged.items():
        scores = run.get(query_id, {})
        numbers = score_array(query_id, scores)
        singles = _as_trec_eval(numbers)
        num_ties += len(singles) - len(np.unique(singles))
        deciding[query_id] = _deciding(scores, numbers, singles, judgments, depth=max(ks))
    per_query = _measure(deciding, judged, ks=ks)
    return Metrics(
        mean={
            name: math.fsum(values[name] for values in per_query.values()) / len(per_query)
            for name in metric_names(ks)
        },
        per_query=per_query,
        num_missing=len(judged.keys() - run.keys()),
        num_ties=num_ties,
    )


def best_first(scores: Mapping[str, float]) -> list[str]:
    """Doc ids by score, descending; equal scores stay in their order."""
    return sorted(scores, key=lambda doc_id: -scores[doc_id])


def score_array(query_id: str, scores: Mapping[str, float]) -> npt.NDArray[np.float64]:
    """The scores of a query as numbers, in their order.

    Raises:
        EvaluationError: A doc id is no string, or a score no finite number; the first is named.
    """
    if set(map(type, scores)) <= {str} and all(map(_is_number, set(map(type, scores.values())))):
        numbers = np.fromiter(scores.values(), dtype=np.float64, count=len(scores))
        if np.isfinite(numbers).all():
            return numbers
    for doc_id, score in scores.items():
        if not isinstance(doc_id, str):
            raise EvaluationError(
                f"query {query_id!r}: doc id {doc_id!r} is not a string; ids are, in run and qrels"
            )
        where = f"query {query_id!r}, document {doc_id!r}"
        if not _is_number(type(score)):
            raise EvaluationError(
                f"{where}: score {score!r} is not a number but of type {type(score).__name__}"
            )
        if not math.isfinite(score):
            raise EvaluationError(f"{where}: score {score} is not finite")
    raise AssertionError("every document was found to be in order")


def parse_metrics(text: str) -> tuple[str, ...]:
    """Names of metrics from a list such as "ndcg@10,recall@100,recip_rank"; any cutoff will do.

    Raises:
        ConfigError: A name is unknown or stands twice, or there is none.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name != "recip_rank" and not re.fullmatch(r"(ndcg|map|recall|p)@[1-9]\d{0,5}", name):
            raise ConfigError(
                f"unknown metric {name!r}; there are ndcg@K, map@K, recall@K and p@K, K any whole "
                "number from 1 on, and recip_rank, with commas between"
            )
    if len(set(names)) != len(names):
        raise ConfigError(f"a metric stands twice in {text!r}")
    return names


def cutoffs_of(names: Sequence[str]) -> tuple[int, ...]:
    """The cutoffs that the named metrics need, at least one."""
    return tuple(sorted({int(name.split("@")[1]) for name in names if "@" in name})) or (1,)


def _check_queries(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    *,
    ks: Sequence[int],
) -> None:
    if not ks or min(ks) < 1 or len(set(ks)) != len(ks):
        raise ValueError(f"cutoffs must be 1 or more and differ, got {ks}")
    if not qrels:
        raise EvaluationError("there are no relevance judgments to measure against")
    unjudged = [query_id for query_id, judgments in qrels.items() if not judgments]
    if unjudged:
        raise EvaluationError(f"queries without any judgment in the qrels: {unjudged[:_SHOWN]}")
    unknown = sorted(map(repr, run.keys() - qrels.keys()))
    if unknown:
        raise EvaluationError(
            f"{len(unknown)} queries of the run are not in the qrels, such as "
            f"{', '.join(unknown[:_SHOWN])}; were another collection's queries searched?"
        )


def _judgments(query_id: str, given: Mapping[str, int]) -> dict[str, int]:
    if not isinstance(query_id, str) or set(map(type, given)) != {str}:
        raise EvaluationError(f"query {query_id!r}: ids must be strings in the qrels, too")
    try:
        return {doc_id: operator.index(relevance) for doc_id, relevance in given.items()}
    except TypeError as error:
        raise EvaluationError(
            f"query {query_id!r}: relevance must be a whole number: {error}"
        ) from None


def _is_number(kind: type) -> bool:
    return kind is not bool and issubclass(kind, Real)


def _as_trec_eval(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):  # trec_eval's cast gives infinity as well
        return numbers.astype(np.float32)


def _deciding(
    scores: Mapping[str, float],
    numbers: npt.NDArray[np.float64],
    singles: npt.NDArray[np.float32],
    judgments: Mapping[str, int],
    *,
    depth: int,
) -> dict[str, float]:
    """The documents of a query that decide its metrics, by score; trec_eval is slow on the rest.

    The first `depth`, with all that tie with the last of them, decide every metric at a cutoff,
    and the reciprocal rank if there is gold among them or nowhere.
    """
    if len(scores) > depth:
        last = np.partition(singles, -depth)[-depth]
        kept = np.flatnonzero(singles >= last)
        doc_ids = list(scores)
        top = {doc_ids[position]: float(numbers[position]) for position in kept.tolist()}
        gold = [doc_id for doc_id, relevance in judgments.items() if relevance > 0]
        if any(doc_id in top for doc_id in gold) or not any(doc_id in scores for doc_id in gold):
            return top
    return dict(zip(scores, numbers.tolist(), strict=True))


def _measure(run: Run, qrels: Qrels, *, ks: Sequence[int]) -> dict[str, dict[str, float]]:
    """Figures by query id, by trec_eval."""
    theirs = {f"{ours}@{k}": f"{name}_{k}" for ours, name in _CUT_MEASURES.items() for k in ks}
    theirs["recip_rank"] = "recip_rank"
    cuts = ",".join(map(str, ks))
    measures = {f"{name}.{cuts}" for name in _CUT_MEASURES.values()} | {"recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    return {
        query_id: {ours: float(found[query_id][name]) for ours, name in theirs.items()}
        for query_id in qrels
    }
