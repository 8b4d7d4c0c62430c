"""Runs over a collection: dense, by BM25, and several fused; exclusions come before the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Ids
from typing import Literal

import numpy as np

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.metrics import Run, best_first
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.exact import (
    NO_DOCUMENT,
    Positions,
    Scores,
    Vectors,
    merge_topk,
    search,
)
from reasonembed.index.fusion import Fused, rrf_of_ranks, weighted

Shards = Iterable[tuple[Sequence[str], Vectors]]
"""Ids and vectors (float32 [N, D]) of a corpus in parts; one part is in memory at a time."""


def dense_run(
    query_vectors_QD: Vectors,
    documents: Shards,
    *,
    query_ids: Sequence[str],
    excluded: Mapping[str, Ids[str]],
    k: int,
) -> Run:
    """Exact top-k by inner product, whatever parts the corpus comes in.

    Args:
        query_vectors_QD: float32, in the order of `query_ids`.
        documents: The corpus; every doc id once over all parts.
        query_ids: Ids of the queries.
        excluded: Documents that a query must not get back; ids that no part holds have no effect.
        k: Documents a query.

    Returns:
        Score by query id and doc id, best first, equal scores in the order of `documents`. Equal
        vectors score equal to the last bit. With no parts, no documents.

    Raises:
        EvaluationError: An id stands twice, or ids and vectors differ in number.
        ValueError: See `index.exact.search`.
    """
    _check_ids(query_ids, len(query_vectors_QD), what="query")
    known: dict[str, None] = {}
    best: list[tuple[Scores, Positions]] = []
    for doc_ids, vectors_ND in documents:
        start = len(known)
        known.update(dict.fromkeys(doc_ids))
        _check_ids(doc_ids, len(vectors_ND), what="document", num_new=len(known) - start)
        scores_QK, positions_QK = search(
            query_vectors_QD,
            vectors_ND,
            k=k,
            excluded=_positions(excluded, query_ids, doc_ids),
        )
        positions_QK[positions_QK != NO_DOCUMENT] += start
        found = (scores_QK, positions_QK)
        best = [merge_topk([*best, found], k=k)] if best else [found]
    if not best:
        return {query_id: {} for query_id in query_ids}
    return _to_run(best[0], query_ids, list(known))


def bm25_run(
    queries: Mapping[str, str],
    index: BM25Index,
    *,
    doc_ids: Sequence[str],
    excluded: Mapping[str, Ids[str]],
    k: int,
) -> Run:
    """Top-k by BM25.

    Args:
        queries: Text by query id.
        index: Over the corpus.
        doc_ids: Ids of the indexed documents, in their order.
        excluded: As in `dense_run`.
        k: Documents a query, of those that share a word with it.

    Returns:
        Score by query id and doc id, best first, equal scores in the order of `doc_ids`.
    """
    query_ids = list(queries)
    found = index.search(
        list(queries.values()), k=k, excluded=_positions(excluded, query_ids, doc_ids)
    )
    return _to_run(found, query_ids, doc_ids)


def hybrid_run(
    runs: Mapping[str, Run],
    *,
    fusion: Literal["rrf", "weighted"],
    k: int,
    weights: Mapping[str, float] | None = None,
    rrf_constant: int = 60,
) -> Run:
    """Fuses the runs of several retrievers.

    A document that a run lacks earns nothing from it: no reciprocal rank, or the 0 of the last
    document of that run. Nothing comes in that no run holds, so runs that keep exclusions give a
    fusion that keeps them; `Protocol.settle` each run before, or what a query excludes sets the
    scale of its scores.

    Args:
        runs: By retriever, over the same queries.
        fusion: `rrf` by reciprocal rank, which equal scores share, so that copies tie in the
            fusion as they do in the runs; `weighted` by scores brought to 0..1 within a query; see
            `index.fusion`.
        k: Documents a query.
        weights: By retriever, for `weighted`; default all 1.
        rrf_constant: For `rrf`.

    Raises:
        EvaluationError: A run lacks queries of another.
    """
    _check_queries(runs)
    fused: Run = {}
    for query_id in next(iter(runs.values())):
        scored = {name: run[query_id] for name, run in runs.items()}
        found: list[Fused]
        if fusion == "rrf":
            ranks = {name: _shared_ranks(scores) for name, scores in scored.items()}
            found = rrf_of_ranks(ranks, k=k, constant=rrf_constant)
        else:
            found = weighted(scored, k=k, weights=weights or dict.fromkeys(runs, 1.0))
        fused[query_id] = {one.doc_id: one.score for one in found}
    return fused


def _shared_ranks(scores: Mapping[str, float]) -> dict[str, int]:
    """Rank by doc id, from 1; equal scores share the best of their places, as in 1, 2, 2, 4."""
    first: dict[float, int] = {}
    return {
        doc_id: first.setdefault(scores[doc_id], place)
        for place, doc_id in enumerate(best_first(scores), start=1)
    }


def _check_queries(runs: Mapping[str, Run]) -> None:
    asked = set().union(*runs.values())
    for name, run in runs.items():
        missing = sorted(asked - set(run))
        if missing:
            raise EvaluationError(
                f"the run of {name!r} lacks {len(missing)} queries that others have, such as "
                f"{missing[:5]}; a query without results must stand in it with none"
            )


def _check_ids(
    ids: Sequence[str], num_vectors: int, *, what: str, num_new: int | None = None
) -> None:
    distinct = len(set(ids)) if num_new is None else num_new
    if distinct != len(ids) or len(ids) != num_vectors:
        raise EvaluationError(
            f"{len(ids)} {what} ids, {distinct} of them new, for {num_vectors} vectors; every "
            "vector needs one id of its own"
        )


def _positions(
    excluded: Mapping[str, Ids[str]], query_ids: Sequence[str], doc_ids: Sequence[str]
) -> list[set[int]]:
    where = {doc_id: position for position, doc_id in enumerate(doc_ids)} if excluded else {}
    return [
        {where[doc_id] for doc_id in excluded.get(query_id, ()) if doc_id in where}
        for query_id in query_ids
    ]


def _to_run(
    found: tuple[Scores, Positions], query_ids: Sequence[str], doc_ids: Sequence[str]
) -> Run:
    scores_QK, positions_QK = found
    names = np.array(doc_ids, dtype=object)
    num_found_Q = (positions_QK != NO_DOCUMENT).sum(axis=1).tolist()  # what is filled comes last
    return {
        query_id: dict(
            zip(names[positions[:number]].tolist(), scores[:number].tolist(), strict=True)
        )
        for query_id, scores, positions, number in zip(
            query_ids, scores_QK, positions_QK, num_found_Q, strict=True
        )
    }


def with_duplicates(
    doc_ids: Sequence[str], vectors_ND: Vectors, *, twins: Callable[[str], Iterable[str]]
) -> tuple[list[str], Vectors]:
    """Gives each document of equal text the one vector that was computed for all of them.

    Args:
        doc_ids: One document of each group of equal text.
        vectors_ND: float32, in the order of `doc_ids`.
        twins: The documents whose text equals that of a document, itself included.
    """
    spread = [(twin, row) for row, doc_id in enumerate(doc_ids) for twin in twins(doc_id)]
    twin_ids, rows = [twin for twin, _ in spread], [row for _, row in spread]
    # Without copies the vectors are right as they are, and a second set need not fit memory.
    return twin_ids, vectors_ND if len(rows) == len(doc_ids) else vectors_ND[rows]
