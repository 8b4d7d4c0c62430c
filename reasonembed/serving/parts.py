"""The parts that an app is made of."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from reasonembed.config import ServeConfig
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.outgoing import Outgoing
from reasonembed.serving.protocol import Grading
from reasonembed.serving.search import SearchService
from reasonembed.serving.service import EmbeddingService

if TYPE_CHECKING:
    from reasonembed.serving.keys import KeyFile


@dataclass(frozen=True)
class Service:
    """What the routes of an app are over.

    Attributes:
        embeddings: Gives vectors.
        settings: As `GET /info` publishes them.
        metrics: Where every route counts.
        search: Searches the indexes, of which there may be none; holds what rewrites and grades.
        keys: Bearer keys; None where requests need none.
        version: Of the package.
        on_end: Called in this order when the app ends.
    """

    embeddings: EmbeddingService
    settings: ServeConfig
    metrics: Metrics
    search: SearchService | None = None
    keys: KeyFile | None = None
    version: str = "0"

    @property
    def grading(self) -> Grading | None:
        """Judges documents; None where no LLM is configured for it."""
        return self.search.grading if self.search else None

    on_end: Sequence[Callable[[], Awaitable[None]]] = ()

    @cached_property
    def outgoing(self) -> Outgoing:
        """Bounds the bytes of answers, whatever route they are of."""
        return Outgoing(self.settings.limits.max_answer_bytes)
