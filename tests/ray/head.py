"""A head node of its own (never `ray stop`: that ends every Ray on the machine)."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.ray.processes import ROOT, end_session, environment, free_ports

RAY = str(Path(sys.executable).with_name("ray"))
_OWN = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True)
class Head:
    """Where it is, and what its clients need in their environment."""

    url: str
    gcs: str
    surroundings: dict[str, str]

    def ray(self, *arguments: str, timeout_s: float = 270) -> subprocess.CompletedProcess[str]:
        """Ray's own command line."""
        return subprocess.run(
            [RAY, *arguments],
            capture_output=True,
            text=True,
            env=self.surroundings,
            cwd=ROOT,
            timeout=timeout_s,
        )


@contextlib.contextmanager
def started() -> Iterator[Head]:
    port, dashboard, agent = free_ports(3)
    # Unix sockets lie below it, and their paths must stay under 108 characters.
    folder = Path("/tmp") / f"re-{os.getpid()}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = environment() | _OWN | {"PATH": path}
    node = subprocess.Popen(
        [
            *(RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=4"),
            *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            f"--dashboard-agent-listen-port={agent}",
            *("--object-store-memory=200000000", f"--temp-dir={folder}"),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
        env=surroundings,
        start_new_session=True,
    )
    head = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", surroundings)
    try:
        _wait_until_up(head)
        yield head
    finally:
        node.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            node.wait(timeout=5)
        end_session(node.pid)


def _wait_until_up(head: Head) -> None:
    for _ in range(60):
        listed = head.ray("job", "list", "--address", head.url)
        if listed.returncode == 0:
            return
        time.sleep(1)
    raise AssertionError(f"no head node at {head.url}: {listed.stderr[-500:]}")
