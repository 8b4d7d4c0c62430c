"""The pipeline as a job that Ray's own command submits to a local head node."""

import pytest

from reasonembed.run import Run
from tests.ray.processes import ROOT
from tests.ray.tiny_run import write_config


def submit(head, *entrypoint):
    where = ("--address", head.url, "--working-dir", str(ROOT))
    environment = ("--runtime-env", str(ROOT / "cluster/runtime-env/image.yaml"))
    return head.ray("job", "submit", *where, *environment, "--", *entrypoint)


@pytest.mark.timeout(330)
def test_a_submitted_pipeline_succeeds_and_a_wrong_one_fails(head, tmp_path):
    config = write_config(tmp_path)
    pipeline = ("python", "-m", "ray_jobs.pipeline", "--config", str(config))
    done = submit(head, *pipeline, "--set", "train.max_steps=4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "[12/12] evaluate" in done.stdout and "succeeded" in done.stdout.lower()
    run = Run.existing(tmp_path / "run")
    assert run.config.train.max_steps == 4
    assert run.directory("evaluate").finished()["systems"]["after"]
    assert run.artifact("queries").keys() == run.artifact("seeds").keys()

    wrong = submit(head, *pipeline, "--set", "mine.top_k=none")
    assert wrong.returncode == 1
    assert "mine.top_k: " in wrong.stdout
