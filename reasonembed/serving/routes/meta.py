"""What is served, how it fares, and what the model's tokens are."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from reasonembed.serving.answers import (
    HealthAnswer,
    IndexEntry,
    InfoAnswer,
    LimitsInfo,
    ModelInfo,
    SpeedInfo,
    Tokenised,
    TokenizeAnswer,
)
from reasonembed.serving.describing import API_VERSION, examples
from reasonembed.serving.errors import unavailable
from reasonembed.serving.jsonroute import JsonRoute
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import EmbedItem, ItemError, Preparer
from reasonembed.serving.readiness import Readiness
from reasonembed.serving.requests import TokenizeBody, check_contents
from reasonembed.serving.roles import Role, split_name
from reasonembed.serving.service import EmbeddingService
from reasonembed.serving.vectors import allowed_dimensions
from reasonembed.tasks import TASKS

_BODIES = examples(
    query=(
        "A query with its instruction",
        {"input": "why do trees lose their leaves?", "input_type": "query"},
    )
)


def router(service: Service, readiness: Readiness) -> APIRouter:
    """`/info`, `/tokenize`, `/livez`, `/readyz`, `/health`, `/metrics`."""
    routes = APIRouter(route_class=JsonRoute, tags=["Service"])
    _add_tokenize(routes, service)
    _add_health(routes, readiness)

    @routes.get("/info", operation_id="getInfo", summary="What is served, and its limits")
    async def info() -> InfoAnswer:
        """The model and its contract, limits, measured speed and indexes."""
        return _info(service)

    @routes.get(
        "/metrics",
        operation_id="getMetrics",
        summary="Metrics in Prometheus' form",
        response_class=Response,
        responses={
            200: {
                "description": "Metrics",
                "content": {
                    kind: {"schema": {"type": "string"}}
                    for kind in ("text/plain", "application/openmetrics-text")
                },
            }
        },
    )
    async def metrics(request: Request) -> Response:
        """Counts and times of this ingress since it started; OpenMetrics for who accepts it."""
        accept = request.headers.get("accept", "")
        body, content_type = await asyncio.to_thread(service.metrics.exposition, accept)
        return Response(body, media_type=content_type)

    return routes


def _add_health(routes: APIRouter, readiness: Readiness) -> None:
    # HEAD as well: load balancers ask so.
    @routes.head("/livez", include_in_schema=False)
    @routes.get("/livez", operation_id="getLivez", summary="Whether the process answers")
    async def livez() -> HealthAnswer:
        """Always 200."""
        return HealthAnswer(status="alive")

    @routes.head("/health", include_in_schema=False)
    @routes.get("/health", operation_id="getHealth", summary="How the service fares")
    async def health() -> HealthAnswer:
        """Always 200; the state stands in the body."""
        state, message = readiness.state()
        return HealthAnswer(status=state, message=message)

    @routes.head("/readyz", include_in_schema=False)
    @routes.get("/readyz", operation_id="getReadyz", summary="Whether texts are being embedded")
    async def readyz() -> HealthAnswer:
        """503 until a first text was embedded, and again when the newest is too long ago."""
        state, message = readiness.state()
        if message is not None:
            raise unavailable(message)
        return HealthAnswer(status=state)


def _add_tokenize(routes: APIRouter, service: Service) -> None:
    model, settings = service.embeddings.model, service.settings

    @routes.post(
        "/tokenize",
        operation_id="tokenize",
        summary="Texts in the model's tokens",
        response_model=TokenizeAnswer,
    )
    async def tokenize(
        request: Request, body: Annotated[TokenizeBody, Body(openapi_examples=_BODIES)]
    ) -> Response:
        """Ids and tokens of bare texts, and how many tokens the model gets of each in its role."""
        suffix = split_name(body.model, model) if body.model is not None else None
        role = body.role(settings, model, suffix)
        param, texts = body.named_texts()
        check_contents(texts, settings, model, param=param)
        written = await service.embeddings.tokenise(
            texts, lambda: _written(service.embeddings, texts, role)
        )
        return Response(written, media_type="application/json")


def _written(embeddings: EmbeddingService, texts: list[str], role: Role) -> bytes:
    """The answer of `/tokenize`.

    Raises:
        ApiError: 413: short words or rare characters make more tokens than the length foretold.
    """
    found = [embeddings.preparer.tokenise(text) for text in texts]
    embeddings.check_size(sum(map(len, found)))
    data = _tokenised(embeddings.preparer, texts, found, role)
    answer = TokenizeAnswer(object="list", model=embeddings.model.name, data=data)
    return answer.model_dump_json().encode()


def _tokenised(
    preparer: Preparer, texts: list[str], found: list[list[int]], role: Role
) -> list[Tokenised]:
    items = [EmbedItem(text, role.role, role.instruction, "end") for text in texts]
    data = []
    for index, (ids, prepared) in enumerate(zip(found, preparer.prepare(items), strict=True)):
        # There is an error for a text of special tokens alone.
        embedded = None if isinstance(prepared, ItemError) else prepared
        data.append(
            Tokenised(
                index=index,
                token_ids=ids,
                tokens=preparer.detokenise(ids),
                count=len(ids),
                model_tokens=0 if embedded is None else len(embedded.ids),
                is_over_limit=embedded is not None and embedded.is_truncated,
            )
        )
    return data


def _info(service: Service) -> InfoAnswer:
    settings, search = service.settings, service.search
    indexes = [] if search is None else [one.info for one in search.indexes.values()]
    return InfoAnswer(
        version=service.version,
        api_version=API_VERSION,
        model=_model_info(service),
        limits=LimitsInfo.model_validate(settings.limits.model_dump()),
        speed=_speed_info(service),
        backend="echo" if settings.model == "echo" else settings.embedder.backend,
        needs_key=service.keys is not None,
        can_rewrite=settings.rewrite is not None,
        can_grade=service.grading is not None,
        tasks=list(TASKS),
        instructions={name: task.instruction for name, task in TASKS.items()},
        indexes=[IndexEntry.model_validate(asdict(one)) for one in indexes],
    )


def _model_info(service: Service) -> ModelInfo:
    model, settings = service.embeddings.model, service.settings
    return ModelInfo(
        name=model.name,
        aliases=list(model.aliases),
        fingerprint=model.fingerprint,
        is_checked=model.is_checked,
        dimension=model.dimension,
        dimensions=allowed_dimensions(model),
        max_query_tokens=model.max_query_tokens,
        max_document_tokens=model.max_document_tokens,
        vocabulary_size=model.vocabulary_size,
        default_input_type=settings.default_input_type,
        default_instruction=model.default_instruction if model.takes_instruction else None,
    )


def _speed_info(service: Service) -> SpeedInfo:
    model = service.embeddings.model
    return SpeedInfo(
        tokens_per_s=service.embeddings.tokens_per_s,
        queued_tokens=service.embeddings.queued_tokens,
        short_tokens=service.settings.batching.short_tokens,
        short_query_waits_tokens=model.largest_pass_tokens,
        short_query_waits_s=model.largest_pass_s or None,
    )
