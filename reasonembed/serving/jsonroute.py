"""Routes with a JSON body: what is no JSON, and what does not fit, as one error shape."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.datastructures import Headers

from reasonembed.serving.errors import ApiError

# One without an end is matched as well: else the search would begin again at each of its quotes.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"\s*,?|\\?\Z)', re.DOTALL)
_SHOWN = 64  # characters of a field's name that an answer repeats


@dataclass(frozen=True)
class BodySize:
    """What a body may hold; an app has it as `state.body_size`."""

    numbers: int
    strings: int


class _JsonRequest(Request):
    async def json(self) -> Any:
        """The body; unlike the standard reader, this one refuses halves of surrogate pairs."""
        body = await self.body()
        try:
            return from_json(body, allow_inf_nan=False)
        except ValueError as error:
            raise json.JSONDecodeError(str(error), "", 0) from None


class JsonRoute(APIRoute):
    """A route whose body is checked before it is read.

    Bodies that are not JSON, not UTF-8, nested too deeply or holding half of a surrogate pair are
    a 400, and another content type a 415.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The framework's handler with these checks before it."""
        handle, model = super().get_route_handler(), _body_model(self)

        async def checked(request: Request) -> Response:
            request = _JsonRequest(request.scope, request.receive)
            if model is not None and (body := await request.body()):
                check_content_type(request.headers)
                _check_size(body, getattr(request.app.state, "body_size", None))
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise invalid(error.errors(), model) from None

        return checked


def invalid(errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None = None) -> ApiError:
    """What to answer to a request that does not validate.

    No value of the request is repeated: it may be long, or hold what JSON cannot carry back.

    Args:
        errors: As pydantic lists them; locations start with where in the request.
        model: Of the body.
    """
    first = errors[0]
    location = [str(part) for part in first["loc"][1:]]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['ctx']['error']}"[:200])
    if not location:
        is_ours = first["type"] == "too_many_fields"
        return ApiError(400, f"the body {first['msg'] if is_ours else 'must be a JSON object'}")
    field = location[0]
    if first["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields) if model and len(location) == 1 else ""
        there_are = f"; there are: {known}" if known else ""
        shown = ".".join(location)[:_SHOWN]
        return ApiError(400, f"unknown parameter{there_are}", param=shown)
    if first["type"] == "missing":
        return ApiError(400, f"{'.'.join(location)} is missing", param=field)
    kinds = {tuple(error["loc"][:2]) for error in errors}
    if model and field in model.model_fields and len(errors) > 1 and len(kinds) == 1:
        # Every form that the field may have was tried: say which there are, not how each failed.
        return ApiError(
            400, f"{field} must be {model.model_fields[field].description}", param=field
        )
    return ApiError(400, f"{'.'.join(location)[:_SHOWN]}: {first['msg']}", param=field)


def _check_size(body: bytes, most: BodySize | None) -> None:
    """Counts numbers (and lists and objects) by the commas after them, and strings.

    To read millions takes half a second, and no thread could do it beside the loop: the reader
    keeps the interpreter to itself. So the counting stops where there are too many, too.

    Raises:
        ApiError: 413.
    """
    if most is None or body.count(b",") <= most.numbers:
        return
    rest, strings = _STRING.subn(b"", body, count=most.strings + 1)
    if strings > most.strings:
        what = f"{most.strings} strings"
    elif rest.count(b",") > most.numbers:
        what = f"{most.numbers} numbers"
    else:
        return
    raise ApiError(
        413,
        f"the body holds more than {what}, over what a request of the largest size may hold "
        "(max_request_tokens); send it in parts",
        code="request_too_large",
    )


def _body_model(route: APIRoute) -> type[BaseModel] | None:
    annotation = route.body_field.field_info.annotation if route.body_field else None
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def check_content_type(headers: Headers) -> None:
    """Refuses a body that does not say that it is JSON.

    Raises:
        ApiError: 415.
    """
    given = headers.get("content-type", "").split(";")[0].strip().lower()
    if given != "application/json" and not (
        given.startswith("application/") and given.endswith("+json")
    ):
        raise ApiError(
            415, "the body must be JSON: send Content-Type: application/json", code="media_type"
        )
