"""An S3 server for tests: moto's, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs

from tests.ray.processes import free_ports

BUCKET = "bucket"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_DEFAULT_REGION": "us-east-1",
}


@dataclass(frozen=True)
class Server:
    """A running server, with a bucket."""

    port: int
    log: Path

    @property
    def query(self) -> str:
        return f"?endpoint_override=localhost:{self.port}&scheme=http"

    @property
    def environment(self) -> dict[str, str]:
        """For processes that are not told by the URI."""
        return KEYS | {"AWS_ENDPOINT_URL": f"http://localhost:{self.port}"}

    def uri(self, path: str, *, bucket: str = BUCKET) -> str:
        return f"s3://{bucket}/{path}{self.query}"

    def requests(self) -> list[str]:
        """`PUT /bucket/key`, … so far."""
        lines = _COLOUR.sub("", self.log.read_text(errors="replace")).splitlines()
        return [line.split('"')[1] for line in lines if "HTTP/1.1" in line]


@contextlib.contextmanager
def serving(folder: Path, **variables: str) -> Iterator[Server]:
    """Starts a server; its requests are noted in a file in `folder`."""
    assert importlib.util.find_spec("moto"), "tests need moto[server]"
    [port] = free_ports(1)
    log = folder / f"s3-{port}.log"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as stream:
        surroundings = {**os.environ, **KEYS, **variables}
        process = subprocess.Popen(
            command, stdout=stream, stderr=subprocess.STDOUT, env=surroundings
        )
    try:
        _wait(port, process, log)
        yield Server(port, log)
    finally:
        process.kill()
        process.wait()


def make_bucket(server: Server, name: str = BUCKET) -> None:
    store = pafs.S3FileSystem(
        endpoint_override=f"localhost:{server.port}",
        scheme="http",
        region="us-east-1",
        access_key="test",
        secret_key="test",
        allow_bucket_creation=True,
    )
    store.create_dir(name)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        if process.poll() is not None:
            break
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5)
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text(errors="replace")[-2000:])
