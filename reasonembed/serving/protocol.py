"""What passes between the parts of the service.

A request becomes `EmbedItem`s, the ingress makes `Prepared` token ids of them, an embedder makes
`Forwarded` vectors of those; an index answers with scores and positions. Parts that may stand in
another process are protocols here: in one process they are plain objects, on a cluster handles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

InputType = Literal["query", "document"]
Truncate = Literal["none", "start", "end"]
Vectors = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]
TokenIds = tuple[int, ...]


@dataclass(frozen=True)
class EmbedItem:
    """One input of a request.

    Attributes:
        content: A text, or the token ids of one in the model's vocabulary.
        role: Which side of the retrieval it stands on.
        instruction: What a query asks for; None for the model's default. Documents have none.
        truncate: What happens to an input over the limit: `none` refuses it, `start` and `end` cut
            the text there.
        max_tokens: Of the bare text, whose end is cut off before anything else is looked at.
    """

    content: str | TokenIds
    role: InputType = "document"
    instruction: str | None = None
    truncate: Truncate = "none"
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """An input as the model gets it.

    Attributes:
        ids: Token ids, template and special tokens included.
        skip: First tokens that do not enter a mean; see `embedder.pooling.pool`.
        is_truncated: Whether the text was cut.
    """

    ids: TokenIds
    skip: int = 0
    is_truncated: bool = False


@dataclass(frozen=True)
class ItemError:
    """Why one input has no vector.

    Attributes:
        message: For the caller; does not name the position, which only the request knows.
        is_callers_fault: Whether another input would do (400) or the model failed (500).
        is_too_long: Whether it would do as well if the request let it be cut, in whose words
            only the request knows.
    """

    message: str
    is_callers_fault: bool
    is_too_long: bool = False


class Preparer(Protocol):
    """Texts to token ids under the model's contract; called in threads, several at once."""

    def prepare(self, items: Sequence[EmbedItem]) -> list[Prepared | ItemError]:
        """One outcome an item, in order."""

    def tokenise(self, text: str) -> list[int]:
        """Ids of a bare text, without template, special tokens or limit."""

    def detokenise(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for."""


@dataclass(frozen=True)
class BatchStats:
    """One forward pass.

    Attributes:
        texts: Distinct inputs.
        tokens: Theirs, padding not counted.
        padded_tokens: With padding.
        budget_tokens: That it might have had with padding; a longer text goes alone.
        seconds: It took.
    """

    texts: int
    tokens: int
    padded_tokens: int
    budget_tokens: int
    seconds: float


@dataclass(frozen=True)
class Forwarded:
    """What an embedder gives back for the inputs of one call.

    Attributes:
        vectors_ND: float32, one row an input, in order; rows of failed inputs are zero.
        failed: Why, by position.
        queue_s: Longest wait of an input before its forward pass began.
        forward_s: Seconds of forward passes that these inputs were in.
        batches: Forward passes that ended since the last answer; each is reported once.
    """

    vectors_ND: Vectors
    failed: Mapping[int, str] = field(default_factory=dict)
    queue_s: float = 0.0
    forward_s: float = 0.0
    batches: tuple[BatchStats, ...] = ()


class Unavailable(Exception):
    """No embedder or index can answer now; the request may be sent again (503)."""


class TextEmbedder(Protocol):
    """One or several replicas of the model."""

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        """Embeds inputs; a cancelled call costs nothing once its running batch has ended.

        Args:
            inputs: At least one.
            flow: Names the request that they belong to; requests share a replica fairly, however
                many calls they make.

        Raises:
            Unavailable: There is no replica.
        """


@dataclass(frozen=True)
class ServedModel:
    """What the service says of its model.

    Attributes:
        name: What requests call it.
        fingerprint: Of contract and weights; equal ones give equal vectors.
        dimension: Length of a vector.
        dimensions: Shorter lengths that a vector may be cut to, as the model was trained for.
        max_query_tokens: Limit of a query, template and special tokens included.
        max_document_tokens: Limit of a document, special tokens included.
        vocabulary_size: Token ids lie below.
        created: Unix time in seconds.
        default_instruction: Of queries that name none; may be empty.
        takes_instruction: Whether its queries have one at all.
        aliases: Other names that requests may use.
        is_checked: Whether golden token ids and vectors stood beside the weights and agreed.
        batch_tokens: Padded tokens of a batch of its replicas; 0 where that is not known.
        longest_s: Seconds of a forward pass over a longest text, measured at the start; 0 where it
            was not.
    """

    name: str
    fingerprint: str
    dimension: int
    max_query_tokens: int
    max_document_tokens: int
    vocabulary_size: int
    created: int
    default_instruction: str = ""
    takes_instruction: bool = True
    dimensions: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    is_checked: bool = False
    batch_tokens: int = 0
    longest_s: float = 0.0

    @property
    def largest_pass_tokens(self) -> int:
        """Padded tokens of a forward pass at most: of a batch, or of a longest text."""
        return max(self.batch_tokens, self.max_query_tokens, self.max_document_tokens)

    @property
    def largest_pass_s(self) -> float:
        """Seconds of such a pass, as measured at the start; 0 where that was not."""
        longest = max(self.max_query_tokens, self.max_document_tokens)
        return self.longest_s * self.largest_pass_tokens / longest

    def as_measured(self, by: ServedModel) -> ServedModel:
        """This model with what only a process that runs it knows: size and time of its passes."""
        return replace(self, batch_tokens=by.batch_tokens, longest_s=by.longest_s)


def stalled_after(stall_s: float, model: ServedModel) -> float:
    """Seconds without a finished forward pass after which a model counts as stalled.

    Args:
        stall_s: As configured.
        model: Its largest pass, as measured alone, is given three times its time: passes that run
            side by side slow each other down, and a healthy one must not be taken for a stall.
    """
    return max(stall_s, 3 * model.largest_pass_s)


@dataclass(frozen=True)
class StoredDocument:
    """A document of an index."""

    doc_id: str
    text: str
    title: str | None = None


@dataclass(frozen=True)
class IndexInfo:
    """What the service says of an index.

    Attributes:
        name: What requests call it.
        num_documents: In it.
        dimension: Of its vectors; 0 where it holds none.
        model: Name of the model that made them.
        fingerprint: `ServedModel.fingerprint` of it; another one cannot search the index.
        task: Of its queries; see `tasks.TASKS`.
        instruction: Of its queries, where the index says one.
        kinds: How it can be searched: of `dense`, `bm25`, `hybrid`.
        digest: Of its content; positions of one have no meaning in another. Empty where there is
            nothing on disk.
    """

    name: str
    num_documents: int
    dimension: int
    model: str
    fingerprint: str
    task: str
    instruction: str | None
    kinds: tuple[str, ...]
    digest: str = ""


class IndexPart(Protocol):
    """A shard of an index: some of its vectors, all of its ids and texts.

    Positions are those of the whole index, also in a shard. Excluded ids that the index does not
    hold are passed over; documents of equal text as an excluded one are shut out with it, before
    the cut.
    """

    async def dense(
        self, queries_QD: Vectors, *, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Scores, Positions]:
        """As `index.exact.search`, over the shard's vectors."""

    async def bm25(
        self, texts: Sequence[str], *, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Scores, Positions]:
        """As `BM25Index.search`, over the whole index."""

    async def doc_ids(self, positions: Sequence[int]) -> list[str]:
        """Ids in the given order; texts stay where they are."""

    async def documents(self, positions: Sequence[int]) -> list[StoredDocument]:
        """Documents in the given order."""

    async def find(self, doc_ids: Sequence[str]) -> list[int | None]:
        """Position of each id; None for one that the index does not hold."""


class Rewriting(Protocol):
    """Writes the reasoning-augmented query q′."""

    async def rewrite(self, queries: Sequence[str], *, task: str) -> list[str | None]:
        """q′ of each query; None where the LLM failed."""


class Grading(Protocol):
    """Judges how relevant documents are to a query."""

    async def grade(self, query: str, documents: Sequence[str], *, task: str) -> list[float | None]:
        """Expected relevance label, 1–5, of each document; None where the LLM failed."""
