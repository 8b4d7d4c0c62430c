"""curl: what goes over the wire, and what is answered to bodies that no client would send."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from tests.clients.process import Server

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl"),
]
JSON = ("-H", "Content-Type: application/json")


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: Any


def curl(server: Server, path: str, *options: str, body: str | None = None) -> Answer:
    """A request with the key; `body` makes it a POST."""
    command = ["curl", "-sS", "-i", "--max-time", "60", "-H", f"Authorization: Bearer {server.key}"]
    data = [] if body is None else ["--data-binary", "@-"]
    done = subprocess.run(
        [*command, *options, *data, server.url + path],
        input=(body or "").encode(), capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    while head.split()[1] == b"100":  # what a large body is first told
        head, _, content = content.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (one.partition(": ") for one in lines)}
    is_json = headers.get("content-type", "").startswith("application/json")
    return Answer(int(status.split()[1]), headers, json.loads(content) if is_json else content)


def test_the_shape_and_headers_of_an_answer(server):
    body = json.dumps({"model": "minilm", "input": ["a", "b"]})
    answer = curl(server, "/v1/embeddings", *JSON, "-H", "X-Request-ID: mine", body=body)
    assert answer.status == 200
    assert set(answer.body) == {"object", "data", "model", "usage"}
    assert set(answer.body["data"][0]) == {"object", "index", "embedding"}
    assert answer.body["usage"] == {"prompt_tokens": 6, "total_tokens": 6, "truncated_inputs": []}
    assert len(answer.body["data"][1]["embedding"]) == 384
    assert answer.headers["x-request-id"] == "mine"
    assert answer.headers["content-type"] == "application/json"
    assert int(answer.headers["x-compute-tokens"]) == 6


def assert_error(answer: Answer, status: int, *, kind: str = "invalid_request_error") -> str:
    assert answer.status == status, answer.body
    assert set(answer.body) == {"error"}
    assert set(answer.body["error"]) == {"message", "type", "param", "code"}
    assert answer.body["error"]["type"] == kind
    assert answer.headers["x-request-id"]
    return answer.body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("", 400),
        ("{", 400),
        ("nonsense", 400),
        ("[]", 400),
        ('"text"', 400),
        ("null", 400),
        ('{"model": "minilm"}', 400),
        ('{"model": "minilm", "input": 7}', 400),
        ('{"model": "minilm", "input": [1.5]}', 400),
        ('{"model": "minilm", "input": [["a"]]}', 400),
        ('{"model": "minilm", "input": NaN}', 400),
        ('{"model": "minilm", "input": "\\ud800"}', 400),
        ('{"model": "minilm", "input": "a", "dimensions": "128"}', 400),
        ("[" * 100_000, 400),
        ('{"model": "minilm", "input": "' + "a" * 17 * 2**20 + '"}', 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_no_body_is_more_than_a_4xx(server, body, status):
    assert_error(curl(server, "/v1/embeddings", *JSON, body=body), status)


def test_routes_methods_types_and_keys(server):
    body = json.dumps({"model": "minilm", "input": "a"})
    assert "no such route" in assert_error(curl(server, "/v1/completions", *JSON, body=body), 404)
    answer = curl(server, "/v1/embeddings")
    assert_error(answer, 405)
    assert answer.headers["allow"] == "POST"
    text = ("-H", "Content-Type: text/plain")
    assert_error(curl(server, "/v1/embeddings", *text, body=body), 415)
    wrong = Server(server.url, server.model, "wrong")
    refused = curl(wrong, "/v1/embeddings", *JSON, body=body)
    assert_error(refused, 401, kind="authentication_error")
    assert refused.headers["www-authenticate"].startswith("Bearer")


def test_health_needs_no_key(server):
    nobody = Server(server.url, server.model, "")
    for path in ("/livez", "/health", "/readyz"):
        assert curl(nobody, path).status == 200


def test_a_chunked_body_and_a_second_request_on_the_connection(server):
    body = json.dumps({"model": "minilm", "input": "a"})
    answer = curl(server, "/v1/embeddings", *JSON, "-H", "Transfer-Encoding: chunked", body=body)
    assert answer.status == 200
    plain = curl(server, "/v1/embeddings", *JSON, body=body)
    assert answer.body["data"] == plain.body["data"]


def test_a_search(server):
    body = json.dumps(
        {"query": "why do trees lose their leaves?", "top_k": 2, "return_documents": True}
    )
    [found] = curl(server, "/v1/search", *JSON, body=body).body["data"]
    assert [hit["rank"] for hit in found["hits"]] == [1, 2]
    assert found["hits"][0]["id"] == "leaf"
