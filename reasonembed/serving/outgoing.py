"""How many bytes of answers there may be: being computed, written, or waiting for their clients.

Vectors are larger than what they were asked for by, and a client may read as slowly as it likes; so
what the queue bounds in tokens must be bounded in bytes until it has left the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from reasonembed.serving.errors import overloaded
from reasonembed.serving.exchange import exchange_of

RETRY_AFTER_S = 2.0
"""Nobody knows when a client reads on."""


class Outgoing:
    """Counts bytes of answers.

    Args:
        maximum: Of them. A larger answer is made where there is no other.

    Attributes:
        held: Now.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self.held = 0

    @property
    def is_full(self) -> bool:
        """Whether no more work should be begun."""
        return self.held >= self._maximum

    def hold(self, request: Request, num_bytes: int) -> None:
        """Room for a request's answer before it is computed, until it is handed over.

        Args:
            request: Being answered.
            num_bytes: Of what it will be made of and of itself, roughly.

        Raises:
            ApiError: 429 there is no room.
        """
        exchange = exchange_of(request)
        if exchange is None:
            return
        if self.held and self.held + num_bytes > self._maximum:
            raise overloaded(
                f"answers hold {self.held:,} of at most {self._maximum:,} bytes (max_answer_bytes) "
                f"until their clients have read them, which leaves no room for {num_bytes:,} more; "
                "send the request again later",
                retry_after_s=RETRY_AFTER_S,
            )
        exchange.held.enter_context(self.count(num_bytes))

    @contextmanager
    def count(self, num_bytes: int) -> Iterator[None]:
        """Counts what is there already, such as a body that is being sent."""
        self.held += num_bytes
        try:
            yield
        finally:
            self.held -= num_bytes
