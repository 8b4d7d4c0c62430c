from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np
import pytest

from reasonembed.serving.protocol import EmbedItem
from tests.serving.api import (
    DIMENSION,
    LIMIT,
    MODEL,
    Hashes,
    assert_error,
    hash_client,
    vector_of,
)


@pytest.fixture
def hashes():
    return Hashes()


@pytest.fixture
def client(hashes):
    return hash_client(hashes)


def post(client, **fields):
    body = {"model": "hash", "texts": ["a"], "input_type": "search_document", **fields}
    return client.post("/v2/embed", json={key: one for key, one in body.items() if one != "leave"})


def test_answer_of_the_protocol(client):
    answer = post(client, texts=["a b", "c"]).json()
    assert set(answer) == {"id", "embeddings", "texts", "meta", "response_type"}
    assert answer["texts"] == ["a b", "c"]
    assert answer["response_type"] == "embeddings_by_type"
    assert answer["meta"] == {
        "api_version": {"version": "2"},
        "billed_units": {"input_tokens": 3},
        "warnings": [],
    }
    [(kind, vectors)] = answer["embeddings"].items()
    assert kind == "float"
    expected = [vector_of(EmbedItem(text, truncate="end")) for text in ("a b", "c")]
    np.testing.assert_array_equal(np.float32(vectors), expected)


def test_every_embedding_type_is_of_the_same_vector(client):
    types = ["base64", "ubinary", "float", "binary", "float"]
    found = post(client, embedding_types=types).json()["embeddings"]
    assert list(found) == ["base64", "ubinary", "float", "binary"]
    [numbers] = found["float"]
    assert base64.b64decode(found["base64"][0]) == np.array(numbers, "<f4").tobytes()
    [unsigned], [signed] = found["ubinary"], found["binary"]
    bits = "".join(f"{byte:08b}" for byte in unsigned)
    assert bits == "".join(str(int(number > 0)) for number in numbers)
    assert [byte - 128 for byte in unsigned] == signed


@pytest.mark.parametrize(
    ("fields", "item"),
    [
        ({"input_type": "search_query"}, EmbedItem("a", "query", truncate="end")),
        ({"input_type": "document"}, EmbedItem("a", truncate="end")),
        ({"truncate": "NONE"}, EmbedItem("a")),
        ({"truncate": "START"}, EmbedItem("a", truncate="start")),
        ({"truncate": "END", "max_tokens": LIMIT, "priority": 3}, EmbedItem("a", truncate="end")),
        (
            {"texts": "leave", "inputs": [{"content": [{"type": "text", "text": "a"}]}]},
            EmbedItem("a", truncate="end"),
        ),
    ],
)
def test_what_reaches_the_model(client, hashes, fields, item):
    assert post(client, **fields).status_code == 200
    assert hashes.items == [item]


def test_cut_texts_are_named(client):
    long = "word " * (LIMIT + 1)
    answer = post(client, texts=["a", long]).json()
    assert answer["meta"]["warnings"] == ["texts[1] was cut"]
    message = assert_error(post(client, texts=["a", long], truncate="NONE"), 400, param="texts")
    assert "set truncate to 'END' or 'START'" in message


def test_a_shorter_length(client):
    [vector] = post(client, output_dimension=8).json()["embeddings"]["float"]
    assert len(vector) == 8
    assert np.linalg.norm(vector) == pytest.approx(1)


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"input_type": "leave"}, "input_type", "missing"),
        ({"input_type": "classification"}, "input_type", "retrieval alone"),
        ({"input_type": "image"}, "input_type", "search_query"),
        ({"texts": "leave"}, "texts", "missing"),
        ({"texts": []}, "texts", "0 items"),
        ({"texts": ["a", ""]}, "texts", "texts[1] is empty"),
        ({"texts": "a"}, "texts", "list"),
        ({"inputs": []}, "inputs", "both"),
        ({"images": ["data:"]}, "images", "unknown parameter"),
        ({"embedding_types": []}, "embedding_types", "at least 1"),
        ({"embedding_types": ["int8"]}, "embedding_types", "float, base64, binary, ubinary"),
        ({"embedding_types": ["float", "half"]}, "embedding_types", "float"),
        ({"embedding_types": [{}]}, "embedding_types", "float"),
        ({"output_dimension": 9}, "output_dimension", f"8, {DIMENSION}"),
        ({"truncate": "end"}, "truncate", "END"),
        ({"max_tokens": LIMIT - 1}, "max_tokens", "leave it out"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_the_field(client, fields, param, part):
    assert part in assert_error(post(client, **fields), 400, param=param)


def test_another_model(client):
    assert_error(post(client, model="embed-v4.0"), 404, param="model", code="model_not_found")


def test_binary_needs_whole_bytes():
    hashes = Hashes()
    hashes.model = replace(MODEL, dimensions=(12,))
    client = hash_client(hashes)
    answer = post(client, output_dimension=12, embedding_types=["ubinary"])
    assert "divides by 8" in assert_error(answer, 400, param="embedding_types")


def test_the_field_that_holds_the_texts_is_named(client):
    def inputs(*texts):
        return [{"content": [{"type": "text", "text": text}]} for text in texts]

    long = "word " * (LIMIT + 1)
    cut = post(client, texts="leave", inputs=inputs("a", long))
    assert cut.json()["meta"]["warnings"] == ["inputs[1] was cut"]
    refused = post(client, texts="leave", inputs=inputs("a", long), truncate="NONE")
    assert "inputs[1]" in assert_error(refused, 400, param="inputs")
