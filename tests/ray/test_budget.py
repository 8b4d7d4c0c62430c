"""Money ends a training in the middle: by a checkpoint, with its exit code, and it goes on."""

import json
import shutil

import pytest
import yaml

from reasonembed.errors import EXIT_BUDGET
from reasonembed.planner.budget import budget_of
from reasonembed.run import Run
from tests.ray.processes import reasonembed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 400
DOLLAR_A_SECOND = {"gpus": 0, "cpus": 2, "memory_gb": 8, "disk_gb": 10} | dict.fromkeys(
    ("on_demand", "spot"), 3_600.0
)


@pytest.fixture
def settings(tiny, tmp_path):
    """The tiny run up to its samples, where every second costs a dollar; the training is long."""
    folder, config, _ = tiny
    shutil.copytree(folder / "run", tmp_path / "run")
    for name in ("train", "export", "evaluate"):
        shutil.rmtree(tmp_path / "run" / name)
    prices = {
        "date": "2026-01-01",
        "currency": "USD",
        "accelerators": {},
        "shapes": {"dear": DOLLAR_A_SECOND | {"node": "dear"}},
    }
    (tmp_path / "prices.yaml").write_text(yaml.safe_dump(prices))
    return (
        *("run", str(config), "--to", "train", "--set", f"run_dir={tmp_path / 'run'}"),
        *("--set", f"train.max_steps={STEPS}", "--set", "runtime.train.checkpoint_every=1000"),
        *("--set", f"runtime.cost={{shape: dear, prices: {tmp_path / 'prices.yaml'}}}"),
    )


def test_a_training_that_the_limit_ends_goes_on_with_more(settings, tmp_path):
    run = Run.existing(tmp_path / "run")
    spent = sum(note["seconds"] for note in run.timeline())
    assert budget_of(run).limit == float("inf")
    done = reasonembed(*settings, "--max-cost", str(spent + 20))
    said = done.stdout + done.stderr
    assert done.returncode == EXIT_BUDGET, said
    assert "train ends here" in said and "run again" in said
    log = tmp_path / "run" / "train" / "log.jsonl"
    ended = len(log.read_text().splitlines())
    assert 0 < ended < STEPS
    assert (tmp_path / "run" / "train" / "checkpoints" / f"checkpoint-{ended}").is_dir()

    done = reasonembed(*settings, "--max-cost", str(spent + 100_000))
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run.existing(tmp_path / "run").directory("train").finished()["steps"] == STEPS
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(STEPS))  # none twice, for it went on where the money had ended it
