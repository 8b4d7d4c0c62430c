"""Whether vectors can be had now: requests show it, and where there are none, a short text does.

The probe takes the way of every request but for the cache and the bound of the queue, so that it
tells a stalled model from a busy one: short texts go first.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Literal

from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import EmbedItem, ItemError, Prepared
from reasonembed.serving.service import EmbeddingService

log = logging.getLogger(__name__)

State = Literal["ok", "starting", "stalled"]
_EVERY_S = 5.0


class Readiness:
    """Watches an embedder.

    Args:
        embeddings: Of whose requests the newest vector counts.
        stall_s: Without a vector for so long, the embedder counts as stalled; see
            `protocol.stalled_after`.
        metrics: Where the probe's forward passes, and those reported with it, are noted.
        clock: Seconds; that of `embeddings`.
    """

    def __init__(
        self,
        embeddings: EmbeddingService,
        *,
        stall_s: float,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._embeddings, self._stall_s, self._clock = embeddings, stall_s, clock
        self._metrics = metrics
        self._every_s = min(_EVERY_S, stall_s / 3)
        self._probed: float | None = None

    def state(self) -> tuple[State, str | None]:
        """How it stands, and what there is to say of it."""
        age_s = self._age_s()
        if age_s is None:
            return "starting", "no text has been embedded yet"
        if age_s > self._stall_s:
            return "stalled", f"no text has been embedded for {age_s:.0f} s"
        return "ok", None

    async def watch(self) -> None:
        """Probes until it is cancelled."""
        while True:
            age_s = self._age_s()
            if age_s is None or age_s >= self._every_s:
                await self.probe()
            # Before the first vector, somebody waits for it.
            await asyncio.sleep(self._every_s / (1 if self._age_s() is not None else 10))

    async def probe(self) -> None:
        """Embeds the probe once; a failure is logged, and the state tells of it by its age."""
        try:
            prepare = self._embeddings.preparer.prepare
            [prepared] = await asyncio.to_thread(prepare, [EmbedItem("ready?")])
            answer = await asyncio.wait_for(self._forward(prepared), self._stall_s)
        except Exception as error:  # a watch that ends would say "stalled" for ever
            log.warning("the probe was not embedded: %s: %s", type(error).__name__, error)
            return
        if answer is not None:
            log.warning("the probe was not embedded: %s", answer)
            return
        self._probed = self._clock()

    async def _forward(self, prepared: Prepared | ItemError) -> str | None:
        """Why there is no vector."""
        if isinstance(prepared, ItemError):
            return prepared.message
        answer = await self._embeddings.embedder.embed([prepared], flow="probe")
        self._metrics.took_part(answer.batches)
        return answer.failed.get(0)

    def _age_s(self) -> float | None:
        """Of the newest vector."""
        newest = [one for one in (self._probed, self._embeddings.last_success) if one is not None]
        return self._clock() - max(newest) if newest else None
