"""kill -9 of the driver at random moments: nothing is lost, nothing committed is done twice."""

import json
import os
import random
import signal
import subprocess
import time
from collections import Counter

import pytest

from reasonembed.run import Run
from tests.ray.processes import end_session, start_reasonembed
from tests.ray.tiny_run import write_config

LLM_KINDS = {"queries": "{0}", "judgments": "{0}|{1}", "rewrites": "{0}|rewrite"}


def start(config, last):
    return start_reasonembed(
        *("run", str(config), "--to", last), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def work_noted(folder):
    size = 0
    for name in ("requests.jsonl", "run/train/log.jsonl"):
        file = folder / name
        size += file.stat().st_size if file.is_file() else 0
    return size + sum(1 for _ in (folder / "run" / "embeddings").glob("*/_commits/*.json"))


def kill_after(folder, config, *, last, wait_s):
    """Lets a driver do some work, then kills it; returns whether it was still running."""
    before = work_noted(folder)
    process = start(config, last)
    while process.poll() is None and work_noted(folder) == before:
        time.sleep(0.05)
    time.sleep(wait_s)
    killed = process.poll() is None
    if killed:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(1)  # what still runs may still commit
    end_session(process.pid)
    return killed


def assert_exactly_once(run):
    """Each planned id is committed once, in one part, over all attempts."""
    seeds = run.artifact("seeds").keys()
    assert len(seeds) == 24
    for kind in ("queries", "candidates", "rewrites"):
        artifact = run.artifact(kind)
        assert artifact.keys() == seeds, kind
        assert sum(commit.rows for commit in artifact.commits()) == len(seeds), kind
    judgments = run.artifact("judgments")
    assert len(judgments.keys()) == sum(c.rows for c in judgments.commits()) == 24 * 4


def assert_nothing_committed_was_computed_again(run, folder):
    noted = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    committed_at = {}
    for kind, form in LLM_KINDS.items():
        artifact = run.artifact(kind)
        for commit in artifact.commits():
            keys = artifact._read_part(commit, list(artifact.key), None).to_pylist()
            for row in keys:
                committed_at[form.format(*row.values())] = commit.committed_at_ns
    assert set(committed_at) <= {row["id"] for row in noted}
    for row in noted:
        if row["id"] in committed_at:
            assert row["at_ns"] <= committed_at[row["id"]], row
    return Counter(row["id"] for row in noted)


def kill_and_finish(folder, *, last, kills, seed):
    config = write_config(folder, delay_s=0.4)
    rng = random.Random(seed)
    # The first kill is aimed: the first rows are computed, and the write that commits them starts
    # up yet. The others fall at random moments.
    assert kill_after(folder, config, last=last, wait_s=0)
    waits = [rng.uniform(0, 4) for _ in range(kills)]
    hit = sum(kill_after(folder, config, last=last, wait_s=wait_s) for wait_s in waits)
    finish = start(config, last)
    _, errors = finish.communicate(timeout=250)
    assert finish.returncode == 0, errors
    end_session(finish.pid)
    return Run.existing(folder / "run"), hit


@pytest.mark.timeout(420)
def test_driver_killed_twice(tmp_path):
    run, hit = kill_and_finish(tmp_path, last="assemble", kills=1, seed=20)
    assert hit == 1, "the second kill did not find the driver at work"
    assert_exactly_once(run)
    computed = assert_nothing_committed_was_computed_again(run, tmp_path)
    assert max(computed.values()) > 1, "no kill fell between computing and committing a row"
    assert run.artifact("samples").keys()


@pytest.mark.chaos
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_driver_killed_through_training_and_evaluation(tmp_path, seed):
    run, hit = kill_and_finish(tmp_path, last="evaluate", kills=10, seed=seed)
    assert hit >= 8
    assert_exactly_once(run)
    assert_nothing_committed_was_computed_again(run, tmp_path)
    assert run.directory("evaluate").finished()["systems"]["after"]
