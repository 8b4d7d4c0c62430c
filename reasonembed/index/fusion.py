"""Fuses what several retrievers found for a query into one list; pure functions.

A list holds doc ids, best first, each once. Retrievers are named; every candidate keeps its rank
(from 1) in each list that holds it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Ranked = Mapping[str, Sequence[str]]
Ranks = Mapping[str, Mapping[str, int]]
Scored = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Origin:
    """A retriever that found a candidate, and at which rank, from 1."""

    retriever: str
    rank: int


@dataclass(frozen=True)
class Fused:
    """A candidate after fusion."""

    doc_id: str
    score: float
    origins: tuple[Origin, ...]


def rrf(ranked: Ranked, *, k: int, constant: int = 60) -> list[Fused]:
    """The k best by reciprocal rank fusion: sum over retrievers of 1 / (constant + rank).

    Cormack, Clarke and Buettcher (SIGIR 2009), whose constant is 60. Equal sums stand in the order
    of their doc ids; the order of the retrievers does not matter.

    Args:
        ranked: The lists.
        k: Candidates, at least 1.
        constant: The larger, the less the first ranks weigh.
    """
    return rrf_of_ranks(_places(ranked), k=k, constant=constant)


def rrf_of_ranks(ranks: Ranks, *, k: int, constant: int = 60) -> list[Fused]:
    """The same as `rrf` for given ranks, which documents of a retriever may share.

    Args:
        ranks: From 1, by retriever and doc id.
        k: Candidates, at least 1.
        constant: See `rrf`.
    """
    found = [
        Fused(doc_id, math.fsum(1 / (constant + origin.rank) for origin in origins), origins)
        for doc_id, origins in _origins(ranks).items()
    ]
    return sorted(found, key=lambda one: (-one.score, one.doc_id))[:k]


def weighted(scored: Scored, *, k: int, weights: Mapping[str, float]) -> list[Fused]:
    """The k best by a weighted sum of scores, each retriever's brought to 0..1.

    The best document of a retriever gets 1 and the last one 0, as does one that it did not find;
    where all its scores are equal, each document that it found gets 1. Equal sums stand in the
    order of their doc ids; the order of the retrievers does not matter.

    Args:
        scored: Finite scores by retriever and doc id.
        k: Candidates, at least 1.
        weights: Of each retriever.
    """
    ranked = {
        name: [doc_id for doc_id, _ in sorted(scores.items(), key=lambda one: (-one[1], one[0]))]
        for name, scores in scored.items()
    }
    scaled = {name: _to_unit(scores) for name, scores in scored.items()}
    found = [
        Fused(
            doc_id,
            math.fsum(weights[one.retriever] * scaled[one.retriever][doc_id] for one in origins),
            origins,
        )
        for doc_id, origins in _origins(_places(ranked)).items()
    ]
    return sorted(found, key=lambda one: (-one.score, one.doc_id))[:k]


def _to_unit(scores: Mapping[str, float]) -> dict[str, float]:
    lowest, highest = min(scores.values(), default=0), max(scores.values(), default=0)
    if lowest == highest:
        return dict.fromkeys(scores, 1.0)
    return {doc_id: (score - lowest) / (highest - lowest) for doc_id, score in scores.items()}


def quota(ranked: Ranked, *, k: int, quotas: Mapping[str, int]) -> list[Fused]:
    """So many new candidates of each retriever, taken in turn, until there are k.

    In a turn each retriever gives its best document that is not taken yet, in the order of the
    lists; a document that another one gave does not count against its quota.

    Args:
        ranked: The lists.
        k: Candidates, at least 1.
        quotas: Candidates of each retriever.

    Returns:
        In the order in which they were taken; a score is 1 / place.
    """
    taken: dict[str, None] = {}
    queues = {name: iter(doc_ids) for name, doc_ids in ranked.items()}
    left = {name: quotas[name] for name in ranked}
    while any(left.values()) and len(taken) < k:
        for name, queue in queues.items():
            if left[name] and len(taken) < k:
                doc_id = next((one for one in queue if one not in taken), None)
                left[name] = left[name] - 1 if doc_id is not None else 0
                if doc_id is not None:
                    taken[doc_id] = None
    origins = _origins(_places(ranked))
    return [Fused(one, 1 / place, origins[one]) for place, one in enumerate(taken, start=1)]


def _places(ranked: Ranked) -> dict[str, dict[str, int]]:
    return {
        name: {doc_id: place for place, doc_id in enumerate(doc_ids, start=1)}
        for name, doc_ids in ranked.items()
    }


def _origins(ranks: Ranks) -> dict[str, tuple[Origin, ...]]:
    found: dict[str, tuple[Origin, ...]] = {}
    for name, of_documents in ranks.items():
        for doc_id, rank in of_documents.items():
            found[doc_id] = (*found.get(doc_id, ()), Origin(name, rank))
    return found
