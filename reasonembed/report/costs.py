"""Time and tokens of every stage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyarrow.compute as pc

from reasonembed.planner.actual import compare, read_plan
from reasonembed.progress import duration
from reasonembed.report.charts import NOTHING, Html, join, meter, number, table, tag
from reasonembed.report.facts import Facts, finite

_LLM_STAGES = ("filter", "generate", "annotate", "audit", "rewrite")
_ARTIFACTS = {
    "corpus": "corpus",
    "filter": "domains",
    "plan": "seeds",
    "generate": "queries",
    "mine": "candidates",
    "annotate": "judgments",
    "audit": "audit",
    "rewrite": "rewrites",
    "assemble": "samples",
}


@dataclass(frozen=True)
class _Cost:
    stage: str
    attempts: int
    seconds: float
    rows: int | None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    tokens: float | None = None


def costs(facts: Facts) -> Html:
    """A row for each stage, and the time of all."""
    every = [_cost(facts, stage) for stage in facts.run.stages]
    longest = max(cost.seconds for cost in every) or 1.0
    total = math.fsum(cost.seconds for cost in every)
    rows = [_cost_row(cost, longest, total) for cost in every]
    rows.append([tag("strong", "all"), "", tag("strong", duration(total)), *[""] * 5])
    head = ["stage", "runs", "time", "", "rows", "tokens read", "tokens written", "tokens/s"]
    said = (
        "Every run of a stage counts, failed and resumed ones included, and so do start-up and "
        "loading. Tokens are read plus written by language models, and those trained on; rows "
        "that were computed again count each time."
    )
    own = [table(head, rows, align="lrrlrrrr"), tag("p", said, class_="muted small")]
    return join([*own, *_planned(facts)])


def _planned(facts: Facts) -> list[Html]:
    """Planned against actual; nothing where there is no plan."""
    plan = read_plan(facts.run)
    rows = compare(facts.run, plan, timeline=facts.timeline) if plan else []
    if not rows or plan is None:
        return []
    head = ["stage", "planned", "actual", "ratio", "tokens planned", "tokens"]
    is_paid = any(row.planned_cost for row in rows)
    money = [f"planned {plan.currency}", plan.currency] if is_paid else []
    cells = [
        [
            row.stage,
            duration(row.planned_s),
            duration(row.actual_s),
            number(row.ratio, 2),
            number(row.planned_tokens or None),
            number(row.actual_tokens or None),
            *([number(row.planned_cost, 2), number(row.actual_cost, 2)] if is_paid else []),
        ]
        for row in rows
    ]
    said = f"Planned before the first stage, for {plan.shape}; a stage that ran again counts twice."
    return [
        tag("h3", "Planned and actual"),
        table([*head, *money], cells, align="lrrrrr" + "r" * len(money)),
        tag("p", said, class_="muted small"),
    ]


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


def _percent(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole else NOTHING


def _cost(facts: Facts, stage: str) -> _Cost:
    attempts, seconds = len(facts.attempts(stage)), facts.seconds(stage)
    if stage in _LLM_STAGES:
        return _llm_cost(facts, stage, attempts, seconds)
    rows: int | None = None
    tokens: float | None = None
    if stage in _ARTIFACTS:
        made = facts.run.artifact(_ARTIFACTS[stage])
        rows = made.read(columns=list(made.key)).num_rows if made.commits() else None
    elif stage == "embed":
        rows = int(sum(map(finite, facts.result("embed").values()))) or None
    elif stage == "train" and facts.steps:
        rows = len(facts.steps)
        tokens = math.fsum(
            finite(row.get("tokens_per_s")) * finite(row.get("step_s")) for row in facts.steps
        )
    elif stage == "evaluate" and facts.scorecard:
        rows = facts.scorecard["queries"]
    return _Cost(stage, attempts, seconds, rows, tokens=tokens)


def _llm_cost(facts: Facts, stage: str, attempts: int, seconds: float) -> _Cost:
    artifact = facts.run.artifact(_ARTIFACTS[stage])
    if not artifact.commits():
        return _Cost(stage, attempts, seconds, None)
    # With the rows that were replaced: they cost time as well.
    computed = artifact.history(columns=["prompt_tokens", "completion_tokens"])
    read, written = (pc.sum(column).as_py() or 0 for column in computed.columns)
    rows = artifact.read(columns=list(artifact.key)).num_rows
    return _Cost(stage, attempts, seconds, rows, read, written, read + written)
