"""The descent of one query through a run, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.compute as pc

from reasonembed.errors import ConfigError
from reasonembed.run import Run

_EXCERPT = 300


def trace_query(run: Run, query_id: str) -> Iterator[str]:
    """Says, stage by stage, what became of a planned query.

    Raises:
        ConfigError: No such query was planned.
    """
    seed = _one(run, "seeds", query_id)
    if seed is None:
        raise ConfigError(f"{run.dir} has planned no query {query_id!r}; ids are in seeds/")
    corpus = run.corpus_store()
    yield f"seed       document {seed['source_doc_id']} ({seed['task']})"
    yield f"           {_short(corpus.text(seed['source_doc_id']))}"
    yield (
        f"           asked for {seed['min_words']}-{seed['max_words']} words, "
        f"{seed['education_level']}, seed {seed['seed']}"
    )
    yield from _generated(_one(run, "queries", query_id))
    candidates = _one(run, "candidates", query_id)
    if candidates:
        yield (
            f"candidates {len(candidates['doc_ids'])} by {candidates['retriever']}, "
            f"{candidates['num_excluded']} shut out (source and duplicates)"
        )
    judgments = {row["doc_id"]: row for row in _rows(run, "judgments", query_id)}
    for rank, doc_id in enumerate(candidates["doc_ids"] if candidates else [], start=1):
        yield _judged(rank, doc_id, judgments.get(doc_id))
    rewrite = _one(run, "rewrites", query_id)
    if rewrite:
        yield f"rewrite    {rewrite['status']}: {_short(rewrite['rewritten_query'])}"
    sample = _one(run, "samples", query_id)
    if sample:
        for side in ("positives", "negatives"):
            ids = ", ".join(f"{row['doc_id']} ({row['label']:.2f})" for row in sample[side])
            yield f"sample     {side}: {ids}"
    else:
        yield "sample     none"


def _generated(query: dict[str, Any] | None) -> Iterator[str]:
    if query is None:
        yield "query      not written yet"
        return
    reason = f" - {query['detail']}" if query["detail"] else ""
    written = f"{query['model']}, {query['completion_tokens']} tokens"
    yield f"query      {query['status']}{reason} ({written})"
    if query["query"]:
        yield f"           {_short(query['query'])}"


def _judged(rank: int, doc_id: str, row: dict[str, Any] | None) -> str:
    if row is None:
        return f"  {rank:3d}      {doc_id}: not judged"
    expected = f", expected {row['expected_label']:.2f}" if row["expected_label"] else ""
    label = row["relevance_label"] if row["relevance_label"] is not None else row["status"]
    return f"  {rank:3d}      {doc_id}: label {label}{expected} - {_short(row['analysis'], 120)}"


def _rows(run: Run, kind: str, query_id: str) -> list[dict[str, Any]]:
    table = run.artifact(kind).read()
    return list(table.filter(pc.field("query_id") == query_id).to_pylist())


def _one(run: Run, kind: str, query_id: str) -> dict[str, Any] | None:
    rows = _rows(run, kind, query_id)
    return rows[0] if rows else None


def _short(text: str | None, limit: int = _EXCERPT) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= limit else f"{flat[:limit]} …"
