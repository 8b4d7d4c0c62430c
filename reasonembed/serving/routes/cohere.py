"""Cohere's protocol: `POST /v2/embed`."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from reasonembed.serving import writing
from reasonembed.serving.answers import CohereAnswer
from reasonembed.serving.describing import answers, examples
from reasonembed.serving.errors import ApiError
from reasonembed.serving.exchange import note_timings
from reasonembed.serving.jsonroute import JsonRoute
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import EmbedItem, Vectors
from reasonembed.serving.requests import CohereBody, EmbeddingType
from reasonembed.serving.service import Embedded
from reasonembed.serving.vectors import check_dimensions, cut, signs

_BODIES = examples(
    documents=(
        "Two documents",
        {
            "model": "reasonembed",
            "texts": ["Roots hold the soil.", "Leaves fall in autumn."],
            "input_type": "search_document",
            "embedding_types": ["float"],
        },
    )
)
_ANSWER = {
    "id": "5807ee2e-0cda-445a-9ec8-864c60a06606",
    "embeddings": {"float": [[0.6, -0.8]]},
    "texts": ["Roots hold the soil."],
    "meta": {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": 6},
        "warnings": [],
    },
    "response_type": "embeddings_by_type",
}


def router(service: Service) -> APIRouter:
    """`POST /v2/embed`."""
    routes = APIRouter(route_class=JsonRoute, tags=["Cohere"])
    model, settings = service.embeddings.model, service.settings

    @routes.post(
        "/v2/embed",
        operation_id="cohereEmbed",
        summary="Vectors in Cohere's form",
        response_model=CohereAnswer,
        responses=answers(_ANSWER, description="One list of vectors an embedding type"),
    )
    async def embed(
        request: Request, body: Annotated[CohereBody, Body(openapi_examples=_BODIES)]
    ) -> Response:
        """Vectors of texts; `input_type` must be said. Texts over the limit lose their end.

        `int8` and `uint8` are refused: they need ranges that were measured on a corpus.
        """
        param = "output_dimension"
        dimension = check_dimensions(body.output_dimension, model, param=param)
        types: list[EmbeddingType] = list(dict.fromkeys(body.embedding_types or ("float",)))
        _check_types(types, dimension)
        items, field = body.items(settings, model), body.field()
        sizes = [writing.size_of(len(items), dimension, one, of=model.dimension) for one in types]
        service.outgoing.hold(request, sum(sizes))
        cutting = "set truncate to 'END' or 'START'"
        embedded = await service.embeddings.embed(items, param=field, cutting=cutting)
        note_timings(request, embedded.timings, tokens=sum(embedded.num_tokens))
        return await writing.respond(
            lambda: _written(embedded, items, types, dimension, field=field),
            num_values=len(items) * dimension,
            metrics=service.metrics,
        )

    return routes


def _check_types(types: Sequence[EmbeddingType], dimension: int) -> None:
    if dimension % 8 and {"binary", "ubinary"} & set(types):
        raise ApiError(
            400,
            f"embedding_types: binary and ubinary need a length that divides by 8, not {dimension}",
            param="embedding_types",
        )


def _written(
    embedded: Embedded,
    items: Sequence[EmbedItem],
    types: Sequence[EmbeddingType],
    dimension: int,
    *,
    field: str,
) -> bytes:
    vectors = cut(embedded.vectors_ND, dimension)
    meta = {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": sum(embedded.num_tokens)},
        "warnings": [f"{field}[{index}] was cut" for index in embedded.truncated],
    }
    return writing.object_of(
        [
            ("id", writing.plain(str(uuid.uuid4()))),
            ("embeddings", writing.object_of([(one, _of_type(vectors, one)) for one in types])),
            ("texts", writing.plain([item.content for item in items])),
            ("meta", writing.plain(meta)),
            ("response_type", b'"embeddings_by_type"'),
        ]
    )


def _of_type(vectors_ND: Vectors, kind: EmbeddingType) -> bytes:
    if kind == "float" or kind == "base64":
        return writing.array(writing.rows(vectors_ND, kind))
    return writing.array(writing.integers(signs(vectors_ND, signed=kind == "binary")))
