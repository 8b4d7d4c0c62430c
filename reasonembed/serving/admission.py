"""How much may wait: bounded in tokens, by one rule for one batch of N and for N single texts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from reasonembed.serving.errors import ApiError, overloaded
from reasonembed.serving.speed import Load, Speed

MIN_TEXT_TOKENS = 8
"""What a text counts for at least: even one of a single token costs its row, its vector and its
place in the answer, so a flood of tiny texts must fill the queue too."""
_FULL_TOKENS = 16_384
"""Queued tokens from which all lanes have enough to do and the speed is worth measuring."""
_LEAST_S = 0.1


def request_cost(lengths: Iterable[int]) -> int:
    """Tokens that a request counts for: the sum over its texts, each at least `MIN_TEXT_TOKENS`.

    Args:
        lengths: Tokens of each text, template and special tokens included.
    """
    return sum(max(length, MIN_TEXT_TOKENS) for length in lengths)


class Admission:
    """Tokens that were admitted and not yet answered.

    What does not fit is refused at once, with the time after which it would fit at the measured
    speed; nothing waits at the door, so memory is bounded and no request is older than the queue.

    Args:
        max_request_tokens: Of one request.
        max_queued_tokens: Of all; at least `max_request_tokens`, so that an idle service takes
            every request of an allowed size.
        clock: Seconds, never going back.
    """

    def __init__(
        self,
        *,
        max_request_tokens: int,
        max_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not 1 <= max_request_tokens <= max_queued_tokens:
            raise ValueError(
                "need 1 <= max_request_tokens <= max_queued_tokens, got "
                f"{max_request_tokens} and {max_queued_tokens}"
            )
        self._max_request, self._max_queued = max_request_tokens, max_queued_tokens
        self._full = min(_FULL_TOKENS, max_queued_tokens // 2)
        self._speed = Speed(clock=clock)
        self._queued = 0

    @property
    def queued_tokens(self) -> int:
        """Admitted and not answered."""
        return self._queued

    @property
    def tokens_per_s(self) -> float:
        """Measured speed of whoever answers."""
        return self._speed.tokens_per_s

    def reserve(self, estimate: int) -> Reservation:
        """Room for a request whose texts have not been tokenised yet.

        Args:
            estimate: What it will count for, roughly; `Reservation.correct` takes the exact
                number. An estimate beyond what a request may hold is taken for that much.

        Raises:
            ApiError: 429 there is no room.
        """
        return Reservation(self, min(estimate, self._max_request))

    def check_size(self, cost: int) -> None:
        """Refuses a request that holds too much.

        Args:
            cost: `request_cost` of all its texts.

        Raises:
            ApiError: 413.
        """
        if cost > self._max_request:
            raise ApiError(
                413,
                f"the request holds {cost} tokens, over the limit of {self._max_request} tokens a "
                f"request (max_request_tokens; a text counts for at least {MIN_TEXT_TOKENS}); "
                "send it in parts",
                code="request_too_large",
            )

    def _take(self, tokens: int) -> None:
        """Raises 429 where that many do not fit."""
        lacking = self._queued + tokens - self._max_queued
        if lacking > 0:
            raise overloaded(
                f"the queue holds {self._queued} of at most {self._max_queued} tokens and has no "
                f"room for {tokens} more; send the request again later",
                retry_after_s=max(_LEAST_S, lacking / self._speed.tokens_per_s),
            )
        self._set(self._queued + tokens)

    def _give(self, tokens: int, *, is_answered: bool) -> None:
        if is_answered:
            self._speed.answered(tokens)
        self._set(self._queued - tokens)

    def _set(self, queued: int) -> None:
        self._queued = queued
        is_full = queued >= self._full
        self._speed.set_load(Load.FULL if is_full else Load.BUSY if queued else Load.IDLE)


class Reservation:
    """A request's share of the queue; a context manager that gives back what is left of it."""

    def __init__(self, admission: Admission, tokens: int) -> None:
        admission._take(tokens)
        self._admission, self._tokens = admission, tokens
        self._is_kept = False

    @property
    def tokens(self) -> int:
        """Still held."""
        return self._tokens

    def correct(self, tokens: int) -> None:
        """Puts the exact number in place of the estimate.

        Raises:
            ApiError: 429 there is no room for what the estimate fell short of.
        """
        more = tokens - self._tokens
        if more > 0:
            self._admission._take(more)
        else:
            self._admission._give(-more, is_answered=False)
        self._tokens = tokens

    def answered(self, tokens: int) -> None:
        """Gives back the room of texts that have their vectors, before the rest has."""
        self._tokens -= tokens
        self._admission._give(tokens, is_answered=True)

    def keep_until(self, done: asyncio.Future[Any]) -> None:
        """Holds what is left of it beyond its context, until a thread is through with the texts."""
        self._is_kept = True
        done.add_done_callback(lambda _: self._give_rest())

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._is_kept:
            self._give_rest()

    def _give_rest(self) -> None:
        self._admission._give(self._tokens, is_answered=False)
        self._tokens = 0
