"""A few samples in full beside their source documents, and rows that failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pyarrow.compute as pc

from reasonembed.report.charts import NOTHING, Html, join, number, tag
from reasonembed.report.facts import NOT_RUN, Facts, excerpt, finite
from reasonembed.schemas import Status, stable_hash

NUM_EXAMPLES, NUM_FAILURES = 6, 3


def examples(facts: Facts) -> Html:
    """Samples that are the same in every report of a run, then failed rows."""
    samples = facts.rows("samples", "query_id")
    parts: list[object] = []
    if samples is None:
        parts.append(NOT_RUN)
    elif not samples.num_rows:
        parts.append(tag("p", "No query became a sample.", class_="empty"))
    else:
        parts += _chosen_samples(facts, samples.column("query_id").to_pylist())
    failures = _failures(facts)
    if failures:
        parts += [tag("h3", "Rows that failed"), *failures]
    return join(parts)


def _chosen_samples(facts: Facts, query_ids: Iterable[str]) -> list[Html]:
    chosen = sorted(query_ids, key=lambda id_: stable_hash("report", id_))[:NUM_EXAMPLES]
    samples = {row["query_id"]: row for row in facts.some("samples", "query_id", chosen)}
    sources = facts.some("corpus", "doc_id", [row["source_doc_id"] for row in samples.values()])
    texts = {row["doc_id"]: row["text"] for row in sources}
    judged = {
        (row["query_id"], row["doc_id"]): row for row in facts.some("judgments", "query_id", chosen)
    }
    mined = {
        row["query_id"]: row["doc_ids"] for row in facts.some("candidates", "query_id", chosen)
    }
    said = "Chosen by the hash of the id, not by how well they read."
    return [
        tag("p", said, class_="muted small"),
        *(_example(samples[id_], texts, judged, mined.get(id_, [])) for id_ in chosen),
    ]


def _example(
    sample: dict[str, Any],
    texts: dict[str, str],
    judged: dict[tuple[str, str], dict[str, Any]],
    mined: Sequence[str],
) -> Html:
    positive = max(sample["positives"], key=lambda one: finite(one["label"]), default=None)
    ranks = {doc_id: rank for rank, doc_id in enumerate(mined)}
    negative = min(
        sample["negatives"], key=lambda one: ranks.get(one["doc_id"], len(ranks)), default=None
    )
    rewritten = sample["rewritten_query"].removeprefix(sample["query"])
    verdict = judged.get((sample["query_id"], positive["doc_id"])) if positive else None
    source = sample["source_doc_id"]
    return tag(
        "article",
        tag(
            "div",
            _quoted(f"Source document {source}", texts.get(source), 500),
            _quoted(f"Query {sample['query_id']}", sample["query"], 700, kind="query"),
            _passage("Best positive", positive),
            _passage("Hardest negative (ranked first)", negative),
            _quoted("Rewritten query q′ (what was added)", rewritten, 500),
            _quoted("The annotator on the positive", (verdict or {}).get("analysis"), 500),
            class_="pair",
        ),
        class_="example",
    )


def _passage(title: str, passage: dict[str, Any] | None) -> Html:
    if passage is None:
        return _quoted(title, None, 0)
    label = number(passage["label"], 2)
    return _quoted(f"{title} {passage['doc_id']}, label {label}", passage["text"], 400)


def _quoted(title: str, text: object, limit: int, *, kind: str = "") -> Html:
    quote = tag("blockquote", excerpt(text, limit) or NOTHING, class_=kind, dir="auto")
    return tag("div", tag("p", title, class_="label"), quote)


def _failures(facts: Facts) -> list[Html]:
    """One failed row of each stage in turn, until there are enough."""
    queues: list[list[tuple[str, dict[str, Any]]]] = []
    for kind, key in (("queries", "query_id"), ("judgments", "doc_id"), ("rewrites", "query_id")):
        columns = dict.fromkeys(("query_id", key, "status", "detail", "finish_reason"))
        made = facts.rows(kind, *columns)
        failed = made.filter(pc.field("status") != str(Status.OK)).to_pylist() if made else []
        ranked = sorted((stable_hash(row["query_id"], row[key]), n) for n, row in enumerate(failed))
        queues.append([(kind, failed[n]) for _, n in ranked[:NUM_FAILURES]])
    mixed = [queue[turn] for turn in range(NUM_FAILURES) for queue in queues if turn < len(queue)]
    return [_failure(facts, kind, row) for kind, row in mixed[:NUM_FAILURES]]


def _failure(facts: Facts, kind: str, row: dict[str, Any]) -> Html:
    pair = f"{row['query_id']} and {row['doc_id']}" if "doc_id" in row else row["query_id"]
    reason = f"{row['status']}: {row['detail'] or 'no reason given'}"
    ended = f" (the engine ended with {row['finish_reason']!r})" if row["finish_reason"] else ""
    parts = [tag("p", f"{kind}, {pair}", class_="label"), tag("p", reason + ended)]
    if kind == "judgments":
        found = facts.some(kind, "query_id", [row["query_id"]])
        analysis = next((r["analysis"] for r in found if r["doc_id"] == row["doc_id"]), None)
        parts.append(_quoted("What it wrote", analysis, 300))
    return tag("article", *parts, class_="example")
