import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ray.tiny_run import write_config

ROOT = Path(__file__).parents[2]


def reasonembed(*arguments: str, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "reasonembed.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment(),
        cwd=ROOT,
    )


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A finished tiny run: folder with `tiny.yaml` and `run/`, and what the command printed."""
    folder = tmp_path_factory.mktemp("tiny")
    config = write_config(folder)
    done = reasonembed("run", str(config))
    assert done.returncode == 0, done.stdout + done.stderr + _log(folder)
    return folder, config, done.stdout


def _log(folder: Path) -> str:
    log = folder / "run" / "logs" / "ray.log"
    return log.read_text(errors="replace")[-5000:] if log.is_file() else ""
