"""The OpenAPI document: what the routes say, and what holds for all of them.

`python -m reasonembed.serving.openapi FILE` writes it; it depends on no configuration.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute

from reasonembed.serving.answers import ErrorAnswer
from reasonembed.serving.describing import API_VERSION
from reasonembed.serving.middleware import OPEN_PATHS

_DESCRIPTION = (
    "Vectors and search of a reasoning-intensive embedder, in the protocols that clients speak. "
    "Errors have OpenAI's shape on every status. Fields that a protocol does not have are marked "
    "as extensions; unknown fields are refused. Agents find the same searches at `/mcp` (Model "
    "Context Protocol)."
)
_TAGS = {
    "OpenAI": "Vectors as OpenAI's clients ask for them",
    "Cohere": "Vectors as Cohere's clients ask for them",
    "Text Embeddings Inference": "Vectors as the clients of TEI ask for them",
    "search": "Documents that help with a query, from the indexes that are loaded",
    "rerank": "Given documents in the order of their relevance",
    "Service": "What is served, and how it fares",
}
_ERRORS = {
    "400": "The request is not understood; `param` names the field",
    "401": "No key, or one that is unknown",
    "403": "The Host or Origin header is not this server's",
    "404": "There is no such model, index or document",
    "408": "Not answered within the server's limit",
    "413": "More than a request may hold; the message names the limit",
    "415": "The body is no JSON, or is compressed",
    "429": "The queue is full; `Retry-After` says when there is room",
    "500": "The server failed",
    "503": "Not ready, or no replica is alive",
}
_OF_BODIES = ("400", "401", "403", "404", "408", "413", "415", "429", "500", "503")
_OF_PARAMETERS = ("400", "401", "403", "404", "500", "503")
_OF_OTHERS = ("401", "403", "500")
_OF_OPEN = ("403", "500", "503")
_PAGE: dict[str, Any] = {
    "operationId": "getPage",
    "summary": "The page to search with",
    "description": "Its own files lie under `/page/`; it asks the routes of this document.",
    "tags": ["Service"],
    "responses": {
        "200": {
            "description": "The page",
            "content": {"text/html": {"schema": {"type": "string"}}},
        }
    },
}
_RETRY = {
    "Retry-After": {"description": "whole seconds", "schema": {"type": "integer", "minimum": 1}},
    "Retry-After-Ms": {"description": "milliseconds", "schema": {"type": "integer", "minimum": 1}},
}


def describe(app: FastAPI) -> dict[str, Any]:
    """The document of an app; errors and the key are added to what the routes say themselves."""
    document = get_openapi(
        title="ReasonEmbed",
        version=API_VERSION,
        description=_DESCRIPTION,
        routes=app.routes,
        license_info={"name": "Apache-2.0", "identifier": "Apache-2.0"},
        servers=[{"url": "/"}],
        tags=[{"name": name, "description": text} for name, text in _TAGS.items()],
    )
    _put_back_examples(document, app)
    document["paths"].setdefault("/", {})["get"] = copy.deepcopy(_PAGE)
    _add_components(document.setdefault("components", {}))
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _complete(operation, path)
    return document


def _add_components(components: dict[str, Any]) -> None:
    """What the operations have in common."""
    schemas = components.setdefault("schemas", {})
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    schemas |= _error_schemas()
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "where keys are configured"}
    }
    components["headers"] = {
        "RequestId": {
            "description": "the request's own, where it is short and plain, else a new one; the "
            "log names it",
            "schema": {"type": "string"},
        }
    }
    components["responses"] = {f"Error{status}": _error(status) for status in _ERRORS}


def _put_back_examples(document: dict[str, Any], app: FastAPI) -> None:
    """The framework drops fields that are null, also from examples, where they mean something."""
    for route in app.routes:
        if not isinstance(route, APIRoute) or not route.include_in_schema:
            continue
        for method in route.methods:
            described = document["paths"][route.path_format][method.lower()]["responses"]
            for status, response in route.responses.items():
                for kind, content in response.get("content", {}).items():
                    described[str(status)]["content"][kind] |= content


def _error_schemas() -> dict[str, Any]:
    schema = ErrorAnswer.model_json_schema(ref_template="#/components/schemas/{model}")
    parts = schema.pop("$defs")
    return {**parts, "ErrorAnswer": schema}


def _error(status: str) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}},
    }
    return answer | {"headers": _RETRY} if status in ("429", "503") else answer


def _complete(operation: dict[str, Any], path: str) -> None:
    """Adds the errors that an operation may answer with, and whether it needs a key."""
    responses = operation["responses"]
    responses.pop("422", None)  # the framework's own; here such requests get 400
    for status in _statuses(operation, path):
        responses[status] = {"$ref": f"#/components/responses/Error{status}"}
    responses["200"]["headers"] = {"X-Request-ID": {"$ref": "#/components/headers/RequestId"}}
    operation["responses"] = dict(sorted(responses.items()))
    operation["security"] = [] if path in OPEN_PATHS else [{"bearer": []}, {}]


def _statuses(operation: dict[str, Any], path: str) -> tuple[str, ...]:
    if path in OPEN_PATHS:
        return _OF_OPEN
    if "requestBody" in operation:
        return _OF_BODIES
    return _OF_PARAMETERS if operation.get("parameters") else _OF_OTHERS


def document() -> dict[str, Any]:
    """The document of the whole service."""
    from reasonembed.config import ServeConfig
    from reasonembed.serving.assembly import assemble

    found: dict[str, Any] = assemble(ServeConfig(model="echo", cache_mib=0)).openapi()
    return found


def text() -> str:
    """The document as a file holds it."""
    return json.dumps(document(), indent=2, ensure_ascii=False, sort_keys=False) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(text(), encoding="utf-8")
