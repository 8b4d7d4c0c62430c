"""Hosts the embedder with Ray Serve; the app itself knows nothing of Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from ray_jobs.job import join_or_start
from reasonembed import tasks
from reasonembed.config import RuntimeConfig, ServeRuntime
from reasonembed.embedder.contract import CONTRACT_FILE
from reasonembed.errors import ModelError
from reasonembed.run import Run
from reasonembed.serving.app import create_app
from reasonembed.serving.backend import EmbedderBackend
from reasonembed.serving.batching import MicroBatcher


def _build_app(model_dir: str, *, name: str, instruction: str, runtime: dict[str, Any]) -> FastAPI:
    settings = ServeRuntime.model_validate(runtime)
    backend = EmbedderBackend.load_export(
        Path(model_dir), default_instruction=instruction, threads=settings.threads
    )
    batcher = MicroBatcher(
        backend.embed, max_texts=settings.max_batch_texts, wait_s=settings.batch_wait_s
    )
    return create_app(batcher.embed, backend.describe(name))


def build(
    model_dir: Path, *, name: str, instruction: str, runtime: ServeRuntime
) -> serve.Application:
    """A Serve application over an exported model; the model is loaded in the replica."""

    @serve.deployment(
        num_replicas=runtime.num_replicas,
        max_ongoing_requests=256,
        ray_actor_options={"num_cpus": 1, "num_gpus": runtime.num_gpus},
    )
    @serve.ingress(
        lambda: _build_app(
            str(model_dir.absolute()),
            name=name,
            instruction=instruction,
            runtime=runtime.model_dump(mode="json"),
        )
    )
    class Embedding:
        """One replica: one model."""

    return Embedding.bind()


def start(model_dir: Path, *, name: str, instruction: str, runtime: ServeRuntime) -> str:
    """Starts the service on the joined Ray and returns its base URL."""
    serve.start(
        http_options={"host": runtime.host, "port": runtime.port},
        logging_config={"enable_access_log": False},
    )
    app = build(model_dir, name=name, instruction=instruction, runtime=runtime)
    serve.run(app, name=name, route_prefix="/")
    return f"http://{runtime.host}:{runtime.port}"


def serve_model(
    target: Path, *, host: str | None, port: int | None, say: Callable[[str], None]
) -> None:
    """Serves a run's exported model, or an export, until SIGINT or SIGTERM.

    Raises:
        ModelError: There is no exported model.
    """
    model_dir, name, instruction, runtime = _target(target)
    chosen = runtime.model_copy(update={"host": host or runtime.host, "port": port or runtime.port})
    join_or_start(RuntimeConfig())
    try:
        url = start(model_dir, name=name, instruction=instruction, runtime=chosen)
        say(f"{name} at {url} - try:")
        body = json.dumps({"model": name, "input": "why is it shared?", "input_type": "query"})
        say(f"  curl {url}/v1/embeddings -H 'Content-Type: application/json' -d '{body}'")
        say("Ctrl-C ends it.")
        _wait_for_signal()
    finally:
        if os.environ.get("RAY_ADDRESS"):
            serve.delete(name)  # other applications of the cluster are none of our business
        else:
            serve.shutdown()
        ray.shutdown()


def _target(target: Path) -> tuple[Path, str, str, ServeRuntime]:
    """Model folder, served name, query instruction and settings of a run or an export."""
    if (target / "config.resolved.yaml").is_file():
        run = Run.existing(target)
        if not run.model_dir.is_dir():
            raise ModelError(f"{target} has no exported model yet; run it to the stage `export`")
        return run.model_dir, run.dir.name, run.instruction, run.config.runtime.serve
    if not (target / CONTRACT_FILE).is_file():
        raise ModelError(f"{target} is neither a run nor an exported model")
    return target, target.name, tasks.get("generic").instruction, ServeRuntime()


def _wait_for_signal() -> None:
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
