"""Batches shared among requests, in one event loop and without Ray."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from dataclasses import dataclass

from reasonembed.serving.protocol import Embed, EmbedItem, ItemError, Outcome

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Waiting:
    item: EmbedItem
    outcome: asyncio.Future[Outcome]
    since_s: float


class MicroBatcher:
    """Puts the items of concurrent requests into common batches, one batch at a time.

    An item that makes a batch fail is found by halving, so that it fails alone. Items of a request
    that was given up before its batch began are not computed.

    Args:
        embed: Embeds a batch.
        max_texts: Items a batch; larger requests are split.
        wait_s: How long the oldest item waits for company before a batch that is not full begins.
    """

    def __init__(self, embed: Embed, *, max_texts: int, wait_s: float) -> None:
        if max_texts < 1 or wait_s < 0:
            raise ValueError(f"need max_texts >= 1 and wait_s >= 0, got {max_texts} and {wait_s}")
        self._embed, self._max_texts, self._wait_s = embed, max_texts, wait_s
        self._queue: deque[_Waiting] = deque()
        self._worker: asyncio.Task[None] | None = None

    async def embed(self, items: list[EmbedItem]) -> list[Outcome]:
        """One outcome an item, in order; a failure of the model is an `ItemError`."""
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(item, loop.create_future(), loop.time()) for item in items]
        self._queue.extend(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._run())
        return await asyncio.gather(*(one.outcome for one in waiting))

    async def _run(self) -> None:
        """Works until nothing waits; the next request starts a new worker."""
        while self._queue:
            if len(self._queue) < self._max_texts:
                waited_s = asyncio.get_running_loop().time() - self._queue[0].since_s
                await asyncio.sleep(max(0.0, self._wait_s - waited_s))
            batch = self._next_batch()
            outcomes = await self._isolate([one.item for one in batch])
            for one, outcome in zip(batch, outcomes, strict=True):
                if not one.outcome.done():
                    one.outcome.set_result(outcome)

    def _next_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._queue and len(batch) < self._max_texts:
            one = self._queue.popleft()
            if not one.outcome.done():  # done already: the request was cancelled
                batch.append(one)
        return batch

    async def _isolate(self, items: list[EmbedItem]) -> list[Outcome]:
        if not items:
            return []
        try:
            outcomes = await self._embed(items)
            if len(outcomes) != len(items):
                raise RuntimeError(f"{len(outcomes)} outcomes for {len(items)} items")
            return outcomes
        except Exception:  # the boundary to the model: whatever it raises becomes an answer
            if len(items) == 1:
                log.exception("the model failed on one input")
                return [ItemError("the model failed on this input", is_callers_fault=False)]
        middle = len(items) // 2
        return [*await self._isolate(items[:middle]), *await self._isolate(items[middle:])]
