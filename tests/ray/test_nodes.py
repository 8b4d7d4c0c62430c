"""Nodes of a cluster die while an LLM works: every planned row is there once, bad ones too."""

import json
import random
import subprocess
import time

import pytest
import yaml

from reasonembed.llm.scripted import FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED
from reasonembed.run import Run
from tests.ray.processes import end_session, start_reasonembed
from tests.ray.tiny_run import write_config

NUM_SEEDS = 20
POISON = (FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED)
WORKER = {"num_cpus": 2, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def cluster():
    """A head that holds no work, and two nodes that do."""
    from ray.cluster_utils import Cluster

    # A dead node is noticed after two seconds, not after the default of half a minute.
    quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": quick})
    nodes = [cluster.add_node(**WORKER) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


def write_run(folder, *, seed):
    """A tiny run whose texts are of any length and whose documents break the LLM now and then."""
    config = write_config(folder, delay_s=0.2)
    rng = random.Random(seed)
    file = folder / "data" / "corpus.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] += f" note{number}" * rng.choice((1, 30, 2_000))
        if rng.random() < 0.2:
            row["text"] = f"{rng.choice(POISON)} {row['text']}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = yaml.safe_load(config.read_text())
    pool = {"batch_rows": 2, "num_cpus": 0.5, "min_actors": 2, "max_actors": 2}
    data["runtime"] |= {"generate": pool, "annotate": pool}
    data["plan"]["max_chars"] = 100_000
    for stage in ("generate", "annotate"):
        data[stage]["max_failed_share"] = 1.0
    config.write_text(yaml.safe_dump(data))
    return config


def rows_committed(run, kind):
    return sum(commit.rows for commit in run.artifact(kind).commits())


def kill_node_at_work(cluster, nodes, process, run, kind, *, rng):
    """Kills a node between the first and the last row of a stage; says whether it came in time."""
    while process.poll() is None and rows_committed(run, kind) == 0:
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 0.5))
    was_at_work = process.poll() is None
    victim = nodes.pop(rng.randrange(len(nodes)))
    cluster.remove_node(victim, allow_graceful=False)
    nodes.append(cluster.add_node(**WORKER))
    return was_at_work


@pytest.mark.chaos
@pytest.mark.timeout(2_400)
def test_nodes_die_and_every_planned_row_is_there_once(cluster, tmp_path):
    cluster, nodes = cluster
    variables = {"RAY_ADDRESS": cluster.address}
    hits = 0
    for seed in range(NUM_SEEDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        config, rng = write_run(folder, seed=seed), random.Random(seed)
        run = Run.existing(write_resolved(folder, config))
        driver = start_reasonembed(
            *("run", str(config), "--to", "annotate"),
            variables=variables,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            for kind in ("queries", "judgments"):
                hits += kill_node_at_work(cluster, nodes, driver, run, kind, rng=rng)
            _, errors = driver.communicate(timeout=120)
        finally:
            end_session(driver.pid)
        assert driver.returncode == 0, f"seed {seed}: {errors}"
        check(run, seed)
    assert hits >= 1.5 * NUM_SEEDS, f"only {hits} nodes died while a stage was at work"


def write_resolved(folder, config):
    """The run directory as a driver would leave it, so that its artifacts can be watched."""
    from reasonembed.config import load

    run = Run(load(config))
    run.dir.mkdir(parents=True)
    run.save_config()
    return run.dir


def check(run, seed):
    seeds = run.artifact("seeds").keys()
    queries = run.artifact("queries")
    assert queries.keys() == seeds, f"seed {seed}"
    # Exactly once: a part that a dead node's task had committed was not computed into another one.
    assert rows_committed(run, "queries") == len(seeds), f"seed {seed}"
    assert set(queries.statuses()) > {"ok"}, f"seed {seed}: the poison did no harm"
    pairs = {
        f"{row['query_id']}\x1f{doc_id}"
        for row in run.artifact("candidates").read().to_pylist()
        for doc_id in row["doc_ids"][:4]
    }
    assert run.artifact("judgments").keys() == pairs, f"seed {seed}"
    assert rows_committed(run, "judgments") == len(pairs), f"seed {seed}"
