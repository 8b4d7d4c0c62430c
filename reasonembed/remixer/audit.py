"""How good is the annotator? It judges pairs whose gold is known; here they are chosen and scored.

Never used for training. Reads an evaluation collection and its judgments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reasonembed.corpus import CorpusStore
from reasonembed.evaluation.datasets import Collection
from reasonembed.index.exact import search
from reasonembed.remixer.annotate import PAIRS
from reasonembed.schemas import Status, from_rows, stable_hash

NEGATIVES_PER_QUERY = 3


@dataclass(frozen=True)
class Agreement:
    """Agreement of labels with gold.

    Attributes:
        num_pairs: Judged pairs that count.
        auc: Probability that a gold document gets a higher label than a mined document of the same
            query that is not gold; ties count one half; 0.5 is chance.
        top1: Share of queries whose gold document has the highest label alone or with equals,
            weighted by the number of equals.
        chance_top1: What guessing gives.
    """

    num_pairs: int
    auc: float
    top1: float
    chance_top1: float


def plan_audit(
    collection: Collection,
    query_ids: list[str],
    query_vectors_QD: NDArray[np.float32],
    doc_ids: list[str],
    doc_vectors_ND: NDArray[np.float32],
    *,
    num_queries: int,
    seed: int,
    corpus: CorpusStore | None = None,
) -> pa.Table:
    """One gold document and the best mined documents that are not gold, for some queries.

    The negatives are hard on purpose: telling gold from random documents says little.

    Args:
        collection: Queries and their gold.
        query_ids: Ids of the rows of `query_vectors_QD`.
        query_vectors_QD: float32.
        doc_ids: Ids of the rows of `doc_vectors_ND`.
        doc_vectors_ND: float32.
        num_queries: How many queries; all of them where there are fewer.
        seed: Decides which.
        corpus: Tells the exact duplicates, so that no text of a gold document counts as a negative.

    Returns:
        Table of `annotate.PAIRS`.
    """
    chosen = sorted(query_ids, key=lambda id_: stable_hash(seed, id_))[:num_queries]
    rows_of = {id_: row for row, id_ in enumerate(query_ids)}

    def group(doc_id: str) -> str:
        return corpus.group(doc_id) if corpus is not None and doc_id in corpus else doc_id

    members: dict[str, list[int]] = {}
    for row, doc_id in enumerate(doc_ids):
        members.setdefault(group(doc_id), []).append(row)
    named = [
        [
            row
            for g in {group(d) for d in collection.named_documents_of(id_)}
            for row in members.get(g, [])
        ]
        for id_ in chosen
    ]
    rows = [rows_of[id_] for id_ in chosen]
    _, found_QK = search(
        query_vectors_QD[rows], doc_vectors_ND, k=NEGATIVES_PER_QUERY, excluded=named
    )
    pairs = []
    for id_, found_K in zip(chosen, found_QK, strict=True):
        gold = [doc for doc, grade in collection.qrels[id_].items() if grade > 0]
        mined = [doc_ids[row] for row in found_K if row >= 0]
        pairs += [{"query_id": id_, "doc_id": doc} for doc in [min(gold), *mined]]
    return from_rows(pairs, PAIRS, where="audit pairs")


def agreement(judgments: pa.Table, collection: Collection, *, column: str) -> Agreement | None:
    """Agreement of one label column (`relevance_label` or `expected_label`) with gold.

    Returns:
        None where no query has both a judged gold document and a judged other one.
    """
    by_query: dict[str, tuple[list[float], list[float]]] = {}
    for row in judgments.to_pylist():
        _sort_in(by_query, row, collection, column)
    wins, top1, chance, total, pairs = 0.0, 0.0, 0.0, 0, 0
    for gold, other in by_query.values():
        if not gold or not other:
            continue
        label = gold[0]
        wins += sum((label > value) + (label == value) / 2 for value in other) / len(other)
        if label >= max(other):
            top1 += 1 / (1 + sum(value == label for value in other))
        chance += 1 / (1 + len(other))
        total, pairs = total + 1, pairs + 1 + len(other)
    if not total:
        return None
    return Agreement(pairs, wins / total, top1 / total, chance / total)


def _sort_in(
    by_query: dict[str, tuple[list[float], list[float]]],
    row: dict[str, Any],
    collection: Collection,
    column: str,
) -> None:
    if row["status"] != Status.OK or row[column] is None:
        return
    gold, other = by_query.setdefault(row["query_id"], ([], []))
    is_gold = collection.qrels[row["query_id"]].get(row["doc_id"], 0) > 0
    (gold if is_gold else other).append(float(row[column]))
