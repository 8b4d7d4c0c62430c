"""How much of one kind of work may be under way: searches, or documents that an LLM grades."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reasonembed.serving.errors import overloaded

_KEPT = 0.8  # of the mean time with each new one, so that it follows the load within some requests


class Places:
    """Places that work takes and gives back; what finds none is refused at once.

    Args:
        maximum: Of places. Work that needs more is taken in where nothing else is under way.
        what: Is under way, for the message, such as `queries`.
        clock: Seconds, never going back.
    """

    def __init__(
        self, maximum: int, *, what: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._maximum, self._what, self._clock = maximum, what, clock
        self._mean_s = 0.0
        self.taken = 0

    @contextmanager
    def take(self, number: int) -> Iterator[None]:
        """Holds places while the work runs.

        Raises:
            ApiError: 429 there are not as many; says when there will be.
        """
        lacking = self.taken + number - self._maximum
        if lacking > 0 and self.taken > 0:
            # Little's law: what is under way, over how long each takes, is what ends in a second.
            raise overloaded(
                f"{self.taken} {self._what} of at most {self._maximum} are under way, which leaves "
                f"no room for {number} more; send the request again later",
                retry_after_s=self._mean_s * min(1.0, lacking / self.taken),
            )
        started = self._clock()
        self.taken += number
        try:
            yield
            took_s = self._clock() - started
            self._mean_s = _KEPT * (self._mean_s or took_s) + (1 - _KEPT) * took_s
        finally:
            self.taken -= number
