"""Servers as users start them: processes of the environment that the service is installed in."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("REASONEMBED_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
"""Of the environment with the service; tests/clients runs in that of the clients."""
_START_S = 120.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Without a path.
        model: What requests call its model.
        key: That it asks for.
    """

    url: str
    model: str
    key: str = "unused"

    @property
    def openai_url(self) -> str:
        """Base of OpenAI's protocol."""
        return f"{self.url}/v1"


def environment() -> dict[str, str]:
    """Of the service's processes: this checkout's code, and nothing from the network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def reasonembed(*arguments: str) -> str:
    """What a command of ours prints."""
    done = subprocess.run(
        [PYTHON, "-m", "reasonembed.cli", *arguments],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextlib.contextmanager
def serving(
    settings: dict[str, Any], folder: Path, *, model: str, key: str = "unused"
) -> Iterator[Server]:
    """A server that has embedded its first text; it must end well when told to.

    Args:
        settings: Fields of `ServeConfig`; JSON is YAML.
        folder: For its settings and its log.
        model: What requests call it.
        key: That it asks for.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    file, log = folder / "serve.yaml", folder / "serve.log"
    file.write_text(json.dumps(settings))
    command: Sequence[str] = (
        PYTHON, "-m", "reasonembed.cli", "serve", "--in-process",
        "--config", str(file), "--port", str(port),
    )  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment())
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(f"{url}/readyz", process, log)
        yield Server(url, model, key)
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError),
            urllib.request.urlopen(url, timeout=5) as answer,
        ):
            assert answer.status == 200
            return
        time.sleep(0.2)
    raise TimeoutError(log.read_text())
