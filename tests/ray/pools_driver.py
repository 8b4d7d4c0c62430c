"""A cluster of labelled nodes, and pools that choose among them; see `test_pools`.

python -m tests.ray.pools_driver
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from cluster.spot_watcher import Notice, drain_by_ray
from ray.cluster_utils import Cluster
from ray_jobs.pools import ACCELERATOR_LABEL, MARKET_LABEL, on_this_node, pool_options, prepare
from reasonembed.config import EngineRuntime, LLMConfig, PoolConfig
from reasonembed.llm.protocol import WithEngine

ENGINE = EngineRuntime.model_validate(
    {"max_num_seqs": 8, "by_accelerator": {"H100": {"max_num_seqs": 1_024}}}
)
NODES = {"spot": "A10G", "on-demand": "H100"}


@dataclass(frozen=True)
class _Seen:
    """Says where it runs and what its engine would be."""

    make: WithEngine
    pause_s: float

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.pause_s)
        labels = ray.get_runtime_context().get_node_labels()
        count = len(batch["id"])
        return {
            "market": [labels.get(MARKET_LABEL, "none")] * count,
            "kind": [labels.get(ACCELERATOR_LABEL, "none")] * count,
            "seqs": [self.make.runtime.max_num_seqs] * count,
        }


class Worker:
    """Built in the actor, as a stage's is."""

    def __init__(self, make: WithEngine, pause_s: float) -> None:
        self._seen = _Seen(on_this_node(make), pause_s)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Where it runs."""
        return self._seen(batch)


def run(*, pause_s: float = 0, **pool: Any) -> set[tuple[str, str, int]]:
    """Where a pool's actors were, and with which engine."""
    make = WithEngine(LLMConfig(model="m"), ENGINE, None, lambda engine: None)  # type: ignore[arg-type, return-value]
    config = PoolConfig.model_validate({"num_cpus": 1, **pool})
    rows = (
        ray.data.range(4, override_num_blocks=4)
        .map_batches(
            Worker, fn_constructor_kwargs={"make": make, "pause_s": pause_s}, **pool_options(config)
        )
        .take_all()
    )
    return {(row["market"], row["kind"], int(row["seqs"])) for row in rows}


def expect(name: str, found: Iterable[Any], wanted: Iterable[Any]) -> None:
    """One comparison."""
    assert set(found) == set(wanted), f"{name}: {found} is not {wanted}"


def expect_nothing_held() -> None:
    """Where a stage has ended its machines are free, so that they can go."""
    until = time.monotonic() + 20
    while (free := ray.available_resources().get("CPU")) != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until, f"a stage has ended, and {free} CPUs alone are free"
        time.sleep(0.1)


def main() -> None:
    """All of it on one cluster."""
    small = {"object_store_memory": 80_000_000}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **small}
    )
    for market, kind in NODES.items():
        labels = {MARKET_LABEL: market, ACCELERATOR_LABEL: kind}
        cluster.add_node(num_cpus=2, labels=labels, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    prepare(ray.data.DataContext.get_current())
    spot, other, head = ("spot", "A10G", 8), ("on-demand", "H100", 1_024), ("none", "none", 8)
    expect("spot", run(market="spot"), [spot])
    expect("kind", run(accelerators=["H100"]), [other])
    expect("not spot", run(market="on-demand", accelerators=["H100", "A10G"]), [other])
    expect("spot first", run(market="spot-first", accelerators=["H100", "A10G"]), [spot])
    # More than spot has: the second actor goes where there is room.
    two = {"min_actors": 2, "max_actors": 2, "num_cpus": 2}
    both = run(market="spot-first", accelerators=["H100", "A10G"], pause_s=1.5, **two)
    expect("more than spot has", both, [spot, other])
    expect("spot that there is none of", run(market="spot-first", accelerators=["H100"]), [other])
    expect_nothing_held()
    unlabelled = run(market="on-demand")
    assert unlabelled <= {other, head}, unlabelled
    # What the watcher does on the machine that it runs on; here one address has several nodes.
    drain_by_ray(cluster.address)(Notice("spot", time.time() + 60))
    leaving = set(ray._private.state.state.get_draining_nodes())
    nodes = ray.nodes()
    leaving |= {
        node["NodeID"] for node in nodes if not node["Alive"]
    }  # at once, where nothing runs
    workers = {node["NodeID"] for node in nodes if node["Labels"].get(MARKET_LABEL)}
    assert len(leaving) == 1 and leaving <= workers, leaving
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
