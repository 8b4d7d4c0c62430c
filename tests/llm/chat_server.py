"""A small server that speaks OpenAI chat completions over real HTTP."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What is sent back; a `body` that is no string is sent as JSON."""

    body: Any
    status: int = 200
    delay_s: float = 0.0
    retry_after_ms: int = 1
    content_type: str = "application/json"


@dataclass
class ChatServer:
    """Where it listens, and what it was sent, in order of arrival."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


def completion(
    content: str | None = "an answer",
    *,
    finish_reason: str = "stop",
    top_logprobs: dict[str, float] | None = None,
    usage: tuple[int, int] | None = (11, 7),
    cached_tokens: int | None = None,
) -> Reply:
    choice: dict[str, Any] = {
        "index": 0,
        "finish_reason": finish_reason,
        "message": {"role": "assistant", "content": content},
    }
    if top_logprobs is not None:
        entries = [
            {"token": token, "logprob": logprob, "bytes": None}
            for token, logprob in top_logprobs.items()
        ]
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    body: dict[str, Any] = {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [choice],
    }
    if usage:
        body["usage"] = {
            "prompt_tokens": usage[0],
            "completion_tokens": usage[1],
            "total_tokens": sum(usage),
        }
        if cached_tokens is not None:
            body["usage"]["prompt_tokens_details"] = {"cached_tokens": cached_tokens}
    return Reply(body)


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Reply]) -> Iterator[ChatServer]:
    """Runs a server whose replies are a function of the request's body."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            size = int(self.headers["Content-Length"])
            body = json.loads(self.rfile.read(size))
            server.requests.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            reply = answer(body)
            time.sleep(reply.delay_s)
            data = reply.body if isinstance(reply.body, str) else json.dumps(reply.body)
            try:
                self.send_response(reply.status)
                self.send_header("Content-Type", reply.content_type)
                self.send_header("Content-Length", str(len(data.encode())))
                self.send_header("retry-after-ms", str(reply.retry_after_ms))
                self.end_headers()
                self.wfile.write(data.encode())
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up waiting, which is what that test is about

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
