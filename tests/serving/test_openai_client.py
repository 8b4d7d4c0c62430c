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
from reasonembed.serving.batching import MicroBatcher
from reasonembed.serving.protocol import EmbedItem, ServedModel
from tests.serving.hash_embedder import DIMENSION, HashEmbedder


@pytest.fixture
def client(embedder: HashEmbedder, model: ServedModel) -> Iterator[openai.OpenAI]:
    batcher = MicroBatcher(embedder.embed, max_texts=8, wait_s=0)
    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(batcher.embed, model)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
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


def test_embeddings_in_both_encodings(client: openai.OpenAI, embedder: HashEmbedder):
    packed = client.embeddings.create(model="hash", input=["a b", "c"])
    plain = client.embeddings.create(model="hash", input=["a b", "c"], encoding_format="float")
    assert packed.usage.prompt_tokens == plain.usage.total_tokens == 3
    for text, one, other in zip(["a b", "c"], packed.data, plain.data, strict=True):
        expected = embedder.outcome(EmbedItem(text)).vector
        assert len(one.embedding) == DIMENSION
        np.testing.assert_array_equal(np.float32(one.embedding), expected)
        np.testing.assert_array_equal(np.float32(other.embedding), expected)


def test_extensions_go_through_extra_body(client: openai.OpenAI, embedder: HashEmbedder):
    answer = client.embeddings.create(
        model="hash", input=[7], extra_body={"input_type": "query", "instruction": "Find."}
    )
    expected = embedder.outcome(EmbedItem((7,), "query", "Find.")).vector
    np.testing.assert_array_equal(np.float32(answer.data[0].embedding), expected)


def test_errors_become_the_clients_own(client: openai.OpenAI):
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="gpt", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as empty:
        client.embeddings.create(model="hash", input=[])
    assert empty.value.param == "input"
    with pytest.raises(openai.InternalServerError, match="the model failed on this input"):
        client.embeddings.create(model="hash", input="poison")


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["hash"]
