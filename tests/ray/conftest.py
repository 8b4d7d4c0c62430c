from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ray.head import Head, started
from tests.ray.processes import reasonembed
from tests.ray.tiny_run import write_config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A finished tiny run: folder with `tiny.yaml` and `run/`, and what the command printed."""
    folder = tmp_path_factory.mktemp("tiny")
    config = write_config(folder)
    done = reasonembed("run", str(config))
    assert done.returncode == 0, done.stdout + done.stderr + _log(folder)
    return folder, config, done.stdout


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head node with a dashboard, for jobs."""
    with started() as node:
        yield node


def _log(folder: Path) -> str:
    log = folder / "run" / "logs" / "ray.log"
    return log.read_text(errors="replace")[-5000:] if log.is_file() else ""
