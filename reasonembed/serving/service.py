"""Requests for vectors: tokenised, looked up, admitted, embedded, counted."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np

from reasonembed.config import LimitsConfig
from reasonembed.serving.admission import Admission, Reservation, request_cost
from reasonembed.serving.cache import Keys, VectorCache
from reasonembed.serving.concurrency import together
from reasonembed.serving.errors import ApiError, unavailable
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import (
    EmbedItem,
    Forwarded,
    ItemError,
    Prepared,
    Preparer,
    ServedModel,
    TextEmbedder,
    Unavailable,
    Vectors,
)

_CALL_TOKENS, _CALL_INPUTS = 16_384, 512
"""Of one call to an embedder: small enough that replicas share a large request and that room in
the queue comes back as it is worked off, large enough that a call's own cost vanishes."""
_THREADS = 4  # that tokenise; one text in each, while the tokenizer spreads a batch by itself
_CHARACTERS_A_TOKEN = 4  # of English; only for the estimate before tokenising
_TEMPLATE_TOKENS = 8
_T = TypeVar("_T")


@dataclass(frozen=True)
class Timings:
    """Seconds of a request's parts.

    Attributes:
        tokenize_s: Until its token ids were there, the wait for a thread included.
        queue_s: Longest wait of an input for its forward pass; 0 where nothing was computed.
        forward_s: Forward passes that its inputs were in, added up.
    """

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    forward_s: float = 0.0

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            self.tokenize_s + other.tokenize_s,
            self.queue_s + other.queue_s,
            self.forward_s + other.forward_s,
        )


@dataclass(frozen=True)
class Embedded:
    """Vectors of a request.

    Attributes:
        vectors_ND: float32, contiguous, one row an input.
        num_tokens: Of each input, template and special tokens included.
        truncated: Positions of the inputs that were cut.
        timings: Where the time went.
    """

    vectors_ND: Vectors
    num_tokens: tuple[int, ...]
    truncated: tuple[int, ...]
    timings: Timings


@dataclass(frozen=True)
class _Input:
    """One distinct input of a request.

    Attributes:
        prepared: What the model gets.
        key: In the cache.
        positions: Where the request has it.
    """

    prepared: Prepared
    key: bytes
    positions: tuple[int, ...]


class EmbeddingService:
    """One model, whoever asks for its vectors.

    Args:
        model: What is served.
        preparer: Its tokenisation.
        embedder: Its replicas.
        limits: What a request may hold and what may wait.
        cache_mib: Of vectors that are kept; 0 for none.
        metrics: Where it counts.
        clock: Seconds, never going back.

    Attributes:
        model: As given.
        preparer: As given.
        embedder: As given.
        last_success: When the newest vectors of a request came, on the clock; None before any.
    """

    def __init__(
        self,
        model: ServedModel,
        preparer: Preparer,
        embedder: TextEmbedder,
        *,
        limits: LimitsConfig,
        cache_mib: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.preparer, self.embedder = model, preparer, embedder
        self.last_success: float | None = None
        self._metrics, self._clock = metrics, clock
        self._admission = Admission(
            max_request_tokens=limits.max_request_tokens,
            max_queued_tokens=limits.max_queued_tokens,
            clock=clock,
        )
        self._keys, self._cache = Keys(model.fingerprint), VectorCache(cache_mib * 2**20)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenise")
        self._flows = (f"{secrets.token_hex(4)}-{n}" for n in itertools.count())
        metrics.describe(model)
        metrics.queue_tokens.set_function(lambda: self._admission.queued_tokens)

    @property
    def queued_tokens(self) -> int:
        """Admitted and not answered."""
        return self._admission.queued_tokens

    @property
    def tokens_per_s(self) -> float:
        """Measured speed of all replicas together."""
        return self._admission.tokens_per_s

    async def embed(
        self,
        items: Sequence[EmbedItem],
        *,
        param: str = "input",
        cutting: str = "set truncate to 'end' or 'start'",
    ) -> Embedded:
        """Vectors of a request's inputs; full length, as the model gives them.

        Cancelling it gives its room back, at once or as soon as no thread has its texts any more,
        and what waits of it is never computed.

        Args:
            items: At least one.
            param: The request's field that they come from, for messages: "input[3]: …".
            cutting: What would let a text be cut that is too long, in the words of the protocol.

        Raises:
            ApiError: 400 an input cannot be embedded, 413 it holds more than a request may, 429
                the queue is full, 500 the model failed on an input, 503 there is no replica.
        """
        if not items:
            raise ValueError("need at least one item")
        with _in_words(), self._admission.reserve(self._estimate(items)) as room:
            return await _Request(self, items, param, cutting, room, next(self._flows)).run()

    async def tokenise(self, texts: Sequence[str], work: Callable[[], _T]) -> _T:
        """Runs what tokenises texts for no vectors: under the bounds that requests for them have.

        Args:
            texts: Bare ones; they are looked at whole, so they count whole.
            work: Done in a thread; it may raise `ApiError`, as `check_size` does.

        Raises:
            ApiError: 413 they are more than a request may hold, 429 the queue is full.
        """
        with _in_words():
            estimate = request_cost(_guess(EmbedItem(text)) for text in texts)
            self._admission.check_size(estimate)
            with self._admission.reserve(estimate) as room:
                return await self._in_thread(work, room)

    def check_size(self, tokens: int) -> None:
        """Refuses more tokens than a request may hold; from any thread.

        Raises:
            ApiError: 413.
        """
        self._admission.check_size(tokens)

    async def _in_thread(self, work: Callable[[], _T], room: Reservation) -> _T:
        """Work of the threads that tokenise.

        If its caller goes, it is not begun any more, yet it keeps its room until a thread has come
        to it: until then its texts are in memory.
        """
        is_gone = threading.Event()

        def unless_gone() -> _T | None:
            return None if is_gone.is_set() else work()

        done = asyncio.get_running_loop().run_in_executor(self._pool, unless_gone)
        try:
            result = await asyncio.shield(done)
        except asyncio.CancelledError:
            is_gone.set()
            done.add_done_callback(_forget)
            room.keep_until(done)
            raise
        return cast(_T, result)

    async def close(self) -> None:
        """Ends the threads; requests that are being tokenised finish doing so."""
        await asyncio.to_thread(self._pool.shutdown)

    def _estimate(self, items: Sequence[EmbedItem]) -> int:
        """What a request will count for, before its texts have been tokenised."""
        limits = {
            "query": self.model.max_query_tokens,
            "document": self.model.max_document_tokens,
        }
        return request_cost(min(limits[item.role], _guess(item)) for item in items)


@dataclass
class _Request:
    """One request on its way."""

    service: EmbeddingService
    items: Sequence[EmbedItem]
    param: str
    cutting: str
    room: Reservation
    flow: str

    async def run(self) -> Embedded:
        began = self.service._clock()
        prepared, keys = await self.service._in_thread(self._prepare, self.room)
        tokenize_s = self.service._clock() - began
        self.service._metrics.tokenize_seconds.observe(tokenize_s)
        inputs = [self._checked(index, one) for index, one in enumerate(prepared)]
        lengths = tuple(len(one.ids) for one in inputs)
        self.service._admission.check_size(request_cost(lengths))
        vectors_ND = np.empty((len(inputs), self.service.model.dimension), np.float32)
        missing = self._look_up(inputs, keys, vectors_ND)
        self.room.correct(_cost(missing))
        calls = [self._call(part, vectors_ND) for part in _parts(missing)]
        answers = await together(*calls)
        timings = Timings(
            tokenize_s,
            max((answer.queue_s for answer in answers), default=0.0),
            sum(answer.forward_s for answer in answers),
        )
        truncated = tuple(i for i, one in enumerate(inputs) if one.is_truncated)
        self._count(lengths, truncated, timings, is_computed=bool(answers))
        return Embedded(vectors_ND, lengths, truncated, timings)

    def _prepare(self) -> tuple[Sequence[Prepared | ItemError], list[bytes]]:
        """Token ids and keys, in a thread: both take long for long texts."""
        prepared = self.service.preparer.prepare(self.items)
        good = [one for one in prepared if isinstance(one, Prepared)]
        return prepared, self.service._keys.of(good)

    def _checked(self, index: int, outcome: Prepared | ItemError) -> Prepared:
        if isinstance(outcome, Prepared):
            return outcome
        status = 400 if outcome.is_callers_fault else 500
        cure = f", or {self.cutting}" if outcome.is_too_long else ""
        message = f"{self.param}[{index}]: {outcome.message}{cure}"
        raise ApiError(status, message, param=self.param)

    def _look_up(
        self, inputs: Sequence[Prepared], keys: Sequence[bytes], vectors_ND: Vectors
    ) -> list[_Input]:
        """Fills in the rows that are known; returns the distinct inputs that are not."""
        positions = defaultdict(list)
        for index, key in enumerate(keys):
            positions[key].append(index)
        missing = []
        for key, found in positions.items():
            row = self.service._cache.get(key)
            if row is None:
                missing.append(_Input(inputs[found[0]], key, tuple(found)))
            else:
                vectors_ND[found] = row
        computed = sum(len(one.positions) for one in missing)
        self.service._metrics.cache_misses.inc(computed)
        self.service._metrics.cache_hits.inc(len(inputs) - computed)
        return missing

    async def _call(self, inputs: Sequence[_Input], vectors_ND: Vectors) -> Forwarded:
        """Embeds some of the inputs and fills in their rows."""
        service = self.service
        prepared = [one.prepared for one in inputs]
        answer = await service.embedder.embed(prepared, flow=self.flow)
        service._metrics.took_part(answer.batches)
        self.room.answered(_cost(inputs))
        failed = answer.failed
        if len(failed) < len(inputs):
            expected = (len(inputs), service.model.dimension)
            if answer.vectors_ND.shape != expected:
                raise RuntimeError(f"vectors of shape {answer.vectors_ND.shape}, not {expected}")
            service.last_success = service._clock()
        for index, (one, row) in enumerate(zip(inputs, answer.vectors_ND, strict=True)):
            if index not in failed:
                vectors_ND[list(one.positions)] = row
                service._cache.put(one.key, row)
        if failed:
            position, reason = min((inputs[i].positions[0], failed[i]) for i in failed)
            raise ApiError(500, f"{self.param}[{position}]: {reason}", param=self.param)
        return answer

    def _count(
        self,
        lengths: Sequence[int],
        truncated: Sequence[int],
        timings: Timings,
        *,
        is_computed: bool,
    ) -> None:
        metrics = self.service._metrics
        tokens: Counter[str] = Counter()
        for item, length in zip(self.items, lengths, strict=True):
            tokens[item.role] += length
        for role, number in tokens.items():
            metrics.tokens.labels(role).inc(number)
        metrics.truncated_inputs.inc(len(truncated))
        if is_computed:
            metrics.queue_seconds.observe(timings.queue_s)
            metrics.forward_seconds.observe(timings.forward_s)


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Says a missing replica in the protocol's words."""
    try:
        yield
    except Unavailable as error:
        raise unavailable(f"no vectors can be had now: {error}") from error


def _forget(done: asyncio.Future[Any]) -> None:
    """Else the loop logs a failure that nobody waits for, and its message may hold texts."""
    if not done.cancelled():
        done.exception()


def _guess(item: EmbedItem) -> int:
    content = item.content
    tokens = len(content) // _CHARACTERS_A_TOKEN if isinstance(content, str) else len(content)
    if item.max_tokens is not None:
        tokens = min(tokens, item.max_tokens)
    return tokens + len(item.instruction or "") // _CHARACTERS_A_TOKEN + _TEMPLATE_TOKENS


def _cost(inputs: Sequence[_Input]) -> int:
    return request_cost(len(one.prepared.ids) for one in inputs)


def _parts(inputs: Sequence[_Input]) -> Iterator[list[_Input]]:
    """Cuts inputs into calls; longest first, so that those of a call are alike."""
    part: list[_Input] = []
    size = 0
    for one in sorted(inputs, key=lambda one: -len(one.prepared.ids)):
        tokens = len(one.prepared.ids)
        if part and (size + tokens > _CALL_TOKENS or len(part) == _CALL_INPUTS):
            yield part
            part, size = [], 0
        part.append(one)
        size += tokens
    if part:
        yield part
