"""What a person looks at after a run: one HTML file that needs nothing beside it.

Reads whatever stages have left so far; what is missing is said, and a section that cannot be drawn
costs no other. Needs pyarrow alone: no models, no cluster.
"""

from __future__ import annotations

import json
import logging
import math
import platform
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from reasonembed import __version__
from reasonembed.charts import (
    NOTHING,
    Html,
    Series,
    bar_chart,
    escape,
    join,
    line_chart,
    meter,
    number,
    smoothed,
    table,
    tag,
)
from reasonembed.config import fingerprint, flatten
from reasonembed.errors import ReasonEmbedError, StorageError
from reasonembed.progress import duration
from reasonembed.remixer.audit import Agreement, agreement
from reasonembed.run import STAGES, Run
from reasonembed.schemas import Status, stable_hash

FILE = "report.html"
NUM_EXAMPLES, NUM_FAILURES, NUM_REASONS, NUM_MOVERS = 6, 3, 5, 5
_LOG = logging.getLogger(__name__)
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_SYSTEMS = {
    "bm25": "BM25",
    "miner": "Miner",
    "before": "Backbone before training",
    "after": "After training",
}
_UNTRAINED = {"bm25": "BM25", "miner": "the miner"}
_METRICS = {
    "ndcg@10": "nDCG@10",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
    "recip_rank": "MRR",
}
_CREDIBLE_AUC = 0.6
_AUC_WORDS = (
    (0.45, "worse than guessing"),
    (0.55, "no better than guessing"),
    (_CREDIBLE_AUC, "poor"),
    (0.7, "weak"),
    (0.8, "fair"),
    (0.9, "good"),
)
_LLM_KINDS = {
    "generate": "queries",
    "annotate": "judgments",
    "audit": "audit",
    "rewrite": "rewrites",
}
_ARTIFACTS = {
    "corpus": "corpus",
    "plan": "seeds",
    "generate": "queries",
    "mine": "candidates",
    "annotate": "judgments",
    "audit": "audit",
    "rewrite": "rewrites",
    "assemble": "samples",
}
_NOT_RUN = tag("p", "Not run yet.", class_="empty")


def write_report(run: Run) -> Path:
    """Writes `report.html` into the run's directory, over an earlier one.

    Args:
        run: Finished or not.

    Raises:
        StorageError: The file cannot be written.
    """
    facts = _Facts(run)
    parts = [_guarded(build, facts) for build in (_header, _result)]
    parts.append(tag("nav", *(tag("a", s.title, href=f"#{s.anchor}") for s in _SECTIONS)))
    for section in _SECTIONS:
        heading = tag("h2", section.title, id=section.anchor)
        parts.append(tag("section", heading, _guarded(section.build, facts)))
    file = run.dir / FILE
    scratch = file.with_name(f".{FILE}")
    try:
        scratch.write_text(_page(run.dir.resolve().name, join(parts)), encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise StorageError(
            f"cannot write {file}: {error}; nothing of the run is lost, ask for the report again"
        ) from error
    return file


def _page(name: str, body: Html) -> str:
    style = (files("reasonembed") / "report_assets" / "style.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', f'ReasonEmbed run {name}')}<style>\n{style}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )


def _guarded(build: Callable[[_Facts], Html], facts: _Facts) -> Html:
    """A part of the page; a file that cannot be read takes the place of this part alone."""
    try:
        return build(facts)
    except Exception as error:  # after hours of work, one torn file must not cost the whole report
        _LOG.warning("report: %s", build.__name__, exc_info=True)
        said = f"This part cannot be drawn: {type(error).__name__}: {error}"
        return tag("p", said, class_="bad")


# ---- what the run has left ----------------------------------------------------------------------


class _Facts:
    """Everything that the sections read, each file once."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config

    @cached_property
    def timeline(self) -> list[dict[str, Any]]:
        return _json_lines(self.run.dir / "timeline.jsonl")

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The training log; a resumed run notes a step again, and the later note counts."""
        rows = _json_lines(self.run.dir / "train" / "log.jsonl")
        by_step = {row["step"]: row for row in rows if _is_finite(row.get("step"))}
        return [by_step[step] for step in sorted(by_step)]

    @cached_property
    def scorecard(self) -> dict[str, Any] | None:
        return self.run.directory("evaluate").finished()

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        return [note for note in self.timeline if note.get("stage") == stage]

    def seconds(self, stage: str) -> float:
        return math.fsum(_finite(note.get("seconds")) for note in self.attempts(stage))

    def result(self, stage: str) -> dict[str, Any]:
        """What the stage said of itself when it was last done."""
        done = [note for note in self.attempts(stage) if note.get("outcome") == "done"]
        result = done[-1].get("result") if done else None
        return result if isinstance(result, dict) else {}

    def state(self, stage: str) -> str:
        attempts = self.attempts(stage)
        if attempts:
            return "done" if attempts[-1].get("outcome") == "done" else "failed"
        begun = any(output.stage() for output in self.run.outputs(stage))
        return "begun" if begun else "not run yet"

    def rows(self, kind: str, *columns: str) -> pa.Table | None:
        """Columns of an artifact, the newest row of each key; None where nothing is committed."""
        artifact = self.run.artifact(kind)
        return artifact.read(columns=list(columns)) if artifact.commits() else None

    def some(self, kind: str, column: str, ids: Collection[str]) -> list[dict[str, Any]]:
        """Rows with one of these ids, read without loading the others' texts."""
        artifact = self.run.artifact(kind)
        paths = [f"{artifact.uri}/data/{commit.part}.parquet" for commit in artifact.commits()]
        found: dict[tuple[Any, ...], dict[str, Any]] = {}
        for path in paths if ids else []:
            for row in pq.read_table(path, filters=[(column, "in", list(ids))]).to_pylist():
                found[tuple(row[name] for name in artifact.key)] = row
        return [found[key] for key in sorted(found)]


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a log; a line that a kill has torn is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            _LOG.warning("report: %s holds a torn line", path)
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _is_finite(value: object) -> bool:
    return number(value) != NOTHING


def _finite(value: Any) -> float:
    return float(value) if _is_finite(value) else 0.0


def _excerpt(text: object, limit: int) -> str:
    """The first words of a text, about `limit` characters of them."""
    whole = str(text or "").strip()
    if len(whole) <= limit:
        return whole
    return whole[:limit].rsplit(maxsplit=1)[0] + " …"


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else NOTHING


# ---- head: what this is, and the result ---------------------------------------------------------


def _header(facts: _Facts) -> Html:
    config, run = facts.config, facts.run
    identity = flatten(config.model_dump(mode="json", exclude={"run_dir", "runtime"}))
    started = [note["started"] for note in facts.timeline if _is_finite(note.get("started"))]
    total = math.fsum(facts.seconds(stage) for stage in STAGES)
    described = {
        "Corpus": f"{config.corpus.source} (task {config.corpus.task})",
        "Language model": ", ".join(f"{model} ({what})" for model, what in _llms(facts)),
        "Miner": config.mine.encoder.model,
        "Trained": config.train.encoder.model,
        "Evaluated on": config.evaluate.collection,
        "Configuration": fingerprint(identity),
        "Started": _date(min(started)) if started else NOTHING,
        "Time in stages": f"{duration(total)}, {len(facts.timeline)} stage runs",
        "Written": f"{_date(time.time())}, reasonembed {__version__}, "
        f"Python {platform.python_version()}",
    }
    items = [part for key, text in described.items() for part in (tag("dt", key), tag("dd", text))]
    return tag(
        "header",
        tag("h1", f"ReasonEmbed run {run.dir.resolve().name}"),
        tag("dl", *items, class_="facts"),
        _stage_strip(facts),
    )


def _llms(facts: _Facts) -> list[tuple[str, str]]:
    """Each language model with what it does."""
    work: dict[str, list[str]] = {}
    for verb, stage in (("writes", "generate"), ("judges", "annotate"), ("rewrites", "rewrite")):
        work.setdefault(getattr(facts.config, stage).llm.model, []).append(verb)
    return [(model, ", ".join(verbs)) for model, verbs in work.items()]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def _stage_strip(facts: _Facts) -> Html:
    marks = {"done": "✓", "failed": "✗", "begun": "…", "not run yet": "·"}
    items = []
    for stage in STAGES:
        state = facts.state(stage)
        kind = state if state in ("done", "failed") else "pending"
        items.append(tag("li", f"{marks[state]} {stage}", class_=kind, title=f"{stage}: {state}"))
    return tag("ul", *items, class_="stages")


def _result(facts: _Facts) -> Html:
    card = facts.scorecard
    if card is None:
        states = {stage: facts.state(stage) for stage in STAGES}
        open_ = [stage for stage, state in states.items() if state != "done"]
        done = f"{len(STAGES) - len(open_)} of {len(STAGES)} stages are done"
        said = f"Not evaluated yet: {done}" + (f", {open_[0]} is next." if open_ else ".")
        return tag("p", said, class_="lead")
    scores = {name: figures["ndcg@10"] for name, figures in card["systems"].items()}
    tiles = [
        tag("div", tag("b", number(scores[key], 4)), name, class_="tile")
        for key, name in _SYSTEMS.items()
        if key in scores
    ]
    return join(
        [tag("p", _verdict(card, scores), class_="lead"), tag("div", *tiles, class_="tiles")]
    )


def _verdict(card: dict[str, Any], scores: dict[str, float]) -> Html:
    paired = card["comparison"]
    low, high = paired["low"], paired["high"]
    if low > 0:
        kind, said = "good", "Training helped:"
    elif high < 0:
        kind, said = "bad", "Training did harm:"
    else:
        kind, said = "muted", "No difference that these queries can show:"
    before, after = number(scores.get("before"), 4), number(scores.get("after"), 4)
    moved = (
        f" nDCG@10 went from {before} to {after} ({_signed(paired['mean_difference'])}, "
        f"95 % interval {_signed(low)} to {_signed(high)}; {number(card['queries'])} queries of "
        f"the collection {card['collection']})."
    )
    rivals = [f"{_UNTRAINED[key]} {number(scores[key], 4)}" for key in _UNTRAINED if key in scores]
    beside = f" Beside it: {', '.join(rivals)}." if rivals else ""
    return join([tag("strong", said, class_=kind), moved, beside])


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if _is_finite(value) else NOTHING


# ---- honest reading -----------------------------------------------------------------------------


def _honest(facts: _Facts) -> Html:
    paragraphs = [_about_models(facts), *_about_annotator(facts), *_about_rivals(facts)]
    return tag("div", *(tag("p", text) for text in paragraphs), class_="honest")


def _about_models(facts: _Facts) -> str:
    models = [model for model, _ in _llms(facts)]
    engines = {
        getattr(facts.config, stage).llm.engine for stage in ("generate", "annotate", "rewrite")
    }
    if "scripted" in engines:
        return (
            "No language model ran here: the answers come from a script. The figures show that "
            "the stages fit together and nothing else."
        )
    if any("135m" in model.lower() for model in models):
        return (
            "A language model of 135 million parameters writes and judges here. This shows that "
            "the machine works, from a corpus to a trained and measured embedder; it does not "
            "show what the method reaches. For that, put a model that can reason in its place."
        )
    return (
        f"The figures hold for these models ({', '.join(models)}) on this collection. The "
        "interval says how much depends on which queries were asked; it knows nothing of other "
        "training seeds."
    )


def _about_annotator(facts: _Facts) -> list[str]:
    if not facts.config.annotate.audit_queries:
        return [
            "The annotator was not measured (annotate.audit_queries is 0), so how far its labels "
            "can be trusted is unknown."
        ]
    judged = facts.rows("audit")
    if judged is None:
        return ["The annotator has not been measured yet (stage audit)."]
    # The label that decides what becomes a positive is the one whose quality matters.
    used = "expected_label" if facts.config.assemble.rule == "rank" else "relevance_label"
    names = {"relevance_label": "grade (1 to 5)", "expected_label": "expected grade"}
    said = []
    for column, name in names.items():
        figures = agreement(judged, facts.run.collection, column=column)
        if figures is not None:
            role = ", which makes the samples," if column == used else ""
            said.append(f"The annotator's {name}{role} is {_about_agreement(figures)}")
            if column == used and figures.auc < _CREDIBLE_AUC:
                said.append("No gain can be credited to judgements like these.")
    return said or ["The annotator cannot be measured: no query has gold and others judged."]


def _about_agreement(figures: Agreement) -> str:
    word = next((word for limit, word in _AUC_WORDS if figures.auc < limit), "very good")
    return (
        f"{word}: AUC {figures.auc:.2f}, where 0.5 is guessing; the gold document comes first in "
        f"{figures.top1:.0%} of queries, where guessing gives {figures.chance_top1:.0%} "
        f"({figures.num_pairs} pairs whose gold is known)."
    )


def _about_rivals(facts: _Facts) -> list[str]:
    systems = (facts.scorecard or {}).get("systems", {})
    if "after" not in systems:
        return []
    after = systems["after"]["ndcg@10"]
    ahead = [
        name
        for key, name in _UNTRAINED.items()
        if key in systems and systems[key]["ndcg@10"] > after
    ]
    if not ahead:
        return []
    return [f"Ranked better than the trained model, without any training: {', '.join(ahead)}."]


# ---- the funnel ---------------------------------------------------------------------------------


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


def _funnel(facts: _Facts) -> Html:
    builders: dict[str, Callable[[_Facts], _Level | None]] = {
        "documents": _documents,
        "seeds (planned queries)": _seeds,
        "queries": _queries,
        "candidates": _candidates,
        "judged pairs": _judged,
        "rewritten queries": _rewrites,
        "samples": _samples,
        "training steps": _training,
    }
    rows: list[list[object]] = []
    for name, build in builders.items():
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


def _documents(facts: _Facts) -> _Level | None:
    groups = facts.rows("corpus", "group_id")
    if groups is None:
        return None
    distinct = len(groups.column("group_id").unique())
    return _Level(f"documents, {number(distinct)} distinct texts", groups.num_rows)


def _seeds(facts: _Facts) -> _Level | None:
    seeds, groups = facts.rows("seeds", "source_doc_id"), facts.rows("corpus", "doc_id")
    if seeds is None or groups is None:
        return None
    chosen = len(seeds.column("source_doc_id").unique())
    prefix = "not a seed: "
    losses = [
        (f"document: {key.removeprefix(prefix)}", int(_finite(count)))
        for key, count in facts.result("plan").items()
        if key.startswith(prefix)
    ]
    name = f"seeds (planned queries) from {number(chosen)} documents"
    return _Level(name, seeds.num_rows, chosen / max(1, groups.num_rows), losses)


def _queries(facts: _Facts) -> _Level | None:
    seeds = facts.rows("seeds", "query_id")
    return _answers(facts, "queries", "queries", planned=seeds.num_rows if seeds else 0)


def _candidates(facts: _Facts) -> _Level | None:
    found = facts.rows("candidates", "doc_ids", "num_excluded")
    if found is None:
        return None
    pairs = pc.sum(pc.list_value_length(found.column("doc_ids"))).as_py() or 0
    excluded = pc.sum(found.column("num_excluded")).as_py() or 0
    name = f"candidates of {number(found.num_rows)} queries"
    return _Level(
        name, pairs, None, [("source or its duplicate, shut out before the cut", excluded)]
    )


def _judged(facts: _Facts) -> _Level | None:
    found = facts.rows("candidates", "doc_ids")
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


def _rewrites(facts: _Facts) -> _Level | None:
    queries = facts.rows("queries", "status")
    usable = pc.sum(pc.equal(queries.column("status"), str(Status.OK))).as_py() if queries else 0
    return _answers(facts, "rewrites", "rewritten queries", planned=usable or 0)


def _answers(facts: _Facts, kind: str, name: str, *, planned: int) -> _Level | None:
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
    return _excerpt(_NUMBER.sub(lambda _: next(ranges), details[0]), 200)


def _samples(facts: _Facts) -> _Level | None:
    made, queries = facts.rows("samples", "query_id"), facts.rows("queries", "query_id")
    if made is None:
        return None
    losses = [
        (f"queries: {why}", int(_finite(count)))
        for why, count in facts.result("assemble").items()
        if why != "sample"
    ]
    total = queries.num_rows if queries else made.num_rows
    return _Level("samples", made.num_rows, made.num_rows / max(1, total), losses)


def _training(facts: _Facts) -> _Level | None:
    if not facts.steps:
        return None
    size = facts.config.train.batch_queries
    return _Level(f"training steps of {size} queries", len(facts.steps))


# ---- examples -----------------------------------------------------------------------------------


def _examples(facts: _Facts) -> Html:
    samples = facts.rows("samples", "query_id")
    parts: list[object] = []
    if samples is None:
        parts.append(_NOT_RUN)
    elif not samples.num_rows:
        parts.append(tag("p", "No query became a sample.", class_="empty"))
    else:
        parts += _chosen_samples(facts, samples.column("query_id").to_pylist())
    failures = _failures(facts)
    if failures:
        parts += [tag("h3", "Rows that failed"), *failures]
    return join(parts)


def _chosen_samples(facts: _Facts, query_ids: Iterable[str]) -> list[Html]:
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
    positive = max(sample["positives"], key=lambda one: _finite(one["label"]), default=None)
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
            _passage("Hardest negative (the miner's first)", negative),
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
    quote = tag("blockquote", _excerpt(text, limit) or NOTHING, class_=kind, dir="auto")
    return tag("div", tag("p", title, class_="label"), quote)


def _failures(facts: _Facts) -> list[Html]:
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


def _failure(facts: _Facts, kind: str, row: dict[str, Any]) -> Html:
    pair = f"{row['query_id']} and {row['doc_id']}" if "doc_id" in row else row["query_id"]
    reason = f"{row['status']}: {row['detail'] or 'no reason given'}"
    ended = f" (the engine ended with {row['finish_reason']!r})" if row["finish_reason"] else ""
    parts = [tag("p", f"{kind}, {pair}", class_="label"), tag("p", reason + ended)]
    if kind == "judgments":
        found = facts.some(kind, "query_id", [row["query_id"]])
        analysis = next((r["analysis"] for r in found if r["doc_id"] == row["doc_id"]), None)
        parts.append(_quoted("What it wrote", analysis, 300))
    return tag("article", *parts, class_="example")


# ---- distributions ------------------------------------------------------------------------------


def _distributions(facts: _Facts) -> Html:
    parts: list[object] = []
    judged = facts.rows("judgments", "relevance_label", "expected_label")
    if judged is not None:
        grades = Counter(judged.column("relevance_label").to_pylist())
        bars = [(str(grade), float(grades[grade])) for grade in range(1, 6)]
        bars.append(("none", float(grades[None])))
        parts.append(bar_chart("Relevance label of judged pairs", bars, x_label="label"))
        if expected := judged.column("expected_label").drop_null().to_pylist():
            title = "Expected label of judged pairs"
            parts.append(bar_chart(title, _quarters(expected), x_label="label"))
    lengths = _lengths(facts)
    parts += lengths[:1]
    if facts.steps:
        parts += _intensity_charts(facts)
    if not parts:
        return _NOT_RUN
    return join([tag("div", *parts, class_="charts"), *lengths[1:]])


def _quarters(labels: Iterable[float]) -> list[tuple[str, float]]:
    """Counts from 1 to 5 in steps of a quarter, each bar named by its lower end where whole."""
    counts = Counter(min(15, max(0, int((label - 1) * 4))) for label in labels if _is_finite(label))
    return [(f"{1 + i // 4}" if i % 4 == 0 else "", float(counts[i])) for i in range(16)]


def _lengths(facts: _Facts) -> list[Html]:
    """A histogram of words a query, and a table of asked against written."""
    seeds = facts.rows("seeds", "query_id", "min_words", "max_words")
    queries = facts.rows("queries", "query_id", "query")
    if seeds is None or queries is None:
        return []
    asked = {row["query_id"]: (row["min_words"], row["max_words"]) for row in seeds.to_pylist()}
    written: dict[tuple[int, int], list[int]] = {}
    for row in queries.to_pylist():
        if row["query"] is not None and row["query_id"] in asked:
            written.setdefault(asked[row["query_id"]], []).append(len(row["query"].split()))
    if not written:
        return []
    every = [words for counts in written.values() for words in counts]
    return [
        bar_chart("Query length", _histogram(every), x_label="words, from"),
        tag("h3", "Query length against the range that was asked for"),
        table(
            ["words asked", "queries", "shorter, within, longer", "within", "median", "longest"],
            [
                _length_row(low, high, sorted(counts))
                for (low, high), counts in sorted(written.items())
            ],
            align="lrlrrr",
        ),
    ]


def _histogram(values: Sequence[int]) -> list[tuple[str, float]]:
    width = max(1, -(-(max(values) + 1) // 10))
    counts = Counter(value // width for value in values)
    return [(str(i * width), float(counts[i])) for i in range(max(values) // width + 1)]


def _length_row(low: int, high: int, counts: Sequence[int]) -> list[object]:
    shorter = sum(words < low for words in counts) / len(counts)
    longer = sum(words > high for words in counts) / len(counts)
    within = 1 - shorter - longer
    label = f"{shorter:.0%} shorter, {within:.0%} within, {longer:.0%} longer"
    return [
        f"{low}–{high}",
        number(len(counts)),
        meter(shorter, within, longer, label=label, order=(2, 1, 3)),
        f"{within:.0%}",
        number(counts[len(counts) // 2]),
        number(counts[-1]),
    ]


def _intensity_charts(facts: _Facts) -> list[Html]:
    cap = facts.config.train.intensity_cap
    lines = [Series(name, _points(facts, f"intensity_{name}")) for name in ("median", "max", "min")]
    capped = [Series("share", _points(facts, "intensity_capped_share"))]
    return [
        line_chart("Reasoning intensity of a step", lines, x_label="step"),
        line_chart(f"Share of queries at the cap κ = {cap:g}", capped, x_label="step"),
    ]


def _points(facts: _Facts, metric: str) -> list[tuple[float, float]]:
    return [
        (float(row["step"]), float(row[metric]))
        for row in facts.steps
        if _is_finite(row.get(metric))
    ]


# ---- training -----------------------------------------------------------------------------------


def _trained(facts: _Facts) -> Html:
    if not facts.steps:
        return _NOT_RUN
    loss, rank = _points(facts, "loss"), _points(facts, "positive_rank")
    charts = [
        line_chart(
            "Loss",
            [Series("each step", loss, "dots"), Series("smoothed", smoothed(loss))],
            x_label="step",
        ),
        line_chart(
            "Mean loss of the query and of its rewriting q′",
            [
                Series("query", smoothed(_points(facts, "query_loss"))),
                Series("q′", smoothed(_points(facts, "rewritten_loss"))),
            ],
            x_label="step",
        ),
        line_chart(
            "Mean rank of the positive",
            [Series("each step", rank, "dots"), Series("smoothed", smoothed(rank))],
            x_label="step",
        ),
    ]
    charts += [
        line_chart(title, [Series(title, _points(facts, metric))], x_label="step")
        for title, metric in (
            ("Learning rate", "learning_rate"),
            ("Gradient norm before clipping", "grad_norm"),
            ("Tokens a second, first worker", "tokens_per_s"),
        )
    ]
    start = facts.config.train.intensity_start_step
    said = f"{len(facts.steps)} steps; weighted by reasoning intensity from step {start} on."
    return join([tag("p", said), tag("div", *charts, class_="charts")])


# ---- evaluation ---------------------------------------------------------------------------------


def _evaluated(facts: _Facts) -> Html:
    card = facts.scorecard
    if card is None:
        return _NOT_RUN
    systems = {key: card["systems"][key] for key in _SYSTEMS if key in card["systems"]}
    best = {metric: max(figures[metric] for figures in systems.values()) for metric in _METRICS}
    rows = [
        [
            _SYSTEMS[key],
            *(_score(figures[metric], best[metric]) for metric in _METRICS),
            meter(figures["ndcg@10"], label=f"nDCG@10 {number(figures['ndcg@10'], 4)}"),
        ]
        for key, figures in systems.items()
    ]
    return join(
        [
            table(["", *_METRICS.values(), "nDCG@10, of 1"], rows, align="lrrrrl"),
            tag("p", _paired(card, "comparison", "nDCG@10")),
            tag("p", _paired(card, "deep_comparison", "recall@100")),
            *_movers(facts, card),
        ]
    )


def _score(value: float, best: float) -> object:
    shown = number(value, 4)
    return tag("strong", shown) if value == best else shown


def _paired(card: dict[str, Any], which: str, metric: str) -> str:
    paired = card[which]
    return (
        f"After minus before in {metric}, paired over {number(card['queries'])} queries: "
        f"{_signed(paired['mean_difference'])}, 95 % interval {_signed(paired['low'])} to "
        f"{_signed(paired['high'])} (bootstrap over queries), p = {number(paired['p_value'], 4)} "
        f"(two-sided randomisation test). Better in {paired['wins']} queries, equal in "
        f"{paired['ties']}, worse in {paired['losses']}."
    )


def _movers(facts: _Facts, card: dict[str, Any]) -> list[Html]:
    """The queries that gained and lost most."""
    before, after = (card["per_query"].get(name, {}) for name in ("before", "after"))
    change = {id_: after[id_] - before[id_] for id_ in sorted(after.keys() & before.keys())}
    ranked = sorted(change, key=lambda id_: -change[id_])
    texts, gold, problem = _collection(facts)
    parts = [tag("p", problem, class_="muted small")] if problem else []
    for title, ids in (
        ("Gained most", [id_ for id_ in ranked[:NUM_MOVERS] if change[id_] > 0]),
        ("Lost most", [id_ for id_ in ranked[::-1][:NUM_MOVERS] if change[id_] < 0]),
    ):
        rows = [
            [
                join([_excerpt(texts.get(id_), 260), " ", tag("code", id_)]),
                f"{number(before[id_], 3)} → {number(after[id_], 3)}",
                ", ".join(sorted(gold.get(id_, ()))),
            ]
            for id_ in ids
        ]
        content = table(["query", "nDCG@10", "gold"], rows, align="lrl") if rows else None
        parts += [tag("h3", title), content or tag("p", "None.", class_="empty")]
    return parts


def _collection(facts: _Facts) -> tuple[Any, Any, str]:
    """Texts and gold of the evaluation; the scorecard alone where the collection is gone."""
    try:
        return facts.run.collection.queries, facts.run.collection.qrels, ""
    except ReasonEmbedError as error:
        return {}, {}, f"Texts are missing, the collection cannot be read: {error}"


# ---- time and tokens ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cost:
    stage: str
    attempts: int
    seconds: float
    rows: int | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: float | None = None


def _costs(facts: _Facts) -> Html:
    costs = [_cost(facts, stage) for stage in STAGES]
    longest = max(cost.seconds for cost in costs) or 1.0
    total = math.fsum(cost.seconds for cost in costs)
    rows = [_cost_row(cost, longest, total) for cost in costs]
    rows.append([tag("strong", "all"), "", tag("strong", duration(total)), *[""] * 5])
    head = ["stage", "runs", "time", "", "rows", "tokens read", "tokens written", "tokens/s"]
    said = (
        "Every run of a stage counts, failed and resumed ones included, and so do start-up and "
        "loading. Tokens are read plus written by language models, and those trained on; rows "
        "that were computed again count each time."
    )
    return join([table(head, rows, align="lrrlrrrr"), tag("p", said, class_="muted small")])


def _cost_row(cost: _Cost, longest: float, total: float) -> list[object]:
    if not cost.attempts and cost.rows is None:
        return [cost.stage, NOTHING, tag("span", "not run yet", class_="empty"), *[""] * 5]
    rate = cost.tokens / cost.seconds if cost.tokens and cost.seconds else None
    return [
        cost.stage,
        number(cost.attempts),
        duration(cost.seconds) if cost.seconds >= 1 else f"{cost.seconds:.2f} s",
        meter(cost.seconds / longest, label=f"{_percent(cost.seconds, total)} of the time"),
        number(cost.rows),
        number(cost.prompt_tokens),
        number(cost.completion_tokens),
        number(rate),
    ]


def _cost(facts: _Facts, stage: str) -> _Cost:
    attempts, seconds = len(facts.attempts(stage)), facts.seconds(stage)
    if stage in _LLM_KINDS:
        return _llm_cost(facts, stage, attempts, seconds)
    rows: int | None = None
    tokens: float | None = None
    if stage in _ARTIFACTS:
        made = facts.run.artifact(_ARTIFACTS[stage])
        rows = made.read(columns=list(made.key)).num_rows if made.commits() else None
    elif stage == "embed":
        rows = int(sum(map(_finite, facts.result("embed").values()))) or None
    elif stage == "train" and facts.steps:
        rows = len(facts.steps)
        tokens = math.fsum(
            _finite(row.get("tokens_per_s")) * _finite(row.get("step_s")) for row in facts.steps
        )
    elif stage == "evaluate" and facts.scorecard:
        rows = facts.scorecard["queries"]
    return _Cost(stage, attempts, seconds, rows, tokens=tokens)


def _llm_cost(facts: _Facts, stage: str, attempts: int, seconds: float) -> _Cost:
    artifact = facts.run.artifact(_LLM_KINDS[stage])
    commits = artifact.commits()
    if not commits:
        return _Cost(stage, attempts, seconds, None)
    columns = ["prompt_tokens", "completion_tokens"]
    read, written = 0, 0
    for commit in commits:  # not only the newest rows: those that were replaced cost time as well
        part = pq.read_table(f"{artifact.uri}/data/{commit.part}.parquet", columns=columns)
        read += pc.sum(part.column("prompt_tokens")).as_py() or 0
        written += pc.sum(part.column("completion_tokens")).as_py() or 0
    rows = artifact.read(columns=list(artifact.key)).num_rows
    return _Cost(stage, attempts, seconds, rows, read, written, read + written)


# ---- how it was made ----------------------------------------------------------------------------


def _origin(facts: _Facts) -> Html:
    outputs = [output for stage in STAGES for output in _outputs(facts, stage)]
    made = {name: stage for name, stage in outputs if stage}
    rows = [
        [
            name,
            join([*(_input(key, value, made) for key, value in _inputs(stage.identity))], ", "),
            tag("code", stage.fingerprint),
            stage.version or NOTHING,
        ]
        for name, stage in made.items()
    ]
    settings = facts.config.model_dump(mode="json")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    text = re.sub(r"//[^/@\s]+@", "//…@", text)  # a password in a server's address stays here
    arrows = (
        "corpus → seeds → queries → candidates → judgments → samples → train → export → evaluate; "
        "queries → rewrites → samples"
    )
    head = ["made", "from", "fingerprint", "version"]
    return join(
        [
            tag("p", arrows),
            table(head, rows, align="llll") if rows else _NOT_RUN,
            tag("details", tag("summary", "The whole configuration"), tag("pre", text)),
        ]
    )


def _outputs(facts: _Facts, stage: str) -> list[tuple[str, Any]]:
    outputs = facts.run.outputs(stage)
    names = {"judgments": _ARTIFACTS.get(stage, "judgments")}  # audit has the schema of judgments
    return [(names.get(output.name, output.name), output.stage()) for output in outputs]


def _inputs(identity: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key.removeprefix("input."), value)
        for key, value in sorted(identity.items())
        if key.startswith("input.") and not key.endswith(".content")
    ]


def _input(name: str, fingerprint_then: object, made: dict[str, Any]) -> Html:
    """An input, and whether it is still the one that was used."""
    same = name in made and made[name].fingerprint == fingerprint_then
    return escape(name) if same else join([name, tag("span", " (another one now)", class_="bad")])


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    build: Callable[[_Facts], Html]


_SECTIONS = (
    _Section("reading", "How to read this", _honest),
    _Section("funnel", "From documents to steps", _funnel),
    _Section("examples", "Examples", _examples),
    _Section("distributions", "Distributions", _distributions),
    _Section("training", "Training", _trained),
    _Section("evaluation", "Evaluation", _evaluated),
    _Section("costs", "Time and tokens", _costs),
    _Section("origin", "How it was made", _origin),
)
