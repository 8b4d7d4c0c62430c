"""The pipeline as a submitted job on a local head node."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reasonembed.run import Run
from tests.ray.processes import ROOT, end_session, environment, free_ports
from tests.ray.tiny_run import write_config

RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head(tmp_path_factory):
    """A head node of its own (never `ray stop`: that ends every Ray on the machine)."""
    port, dashboard, agent = free_ports(3)
    # Unix sockets lie below it, and their paths must stay under 108 characters.
    folder = Path("/tmp") / f"re-{os.getpid()}"
    surroundings = environment() | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    node = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=4"),
            *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            f"--dashboard-agent-listen-port={agent}",
            *("--object-store-memory=200000000", f"--temp-dir={folder}"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=surroundings,
        start_new_session=True,
    )
    yield f"http://127.0.0.1:{dashboard}", surroundings
    node.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        node.wait(timeout=5)
    end_session(node.pid)


def submit(address, surroundings, *entrypoint):
    command = [RAY, "job", "submit", "--address", address, "--working-dir", str(ROOT)]
    excluded = '{"excludes": [".venv", ".git", "runs", "tests", "docs"]}'
    return subprocess.run(
        [*command, "--runtime-env-json", excluded, "--", *entrypoint],
        capture_output=True,
        text=True,
        env=surroundings,
        timeout=270,
    )


def wait_until_up(address, surroundings):
    for _ in range(60):
        listed = subprocess.run(
            [RAY, "job", "list", "--address", address], capture_output=True, env=surroundings
        )
        if listed.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(f"no head node at {address}: {listed.stderr.decode()[-500:]}")


@pytest.mark.timeout(330)
def test_a_submitted_pipeline_succeeds_and_a_wrong_one_fails(head, tmp_path):
    address, surroundings = head
    wait_until_up(address, surroundings)
    config = write_config(tmp_path)
    pipeline = ("python", "-m", "ray_jobs.pipeline", "--config", str(config))
    done = submit(address, surroundings, *pipeline, "--set", "train.max_steps=4")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "[12/12] evaluate" in done.stdout and "succeeded" in done.stdout.lower()
    run = Run.existing(tmp_path / "run")
    assert run.config.train.max_steps == 4
    assert run.directory("evaluate").finished()["systems"]["after"]
    assert run.artifact("queries").keys() == run.artifact("seeds").keys()

    wrong = submit(address, surroundings, *pipeline, "--set", "mine.top_k=none")
    assert wrong.returncode == 1
    assert "mine.top_k: " in wrong.stdout
