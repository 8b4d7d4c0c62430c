"""From documents to training steps: what each stage kept, what it lost, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.remixer.assemble import FATES, HELD_OUT
from reasonembed.remixer.mine import keeping_to_source
from reasonembed.report.charts import NOTHING, Html, meter, number, table, tag
from reasonembed.report.facts import Facts, excerpt, finite
from reasonembed.schemas import Status

NUM_REASONS = 5
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True)
class _Level:
    """A level of the funnel.

    Attributes:
        name: What is counted.
        kept: How many there are.
        share: Of what came in; None where the unit changes.
        losses: What was lost on the way here, and why.
    """

    name: str
    kept: int
    share: float | None = None
    losses: Sequence[tuple[str, int]] = ()


def funnel(facts: Facts) -> Html:
    """A row for each level, documents first."""
    rows: list[list[object]] = []
    for stage, (name, build) in _LEVELS.items():
        if stage not in facts.run.stages:
            continue
        level = build(facts)
        if level is None:
            rows.append([name, NOTHING, "", tag("span", "not run yet", class_="empty")])
            continue
        bar: object = ""
        if level.share is not None:
            bar = meter(level.share, label=f"{level.share:.0%} of what came in")
        losses: object = tag(
            "ul", *(tag("li", f"{number(n)} × {why}") for why, n in level.losses if n)
        )
        rows.append([level.name, number(level.kept), bar, losses])
    head = ["", "count", "kept of what came in", "what was lost, and why"]
    return table(head, rows, align="lrll")


def _documents(facts: Facts) -> _Level | None:
    groups = facts.rows("corpus", "group_id")
    if groups is None:
        return None
    distinct = len(groups.column("group_id").unique())
    return _Level(f"documents, {number(distinct)} distinct texts", groups.num_rows)


def _domains(facts: Facts) -> _Level | None:
    config, asked = facts.config.filter, facts.rows("domains", "status", "detail", "probability")
    if config is None or asked is None:
        return None
    kept = pc.sum(pc.greater_equal(asked.column("probability"), config.min_probability)).as_py()
    answered = pc.sum(pc.equal(asked.column("status"), str(Status.OK))).as_py() or 0
    losses = [("document: another domain", answered - (kept or 0)), *_reasons(asked)]
    return _Level("documents of the domain", kept or 0, (kept or 0) / asked.num_rows, losses)


def _seeds(facts: Facts) -> _Level | None:
    seeds, groups = facts.rows("seeds", "source_doc_id"), facts.rows("corpus", "doc_id")
    if seeds is None or groups is None:
        return None
    chosen = len(seeds.column("source_doc_id").unique())
    prefix = "not a seed: "
    losses = [
        (f"document: {key.removeprefix(prefix)}", int(finite(count)))
        for key, count in facts.result("plan").items()
        if key.startswith(prefix)
    ]
    name = f"seeds (planned queries) from {number(chosen)} documents"
    return _Level(name, seeds.num_rows, chosen / max(1, groups.num_rows), losses)


def _queries(facts: Facts) -> _Level | None:
    seeds = facts.rows("seeds", "query_id")
    return _answers(facts, "queries", "queries", planned=seeds.num_rows if seeds else 0)


def _candidates(facts: Facts) -> _Level | None:
    found = facts.rows("candidates", "doc_ids", "num_excluded")
    if found is None:
        return None
    pairs = pc.sum(pc.list_value_length(found.column("doc_ids"))).as_py() or 0
    excluded = pc.sum(found.column("num_excluded")).as_py() or 0
    name = f"candidates of {number(found.num_rows)} queries"
    return _Level(
        name, pairs, None, [("source or its duplicate, shut out before the cut", excluded)]
    )


def _mined(facts: Facts) -> pa.Table | None:
    """Queries that were mined for and are used further."""
    found = facts.rows("candidates", "doc_ids", "source_rank")
    bound = facts.config.mine.max_source_rank
    return None if found is None else keeping_to_source(found, max_source_rank=bound)


def _judged(facts: Facts) -> _Level | None:
    found = _mined(facts)
    lengths = pc.list_value_length(found.column("doc_ids")).to_pylist() if found else []
    limit = facts.config.annotate.candidates_per_query
    level = _answers(
        facts, "judgments", "judged pairs", planned=sum(min(n, limit) for n in lengths)
    )
    if level is None:
        return None
    beyond = (
        f"candidates beyond the first {limit} of a query",
        sum(max(0, n - limit) for n in lengths),
    )
    return _Level(level.name, level.kept, level.share, [beyond, *level.losses])


def _rewrites(facts: Facts) -> _Level | None:
    queries, mined = facts.rows("queries", "status"), _mined(facts)
    usable = pc.sum(pc.equal(queries.column("status"), str(Status.OK))).as_py() if queries else 0
    # Near-duplicates among the usable queries are neither mined nor rewritten.
    planned = mined.num_rows if mined else usable or 0
    return _answers(facts, "rewrites", "rewritten queries", planned=planned)


def _answers(facts: Facts, kind: str, name: str, *, planned: int) -> _Level | None:
    """A level that a language model has made: one row in, one row out, failed rows included."""
    made = facts.rows(kind, "status", "detail")
    if made is None:
        return None
    kept = sum(status == Status.OK for status in made.column("status").to_pylist())
    losses = [*_reasons(made), ("not asked yet", max(0, planned - made.num_rows))]
    return _Level(name, kept, kept / max(1, planned, made.num_rows), losses)


def _reasons(rows: pa.Table) -> list[tuple[str, int]]:
    """Fates other than plain success, the most frequent first; what follows is summed up."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    pairs = zip(rows.column("status").to_pylist(), rows.column("detail").to_pylist(), strict=True)
    for (status, detail), count in Counter(pairs).items():
        if status != Status.OK or detail:
            key = (status, _NUMBER.sub("0", detail or "no reason given"))
            groups.setdefault(key, Counter())[detail or "no reason given"] += count
    ranked = sorted(groups.items(), key=lambda group: (-group[1].total(), group[0]))
    shown = [
        (f"{'kept although' if status == Status.OK else status + ':'} {_merged(list(details))}", n)
        for (status, _), details in ranked[:NUM_REASONS]
        for n in [details.total()]
    ]
    rest = sum(details.total() for _, details in ranked[NUM_REASONS:])
    return [*shown, ("other reasons", rest)]


def _merged(details: Sequence[str]) -> str:
    """One sentence for details that differ in their numbers alone; these become ranges."""
    columns = zip(*(_NUMBER.findall(detail) for detail in details), strict=True)
    spans = []
    for values in columns:
        low, high = min(values, key=float), max(values, key=float)
        spans.append(low if low == high else f"{low}–{high}")
    ranges = iter(spans)
    return excerpt(_NUMBER.sub(lambda _: next(ranges), details[0]), 200)


def _samples(facts: Facts) -> _Level | None:
    made, queries = facts.rows("samples", "split"), facts.rows("queries", "query_id")
    if made is None:
        return None
    result = facts.result("assemble")
    losses = [(f"queries: {why}", int(finite(result.get(why)))) for why in FATES[:-1]]
    total = queries.num_rows if queries else made.num_rows
    held_out = pc.sum(pc.equal(made.column("split"), HELD_OUT)).as_py() or 0
    name = f"samples, {number(held_out)} of them held out" if held_out else "samples"
    return _Level(name, made.num_rows, made.num_rows / max(1, total), losses)


def _training(facts: Facts) -> _Level | None:
    if not facts.steps:
        return None
    size = facts.config.train.batch_queries
    return _Level(f"training steps of {size} queries", len(facts.steps))


_LEVELS: dict[str, tuple[str, Callable[[Facts], _Level | None]]] = {
    "corpus": ("documents", _documents),
    "filter": ("documents of the domain", _domains),
    "plan": ("seeds (planned queries)", _seeds),
    "generate": ("queries", _queries),
    "mine": ("candidates", _candidates),
    "annotate": ("judged pairs", _judged),
    "rewrite": ("rewritten queries", _rewrites),
    "assemble": ("samples", _samples),
    "train": ("training steps", _training),
}
"""By the stage that makes it."""
