"""The `cohere` package, version 2 of its protocol."""

from __future__ import annotations

import base64
import threading

import cohere
import numpy as np
import pytest
from cohere.errors import (
    BadRequestError,
    NotFoundError,
    TooManyRequestsError,
    UnauthorizedError,
)

from tests.clients.expected import DOCUMENTS, LIMIT, same

pytestmark = pytest.mark.clients

TEXTS = list(DOCUMENTS.values())
QUERY = "why do trees lose their leaves?"


@pytest.fixture(scope="module")
def made(server) -> cohere.ClientV2:
    return cohere.ClientV2(api_key=server.key, base_url=server.url)


def test_embed(made, offline):
    computed = offline(TEXTS)
    found = made.embed(
        model="minilm", texts=TEXTS, input_type="search_document", embedding_types=["float"]
    )
    assert same(found.embeddings.float_, computed.vectors)
    assert found.texts == TEXTS
    assert found.meta.billed_units.input_tokens == sum(map(len, computed.ids))
    query = made.embed(
        model="minilm", texts=[QUERY], input_type="search_query", embedding_types=["float"]
    )
    assert same(query.embeddings.float_, offline([QUERY], role="query").vectors)


def test_embedding_types_are_of_the_same_vectors(made):
    types = ["float", "base64", "binary", "ubinary"]
    found = made.embed(
        model="minilm", texts=TEXTS, input_type="search_document", embedding_types=types
    ).embeddings
    vectors = np.float32(found.float_)
    packed = np.frombuffer(base64.b64decode("".join(found.base64[:1])), dtype="<f4")
    assert packed.tobytes() == vectors[0].tobytes()
    np.testing.assert_array_equal(np.packbits(vectors > 0, axis=1), found.ubinary)
    np.testing.assert_array_equal(np.int16(found.ubinary) - 128, found.binary)


def test_truncation_and_output_dimension(made, offline):
    texts = ["word " * LIMIT]
    ask = {"model": "minilm", "texts": texts, "input_type": "search_document"}
    cut = made.embed(**ask, embedding_types=["float"], output_dimension=128)
    assert same(cut.embeddings.float_, offline(texts).vectors[:, :128])
    assert cut.meta.warnings == ["texts[0] was cut"]
    with pytest.raises(BadRequestError, match="64"):
        made.embed(**ask, embedding_types=["float"], truncate="NONE")


def test_rerank(made, offline):
    found = made.rerank(model="minilm", query=QUERY, documents=TEXTS, top_n=3)
    query = offline([QUERY], role="query").vectors
    scores = (offline(TEXTS).vectors @ query.T)[:, 0]
    order = np.argsort(-scores)[:3].tolist()
    assert [one.index for one in found.results] == order
    expected = scores[order].tolist()
    assert [one.relevance_score for one in found.results] == pytest.approx(expected, abs=1e-5)


def test_its_own_exceptions(made, server):
    ask = {"texts": ["a"], "input_type": "search_document", "embedding_types": ["float"]}
    with pytest.raises(NotFoundError):
        made.embed(model="embed-v4.0", **ask)
    with pytest.raises(BadRequestError, match="classification"):
        made.embed(model="minilm", **ask | {"input_type": "classification"})
    with pytest.raises(UnauthorizedError):
        cohere.ClientV2(api_key="wrong", base_url=server.url).embed(model="minilm", **ask)


def test_a_full_queue_is_its_exception(slow_server):
    client = cohere.ClientV2(api_key="unused", base_url=slow_server.url)
    large = {"texts": ["word " * 250], "input_type": "search_document"}
    refused = []

    def embed() -> None:
        try:
            client.embed(
                model="echo", **large, embedding_types=["float"], request_options={"max_retries": 0}
            )
        except TooManyRequestsError as error:
            refused.append(error)

    threads = [threading.Thread(target=embed) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == 2
    assert {int(error.headers["retry-after"]) >= 1 for error in refused} == {True}
