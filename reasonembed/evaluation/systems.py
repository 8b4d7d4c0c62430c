"""Systems under comparison, each as a run over a collection; exclusions come before the cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Collection as Ids

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.metrics import Run
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.exact import NO_DOCUMENT, Positions, Scores, Vectors, search


def dense_run(
    query_vectors_QD: Vectors,
    document_vectors_ND: Vectors,
    *,
    query_ids: Sequence[str],
    doc_ids: Sequence[str],
    excluded: Mapping[str, Ids[str]],
    k: int,
) -> Run:
    """Exact top-k by inner product.

    Args:
        query_vectors_QD: float32, in the order of `query_ids`.
        document_vectors_ND: float32, in the order of `doc_ids`.
        query_ids: Ids of the queries.
        doc_ids: Ids of the documents.
        excluded: Documents that a query must not get back; ids that are not in `doc_ids` have no
            effect.
        k: Documents a query.

    Returns:
        Score by query id and doc id, best first, equal scores in the order of `doc_ids`.

    Raises:
        EvaluationError: An id stands twice, or ids and vectors differ in number.
        ValueError: See `index.exact.search`.
    """
    _check_ids(query_ids, len(query_vectors_QD), what="query")
    _check_ids(doc_ids, len(document_vectors_ND), what="document")
    found = search(
        query_vectors_QD,
        document_vectors_ND,
        k=k,
        excluded=_positions(excluded, query_ids, doc_ids),
    )
    return _to_run(found, query_ids, doc_ids)


def bm25_run(
    queries: Mapping[str, str],
    documents: Mapping[str, str],
    *,
    excluded: Mapping[str, Ids[str]],
    k: int,
    k1: float = 0.9,
    b: float = 0.4,
) -> Run:
    """Top-k by BM25; see `index.bm25.BM25Index` for the analysis.

    Args:
        queries: Text by query id.
        documents: Text by doc id.
        excluded: As in `dense_run`.
        k: Documents a query, of those that share a word with it.
        k1: Saturation of term frequency.
        b: Strength of length normalisation.

    Returns:
        Score by query id and doc id, best first, equal scores in the order of `documents`.
    """
    query_ids, doc_ids = list(queries), list(documents)
    found = BM25Index(list(documents.values()), k1=k1, b=b).search(
        list(queries.values()), k=k, excluded=_positions(excluded, query_ids, doc_ids)
    )
    return _to_run(found, query_ids, doc_ids)


def _check_ids(ids: Sequence[str], num_vectors: int, *, what: str) -> None:
    if len(set(ids)) != len(ids) or len(ids) != num_vectors:
        raise EvaluationError(
            f"{len(ids)} {what} ids, {len(set(ids))} of them different, for {num_vectors} vectors; "
            "every vector needs one id of its own"
        )


def _positions(
    excluded: Mapping[str, Ids[str]], query_ids: Sequence[str], doc_ids: Sequence[str]
) -> list[set[int]]:
    where = {doc_id: position for position, doc_id in enumerate(doc_ids)}
    return [
        {where[doc_id] for doc_id in excluded.get(query_id, ()) if doc_id in where}
        for query_id in query_ids
    ]


def _to_run(
    found: tuple[Scores, Positions], query_ids: Sequence[str], doc_ids: Sequence[str]
) -> Run:
    scores_QK, positions_QK = found
    return {
        query_id: {
            doc_ids[position]: score
            for score, position in zip(scores.tolist(), positions.tolist(), strict=True)
            if position != NO_DOCUMENT
        }
        for query_id, scores, positions in zip(query_ids, scores_QK, positions_QK, strict=True)
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
    return [twin for twin, _ in spread], vectors_ND[[row for _, row in spread]]
