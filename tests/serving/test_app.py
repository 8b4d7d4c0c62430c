from __future__ import annotations

import base64
import json
import subprocess
import sys

import numpy as np
import pytest
from starlette.testclient import TestClient

from reasonembed.serving.app import create_app
from reasonembed.serving.batching import MicroBatcher
from reasonembed.serving.protocol import EmbedItem

EMBEDDINGS = "/v1/embeddings"


@pytest.fixture
def client(embedder, model):
    batcher = MicroBatcher(embedder.embed, max_texts=4, wait_s=0)
    return TestClient(create_app(batcher.embed, model), raise_server_exceptions=False)


def post(client, **fields):
    return client.post(EMBEDDINGS, json={"model": "hash", **fields})


def assert_error(response, status: int, *, param: str | None = None, code: str | None = None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(response.json()) == {"error"}
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    assert (error["param"], error["code"]) == (param, code)
    assert error["message"]
    return error["message"]


def test_answer_of_the_protocol(client, embedder):
    answer = post(client, input=["one two", "three"]).json()
    assert answer["object"] == "list"
    assert answer["model"] == "hash"
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    assert [entry["object"] for entry in answer["data"]] == ["embedding"] * 2
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    expected = embedder.outcome(EmbedItem("three")).vector
    np.testing.assert_array_equal(np.float32(answer["data"][1]["embedding"]), expected)


def test_base64_and_float_have_the_same_bits(client):
    plain = post(client, input="text").json()["data"][0]["embedding"]
    packed = post(client, input="text", encoding_format="base64").json()["data"][0]["embedding"]
    assert base64.b64decode(packed) == np.array(plain, dtype="<f4").tobytes()


@pytest.mark.parametrize(
    ("given", "contents"),
    [
        ("a b", ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [99]], [(1, 2), (99,)]),
    ],
)
def test_every_form_of_input(client, embedder, given, contents):
    answer = post(client, input=given)
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == len(contents)
    assert [item.content for batch in embedder.batches for item in batch] == contents


def test_the_role_and_the_instruction_reach_the_model(client, embedder):
    post(client, input="a")
    post(client, input="a", input_type="query")
    post(client, input="a", input_type="query", instruction="Find it.")
    items = [item for batch in embedder.batches for item in batch]
    assert items == [
        EmbedItem("a", "document"),
        EmbedItem("a", "query"),
        EmbedItem("a", "query", "Find it."),
    ]


def test_2048_inputs_are_served_in_order_and_one_more_is_refused(client, embedder):
    texts = [f"text {number}" for number in range(2_048)]
    answer = post(client, input=texts, encoding_format="base64").json()
    expected = embedder.outcome(EmbedItem(texts[-1])).vector
    assert base64.b64decode(answer["data"][-1]["embedding"]) == expected.tobytes()
    assert max(len(batch) for batch in embedder.batches) == 4
    message = assert_error(post(client, input=[*texts, "more"]), 400, param="input")
    assert "2049 items" in message


def test_over_length_is_refused_or_cut_as_asked(client):
    texts = ["short", "word " * 11]
    message = assert_error(post(client, input=texts), 400, param="input")
    assert message == "input[1]: longer than the limit of 10 tokens"
    answer = post(client, input=texts, truncate="end").json()
    assert answer["usage"] == {"prompt_tokens": 11, "total_tokens": 11, "truncated_inputs": 1}


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"input": ""}, "input", "input[0] is empty"),
        ({"input": []}, "input", "0 items"),
        ({"input": ["a", ""]}, "input", "input[1] is empty"),
        ({"input": [[1], []]}, "input", "input[1] is empty"),
        ({"input": [1, 100]}, "input", "outside 0..99"),
        ({"input": [[-1]]}, "input", "outside 0..99"),
        ({"input": ["a", 1]}, "input", "must be a string"),
        ({"input": [True]}, "input", "must be a string"),
        ({"input": {"text": "a"}}, "input", "must be a string"),
        ({"input": None}, "input", "must be a string"),
        ({}, "input", "Field required"),
        ({"input": "a", "dimensions": 8}, "dimensions", "24 dimensions and no others"),
        ({"input": "a", "dimensions": "24"}, "dimensions", "integer"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "a", "input_type": "passage"}, "input_type", "query"),
        ({"input": "a", "truncate": "start"}, "truncate", "end"),
        ({"input": "a", "instruction": "Find."}, "instruction", "without instruction"),
        ({"input": "a", "prompt": "x"}, "prompt", "unknown parameter"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_the_field(client, fields, param, part):
    assert part in assert_error(post(client, **fields), 400, param=param)


def test_the_models_own_dimension_may_be_asked_for(client):
    assert post(client, input="a", dimensions=24).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 5_000])
def test_a_body_that_is_no_object_is_a_400(client, body):
    response = client.post(EMBEDDINGS, content=body, headers={"Content-Type": "application/json"})
    assert_error(response, 400)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        (b'"input": "\\ud800"', "input"),
        (b'"input": "a", "input_type": "query", "instruction": "\\udfff"', "instruction"),
        (b'"input": "a", "\\ud800": 1', None),
    ],
)
def test_half_a_surrogate_pair_is_a_400(client, fields, param):
    body = b'{"model": "hash", ' + fields + b"}"
    response = client.post(EMBEDDINGS, content=body, headers={"Content-Type": "application/json"})
    assert_error(response, 400, param=param)


def test_another_content_type_is_a_400(client):
    body = json.dumps({"model": "hash", "input": "a"})
    response = client.post(EMBEDDINGS, content=body, headers={"Content-Type": "text/plain"})
    assert "Content-Type" in assert_error(response, 400)


def test_another_model_and_unknown_routes(client):
    response = client.post(EMBEDDINGS, json={"model": "gpt", "input": "a"})
    assert_error(response, 404, param="model", code="model_not_found")
    assert "/nowhere" in assert_error(client.get("/nowhere"), 404)
    wrong_method = client.get(EMBEDDINGS)
    assert_error(wrong_method, 405)
    assert wrong_method.headers["allow"] == "POST"


def test_failures_of_the_model_are_500_and_say_nothing_of_its_insides(client, embedder, model):
    message = assert_error(post(client, input=["fine", "poison"]), 500, param="input")
    assert message == "input[1]: the model failed on this input"
    assert "not finite" in assert_error(post(client, input="nan"), 500)
    unguarded = TestClient(create_app(embedder.embed, model), raise_server_exceptions=False)
    assert "broke" not in assert_error(post(unguarded, input="poison"), 500)


def test_health_and_embeddings_wait_for_the_model(embedder, model):
    ready = False
    client = TestClient(create_app(embedder.embed, model, is_ready=lambda: ready))
    for response in (client.get("/health"), post(client, input="a")):
        assert_error(response, 503)
        assert response.headers["retry-after"] == "1"
    assert client.get("/v1/models").status_code == 200
    ready = True
    assert client.get("/health").json() == {"status": "ok"}
    assert post(client, input="a").status_code == 200


def test_models(client):
    assert client.get("/v1/models").json() == {
        "object": "list",
        "data": [
            {
                "id": "hash",
                "object": "model",
                "created": 0,
                "owned_by": "reasonembed",
                "dimensions": 24,
                "max_query_tokens": 10,
                "max_document_tokens": 10,
            }
        ],
    }


def test_the_service_needs_neither_torch_nor_ray():
    code = (
        "import sys, reasonembed.serving.app, reasonembed.serving.batching, "
        "reasonembed.serving.backend; sys.exit(bool({'torch', 'ray', 'transformers'} "
        "& set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
