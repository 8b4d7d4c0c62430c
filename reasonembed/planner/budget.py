"""Money: what a run has cost so far, and whether a stage may begin or go on.

A run costs the node-hours that it holds times their price. Failed attempts count, for they were
paid for as well.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from reasonembed.errors import BudgetError, ConfigError
from reasonembed.planner.actual import ensure_plan, market_of
from reasonembed.planner.estimate import Plan, StagePlan
from reasonembed.planner.prices import Shape, chosen_shape, read_prices
from reasonembed.run import Run


@dataclass
class Budget:
    """A limit, and a clock that runs while a stage does.

    Attributes:
        limit: Most that may be spent; infinite where only the sum is wanted.
        currency: Of it.
        price: Of a node and hour in a stage.
        nodes: Held in a stage.
        planned: Money of a stage; None where it is not known.
        total: Planned money of all stages.
        timeline: Attempts that are over.
        clock: Seconds since 1970.
    """

    limit: float
    currency: str
    price: Callable[[str], float]
    nodes: Callable[[str], float]
    planned: Callable[[str], float | None]
    total: Callable[[], float]
    timeline: Callable[[], Sequence[dict[str, Any]]]
    clock: Callable[[], float] = time.time
    _stage: str = ""
    _since: float = 0.0

    def spent(self) -> float:
        """Money until now."""
        over = math.fsum(self._cost(note["stage"], note["seconds"]) for note in self.timeline())
        return over + self._running()

    def check(self, stage: str) -> None:
        """Refuses a stage that would pass the limit, before it begins; its clock starts else.

        Raises:
            BudgetError: It would.
        """
        self._stage = ""
        planned = self.planned(stage)  # first: the plan says how many nodes count
        spent, needed = self.spent(), self._needed(stage, planned or 0.0)
        if spent + needed > self.limit or spent >= self.limit:
            raise BudgetError(
                f"{stage} is planned to cost {needed:,.2f} {self.currency} more; {spent:,.2f} of "
                f"runtime.cost.max_cost {self.limit:,.2f} are spent. What is committed stays; "
                "raise the limit and run again, or look for levers in `reasonembed plan`"
            )
        self._stage, self._since = stage, self.clock()

    def guard(self) -> None:
        """Called while a stage runs.

        Raises:
            BudgetError: The limit is reached.
        """
        if not math.isinf(self.limit) and self.spent() >= self.limit:
            raise self.reached()

    def reached(self) -> BudgetError:
        """What a stage ends by that the limit has ended."""
        return BudgetError(
            f"{self.spent():,.2f} {self.currency} are spent, runtime.cost.max_cost is "
            f"{self.limit:,.2f}: {self._stage or 'the run'} ends here. What is committed stays; "
            "raise the limit and run again, it goes on"
        )

    def lasts_until(self) -> float:
        """When the limit is reached if the stage goes on, in seconds since 1970."""
        per_s = self._cost(self._stage, 1.0) if self._stage else 0.0
        return self.clock() + (self.limit - self.spent()) / per_s if per_s else math.inf

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Runs the clock while the body runs a stage.

        Raises:
            BudgetError: See `check`.
        """
        self.check(stage)
        try:
            yield
        finally:
            self._stage = ""  # over, and in the timeline

    def told(self) -> dict[str, float]:
        """What progress says: money `spent` and `planned`; nothing where nothing costs any."""
        spent, planned = self.spent(), self.total()
        return {"spent": round(spent, 4), "planned": round(planned, 4)} if planned else {}

    def _needed(self, stage: str, planned: float) -> float:
        """What is left of a stage's planned money; of one that was done, rows alone are left."""
        own = [note for note in self.timeline() if note["stage"] == stage]
        if any(note.get("outcome") == "done" and not note.get("shard") for note in own):
            return 0.0
        return max(0.0, planned - math.fsum(self._cost(stage, note["seconds"]) for note in own))

    def _running(self) -> float:
        return self._cost(self._stage, self.clock() - self._since) if self._stage else 0.0

    def _cost(self, stage: str, seconds: float) -> float:
        return seconds / 3600 * self.nodes(stage) * self.price(stage)


def budget_of(run: Run, *, nodes: Callable[[str], float] | None = None) -> Budget:
    """The budget of a run, by its plan and the price of its shape.

    Args:
        run: With `runtime.cost`.
        nodes: Held in a stage; default those that are planned.

    Raises:
        ConfigError: There is a limit, but the shape costs nothing.
    """
    cost = run.config.runtime.cost
    prices = read_prices(cost.prices)
    name = chosen_shape(run.config)
    shape = prices.shape(name)
    if cost.max_cost is not None and not max(shape.on_demand, shape.spot):
        raise ConfigError(
            f"runtime.cost.max_cost {cost.max_cost:g} needs a price, and {name} costs nothing: set "
            "runtime.cost.shape, or a price in a file of runtime.cost.prices"
        )
    known = _Planned(run)
    return Budget(
        limit=math.inf if cost.max_cost is None else cost.max_cost,
        currency=prices.currency,
        price=lambda stage: _price(shape, market_of(run, stage)),
        nodes=nodes or known.nodes,
        planned=known.cost,
        total=known.total,
        timeline=run.timeline,
    )


def _price(shape: Shape, market: str) -> float:
    return shape.spot if market == "spot" else shape.on_demand


class _Planned:
    """The run's plan, made when it is first asked for and can be."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._plan: Plan | None = None

    def total(self) -> float:
        """Money of all stages; 0 while there is no plan."""
        stages = () if self._plan is None else self._plan.stages
        return math.fsum(one.cost(market_of(self._run, one.stage)) for one in stages)

    def cost(self, stage: str) -> float | None:
        if self._plan is None:
            self._plan = ensure_plan(self._run)
        found = self._stage(stage)
        return None if found is None else found.cost(market_of(self._run, stage))

    def nodes(self, stage: str) -> float:
        found = self._stage(stage)
        return 1.0 if found is None else float(found.nodes)

    def _stage(self, stage: str) -> StagePlan | None:
        return None if self._plan is None else self._plan.stage(stage)
