"""Answers in place of an app whose model is still being loaded."""

from __future__ import annotations

import asyncio
import contextlib
import html
import logging
from collections.abc import Awaitable, Callable

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from reasonembed.errors import explain, is_expected
from reasonembed.serving.errors import unavailable
from reasonembed.serving.exchange import UNMATCHED, Exchange
from reasonembed.serving.middleware import SECURITY_HEADERS, path_of, wants_page
from reasonembed.serving.plain import write, write_text

logger = logging.getLogger(__name__)

_OPEN = ("/livez", "/health")
_RETRY_S = 2
_PAGE = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="{_RETRY_S}">
<title>ReasonEmbed</title>
</head>
<body>
<h1>ReasonEmbed</h1>
<p role="status">Please wait: %s. This page tries again by itself.</p>
</body>
</html>
"""


class Starting:
    """An ASGI app that becomes another one.

    Until that one is assembled, `/livez` and `/health` answer 200 and everything else 503 with the
    reason, which a browser at `/` shows as a page that loads itself again; afterwards every request
    goes to it. Its lifespan is kept in one task, as frameworks
    with task groups ask for.

    Args:
        assemble: Gives the app; may wait for other processes.
        why: What stands in the way, asked for when a request is refused; None where nothing is
            known but that it takes time.
        sends_request_id: False behind a proxy that writes `X-Request-ID` into answers itself.
    """

    def __init__(
        self,
        assemble: Callable[[], Awaitable[FastAPI]],
        *,
        why: Callable[[], str | None] = lambda: None,
        sends_request_id: bool = True,
    ) -> None:
        self._assemble, self._why, self._sends_request_id = assemble, why, sends_request_id
        self._app: FastAPI | None = None
        self._failure: Exception | None = None
        self._over = asyncio.Event()
        self._end = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._is_draining = False

    async def begin(self, *, patience_s: float) -> None:
        """Starts assembling, and waits for its end, though no longer than that.

        A replica that is put in place of another counts as ready when this returns; where the
        model is up already, the app is then assembled and no request meets a 503.

        Raises:
            Exception: What assembling raised within that time.
        """
        self._task = asyncio.create_task(self._live())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._over.wait(), patience_s)
        self.check()

    def check(self) -> None:
        """Raises what assembling raised, if it has."""
        if self._failure is not None:
            raise self._failure

    def drain(self) -> None:
        """Refuses requests from now on; those under way go on, and health is still answered."""
        self._is_draining = True

    async def end(self) -> None:
        """Ends the app's lifespan."""
        self._end.set()
        if self._task is not None:
            if self._app is None:
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif self._app is not None and not self._is_draining:
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._refuse(scope, send)
        else:
            await send({"type": "websocket.close", "code": 1013, "reason": "starting"})

    async def _live(self) -> None:
        try:
            app = await self._assemble()
            async with app.router.lifespan_context(app):
                self._app = app
                self._over.set()
                await self._end.wait()
        except Exception as error:  # told to whoever asks, and to who waits for the start
            logger.exception("The service cannot be assembled")
            self._failure = error
            self._over.set()

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        if self._task is None:
            await self.begin(patience_s=0.0)
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await self.end()
        await send({"type": "lifespan.shutdown.complete"})

    async def _refuse(self, scope: Scope, send: Send) -> None:
        exchange = Exchange.begin(scope)
        headers = SECURITY_HEADERS | exchange.headers()
        if not self._sends_request_id:
            del headers["x-request-id"]
        if path_of(scope) in _OPEN:
            status = "ending" if self._is_draining else "starting"
            await write(send, 200, {"status": status}, headers)
            return
        said = "ending" if self._is_draining else f"starting: {self._reason()}"
        error = unavailable(f"the service is {said}", retry_after_s=_RETRY_S)
        exchange.status = error.status
        exchange.log(UNMATCHED)
        headers |= error.headers
        if scope["method"] == "GET" and path_of(scope) == "/" and wants_page(Headers(scope=scope)):
            page = _PAGE % html.escape(error.message)
            await write_text(send, error.status, page, headers, kind="text/html; charset=utf-8")
        else:
            await write(send, error.status, error.body(), headers)

    def _reason(self) -> str:
        if self._failure is None:
            return self._why() or "the model is being loaded"
        if is_expected(self._failure):
            return explain(self._failure)[0]
        return "it cannot be assembled; its log says why"
