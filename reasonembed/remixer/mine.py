"""Candidate mining with the source document shut out. Reads `queries`, writes `candidates`.

The source and every exact duplicate of it are masked before the cut (arXiv:2510.08252: top-k over
D minus d*), so that each query gets its full k. Duplicate texts count once: the first document of
a group stands for it.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reasonembed.config import MineConfig
from reasonembed.corpus import CorpusStore
from reasonembed.index.exact import search
from reasonembed.schemas import CANDIDATES, from_rows


def distinct_documents(corpus: CorpusStore) -> list[str]:
    """One document of each duplicate group, in corpus order: what is embedded and searched."""
    seen: set[str] = set()
    distinct = []
    for doc_id in corpus.doc_ids:
        group = corpus.group(doc_id)
        if group not in seen:
            seen.add(group)
            distinct.append(doc_id)
    return distinct


def mine_candidates(
    queries: pa.Table,
    query_vectors_QD: NDArray[np.float32],
    doc_ids: list[str],
    doc_vectors_ND: NDArray[np.float32],
    *,
    corpus: CorpusStore,
    config: MineConfig,
) -> pa.Table:
    """Exact top-k by inner product, each query without its source's duplicate group.

    Args:
        queries: Rows of `schemas.QUERIES`, in the order of `query_vectors_QD`.
        query_vectors_QD: float32, one row a query.
        doc_ids: Ids of the rows of `doc_vectors_ND`; may hold several documents of a group.
        doc_vectors_ND: float32, one row a document.
        corpus: Tells the duplicate groups.
        config: `top_k` and the retriever's name.

    Returns:
        Table of `schemas.CANDIDATES`; a row holds fewer than k only if the corpus does.
    """
    members: dict[str, list[int]] = {}
    for position, doc_id in enumerate(doc_ids):
        members.setdefault(corpus.group(doc_id), []).append(position)
    rows = queries.select(["query_id", "source_doc_id", "task"]).to_pylist()
    excluded = [members.get(corpus.group(row["source_doc_id"]), []) for row in rows]
    scores_QK, positions_QK = search(
        query_vectors_QD, doc_vectors_ND, k=config.top_k, excluded=excluded
    )
    table = []
    for row, scores_K, positions_K, shut in zip(
        rows, scores_QK, positions_QK, excluded, strict=True
    ):
        found = positions_K >= 0
        table.append(
            {
                **row,
                "retriever": config.encoder.model,
                "doc_ids": [doc_ids[position] for position in positions_K[found]],
                "scores": scores_K[found].tolist(),
                "num_excluded": len(shut),
            }
        )
    return from_rows(table, CANDIDATES, where="candidates")
