"""Hosts the embedder with Ray Serve; the app itself knows nothing of Ray."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from reasonembed.config import ServeRuntime
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
    serve.run(app, name="reasonembed", route_prefix="/")
    return f"http://{runtime.host}:{runtime.port}"


def wait_for_signal() -> None:
    """Blocks until SIGINT or SIGTERM, then takes the service down."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    serve.shutdown()
    ray.shutdown()
