"""Bodies and answers of searches, in each form, and what a search may not ask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field

from reasonembed.config import ServeConfig
from reasonembed.serving.answers import IndexEntry, Usage
from reasonembed.serving.describing import examples
from reasonembed.serving.errors import ApiError
from reasonembed.serving.protocol import Truncate
from reasonembed.serving.requests import Body
from reasonembed.serving.searches import Asked, Kind
from reasonembed.tasks import TASKS

RERANK_DEPTH = 50
"""Results that a reranker looks at where the request does not say how many."""
RETRIEVED = 3
"""Documents a query where a request to `/retrieve` does not say; Search-R1's own default."""


SEARCHES = examples(
    one=(
        "A query, and the texts of what is found",
        {"query": "why do trees lose their leaves?", "top_k": 5, "return_documents": True},
    ),
    hybrid=(
        "Two queries, each with a document that must not be found",
        {
            "queries": ["why do trees lose their leaves?", "what holds the soil?"],
            "kind": "hybrid",
            "prompt_name": "biology",
            "excluded_ids": [["leaf-1"], ["root-7"]],
        },
    ),
)
BATCHES = examples(
    tasks=(
        "Queries of two tasks",
        {
            "top_k": 3,
            "searches": [
                {"query": "why do trees lose their leaves?", "prompt_name": "biology"},
                {"query": "who pays for the road?", "prompt_name": "economics"},
            ],
        },
    )
)
RETRIEVALS = examples(
    scores=(
        "As Search-R1 asks",
        {"queries": ["why do trees lose their leaves?"], "topk": 3, "return_scores": True},
    )
)
STORE_SEARCHES = examples(
    one=("A query", {"query": "why do trees lose their leaves?", "max_num_results": 5})
)
SEARCH_EXAMPLE = {
    "object": "search.results",
    "index": "biology",
    "kind": "dense",
    "model": "reasonembed",
    "data": [
        {
            "query_index": 0,
            "hits": [{"id": "leaf-2", "score": 0.83, "rank": 1}],
            "unknown_excluded_ids": 0,
        }
    ],
    "usage": {"prompt_tokens": 31, "total_tokens": 31, "truncated_inputs": []},
    "timings_ms": {"tokenize": 0.4, "rewrite": 0, "encode": 9.1, "search": 2.2, "rerank": 0},
}
RETRIEVE_EXAMPLE = {
    "result": [[{"document": {"id": "leaf-2", "contents": "Abscission\n…"}, "score": 0.83}]]
}
PAGE_EXAMPLE = {
    "object": "vector_store.search_results.page",
    "search_query": ["why do trees lose their leaves?"],
    "data": [
        {
            "file_id": "leaf-2",
            "filename": "Abscission",
            "score": 0.83,
            "attributes": {},
            "content": [{"type": "text", "text": "Abscission\n…"}],
        }
    ],
    "has_more": False,
    "next_page": None,
}


class SearchRerank(Body):
    """A second look at the best results."""

    model: str | None = Field(
        None,
        description="the served model's name for cosines, the same with `:annotator` for the LLM's "
        "grades; default the grades, where an annotator is configured",
    )
    depth: int | None = Field(
        None, ge=1, description=f"results that are looked at; default {RERANK_DEPTH} or top_k"
    )


class SharedBody(Body):
    """What all searches of a request have in common."""

    index: str | None = Field(None, description="may be left out if there is but one")
    kind: Kind | None = Field(
        None, description="default dense, or the first that the index has", examples=["dense"]
    )
    top_k: int = Field(10, ge=1, description="hits a query; the most is `max_top_k` of /info")
    min_score: float | None = Field(
        None, description="hits of a lower score, as the search gives it, are left out"
    )
    return_documents: bool = Field(False, description="whether hits hold their documents")
    rewrite: bool = Field(
        False, description="search for q′, the query and reasoning that the LLM adds to it"
    )
    rerank: SearchRerank | None = None
    truncate: Truncate = Field(
        "none", description="what happens to a query over the model's limit: refused or cut there"
    )


class SearchBody(SharedBody):
    """Body of `POST /v1/search`."""

    query: str | None = Field(None, description="either query or queries")
    queries: list[str] | None = Field(None, description="either query or queries")
    instruction: str | None = Field(
        None, description="what is asked for, in place of the index's instruction"
    )
    prompt_name: str | None = Field(
        None,
        description="name of a retrieval task, whose instruction is used",
        examples=["biology"],
    )
    excluded_ids: list[str] | list[list[str]] | None = Field(
        None,
        description="a list of ids that must not be found (nor copies of them), or one such list a "
        "query",
    )

    def asked(self, settings: ServeConfig) -> tuple[str, list[Asked]]:
        """The field that holds the queries, and what is asked.

        Raises:
            ApiError: 400: they do not fit together.
        """
        if (self.query is None) == (self.queries is None):
            raise ApiError(400, "send one of query and queries", param="query")
        param, texts = ("queries", self.queries) if self.queries is not None else ("query", None)
        texts = [self.query or ""] if texts is None else texts
        check_queries(texts, settings, param=param)
        instruction, task = check_instruction(self.instruction, self.prompt_name)
        excluded = _excluded(self.excluded_ids, len(texts))
        return param, [
            Asked(text, instruction, task, ids) for text, ids in zip(texts, excluded, strict=True)
        ]


class OneSearch(Body):
    """A search of a batch."""

    query: str = Field(description="the text")
    instruction: str | None = Field(None, description="as of a single search")
    prompt_name: str | None = Field(None, description="as of a single search")
    excluded_ids: list[str] = Field(default_factory=list, description="as of a single search")


class BatchBody(SharedBody):
    """Body of `POST /v1/search/batch`: searches of one index that each ask in their own way."""

    searches: list[OneSearch] = Field(description="at least one")

    def asked(self, settings: ServeConfig) -> tuple[str, list[Asked]]:
        """As `SearchBody.asked`."""
        check_queries([one.query for one in self.searches], settings, param="searches")
        found = []
        for number, one in enumerate(self.searches):
            where = f"searches[{number}]."
            told = check_instruction(one.instruction, one.prompt_name, where=where)
            found.append(Asked(one.query, *told, tuple(one.excluded_ids)))
        return "searches", found


class RetrieveBody(Body):
    """Body of `POST /retrieve`, as Search-R1's retriever takes it."""

    queries: list[str] = Field(description="blank ones find nothing; there may be none")
    topk: int | None = Field(None, ge=1, description=f"documents a query; default {RETRIEVED}")
    return_scores: bool = Field(False, description="whether each document comes with its score")


class RankingOptions(Body):
    """OpenAI's; there is one ranker here."""

    ranker: str | None = Field(None, description="taken and not used")
    score_threshold: float | None = Field(None, description="lowest score of a result")


class VectorStoreBody(Body):
    """Body of `POST /v1/vector_stores/{index}/search`, in OpenAI's form."""

    query: str | list[str] = Field(
        description="a text, or a list of texts: a document then has the best of its scores"
    )
    rewrite_query: bool = Field(False, description="search for q′")
    max_num_results: int = Field(10, ge=1, le=50, description="hits a query")
    ranking_options: RankingOptions | None = None
    filters: dict[str, Any] | None = Field(None, description="not supported; leave it out")

    def texts(self) -> list[str]:
        """The queries."""
        return [self.query] if isinstance(self.query, str) else self.query


class HitAnswer(BaseModel):
    """A found document."""

    id: str
    score: float = Field(description="of the search, or the cosine where that reranks")
    rank: int = Field(description="from 1")
    grade: float | None = Field(
        None, description="1–5 by the annotator; left out where none was asked, null if it failed"
    )
    document: DocumentAnswer | None = Field(None, description="left out unless asked for")


class DocumentAnswer(BaseModel):
    """A document."""

    id: str
    text: str
    title: str | None


class ResultsAnswer(BaseModel):
    """Results of one query."""

    query_index: int
    hits: list[HitAnswer]
    rewritten_query: str | None = Field(
        None, description="q′; null if the LLM failed and the query itself was searched"
    )
    unknown_excluded_ids: int = Field(description="excluded ids that the index does not hold")


class TimingsAnswer(BaseModel):
    """Milliseconds."""

    tokenize: float
    rewrite: float
    encode: float
    search: float
    rerank: float


class SearchAnswer(BaseModel):
    """Results of all queries."""

    object: Literal["search.results"]
    index: str
    kind: Kind
    model: str
    data: list[ResultsAnswer]
    usage: Usage
    timings_ms: TimingsAnswer


class IndexAnswer(IndexEntry):
    """An index."""

    num_queries: int = Field(description="of its benchmark, with gold documents")


class IndexesAnswer(BaseModel):
    """All indexes."""

    object: Literal["list"]
    data: list[IndexAnswer]


class QueryAnswer(BaseModel):
    """A query of an index's benchmark."""

    id: str
    query: str
    gold: dict[str, int] = Field(description="relevance by document")
    excluded_ids: list[str]


class QueriesAnswer(BaseModel):
    """A page of queries."""

    object: Literal["list"]
    data: list[QueryAnswer]
    total: int
    has_more: bool


class RetrieveAnswer(BaseModel):
    """For each query its documents, best first."""

    result: list[list[dict[str, Any]]]


class PartAnswer(BaseModel):
    """A text of a result."""

    type: Literal["text"]
    text: str


class FileAnswer(BaseModel):
    """A found document, in OpenAI's words."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, str]
    content: list[PartAnswer]


class VectorStoreAnswer(BaseModel):
    """OpenAI's page of results; there is but one page."""

    object: Literal["vector_store.search_results.page"]
    search_query: list[str]
    data: list[FileAnswer]
    has_more: Literal[False]
    next_page: None


HitAnswer.model_rebuild()


def check_queries(
    texts: Sequence[str], settings: ServeConfig, *, param: str, may_be_blank: bool = False
) -> None:
    """Refuses what cannot be searched for.

    Raises:
        ApiError: 400: too many queries or none, or a blank one.
    """
    limit = settings.limits.max_inputs
    if len(texts) > limit or not (texts or may_be_blank):
        message = f"{param} holds {len(texts)} items; send 1 to {limit}"
        raise ApiError(400, message, param=param)
    for number, text in enumerate(texts):
        if not may_be_blank and not text.strip():
            where = "" if param == "query" and len(texts) == 1 else f"[{number}]"
            raise ApiError(400, f"{param}{where} is empty", param=param)


def check_instruction(
    instruction: str | None,
    prompt_name: str | None,
    *,
    where: str = "",
    task_param: str = "prompt_name",
) -> tuple[str | None, str | None]:
    """Instruction and task of a query, of which one at most may be given.

    Args:
        instruction: As given.
        prompt_name: As given.
        where: In front of the fields' names, for messages.
        task_param: What the request calls `prompt_name`.

    Raises:
        ApiError: 400: both are, or there is no such task, or the instruction is empty.
    """
    if instruction is not None and prompt_name is not None:
        message = f"{where}instruction and {where}prompt_name are both given; send one of them"
        raise ApiError(400, message, param=f"{where}prompt_name")
    if instruction is not None and not instruction.strip():
        message = f"{where}instruction is empty; leave it out for the default"
        raise ApiError(400, message, param=f"{where}instruction")
    if prompt_name is not None and prompt_name not in TASKS:
        message = f"{where}{task_param}: unknown task; there are: {', '.join(TASKS)}"
        raise ApiError(400, message, param=f"{where}{task_param}")
    return instruction, prompt_name


def _excluded(given: list[str] | list[list[str]] | None, num_queries: int) -> list[tuple[str, ...]]:
    """Excluded ids of each query.

    Raises:
        ApiError: 400: their number is not that of the queries.
    """
    if not given:
        return [()] * num_queries
    lists = [one for one in given if isinstance(one, list)]
    if not lists:
        plain = tuple(one for one in given if isinstance(one, str))
        return [plain] * num_queries
    if len(lists) != num_queries:
        message = f"excluded_ids holds {len(lists)} lists for {num_queries} queries"
        raise ApiError(400, message, param="excluded_ids")
    return [tuple(one) for one in lists]
