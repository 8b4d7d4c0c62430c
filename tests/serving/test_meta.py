from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest

from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import BatchStats, Forwarded, Unavailable, stalled_after
from reasonembed.serving.readiness import Readiness
from tests.serving.api import DIMENSION, LIMIT, MODEL, Hashes, assert_error, hash_client
from tests.serving.shelf import echo_embeddings


@pytest.fixture
def client():
    return hash_client()


def test_info(client):
    info = client.get("/info").json()
    assert info["version"] == "1.2.3"
    assert info["model"] == {
        "name": "hash",
        "aliases": ["org/hash"],
        "fingerprint": "ffffffff",
        "is_checked": True,
        "dimension": DIMENSION,
        "dimensions": [8, DIMENSION],
        "max_query_tokens": LIMIT,
        "max_document_tokens": LIMIT,
        "vocabulary_size": 100,
        "default_input_type": "document",
        "default_instruction": "Find.",
    }
    assert info["limits"]["max_inputs"] == 2_048
    assert info["speed"]["tokens_per_s"] == 1_000
    assert info["indexes"] == []
    assert (info["needs_key"], info["can_rewrite"], info["can_grade"]) == (False, False, False)
    assert "biology" in info["tasks"] and list(info["instructions"]) == info["tasks"]
    assert info["instructions"]["economics"].startswith("Given an Economics post, ")


def test_the_delay_bound_is_the_larger_of_a_batch_and_the_longest_text():
    def waits(**fields):
        hashes = Hashes()
        hashes.model = replace(MODEL, **fields)
        speed = hash_client(hashes).get("/info").json()["speed"]
        return speed["short_query_waits_tokens"], speed["short_query_waits_s"]

    assert waits(batch_tokens=4 * LIMIT, longest_s=0.5) == (4 * LIMIT, 2.0)
    assert waits(batch_tokens=LIMIT // 2, longest_s=0.5) == (LIMIT, 0.5)
    assert waits() == (LIMIT, None)


@pytest.mark.parametrize("field", ["input", "inputs", "text"])
def test_tokenize(client, field):
    body = {field: ["ab c", "x"], "input_type": "query", "model": "hash"}
    answer = client.post("/tokenize", json=body).json()
    assert answer["model"] == "hash"
    assert answer["data"][0] == {
        "index": 0,
        "token_ids": [2, 1],
        "tokens": ["xx", "x"],
        "count": 2,
        "model_tokens": 4,
        "is_over_limit": False,
    }
    assert answer["data"][1]["index"] == 1


def test_tokenize_tells_what_would_be_cut(client):
    answer = client.post("/tokenize", json={"input": "word " * 50}).json()
    [entry] = answer["data"]
    assert (entry["count"], entry["model_tokens"], entry["is_over_limit"]) == (50, LIMIT, True)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": "a", "text": "b"}, 400, "input"),
        ({"text": ""}, 400, "text"),
        ({"input": [1]}, 400, "input"),
        ({"input": "a", "prompt_name": "botany"}, 400, "prompt_name"),
    ],
)
def test_what_cannot_be_tokenised(client, body, status, param):
    assert_error(client.post("/tokenize", json=body), status, param=param)


def test_tokenize_of_another_model(client):
    response = client.post("/tokenize", json={"input": "a", "model": "gpt"})
    assert_error(response, 404, param="model", code="model_not_found")


def test_metrics(client):
    client.post("/v1/embeddings", json={"model": "hash", "input": "a"})
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    assert 'reasonembed_requests_total{route="/v1/embeddings",status="200"} 1.0' in answer.text
    assert "reasonembed_serialize_seconds_count 1.0" in answer.text
    newer = client.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert newer.headers["content-type"].startswith("application/openmetrics-text")


def test_health_before_and_after_the_first_text(client):
    assert client.get("/livez").json()["status"] == "alive"
    assert client.get("/health").json()["status"] == "starting"
    refused = client.get("/readyz")
    assert "no text" in assert_error(refused, 503, code="unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    with client:
        for _ in range(200):  # the first probe runs as the app starts
            if client.get("/readyz").status_code == 200:
                break
            time.sleep(0.01)
        assert client.get("/readyz").json()["status"] == "ok"
        assert client.get("/health").json() == {"status": "ok", "message": None}


class _Probed(Hashes):
    is_broken = False

    async def embed(self, items, *, param="input", flow=""):
        if self.is_broken:
            raise Unavailable("no replica")
        return await super().embed(items, param=param, flow=flow)


def test_a_stall_shows_when_the_newest_text_is_too_long_ago():
    probed, now = _Probed(), [0.0]
    readiness = Readiness(probed, stall_s=10, metrics=Metrics(), clock=lambda: now[0])
    assert readiness.state()[0] == "starting"
    asyncio.run(readiness.probe())
    assert readiness.state() == ("ok", None)
    now[0], probed.is_broken = 9, True
    asyncio.run(readiness.probe())
    assert readiness.state()[0] == "ok"
    now[0] = 11
    asyncio.run(readiness.probe())
    assert readiness.state() == ("stalled", "no text has been embedded for 11 s")
    probed.last_success = 10.5
    assert readiness.state()[0] == "ok", "requests are answered"
    now[0], probed.is_broken = 30, False
    assert readiness.state()[0] == "stalled"
    asyncio.run(readiness.probe())
    assert readiness.state()[0] == "ok"


def test_a_forward_pass_that_hangs_counts_as_none():
    class Hanging(Hashes):
        async def embed(self, items, *, param="input", flow=""):
            await asyncio.Event().wait()

    readiness = Readiness(Hanging(), stall_s=0.05, metrics=Metrics())
    asyncio.run(readiness.probe())
    assert readiness.state()[0] == "starting"


def test_tokenize_is_bounded_as_requests_for_vectors_are():
    client = hash_client(echo_embeddings(max_request_tokens=100))
    assert client.post("/tokenize", json={"input": "word " * 70}).status_code == 200
    refused = client.post("/tokenize", json={"input": "word " * 100})
    assert "max_request_tokens" in assert_error(refused, 413, code="request_too_large")
    # Shorter than its tokens made one think: found out before it is spelt.
    refused = client.post("/tokenize", json={"input": "a " * 150})
    assert_error(refused, 413, code="request_too_large")


def test_the_probe_reports_forward_passes():
    """Each is reported once, so that those of clients that have gone come with the probe."""
    stats = BatchStats(texts=1, tokens=30, padded_tokens=40, budget_tokens=80, seconds=0.1)

    class Reporting(Hashes):
        async def embed(self, items, *, param="input", flow=""):
            return Forwarded(np.zeros((1, DIMENSION), np.float32), batches=(stats, stats))

    metrics = Metrics()
    asyncio.run(Readiness(Reporting(), stall_s=10, metrics=metrics).probe())
    assert metrics.registry.get_sample_value("reasonembed_batch_tokens_sum") == 60


def test_a_long_pass_that_is_healthy_is_no_stall():
    slow = replace(MODEL, batch_tokens=2 * LIMIT, longest_s=20.0)
    assert slow.largest_pass_s == 40
    assert stalled_after(30, slow) == 120
    assert stalled_after(300, slow) == 300
    assert stalled_after(30, MODEL) == 30  # not measured
    hashes = Hashes()
    hashes.model, hashes.last_success = slow, time.monotonic() - 60
    assert hash_client(hashes, stall_s=30).get("/readyz").status_code == 200
    hashes.last_success = time.monotonic() - 130
    assert hash_client(hashes, stall_s=30).get("/readyz").status_code == 503


def test_what_another_process_measured_is_published():
    replica = replace(MODEL, batch_tokens=4 * LIMIT, longest_s=0.5)
    hashes = Hashes()
    hashes.model = replace(MODEL, name="mine").as_measured(replica)
    info = hash_client(hashes).get("/info").json()
    assert info["model"]["name"] == "mine"
    assert info["speed"]["short_query_waits_tokens"] == 4 * LIMIT
    assert info["speed"]["short_query_waits_s"] == 2.0


@pytest.mark.parametrize(
    ("fields", "instruction"),
    [({}, "Find."), ({"default_instruction": ""}, ""), ({"takes_instruction": False}, None)],
)
def test_no_default_instruction_is_told_from_none_at_all(fields, instruction):
    hashes = Hashes()
    hashes.model = replace(MODEL, **fields)
    client = hash_client(hashes)
    assert client.get("/info").json()["model"]["default_instruction"] == instruction
    body = {"model": "hash", "input": "a", "instruction": "Explain."}
    status = 400 if instruction is None else 200
    assert client.post("/v1/embeddings", json=body).status_code == status


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health"])
def test_health_answers_head(client, path):
    assert client.head(path).status_code == client.get(path).status_code
