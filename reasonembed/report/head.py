"""The top of the page: what this run is, how far it came, and the result in one sentence."""

from __future__ import annotations

import math
import platform
import time
from typing import Any

from reasonembed import __version__
from reasonembed.config import fingerprint, flatten
from reasonembed.progress import duration
from reasonembed.report.charts import NOTHING, Html, join, number, tag
from reasonembed.report.facts import SYSTEMS, UNTRAINED, Facts, is_finite, signed


def header(facts: Facts) -> Html:
    """The name of the run, what it is made of, and a mark for each stage."""
    config, run = facts.config, facts.run
    identity = flatten(config.model_dump(mode="json", exclude={"run_dir", "runtime"}))
    started = [note["started"] for note in facts.timeline if is_finite(note.get("started"))]
    total = math.fsum(facts.seconds(stage) for stage in facts.run.stages)
    described = {
        "Corpus": f"{config.corpus.source} (task {config.corpus.task})",
        "Language model": ", ".join(f"{model} ({what})" for model, what in facts.llms()),
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
        tag("h1", f"ReasonEmbed run {run.name}"),
        tag("dl", *items, class_="facts"),
        _stage_strip(facts),
    )


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds))


def _stage_strip(facts: Facts) -> Html:
    marks = {"done": "✓", "failed": "✗", "begun": "…", "not run yet": "·"}
    items = []
    for stage in facts.run.stages:
        state = facts.state(stage)
        kind = state if state in ("done", "failed") else "pending"
        items.append(tag("li", f"{marks[state]} {stage}", class_=kind, title=f"{stage}: {state}"))
    return tag("ul", *items, class_="stages")


def result(facts: Facts) -> Html:
    """The verdict and a tile for each system; before evaluation, how far the run is."""
    card = facts.scorecard
    if card is None:
        states = {stage: facts.state(stage) for stage in facts.run.stages}
        open_ = [stage for stage, state in states.items() if state != "done"]
        done = f"{len(states) - len(open_)} of {len(states)} stages are done"
        said = f"Not evaluated yet: {done}" + (f", {open_[0]} is next." if open_ else ".")
        return tag("p", said, class_="lead")
    scores = {name: figures["ndcg@10"] for name, figures in card["systems"].items()}
    tiles = [
        tag("div", tag("b", number(scores[key], 4)), name, class_="tile")
        for key, name in SYSTEMS.items()
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
        f" nDCG@10 went from {before} to {after} ({signed(paired['mean_difference'])}, "
        f"95 % interval {signed(low)} to {signed(high)}; {number(card['queries'])} queries of "
        f"the collection {card['collection']})."
    )
    rivals = [f"{UNTRAINED[key]} {number(scores[key], 4)}" for key in UNTRAINED if key in scores]
    beside = f" Beside it: {', '.join(rivals)}." if rivals else ""
    return join([tag("strong", said, class_=kind), moved, beside])
