"""OpenAI's protocol: vectors and the list of models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Path, Request, Response

from reasonembed.serving import writing
from reasonembed.serving.answers import EmbeddingsAnswer, ModelEntry, ModelList
from reasonembed.serving.describing import answers, examples
from reasonembed.serving.exchange import note_timings
from reasonembed.serving.jsonroute import JsonRoute
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import ServedModel
from reasonembed.serving.requests import EmbeddingsBody
from reasonembed.serving.roles import split_name
from reasonembed.serving.service import Embedded
from reasonembed.serving.vectors import check_dimensions, cut

_BODIES = examples(
    documents=(
        "Two documents",
        {
            "model": "reasonembed",
            "input": ["Roots hold the soil.", "Leaves fall in autumn."],
            "input_type": "document",
        },
    ),
    query=(
        "A query with the instruction of a task, as base64",
        {
            "model": "reasonembed",
            "input": "why do trees lose their leaves?",
            "prompt_name": "biology",
            "encoding_format": "base64",
        },
    ),
)
_ANSWER = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.6, -0.8]}],
    "model": "reasonembed",
    "usage": {"prompt_tokens": 12, "total_tokens": 12, "truncated_inputs": []},
}


def router(service: Service) -> APIRouter:
    """`POST /v1/embeddings`, `GET /v1/models`, `GET /v1/models/{model_id}`."""
    routes = APIRouter(route_class=JsonRoute, tags=["OpenAI"])
    model, settings = service.embeddings.model, service.settings

    @routes.post(
        "/v1/embeddings",
        operation_id="createEmbeddings",
        summary="Vectors in OpenAI's form",
        response_model=EmbeddingsAnswer,
        responses=answers(_ANSWER, description="One vector an input, in order"),
    )
    async def embeddings(
        request: Request, body: Annotated[EmbeddingsBody, Body(openapi_examples=_BODIES)]
    ) -> Response:
        """Vectors of texts or token ids, with norm 1.

        Inputs are documents unless the request says that they are queries: by `input_type`, `task`,
        `prompt_name` or `instruction`, or by the end of the model's name (`NAME:query`).
        """
        dimension = check_dimensions(body.dimensions, model, param="dimensions")
        items = body.items(settings, model)
        encoding = body.encoding_format or "float"
        size = writing.size_of(len(items), dimension, encoding, of=model.dimension)
        service.outgoing.hold(request, size)
        embedded = await service.embeddings.embed(items)
        note_timings(request, embedded.timings, tokens=sum(embedded.num_tokens))
        return await writing.respond(
            lambda: _written(embedded, encoding, dimension, model.name),
            num_values=len(items) * dimension,
            metrics=service.metrics,
        )

    @routes.get(
        "/v1/models",
        operation_id="listModels",
        summary="Names that requests may use",
    )
    async def models() -> ModelList:
        """The model, its aliases, and its names for queries and for documents."""
        return ModelList(object="list", data=_entries(model))

    @routes.get(
        "/v1/models/{model_id:path}",
        operation_id="retrieveModel",
        summary="What a name stands for",
    )
    async def one_model(
        model_id: Annotated[str, Path(description="a name", examples=["reasonembed"])],
    ) -> ModelEntry:
        """The model behind a name."""
        return _entry(model, model_id, split_name(model_id, model, param="model_id"))

    return routes


def _written(embedded: Embedded, encoding: writing.Encoding, dimension: int, name: str) -> bytes:
    vectors = writing.rows(cut(embedded.vectors_ND, dimension), encoding)
    total = sum(embedded.num_tokens)
    usage = {
        "prompt_tokens": total,
        "total_tokens": total,
        "truncated_inputs": list(embedded.truncated),
    }
    data = writing.array(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, vector)
        for index, vector in enumerate(vectors)
    )
    return writing.object_of(
        [
            ("object", b'"list"'),
            ("data", data),
            ("model", writing.plain(name)),
            ("usage", writing.plain(usage)),
        ]
    )


def _entries(model: ServedModel) -> list[ModelEntry]:
    roles = [_entry(model, f"{model.name}:{role}", role) for role in ("query", "document")]
    return [*(_entry(model, name, None) for name in (model.name, *model.aliases)), *roles]


def _entry(model: ServedModel, name: str, suffix: str | None) -> ModelEntry:
    role = "query" if suffix not in (None, "document") else suffix
    return ModelEntry(
        id=name,
        object="model",
        created=model.created,
        owned_by="reasonembed",
        root=model.name,
        input_type=role,
        dimensions=model.dimension,
        max_query_tokens=model.max_query_tokens,
        max_document_tokens=model.max_document_tokens,
    )
