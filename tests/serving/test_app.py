from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time

import pytest
from starlette.testclient import TestClient

from reasonembed.serving.app import create_app
from reasonembed.serving.errors import ApiError
from tests.serving.api import Hashes, assert_error, hash_client, hash_service

EMBEDDINGS = "/v1/embeddings"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def client():
    return hash_client()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"input": "\xff"}',
        b"[" * 50_000,
        b"NaN",
    ],
)
@pytest.mark.parametrize("path", [EMBEDDINGS, "/v2/embed", "/embed", "/", "/tokenize"])
def test_a_body_that_is_no_object_is_a_400(client, path, body):
    assert_error(client.post(path, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    "fields",
    [
        b'"input": "\\ud800"',
        b'"input": "a", "instruction": "\\udfff"',
        b'"input": "a", "\\ud800": 1',
    ],
)
def test_half_a_surrogate_pair_is_a_400(client, fields):
    body = b'{"model": "hash", ' + fields + b"}"
    assert_error(client.post(EMBEDDINGS, content=body, headers=JSON), 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"input": [1.5] * 1_000_000},
        {"input": [[None]] * 500_000},
        {"input": [1] * 1_000_000 + ["a"]},
        {f"field {number}": 1 for number in range(200_000)},
        {"searches": [{"x": 1}] * 300_000},
        {"queries": list(range(1_000_000))},
    ],
    ids=["numbers", "lists", "mixed", "fields", "objects", "queries"],
)
@pytest.mark.parametrize("path", [EMBEDDINGS, "/v1/search/batch", "/v1/search"])
def test_a_million_mistakes_cost_no_more_than_one(path, fields):
    # So that it is the mistakes that are found.
    client = hash_client(limits={"max_request_tokens": 10**7, "max_queued_tokens": 10**7})
    body = json.dumps({"model": "hash", **fields})
    start = time.perf_counter()
    response = client.post(path, content=body, headers=JSON)
    assert response.status_code == 400
    assert len(response.text) < 1_500
    assert time.perf_counter() - start < 5  # collecting the mistakes takes longer by far


COMMAS = b'{"input":["' + b"," * 110_000 + b'","'
"""Many of them, which are looked at more closely, and then a text that does not end."""


@pytest.mark.parametrize(
    ("body", "status", "part"),
    [
        (COMMAS + b'\\"' * 200_000, 400, "not valid JSON"),
        (COMMAS + b'\\"' * 200_000 + b"\\", 400, "not valid JSON"),
        (b'{"input":[' + b",".join([b'"a"'] * 1_000_000) + b"]}", 413, "strings"),
        (b'{"input":[' + b",".join([b"7"] * 1_000_000) + b"]}", 413, "numbers"),
        (b'{"input":["' + b"a, " * 1_000_000 + b'"]}', 400, "model is missing"),
    ],
    ids=["quotes", "quotes and a stroke", "strings", "numbers", "commas in a text"],
)
def test_what_a_body_holds_is_counted_soon(body, status, part):
    client = hash_client(limits={"max_request_tokens": 10**5, "max_queued_tokens": 10**5})
    start = time.perf_counter()
    response = client.post(EMBEDDINGS, content=body, headers=JSON)
    assert response.status_code == status and part in response.json()["error"]["message"]
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "json", ""])
def test_another_content_type_is_a_415(client, kind):
    body = json.dumps({"model": "hash", "input": "a"})
    response = client.post(EMBEDDINGS, content=body, headers={"Content-Type": kind})
    assert "Content-Type" in assert_error(response, 415, code="media_type")


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/ld+json"])
def test_what_is_json_by_any_name(client, kind):
    body = json.dumps({"model": "hash", "input": "a"})
    response = client.post(EMBEDDINGS, content=body, headers={"Content-Type": kind})
    assert response.status_code == 200


def test_unknown_routes_and_methods(client):
    for path in ("/nowhere", "/v1/embeddings/", "/v1", "/docs/"):
        assert "no such route" in assert_error(client.get(path), 404)
    wrong = client.delete(EMBEDDINGS)
    assert "POST" in assert_error(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    assert client.delete("/").headers["allow"] == "GET, POST"


def test_failures_of_the_model_are_500_and_tell_nothing_of_its_insides(client, caplog):
    def post(text):
        return client.post(EMBEDDINGS, json={"model": "hash", "input": [text]})

    assert "failed on it" in assert_error(post("poison"), 500, param="input")
    assert "4711" not in assert_error(post("explode 4711"), 500)
    assert "4711" not in caplog.text
    assert "RuntimeError" in caplog.text


def test_a_body_over_the_limit_is_a_413():
    client = hash_client(limits={"max_body_bytes": 100})
    response = client.post(EMBEDDINGS, json={"model": "hash", "input": "word " * 100})
    assert response.status_code == 413
    assert response.json()["error"]["message"]


def test_a_request_that_takes_too_long_is_a_408():
    class Slow(Hashes):
        async def embed(self, items, *, param="input", cutting="", flow=""):
            await asyncio.sleep(60)

    client = hash_client(Slow(), limits={"timeout_s": 0.05})
    response = client.post(EMBEDDINGS, json={"model": "hash", "input": "a"})
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "timeout"


@pytest.mark.parametrize("path", [EMBEDDINGS, "/v2/embed", "/embed"])
def test_the_work_of_a_client_that_has_gone_is_cancelled(path):
    bodies = {
        EMBEDDINGS: {"model": "hash", "input": "a"},
        "/v2/embed": {"model": "hash", "texts": ["a"], "input_type": "search_query"},
        "/embed": {"inputs": "a"},
    }

    async def scenario() -> bool:
        started, cancelled, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Endless(Hashes):
            async def embed(self, items, *, param="input", cutting="", flow=""):
                started.set()
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.set()
                    raise

        body = json.dumps(bodies[path]).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            raise AssertionError("nobody is there to be answered")

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        request = asyncio.create_task(create_app(hash_service(Endless()))(scope, receive, send))
        await asyncio.wait_for(started.wait(), 10)
        gone.set()
        await asyncio.wait_for(cancelled.wait(), 10)
        await asyncio.wait_for(asyncio.gather(request, return_exceptions=True), 10)
        return cancelled.is_set()

    assert asyncio.run(scenario())


def test_the_reference_lists_every_route_and_asks_for_nothing(client):
    answer = client.get("/docs")
    assert answer.status_code == 200
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for path in client.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in answer.text
    assert "<script" not in answer.text
    loads = re.findall(r'(?:src|href|action)="([^"]*)"|url\(|@import', answer.text)
    assert set(loads) == {"openapi.json"}


def test_the_service_needs_neither_torch_nor_ray():
    code = (
        "import sys, reasonembed.serving.app; "
        "sys.exit(bool({'torch', 'ray', 'transformers', 'vllm'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("status", "code"), [(429, "overloaded"), (413, "request_too_large"), (503, "unavailable")]
)
def test_refusals_of_every_route_are_counted_once(status, code):
    class Refusing(Hashes):
        async def embed(self, items, *, param="input", cutting="", flow=""):
            raise ApiError(status, "no", code=code)

    service = hash_service(Refusing())
    client = TestClient(create_app(service), raise_server_exceptions=False)
    requests = [
        ("/v1/embeddings", {"model": "hash", "input": "a"}),
        ("/embed", {"inputs": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ]
    for path, body in requests:
        assert client.post(path, json=body).status_code == status, path
    assert client.get("/readyz").status_code == 503  # a probe is no request for work
    found = service.metrics.registry.get_sample_value(
        "reasonembed_rejected_total", {"reason": code}
    )
    assert found == len(requests)
