"""Runs as TREC run files and as tables of `schemas.RUNS`."""

from __future__ import annotations

import math
from pathlib import Path

import pyarrow as pa

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.metrics import Run
from reasonembed.schemas import RUNS, from_rows


def write_trec(run: Run, path: Path, *, tag: str) -> None:
    """Writes `query_id Q0 doc_id rank score tag` lines, best first; equal scores as in the run.

    Scores are written so that reading gives the same numbers back.

    Raises:
        EvaluationError: An id or the tag is empty or holds white space, which would shift columns.
    """
    lines = []
    for query_id, scores in run.items():
        for rank, (doc_id, score) in enumerate(_ranked(scores), start=1):
            for name in (query_id, doc_id, tag):
                if name.split() != [name]:
                    raise EvaluationError(
                        f"{name!r} cannot stand in a TREC run file: ids and tags must be non-empty "
                        "and free of white space; write a table instead"
                    )
            lines.append(f"{query_id} Q0 {doc_id} {rank} {score!r} {tag}\n")
    path.write_text("".join(lines), encoding="utf-8")


def read_trec(path: Path) -> Run:
    """Reads a TREC run file; ranks are ignored, as trec_eval does.

    Raises:
        EvaluationError: A line has not six columns or no finite score, or a document stands twice
            under a query.
    """
    run: Run = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            query_id, _, doc_id, _, text, _ = line.split()
            score = float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise EvaluationError(
                f"{path}, line {number}: expected `query_id Q0 doc_id rank score tag` with a "
                f"finite score, got {line[:80]!r}"
            )
        scores = run.setdefault(query_id, {})
        if doc_id in scores:
            raise EvaluationError(
                f"{path}, line {number}: document {doc_id!r} stands twice for query {query_id!r}"
            )
        scores[doc_id] = score
    return {query_id: dict(_ranked(scores)) for query_id, scores in run.items()}


def to_table(run: Run) -> pa.Table:
    """A table of `schemas.RUNS`, one row a query, best first; scores become float32."""
    rows: list[dict[str, object]] = []
    for query_id, scores in run.items():
        ranked = _ranked(scores)
        rows.append(
            {
                "query_id": query_id,
                "doc_ids": [doc_id for doc_id, _ in ranked],
                "scores": [score for _, score in ranked],
            }
        )
    return from_rows(rows, RUNS, where="runs")


def from_table(table: pa.Table) -> Run:
    """The run that a table of `schemas.RUNS` holds.

    Raises:
        EvaluationError: A query or, under a query, a document stands twice, or the two lists of a
            row differ in length.
    """
    run: Run = {}
    for row in table.to_pylist():
        query_id, doc_ids, scores = row["query_id"], row["doc_ids"], row["scores"]
        if query_id in run or len(set(doc_ids)) != len(doc_ids) or len(doc_ids) != len(scores):
            raise EvaluationError(
                f"runs: query {query_id!r} stands twice, or holds a document twice, or has "
                f"{len(doc_ids)} documents with {len(scores)} scores"
            )
        run[query_id] = dict(zip(doc_ids, scores, strict=True))
    return run


def _ranked(scores: dict[str, float]) -> list[tuple[str, float]]:
    # A stable sort: equal scores stay in the order that the system gave them.
    return sorted(scores.items(), key=lambda pair: -pair[1])
