"""Training samples from judged candidates.

Reads `queries`, `judgments`, `rewrites`; writes `samples`.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from reasonembed.config import AssembleConfig
from reasonembed.corpus import CorpusStore
from reasonembed.schemas import SAMPLES, Status, from_rows

JUDGED_COLUMNS = ["query_id", "doc_id", "status", "relevance_label", "expected_label"]
"""What of `schemas.JUDGMENTS` is needed here."""


@dataclass(frozen=True)
class Assembly:
    """The samples, and what became of every query.

    Attributes:
        samples: Table of `schemas.SAMPLES`.
        funnel: Queries by fate.
    """

    samples: pa.Table
    funnel: dict[str, int]


def assemble_samples(
    queries: pa.Table,
    judgments: pa.Table,
    rewrites: pa.Table,
    *,
    corpus: CorpusStore,
    config: AssembleConfig,
    instructions: dict[str, str],
) -> Assembly:
    """Splits each query's judged candidates into positives and hard negatives.

    `threshold` is the paper's rule (arXiv:2510.08252): label ≥ 3 positive, ≤ 2 negative, a query
    without both is dropped. `rank` orders a query's own candidates by expected label and takes the
    best and the worst: for annotators whose grades cannot be compared between queries.

    Args:
        queries: Table of `schemas.QUERIES`.
        judgments: Table of `schemas.JUDGMENTS`.
        rewrites: Table of `schemas.REWRITES`.
        corpus: Texts and duplicate groups.
        config: The rule.
        instructions: Query instruction by task.
    """
    judged: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in judgments.to_pylist():
        if row["status"] == Status.OK:
            judged[row["query_id"]].append(row)
    rewritten = {
        row["query_id"]: row["rewritten_query"]
        for row in rewrites.to_pylist()
        if row["status"] == Status.OK
    }
    funnel = dict.fromkeys(
        ("no usable query", "no usable rewrite", "no positive", "no negative", "sample"), 0
    )
    samples = []
    for row in queries.to_pylist():
        positives, negatives = _split(judged[row["query_id"]], config)
        fate = _fate(row, rewritten, positives, negatives)
        funnel[fate] += 1
        if fate == "sample":
            samples.append(
                {
                    "query_id": row["query_id"],
                    "task": row["task"],
                    "instruction": instructions[row["task"]],
                    "query": row["query"],
                    "rewritten_query": rewritten[row["query_id"]],
                    "positives": _labelled(positives, corpus),
                    "negatives": _labelled(negatives, corpus),
                    "source_doc_id": row["source_doc_id"],
                }
            )
    return Assembly(from_rows(samples, SAMPLES, where="samples"), funnel)


def _fate(
    query: dict[str, Any],
    rewritten: dict[str, str],
    positives: list[dict[str, Any]],
    negatives: list[dict[str, Any]],
) -> str:
    if query["status"] != Status.OK:
        return "no usable query"
    if query["query_id"] not in rewritten:
        return "no usable rewrite"
    if not positives:
        return "no positive"
    return "sample" if negatives else "no negative"


def _split(
    judged: list[dict[str, Any]], config: AssembleConfig
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    if config.rule == "threshold":
        graded = [row for row in judged if row["relevance_label"] is not None]
        return (
            [row for row in graded if row["relevance_label"] >= config.positive_min],
            [row for row in graded if row["relevance_label"] <= config.negative_max],
        )
    graded = [row for row in judged if row["expected_label"] is not None]
    ranked = sorted(graded, key=lambda row: (-row["expected_label"], row["doc_id"]))
    rest = ranked[config.rank_positives :]
    return ranked[: config.rank_positives], rest[-config.rank_negatives :]


def _labelled(rows: list[dict[str, Any]], corpus: CorpusStore) -> list[dict[str, Any]]:
    labelled = []
    for row in rows:
        graded = row["expected_label"] if row["expected_label"] else row["relevance_label"]
        labelled.append(
            {
                "doc_id": row["doc_id"],
                "text": corpus.text(row["doc_id"]),
                "label": float(graded),
                "text_hash": corpus.group(row["doc_id"]),
            }
        )
    return labelled
