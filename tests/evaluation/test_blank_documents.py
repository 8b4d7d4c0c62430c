"""Blank documents, which published corpora hold, stop no search."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reasonembed.config import EndpointRetriever
from reasonembed.corpus import CorpusStore, read_corpus
from reasonembed.embedder import Embedder
from reasonembed.embedder.endpoint import EndpointEmbedder
from reasonembed.evaluation.search import bm25_run
from reasonembed.index.bm25 import BM25Index
from tests.embedder.test_endpoint import embeddings
from tests.embedder.tiny import encoder_config, save_checkpoint
from tests.llm.chat_server import serving


@pytest.fixture
def store(tmp_path):
    rows = {"id": ["a", "b", "c"], "content": ["a dictionary keeps order", "", " \n"]}
    pq.write_table(pa.table(rows), tmp_path / "c.parquet")
    return CorpusStore(read_corpus(str(tmp_path / "c.parquet")))


def test_bm25_never_returns_them(store):
    index = BM25Index(store.texts(store.doc_ids))
    run = bm25_run({"q": "which order"}, index, doc_ids=store.doc_ids, excluded={}, k=3)
    assert list(run["q"]) == ["a"]


def test_an_encoder_gives_them_a_vector(store, tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model")
    vectors = Embedder.load(encoder_config(checkpoint)).encode_documents(store.texts(["a", "b"]))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_an_endpoint_is_never_sent_an_empty_text(store):
    config = EndpointRetriever(kind="endpoint", model="m", dimension=2)
    with serving(lambda body: embeddings(*([1, 2] for _ in body["input"]))) as server:
        EndpointEmbedder(config, base_url=server.url).encode_documents(store.texts(["a", "b"]))
    assert server.requests[0]["input"] == ["a dictionary keeps order", " "]
