"""How many tokens a second something answers when it has enough to do."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import IntEnum

_START = 1_000.0
"""Tokens a second before anything was measured: a small model on one core."""
_MEMORY_TOKENS = 100_000
"""Work after which an observation has lost two thirds of its weight. Counted in tokens, not in
seconds: a long quiet time does not wear a measurement out, and bursts of answers even out."""
_ENOUGH_S = 1.0


class PassSpeed:
    """Measures the tokens a second of lanes that all have enough to do, by their forward passes.

    A pass counts with its own seconds and all its tokens, and only if every lane was busy and more
    waited as it began: time that is looked at from outside credits what was computed before a rush
    to the rush. Until a second of such passes has been seen, the speed is that of one lane in any
    passes, though at least 1,000 tokens a second.

    Args:
        lanes: Passes at once.
    """

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._all, self._full = _Rate(), _Rate()

    def took(self, tokens: int, seconds: float, *, is_full: bool) -> None:
        """Notes a pass.

        Args:
            tokens: In it, padding not counted.
            seconds: Of it alone.
            is_full: Whether all lanes were busy and more waited as it began.
        """
        for rate in (self._all, self._full)[: 1 + is_full]:
            rate.pass_time(seconds)
            rate.add(tokens)

    @property
    def tokens_per_s(self) -> float:
        """The speed of all lanes; more than 0."""
        if self._full.seconds >= _ENOUGH_S:
            return self._lanes * self._full.value
        return max(_START, self._all.value)


class Load(IntEnum):
    """How much there is to do."""

    IDLE = 0
    BUSY = 1
    FULL = 2


class _Rate:
    """Tokens over the seconds that they took, the older the lighter."""

    def __init__(self) -> None:
        self.tokens = self.seconds = self._pending_s = 0.0

    def pass_time(self, seconds: float) -> None:
        self._pending_s += seconds

    def add(self, tokens: int) -> None:
        kept = math.exp(-tokens / _MEMORY_TOKENS)
        self.tokens = self.tokens * kept + tokens
        self.seconds = self.seconds * kept + self._pending_s
        self._pending_s = 0.0

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


class Speed:
    """Measures tokens answered a second of work.

    A second counts when there was enough to do for all of it: one short query alone says how long
    a query takes, not how many could be answered. Until a second of that has been seen, the speed
    is what all work shows, though at least 1,000 tokens a second.

    Args:
        clock: Seconds, never going back.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._all, self._full = _Rate(), _Rate()
        self._load, self._since = Load.IDLE, clock()

    def set_load(self, load: Load) -> None:
        """Notes how much there is to do from now on."""
        self._pass_time()
        self._load = load

    def answered(self, tokens: int) -> None:
        """Notes work that is done; to be called before its end changes the load."""
        self._pass_time()
        self._all.add(tokens)
        if self._load is Load.FULL:
            self._full.add(tokens)

    @property
    def tokens_per_s(self) -> float:
        """The speed; more than 0."""
        if self._full.seconds >= _ENOUGH_S:
            return self._full.value
        return max(_START, self._all.value)

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._since = now - self._since, now
        if self._load is not Load.IDLE:
            self._all.pass_time(passed)
        if self._load is Load.FULL:
            self._full.pass_time(passed)
