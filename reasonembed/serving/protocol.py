"""What the app asks of a model, and what it gets back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

InputType = Literal["query", "document"]
Truncate = Literal["none", "end"]


@dataclass(frozen=True)
class EmbedItem:
    """One input of a request.

    Attributes:
        content: A text, or the token ids of one in the model's vocabulary.
        role: Which side of the retrieval it stands on.
        instruction: What a query asks for; None for the model's default. Documents have none.
        truncate: What happens to an input over the limit: `none` refuses it, `end` cuts its end.
    """

    content: str | tuple[int, ...]
    role: InputType = "document"
    instruction: str | None = None
    truncate: Truncate = "none"


@dataclass(frozen=True)
class EmbedResult:
    """The vector of one input.

    Attributes:
        vector: float32, one dimension.
        num_tokens: Tokens that went through the model, template and special tokens included.
        is_truncated: Whether the input was cut.
    """

    vector: npt.NDArray[np.float32]
    num_tokens: int
    is_truncated: bool = False


@dataclass(frozen=True)
class ItemError:
    """Why one input has no vector.

    Attributes:
        message: For the caller; does not name the position, which only the request knows.
        is_callers_fault: Whether another input would do (400) or the model failed (500).
    """

    message: str
    is_callers_fault: bool


Outcome = EmbedResult | ItemError
Embed = Callable[[list[EmbedItem]], Awaitable[list[Outcome]]]
"""Embeds items: one outcome each, in order. It may raise, which fails all of them."""


@dataclass(frozen=True)
class ServedModel:
    """What the service says of its model.

    Attributes:
        name: What requests call it.
        dimension: Length of a vector.
        max_query_tokens: Limit of a query, template and special tokens included.
        max_document_tokens: Limit of a document, special tokens included.
        vocabulary_size: Token ids lie below.
        created: Unix time in seconds.
    """

    name: str
    dimension: int
    max_query_tokens: int
    max_document_tokens: int
    vocabulary_size: int
    created: int
