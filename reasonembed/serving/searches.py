"""What a search asks for, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from reasonembed.serving.protocol import IndexInfo, StoredDocument, Truncate
from reasonembed.serving.reranking import Reranker
from reasonembed.serving.service import Timings

Kind = Literal["dense", "bm25", "hybrid"]


@dataclass(frozen=True)
class Asked:
    """One search.

    Attributes:
        query: The text.
        instruction: In place of the task's, the index's or the model's own.
        task: Name in `tasks.TASKS`; its instruction is used, and the LLM is told of it. Default the
            index's.
        excluded_ids: Documents that must not be found, nor copies of them.
        is_cut: Whether the text was longer.
    """

    query: str
    instruction: str | None = None
    task: str | None = None
    excluded_ids: tuple[str, ...] = ()
    is_cut: bool = False


@dataclass(frozen=True)
class Rerank:
    """A second look at the best results.

    Attributes:
        by: `cosine` of the embedder, or the `annotator`'s grades.
        depth: Results that are looked at, at least `Wanted.top_k`.
    """

    by: Reranker
    depth: int


@dataclass(frozen=True)
class Wanted:
    """What the searches of a request have in common.

    Attributes:
        kind: None for dense, or the first kind that the index has.
        top_k: Hits a query.
        min_score: Lowest score of the search (not of the reranker) that a hit may have.
        with_documents: Whether hits hold their documents.
        rewrite: Whether the LLM's q′ is searched for in place of the query.
        rerank: None for the order of the search.
        truncate: What happens to a query over the model's limit; a q′ loses its end.
        param: The request's field that holds the queries, for messages.
        top_k_param: The request's field that says `top_k`.
    """

    kind: Kind | None = None
    top_k: int = 10
    min_score: float | None = None
    with_documents: bool = False
    rewrite: bool = False
    rerank: Rerank | None = None
    truncate: Truncate = "none"
    param: str = "query"
    top_k_param: str = "top_k"

    @property
    def num_reranked(self) -> int:
        """Documents of a query that are looked at again."""
        return self.rerank.depth if self.rerank else 0

    @property
    def is_graded(self) -> bool:
        """Whether the annotator reranks."""
        return self.rerank is not None and self.rerank.by == "annotator"


@dataclass(frozen=True)
class Hit:
    """A found document; `grade` is the annotator's, where one judged it."""

    doc_id: str
    score: float
    rank: int
    document: StoredDocument | None = None
    grade: float | None = None


@dataclass(frozen=True)
class Found:
    """Answer to one search.

    Attributes:
        hits: Best first.
        rewritten_query: What was searched for, where the query was rewritten.
        unknown_excluded_ids: Excluded ids that the index does not hold.
    """

    hits: tuple[Hit, ...]
    rewritten_query: str | None = None
    unknown_excluded_ids: int = 0


@dataclass(frozen=True)
class Searched:
    """Answers to a request's searches.

    Attributes:
        info: The index.
        kind: How it was searched.
        found: In the order of the queries.
        timings_ms: Milliseconds by part.
        num_tokens: Embedded.
        truncated: Positions of the queries that were cut.
        timings: Of the embedder, in seconds.
        num_bytes: Of the hits' documents.
    """

    info: IndexInfo
    kind: Kind
    found: tuple[Found, ...]
    timings_ms: Mapping[str, float]
    num_tokens: int
    truncated: tuple[int, ...] = ()
    timings: Timings = field(default_factory=Timings)
    num_bytes: int = 0
