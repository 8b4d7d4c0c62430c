"""The protocol of Text Embeddings Inference: `POST /embed`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Request, Response

from reasonembed.serving import writing
from reasonembed.serving.answers import TeiAnswer
from reasonembed.serving.describing import answers, examples
from reasonembed.serving.exchange import note_timings
from reasonembed.serving.jsonroute import JsonRoute
from reasonembed.serving.parts import Service
from reasonembed.serving.requests import TeiBody
from reasonembed.serving.vectors import check_dimensions, cut

_BODIES = examples(
    query=("A query", {"inputs": "why do trees lose their leaves?", "prompt_name": "query"})
)


def router(service: Service) -> APIRouter:
    """`POST /embed`, and `POST /`, where `huggingface_hub.InferenceClient` sends the same."""
    routes = APIRouter(route_class=JsonRoute, tags=["Text Embeddings Inference"])
    model, settings = service.embeddings.model, service.settings

    async def embed(
        request: Request, body: Annotated[TeiBody, Body(openapi_examples=_BODIES)]
    ) -> Response:
        """Vectors of texts or token ids, with norm 1, one list an input also for a single text."""
        dimension = check_dimensions(body.dimensions, model, param="dimensions")
        items = body.items(settings, model)
        size = writing.size_of(len(items), dimension, "float", of=model.dimension)
        service.outgoing.hold(request, size)
        cutting = "set truncate: true"
        embedded = await service.embeddings.embed(items, param="inputs", cutting=cutting)
        note_timings(request, embedded.timings, tokens=sum(embedded.num_tokens))
        return await writing.respond(
            lambda: writing.array(writing.rows(cut(embedded.vectors_ND, dimension), "float")),
            num_values=len(items) * dimension,
            metrics=service.metrics,
        )

    for path, operation in (("/embed", "teiEmbed"), ("/", "teiEmbedAtRoot")):
        routes.add_api_route(
            path,
            embed,
            methods=["POST"],
            operation_id=operation,
            summary="Vectors in the form of Text Embeddings Inference",
            response_model=TeiAnswer,
            responses=answers([[0.6, -0.8]], description="One vector an input, in order"),
        )
    return routes
