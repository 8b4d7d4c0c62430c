from __future__ import annotations

import time

import numpy as np
import pytest
from pydantic import ValidationError

from reasonembed.config import EndpointRetriever
from reasonembed.embedder.endpoint import EndpointEmbedder, addresses_of, check_same_model
from reasonembed.errors import ModelError
from reasonembed.storage import Place
from tests.llm.chat_server import Reply, serving

CONFIG = EndpointRetriever(kind="endpoint", model="m", dimension=2)


def embeddings(*vectors, order=None, indices=None):
    rows = [
        {"object": "embedding", "index": i, "embedding": list(vector)}
        for i, vector in zip(indices or range(len(vectors)), vectors, strict=True)
    ]
    data = [rows[i] for i in order] if order else rows
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return Reply({"object": "list", "model": "m", "data": data, "usage": usage})


def by_length(texts):
    return embeddings(*([len(text), 1] for text in texts))


def embedder(server, *, config=CONFIG, **settings):
    return EndpointEmbedder(config, base_url=server.url, max_retries=2, pause_s=0, **settings)


def sizes(server):
    return [len(request["input"]) for request in server.requests]


def test_documents_are_sent_bare_and_vectors_put_into_order():
    with serving(lambda _: embeddings([1, 2], [3, 4], order=[1, 0])) as server:
        found = embedder(server, api_key="secret").encode_documents(["a", "b"])
    np.testing.assert_array_equal(found, np.array([[1, 2], [3, 4]], np.float32))
    assert found.dtype == np.float32
    (request,) = server.requests
    assert (request["input"], request["model"]) == (["a", "b"], "m")
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_queries_go_through_the_template_and_braces_stay():
    with serving(lambda _: embeddings([1, 2])) as server:
        embedder(server).encode_queries(["a {instruction} {query}"], instruction="find {query}")
    assert server.requests[0]["input"] == ["Instruct: find {query}\nQuery: a {instruction} {query}"]


def test_a_template_without_a_place_for_the_query_is_refused():
    with pytest.raises(ValidationError, match=r"'Q: ' lacks \{query\}"):
        EndpointRetriever(kind="endpoint", model="m", dimension=2, query_template="Q: ")


def test_texts_are_cut_before_the_template():
    config = CONFIG.model_copy(update={"max_chars": 3, "query_template": "Q: {query}"})
    with serving(lambda _: embeddings([1, 2])) as server:
        embedder(server, config=config).encode_queries(["abcdef"])
        embedder(server, config=config).encode_documents(["ghijkl"])
    assert [request["input"] for request in server.requests] == [["Q: abc"], ["ghi"]]


def test_many_texts_are_sent_in_batches():
    with serving(lambda body: by_length(body["input"])) as server:
        found = embedder(server).encode_documents(["x" * n for n in range(1, 131)])
    assert sizes(server) == [64, 64, 2]
    assert found[:, 0].tolist() == list(range(1, 131))
    assert len(embedder(server).encode_documents([])) == 0


@pytest.mark.parametrize("status", [429, 500])
def test_a_server_that_recovers_is_asked_again_when_it_says(status):
    replies = iter([Reply({"error": "busy"}, status=status, retry_after_ms=80), embeddings([1, 2])])
    with serving(lambda _: next(replies)) as server:
        began = time.perf_counter()
        assert embedder(server).encode_documents(["a"]).tolist() == [[1, 2]]
        assert time.perf_counter() - began >= 0.08
    assert len(server.requests) == 2


# ---- answers that cannot be trusted -----------------------------------------------------------

ODD = {
    "half of them": embeddings([1, 2]),
    "half, counted anew": embeddings([3, 4], indices=[0]),
    "one place twice": embeddings([1, 2], [3, 4], indices=[0, 0]),
    "one too many": embeddings([1, 2], [3, 4], [5, 6]),
    "places from one": embeddings([1, 2], [3, 4], indices=[1, 2]),
    "no places": embeddings([1, 2], [3, 4], indices=[None, None]),
    "of two lengths": embeddings([1, 2], [3]),
    "words": embeddings(["x", 1], [1, 2]),
    "numbers as words": embeddings(["1", "2"], ["3", "4"]),
    "not a number": Reply(
        '{"object": "list", "data": [{"index": 0, "embedding": [NaN, 1]},'
        ' {"index": 1, "embedding": [1, 2]}]}'
    ),
    "nothing": embeddings([None, 1], [1, 2]),
    "infinite": embeddings([1e300, 1], [1, 2]),
    "zero": embeddings([0, 0], [1, 2]),
    "a page": Reply("<html>", content_type="text/html"),
    "an odd object": Reply({"error": "odd"}),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_answer_is_used_whole_or_asked_for_again(kind):
    replies = iter([ODD[kind]])
    with serving(lambda body: next(replies, None) or by_length(body["input"])) as server:
        found = embedder(server).encode_documents(["a", "bb"])
    assert found.tolist() == [[1, 1], [2, 1]]
    assert sizes(server) == [2, 2]


@pytest.mark.parametrize("kind", set(ODD) - {"half of them", "half, counted anew"})
def test_a_server_that_never_answers_well_is_an_error_that_names_a_text(kind):
    with serving(lambda _: ODD[kind]) as server, pytest.raises(ModelError) as caught:
        embedder(server).encode_documents(["first", "second"])
    said = str(caught.value)
    assert server.url in said and "'first'" in said
    assert "no list of 1 vectors" in said or "zero or not finite" in said
    assert sizes(server) == [2, 2, 1, 1]


def test_a_server_that_drops_what_is_more_than_it_takes_is_asked_for_less():
    with serving(lambda body: by_length(body["input"][:20])) as server:
        found = embedder(server).encode_documents(["x" * n for n in range(1, 71)])
    assert found[:, 0].tolist() == list(range(1, 71))
    assert max(sizes(server)[4:]) <= 32


@pytest.mark.parametrize("status", [400, 413])
def test_a_batch_that_is_refused_is_sent_in_halves(status):
    def answer(body):
        if sum(map(len, body["input"])) > 100:
            return Reply({"error": {"message": "too many tokens"}}, status=status)
        return by_length(body["input"])

    with serving(answer) as server:
        found = embedder(server).encode_documents(["x" * n for n in (90, 60, 30, 1)])
    assert found[:, 0].tolist() == [90, 60, 30, 1]
    assert sizes(server) == [4, 2, 1, 1, 2]


LENGTH = {
    "openai": (400, "This model's maximum context length is 8192 tokens, however you requested 9"),
    "openai, newer": (400, "Invalid 'input': maximum input length is 8192 tokens."),
    "text-embeddings-inference": (413, "`inputs` must have less than 512 tokens. Given: 600"),
    "llama.cpp": (400, "the request exceeds the available context size"),
    "a proxy": (413, "<html>413</html>"),
    "another": (422, "input is too long"),
    "one more": (400, "input is too large to process"),
}


def refusing(most, status, message):
    """Takes no text of more than so many characters."""

    def answer(body):
        if max(map(len, body["input"])) > most:
            return Reply({"error": {"message": message}}, status=status)
        return by_length(body["input"])

    return answer


@pytest.mark.parametrize("server_kind", LENGTH)
def test_a_text_that_is_refused_alone_for_its_length_is_cut_to_half_until_it_is_taken(
    server_kind, caplog
):
    texts = ["a", "long " * 1_000, "b", "λx." * 700]
    with serving(refusing(1_300, *LENGTH[server_kind])) as server:
        found = embedder(server).encode_documents(texts)
    assert found[:, 0].tolist() == [1, 1_250, 1, 1_050]
    (record,) = caplog.records
    assert "m: 2 of 4 texts were too long for the server and were cut: 'long long" in record.message
    assert "from 5000 to 1250 characters; 'λx.λx." in record.message
    assert [texts[1][:1_250]] in [request["input"] for request in server.requests]


def test_the_text_is_cut_and_not_what_stands_after_it():
    config = CONFIG.model_copy(update={"query_template": "Q: {query} ?"})
    with serving(refusing(1_000, *LENGTH["openai"])) as server:
        embedder(server, config=config).encode_queries(["x" * 1_600])
    assert server.requests[-1]["input"] == [f"Q: {'x' * 800} ?"]


@pytest.mark.parametrize(
    "message",
    ["input holds invalid tokens", "prompt exceeds the filter's maximum severity", "not loaded"],
)
def test_what_is_refused_for_something_else_is_never_cut(message):
    with serving(refusing(100, 400, message)) as server, pytest.raises(ModelError) as caught:
        embedder(server).encode_documents(["a", "long " * 400, "b"])
    assert "a text of 2000 characters, 'long long" in str(caught.value)
    assert message in str(caught.value)
    lengths = {len(text) for request in server.requests for text in request["input"]}
    assert lengths == {1, 2_000}


def test_a_text_that_is_too_long_at_any_length_is_an_error():
    message = r"2000 characters, nor for its first 500, 'long .*too many tokens"
    answer = refusing(0, 400, "too many tokens")
    with serving(answer) as server, pytest.raises(ModelError, match=message):
        embedder(server).encode_documents(["long " * 400])
    assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("reply", "said", "requests"),
    [
        (Reply({"error": "no such model"}, status=404), "NotFoundError", 1),
        (Reply({"error": "wrong key"}, status=401), "AuthenticationError", 1),
        (Reply({"error": "busy"}, status=503), "InternalServerError", 3),
        (Reply({"error": "slow"}, status=429), "RateLimitError", 3),
        (
            embeddings([1, 2, 3], [1, 2, 3]),
            "vectors have 3 dimensions, the configuration says 2",
            1,
        ),
    ],
)
def test_what_asking_again_does_not_mend_is_an_error_with_the_address(reply, said, requests):
    with serving(lambda _: reply) as server, pytest.raises(ModelError, match=said) as caught:
        embedder(server).encode_documents(["a", "b"])
    assert server.url in str(caught.value)
    assert len(server.requests) == requests


def test_broken_json_is_an_error():
    with serving(lambda _: Reply("{not json")) as server, pytest.raises(ModelError, match="JSON"):
        embedder(server).encode_documents(["a"])


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(ModelError, match="APIConnectionError"):
        EndpointEmbedder(CONFIG, base_url="http://127.0.0.1:9/v1", max_retries=0).encode_documents(
            ["a"]
        )


@pytest.mark.parametrize("where", ["disk", "store"])
def test_the_model_behind_an_address_is_known_by_one_text(tmp_path, where):
    class Server:
        def __init__(self, *vector):
            self.vector_D = np.array(vector, np.float32)

        def encode_documents(self, texts):
            return np.stack([self.vector_D for _ in texts])

    folder = Place(tmp_path if where == "disk" else "mock:///run/vectors")
    assert addresses_of(folder) == []
    for address in ("http://a", "http://b", "http://a"):
        check_same_model(Server(1, 0), folder, address=address)
    assert addresses_of(folder) == ["http://a", "http://b"]
    with pytest.raises(ModelError, match=r"http://c is not the model .*made by http://a, http://b"):
        check_same_model(Server(0, 1), folder, address="http://c")
