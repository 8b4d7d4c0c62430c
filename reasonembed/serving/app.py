"""The app: embeddings in the OpenAI protocol, its model list, and a health check."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import numpy as np
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from reasonembed.serving.protocol import Embed, EmbedResult, ItemError, Outcome, ServedModel
from reasonembed.serving.requests import ApiError, EmbeddingRequest, invalid_body

log = logging.getLogger(__name__)


def create_app(
    embed: Embed, model: ServedModel, *, is_ready: Callable[[], bool] = lambda: True
) -> FastAPI:
    """An app over one model.

    Args:
        embed: Embeds the items of a request; a `MicroBatcher.embed` shares batches among requests.
        model: What is served.
        is_ready: Whether requests can be answered; until then they and the health check get 503.
    """
    app = FastAPI(title="ReasonEmbed", openapi_url="/openapi.json")
    _add_error_handlers(app)

    def require_ready() -> None:
        if not is_ready():
            raise ApiError(503, "the model is being loaded", headers={"Retry-After": "1"})

    @app.get("/health")
    async def health() -> dict[str, str]:
        require_ready()
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_describe(model)]}

    @app.post("/v1/embeddings")
    async def embeddings(request: Annotated[EmbeddingRequest, Body()]) -> JSONResponse:
        require_ready()
        items = request.items(model)
        results = _all_or_error(await embed(items))
        return JSONResponse(_answer(results, request, model))

    return app


def _all_or_error(outcomes: Sequence[Outcome]) -> list[EmbedResult]:
    """The results if every input has one.

    Raises:
        ApiError: For the first that has none.
    """
    results = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, ItemError):
            status = 400 if outcome.is_callers_fault else 500
            raise ApiError(status, f"input[{index}]: {outcome.message}", param="input")
        if not np.isfinite(outcome.vector).all():
            raise ApiError(500, f"input[{index}]: the model gave a vector that is not finite")
        results.append(outcome)
    return results


def _answer(
    results: Sequence[EmbedResult], request: EmbeddingRequest, model: ServedModel
) -> dict[str, Any]:
    num_tokens = sum(result.num_tokens for result in results)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    if request.truncate == "end":
        usage["truncated_inputs"] = sum(result.is_truncated for result in results)
    data = [
        {"object": "embedding", "index": index, "embedding": _encode(result, request)}
        for index, result in enumerate(results)
    ]
    return {"object": "list", "data": data, "model": model.name, "usage": usage}


def _encode(result: EmbedResult, request: EmbeddingRequest) -> str | list[float]:
    vector = np.asarray(result.vector, dtype="<f4")
    if request.encoding_format == "base64":
        return base64.b64encode(vector.tobytes()).decode("ascii")
    numbers: list[float] = vector.tolist()
    return numbers


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "reasonembed",
        "dimensions": model.dimension,
        "max_query_tokens": model.max_query_tokens,
        "max_document_tokens": model.max_document_tokens,
    }


def _add_error_handlers(app: FastAPI) -> None:
    """One error shape for every status, also those that the framework answers by itself."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(
            error.body(), status_code=error.status, headers=dict(error.headers or {})
        )

    @app.exception_handler(ApiError)
    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return respond(invalid_body(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{error.detail}: {request.method} {request.url.path}"
        return respond(ApiError(error.status_code, message, headers=error.headers))

    @app.exception_handler(Exception)
    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return respond(ApiError(500, "the server failed; its log says why"))
