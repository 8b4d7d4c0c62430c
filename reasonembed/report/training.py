"""Training, step by step."""

from __future__ import annotations

from reasonembed.report.charts import Html, Series, join, line_chart, smoothed, tag
from reasonembed.report.facts import NOT_RUN, Facts


def trained(facts: Facts) -> Html:
    """The curves of the training log."""
    if not facts.steps:
        return NOT_RUN
    loss, rank = facts.points("loss"), facts.points("positive_rank")
    charts = [
        line_chart(
            "Loss",
            [Series("each step", loss, "dots"), Series("smoothed", smoothed(loss))],
            x_label="step",
        ),
        line_chart(
            "Mean loss of the query and of its rewriting q′",
            [
                Series("query", smoothed(facts.points("query_loss"))),
                Series("q′", smoothed(facts.points("rewritten_loss"))),
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
        line_chart(title, [Series(title, facts.points(metric))], x_label="step")
        for title, metric in (
            ("Learning rate", "learning_rate"),
            ("Gradient norm before clipping", "grad_norm"),
            ("Tokens a second, first worker", "tokens_per_s"),
        )
    ]
    start = facts.config.train.intensity_start_step
    said = f"{len(facts.steps)} steps; weighted by reasoning intensity from step {start} on."
    return join([tag("p", said), tag("div", *charts, class_="charts")])
