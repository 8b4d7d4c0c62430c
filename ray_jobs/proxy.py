"""What Serve's proxies do for us: an answer in our words where Serve's would be a bare 500.

The processes of the proxies load it by `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from reasonembed.serving.errors import unavailable
from reasonembed.serving.plain import write


def middlewares() -> list[Middleware]:
    """What a proxy puts around itself."""
    return [Middleware(Answering)]


class Answering:
    """Answers requests that a proxy leaves without any answer, as it does when an ingress dies.

    Args:
        app: The proxy.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI interface."""
        is_begun = False

        async def pass_on(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        await self._app(scope, receive, pass_on)
        if scope["type"] == "http" and not is_begun:
            # The proxy has put an id there where the client gave none.
            request_id = Headers(scope=scope).get("x-request-id")
            error = unavailable("the process that was to answer ended; send the request again")
            headers = error.headers | ({"x-request-id": request_id} if request_id else {})
            await write(send, error.status, error.body(), headers)
