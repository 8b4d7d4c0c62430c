"""The plan: each stage's hours, memory, disk and money on a kind of node."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reasonembed.config import RunConfig, fingerprint, flatten
from reasonembed.planner.calibration import CPU_UTILISATION, UTILISATION, Calibration
from reasonembed.planner.formulae import Device
from reasonembed.planner.inputs import Inputs
from reasonembed.planner.loads import Load, Site, loads
from reasonembed.planner.prices import Prices, Shape, chosen_shape, uses_gpus
from reasonembed.run import Run


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan.

    Attributes:
        stage: Name.
        rows: Planned.
        tokens_in: Read, those from the prefix cache included.
        tokens_cached: Of these.
        tokens_out: Written.
        flops: Operations.
        traffic: Bytes that decoding moves.
        limit_hours: Device-hours at the data sheet's speed.
        device_hours: Device-hours at the planned speed.
        seconds: Wall time.
        devices: Held meanwhile; 0 where a CPU does it.
        nodes: Held meanwhile.
        memory: Largest need of a device, by what for.
        disk: Bytes written.
        on_demand: Money.
        spot: Money.
        basis: `measured`, `assumed`, or `mixed`.
        problem: Why it cannot run there.
        notes: What could be better.
    """

    stage: str
    rows: float
    tokens_in: float
    tokens_cached: float
    tokens_out: float
    flops: float
    traffic: float
    limit_hours: float
    device_hours: float
    seconds: float
    devices: int
    nodes: int
    memory: dict[str, float]
    disk: float
    on_demand: float
    spot: float
    basis: str
    problem: str = ""
    notes: tuple[str, ...] = ()

    def cost(self, market: str) -> float:
        """Money, `spot` or `on_demand`."""
        return self.spot if market == "spot" else self.on_demand


@dataclass(frozen=True)
class Plan:
    """All stages on one kind of node.

    Attributes:
        shape: Its name in the prices.
        node: What the seller calls it.
        device: Kind of GPU, or `cpu`.
        currency: Of the money.
        prices_of: Date of the prices.
        stages: In order.
        assumptions: What the figures rest on.
        warnings: What is wrong with them.
        settings: Of the configuration; see `settings_of`.
    """

    shape: str
    node: str
    device: str
    currency: str
    prices_of: str
    stages: tuple[StagePlan, ...]
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    settings: str = ""

    @property
    def seconds(self) -> float:
        """Wall time of all."""
        return math.fsum(stage.seconds for stage in self.stages)

    def cost(self, market: str) -> float:
        """Money of all, `spot` or `on_demand`."""
        return math.fsum(stage.cost(market) for stage in self.stages)

    def stage(self, name: str) -> StagePlan | None:
        """One stage; None where the plan has none of that name."""
        return next((one for one in self.stages if one.stage == name), None)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stages that cannot run there; the sums are without them."""
        return tuple(stage.stage for stage in self.stages if stage.problem)

    def to_json(self) -> dict[str, Any]:
        """As `plan.json` and `--json` hold it."""
        totals = {
            "seconds": self.seconds,
            "device_hours": math.fsum(stage.device_hours for stage in self.stages),
            "on_demand": self.cost("on_demand"),
            "spot": self.cost("spot"),
            "disk": math.fsum(stage.disk for stage in self.stages),
            "without": list(self.left_out),
        }
        return asdict(self) | {"total": totals}


def plan_from(data: dict[str, Any]) -> Plan:
    """What `to_json` wrote."""
    fields = {name: value for name, value in data.items() if name != "total"}
    stages = tuple(
        StagePlan(**{**one, "notes": tuple(one.get("notes", ()))}) for one in fields.pop("stages")
    )
    fields |= {name: tuple(fields[name]) for name in ("assumptions", "warnings")}
    return Plan(stages=stages, **fields)


def make_plan(
    config: RunConfig,
    inputs: Inputs,
    *,
    prices: Prices,
    calibration: Calibration,
    shape: str | None = None,
    stages: Sequence[str] | None = None,
) -> Plan:
    """Plans stages on a kind of node.

    Args:
        config: Of the run.
        inputs: What is known of the texts.
        prices: What nodes cost.
        calibration: What was measured on this kind of device; empty for none.
        shape: Of the prices; default the configuration's, or one that fits it.
        stages: Default all of the configuration.

    Raises:
        ConfigError: A shape or a model is not known.
    """
    name = shape or chosen_shape(config)
    node, device = prices.shape(name), calibration.on(prices.device(name))
    site = Site(config, inputs, device, calibration.statistics)
    wanted = Run(config).stages if stages is None else stages
    done = tuple(
        _stage_plan(stage, parts, device, node, calibration)
        for stage, parts in loads(site, wanted).items()
    )
    warning = prices.warning() if any(one.on_demand for one in done) else None
    return Plan(
        shape=name,
        node=node.node,
        device=device.name,
        currency=prices.currency,
        prices_of=str(prices.date),
        stages=done,
        assumptions=(
            *_cluster(config, name, asked=shape),
            *_assumptions(site, done),
        ),
        warnings=(warning,) if warning else (),
        settings=settings_of(config),
    )


def settings_of(config: RunConfig) -> str:
    """Identifies what a plan was made for."""
    told = {"runtime.cost.max_cost", "runtime.progress_s"}  # change neither hours nor money
    return fingerprint({name: one for name, one in flatten(config).items() if name not in told})


def _stage_plan(
    stage: str, parts: Sequence[Load], device: Device, node: Shape, calibration: Calibration
) -> StagePlan:
    problem = "; ".join(dict.fromkeys(load.problem for load in parts if load.problem))
    rates = [calibration.rates(load, device, stage=stage) for load in parts]
    seconds = math.fsum(one.seconds(load) for one, load in zip(rates, parts, strict=True))
    seconds = 0.0 if problem else seconds  # no time is right for what cannot be
    works = [(one, load) for one, load in zip(rates, parts, strict=True) if load.kind != "cpu"]
    device_s = math.fsum(
        one.seconds(load) * load.used_workers * max(1, load.gpus) for one, load in works
    )
    devices = max((round(load.used_workers) * load.gpus for load in parts), default=0)
    nodes = max(1, math.ceil(devices / node.gpus)) if node.gpus else 1
    hours = seconds / 3600 * nodes
    asked = [load for load in parts if load.rows and load.kind != "cpu"] or parts
    measured = {bool(one.measurements) for one, load in zip(rates, parts, strict=True) if load.rows}
    basis = "mixed" if len(measured) == 2 else "measured" if True in measured else "assumed"
    return StagePlan(
        stage=stage,
        rows=math.fsum(load.rows for load in asked),
        tokens_in=math.fsum(load.tokens_in for load in parts),
        tokens_cached=math.fsum(load.tokens_cached for load in parts),
        tokens_out=math.fsum(load.tokens_out for load in parts),
        flops=math.fsum(load.flops + load.written for load in parts),
        traffic=math.fsum(load.traffic for load in parts),
        limit_hours=0.0 if problem else math.fsum(load.limit_s for load in parts) / 3600,
        device_hours=0.0 if problem else device_s / 3600,
        seconds=seconds,
        devices=devices,
        nodes=nodes,
        memory=max((load.memory for load in parts), key=lambda one: sum(one.values())),
        disk=math.fsum(load.disk for load in parts),
        on_demand=hours * node.on_demand,
        spot=hours * node.spot,
        basis=basis,
        problem=problem,
        notes=tuple(dict.fromkeys(note for load in parts for note in load.notes)),
    )


def _cluster(config: RunConfig, name: str, *, asked: str | None) -> list[str]:
    if asked or config.runtime.cost.shape or not uses_gpus(config):
        return []
    return [f"cluster {name}, for runtime.cost.shape is not set"]


def _assumptions(site: Site, stages: Sequence[StagePlan]) -> list[str]:
    found = [f"texts: {site.inputs.origin}", *site.inputs.assumed]
    if any(one.basis != "measured" for one in stages):
        share = UTILISATION if site.device.is_gpu else CPU_UTILISATION
        found.append(
            f"where nothing was measured: {share:.0%} of the {site.device.name}'s "
            "operations, and answers as long as the method's authors' settings allow"
        )
    found.append("tokens within 20 %; a second attempt of failed or lost work is not counted")
    return found
