"""One request and its answer, as headers, metrics and the access log tell of it.

Nothing in here is a text of a user: paths are the routes' templates, names are those of keys.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TextIO

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Scope

from reasonembed.serving.errors import ApiError
from reasonembed.serving.service import Timings
from reasonembed.serving.tracing import TraceContext, trace_of

ACCESS = "reasonembed.access"
"""Logger of the access log: one line of JSON a request."""
GONE = 499
"""Status in log and metrics of a request whose client left before the answer, as nginx has it."""
UNMATCHED = "unmatched"
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PROBES = frozenset({"/livez", "/readyz", "/health", "/metrics"})
_REFUSALS = frozenset({"overloaded", "request_too_large", "unavailable"})
_SANE_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}", re.ASCII)
_KEY = "reasonembed.exchange"


@dataclass(slots=True)
class Exchange:
    """What is known of a request so far.

    Attributes:
        request_id: The caller's, where it is short and plain, else a new one.
        trace: Its place in a trace.
        method: Of HTTP; `OTHER` for one that is none.
        key_name: Whose key it came with.
        status: Of the answer; 0 before there is one.
        tokens: That were embedded for it, those from the cache included; None where none could be.
        timings: Of its embedding.
        refusal: Code of the error that it was refused with; None where it was not.
        started: `time.perf_counter()` when its headers had arrived.
        held: What is given back when its answer is handed over, or when there will be none.
    """

    request_id: str
    trace: TraceContext
    method: str
    key_name: str | None = None
    status: int = 0
    tokens: int | None = None
    timings: Timings | None = None
    refusal: str | None = None
    started: float = field(default_factory=time.perf_counter)
    held: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def begin(cls, scope: Scope) -> Exchange:
        """The exchange of a request; routes find it in the scope."""
        headers = Headers(scope=scope)
        request_id = headers.get("x-request-id", "")
        if not _SANE_ID.fullmatch(request_id):
            request_id = f"req-{secrets.token_hex(16)}"
        exchange = cls(
            request_id=request_id,
            trace=trace_of(headers.getlist("traceparent"), headers.getlist("tracestate")),
            method=scope["method"] if scope["method"] in _METHODS else "OTHER",
        )
        scope[_KEY] = exchange
        return exchange

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.perf_counter() - self.started

    def headers(self) -> dict[str, str]:
        """Of the answer: ids and timings, in TEI's names and whole milliseconds, and OpenAI's."""
        total = _milliseconds(self.seconds)
        found = {
            "x-request-id": self.request_id,
            "traceparent": self.trace.parent,
            "openai-processing-ms": total,
            "x-total-time": total,
        }
        if self.trace.state:
            found["tracestate"] = self.trace.state
        if self.timings is not None:
            found["x-tokenization-time"] = _milliseconds(self.timings.tokenize_s)
            found["x-queue-time"] = _milliseconds(self.timings.queue_s)
            found["x-inference-time"] = _milliseconds(self.timings.forward_s)
        if self.tokens is not None:
            found["x-compute-tokens"] = str(self.tokens)
            found["x-compute-time"] = total
        return found

    def log(self, route: str) -> None:
        """Writes its line of the access log; probes that went well are written at debug level."""
        is_routine = route in _PROBES and self.status == 200
        level = logging.DEBUG if is_routine else logging.INFO
        logger = logging.getLogger(ACCESS)
        if logger.isEnabledFor(level):
            logger.log(level, "%s", json.dumps(self._line(route), separators=(",", ":")))

    def _line(self, route: str) -> dict[str, str | float | int]:
        line: dict[str, str | float | int | None] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "method": self.method,
            "route": route,
            "status": self.status,
            "ms": round(self.seconds * 1_000, 1),
            "tokens": self.tokens,
            "key": self.key_name,
            "request_id": self.request_id,
            "trace_id": self.trace.trace_id,
            "span_id": self.trace.span_id,
            "parent_id": self.trace.parent_id,
        }
        if self.timings is not None:
            line["tokenize_ms"] = round(self.timings.tokenize_s * 1_000, 1)
            line["queue_ms"] = round(self.timings.queue_s * 1_000, 1)
            line["forward_ms"] = round(self.timings.forward_s * 1_000, 1)
        return {name: value for name, value in line.items() if value is not None}


def exchange_of(request: Request) -> Exchange | None:
    """The exchange that a request belongs to; None where the middleware is not installed."""
    found = request.scope.get(_KEY)
    return found if isinstance(found, Exchange) else None


def note_timings(request: Request, timings: Timings, *, tokens: int) -> None:
    """Lets the answer's headers and the log say what a request's embedding took.

    A request that embeds several times calls it each time: seconds and tokens add up.

    Args:
        request: Being answered.
        timings: Of `Embedded`.
        tokens: Sum of `Embedded.num_tokens`.
    """
    exchange = exchange_of(request)
    if exchange is None:
        return
    exchange.tokens = (exchange.tokens or 0) + tokens
    exchange.timings = (exchange.timings or Timings()) + timings


def note_refusal(request: Request, error: ApiError) -> None:
    """Lets the metrics count a request that there was no room for, or nobody to answer.

    Args:
        request: Being answered.
        error: The answer, or what the answer tells of; other errors are counted by status alone.
    """
    exchange = exchange_of(request)
    if exchange is not None and error.code in _REFUSALS:
        exchange.refusal = error.code


def start_access_log(stream: TextIO | None = None) -> None:
    """Writes the access log to a stream, default stderr; a second call changes nothing."""
    logger = logging.getLogger(ACCESS)
    if logger.handlers:
        return
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other handlers would put a prefix before the JSON


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1_000))
