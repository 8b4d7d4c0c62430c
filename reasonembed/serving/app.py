"""The app: routes over the service's parts, the middleware around them, one shape of errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import Match

from reasonembed.config import LimitsConfig
from reasonembed.serving import middleware, openapi, page, reference
from reasonembed.serving.errors import ApiError
from reasonembed.serving.exchange import note_refusal
from reasonembed.serving.jsonroute import BodySize, invalid
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import stalled_after
from reasonembed.serving.readiness import Readiness
from reasonembed.serving.routes import cohere, mcp, meta, openai, rerank, search, tei

__all__ = ["Service", "create_app"]


def create_app(service: Service, *, sends_request_id: bool = True) -> FastAPI:
    """The app over a service's parts; its lifespan watches whether texts are embedded.

    Args:
        service: What there is to serve.
        sends_request_id: False behind a proxy that writes `X-Request-ID` into answers itself.
    """
    readiness = Readiness(
        service.embeddings,
        stall_s=stalled_after(service.settings.stall_s, service.embeddings.model),
        metrics=service.metrics,
    )
    app = FastAPI(
        title="ReasonEmbed",
        lifespan=_living(readiness, service),
        docs_url=None,  # the framework's page loads scripts from elsewhere; see `reference`
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
    )
    app.state.body_size = _body_size(service.settings.limits)
    _add_error_handlers(app)
    for module in (openai, cohere, tei, rerank, search):
        app.include_router(module.router(service))
    app.include_router(meta.router(service, readiness))
    app.include_router(page.router(), include_in_schema=False)
    app.include_router(reference.router(app), include_in_schema=False)
    _keep_document(app)
    mcp.mount(app, service)
    middleware.install(app, service, sends_request_id=sends_request_id)
    return app


def _body_size(limits: LimitsConfig) -> BodySize:
    """The largest that any route has a use for."""
    numbers = limits.max_request_tokens + limits.max_inputs  # a comma after each list
    return BodySize(numbers, strings=numbers + limits.max_excluded_ids)


def _operation_id(route: APIRoute) -> str:
    """`retrieve_model` as `retrieveModel`, as generated clients would call it."""
    first, *rest = route.name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _living(readiness: Readiness, service: Service) -> Any:
    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watch = asyncio.create_task(readiness.watch())
        try:
            yield
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            for end in service.on_end:
                await end()

    return lifespan


def _keep_document(app: FastAPI) -> None:
    """`/openapi.json` is ours, made once."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = openapi.describe(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # as the framework's manual has it


def _add_error_handlers(app: FastAPI) -> None:
    """One shape also for what the framework refuses; failures are the middleware's."""

    def respond(error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        note_refusal(request, error)
        return respond(error)

    @app.exception_handler(RequestValidationError)
    async def on_invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return respond(invalid(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            return respond(ApiError(404, "there is no such route; GET /docs lists them"))
        if error.status_code == 405:
            allowed = ", ".join(_methods(request))
            return respond(ApiError(405, f"this route takes {allowed}", headers={"Allow": allowed}))
        return respond(ApiError(error.status_code, str(error.detail), headers=error.headers))


def _methods(request: Request) -> list[str]:
    """What a path takes; the framework names the methods of its first route alone."""
    matching = (
        route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE
    )
    return sorted(
        {method for route in matching for method in getattr(route, "methods", None) or ()}
    )
