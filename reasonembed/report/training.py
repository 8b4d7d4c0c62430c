"""Training, step by step: is it learning, on what, and how fast."""

from __future__ import annotations

from collections.abc import Sequence

from reasonembed.redapter.log import HELD_OUT_SCORE, START_SCORE
from reasonembed.report.charts import Html, Point, Series, join, line_chart, number, smoothed, tag
from reasonembed.report.facts import NOT_RUN, Facts, is_finite
from reasonembed.report.intensity import by_sample


def trained(facts: Facts) -> Html:
    """The curves of the training log, and the intensity of the samples."""
    if not facts.steps:
        return NOT_RUN
    charts = [*_learning(facts), *_held_out(facts), *_weights(facts), *_optimiser(facts)]
    parts = [tag("p", _said(facts)), tag("div", *charts, *_speed(facts), class_="charts")]
    return join([*parts, by_sample(facts)])


def _said(facts: Facts) -> str:
    config, steps = facts.config.train, facts.steps
    start = number(config.intensity_start_step)
    how = "weighted" if config.intensity_start_step < len(steps) else "to be weighted"
    said = [f"{number(len(steps))} steps, {how} by reasoning intensity from step {start} on."]
    skipped = sum(is_finite(row.get("is_skipped")) and row["is_skipped"] > 0 for row in steps)
    if skipped:
        plural = "" if skipped == 1 else "s"
        said.append(
            f"Left out, because loss or gradient was not finite, and skipped: {number(skipped)} "
            f"step{plural}."
        )
    return " ".join(said)


def _learning(facts: Facts) -> list[Html]:
    loss, rank = facts.points("loss"), facts.points("positive_rank")
    query, rewritten = facts.points("query_loss"), facts.points("rewritten_loss")
    return [
        line_chart(
            "Loss",
            _dots(loss),
            x_label="step",
            note=f"What is minimised, the weighted mean over the batch; {_course(loss)}.",
        ),
        line_chart(
            "Loss l of the query and l′ of its rewriting q′",
            [Series("l, query", smoothed(query)), Series("l′, q′", smoothed(rewritten))],
            x_label="step",
            note="Where l′ lies below l, reasoning makes the positive easier to find, and there is "
            "something to learn from it.",
        ),
        line_chart(
            "Mean rank of the positive in the batch",
            _dots(rank),
            x_label="step",
            note=f"1 is best: no negative scores higher; {_course(rank)}.",
        ),
    ]


def _held_out(facts: Facts) -> list[Html]:
    score = _after(facts, HELD_OUT_SCORE)
    if not score:
        return []
    score = [*((0.0, start) for _, start in facts.points(START_SCORE)), *score]
    lines = [Series("nDCG@10", score)]
    kept = facts.result("train").get("step kept")
    if found := [point for point in score if point[0] == kept]:
        lines.append(Series("exported", found, "dots"))
    best = max(score, key=lambda point: point[1])
    loss = _after(facts, "held_out_loss")
    return [
        line_chart(
            "Held-out nDCG@10",
            lines,
            x_label="steps taken",
            note=f"On samples that are never trained on; highest, {best[1]:.4f}, after "
            f"{number(best[0])} steps" + (f"; exported: step {number(kept)}." if found else "."),
        ),
        line_chart(
            "Held-out loss",
            [Series("held out", loss)],
            x_label="steps taken",
            note="Where it rises while the loss falls, the model learns its samples by heart.",
        ),
    ]


def _weights(facts: Facts) -> list[Html]:
    config = facts.config.train
    lines = [Series(name, facts.points(f"intensity_{name}")) for name in ("median", "max", "min")]
    cap = facts.points("intensity_cap") or _level(facts, config.intensity_cap)
    share, worth = facts.points("intensity_capped_share"), facts.points("effective_batch_size")
    has_one_shape = config.task_batches in ("paper", {})
    marks = _level(facts, config.batch_queries) if has_one_shape else []
    return [
        line_chart(
            "Reasoning intensity of a step's queries",
            [*lines, Series("cap κ", cap, "mark")],
            x_label="step",
            note="l divided by l′: 1 means that reasoning changes nothing, more means that the "
            "query needs it and weighs more.",
        ),
        line_chart(
            "Share of queries at the cap",
            [Series("share", share)],
            x_label="step",
            note="Queries at the cap κ weigh the same however much reasoning they need; where most "
            "are, the weights tell little.",
        ),
        line_chart(
            "Effective batch size 1/Σw²",
            [Series("worth", worth), Series("queries in a batch", marks, "mark")],
            x_label="step",
            note="How many equally weighted queries a batch is worth; far below its size, few "
            "queries decide.",
        ),
    ]


def _optimiser(facts: Facts) -> list[Html]:
    norm = facts.points("grad_norm")
    clipped = sum(value > facts.config.train.max_grad_norm for _, value in norm)
    return [
        line_chart(
            "Gradient norm before clipping",
            [
                Series("norm", norm),
                Series("clipped above", _level(facts, facts.config.train.max_grad_norm), "mark"),
            ],
            x_label="step",
            note=f"{number(clipped)} of {number(len(norm))} steps were clipped.",
        ),
        line_chart(
            "Learning rate",
            [Series("rate", facts.points("learning_rate"))],
            x_label="step",
            note="Planned: it rises, then falls to nothing at the last step.",
        ),
    ]


def _speed(facts: Facts) -> list[Html]:
    tokens, peak = facts.points("tokens_per_s"), facts.points("peak_share")
    charts = [
        line_chart(
            "Tokens a second, all workers",
            [Series("tokens", tokens)],
            x_label="step",
            note=f"Padding not counted; {number(_middle(tokens))} in the median step.",
        )
    ]
    if peak:
        charts.append(
            line_chart(
                "Share of the device's peak, first worker",
                [Series("share", peak)],
                x_label="step",
                note=f"Work that the method needs against dense bfloat16 of the data sheet; "
                f"{_middle(peak):.0%} in the median step.",
            )
        )
    return charts


def _dots(points: Sequence[Point]) -> list[Series]:
    return [Series("each step", points, "dots"), Series("smoothed", smoothed(points))]


def _course(points: Sequence[Point]) -> str:
    """How a curve went, by its smoothed ends."""
    ends = smoothed(points)
    if len(ends) < 2:
        return "one step says nothing of a course"
    return f"from {ends[0][1]:.3g} at the first steps to {ends[-1][1]:.3g} at the last"


def _middle(points: Sequence[Point]) -> float:
    values = sorted(value for _, value in points)
    return values[len(values) // 2] if values else float("nan")


def _after(facts: Facts, metric: str) -> list[Point]:
    """A metric that is measured after the step that notes it."""
    return [(step + 1, value) for step, value in facts.points(metric)]


def _level(facts: Facts, value: object) -> list[Point]:
    if not isinstance(value, int | float) or value == float("inf"):
        return []
    return [(facts.steps[0]["step"], float(value)), (facts.steps[-1]["step"], float(value))]
