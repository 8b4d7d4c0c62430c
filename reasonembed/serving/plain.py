"""Answers where no framework is at hand; imports nothing that a small process would not have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Message, Send


async def write(send: Send, status: int, body: object, headers: Mapping[str, str]) -> None:
    """Sends a whole answer of JSON; see `write_text`."""
    await write_text(send, status, json.dumps(body), headers, kind="application/json")


async def write_text(
    send: Send, status: int, text: str, headers: Mapping[str, str], *, kind: str
) -> None:
    """Sends a whole answer.

    Args:
        send: Of ASGI.
        status: Of HTTP.
        text: The answer.
        headers: Beside type and length.
        kind: Of content.
    """
    payload = text.encode()
    fields = {"content-type": kind, "content-length": str(len(payload))}
    fields |= {key.lower(): value for key, value in headers.items()}
    start: Message = {
        "type": "http.response.start",
        "status": status,
        "headers": [(key.encode(), value.encode()) for key, value in fields.items()],
    }
    await send(start)
    await send({"type": "http.response.body", "body": payload})
