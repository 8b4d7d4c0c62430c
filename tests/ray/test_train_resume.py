"""Workers of a training die or are told to leave: same batches, none twice, none lost."""

import json
import random
import subprocess
import sys
import time

import pytest

from reasonembed.redapter.loop import train
from tests.embedder.tiny import save_checkpoint
from tests.ray import resume_driver
from tests.ray.processes import end_session, start
from tests.redapter.samples import samples

pytestmark = pytest.mark.chaos

STEPS = 2 * resume_driver.QUERIES // resume_driver.BATCH
# Sums over workers and chunks run in another order, and Adam lets that grow.
RELATIVE = 1e-3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(checkpoint, tmp_path_factory):
    """Loss and number of each batch of a run that nothing interrupts, in this process."""
    config, runtime = resume_driver.settings(checkpoint)
    rows = []
    train(
        config,
        samples(count=resume_driver.QUERIES),
        weights=checkpoint,
        runtime=runtime,
        output_dir=tmp_path_factory.mktemp("alone"),
        report=lambda metrics, _: rows.append(metrics),
    )
    return rows


def drive(checkpoint, folder, *, die_at=None, victim=0, slow_s=0, variables=None, **runtime):
    file = folder / "told.json"
    told = {
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "runtime": runtime,
        "die_at": die_at,
        "victim": victim,
        "slow_s": slow_s,
    }
    file.write_text(json.dumps(told))
    return start(
        *(sys.executable, "-m", "tests.ray.resume_driver", str(file)),
        variables=variables,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process, *, timeout_s=200):
    try:
        _, errors = process.communicate(timeout=timeout_s)
    finally:
        end_session(process.pid)
    return process.returncode, errors


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same_run(folder, alone):
    """Whatever the attempts did, each step saw one batch, and an epoch saw each query once."""
    noted = read(folder / "ids.jsonl")
    by_step = {}
    for row in noted:
        assert by_step.setdefault(row["step"], row["ids"]) == row["ids"], f"step {row['step']}"
    assert sorted(by_step) == list(range(STEPS))
    everything = sorted(sample.query_id for sample in samples(count=resume_driver.QUERIES))
    for epoch in range(2):
        steps = range(epoch * STEPS // 2, (epoch + 1) * STEPS // 2)
        assert sorted(id_ for step in steps for id_ in by_step[step]) == everything
    found = {row["step"]: row for row in read(folder / "log.jsonl")}
    assert [found[step]["batch"] for step in sorted(found)] == [row["batch"] for row in alone]
    for row in alone:
        assert found[row["step"]]["loss"] == pytest.approx(row["loss"], rel=RELATIVE), row["step"]
    assert (folder / "checkpoints" / "weights" / "adapter_model.safetensors").is_file()
    return noted


@pytest.mark.timeout(600)
@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_a_worker_dies_and_the_workers_go_on(checkpoint, alone, tmp_path, sharding):
    rng = random.Random(sharding)
    die_at, victim = rng.randrange(4, STEPS - 1), rng.randrange(2)
    driver = drive(
        checkpoint, tmp_path, die_at=die_at, victim=victim, num_workers=2, sharding=sharding
    )
    status, errors = finish(driver)
    assert status == 0, errors
    assert (tmp_path / f"died-{die_at}").exists()
    noted = assert_same_run(tmp_path, alone)
    steps = [row["step"] for row in noted]
    assert 0 < len(steps) - STEPS <= die_at, f"steps taken: {steps}"  # it did not begin anew


@pytest.mark.timeout(600)
def test_one_worker_goes_on_where_two_died(checkpoint, alone, tmp_path):
    die_at = random.Random(1).randrange(4, STEPS - 1)
    first = drive(
        checkpoint, tmp_path, die_at=die_at, num_workers=2, max_failures=0, sharding="fsdp"
    )
    status, _ = finish(first)
    assert status != 0 and (tmp_path / f"died-{die_at}").exists()
    status, errors = finish(drive(checkpoint, tmp_path, num_workers=1, sharding="fsdp"))
    assert status == 0, errors
    noted = assert_same_run(tmp_path, alone)
    assert [row["workers"] for row in noted if row["step"] == 0] == [2]
    assert noted[-1]["workers"] == 1


@pytest.fixture
def cluster():
    """A head that holds no work, and a node for two workers."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    node = cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
    yield cluster, node
    cluster.shutdown()


@pytest.mark.timeout(600)
def test_an_announced_departure_is_saved_for(checkpoint, alone, tmp_path, cluster):
    cluster, node = cluster
    never = 10 * STEPS  # no checkpoint but that of the departure, and the last one
    driver = drive(
        checkpoint,
        tmp_path,
        num_workers=2,
        min_workers=1,
        checkpoint_every=never,
        slow_s=1.5,
        variables={"RAY_ADDRESS": cluster.address},
    )
    try:
        while not (tmp_path / "ids.jsonl").exists() and driver.poll() is None:
            time.sleep(0.2)
        cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        drain(cluster, node, seconds=12)
        status, errors = finish(driver, timeout_s=300)
    finally:
        end_session(driver.pid)
    assert status == 0, errors
    noted = assert_same_run(tmp_path, alone)
    starts = [row["step"] for row in noted if row["workers"] == 1]
    assert starts and 0 < starts[0] < STEPS, [(row["step"], row["workers"]) for row in noted]


def drain(cluster, node, *, seconds):
    """What a watcher of a spot machine does when its cloud announces that the machine goes."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "drain-node"),
        *("--address", cluster.address, "--node-id", node.node_id),
        *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"),
        *("--deadline-remaining-seconds", str(seconds)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
