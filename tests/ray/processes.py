"""The product in processes of its own, as users start it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def start(
    *command: str, variables: dict[str, str] | None = None, **streams: Any
) -> subprocess.Popen[str]:
    """Starts a command as the leader of a session, so that all that it starts can be ended."""
    surroundings = environment() | (variables or {})
    return subprocess.Popen(
        command, text=True, cwd=ROOT, env=surroundings, start_new_session=True, **streams
    )


def start_reasonembed(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    return start(sys.executable, "-m", "reasonembed.cli", *arguments, **options)


def reasonembed(
    *arguments: str, timeout_s: float = 280, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs the command line to its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start_reasonembed(*arguments, variables=variables, **pipes) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            end_session(process.pid)
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def end_session(leader: int) -> None:
    """Ends what is left of a session, so that the next one starts on a still machine.

    Ray's workers die with their driver on their own; its dashboard agents outlive it for a while.
    """
    for _ in range(50):
        members = _session_members(leader)
        if not members:
            return
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    raise AssertionError(f"processes {members} do not die")


def _session_members(leader: int) -> list[int]:
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            if os.getsid(int(entry.name)) == leader and state != "Z":
                members.append(int(entry.name))
    return members


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
