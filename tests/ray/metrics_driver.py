"""A tiny stage on a private Ray, and what the node's agent shows Prometheus of it.

python -m tests.ray.metrics_driver FOLDER
"""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console

import ray
from ray_jobs.job import join_or_start
from ray_jobs.ledger import run_planned
from ray_jobs.metrics import METRICS, CommitCounts, counted_by, set_gauges
from reasonembed.artifacts import Artifact, Mapper
from reasonembed.config import PoolConfig, RuntimeConfig
from reasonembed.logs import WorkerLog
from reasonembed.progress import Progress, Reporter
from reasonembed.schemas import REWRITES

ROWS, FAILED, SECONDS = 8, 2, 0.6


class Slow:
    """Rows as an LLM stage makes them; slow enough for the driver to look at its actors."""

    def __call__(self, block: pa.Table) -> pa.Table:
        """Rewrites of planned queries."""
        time.sleep(SECONDS)
        return pa.Table.from_pylist([_row(one) for one in block["query_id"].to_pylist()], REWRITES)


def _row(query_id: str) -> dict[str, Any]:
    is_bad = int(query_id) < FAILED
    return {
        "query_id": query_id,
        "rewritten_query": None if is_bad else "of a user, and in no log",
        "status": "error" if is_bad else "ok",
        "detail": "the engine stopped" if is_bad else None,
        "finish_reason": None if is_bad else "stop",
        "prompt_tokens": 100,
        "cached_tokens": 60,
        "completion_tokens": 7,
        "tries": 1,
        "seed": 0,
        "model": "m",
    }


def make() -> Mapper:
    """Builds the mapper in the actor."""
    return Slow()


class Driver:
    """What stands in for a job."""

    def __init__(self, folder: Path) -> None:
        self.retry, self.owner = frozenset[str](), str(folder)
        self.heard: list[Progress] = []
        self.reporter = Reporter(
            Console(),
            interval_s=0.3,
            as_json=True,
            run="tiny",
            counted=counted_by(lambda: {"spent": 1.5, "planned": 4.0}),
            listeners=(set_gauges, self.heard.append),
        )
        self.on_commit = CommitCounts("tiny", "rewrite")
        self.worker_log = WorkerLog("tiny", "rewrite")


def exposed(*, patience_s: float = 30.0) -> str:
    """What the agent of this node shows, once all names are in it."""
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline = time.monotonic() + patience_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                text: str = answer.read().decode()
        except OSError:  # the agent starts after the node
            text = ""
        if all(f"ray_{name}" in text for name in METRICS) or time.monotonic() > deadline:
            return text
        time.sleep(0.2)


def main() -> None:
    """Prints progress lines, and writes what the agent showed and what the workers logged."""
    folder = Path(sys.argv[1])
    join_or_start(RuntimeConfig(), checked=())
    artifact = Artifact.declared(folder / "rewrites", "rewrites")
    planned = pa.table({"query_id": [str(n) for n in range(ROWS)]})
    driver = Driver(folder)
    pool = PoolConfig.model_validate({"num_cpus": 1, "batch_rows": 2})
    with driver.reporter.during("rewrite"):
        run_planned(driver, planned, artifact, make, pool, label="rewrite")
    most = max(one.actors.get("running", 0) for one in driver.heard)
    (folder / "exposed.txt").write_text(exposed())
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    workers = "".join(file.read_text(errors="replace") for file in logs.glob("worker-*.err"))
    (folder / "workers.txt").write_text(workers)
    (folder / "driver.json").write_text(json.dumps({"most_actors": most}))
    ray.shutdown()


if __name__ == "__main__":
    main()
