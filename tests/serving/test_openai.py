from __future__ import annotations

import base64
import json
import time

import numpy as np
import pytest

from reasonembed.serving.protocol import EmbedItem
from reasonembed.tasks import TASKS
from tests.serving.api import DIMENSION, LIMIT, Hashes, assert_error, hash_client, vector_of

EMBEDDINGS = "/v1/embeddings"
BIOLOGY = TASKS["biology"].instruction


@pytest.fixture
def hashes():
    return Hashes()


@pytest.fixture
def client(hashes):
    return hash_client(hashes)


def post(client, **fields):
    return client.post(EMBEDDINGS, json={"model": "hash", **fields})


def packed(answer, index: int = 0) -> bytes:
    return base64.b64decode(answer.json()["data"][index]["embedding"])


def test_answer_of_the_protocol(client):
    answer = post(client, input=["one two", "three"]).json()
    assert answer["object"] == "list"
    assert answer["model"] == "hash"
    assert answer["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "truncated_inputs": []}
    assert [entry["object"] for entry in answer["data"]] == ["embedding"] * 2
    assert [entry["index"] for entry in answer["data"]] == [0, 1]
    expected = vector_of(EmbedItem("three"))
    np.testing.assert_array_equal(np.float32(answer["data"][1]["embedding"]), expected)


@pytest.mark.parametrize("dimensions", [None, 8])
def test_base64_and_float_have_the_same_bits(client, dimensions):
    plain = post(client, input="text", dimensions=dimensions, encoding_format="float")
    other = post(client, input="text", dimensions=dimensions, encoding_format="base64")
    numbers = np.array(plain.json()["data"][0]["embedding"], dtype="<f4")
    assert packed(other) == numbers.tobytes()
    assert len(numbers) == (dimensions or DIMENSION)


def test_a_shorter_vector_is_the_first_numbers_with_norm_one(client):
    whole = np.frombuffer(packed(post(client, input="a", encoding_format="base64")), "<f4")
    answer = post(client, input="a", encoding_format="base64", dimensions=8)
    short = np.frombuffer(packed(answer), "<f4")
    expected = whole[:8] / np.linalg.norm(whole[:8])
    np.testing.assert_allclose(short, expected, rtol=1e-6)  # one rounding of float32
    assert post(client, input="a", dimensions=DIMENSION).status_code == 200


@pytest.mark.parametrize(
    ("given", "contents"),
    [
        ("a b", ["a b"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [99]], [(1, 2), (99,)]),
        (["same", "same"], ["same", "same"]),
    ],
)
def test_every_form_of_input(client, hashes, given, contents):
    answer = post(client, input=given, user="me")
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == len(contents)
    assert [item.content for item in hashes.items] == contents


@pytest.mark.parametrize(
    ("fields", "item"),
    [
        ({}, EmbedItem("a")),
        ({"input_type": "document"}, EmbedItem("a")),
        ({"input_type": "search_document", "task": "retrieval.passage"}, EmbedItem("a")),
        ({"prompt_name": "document"}, EmbedItem("a")),
        ({"input_type": "query"}, EmbedItem("a", "query")),
        ({"input_type": "search_query"}, EmbedItem("a", "query")),
        ({"task": "retrieval.query"}, EmbedItem("a", "query")),
        ({"prompt_name": "query"}, EmbedItem("a", "query")),
        ({"prompt_name": "biology"}, EmbedItem("a", "query", BIOLOGY)),
        ({"input_type": "query", "prompt_name": "biology"}, EmbedItem("a", "query", BIOLOGY)),
        ({"instruction": "Find it."}, EmbedItem("a", "query", "Find it.")),
        ({"instruction": BIOLOGY, "prompt_name": "biology"}, EmbedItem("a", "query", BIOLOGY)),
        ({"prompt_name": "query", "instruction": "X."}, EmbedItem("a", "query", "X.")),
        ({"model": "hash:query"}, EmbedItem("a", "query")),
        ({"model": "org/hash:document"}, EmbedItem("a")),
        ({"model": "hash:biology"}, EmbedItem("a", "query", BIOLOGY)),
        ({"model": "hash:query", "instruction": "X."}, EmbedItem("a", "query", "X.")),
        ({"model": "org/hash", "truncate": "start"}, EmbedItem("a", truncate="start")),
    ],
)
def test_the_role_by_whatever_field(client, hashes, fields, item):
    assert post(client, input="a", **fields).status_code == 200
    assert hashes.items == [item]


def test_the_default_role_is_configured(hashes):
    assert post(hash_client(hashes, default_input_type="query"), input="a").status_code == 200
    assert hashes.items == [EmbedItem("a", "query")]


@pytest.mark.parametrize(
    ("fields", "param", "others"),
    [
        ({"input_type": "document", "instruction": "X."}, "instruction", "input_type"),
        ({"input_type": "query", "task": "retrieval.passage"}, "task", "input_type"),
        ({"input_type": "document", "prompt_name": "biology"}, "prompt_name", "input_type"),
        ({"prompt_name": "biology", "instruction": "X."}, "instruction", "prompt_name"),
        ({"model": "hash:query", "input_type": "document"}, "input_type", "model"),
        ({"model": "hash:pony", "prompt_name": "biology"}, "prompt_name", "model"),
    ],
)
def test_contradictions_name_both_fields(client, fields, param, others):
    message = assert_error(post(client, input="a", **fields), 400, param=param)
    assert param in message and others in message


def test_2048_inputs_are_served_in_order_and_one_more_is_refused(client):
    texts = [f"text {number}" for number in range(2_048)]
    answer = post(client, input=texts, encoding_format="base64")
    assert packed(answer, 2_047) == vector_of(EmbedItem(texts[-1])).tobytes()
    message = assert_error(post(client, input=[*texts, "more"]), 400, param="input")
    assert "2049 items" in message


def test_over_length_is_refused_or_cut_and_named(client):
    texts = ["short", "word " * (LIMIT + 1), "fine"]
    message = assert_error(post(client, input=texts), 400, param="input")
    assert message.startswith("input[1]")
    answer = post(client, input=texts, truncate="end").json()
    assert answer["usage"]["truncated_inputs"] == [1]
    assert answer["usage"]["prompt_tokens"] == LIMIT + 2


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"input": ""}, "input", "input[0] is empty"),
        ({"input": []}, "input", "0 items"),
        ({"input": ["a", ""]}, "input", "input[1] is empty"),
        ({"input": [[1], []]}, "input", "input[1] is empty"),
        ({"input": [1, 100]}, "input", "check_embedding_ctx_length=False"),
        ({"input": [[-1]]}, "input", "outside 0..99"),
        ({"input": ["a", 1]}, "input", "a text, a list of texts"),
        ({"input": [True]}, "input", "a text, a list of texts"),
        ({"input": [1.5]}, "input", "a text, a list of texts"),
        ({"input": [10**30]}, "input", "outside 0..99"),
        ({"input": {"text": "a"}}, "input", "a text, a list of texts"),
        ({"input": None}, "input", "a text, a list of texts"),
        ({}, "input", "missing"),
        ({"input": "a", "dimensions": 9}, "dimensions", "8, 24"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater"),
        ({"input": "a", "dimensions": "24"}, "dimensions", "integer"),
        ({"input": "a", "dimensions": True}, "dimensions", "integer"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": "a", "input_type": "passage"}, "input_type", "query"),
        ({"input": "a", "input_type": "clustering"}, "input_type", "retrieval alone"),
        ({"input": "a", "input_type": []}, "input_type", "query"),
        ({"input": "a", "task": "text-matching"}, "task", "retrieval.query"),
        ({"input": "a", "prompt_name": "botany"}, "prompt_name", "biology"),
        ({"input": "a", "truncate": "middle"}, "truncate", "end"),
        ({"input": "a", "instruction": " "}, "instruction", "empty"),
        ({"input": "a", "prompt": "x"}, "prompt", "unknown parameter; there are: input_type"),
        ({"input": "a", "model": 3}, "model", "string"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_the_field(client, fields, param, part):
    assert part in assert_error(post(client, **fields), 400, param=param)


def test_an_instruction_for_a_model_that_takes_none(client, hashes):
    from dataclasses import replace

    hashes.model = replace(hashes.model, takes_instruction=False)
    plain = hash_client(hashes)
    for fields in ({"instruction": "X."}, {"prompt_name": "biology"}):
        [param] = fields
        message = assert_error(post(plain, input="a", **fields), 400, param=param)
        assert "takes no instruction" in message
    assert post(plain, input="a", input_type="query").status_code == 200


@pytest.mark.parametrize("name", ["gpt", "hash:", "hash:botany", "org", "hash:query:query", ""])
def test_another_model_is_a_404(client, name):
    response = post(client, model=name, input="a")
    assert "'hash'" in assert_error(response, 404, param="model", code="model_not_found")


def test_long_values_are_not_repeated(client):
    for fields in ({"model": "x" * 5_000}, {"prompt_name": "x" * 5_000}, {"x" * 5_000: 1}):
        assert len(post(client, input="a", **fields).text) < 1_500


def test_models(client):
    entries = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in entries] == ["hash", "org/hash", "hash:query", "hash:document"]
    assert [entry["input_type"] for entry in entries] == [None, None, "query", "document"]
    for entry in entries:
        assert client.get(f"/v1/models/{entry['id']}").json() == entry
        assert entry["object"] == "model"
        assert entry["root"] == "hash"
        assert post(client, model=entry["id"], input="a").status_code == 200
    answer = client.get("/v1/models/hash:biology").json()
    assert (answer["id"], answer["input_type"]) == ("hash:biology", "query")
    assert_error(client.get("/v1/models/gpt"), 404, param="model_id", code="model_not_found")


def test_the_timings_are_in_the_headers(client):
    answer = post(client, input="a b")
    assert answer.headers["x-inference-time"] == "3"
    assert answer.headers["x-compute-tokens"] == "2"
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.content)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embed"])
def test_more_token_ids_than_a_request_may_hold_are_not_looked_at(path):
    client = hash_client(limits={"max_request_tokens": 100, "max_inputs": 20})
    field = "input" if path == "/v1/embeddings" else "inputs"
    model = {"model": "hash"} if path == "/v1/embeddings" else {}
    for ids in ([-1] * 101, [[-1] * 51, [-1] * 51]):
        refused = client.post(path, json={field: ids, **model})
        message = assert_error(refused, 413, code="request_too_large")
        assert "max_request_tokens" in message
    for ids in ([1] * 9, [[1] * 5] * 20):
        assert client.post(path, json={field: ids, **model}).status_code == 200


def test_a_body_of_millions_of_numbers_is_not_even_read():
    """Reading one takes half a second, in which nothing else is answered."""
    client = hash_client(limits={"max_request_tokens": 1_000})
    numbers = b"[" + b"1," * 5_000_000 + b"1]"
    headers = {"Content-Type": "application/json"}
    for body in (b'{"model":"hash","input":%b}', b'{"x":"a\\"","input":%b}'):
        content = body % numbers
        started = time.process_time()
        refused = client.post("/v1/embeddings", content=content, headers=headers)
        assert time.process_time() - started < 0.4
        assert "numbers" in assert_error(refused, 413, code="request_too_large")


def test_commas_of_texts_are_no_numbers(client):
    comma = 'a "," b\\, ' * 100_000
    answer = post(client, input=["a", comma], truncate="end")
    assert answer.status_code == 200
