"""Servers that benchmarks/serve.py measures: processes of their own, and what they cost."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI
from pydantic import BaseModel

ROOT = Path(__file__).parents[1]
MODEL = "measured"  # what requests call the model, everywhere
PATH = "/v1/embeddings"
START_S = 180
DIMENSION = 384

bare = FastAPI()
"""A route as anyone would write it, that computes nothing: the cost of the framework alone."""
_VECTOR = np.linspace(-1, 1, DIMENSION, dtype="<f4")


class _Body(BaseModel):
    model: str
    input: list[str]
    encoding_format: str = "float"


@bare.post(PATH)
async def _embeddings(body: _Body) -> dict[str, Any]:
    data = [
        {"object": "embedding", "index": i, "embedding": base64.b64encode(_VECTOR).decode()}
        for i in range(len(body.input))
    ]
    tokens = sum(len(text.split()) for text in body.input)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}


@bare.get("/readyz")
async def _ready() -> dict[str, str]:
    return {"status": "ok"}


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: Without a path.
        pid: Of the process that was started; its descendants count as well.
    """

    url: str
    pid: int

    def cpu_s(self) -> float:
        """Seconds of processor time that its processes have used."""
        return sum(_cpu_ticks(pid) for pid in _tree(self.pid)) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat after the name, which may hold anything; none where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _tree(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _cpu_ticks(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[11]) + int(fields[12]) if fields else 0


@contextlib.contextmanager
def own(settings: dict[str, Any], folder: Path, *, on_ray: bool = False) -> Iterator[Server]:
    """Ours, with fields of `ServeConfig`; in one process, or on a Ray of its own."""
    port = _free_port()
    file = folder / f"serve-{port}.yaml"
    file.write_text(json.dumps({"name": MODEL, "cache_mib": 0, **settings}))
    command = [sys.executable, "-m", "reasonembed.cli", "serve", "--config", str(file)]
    command += ["--port", str(port), *([] if on_ray else ["--in-process"])]
    with _running(command, port, ready="/readyz", log=folder / f"{port}.log") as server:
        yield server


@contextlib.contextmanager
def bare_route(folder: Path) -> Iterator[Server]:
    """The bare route under the same uvicorn."""
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "benchmarks.servers:bare", "--no-access-log"]
    command += ["--log-level", "warning", "--port", str(port)]
    with _running(command, port, ready="/readyz", log=folder / f"{port}.log") as server:
        yield server


@contextlib.contextmanager
def infinity(
    program: Path, model: Path, folder: Path, *, engine: str = "torch", batch_size: int = 32
) -> Iterator[Server]:
    """infinity-emb, as its own documentation has it for a CPU, without its cache on the disk."""
    port = _free_port()
    command = [str(program), "v2", "--model-id", str(model), "--served-model-name", MODEL]
    command += ["--engine", engine, "--device", "cpu", "--dtype", "float32"]
    command += ["--no-bettertransformer", "--no-vector-disk-cache", "--url-prefix", "/v1"]
    command += ["--batch-size", str(batch_size)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    with _running(command, port, ready="/health", log=folder / f"{port}.log") as server:
        yield server


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(command: Sequence[str], port: int, *, ready: str, log: Path) -> Iterator[Server]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",  # infinity would report to its makers
    }  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, cwd=ROOT, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(url + ready, process, log)
        yield Server(url, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: what was started here


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(log.read_text()[-2_000:])
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        time.sleep(0.3)
    raise RuntimeError(f"not ready after {START_S} s: {log.read_text()[-2_000:]}")


def body_of(texts: Sequence[str], *, encoding: str = "base64") -> bytes:
    """A request."""
    asked = {"model": MODEL, "input": list(texts), "encoding_format": encoding}
    return json.dumps(asked).encode()


def vectors(server: Server, texts: Sequence[str]) -> np.ndarray:
    """What a server gives, float32 [N, D]."""
    [answer] = asyncio.run(_exchange(server, [body_of(texts, encoding="float")], 1))
    return np.float32([one["embedding"] for one in json.loads(answer)["data"]])


def closed_loop(server: Server, bodies: Sequence[bytes], *, concurrency: int) -> float:
    """Seconds until all are answered, with so many under way at any time."""
    began = time.perf_counter()
    asyncio.run(_exchange(server, bodies, concurrency))
    return time.perf_counter() - began


async def _exchange(server: Server, bodies: Sequence[bytes], concurrency: int) -> list[bytes]:
    import aiohttp

    answers = [b""] * len(bodies)
    numbers = iter(range(len(bodies)))
    headers = {"Content-Type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(server.url, headers=headers, timeout=timeout) as session:

        async def work() -> None:
            for number in numbers:
                async with session.post(PATH, data=bodies[number]) as answer:
                    answers[number] = await answer.read()
                    assert answer.status == 200, answers[number][:300]

        await asyncio.gather(*(work() for _ in range(concurrency)))
    return answers
