from __future__ import annotations

import numpy as np
import pytest

from reasonembed.serving.protocol import EmbedItem
from reasonembed.tasks import TASKS
from tests.serving.api import LIMIT, Hashes, assert_error, hash_client, vector_of


@pytest.fixture
def hashes():
    return Hashes()


@pytest.fixture
def client(hashes):
    return hash_client(hashes)


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_one_list_an_input_also_for_a_single_text(client, path):
    answer = client.post(path, json={"inputs": "a"}).json()
    np.testing.assert_array_equal(np.float32(answer), [vector_of(EmbedItem("a"))])
    assert len(client.post(path, json={"inputs": ["a", "b"]}).json()) == 2


@pytest.mark.parametrize(
    ("fields", "item"),
    [
        ({"normalize": True, "truncate": False}, EmbedItem("a")),
        ({"truncate": True}, EmbedItem("a", truncate="end")),
        ({"truncate": True, "truncation_direction": "Left"}, EmbedItem("a", truncate="start")),
        ({"truncate": True, "truncation_direction": "right"}, EmbedItem("a", truncate="end")),
        ({"truncate": None, "truncation_direction": "Left"}, EmbedItem("a")),
        ({"prompt_name": "query"}, EmbedItem("a", "query")),
        ({"prompt_name": "biology"}, EmbedItem("a", "query", TASKS["biology"].instruction)),
        ({"inputs": [4, 5]}, EmbedItem((4, 5))),
    ],
)
def test_what_reaches_the_model(client, hashes, fields, item):
    assert client.post("/embed", json={"inputs": "a", **fields}).status_code == 200
    assert hashes.items == [item]


def test_a_shorter_length(client):
    [vector] = client.post("/embed", json={"inputs": "a", "dimensions": 8}).json()
    assert len(vector) == 8


@pytest.mark.parametrize(
    ("fields", "param", "part"),
    [
        ({"inputs": ""}, "inputs", "inputs[0] is empty"),
        ({"inputs": []}, "inputs", "0 items"),
        ({"inputs": [100]}, "inputs", "outside 0..99"),
        ({"inputs": 1}, "inputs", "a text, a list of texts"),
        ({"inputs": "word " * (LIMIT + 1)}, "inputs", "set truncate: true"),
        ({"normalize": False}, "normalize", "norm 1"),
        ({"prompt_name": "passage"}, "prompt_name", "document"),
        ({"truncation_direction": "up"}, "truncation_direction", "left"),
        ({"dimensions": 9}, "dimensions", "8, 24"),
        ({"model": "hash"}, "model", "unknown parameter"),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_the_field(client, fields, param, part):
    answer = client.post("/embed", json={"inputs": "a", **fields})
    assert part in assert_error(answer, 400, param=param)
