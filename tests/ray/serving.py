"""Ray Serve in the process of the test."""

import contextlib
import os
from collections.abc import Iterator

import ray
from ray import serve
from ray_jobs.job import join_or_start
from ray_jobs.serve import SURROUNDINGS
from reasonembed.config import RuntimeConfig
from tests.ray.processes import ROOT


@contextlib.contextmanager
def serve_here(*, logical_cpus: int, object_store_bytes: int) -> Iterator[None]:
    """A Ray of this process, as the service starts it."""
    before = dict(os.environ)
    os.environ.update(SURROUNDINGS, PYTHONPATH=str(ROOT), HF_HUB_OFFLINE="1")
    join_or_start(RuntimeConfig(logical_cpus=logical_cpus, object_store_bytes=object_store_bytes))
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()
        os.environ.clear()
        os.environ.update(before)
