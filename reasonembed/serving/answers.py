"""Answers as their protocols define them; the OpenAPI document is made of these.

Answers with vectors are written by hand (`writing`), so these models describe them and no more.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str = Field(examples=["invalid_request_error"])
    param: str | None = Field(description="the field of the request that it is about")
    code: str | None = Field(description="a stable name for programs, where there is one")


class ErrorAnswer(BaseModel):
    """Every error has this shape, whatever its status."""

    error: ErrorDetail


class Embedding(BaseModel):
    """A vector."""

    object: Literal["embedding"]
    index: int = Field(description="of the input, from 0")
    embedding: list[float] | str = Field(description="numbers, or base64 of little-endian float32")


class Usage(BaseModel):
    """What was counted."""

    prompt_tokens: int = Field(description="template, instruction and special tokens included")
    total_tokens: int
    truncated_inputs: list[int] = Field(
        description="extension: indices of the inputs that were cut"
    )


class EmbeddingsAnswer(BaseModel):
    """Answer of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class CohereEmbeddings(BaseModel):
    """One list of vectors a type that was asked for."""

    float_: list[list[float]] | None = Field(None, alias="float")
    base64: list[str] | None = None
    binary: list[list[int]] | None = None
    ubinary: list[list[int]] | None = None


class CohereVersion(BaseModel):
    """Of the protocol."""

    version: Literal["2"]


class CohereUnits(BaseModel):
    """What was counted."""

    input_tokens: int


class CohereMeta(BaseModel):
    """Beside the vectors."""

    api_version: CohereVersion
    billed_units: CohereUnits
    warnings: list[str] = Field(description="names the texts that were cut")


class CohereAnswer(BaseModel):
    """Answer of `POST /v2/embed`."""

    id: str
    embeddings: CohereEmbeddings
    texts: list[str]
    meta: CohereMeta
    response_type: Literal["embeddings_by_type"]


class ModelEntry(BaseModel):
    """A name that requests may use."""

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time in seconds")
    owned_by: str
    root: str = Field(description="the model behind it")
    input_type: str | None = Field(description="the role that the name says; null: none")
    dimensions: int = Field(description="length of a vector")
    max_query_tokens: int
    max_document_tokens: int


class ModelList(BaseModel):
    """Answer of `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelEntry]


class ModelInfo(BaseModel):
    """What is served."""

    name: str
    aliases: list[str]
    fingerprint: str = Field(description="of contract and weights; equal ones give equal vectors")
    is_checked: bool = Field(
        description="whether golden token ids and vectors stood beside the weights and agreed"
    )
    dimension: int
    dimensions: list[int] = Field(description="lengths that may be asked for")
    max_query_tokens: int
    max_document_tokens: int
    vocabulary_size: int
    default_input_type: str
    default_instruction: str | None = Field(description="null where the model takes none")


class LimitsInfo(BaseModel):
    """What a request may hold, and what may wait."""

    max_inputs: int
    max_request_tokens: int
    max_queued_tokens: int
    max_body_bytes: int
    max_answer_bytes: int = Field(
        description="of all answers that are being computed, written or read by their clients"
    )
    max_top_k: int
    max_hits: int = Field(description="queries times hits of a search")
    max_excluded_ids: int = Field(description="of all queries of a search together")
    max_queued_searches: int
    max_rerank_documents: int
    timeout_s: float


class SpeedInfo(BaseModel):
    """How fast the service is, and how long a short query waits."""

    tokens_per_s: float = Field(description="of all replicas, measured while there was work")
    queued_tokens: int = Field(description="admitted and not answered")
    short_tokens: int = Field(description="texts up to here count as short")
    short_query_waits_tokens: int = Field(
        description="the most that a lane still has to compute when a short query arrives: its "
        "running batch. Among other short queries it waits its turn; where another request has "
        "just ended, those that wait and had less than their share may go before it."
    )
    short_query_waits_s: float | None = Field(
        description="the same in seconds, as measured at the start; null where it was not"
    )


class IndexEntry(BaseModel):
    """An index that can be searched."""

    name: str
    num_documents: int
    dimension: int = Field(description="0 where it holds no vectors")
    model: str
    fingerprint: str
    task: str
    instruction: str | None
    kinds: list[str]


class InfoAnswer(BaseModel):
    """Answer of `GET /info`."""

    version: str
    api_version: str
    model: ModelInfo
    limits: LimitsInfo
    speed: SpeedInfo
    backend: str
    needs_key: bool
    can_rewrite: bool = Field(description="whether searches may ask for q′")
    can_grade: bool = Field(description="whether searches may ask for the annotator's grades")
    tasks: list[str] = Field(description="names that `prompt_name` takes besides the two roles")
    instructions: dict[str, str] = Field(description="of each task; what its queries ask for")
    indexes: list[IndexEntry]


class Tokenised(BaseModel):
    """A text in the model's tokens."""

    index: int
    token_ids: list[int] = Field(description="of the bare text, without template or limit")
    tokens: list[str]
    count: int
    model_tokens: int = Field(
        description="what the model gets, template, instruction and special tokens included, cut "
        "at its limit"
    )
    is_over_limit: bool = Field(description="whether the text is cut, or refused, when embedded")


class TokenizeAnswer(BaseModel):
    """Answer of `POST /tokenize`."""

    object: Literal["list"]
    model: str
    data: list[Tokenised]


class HealthAnswer(BaseModel):
    """Whether the service can answer."""

    status: Literal["alive", "ok", "starting", "stalled"]
    message: str | None = None


TeiAnswer = list[list[float]]


def as_json(answer: BaseModel) -> dict[str, Any]:
    """An answer as the JSON encoder takes it."""
    return answer.model_dump(mode="json")
