"""The real OpenAI client against the real server, over a socket."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import uvicorn

from reasonembed.serving.app import create_app
from reasonembed.serving.protocol import EmbedItem
from tests.serving.api import DIMENSION, hash_service, vector_of


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(hash_service())
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listener.getsockname()[1]
    with openai.OpenAI(
        api_key="unused", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0
    ) as made:
        yield made
    server.should_exit = True
    thread.join()


def test_embeddings_in_both_encodings(client: openai.OpenAI):
    packed = client.embeddings.create(model="hash", input=["a b", "c"])
    plain = client.embeddings.create(model="hash", input=["a b", "c"], encoding_format="float")
    assert packed.usage.prompt_tokens == plain.usage.total_tokens == 3
    for text, one, other in zip(["a b", "c"], packed.data, plain.data, strict=True):
        expected = vector_of(EmbedItem(text))
        assert len(one.embedding) == DIMENSION
        np.testing.assert_array_equal(np.float32(one.embedding), expected)
        np.testing.assert_array_equal(np.float32(other.embedding), expected)


def test_extensions_go_through_extra_body(client: openai.OpenAI):
    answer = client.embeddings.create(
        model="hash", input=[7], extra_body={"input_type": "query", "instruction": "Find."}
    )
    expected = vector_of(EmbedItem((7,), "query", "Find."))
    np.testing.assert_array_equal(np.float32(answer.data[0].embedding), expected)
    assert answer.usage.model_extra == {"truncated_inputs": []}


def test_errors_become_the_clients_own(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="gpt", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model="hash", input=[])
    assert empty.value.param == "input"
    with pytest.raises(openai.InternalServerError, match="the model failed on it"):
        client.embeddings.create(model="hash", input="poison")


def test_models(client: openai.OpenAI):
    names = [model.id for model in client.models.list()]
    assert names == ["hash", "org/hash", "hash:query", "hash:document"]
    assert client.models.retrieve("org/hash").id == "org/hash"
