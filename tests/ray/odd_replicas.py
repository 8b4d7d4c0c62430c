"""Replicas that misbehave; in a module of their own, which Ray's workers import."""

import asyncio
import time
from typing import Any

from ray_jobs.serve_replicas import EmbedderReplica
from reasonembed.serving.protocol import Prepared, Vectors


class SlowEmbedder(EmbedderReplica):
    """Takes its time to load."""

    async def __init__(self, settings: dict[str, Any]) -> None:
        await asyncio.sleep(5)
        await super().__init__(settings)


class StallingEmbedder(EmbedderReplica):
    """Never comes back from a text of many tokens, though it measured another speed."""

    async def __init__(self, settings: dict[str, Any]) -> None:
        await super().__init__(settings)
        forward = self._batcher._forward

        def stall(inputs: list[Prepared]) -> Vectors:
            if max(len(one.ids) for one in inputs) > 100:
                time.sleep(60)
            return forward(inputs)

        self._batcher._forward = stall
