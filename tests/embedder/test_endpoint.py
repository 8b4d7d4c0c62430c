from __future__ import annotations

import numpy as np
import pytest

from reasonembed.config import EndpointRetriever
from reasonembed.embedder.endpoint import EndpointEmbedder
from reasonembed.errors import ModelError
from tests.llm.chat_server import Reply, serving

CONFIG = EndpointRetriever(kind="endpoint", model="m", dimension=2)


def embeddings(*vectors, order=None):
    rows = [
        {"object": "embedding", "index": i, "embedding": list(vector)}
        for i, vector in enumerate(vectors)
    ]
    data = [rows[i] for i in order] if order else rows
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return Reply({"object": "list", "model": "m", "data": data, "usage": usage})


def embedder(server, **settings):
    return EndpointEmbedder(CONFIG, base_url=server.url, max_retries=2, **settings)


def test_documents_are_sent_bare_and_vectors_put_into_order():
    with serving(lambda _: embeddings([1, 2], [3, 4], order=[1, 0])) as server:
        found = embedder(server, api_key="secret").encode_documents(["a", "b"])
    np.testing.assert_array_equal(found, np.array([[1, 2], [3, 4]], np.float32))
    (request,) = server.requests
    assert (request["input"], request["model"]) == (["a", "b"], "m")
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_queries_go_through_the_template_and_braces_stay():
    with serving(lambda _: embeddings([1, 2])) as server:
        embedder(server).encode_queries(["a {instruction} {query}"], instruction="find {query}")
    assert server.requests[0]["input"] == ["Instruct: find {query}\nQuery: a {instruction} {query}"]


def test_many_texts_are_sent_in_batches():
    def answer(body):
        return embeddings(*([len(text), 1] for text in body["input"]))

    with serving(answer) as server:
        found = embedder(server).encode_documents(["x" * n for n in range(1, 131)])
    assert [len(request["input"]) for request in server.requests] == [64, 64, 2]
    assert found[:, 0].tolist() == list(range(1, 131))
    assert len(embedder(server).encode_documents([])) == 0


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_recovers_is_asked_again(status):
    replies = iter([Reply({"error": "busy"}, status=status), embeddings([1, 2])])
    with serving(lambda _: next(replies)) as server:
        assert embedder(server).encode_documents(["a"]).tolist() == [[1, 2]]
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    ("reply", "said", "requests"),
    [
        (Reply({"error": "no such model"}, status=404), "NotFoundError", 1),
        (Reply({"error": "busy"}, status=503), "InternalServerError", 3),
        (Reply("<html>", content_type="text/html"), "no list of 2 vectors", 1),
        (Reply("{not json"), "Error", 1),
        (Reply({"error": "odd"}), "no list of 2 vectors", 1),
        (embeddings([1, 2]), "no list of 2 vectors", 1),
        (embeddings([1, 2], [3]), "no list of 2 vectors", 1),
        (embeddings([1, 2, 3], [1, 2, 3]), r"shape \(3,\), mine.also says dimension 2", 1),
        (embeddings(["x", 1], [1, 2]), "no list of 2 vectors", 1),
    ],
)
def test_what_cannot_be_used_is_an_error_with_the_address(reply, said, requests):
    with serving(lambda _: reply) as server, pytest.raises(ModelError, match=said) as caught:
        embedder(server).encode_documents(["a", "b"])
    assert server.url in str(caught.value)
    assert len(server.requests) == requests


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match="APIConnectionError"):
        EndpointEmbedder(CONFIG, base_url="http://127.0.0.1:9/v1", max_retries=0).encode_documents(
            ["a"]
        )
