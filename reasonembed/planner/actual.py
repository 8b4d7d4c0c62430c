"""Planned against actual: the plan lies in the run, the timeline tells what became of it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from reasonembed.artifacts import Artifact
from reasonembed.planner.calibration import (
    Calibration,
    calibration_file,
    device_name,
    read_calibration,
)
from reasonembed.planner.estimate import Plan, make_plan, plan_from, settings_of
from reasonembed.planner.inputs import read_inputs
from reasonembed.planner.prices import chosen_shape, read_prices
from reasonembed.run import Run

FILE = "plan.json"
_LOG = logging.getLogger(__name__)
_TOKENS = {
    "filter": "domains",
    "generate": "queries",
    "annotate": "judgments",
    "audit": "audit",
    "rewrite": "rewrites",
}


@dataclass(frozen=True)
class Compared:
    """A stage as it was planned and as it went.

    Attributes:
        stage: Name.
        planned_s: Seconds.
        actual_s: Seconds of all attempts.
        planned_tokens: Read and written by language models.
        actual_tokens: The same.
        planned_cost: Money at the price of the stage's market.
        actual_cost: The same, of the nodes that were planned, for as long as it took.
    """

    stage: str
    planned_s: float
    actual_s: float
    planned_tokens: float
    actual_tokens: float
    planned_cost: float
    actual_cost: float

    @property
    def ratio(self) -> float | None:
        """Actual by planned seconds."""
        return self.actual_s / self.planned_s if self.planned_s else None


def kept_calibration(run: Run, shape: str | None = None) -> Calibration:
    """What was measured before on the kind of device that a run is planned for."""
    config = run.config
    prices = read_prices(config.runtime.cost.prices)
    name = device_name(prices.device(shape or chosen_shape(config)))
    return read_calibration(calibration_file(name, cache_dir=config.runtime.cache_dir), device=name)


def ensure_plan(run: Run) -> Plan | None:
    """The run's plan; made and kept where there is none of its configuration, but a corpus.

    Never raises: a run must not end because its price is not known. What went wrong is logged.
    """
    try:
        if (kept := read_plan(run)) is not None and kept.settings == settings_of(run.config):
            return kept
        if not run.artifact("corpus").commits():
            return None
        plan = make_plan(
            run.config,
            read_inputs(run.config, may_read=False),
            prices=read_prices(run.config.runtime.cost.prices),
            calibration=kept_calibration(run),
        )
        (run.place / FILE).write(json.dumps(plan.to_json(), indent=1).encode())
        return plan
    except Exception as error:  # the process boundary of a service to the run, not a part of it
        _LOG.warning("no plan of this run's hours and costs: %s: %s", type(error).__name__, error)
        return None


def read_plan(run: Run) -> Plan | None:
    """The plan that lies in a run; None where none, or one of another version, does."""
    data = (run.place / FILE).read()
    if data is None:
        return None
    try:
        return plan_from(json.loads(data))
    except (ValueError, TypeError, KeyError):
        return None


def market_of(run: Run, stage: str) -> str:
    """`spot` where a stage runs on spot machines alone, else `on_demand`."""
    runtime = run.config.runtime
    pool = getattr(runtime, {"audit": "annotate", "evaluate": "embed"}.get(stage, stage), None)
    return "spot" if getattr(pool, "market", "any") == "spot" else "on_demand"


def compare(run: Run, plan: Plan, *, timeline: Sequence[dict[str, Any]]) -> list[Compared]:
    """Each stage that was planned and has run."""
    rows = []
    for stage in plan.stages:
        took = [note["seconds"] for note in timeline if note.get("stage") == stage.stage]
        if not took:
            continue
        market = market_of(run, stage.stage)
        cost, seconds = stage.cost(market), math.fsum(took)
        rows.append(
            Compared(
                stage.stage,
                stage.seconds,
                seconds,
                stage.tokens_in + stage.tokens_out if stage.stage in _TOKENS else 0.0,
                _tokens(run, stage.stage),
                cost,
                cost * seconds / stage.seconds if stage.seconds else 0.0,
            )
        )
    return rows


def _tokens(run: Run, stage: str) -> float:
    if stage not in _TOKENS:
        return 0.0
    artifact: Artifact = run.artifact(_TOKENS[stage])
    spent = artifact.history(columns=["prompt_tokens", "completion_tokens"])
    return float(sum(pc.sum(column).as_py() or 0 for column in spent.columns))
