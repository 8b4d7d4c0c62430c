"""Actor pools: how many, on which machines, and what happens when one of those goes.

Everything that a stage asks of Ray for its actors is decided here; the numbers come from
`runtime` of the configuration.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

import ray
from ray.data import ActorPoolStrategy, DataContext

from reasonembed.config import Market, PoolConfig, TrainRuntime

MARKET_LABEL = "ray.io/market-type"
ACCELERATOR_LABEL = "ray.io/accelerator-type"

_SPOT, _NOT_SPOT = "spot", "!spot"  # a machine that says nothing of itself is none that vanishes
_GROWS_AT = 1.75  # Ray adds actors from so many blocks in flight for each that runs
_MAX_TASK_RETRIES = 8  # a block that kills its actor each time must end the stage, not loop
_MAX_INIT_RETRIES = 3
_MAX_INIT_DEATHS = 5
_NO_PROGRESS_S = 3_600.0  # spot may be dry for long; half of that is Ray's own patience

_Make = TypeVar("_Make")


def pool_options(pool: PoolConfig, *, overlap: int = 1) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` for a pool of actors.

    Machines come and go as often as they like, so an actor may be started anew without limit; a
    block may not, for it may be the block that kills.

    Args:
        pool: Numbers, resources and machines.
        overlap: Blocks that an actor takes at once.
    """
    options: dict[str, Any] = {
        "compute": ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=pool.max_actors,
            initial_size=pool.min_actors,  # the first actor says what is wrong, not the hundredth
            max_tasks_in_flight_per_actor=in_flight(overlap),
        ),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus,
        "max_restarts": -1,
        "max_task_retries": _MAX_TASK_RETRIES,
    }
    if overlap > 1:
        options["max_concurrency"] = overlap
    selectors = label_selectors(pool.market, pool.accelerators)
    if selectors[0]:
        options["label_selector"] = selectors[0]
    if selectors[1:]:
        options["fallback_strategy"] = [{"label_selector": other} for other in selectors[1:]]
    return options


def in_flight(overlap: int) -> int:
    """Blocks that an actor holds, running and waiting; with fewer the pool would never grow."""
    return max(overlap + 1, math.ceil(_GROWS_AT * overlap))


def label_selectors(market: Market, accelerators: tuple[str, ...]) -> list[dict[str, str]]:
    """Which nodes, in Ray's label syntax: the first choice, then what is taken in its place.

    Args:
        market: Spot, not spot, any, or spot where there is some.
        accelerators: Kinds of GPU; none means any.
    """
    kinds = {ACCELERATOR_LABEL: f"in({','.join(accelerators)})"} if accelerators else {}
    markets: dict[Market, list[dict[str, str]]] = {
        "any": [{}],
        "spot": [{MARKET_LABEL: _SPOT}],
        "on-demand": [{MARKET_LABEL: _NOT_SPOT}],
        "spot-first": [{MARKET_LABEL: _SPOT}, {MARKET_LABEL: _NOT_SPOT}],
    }
    return [choice | kinds for choice in markets[market]]


def training_options(runtime: TrainRuntime) -> dict[str, Any]:
    """Arguments of `ray.train.ScalingConfig`: how many workers, what each holds, and where."""
    least, most = runtime.min_workers, runtime.num_workers
    selector = label_selectors(runtime.market, runtime.accelerators)[0]
    return {
        "num_workers": most if least is None else (least, most),
        "use_gpu": runtime.use_gpu,
        "resources_per_worker": {"CPU": runtime.num_cpus}
        | ({"GPU": 1.0} if runtime.use_gpu else {}),
        "label_selector": selector or None,
    }


def prepare(context: DataContext) -> None:
    """Sets what Ray Data does with actors that do not start, and with work that stands still.

    Args:
        context: Of the driver, before a dataset is made.
    """
    context.max_errored_blocks = 0  # a block that is dropped without a word is a row that is lost
    # A full disk or a busy hub passes; a wrong model does not, and is said after these tries.
    context.actor_init_retry_on_errors = True
    context.actor_init_max_retries = _MAX_INIT_RETRIES
    context.max_consecutive_actor_init_deaths = _MAX_INIT_DEATHS
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S


def on_this_node(make: _Make) -> _Make:
    """What builds a stage, as the GPU of this actor's node wants it.

    Args:
        make: Anything that builds a mapper; `llm.protocol.WithEngine` has settings for each kind.
    """
    choose = getattr(make, "on_accelerator", None)
    if choose is None:
        return make
    labels: dict[str, str] = ray.get_runtime_context().get_node_labels()
    chosen: _Make = choose(labels.get(ACCELERATOR_LABEL))
    return chosen
