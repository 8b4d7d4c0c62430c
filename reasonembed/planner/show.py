"""A plan as a person reads it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from reasonembed.errors import ReasonEmbedError
from reasonembed.planner.actual import Compared, compare, read_plan
from reasonembed.planner.estimate import Plan
from reasonembed.progress import duration
from reasonembed.run import Run

_LOG = logging.getLogger(__name__)
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def short(value: float) -> str:
    """`1234567` → `1.2 M`."""
    for size, unit in _UNITS:
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}" if value else ""


def work_table(plan: Plan) -> Table:
    """What there is to do, a row a stage."""
    table = _table(
        f"{plan.shape}: {plan.node}, {plan.device}",
        *("rows", "tokens\nin", "cached", "out", "FLOP", "GB a\ndevice", "disk"),
    )
    for stage in plan.stages:
        share = stage.tokens_cached / stage.tokens_in if stage.tokens_in else 0.0
        memory = math.fsum(stage.memory.values()) / 1e9
        table.add_row(
            stage.stage,
            f"{stage.rows:,.0f}",
            short(stage.tokens_in),
            f"{share:.0%}" if share else "",
            short(stage.tokens_out),
            short(stage.flops),
            f"{memory:.1f}" if memory else "",
            short(stage.disk),
        )
    return table


def hours_table(plan: Plan) -> Table:
    """How long it takes and what that costs, a row a stage and all together."""
    has_price = any(stage.on_demand for stage in plan.stages)
    devices = "GPU h" if plan.device != "cpu" else "h"
    heads = [f"{devices},\nlimit", devices, "time", "nodes"]
    money = [f"{plan.currency} on\ndemand", "spot"] if has_price else []
    table = _table("", *heads, *money, "rates")
    for stage in plan.stages:
        time = "cannot run" if stage.problem else duration(stage.seconds)
        cells = [_hours(stage.limit_hours), _hours(stage.device_hours), time, f"{stage.nodes}"]
        cost = [_money(stage.on_demand), _money(stage.spot)] if has_price else []
        table.add_row(stage.stage, *cells, *cost, stage.basis)
    limit = math.fsum(stage.limit_hours for stage in plan.stages)
    hours = math.fsum(stage.device_hours for stage in plan.stages)
    cost = [_money(plan.cost(market)) for market in ("on_demand", "spot")] if has_price else []
    table.add_section()
    name = f"all without {', '.join(plan.left_out)}" if plan.left_out else "all"
    table.add_row(name, _hours(limit), _hours(hours), duration(plan.seconds), "", *cost, "")
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table("stage", title=title or None, title_justify="left")
    for head in heads:  # a time may be wrapped between its words, a figure may not be cut
        table.add_column(head, justify="right", no_wrap=head != "time", overflow="fold")
    return table


def _money(value: float) -> str:
    """With cents below a thousand."""
    return f"{value:,.2f}" if value < 1_000 else f"{value:,.0f}"


def _hours(value: float) -> str:
    if not value:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plan_view(plan: Plan) -> Group:
    """The table with what it rests on, what cannot run and what could be cheaper."""
    lines = [f"  {stage.stage} cannot run: {stage.problem}" for stage in plan.stages
             if stage.problem]  # fmt: skip
    lines += [f"  {stage.stage}: {note}" for stage in plan.stages for note in stage.notes]
    lines += [f"  assumed: {one}" for one in plan.assumptions]
    lines += [f"  note: {one}" for one in plan.warnings]
    if any(stage.on_demand for stage in plan.stages):
        lines.append(f"  prices of {plan.prices_of}, whole nodes for as long as a stage runs")
    return Group(work_table(plan), hours_table(plan), Text("\n".join(lines)))


def compared_table(rows: Sequence[Compared], *, currency: str) -> Table:
    """Planned against actual, a row a stage."""
    table = Table("stage", title="Planned and actual", title_justify="left")
    for head in ("planned", "actual", "ratio", "tokens planned", "tokens", "cost planned", "cost"):
        table.add_column(f"{head} {currency}" if head.startswith("cost") else head, justify="right")
    for row in (*rows, _sum(rows)):
        table.add_row(
            row.stage,
            duration(row.planned_s),
            duration(row.actual_s),
            f"{row.ratio:.2f}" if row.ratio is not None else "",
            short(row.planned_tokens),
            short(row.actual_tokens),
            _money(row.planned_cost) if row.planned_cost else "",
            _money(row.actual_cost) if row.actual_cost else "",
        )
    return table


def _sum(rows: Sequence[Compared]) -> Compared:
    names = ("planned_s", "actual_s", "planned_tokens", "actual_tokens", "planned_cost")
    sums = [math.fsum(getattr(row, name) for row in rows) for name in (*names, "actual_cost")]
    return Compared("all", *sums)


def planned_and_actual(run: Run) -> list[str]:
    """The lines of `compared_table`; none where there is no plan or it cannot be compared."""
    try:
        plan = read_plan(run)
        rows = compare(run, plan, timeline=run.timeline()) if plan else []
    except ReasonEmbedError as error:
        _LOG.warning("planned hours and costs cannot be compared: %s", error)
        return []
    if not rows or plan is None:
        return []
    return as_text(compared_table(rows, currency=plan.currency), width=110).splitlines()


def as_text(view: Table | Group, *, width: int = 160) -> str:
    """What a console that wide would show."""
    console = Console(width=width, highlight=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get()
