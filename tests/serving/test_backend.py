from __future__ import annotations

import asyncio
import json

import numpy as np
import pytest

from reasonembed import tasks
from reasonembed.embedder.contract import CONTRACT_FILE, load_tokenizer, resolve_contract
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.golden import write_golden
from reasonembed.embedder.tokenisation import Role
from reasonembed.serving.backend import EmbedderBackend
from reasonembed.serving.protocol import EmbedItem, EmbedResult, ItemError
from tests.embedder.tiny import encoder_config, save_checkpoint

# float32 sums over another batch shape; the tiny model's vectors have norm 1.
TOLERANCE = 1e-5
DEFAULT = tasks.get("generic").instruction
LIMIT = 96


@pytest.fixture(scope="module", params=[False, True], ids=["end token added", "own end token"])
def export(request, tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("export"), appends=request.param)
    config = encoder_config(folder, max_query_tokens=LIMIT, max_document_tokens=LIMIT)
    contract = resolve_contract(folder, config)
    (folder / CONTRACT_FILE).write_text(json.dumps(contract.to_json()))
    embedder = Embedder(folder, contract, device="cpu")
    write_golden(embedder, ["a set"], instruction="Find.", directory=folder)
    return folder


@pytest.fixture(scope="module")
def backend(export):
    return EmbedderBackend.load_export(export, device="cpu")


@pytest.fixture(scope="module")
def embedder(export):
    return Embedder.load_export(export, device="cpu")


def embed(backend: EmbedderBackend, *items: EmbedItem):
    return asyncio.run(backend.embed(list(items)))


def assert_vector(outcome, expected):
    assert isinstance(outcome, EmbedResult)
    np.testing.assert_allclose(outcome.vector, expected, atol=TOLERANCE)


def test_mixed_items_get_what_the_embedder_gives(backend, embedder):
    outcomes = embed(
        backend,
        EmbedItem("why", "query"),
        EmbedItem("a mapping"),
        EmbedItem("why", "query", "Find keys."),
        EmbedItem("a set"),
    )
    [default] = embedder.encode_queries(["why"], instruction=DEFAULT)
    [own] = embedder.encode_queries(["why"], instruction="Find keys.")
    documents = embedder.encode_documents(["a mapping", "a set"])
    for outcome, expected in zip(outcomes, [default, documents[0], own, documents[1]], strict=True):
        assert_vector(outcome, expected)
    assert np.abs(default - own).max() > 100 * TOLERANCE


def test_tokens_are_those_of_the_model(backend, embedder):
    [query, document] = embed(backend, EmbedItem("why", "query"), EmbedItem("a mapping"))
    [query_ids] = embedder.tokenise(["why"], role=Role.QUERY, instruction=DEFAULT)
    [document_ids] = embedder.tokenise(["a mapping"], role=Role.DOCUMENT)
    assert (query.num_tokens, document.num_tokens) == (len(query_ids), len(document_ids))


def test_token_ids_stand_for_their_text(backend, embedder, export):
    tokenizer = load_tokenizer(export)
    ids = tuple(tokenizer("the order of keys")["input_ids"])
    [result] = embed(backend, EmbedItem(ids))
    assert_vector(result, embedder.encode_documents(["the order of keys"])[0])
    [empty] = embed(backend, EmbedItem((tokenizer.eos_token_id,)))
    assert empty == ItemError("holds no token besides special ones", is_callers_fault=True)


def test_the_limit_is_exact_and_over_it_nothing_is_cut_unasked(backend, embedder):
    fits = "q" * (LIMIT - 1)  # a token each, and the end token
    fitting, over, cut = embed(
        backend,
        EmbedItem(fits),
        EmbedItem(fits + "q"),
        EmbedItem(fits + "q and more", truncate="end"),
    )
    assert (fitting.num_tokens, fitting.is_truncated) == (LIMIT, False)
    assert over.is_callers_fault
    assert f"limit of {LIMIT} tokens for a document" in over.message
    assert (cut.num_tokens, cut.is_truncated) == (LIMIT, True)
    assert_vector(cut, embedder.encode_documents([fits + "q and more"])[0])


def test_a_batch_of_errors_alone(backend):
    [outcome] = embed(backend, EmbedItem("word " * 500))
    assert isinstance(outcome, ItemError)


def test_description(backend, embedder, export):
    described = backend.describe("tiny")
    assert described.name == "tiny"
    assert described.dimension == embedder.contract.dimension
    assert (described.max_query_tokens, described.max_document_tokens) == (LIMIT, LIMIT)
    assert described.vocabulary_size == len(load_tokenizer(export))
