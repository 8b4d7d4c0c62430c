import json
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from ray_jobs.metrics import ACTOR_STATES, METRICS
from tests.ray.metrics_driver import FAILED, ROWS, SECONDS
from tests.ray.processes import ROOT, environment

pytestmark = pytest.mark.slow  # two processes' start and Ray's interval between two reports


@pytest.fixture(scope="module")
def tiny_stage(tmp_path_factory):
    """What a tiny stage left: its folder, and the driver's stdout."""
    folder = tmp_path_factory.mktemp("metrics")
    command = [sys.executable, "-m", "tests.ray.metrics_driver", str(folder)]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def shown(tiny_stage):
    """Values of our metrics at the node's endpoint, by name and our labels."""
    ours = {label for metric in METRICS.values() for label in metric.labels}
    found = {}
    for family in parse((tiny_stage[0] / "exposed.txt").read_text()):
        for sample in family.samples:
            if sample.name.startswith("ray_reasonembed_") and "le" not in sample.labels:
                labels = {key: value for key, value in sample.labels.items() if key in ours}
                found.setdefault(sample.name, []).append((labels, sample.value))
    return found


@pytest.mark.timeout(180)
def test_a_nodes_endpoint_shows_every_metric_with_its_labels(shown):
    for name, metric in METRICS.items():
        end = "_count" if metric.kind == "histogram" else ""
        samples = shown[f"ray_{name}{end}"]
        assert all(set(labels) == set(metric.labels) for labels, _ in samples), name
        assert all(labels["run"] == "tiny" for labels, _ in samples), name


def of(shown, name, **wanted):
    return sum(v for labels, v in shown[f"ray_{name}"] if labels.items() >= wanted.items())


def test_what_is_counted_is_what_is_committed(shown):
    stage = {"run": "tiny", "stage": "rewrite"}
    assert of(shown, "reasonembed_rows_total", status="ok", **stage) == ROWS - FAILED
    assert of(shown, "reasonembed_rows_total", status="error", **stage) == FAILED
    for kind, each in (("prompt", 100), ("cached", 60), ("completion", 7)):
        assert of(shown, "reasonembed_tokens_total", kind=kind, **stage) == each * ROWS
    blocks = of(shown, "reasonembed_block_seconds_count", **stage)
    assert blocks == ROWS / 2
    assert of(shown, "reasonembed_block_seconds_sum", **stage) >= SECONDS * blocks


def test_gauges_are_the_drivers(shown):
    assert of(shown, "reasonembed_stage_rows_planned") == ROWS
    assert 0 <= of(shown, "reasonembed_stage_progress_ratio") <= 1
    states = {labels["state"] for labels, _ in shown["ray_reasonembed_pool_actors"]}
    assert states == set(ACTOR_STATES)
    assert of(shown, "reasonembed_cost_dollars", kind="planned") == 4.0


def test_the_driver_says_what_its_actors_have_counted(tiny_stage):
    folder, stdout = tiny_stage
    lines = [json.loads(line) for line in stdout.splitlines() if line.startswith("{")]
    last = lines[-1]
    assert (last["done"], last["planned"], last["is_last"]) == (ROWS, ROWS, True)
    assert last["tokens"] == {"prompt": 800, "cached": 480, "completion": 56}
    assert last["failed"] == {"error": FAILED}
    assert json.loads((folder / "driver.json").read_text()) == {"most_actors": 1}


def test_workers_log_what_they_commit_without_its_texts(tiny_stage):
    text = (tiny_stage[0] / "workers.txt").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert "of a user" not in text
    assert {(line["run"], line["stage"]) for line in lines} == {("tiny", "rewrite")}
    blocks = [line for line in lines if line["message"] == "block committed"]
    assert len(blocks) == ROWS / 2 and sum(line["rows"].get("error", 0) for line in blocks) == 2
    assert any(line["message"] == "actor ready" for line in lines)
