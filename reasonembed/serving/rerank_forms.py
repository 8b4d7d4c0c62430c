"""Bodies and answers of reranking: Cohere's form, and bare scores."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from reasonembed.serving.answers import CohereVersion, Usage
from reasonembed.serving.describing import examples
from reasonembed.serving.protocol import Truncate
from reasonembed.serving.requests import Body

RERANKS = examples(
    cosine=(
        "Two documents by the cosines of the served model",
        {
            "model": "reasonembed",
            "query": "why do trees lose their leaves?",
            "documents": ["Roots hold the soil.", "A layer of cells cuts the leaf off."],
            "top_n": 1,
        },
    )
)
RERANK_EXAMPLE = {
    "id": "5807ee2e-0cda-445a-9ec8-864c60a06606",
    "model": "reasonembed",
    "results": [{"index": 1, "relevance_score": 0.71}],
    "meta": {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1, "input_tokens": 31},
        "warnings": [],
        "scores": "cosine",
        "truncated_documents": [],
        "failed_documents": [],
    },
}
SCORES = examples(
    one=(
        "A query with two documents",
        {
            "queries": "why do trees lose their leaves?",
            "documents": ["Roots hold the soil.", "A layer of cells cuts the leaf off."],
        },
    )
)
SCORE_EXAMPLE = {
    "id": "5807ee2e-0cda-445a-9ec8-864c60a06606",
    "object": "list",
    "model": "reasonembed",
    "data": [
        {"object": "score", "index": 0, "score": 0.12},
        {"object": "score", "index": 1, "score": 0.71},
    ],
    "usage": {"prompt_tokens": 31, "total_tokens": 31, "truncated_inputs": []},
}


class TextDocument(Body):
    """A document as an object."""

    text: str


class RerankBody(Body):
    """Body of `POST /v1/rerank` and `POST /v2/rerank`, in Cohere's form."""

    query: str = Field(description="the text; one over the model's limit loses its end")
    documents: list[str] | list[TextDocument] = Field(
        description="a list of texts, or a list of objects that hold one; those over the model's "
        "limit lose their end, and the answer names them"
    )
    model: str | None = Field(
        None,
        description="the served model's name for cosines (default); the same with `:annotator`, or "
        "the annotator's own name, for the LLM's grades",
    )
    top_n: int | None = Field(None, ge=1, description="results that come back; default all")
    max_tokens_per_doc: int | None = Field(
        None, ge=1, description="cuts documents earlier than the model does; cosines alone"
    )
    return_documents: bool = Field(False, description="extension: results hold their documents")
    instruction: str | None = Field(None, description="extension: what the query asks for")
    prompt_name: str | None = Field(
        None, description="extension: name of a retrieval task", examples=["biology"]
    )
    priority: int | None = Field(None, description="taken and not used")

    def texts(self) -> list[str]:
        """The documents."""
        return [one if isinstance(one, str) else one.text for one in self.documents]


class ScoreBody(Body):
    """Body of `POST /v1/score`: cosines of one query with all documents, or pair by pair."""

    queries: str | list[str] = Field(description="a text, or a list of texts")
    documents: str | list[str] = Field(
        description="a text, or a list of texts: as many as queries, or any number for one query"
    )
    model: str | None = Field(None, description="the served model's name, if given")
    instruction: str | None = Field(None, description="what the queries ask for")
    prompt_name: str | None = Field(
        None, description="name of a retrieval task", examples=["biology"]
    )
    truncate: Truncate = Field(
        "none", description="what happens to texts over the model's limit: refused or cut there"
    )


class RankedAnswer(BaseModel):
    """A document in its new place."""

    index: int = Field(description="of the document in the request")
    relevance_score: float = Field(
        description="cosine, or grade g as (g - 1) / 4; 0 where the annotator failed"
    )
    grade: float | None = Field(None, description="1–5; left out of cosines, null where it failed")
    document: TextDocument | None = Field(None, description="left out unless asked for")


class RerankUnits(BaseModel):
    """What was counted."""

    search_units: int
    input_tokens: int = Field(description="embedded; 0 for grades")


class RerankMeta(BaseModel):
    """Beside the results."""

    api_version: CohereVersion
    billed_units: RerankUnits
    warnings: list[str] = Field(description="the same in words")
    scores: Literal["cosine", "grade"]
    truncated_documents: list[int] = Field(description="that lost their end")
    failed_documents: list[int] = Field(description="that the annotator gave no grade")


class RerankAnswer(BaseModel):
    """Answer of `POST /v1/rerank` and `POST /v2/rerank`."""

    id: str
    model: str
    results: list[RankedAnswer]
    meta: RerankMeta


class ScoreEntry(BaseModel):
    """A cosine."""

    object: Literal["score"]
    index: int
    score: float


class ScoreAnswer(BaseModel):
    """Answer of `POST /v1/score`."""

    id: str
    object: Literal["list"]
    model: str
    data: list[ScoreEntry]
    usage: Usage
