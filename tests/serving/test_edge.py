"""The middleware around the whole app: every route of it, whatever it answers."""

import json
import logging
from dataclasses import replace

import httpx
import pytest
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from reasonembed.serving.app import create_app
from reasonembed.serving.exchange import ACCESS
from reasonembed.serving.keys import KeyFile, add_key
from reasonembed.serving.middleware import OPEN_PATHS
from tests.serving.api import hash_service

POSTS = ("/v1/embeddings", "/v2/embed", "/embed", "/tokenize", "/v1/search", "/retrieve", "/mcp",
         "/v1/rerank", "/v2/rerank", "/info", "/nowhere")  # fmt: skip


@pytest.fixture
def keyed(tmp_path):
    path = tmp_path / "keys.txt"
    key = add_key(path, "ann")
    app = create_app(replace(hash_service(), keys=KeyFile(path)))
    return app, key


def client_of(app):
    return TestClient(app, raise_server_exceptions=False)


def targets(app):
    """A path and a method of each route."""
    for path, item in app.openapi()["paths"].items():
        for method in item:
            yield method.upper(), path
    for route in app.routes:
        if not isinstance(route, APIRoute):
            yield "GET", getattr(route, "path", "/")
    yield from (("GET", path) for path in ("/", "/docs", "/openapi.json", "/mcp", "/nowhere"))


def test_every_route_but_health_is_behind_the_key(keyed):
    app, _ = keyed
    client, asked = client_of(app), set()
    for method, path in targets(app):
        status = client.request(method, path).status_code
        assert (status == 401) == (path not in OPEN_PATHS), (method, path, status)
        asked.add(path)
    assert asked >= {*OPEN_PATHS, "/metrics", "/info", "/v1/embeddings", "/v1/models", "/mcp"}


def test_clients_of_openai_and_cohere_send_the_key_as_they_do(keyed):
    app, key = keyed
    body = {"model": "hash", "input": ["a b"]}
    for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
        response = client_of(app).post("/v1/embeddings", json=body, headers=headers)
        assert response.status_code == 200
        assert response.headers["x-compute-tokens"] == "2"
        assert response.headers["x-inference-time"] == "3"


def test_counts_of_the_whole_app_are_those_of_the_client():
    service, seen = hash_service(), {}
    client = client_of(create_app(service))
    asked = [
        ("/v1/embeddings", {"model": "hash", "input": "a"}),
        ("/v1/embeddings", {"model": "hash", "input": ""}),
        ("/v1/embeddings", {"model": "other", "input": "a"}),
        ("/v1/embeddings", {"model": "hash", "input": "explode"}),
        ("/embed", {"inputs": "a"}),
        ("/nowhere", {}),
    ]
    for path, body in asked * 3:
        response = client.post(path, json=body)
        route = path if path != "/nowhere" else "unmatched"
        pair = (route, str(response.status_code))
        seen[pair] = seen.get(pair, 0) + 1
        assert response.headers["x-request-id"] and response.headers["traceparent"]
    assert {status for _, status in seen} == {"200", "400", "404", "500"}
    value = service.metrics.registry.get_sample_value
    for (route, status), count in seen.items():
        labels = {"route": route, "status": status}
        assert value("reasonembed_requests_total", labels) == count
    text = client.get("/metrics")
    assert text.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert "reasonembed_requests_total{" in text.text


def bodies(text):
    """Bodies that hold a text where routes of ours look for one."""
    return [
        {"model": "hash", "input": text},
        {"model": "hash", "input": [f"explode {text}"]},
        {"model": text, "input": "a", "truncate": text, text: text},
        {"model": "hash", "texts": [text], "input_type": "search_query"},
        {"inputs": text, "query": text, "queries": [text], "documents": [text], "index": text},
    ]


MARKED = st.text(st.characters(exclude_categories=["C"]), min_size=3).map(lambda t: f"§{t}§")


@pytest.fixture(scope="module")
def plain():
    service = hash_service()
    return service, client_of(create_app(service))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=MARKED, path=st.sampled_from(POSTS), number=st.integers(0, 4))
def test_no_route_logs_texts_or_makes_labels_of_them(plain, caplog, text, path, number):
    caplog.clear()
    caplog.set_level(logging.INFO)
    service, client = plain
    content = json.dumps(bodies(text)[number], ensure_ascii=False).encode()
    query = str(httpx.QueryParams({"q": text}))
    client.post(f"{path}?{query}", content=content, headers={"Content-Type": "application/json"})
    ours = [record for record in caplog.records if not record.name.startswith("httpx")]
    logged = [f"{record.getMessage()} {record.exc_text}" for record in ours]
    assert [record for record in caplog.records if record.name == ACCESS]
    assert not [line for line in logged if "§" in line or query[2:] in line]
    assert "§" not in service.metrics.exposition()[0].decode()


def test_labels_are_bounded_whatever_is_asked(plain):
    service, client = plain
    for number in range(50):
        client.get(f"/v1/models/{number}")
        client.get(f"/v1/documents/{number}/{number}")
        client.request(f"VERB{number}", f"/path/{number}")
    known = {route for _, route in targets(client.app)} | {"unmatched"}
    for metric in service.metrics.registry.collect():
        for sample in metric.samples:
            assert sample.labels.get("route", "unmatched") in known, sample
