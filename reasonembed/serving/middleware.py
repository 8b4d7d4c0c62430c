"""What every request passes before a route sees it, and every answer after.

In order: an id and a place in a trace; where the request comes from; its key; its body, which is
read here, once and in bounds; then the route, under a time limit and for as long as its client is
there. Every answer, whatever its status, gets ids, timings and security headers, a count and a line
in the log.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import ipaddress
import json
import logging
import re
import traceback
from collections.abc import Iterator

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reasonembed.config import LimitsConfig
from reasonembed.serving.errors import ApiError, overloaded, unavailable
from reasonembed.serving.exchange import GONE, UNMATCHED, Exchange
from reasonembed.serving.outgoing import RETRY_AFTER_S
from reasonembed.serving.parts import Service

log = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/livez", "/readyz", "/health"})
"""Routes that need no key: probes have none, and the answers hold no secret."""
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",  # answers hold what users asked
    "content-security-policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
}
"""Of every answer; a route that sets one of them keeps its own."""
_BODIES = 16  # largest bodies that are held at once
_BODY_S = 60.0  # for a body to arrive: no client that means it takes as long as an answer may
_PART_BYTES = 2**18
_UNREAD_S = 60.0  # a client that takes no part for so long is not waited for: its answer has room
_CONVERTER = re.compile(r":\w+\}")  # of /models/{model_id:path}
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*)(?::[0-9]*)?", re.ASCII)


def install(app: FastAPI, service: Service, *, sends_request_id: bool = True) -> None:
    """Puts the middleware around an app.

    Args:
        app: Whose every route it guards.
        service: Its settings, keys and metrics.
        sends_request_id: False behind a proxy that writes `X-Request-ID` into answers itself.
    """
    app.add_middleware(Edge, service=service, sends_request_id=sends_request_id)


class Edge:
    """The middleware; see the module."""

    def __init__(self, app: ASGIApp, *, service: Service, sends_request_id: bool = True) -> None:
        self._app, self._service, self._sends_request_id = app, service, sends_request_id
        self.outgoing = service.outgoing
        self._bodies = _Bodies(_BODIES * service.settings.limits.max_body_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request as ASGI has it."""
        if scope["type"] == "http":
            await self._handle(scope, receive, _Answer(scope, send, self))
        elif scope["type"] == "websocket":  # no route is one, so none is reached without a key
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)

    def note(self, scope: Scope, exchange: Exchange) -> None:
        """Counts an answer, whose status the exchange has, and writes its line."""
        metrics, route = self._service.metrics, _route_of(scope)
        metrics.requests.labels(route, str(exchange.status)).inc()
        metrics.request_seconds.labels(route).observe(exchange.seconds)
        if exchange.refusal is not None and route not in OPEN_PATHS:  # a probe asks for no work
            metrics.rejected.labels(exchange.refusal).inc()
        exchange.log(route)

    def with_headers(self, message: Message, exchange: Exchange) -> Message:
        """The begin of an answer with the headers that all answers have."""
        own = list(message.get("headers", ()))
        added = SECURITY_HEADERS | exchange.headers()
        if not self._sends_request_id:
            del added["x-request-id"]
        taken = {name.lower() for name, _ in own}
        encoded = [(name.encode(), value.encode()) for name, value in added.items()]
        return {**message, "headers": own + [pair for pair in encoded if pair[0] not in taken]}

    async def _handle(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        client = _Client(receive, answer, self._bodies)
        try:
            await self._pass_or_tell(scope, client, answer)
        except _Gone:
            answer.exchange.status = GONE
        except asyncio.CancelledError:
            if not client.absorbs_cancellation():
                await self._end(answer)
                raise
            answer.exchange.status = GONE
        finally:
            client.close()
            answer.exchange.held.close()
            answer.end()

    async def _pass_or_tell(self, scope: Scope, client: _Client, answer: _Answer) -> None:
        """To the route; what stands in the way is the answer.

        Raises:
            _Gone: The client has gone, or reads no more, be it the error.
        """
        try:
            await self._pass(scope, client, answer)
        except _Gone:
            raise
        except ApiError as error:
            await answer.write(error)  # the server reads and drops what is left of the body
        except Exception as error:  # the process boundary
            answer.exchange.status = 500
            log.error("%s failed: %s", answer.exchange.request_id, without_texts(error))
            log.debug("%s", answer.exchange.request_id, exc_info=error)
            await answer.write(ApiError(500, "the server failed; its log says why"))

    async def _end(self, answer: _Answer) -> None:
        """To a cancellation by whoever runs this app: its server stops, and says so to a client.

        Behind a proxy it has heard that the client is gone.
        """
        if answer.is_begun or not self._sends_request_id:
            answer.exchange.status = GONE
            return
        message = "the service ends, and this request was not answered in time; send it again"
        await answer.write(unavailable(message, retry_after_s=RETRY_AFTER_S))

    async def _pass(self, scope: Scope, client: _Client, answer: _Answer) -> None:
        """To the route, unless the request is refused; under the time limit.

        Raises:
            ApiError: The request is refused, or had no answer in time.
        """
        self._admit(scope, answer.exchange)
        self._check_answers(scope)
        limits = self._service.settings.limits
        deadline = answer.deadline = asyncio.timeout(limits.timeout_s)
        try:
            async with deadline:
                await client.read(Headers(scope=scope), limits)
                await self._app(scope, client.receive, answer.send)
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise _too_slow(limits.timeout_s, "not answered") from error
        finally:
            answer.deadline = None

    def _check_answers(self, scope: Scope) -> None:
        """Refuses work while clients have yet to read the answers that there are.

        Raises:
            ApiError: 429.
        """
        if scope["method"] not in ("GET", "HEAD") and self.outgoing.is_full:
            raise _busy(
                "answers that their clients have not read fill max_answer_bytes; send the request "
                "again later",
                retry_after_s=RETRY_AFTER_S,
            )

    def _admit(self, scope: Scope, exchange: Exchange) -> None:
        """Refuses who may not ask, and notes whose key it is.

        Raises:
            ApiError: 401 or 403.
        """
        headers, keys = Headers(scope=scope), self._service.keys
        _check_site(headers, exchange.method)
        if keys is None:
            if not self._service.settings.allow_anonymous:
                _check_host(headers)
            return
        if path_of(scope) in OPEN_PATHS:
            return
        sent = list(_sent_keys(headers))
        exchange.key_name = next(filter(None, map(keys.name_of, sent)), None)
        if exchange.key_name is None:
            raise _unauthenticated(headers, is_sent=bool(sent))


class _Gone(Exception):
    """The client went before it had sent its whole request, or stopped reading its answer."""


class _Refused(ApiError):
    """A request that no route has seen, or that a route had no more time for; counted by code."""


class _Answer:
    """Sends an answer with our headers, and notes it as its last part is handed over."""

    def __init__(self, scope: Scope, send: Send, edge: Edge) -> None:
        self.exchange = Exchange.begin(scope)
        self.is_begun = self.is_complete = False
        self.deadline: asyncio.Timeout | None = None
        self._scope, self._send, self._edge = scope, send, edge
        self._is_noted = False

    async def send(self, message: Message) -> None:
        """As ASGI has it."""
        if message["type"] == "http.response.start":
            message = self._begin(message)
        elif message["type"] == "http.response.body":
            await self._send_body(message.get("body", b""), message.get("more_body", False))
            return
        await self._send_part(message)  # the begin, too, may wait for an earlier answer's reader

    async def _send_body(self, body: bytes, more_body: bool) -> None:
        """In parts: a server waits before each until the client has read most of the last one.

        Raises:
            _Gone: It reads no more.
        """
        self.exchange.held.close()
        starts = [*range(0, len(body), _PART_BYTES)] or [0]
        if len(starts) > 1:
            starts.append(len(body))  # nothing; what waits for it is that all else has been read
        with self._edge.outgoing.count(len(body)):
            for start in starts:
                is_last = start == starts[-1] and not more_body
                if is_last:
                    self.is_complete = True
                    self.end()  # before it is sent: a client that has its answer finds it counted
                part = body if len(starts) == 1 else body[start : start + _PART_BYTES]
                message = {"type": "http.response.body", "body": part, "more_body": not is_last}
                await self._send_part(message)

    async def _send_part(self, message: Message) -> None:
        patience = asyncio.timeout(_UNREAD_S)
        try:
            async with patience:
                await self._send(message)
        except TimeoutError as error:
            if not patience.expired():
                raise
            raise _Gone from error

    async def write(self, error: ApiError) -> None:
        """An error as the whole answer; nothing where another has begun."""
        if self.is_begun:
            return
        if isinstance(error, _Refused):
            self.exchange.refusal = error.code
        body = json.dumps(error.body()).encode()
        headers = MutableHeaders(headers=error.headers)
        headers["content-type"], headers["content-length"] = "application/json", str(len(body))
        start = {"type": "http.response.start", "status": error.status, "headers": headers.raw}
        await self.send(start)
        await self.send({"type": "http.response.body", "body": body})

    def end(self) -> None:
        """Notes the answer, once; a route that gave none has failed."""
        if not self._is_noted:
            self._is_noted = True
            self.exchange.status = self.exchange.status or 500
            self._edge.note(self._scope, self.exchange)

    def _begin(self, message: Message) -> Message:
        self.is_begun, self.exchange.status = True, message["status"]
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(None)  # a stream may go on for as long as it is read
        return self._edge.with_headers(message, self.exchange)


class _Bodies:
    """Bytes of bodies that have come and whose requests are not answered.

    Args:
        maximum: Of all together.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum, self.taken = maximum, 0

    def take(self, size: int) -> None:
        """Room for a part of a body; whoever takes it subtracts it again.

        Raises:
            ApiError: 429 there is none.
        """
        if self.taken + size > self._maximum:
            raise _full(self._maximum)
        self.taken += size


class _Client:
    """A request's body, and after it the news that the client has gone.

    The request's task is cancelled then, since nobody would read the answer.
    """

    def __init__(self, receive: Receive, answer: _Answer, bodies: _Bodies) -> None:
        self._receive, self._answer, self._bodies = receive, answer, bodies
        self._size = 0
        self._task = asyncio.current_task()
        self._has_cancelled = False
        self._body: bytes | None = None
        self._watch: asyncio.Task[None] | None = None

    async def read(self, headers: Headers, limits: LimitsConfig) -> None:
        """Takes the body in.

        Raises:
            ApiError: 408 it does not come in time, 413 it is longer than the limit, 415 it is
                compressed, 429 other bodies fill the room that there is.
            _Gone: The client has gone.
        """
        _check_encoding(headers)
        declared = headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and _exceeds(declared, limits.max_body_bytes):
            raise _too_large(limits)
        try:
            async with asyncio.timeout(_BODY_S):
                self._body = await self._read(limits)
        except TimeoutError as error:
            raise _too_slow(_BODY_S, "the body did not arrive") from error
        self._watch = asyncio.create_task(self._wait())

    async def _read(self, limits: LimitsConfig) -> bytes:
        parts, is_whole = [], False
        while not is_whole:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            parts.append(message.get("body", b""))
            self._bodies.take(len(parts[-1]))
            self._size += len(parts[-1])
            if self._size > limits.max_body_bytes:
                raise _too_large(limits)
            is_whole = not message.get("more_body", False)
        return b"".join(parts)

    async def receive(self) -> Message:
        """As ASGI has it, for the route."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if self._watch is not None:
            await asyncio.shield(self._watch)
        return {"type": "http.disconnect"}

    def absorbs_cancellation(self) -> bool:
        """Whether the cancellation under way was asked for here, and by nobody else."""
        return self._has_cancelled and self._task is not None and self._task.uncancel() == 0

    def close(self) -> None:
        """Stops watching, and gives the body's room back."""
        self._bodies.taken -= self._size
        if self._watch is not None:
            self._watch.cancel()

    async def _wait(self) -> None:
        # Some servers raise where others send the message.
        with contextlib.suppress(OSError, RuntimeError, KeyError):
            while (await self._receive())["type"] != "http.disconnect":
                pass
        if not self._answer.is_complete and self._task is not None:
            self._has_cancelled = True
            self._task.cancel()


def _check_site(headers: Headers, method: str) -> None:
    """Refuses what another site's page has a browser send.

    Such a page could not read the answer (there is no CORS), yet it would cost work, and a browser
    adds a password that it knows.
    """
    is_foreign = headers.get("sec-fetch-site", "none") in ("cross-site", "same-site")
    if is_foreign and method not in ("GET", "HEAD"):
        raise _Refused(
            403,
            "requests from pages of other sites are not answered; ask from a program, or from a "
            "page behind the same address",
            code="cross_site",
        )


def _check_host(headers: Headers) -> None:
    """Refuses names of the public DNS: such a name was made to point here (DNS rebinding).

    Addresses, names without a dot and those under `localhost` cannot be an outsider's.
    """
    match = _HOST.fullmatch(headers.get("host", ""))
    name = match[1].rstrip(".").lower() if match else "."
    if "." not in name or name.endswith(".localhost") or _is_address(name.strip("[]")):
        return
    raise _Refused(
        403,
        "the Host header names another machine than this one; to serve under a name, set keys_file "
        "or allow_anonymous: true",
        code="foreign_host",
    )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_encoding(headers: Headers) -> None:
    """Refuses compressed bodies: a few kilobytes may stand for gigabytes, and texts are short."""
    if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
        raise _Refused(
            415,
            "the body is compressed; send it as it is, without Content-Encoding",
            code="unsupported_encoding",
            headers={"accept-encoding": "identity"},
        )


def _sent_keys(headers: Headers) -> Iterator[bytes]:
    """Keys that a request holds: as Bearer, as X-API-Key, or as the password that browsers ask."""
    for value in headers.getlist("authorization"):
        scheme, _, rest = value.partition(" ")
        if scheme.lower() == "bearer":
            yield rest.strip().encode("latin-1")
        elif scheme.lower() == "basic":
            with contextlib.suppress(binascii.Error):
                yield base64.b64decode(rest.strip().encode("latin-1")).partition(b":")[2]
    for value in headers.getlist("x-api-key"):
        yield value.strip().encode("latin-1")


def _unauthenticated(headers: Headers, *, is_sent: bool) -> ApiError:
    message = (
        "this API key is not one of the service's"
        if is_sent
        else "an API key is needed: send Authorization: Bearer KEY, or X-API-Key: KEY"
    )
    # A browser that opens the page asks its user for a name (any) and a password (the key).
    is_browser = wants_page(headers)
    challenge = 'Basic realm="reasonembed", charset="UTF-8"' if is_browser else "Bearer"
    return _Refused(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})


def _too_slow(seconds: float, what: str) -> ApiError:
    return _Refused(
        408,
        f"{what} within {seconds:g} s; send less at once",
        code="timeout",
        headers={"x-should-retry": "false"},  # OpenAI's clients obey; it would take as long again
    )


def _too_large(limits: LimitsConfig) -> ApiError:
    return _Refused(
        413,
        f"the body is over max_body_bytes ({limits.max_body_bytes:,} bytes); send less at once",
        code="body_too_large",
    )


def _full(maximum: int) -> ApiError:
    return _busy(
        f"bodies of other requests fill the {maximum:,} bytes that there are for them; send the "
        "request again later",
        retry_after_s=1.0,
    )


def _busy(message: str, *, retry_after_s: float) -> ApiError:
    error = overloaded(message, retry_after_s=retry_after_s)
    return _Refused(error.status, message, code=error.code, headers=error.headers)


def _exceeds(digits: str, limit: int) -> bool:
    """Compares without making a number of thousands of digits."""
    digits = digits.lstrip("0")
    return len(digits) > len(str(limit)) or int(digits or "0") > limit


def wants_page(headers: Headers) -> bool:
    """Whether a person reads the answer, in a browser."""
    return "text/html" in headers.get("accept", "")


def path_of(scope: Scope) -> str:
    """A request's path below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", "").rstrip("/"))


def _route_of(scope: Scope) -> str:
    """Template of the route that a request is for; never its path, which may hold anything."""
    route = scope.get("route")
    if route is None:  # refused before it was routed
        routes = scope["app"].routes if "app" in scope else ()
        matching = (one for one in routes if one.matches(scope)[0] is not Match.NONE)
        route = next(matching, None)
    template: str = getattr(route, "path", UNMATCHED)
    return _CONVERTER.sub("}", template) or "/"


def without_texts(error: BaseException) -> str:
    """Types and places of an exception and its causes; messages may hold texts of users."""
    lines = [f"{type(error).__module__}.{type(error).__qualname__}"]
    lines += [line.rstrip() for line in traceback.format_tb(error.__traceback__)]
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    inner = [*getattr(error, "exceptions", ()), *([cause] if cause is not None else [])]
    return "\n".join([*lines, *(f"because of {without_texts(one)}" for one in inner)])
