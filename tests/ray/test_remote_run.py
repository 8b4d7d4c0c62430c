"""A whole run in an object store, by nothing but its configuration, beside the same on a disk."""

import json
import re
import time

import pytest
from safetensors.numpy import load_file

from reasonembed.run import Run
from tests.ray.processes import end_session, reasonembed, start_reasonembed
from tests.s3 import BUCKET, make_bucket, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]  # two whole runs

_KINDS = [
    "corpus", "seeds", "queries", "candidates", "hits", "judgments", "audit", "rewrites", "samples"
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("s3")) as one:
        make_bucket(one)
        yield one


@pytest.fixture(scope="module")
def remote(tiny, server, tmp_path_factory):
    """The tiny run's configuration, run again with another `run_dir`; and how to ask for it."""
    _, config, _ = tiny
    uri, cache = f"s3://{BUCKET}/runs/tiny", tmp_path_factory.mktemp("cache")
    variables = server.environment | {"REASONEMBED_CACHE": str(cache)}

    def command(*arguments):
        return reasonembed(*arguments, variables=variables, timeout_s=600)

    done = command(
        "run", str(config), "--set", f"run_dir={uri}", "--set", f"runtime.cache_dir={cache}"
    )
    assert done.returncode == 0, done.stdout + done.stderr + _logs(cache)
    return uri, command, done.stdout


def _logs(cache):
    return "\n".join(log.read_text(errors="replace")[-5000:] for log in cache.rglob("ray.log"))


@pytest.fixture
def runs(tiny, remote, server, monkeypatch):
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return Run.existing(tiny[0] / "run"), Run.existing(remote[0])


def test_all_artifacts_are_those_of_a_run_on_a_disk(runs):
    here, there = runs
    for kind in _KINDS:
        mine, theirs = here.artifact(kind).read(), there.artifact(kind).read()
        assert mine.num_rows and theirs.equals(mine), kind
        assert there.artifact(kind).stage().identity == here.artifact(kind).stage().identity, kind


def test_the_model_is_the_same(runs, tmp_path):
    here, there = runs
    assert there.directory("train").finished() == here.directory("train").finished()
    assert there.directory("export").finished() == here.directory("export").finished()
    for name in ("train/weights/adapter_model.safetensors", "export/model/model.safetensors"):
        mine, theirs = load_file(here.local(name)), load_file(there.local(name))
        assert mine.keys() == theirs.keys()
        assert all((mine[key] == theirs[key]).all() for key in mine), name


def test_the_evaluation_is_the_same(runs):
    here, there = runs
    assert there.directory("evaluate").finished() == here.directory("evaluate").finished()
    for name in ("after.trec", "before.trec", "bm25.trec", "miner.trec"):
        assert (
            there.local(f"evaluate/{name}").read_bytes()
            == here.local(f"evaluate/{name}").read_bytes()
        )


def test_the_logs_are_there_to_their_end(runs):
    here, there = runs

    def steps(run, name):
        lines = run.local(f"train/{name}").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    for name in ("log.jsonl", "samples.jsonl"):
        assert steps(there, name) == steps(here, name)


def test_nothing_is_done_twice(remote, tiny, server):
    uri, command, _ = remote
    before = len(server.requests())
    done = command(
        "run", str(tiny[1]), "--set", f"run_dir={uri}", "--from", "generate", "--to", "export"
    )
    assert done.returncode == 0, done.stderr
    written = [one for one in server.requests()[before:] if one.startswith(("PUT", "POST"))]
    assert not any("/_commits/" in one or "/data/" in one for one in written), written


def test_commands_look_at_it_from_anywhere(remote, tmp_path, runs):
    uri, command, printed = remote
    assert f"Report: {uri}/report.html" in printed
    shown = command("status", uri).stdout
    assert re.search(r"annotate\s+│ done\s+│ 96\s", shown), shown
    assert "Nothing is stale" in command("why-stale", uri).stdout
    query_id = sorted(runs[1].artifact("samples").keys())[0]
    assert "\nsample " in command("trace", uri, query_id).stdout
    assert "closest" in command("blame", uri, "e1").stdout
    out = tmp_path / "samples.parquet"
    assert command("samples", uri, "--out", str(out)).returncode == 0 and out.is_file()
    assert command("report", uri).stdout.strip() == f"{uri}/report.html"
    report = (runs[1].place / "report.html").read().decode()
    assert "cannot be drawn" not in report and "ReasonEmbed run tiny" in report
    assert b"ReasonEmbed" in (runs[1].model_place / "README.md").read()


def test_a_training_that_was_killed_goes_on_from_the_store(remote, tiny, server, runs, tmp_path):
    """On a machine that has nothing of it any more."""
    there = runs[1]
    target = there.place.parent / "killed"
    for kind in (*_KINDS, "embeddings"):
        for child in (
            [there.place / kind] if kind != "embeddings" else (there.place / kind).children()
        ):
            child.share(target / kind if kind != "embeddings" else target / kind / child.name)
    arguments = [
        "run", str(tiny[1]), "--from", "train", "--to", "train",
        *("--set", f"run_dir={target}", "--set", "train.max_steps=60"),
        *("--set", "runtime.train.checkpoint_every=5"),
    ]  # fmt: skip

    def variables(name):
        return server.environment | {"REASONEMBED_CACHE": str(tmp_path / name)}

    snapshot = target / "train" / "checkpoints" / "checkpoint_manager_snapshot.json"
    first = start_reasonembed(*arguments, variables=variables("first"))
    while (snapshot.read() or b"").count(b"checkpoint-") == 0:
        assert first.poll() is None
        time.sleep(0.2)
    end_session(first.pid)
    first.wait()
    kept = json.loads(snapshot.read())
    before = len(server.requests())
    done = reasonembed(*arguments, variables=variables("second"), timeout_s=600)
    assert done.returncode == 0, done.stderr
    assert Run.existing(target.uri).directory("train").finished()["steps"] == 60
    [log] = [(target / "train" / "log.jsonl").read()]
    steps = [json.loads(line)["step"] for line in log.splitlines()]
    assert sorted(set(steps)) == list(range(60)) and steps.count(0) == 1, kept
    read = [one for one in server.requests()[before:] if one.startswith("GET")]
    assert any(re.search(r"checkpoint-\d+/__0_0.distcp", one) for one in read)
