"""The `openai` package of Python."""

from __future__ import annotations

import asyncio
import base64
import threading
import time

import httpx
import numpy as np
import openai
import pytest

from tests.clients.expected import DOCUMENTS, LIMIT, same
from tests.clients.process import Server

pytestmark = pytest.mark.clients

TEXTS = list(DOCUMENTS.values())


def vectors_of(answer: openai.types.CreateEmbeddingResponse) -> np.ndarray:
    assert [one.index for one in answer.data] == list(range(len(answer.data)))
    return np.float32([one.embedding for one in answer.data])


def token_ids(server: Server, text: str) -> list[int]:
    answer = httpx.post(
        f"{server.url}/tokenize",
        json={"input": text},
        headers={"Authorization": f"Bearer {server.key}"},
    )
    return answer.raise_for_status().json()["data"][0]["token_ids"]


def test_documents_are_those_of_the_embedder_and_of_sentence_transformers(client, offline):
    answer = client.embeddings.create(model="minilm", input=TEXTS)
    computed = offline(TEXTS)
    assert same(vectors_of(answer), computed.vectors)
    assert answer.usage.prompt_tokens == sum(map(len, computed.ids)) == answer.usage.total_tokens
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(computed.path), device="cpu")
    assert same(vectors_of(answer), peer.encode(TEXTS))


def test_queries_are_those_of_the_embedder_with_the_instruction(client, offline):
    instruction = "Given a question of a child, retrieve what answers it."
    answer = client.embeddings.create(
        model="minilm", input=TEXTS, extra_body={"input_type": "query", "instruction": instruction}
    )
    computed = offline(TEXTS, role="query", instruction=instruction)
    assert same(vectors_of(answer), computed.vectors)
    assert answer.usage.prompt_tokens == sum(map(len, computed.ids))


def test_base64_holds_the_bits_of_float(client):
    plain = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="float")
    decoded = client.embeddings.create(model="minilm", input=TEXTS)  # base64, decoded by the client
    packed = client.embeddings.create(model="minilm", input=TEXTS, encoding_format="base64")
    expected = vectors_of(plain)
    assert expected.tobytes() == vectors_of(decoded).tobytes()
    assert expected.tobytes() == b"".join(base64.b64decode(one.embedding) for one in packed.data)


def test_query_and_document_differ_by_the_instruction_alone(client):
    def embed(model: str = "minilm", **body: str) -> np.ndarray:
        return vectors_of(client.embeddings.create(model=model, input=TEXTS[0], extra_body=body))

    document, query = embed(), embed(input_type="query")
    assert same(document, embed(input_type="document"))
    assert same(document, embed("minilm:document"))
    assert same(document, embed("org/minilm"))
    assert not same(document, query)
    assert same(query, embed("minilm:query"))
    assert same(query, embed("org/minilm:query", task="retrieval.query"))
    assert not same(query, embed(prompt_name="biology"))
    assert same(embed("minilm:biology"), embed(prompt_name="biology"))


def test_2048_inputs_in_one_request_and_in_any_order(client, offline):
    texts = [f"number {number}" for number in range(2_048)]
    found = vectors_of(client.embeddings.create(model="minilm", input=texts))
    assert len(np.unique(found, axis=0)) == 2_048
    few = list(range(0, 2_048, 128))
    assert same(found[few], offline([texts[one] for one in few]).vectors)
    backwards = vectors_of(client.embeddings.create(model="minilm", input=texts[::-1]))
    assert same(found, backwards[::-1])
    alone = vectors_of(client.embeddings.create(model="minilm", input=texts[1_000]))
    assert same(found[1_000], alone)


def test_token_arrays_are_their_texts(client, server):
    ids = [token_ids(server, text) for text in TEXTS]
    texts = client.embeddings.create(model="minilm", input=TEXTS)
    batch = client.embeddings.create(model="minilm", input=ids)
    single = client.embeddings.create(model="minilm", input=ids[0])
    assert same(vectors_of(texts), vectors_of(batch))
    assert same(vectors_of(texts)[:1], vectors_of(single))
    assert texts.usage == batch.usage


def test_dimensions_are_a_slice_with_norm_1(client):
    whole = vectors_of(client.embeddings.create(model="minilm", input=TEXTS))
    short = vectors_of(client.embeddings.create(model="minilm", input=TEXTS, dimensions=128))
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    assert short.shape == (len(TEXTS), 128) and same(short, whole[:, :128])


def test_what_was_cut_is_named(client, offline):
    texts = ["short", "word " * LIMIT]
    answer = client.embeddings.create(model="minilm", input=texts, extra_body={"truncate": "end"})
    assert answer.usage.model_extra == {"truncated_inputs": [1]}
    assert answer.usage.prompt_tokens == 3 + LIMIT
    assert same(vectors_of(answer), offline(texts).vectors)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": "word " * LIMIT}, "input"),
        ({"input": ["a"] * 2_049}, "input"),
        ({"input": "a", "dimensions": 100}, "dimensions"),
        ({"input": "a", "extra_body": {"input_type": "question"}}, "input_type"),
        ({"input": "a", "extra_body": {"instructions": "b"}}, "instructions"),
    ],
)
def test_a_bad_request_names_its_parameter(client, request_, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="minilm", **request_)
    assert caught.value.param == param
    assert caught.value.request_id


def test_ids_of_another_tokenizer_name_the_cure(client):
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        client.embeddings.create(model="minilm", input=[[100_256]])


def test_other_models_and_keys_have_the_clients_own_exceptions(client, server):
    with pytest.raises(openai.NotFoundError) as missing:
        client.embeddings.create(model="text-embedding-3-small", input="a")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError) as refused:
        client.with_options(api_key="wrong").embeddings.create(model="minilm", input="a")
    assert refused.value.type == "authentication_error"
    with pytest.raises(openai.NotFoundError):
        client.with_options(base_url=f"{server.url}/v7").embeddings.create(model="a", input="a")


def test_models_are_listed(client):
    names = [model.id for model in client.models.list()]
    assert names == ["minilm", "org/minilm", "minilm:query", "minilm:document"]
    assert client.models.retrieve("org/minilm").id == "org/minilm"


def test_async_requests_share_the_server(server, offline):
    async def embed_all() -> list[openai.types.CreateEmbeddingResponse]:
        async with openai.AsyncOpenAI(api_key=server.key, base_url=server.openai_url) as client:
            return await asyncio.gather(
                *(client.embeddings.create(model="minilm", input=f"async {text}") for text in TEXTS)
            )

    found = np.concatenate([vectors_of(answer) for answer in asyncio.run(embed_all())])
    assert same(found, offline([f"async {text}" for text in TEXTS]).vectors)


def test_a_full_queue_is_429_and_the_clients_retry_succeeds(slow_server):
    client = openai.OpenAI(api_key="unused", base_url=slow_server.openai_url, max_retries=0)
    large = " ".join(str(number) for number in range(250))  # 1.25 s at 200 tokens a second

    def fill() -> threading.Thread:
        request = {"model": "echo", "input": large}
        thread = threading.Thread(target=client.embeddings.create, kwargs=request)
        thread.start()
        while not httpx.get(f"{slow_server.url}/info").json()["speed"]["queued_tokens"]:
            time.sleep(0.01)
        return thread

    first = fill()
    with pytest.raises(openai.RateLimitError) as full:
        client.embeddings.create(model="echo", input=large)
    assert full.value.code == "overloaded"
    assert int(full.value.response.headers["retry-after"]) >= 1
    answer = client.with_options(max_retries=5).embeddings.with_raw_response.create(
        model="echo", input=large
    )
    assert answer.retries_taken >= 1
    assert answer.parse().usage.prompt_tokens == 251
    first.join()
