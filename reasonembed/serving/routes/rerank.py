"""Given documents in the order of their relevance to a query: Cohere's form, and bare scores."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi import Body as JsonBody

from reasonembed.serving import writing
from reasonembed.serving.concurrency import VECTOR, aside, together
from reasonembed.serving.describing import Responses, answers
from reasonembed.serving.errors import ApiError, unavailable
from reasonembed.serving.exchange import note_timings
from reasonembed.serving.jsonroute import JsonRoute
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import EmbedItem, Scores, ServedModel, Unavailable, Vectors
from reasonembed.serving.requests import check_contents
from reasonembed.serving.rerank_forms import (
    RERANK_EXAMPLE,
    RERANKS,
    SCORE_EXAMPLE,
    SCORES,
    RerankAnswer,
    RerankBody,
    ScoreAnswer,
    ScoreBody,
)
from reasonembed.serving.reranking import cosines, reranker
from reasonembed.serving.roles import Said, resolve, split_name
from reasonembed.serving.service import Embedded

_MAX_GRADE = 5.0


@dataclass(frozen=True)
class _Judged:
    """Scores of a request's documents, in their order.

    Attributes:
        scores: The larger, the more relevant.
        grades: Of the annotator; None for cosines.
        truncated: Positions of documents that were cut.
        notes: For the caller.
        num_tokens: Embedded.
    """

    scores: Sequence[float]
    grades: Sequence[float | None] | None = None
    truncated: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()
    num_tokens: int = 0


def router(service: Service) -> APIRouter:
    """`POST /v1/rerank`, `POST /v2/rerank`, `POST /v1/score`."""
    routes = APIRouter(route_class=JsonRoute, tags=["rerank"])
    judged = service.settings.rerank
    annotator = judged.llm.model if judged and service.grading else None
    shown: Responses = answers(RERANK_EXAMPLE, description="Documents, the most relevant first")

    async def answer(request: Request, body: RerankBody) -> Response:
        model, texts = service.embeddings.model, body.texts()
        by = reranker(body.model, model=model, annotator=annotator, default="cosine")
        _check_documents(body.query, texts, service)
        if by == "annotator":
            found = await _grades(body, texts, service)
        else:
            found = await _cosines(request, body, texts, service)
        name = annotator if by == "annotator" and annotator else model.name
        return await writing.respond(
            lambda: _ranked(found, texts, body, name),
            num_values=len(texts) * (writing.TEXT_VALUES if body.return_documents else 1),
            metrics=service.metrics,
        )

    async def rerank(
        request: Request, body: Annotated[RerankBody, JsonBody(openapi_examples=RERANKS)]
    ) -> Response:
        """By cosine, or by the grades of the annotator; `meta.scores` says which."""
        return await answer(request, body)

    for path, operation in (("/v1/rerank", "rerank"), ("/v2/rerank", "cohereRerank")):
        routes.post(
            path,
            operation_id=operation,
            summary="Documents by relevance, in Cohere's form",
            response_model=RerankAnswer,
            responses=shown,
        )(rerank)

    @routes.post(
        "/v1/score",
        operation_id="score",
        summary="Cosines of queries and documents",
        response_model=ScoreAnswer,
        responses=answers(SCORE_EXAMPLE, description="One score a pair, in order"),
    )
    async def score(
        request: Request, body: Annotated[ScoreBody, JsonBody(openapi_examples=SCORES)]
    ) -> Response:
        """One query with every document, or queries and documents in pairs."""
        found = await _scores(request, body, service)
        return await writing.respond(
            lambda: writing.plain(found), num_values=len(found["data"]), metrics=service.metrics
        )

    return routes


async def _cosines(
    request: Request, body: RerankBody, texts: Sequence[str], service: Service
) -> _Judged:
    """The embedder's; the query loses its end where it is over the limit."""
    instruction = _instruction(body, service.embeddings.model)
    query = EmbedItem(body.query, "query", instruction, "end")
    first = body.max_tokens_per_doc
    documents = [EmbedItem(one, truncate="end", max_tokens=first) for one in texts]
    embedded, of_documents = await _embed(request, service, [query], documents, query="query")
    scores = await _compared(embedded.vectors_ND[0], of_documents.vectors_ND)
    return _Judged(
        scores.tolist(),
        truncated=of_documents.truncated,
        notes=("query was cut",) if embedded.truncated else (),
        num_tokens=sum(embedded.num_tokens) + sum(of_documents.num_tokens),
    )


async def _grades(body: RerankBody, texts: Sequence[str], service: Service) -> _Judged:
    """The annotator's.

    Raises:
        ApiError: 400 the request asks for what it cannot do, 429 it has enough to do, 503 it
            judged nothing.
    """
    config, search = service.settings.rerank, service.search
    assert config is not None and search is not None and search.grading is not None
    if body.max_tokens_per_doc is not None:
        message = (
            f"max_tokens_per_doc: the annotator reads {config.max_document_words} words of a "
            "document; leave it out"
        )
        raise ApiError(400, message, param="max_tokens_per_doc")
    if body.instruction is not None:
        message = "instruction: the annotator takes none; name a task by prompt_name"
        raise ApiError(400, message, param="instruction")
    # The task is the annotator's, whatever the embedder takes.
    _instruction(body, replace(service.embeddings.model, takes_instruction=True))
    task = body.prompt_name or "generic"
    query = body.query[: search.longest_query]  # it stands in every document's prompt
    try:
        with search.graded.take(len(texts)):
            grades = await search.grading.grade(query, texts, task=task)
    except Unavailable as error:
        raise unavailable(f"the annotator cannot answer now: {error}") from error
    if all(grade is None for grade in grades):
        raise unavailable("the annotator gave no grade; the server's log says why")
    limit = config.max_document_words
    return _Judged(
        [0.0 if grade is None else (grade - 1) / (_MAX_GRADE - 1) for grade in grades],
        grades=grades,
        truncated=tuple(n for n, text in enumerate(texts) if len(text.split()) > limit),
        notes=("query was cut",) if len(query) < len(body.query) else (),
    )


async def _scores(request: Request, body: ScoreBody, service: Service) -> dict[str, Any]:
    model = service.embeddings.model
    if body.model is not None:
        split_name(body.model, model)
    queries = [body.queries] if isinstance(body.queries, str) else body.queries
    documents = [body.documents] if isinstance(body.documents, str) else body.documents
    check_contents(queries, service.settings, model, param="queries")
    check_contents(documents, service.settings, model, param="documents")
    if len(queries) not in (1, len(documents)):
        message = f"{len(queries)} queries and {len(documents)} documents make no pairs"
        raise ApiError(400, f"{message}; send one query, or as many as documents", param="queries")
    instruction = _instruction(body, model)
    left, right = await _embed(
        request,
        service,
        [EmbedItem(one, "query", instruction, body.truncate) for one in queries],
        [EmbedItem(one, truncate=body.truncate) for one in documents],
        query="queries",
    )
    one_for_all = len(queries) == 1
    scores = await _compared(
        left.vectors_ND[0] if one_for_all else left.vectors_ND, right.vectors_ND
    )
    total = sum(left.num_tokens) + sum(right.num_tokens)
    cut = [*left.truncated, *(len(queries) + number for number in right.truncated)]
    return {
        "id": str(uuid.uuid4()),
        "object": "list",
        "model": model.name,
        "data": [
            {"object": "score", "index": number, "score": one}
            for number, one in enumerate(scores.tolist())
        ],
        "usage": {"prompt_tokens": total, "total_tokens": total, "truncated_inputs": cut},
    }


async def _embed(
    request: Request,
    service: Service,
    queries: Sequence[EmbedItem],
    documents: Sequence[EmbedItem],
    *,
    query: str,
) -> tuple[Embedded, Embedded]:
    """Both sides at once; `query` is the request's field, for messages."""
    left, right = await together(
        service.embeddings.embed(queries, param=query),
        service.embeddings.embed(documents, param="documents"),
    )
    for one in (left, right):
        note_timings(request, one.timings, tokens=sum(one.num_tokens))
    return left, right


async def _compared(queries: Vectors, documents_ND: Vectors) -> Scores:
    """See `cosines`."""
    return await aside(len(documents_ND) * VECTOR, lambda: cosines(queries, documents_ND))


def _instruction(body: RerankBody | ScoreBody, model: ServedModel) -> str | None:
    """What the query asks for; refused where the model takes no instruction.

    Raises:
        ApiError: 400: see `roles.resolve`; or the prompt is that of documents.
    """
    said = Said(prompt_name=body.prompt_name, instruction=body.instruction)
    role = resolve(said, model=model, default="query")
    if role.role != "query":
        raise ApiError(400, "prompt_name: queries are no documents", param="prompt_name")
    return role.instruction


def _check_documents(query: str, texts: Sequence[str], service: Service) -> None:
    """Refuses too many documents, none, or an empty text.

    Raises:
        ApiError: 400.
    """
    limit = service.settings.limits.max_rerank_documents
    if not 1 <= len(texts) <= limit:
        message = f"documents holds {len(texts)} items; send 1 to {limit}"
        raise ApiError(400, message, param="documents")
    if not query.strip():
        raise ApiError(400, "query is empty", param="query")
    for number, text in enumerate(texts):
        if not text.strip():
            raise ApiError(400, f"documents[{number}] is empty", param="documents")


def _ranked(judged: _Judged, texts: Sequence[str], body: RerankBody, model: str) -> bytes:
    grades = judged.grades
    failed = [number for number, grade in enumerate(grades or ()) if grade is None]
    last = set(failed)
    order = sorted(range(len(texts)), key=lambda n: (n in last, -judged.scores[n], n))
    results = []
    for number in order[: body.top_n]:
        result: dict[str, Any] = {"index": number, "relevance_score": judged.scores[number]}
        if grades is not None:
            result["grade"] = grades[number]
        if body.return_documents:
            result["document"] = {"text": texts[number]}
        results.append(result)
    meta = {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1, "input_tokens": judged.num_tokens},
        "warnings": [
            *judged.notes,
            *(f"documents[{number}] was cut" for number in judged.truncated),
            *(f"documents[{number}] has no grade: the annotator failed" for number in failed),
        ],
        "scores": "cosine" if grades is None else "grade",
        "truncated_documents": list(judged.truncated),
        "failed_documents": failed,
    }
    fields = {"id": str(uuid.uuid4()), "model": model, "meta": meta}
    return writing.with_list(fields, "results", results)
