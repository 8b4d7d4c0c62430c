"""`reasonembed submit`: a job through HTTP is followed, stopped, submitted again, and complete."""

import json
import subprocess
import time

import pytest

from reasonembed.config import load
from reasonembed.run import Run
from tests.ray.processes import reasonembed, start_reasonembed
from tests.ray.tiny_run import write_config

pytestmark = pytest.mark.slow  # each starts several drivers on a head node


def command(head, config, *arguments):
    return ("submit", str(config), "--address", head.url, *arguments)


def submit(head, config, *arguments, timeout_s=280):
    return reasonembed(
        *command(head, config, *arguments), variables=head.surroundings, timeout_s=timeout_s
    )


def following(head, config, *arguments):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return start_reasonembed(
        *command(head, config, *arguments), variables=head.surroundings, **pipes
    )


def requests_noted(folder):
    file = folder / "requests.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    return [json.loads(line)["id"] for line in lines]


def wait_for(condition, *, seconds=90):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it has not come in time"
        time.sleep(0.1)


def rows(run, kind):
    """What an artifact holds, without what differs by the time it took."""
    return run.artifact(kind).read().to_pylist()


def names(text):
    return [line.split()[1].rstrip(":") for line in text.splitlines() if "Submitted" in line]


@pytest.mark.timeout(600)
def test_followed_stopped_and_submitted_again_it_is_as_if_never_interrupted(head, tiny, tmp_path):
    config = write_config(tmp_path, delay_s=2.5)
    # A minute of work, that is some seconds in larger batches.
    slowly = ("--set", "runtime.generate.batch_rows=1")
    job = following(head, config, "--to", "generate", *slowly)
    wait_for(lambda: len(requests_noted(tmp_path)) >= 2)

    second = submit(head, config, "--to", "generate")
    assert second.returncode == 75, second.stdout + second.stderr
    first_name = names(second.stdout)[0].removesuffix("2") + "1"
    assert f"in use by another driver (job {first_name}" in second.stdout
    assert "Traceback" not in second.stdout

    stopped = submit(head, config, "--stop")
    assert stopped.returncode == 0 and f"Stopped {first_name}" in stopped.stdout, stopped.stdout
    shown, _ = job.communicate(timeout=60)
    assert job.returncode == 75, shown
    assert "[3/3] generate" in shown and f"{first_name} was stopped" in shown
    run = Run.existing(tmp_path / "run")
    last = run.timeline()[-1]
    assert (last["stage"], last["outcome"]) == ("generate", "interrupted"), last
    assert "SIGTERM" in last["detail"]
    done_before = run.artifact("queries").keys()
    assert len(done_before) < 24

    again = submit(head, config, "--to", "generate", "--set", "runtime.generate.batch_rows=24")
    assert again.returncode == 0, again.stdout + again.stderr
    assert names(again.stdout) == [first_name.removesuffix("1") + "3"]
    uninterrupted = Run.existing(tiny[0] / "run")
    for kind in ("corpus", "seeds", "queries"):
        assert run.artifact(kind).keys() == uninterrupted.artifact(kind).keys()
    assert sum(commit.rows for commit in run.artifact("queries").commits()) == 24
    told = {row["query_id"]: row["query"] for row in rows(uninterrupted, "queries")}
    assert {row["query_id"]: row["query"] for row in rows(run, "queries")} == told


def assert_same(run, other):
    """Every artifact of rows holds the same; models and figures follow from them."""
    for kind in ("corpus", "seeds", "queries", "candidates", "judgments", "rewrites", "samples"):
        artifact = run.artifact(kind)
        assert artifact.keys() == other.artifact(kind).keys(), kind
        assert sum(one.rows for one in artifact.commits()) == len(artifact.keys()), kind
    texts = [("queries", "query"), ("rewrites", "rewritten_query"), ("judgments", "analysis")]
    for kind, column in texts:
        found, expected = (one.artifact(kind) for one in (run, other))
        wanted = [*found.key, column]
        assert found.read(columns=wanted).equals(expected.read(columns=wanted)), kind
    figures = [one.directory("evaluate").finished()["systems"] for one in (run, other)]
    assert figures[0]["bm25"] == figures[1]["bm25"] and figures[0].keys() == figures[1].keys()


@pytest.mark.timeout(600)
def test_the_pipeline_stopped_while_judging_and_while_training_ends_the_same(head, tiny, tmp_path):
    config = write_config(tmp_path, delay_s=0.2)
    run = Run(load(config))
    log = tmp_path / "run" / "train" / "log.jsonl"
    for has_come in (
        lambda: len(run.artifact("judgments").commits()) >= 2,
        lambda: log.is_file() and log.stat().st_size > 0,
    ):
        job = following(head, config)
        wait_for(has_come, seconds=200)
        assert submit(head, config, "--stop").returncode == 0
        shown, _ = job.communicate(timeout=60)
        assert job.returncode == 75, shown
    done = submit(head, config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(run, Run.existing(tiny[0] / "run"))


@pytest.mark.timeout(600)
def test_two_runs_at_once_do_not_disturb_each_other(head, tiny, tmp_path):
    configs = [write_config(tmp_path / name) for name in ("one", "two")]
    jobs = [following(head, config) for config in configs]
    for job in jobs:
        shown, _ = job.communicate(timeout=500)
        assert job.returncode == 0, shown
    for config in configs:
        assert_same(Run(load(config)), Run.existing(tiny[0] / "run"))


@pytest.mark.timeout(600)
def test_shards_of_a_stage_at_once_make_the_whole(head, tiny, tmp_path):
    config = write_config(tmp_path)
    assert submit(head, config, "--to", "plan").returncode == 0
    run = Run(load(config))
    first = submit(head, config, "--stage", "generate", "--shard", "1/3")
    assert first.returncode == 0 and "generate with --shard 2/3, 3/3" in first.stdout, first.stdout
    assert 0 < len(run.artifact("queries").keys()) < 24
    early = submit(head, config, "--stage", "annotate")
    assert early.returncode == 2 and "run generate with --shard 2/3, 3/3" in early.stdout
    refused = submit(head, config, "--stage", "assemble", "--shard", "1/3")
    assert refused.returncode == 2 and "for one stage of rows" in refused.stdout
    others = [
        following(head, config, "--stage", "generate", "--shard", shard) for shard in ("2/3", "3/3")
    ]
    for job in others:
        shown, _ = job.communicate(timeout=200)
        assert job.returncode == 0, shown
    assert run.artifact("queries").keys() == run.artifact("seeds").keys()
    assert sum(commit.rows for commit in run.artifact("queries").commits()) == 24
    done = submit(head, config)
    assert done.returncode == 0, done.stdout
    assert_same(run, Run.existing(tiny[0] / "run"))
