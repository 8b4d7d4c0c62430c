"""The one error shape of the service: OpenAI's, whatever the status."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP status.
        message: For the caller.
        param: The field of the request that it is about.
        code: Stable name for programs, where the protocol has one.
        headers: Of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The protocol's error object."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": kinds.get(self.status, kind),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def overloaded(message: str, *, retry_after_s: float) -> ApiError:
    """429: the queue is full; says when there will be room."""
    return ApiError(429, message, code="overloaded", headers=_retry(retry_after_s))


def unavailable(message: str, *, retry_after_s: float = 1.0) -> ApiError:
    """503: not ready, or no replica is alive."""
    return ApiError(503, message, code="unavailable", headers=_retry(retry_after_s))


def _retry(seconds: float) -> dict[str, str]:
    whole = max(1, math.ceil(seconds))  # the header holds whole seconds
    return {"Retry-After": str(whole), "Retry-After-Ms": str(max(1, math.ceil(seconds * 1_000)))}
