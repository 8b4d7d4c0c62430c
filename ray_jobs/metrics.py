"""What Prometheus hears of a run, through Ray's agent on each node.

Actors count what they have committed, from the committed rows; the driver sets gauges from the
progress that it says. Ray puts `ray_` before every name, and its own labels beside ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pyarrow as pa
import ray
from ray.util.metrics import Counter, Gauge, Histogram

from reasonembed.progress import Counted, Progress
from reasonembed.tally import Tally

ACTOR_STATES = ("running", "pending", "restarting")
_STATES = {
    "ALIVE": "running",
    "PENDING_CREATION": "pending",
    "DEPENDENCIES_UNREADY": "pending",
    "RESTARTING": "restarting",
}
_POOLS = ("MapWorker(", "RayTrainWorker")  # what Ray calls the actors of pools and of training
_SECONDS = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0]


@dataclass(frozen=True)
class Metric:
    """One name.

    Attributes:
        kind: Of Prometheus.
        text: What it counts.
        labels: That tell its series apart, beside Ray's.
    """

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...]


METRICS: Mapping[str, Metric] = {
    "reasonembed_rows_total": Metric(
        "counter", "Committed rows by status", ("run", "stage", "status")
    ),
    "reasonembed_tokens_total": Metric(
        "counter",
        "Tokens of committed rows: prompt, of these cached, and completion",
        ("run", "stage", "kind"),
    ),
    "reasonembed_block_seconds": Metric(
        "histogram", "From a block's reading to its commit", ("run", "stage")
    ),
    "reasonembed_stage_progress_ratio": Metric(
        "gauge", "Done over planned, earlier attempts included", ("run", "stage")
    ),
    "reasonembed_stage_rows_planned": Metric("gauge", "Rows that are to be", ("run", "stage")),
    "reasonembed_stage_rows_committed": Metric("gauge", "Rows that are", ("run", "stage")),
    "reasonembed_pool_actors": Metric(
        "gauge", "Actors of the stage that runs, by state", ("run", "stage", "state")
    ),
    "reasonembed_cost_dollars": Metric(
        "gauge", "Dollars of the run: spent so far, and planned", ("run", "kind")
    ),
}
"""All names, without Ray's prefix `ray_`."""


@cache
def _meter(name: str) -> Any:
    """A process's own, made with its first value."""
    metric = METRICS[name]
    if metric.kind == "histogram":
        return Histogram(name, metric.text, boundaries=_SECONDS, tag_keys=metric.labels)
    kind = Counter if metric.kind == "counter" else Gauge
    return kind(name, metric.text, tag_keys=metric.labels)


@dataclass(frozen=True)
class CommitCounts:
    """Counts in an actor what it commits; travels to actors.

    Attributes:
        run: Name of the run.
        stage: Its stage.
    """

    run: str
    stage: str

    def __call__(self, label: str, table: pa.Table, seconds: float) -> None:
        """One committed block.

        Args:
            label: Of the piece of work; not told apart, so that a stage is one series.
            table: The rows.
            seconds: That the block took.
        """
        tags, tally = {"run": self.run, "stage": self.stage}, Tally.of(table)
        for status, rows in tally.statuses.items():
            _meter("reasonembed_rows_total").inc(rows, tags=tags | {"status": status})
        for kind, tokens in tally.tokens.items():
            if tokens:  # Ray takes no nothing
                _meter("reasonembed_tokens_total").inc(tokens, tags=tags | {"kind": kind})
        _meter("reasonembed_block_seconds").observe(seconds, tags=tags)


def set_gauges(progress: Progress) -> None:
    """Shows a driver's progress; a listener of its reporter."""
    tags = {"run": progress.run, "stage": progress.stage}
    ratio = progress.done / progress.planned if progress.planned else 1.0
    _meter("reasonembed_stage_progress_ratio").set(ratio, tags=tags)
    if progress.unit == "rows":
        _meter("reasonembed_stage_rows_planned").set(progress.planned, tags=tags)
        _meter("reasonembed_stage_rows_committed").set(progress.done, tags=tags)
    for state in ACTOR_STATES:
        number = progress.actors.get(state, 0)
        _meter("reasonembed_pool_actors").set(number, tags=tags | {"state": state})
    for kind, dollars in progress.cost.items():
        _meter("reasonembed_cost_dollars").set(dollars, tags={"run": progress.run, "kind": kind})


def pool_actors() -> dict[str, int]:
    """Actors of this driver's pool or training, by state.

    From the cluster's own table, for Ray's public list of actors needs the dashboard, which a
    private Ray does not start.
    """
    if not ray.is_initialized():
        return {}
    job = ray.JobID.from_hex(ray.get_runtime_context().get_job_id())
    counts = dict.fromkeys(ACTOR_STATES, 0)
    try:
        actors = ray._private.state.actors(job_id=job)
    except ray.exceptions.RayError:  # a head that starts again is no end of the work
        return {}
    for actor in actors.values():
        state = _STATES.get(actor["State"])
        if state and actor["ActorClassName"].startswith(_POOLS):
            counts[state] += 1
    return counts


def counted_by(cost: Callable[[], Mapping[str, float]] | None) -> Callable[[], Counted]:
    """What a driver's reporter asks for at each interval.

    Args:
        cost: Gives dollars by `spent` and `planned`; None where nobody knows prices.
    """
    return lambda: Counted(actors=pool_actors(), cost=cost() if cost else {})
