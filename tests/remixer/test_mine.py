import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.config import EncoderConfig, MineConfig
from reasonembed.errors import CorpusError
from reasonembed.remixer.mine import distinct_documents, mine_candidates
from reasonembed.schemas import CANDIDATES, QUERIES, from_rows
from tests.remixer.fakes import corpus_store

DIMENSION = 4


def queries(*source_doc_ids):
    rows = [
        {
            "query_id": f"q{i}",
            "query": "why",
            "source_doc_id": source,
            "task": "generic",
            "status": "ok",
            "detail": None,
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "seed": 0,
            "model": "m",
        }
        for i, source in enumerate(source_doc_ids)
    ]
    return from_rows(rows, QUERIES, where="test")


def mine(texts, sources, doc_ids, *, k, vectors_QD=None, vectors_ND=None):
    rng = np.random.default_rng(0)
    if vectors_QD is None:
        vectors_QD = rng.standard_normal((len(sources), DIMENSION)).astype(np.float32)
    if vectors_ND is None:
        vectors_ND = rng.standard_normal((len(doc_ids), DIMENSION)).astype(np.float32)
    config = MineConfig(encoder=EncoderConfig(model="retriever"), top_k=k)
    store = corpus_store(texts)
    return mine_candidates(
        queries(*sources), vectors_QD, doc_ids, vectors_ND, corpus=store, config=config
    )


@st.composite
def planted(draw):
    """A corpus of few texts, so that most documents have exact duplicates, and its queries."""
    texts = draw(st.lists(st.integers(0, 5), min_size=1, max_size=14))
    corpus = {f"d{i:02d}": f"text {number}" for i, number in enumerate(texts)}
    sources = draw(st.lists(st.sampled_from(sorted(corpus)), min_size=1, max_size=5))
    searched = draw(
        st.sampled_from([sorted(corpus), distinct_documents(corpus_store(corpus))])
        | st.permutations(sorted(corpus))
    )
    return corpus, sources, list(searched)


@given(planted(), st.integers(1, 8))
def test_neither_the_source_nor_an_equal_text_is_ever_a_candidate(planting, k):
    corpus, sources, searched = planting
    rows = mine(corpus, sources, searched, k=k).to_pylist()
    for row, source in zip(rows, sources, strict=True):
        equal = [doc_id for doc_id in searched if corpus[doc_id] == corpus[source]]
        assert row["source_doc_id"] == source
        assert not {corpus[doc_id] for doc_id in row["doc_ids"]} & {corpus[source]}
        assert len(set(row["doc_ids"])) == len(row["doc_ids"])
        # Each query has its full k, unless there are no more documents.
        assert len(row["doc_ids"]) == len(row["scores"]) == min(k, len(searched) - len(equal))
        assert row["scores"] == sorted(row["scores"], reverse=True)
        assert row["num_excluded"] == len(equal)


def test_candidates_are_the_nearest_that_may_be_returned():
    texts = {"source": "a", "twin": "a", "near": "b", "far": "c"}
    vectors_ND = np.array([[9, 0], [9, 0], [5, 0], [1, 0]], dtype=np.float32)
    table = mine(
        texts,
        ["twin"],
        list(texts),
        k=3,
        vectors_QD=np.array([[1, 0]], dtype=np.float32),
        vectors_ND=vectors_ND,
    )
    assert table.schema == CANDIDATES
    assert table.to_pylist() == [
        {
            "query_id": "q0",
            "source_doc_id": "twin",
            "task": "generic",
            "retriever": "retriever",
            "doc_ids": ["near", "far"],
            "scores": [5.0, 1.0],
            "num_excluded": 2,
        }
    ]


def test_a_corpus_of_one_text_leaves_an_empty_row_not_a_missing_one():
    (row,) = mine({"a": "same", "b": "same"}, ["a"], ["a", "b"], k=3).to_pylist()
    assert (row["doc_ids"], row["scores"], row["num_excluded"]) == ([], [], 2)


def test_no_queries_no_rows():
    assert mine({"a": "x"}, [], ["a"], k=3).num_rows == 0


def test_a_source_outside_the_corpus_is_refused():
    with pytest.raises(CorpusError, match="gone"):
        mine({"a": "x"}, ["gone"], ["a"], k=1)


def test_distinct_documents_are_the_first_of_each_text():
    store = corpus_store({"b": "one", "a": "one", "c": "two", "d": "one   "})
    assert distinct_documents(store) == ["b", "c"]
