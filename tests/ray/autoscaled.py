"""A cluster of made-up machines that Ray's own autoscaler starts and ends; see its test.

`ray.cluster_utils.AutoscalingCluster` reads a file that Ray's wheel lacks, and ends every other Ray
of the machine; this one has its own configuration, ports and processes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

import ray
from ray._private.services import get_node_ip_address
from reasonembed.config import load
from reasonembed.run import Run
from tests.ray.processes import end_session, free_ports, start, start_reasonembed
from tests.ray.tiny_run import write_config, write_corpus

_HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # the provider's own word
_COMMANDS = (
    *("initialization_commands", "setup_commands", "head_setup_commands"),
    *("worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"),
)
MAX_MACHINES = 4
IDLE_S = 8  # a process on a machine takes that long to start where two cores have it all
BLOCK_S = 2.5


def _configuration(address: str) -> dict[str, Any]:
    """A spot group that may be empty; each of its machines holds one actor."""
    return {
        "cluster_name": "made-up",
        "max_workers": MAX_MACHINES,
        "idle_timeout_minutes": IDLE_S / 60,
        "upscaling_speed": 1.0,
        "provider": {
            "type": "external",  # `fake_multinode` is this with defaults that the wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "launch_multiple": True,
            "head_node_id": _HEAD_ID,
            "gcs_address": address,
        },
        "auth": {"ssh_user": "nobody"},
        # Nothing is set up on a machine that is made up, but the keys must be there.
        "file_mounts": {},
        **{name: [] for name in (*_COMMANDS, "cluster_synced_files")},
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 4}, "node_config": {}, "max_workers": 0},
            "gpu_spot": {
                "resources": {"CPU": 1, "GPU": 1, "object_store_memory": 80_000_000},
                "labels": {"ray.io/market-type": "spot"},
                "node_config": {},
                "min_workers": 0,
                "max_workers": MAX_MACHINES,
            },
        },
    }


@contextmanager
def autoscaled(folder: Path) -> Iterator[str]:
    """The address of a cluster that has a head alone, and an autoscaler."""
    (port,) = free_ports(1)
    address = f"{get_node_ip_address()}:{port}"
    file = folder / "autoscaling.json"
    file.write_text(json.dumps(_configuration(address)))
    head = start(
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
        *(f"--port={port}", f"--autoscaling-config={file}", "--include-dashboard=false"),
        *("--num-cpus=4", "--object-store-memory=80000000", "--disable-usage-stats"),
        variables={
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_AUTH_MODE": "disabled",
            "RAY_FAKE_CLUSTER": "1",
            "RAY_NODE_TYPE_NAME": "ray.head.default",  # as launchers set it
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": _HEAD_ID,
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(head, address)
        yield address
    finally:
        end_session(head.pid)


def _wait_for(head: Any, address: str, *, timeout_s: float = 60) -> None:
    deadline = time.time() + timeout_s
    while time.time() < deadline and head.poll() is None:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError):  # not yet, or not all of it
            time.sleep(0.5)
        else:
            return
    raise AssertionError(f"no cluster at {address} after {timeout_s:g} s: {head.poll()}")


@dataclass(frozen=True)
class Moment:
    """What was there at one time.

    Attributes:
        seconds: Since the run began.
        stage: That is at work.
        pending: Rows of this stage that are not committed.
        actors: Of its pool, that are up.
        machines: Of the spot group, that are up.
    """

    seconds: float
    stage: str
    pending: int
    actors: int
    machines: int


ROWS = {"generate": "queries", "annotate": "judgments"}


def write_run(folder: Path) -> Path:
    """Two stages that ask an LLM for long, with stages between that ask none."""
    config = write_config(folder, delay_s=BLOCK_S)
    write_corpus(folder / "data", documents=112)
    data = yaml.safe_load(config.read_text())
    data["plan"]["max_seeds_per_task"] = 96
    data["annotate"] |= {"candidates_per_query": 1, "audit_queries": 0}
    pool = {
        "min_actors": 1,
        "max_actors": MAX_MACHINES,
        "batch_rows": 2,
        "num_cpus": 0.5,
        "num_gpus": 1,
        "market": "spot",
    }
    data["runtime"] |= {"generate": pool, "annotate": pool}
    config.write_text(yaml.safe_dump(data))
    return config


def timeline(config: Path, *, address: str, after_s: float = 2 * IDLE_S) -> list[Moment]:
    """Runs up to the judgments and looks twice a second, also for a while after the end."""
    process = start_reasonembed(
        *("run", str(config), "--to", "annotate"),
        variables={"RAY_ADDRESS": address, "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    run, started, ended, moments = Run(load(config)), time.time(), None, []
    try:
        while ended is None or time.time() < ended + after_s:
            moments.append(_look(run, round(time.time() - started, 1)))
            if ended is None and process.poll() is not None:
                ended = time.time()
            time.sleep(0.5)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0, errors
    finally:
        end_session(process.pid)
    return moments


def _look(run: Run, seconds: float) -> Moment:
    done = {row["stage"] for row in run.timeline() if row["outcome"] == "done"}
    wanted = run.stages[: run.stages.index("annotate") + 1]
    stage = next((name for name in wanted if name not in done), "")
    pools = [
        one
        for one in ray._private.state.actors().values()
        if one["State"] == "ALIVE" and "Worker" in one["ActorClassName"]
    ]
    machines = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
    return Moment(seconds, stage, _pending(run, stage), len(pools), len(machines))


def _pending(run: Run, stage: str) -> int:
    if stage not in ROWS:
        return 0
    planned = len(run.artifact("seeds").keys())  # one judgment a query
    return planned - sum(one.rows for one in run.artifact(ROWS[stage]).commits())


def write_timeline(file: Path, moments: list[Moment]) -> None:
    """The moments as JSON, one a line."""
    lines = ",\n".join(json.dumps(asdict(moment)) for moment in moments)
    file.write_text(f"[\n{lines}\n]\n")
