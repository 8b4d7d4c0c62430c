"""Embeddings of LangChain, LlamaIndex and Haystack, whose users never see the protocol."""

from __future__ import annotations

import asyncio

import openai
import pytest
import tiktoken
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret
from langchain_openai import OpenAIEmbeddings
from llama_index.embeddings.openai_like import OpenAILikeEmbedding

from tests.clients.expected import DOCUMENTS, same
from tests.clients.process import Server

pytestmark = pytest.mark.clients

TEXTS = list(DOCUMENTS.values())
QUERY = "why do trees lose their leaves?"


# ---- LangChain ------------------------------------------------------------------------------


def langchain(server: Server, model: str, **options: object) -> OpenAIEmbeddings:
    return OpenAIEmbeddings(
        model=model, base_url=server.openai_url, api_key=server.key, max_retries=0, **options
    )


def test_langchain(server, offline):
    made = langchain(server, "minilm", check_embedding_ctx_length=False, chunk_size=4)
    assert same(made.embed_documents(TEXTS), offline(TEXTS).vectors)
    assert same(made.embed_query(QUERY), offline([QUERY]).vectors)  # nobody said that it is one
    assert same(asyncio.run(made.aembed_documents(TEXTS)), offline(TEXTS).vectors)


def test_langchain_tells_queries_by_name_or_extra_body(server, offline):
    expected = offline([QUERY], role="query").vectors
    named = langchain(server, "minilm:query", check_embedding_ctx_length=False)
    assert same(named.embed_query(QUERY), expected)
    extra = {"extra_body": {"input_type": "query"}}
    told = langchain(server, "minilm", check_embedding_ctx_length=False, model_kwargs=extra)
    assert same(told.embed_query(QUERY), expected)
    short = langchain(server, "minilm:query", check_embedding_ctx_length=False, dimensions=128)
    assert same(short.embed_query(QUERY), expected[:, :128])


def test_langchain_as_it_comes_sends_another_tokenizers_ids(server, monkeypatch):
    # Its default vocabulary would be fetched; this one has ids of that size as well.
    ranks = {bytes([byte]): 90_000 + byte for byte in range(256)}
    foreign = tiktoken.Encoding(
        "foreign", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: foreign)
    with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
        langchain(server, "minilm").embed_documents(TEXTS)


# ---- LlamaIndex -----------------------------------------------------------------------------


def llama_index(server: Server, model: str) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(
        model_name=model, api_base=server.openai_url, api_key=server.key, embed_batch_size=4
    )


def test_llama_index(server, offline):
    documents, queries = llama_index(server, "minilm:document"), llama_index(server, "minilm:query")
    expected = offline([QUERY], role="query").vectors
    assert same(documents.get_text_embedding_batch(TEXTS), offline(TEXTS).vectors)
    assert same(documents.get_text_embedding(TEXTS[0]), offline(TEXTS[:1]).vectors)
    assert same(queries.get_query_embedding(QUERY), expected)
    assert same(asyncio.run(queries.aget_query_embedding(QUERY)), expected)


# ---- Haystack -------------------------------------------------------------------------------


def test_haystack(server, offline):
    where = {"api_base_url": server.openai_url, "api_key": Secret.from_token(server.key)}
    text = OpenAITextEmbedder(model="minilm:query", **where).run(text=QUERY)
    computed = offline([QUERY], role="query")
    assert same(text["embedding"], computed.vectors)
    assert text["meta"]["usage"]["prompt_tokens"] == len(computed.ids[0])
    embedder = OpenAIDocumentEmbedder(model="minilm:document", batch_size=4, **where)
    found = embedder.run(documents=[Document(content=one) for one in TEXTS])
    assert same([one.embedding for one in found["documents"]], offline(TEXTS).vectors)
    assert found["meta"]["usage"]["prompt_tokens"] == sum(map(len, offline(TEXTS).ids))
