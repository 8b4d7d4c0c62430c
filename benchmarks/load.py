"""Open-loop load: requests leave when they are due, whether or not earlier ones were answered.

A client that waits for its answers before it asks again slows down with the server and so never
sees a queue ("coordinated omission"). Here arrivals are a Poisson process, and a latency counts
from the moment at which the request was to be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np


@dataclass(frozen=True)
class Call:
    """A request to send.

    Attributes:
        path: Such as `/v1/embeddings`.
        body: JSON.
        kind: To tell apart what is mixed, such as short and long texts.
        tokens: What an answer is worth, for the goodput.
    """

    path: str
    body: bytes
    kind: str = ""
    tokens: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a call; times in seconds since the load began.

    Attributes:
        call: The request.
        due_s: When it was to be sent.
        done_s: When its answer was there.
        status: HTTP status; 0 where there was no answer.
        retry_after: The header, if the answer had it.
        error: Why there was no answer, or the beginning of an answer that is not 200.
    """

    call: Call
    due_s: float
    done_s: float
    status: int
    retry_after: str | None = None
    error: str = ""

    @property
    def latency_s(self) -> float:
        """From the intended sending to the whole answer."""
        return self.done_s - self.due_s


@dataclass(frozen=True)
class Summary:
    """Outcomes of one load, those with status 200 told apart.

    Attributes:
        statuses: Answers by status.
        requests_per_s: With status 200, over the time in which load was sent.
        tokens_per_s: Theirs.
        p50_s: Median latency of theirs; NaN without any.
        p95_s: As above.
        p99_s: As above.
        late_s: 99th percentile of how late requests left; the generator itself was overloaded
            where this is not small.
    """

    statuses: dict[int, int]
    requests_per_s: float
    tokens_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    late_s: float = 0.0


def arrivals(rate: float, duration_s: float, *, seed: int) -> list[float]:
    """Times of a Poisson process with `rate` events a second."""
    draw = random.Random(seed)
    times, now = [], draw.expovariate(rate)
    while now < duration_s:
        times.append(now)
        now += draw.expovariate(rate)
    return times


class Load:
    """A running load, so that a test can do something to the server meanwhile.

    Args:
        base_url: Of the service.
        make: The call of each number.
        rate: Requests a second.
        duration_s: How long requests are sent.
        seed: Of the arrivals.
        headers: Of every request.
        timeout_s: After which an answer is given up.
    """

    def __init__(
        self,
        base_url: str,
        make: Callable[[int], Call],
        *,
        rate: float,
        duration_s: float,
        seed: int = 0,
        headers: dict[str, str] | None = None,
        timeout_s: float = 120.0,
    ) -> None:
        self._base_url, self._make = base_url, make
        self._times = arrivals(rate, duration_s, seed=seed)
        self._duration_s, self._timeout_s = duration_s, timeout_s
        self._headers = {"Content-Type": "application/json"} | (headers or {})
        self._late: list[float] = []
        self.outcomes: list[Outcome] = []

    async def run(self) -> Summary:
        """Sends everything and waits for the last answer."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=self._timeout_s)
        async with aiohttp.ClientSession(
            self._base_url, connector=connector, timeout=timeout, headers=self._headers
        ) as session:
            start = time.monotonic()
            tasks = []
            for number, due in enumerate(self._times):
                wait = start + due - time.monotonic()
                if wait > 0:
                    await asyncio.sleep(wait)
                self._late.append(time.monotonic() - start - due)
                tasks.append(asyncio.create_task(self._send(session, number, due, start)))
            await asyncio.gather(*tasks)
        return self.summary()

    def summary(self, kind: str | None = None) -> Summary:
        """Of all outcomes so far, or those of one kind."""
        chosen = [one for one in self.outcomes if kind is None or one.call.kind == kind]
        late = float(np.percentile(self._late, 99)) if self._late else 0.0
        return summarise(chosen, duration_s=self._duration_s, late_s=late)

    async def _send(
        self, session: aiohttp.ClientSession, number: int, due: float, start: float
    ) -> None:
        call = self._make(number)
        status, retry_after, error = 0, None, ""
        try:
            async with session.post(call.path, data=call.body) as answer:
                body = await answer.read()
                status, retry_after = answer.status, answer.headers.get("Retry-After")
                error = "" if status == 200 else body[:300].decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        done = time.monotonic() - start
        self.outcomes.append(Outcome(call, due, done, status, retry_after, error))


def summarise(outcomes: Sequence[Outcome], *, duration_s: float, late_s: float = 0.0) -> Summary:
    """Counts, rates and percentiles.

    Answers that came after the sending had ended count as well: they were admitted under load.
    Rates are therefore over the time until the last answer.
    """
    good = [one for one in outcomes if one.status == 200]
    over = max([duration_s, *(one.done_s for one in good)])
    latencies = [one.latency_s for one in good]
    p50, p95, p99 = (
        (float(value) for value in np.percentile(latencies, (50, 95, 99)))
        if latencies
        else (float("nan"),) * 3
    )
    return Summary(
        statuses=dict(Counter(one.status for one in outcomes)),
        requests_per_s=len(good) / over,
        tokens_per_s=sum(one.call.tokens for one in good) / over,
        p50_s=p50,
        p95_s=p95,
        p99_s=p99,
        late_s=late_s,
    )


def run(load: Load) -> Summary:
    """Runs a load from code that is not asynchronous; on uvloop where that is installed."""
    with contextlib.suppress(ImportError):
        import uvloop

        return uvloop.run(load.run())
    return asyncio.run(load.run())
