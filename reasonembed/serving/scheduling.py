"""Batches of a replica: what waits goes through the model by tokens, fairly, without a timer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import numpy.typing as npt

from reasonembed.serving.protocol import (
    BatchStats,
    Forwarded,
    Prepared,
    TokenIds,
    Unavailable,
    Vectors,
)
from reasonembed.serving.queueing import FairQueue, Waiting
from reasonembed.serving.speed import PassSpeed

log = logging.getLogger(__name__)

LANE = "forward"
"""What names of the threads begin with that forward passes run in."""
FAILED = "the model failed on this input"
NOT_FINITE = "the model gave values that are not finite for this input"
BROKEN = "the model fails on every input"
BROKEN_AT = 8
"""Inputs that failed alone, one after another without a success between, from which the fault is
taken for the model's and not for theirs."""
_MAX_UNREPORTED = 1_024  # passes whose callers are all gone are reported to nobody


@dataclass(frozen=True)
class BatcherStatus:
    """What a replica is doing; durations, so that another process may read them.

    Attributes:
        since_success_s: Since the last forward pass that succeeded; None before the first.
        running_s: Of the forward pass that has been running for longest; 0 where none runs.
        queued_tokens: That wait; those in a forward pass are not counted.
        tokens_per_s: Measured while there was enough to do; see `PassSpeed`.
        busy_lanes: Forward passes that run.
        lanes: That may run at once.
        dropped_inputs: That were never computed because their callers were gone.
        failed_inputs: That failed alone since a forward pass succeeded.
    """

    since_success_s: float | None
    running_s: float
    queued_tokens: int
    tokens_per_s: float
    busy_lanes: int
    lanes: int
    dropped_inputs: int
    failed_inputs: int = 0

    @property
    def is_broken(self) -> bool:
        """Whether the model fails whatever it is given; another replica should take its place."""
        return self.failed_inputs >= BROKEN_AT


@dataclass(eq=False)
class _Call:
    """One call of `embed` and what is known of its answer."""

    size: int
    since: float
    answer: asyncio.Future[Forwarded]
    vectors_ND: Vectors | None = None
    failed: dict[int, str] = field(default_factory=dict)
    num_done: int = 0
    queue_s: float = 0.0
    forward_s: float = 0.0

    def take(self, position: int, vector_D: Vectors) -> None:
        if self.vectors_ND is None:
            self.vectors_ND = np.zeros((self.size, len(vector_D)), np.float32)
        self.vectors_ND[position] = vector_D
        self.num_done += 1

    def fail(self, position: int, reason: str) -> None:
        self.failed[position] = reason
        self.num_done += 1


@dataclass(slots=True, eq=False)
class _Text(Waiting):
    """An input of a call."""

    prepared: Prepared
    call: _Call
    position: int


@dataclass(frozen=True)
class _Pass:
    """A forward pass: what the model gave, and for which rows it can be used."""

    vectors_ND: Vectors
    is_finite_N: npt.NDArray[np.bool_]
    stats: BatchStats


class TokenBatcher:
    """Shares a model's lanes among calls; a `TextEmbedder` of one event loop.

    A lane that is free takes what there is and waits for no company. Where calls wait, `FairQueue`
    says who is next: a short text beside bulk requests waits at most for the passes that run, each
    of at most `batch_tokens` padded tokens or one longer text, and for its own.

    A batch that fails is halved until the input at fault fails alone; the halves line up again, so
    they hold nobody up. Where `BROKEN_AT` inputs in a row fail alone, calls end as `Unavailable`
    until a pass succeeds. Inputs of a cancelled call that wait are never computed.

    Args:
        forward: Vectors [N, D] of N inputs, one row an input; called in `lanes` threads at once.
        lanes: Forward passes at once.
        batch_tokens: Padded tokens of a pass, inputs x the longest one; a longer text goes alone.
        short_tokens: Texts up to this length never share a pass with longer ones.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        forward: Callable[[list[Prepared]], Vectors],
        *,
        lanes: int,
        batch_tokens: int,
        short_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if lanes < 1:
            raise ValueError(f"need lanes >= 1, got {lanes}")
        self._forward, self._lanes, self._clock = forward, lanes, clock
        self._batch_tokens, self._short_tokens = batch_tokens, short_tokens
        self._queue = FairQueue[_Text](batch_tokens=batch_tokens, short_tokens=short_tokens)
        self._speed = PassSpeed(lanes)
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix=LANE)
        self._running: dict[int, float] = {}  # number of a pass to when it began
        self._full: set[int] = set()  # of those, which began with all lanes busy and more waiting
        self._num_passes = 0
        self._calls: set[_Call] = set()
        self._unreported: deque[BatchStats] = deque(maxlen=_MAX_UNREPORTED)
        self._last_success: float | None = None
        self._num_dropped = self._num_failed = self._dimension = 0
        self._is_woken = self._is_closed = False

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        """See `TextEmbedder.embed`.

        Rows have no columns where every input failed and nothing has succeeded before.

        Raises:
            ValueError: There is no input, or one without tokens.
            Unavailable: The batcher was closed, or the model fails on every input.
        """
        if not inputs or not all(one.ids for one in inputs):
            raise ValueError("need at least one input, and at least one token in each")
        if self._is_closed:
            raise Unavailable("the model is being shut down")
        call = _Call(len(inputs), self._clock(), asyncio.get_running_loop().create_future())
        texts = [_Text(len(one.ids), one, call, i) for i, one in enumerate(inputs)]
        self._calls.add(call)
        self._queue.put(texts, flow=flow)
        self._wake()
        try:
            return await call.answer
        finally:
            self._calls.discard(call)
            self._num_dropped += self._queue.drop(texts)

    def status(self) -> BatcherStatus:
        """What it is doing."""
        now = self._clock()
        return BatcherStatus(
            since_success_s=None if self._last_success is None else now - self._last_success,
            running_s=max((now - since for since in self._running.values()), default=0.0),
            queued_tokens=self._queue.tokens,
            tokens_per_s=self._speed.tokens_per_s,
            busy_lanes=len(self._running),
            lanes=self._lanes,
            dropped_inputs=self._num_dropped,
            failed_inputs=self._num_failed,
        )

    async def close(self, *, waits: bool = True) -> None:
        """Refuses calls, those that wait included.

        Args:
            waits: Until the running passes have ended.
        """
        self._is_closed = True
        for call in self._calls:
            if not call.answer.done():
                call.answer.set_exception(Unavailable("the model is being shut down"))
        await asyncio.to_thread(self._pool.shutdown, wait=waits, cancel_futures=True)

    def _wake(self) -> None:
        """Fills free lanes when this turn of the loop is over, so that what came in it can share.

        That is no wait: the loop does nothing in between but hand over other calls.
        """
        if not self._is_woken:
            self._is_woken = True
            asyncio.get_running_loop().call_soon(self._fill)

    def _fill(self) -> None:
        self._is_woken = False
        started: list[int] = []
        while not self._is_closed and (free := self._lanes - len(self._running)):
            # What waits is spread over the free lanes, though not thinner than a pass is worth.
            share = None
            if free > 1:
                share = max(self._short_tokens, math.ceil(self._queue.tokens / free))
            batch = self._queue.pick(at_most=share)
            if not batch:
                break
            started.append(self._start(batch))
        if len(self._running) == self._lanes and self._queue.tokens:
            self._full.update(started)

    def _start(self, batch: list[_Text]) -> int:
        """Sends the distinct inputs of a batch through the model; returns the pass's number."""
        rows: dict[tuple[TokenIds, int], int] = {}
        keys = [(text.prepared.ids, text.prepared.skip) for text in batch]
        row_of = [rows.setdefault(key, len(rows)) for key in keys]
        inputs = [Prepared(ids, skip) for ids, skip in rows]
        self._num_passes += 1
        number, self._running[self._num_passes] = self._num_passes, self._clock()
        loop = asyncio.get_running_loop()
        ended = loop.run_in_executor(self._pool, self._compute, inputs)
        ended.add_done_callback(partial(self._ended, number, batch, row_of))
        return number

    def _compute(self, inputs: list[Prepared]) -> _Pass | Exception:
        """A forward pass, in a lane's thread; what it raises is an answer as well."""
        began = self._clock()
        try:
            vectors = np.asarray(self._forward(inputs), dtype=np.float32)
        except Exception as error:  # logged by whoever finds the input at fault
            return error
        if vectors.ndim != 2 or len(vectors) != len(inputs):
            return ValueError(f"the model gave shape {vectors.shape} for {len(inputs)} inputs")
        lengths = [len(one.ids) for one in inputs]
        stats = BatchStats(
            texts=len(inputs),
            tokens=sum(lengths),
            padded_tokens=len(inputs) * max(lengths),
            budget_tokens=self._batch_tokens,
            seconds=self._clock() - began,
        )
        return _Pass(vectors, np.logical_and.reduce(np.isfinite(vectors), axis=1), stats)

    def _ended(
        self,
        number: int,
        batch: list[_Text],
        row_of: list[int],
        done: asyncio.Future[_Pass | Exception],
    ) -> None:
        began, is_full = self._running.pop(number), number in self._full
        self._full.discard(number)
        if done.cancelled():  # closed before a thread took it up
            return
        outcome = done.exception() or done.result()
        if isinstance(outcome, _Pass):
            self._speed.took(outcome.stats.tokens, outcome.stats.seconds, is_full=is_full)
            self._succeeded(batch, row_of, outcome, began)
        else:
            self._broke(batch, row_of, outcome)
        self._fill()

    def _succeeded(
        self, batch: list[_Text], row_of: list[int], passed: _Pass, began: float
    ) -> None:
        self._last_success = self._clock()
        self._dimension, self._num_failed = passed.vectors_ND.shape[1], 0
        self._unreported.append(passed.stats)
        for text, row in zip(batch, row_of, strict=True):
            if passed.is_finite_N[row]:
                text.call.take(text.position, passed.vectors_ND[row])
            else:
                text.call.fail(text.position, NOT_FINITE)
        for call in {text.call for text in batch}:
            call.queue_s = max(call.queue_s, began - call.since)
            call.forward_s += passed.stats.seconds
            self._answer(call)

    def _broke(self, batch: list[_Text], row_of: list[int], error: BaseException) -> None:
        """Halves a batch that failed; one input alone is at fault."""
        if len(set(row_of)) > 1:
            middle = len(batch) // 2
            for half in (batch[:middle], batch[middle:]):
                if wanted := [text for text in half if not text.call.answer.done()]:
                    self._queue.put_back(wanted)
            return
        log.error("the model failed on an input of %d tokens", batch[0].tokens, exc_info=error)
        self._num_failed += 1
        for text in batch:
            text.call.fail(text.position, FAILED)
        for call in {text.call for text in batch}:
            if self._num_failed >= BROKEN_AT and not call.answer.done():
                call.answer.set_exception(Unavailable(BROKEN))
            self._answer(call)

    def _answer(self, call: _Call) -> None:
        """Gives a call its answer, where that is complete and still wanted."""
        if call.num_done < call.size or call.answer.done():
            return
        vectors = call.vectors_ND
        if vectors is None:
            vectors = np.zeros((call.size, self._dimension), np.float32)
        batches = tuple(self._unreported)
        self._unreported.clear()
        call.answer.set_result(
            Forwarded(vectors, call.failed, call.queue_s, call.forward_s, batches)
        )
