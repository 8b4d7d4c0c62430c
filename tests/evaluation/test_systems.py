from __future__ import annotations

import numpy as np
import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.systems import bm25_run, dense_run

DOCUMENTS = {"d0": "cats jump", "d1": "dogs bark", "d2": "cats sleep", "d3": "cats jump"}


def test_dense_run_shuts_documents_out_before_the_cut():
    vectors = np.eye(3, dtype=np.float32)
    documents = np.array([[3, 1, 0], [2, 2, 0], [1, 3, 0], [0, 0, 9]], dtype=np.float32)
    run = dense_run(
        vectors[:2],
        documents,
        query_ids=["q0", "q1"],
        doc_ids=["a", "b", "c", "d"],
        excluded={"q0": {"a", "not in the corpus"}},
        k=2,
    )
    assert run == {"q0": {"b": 2.0, "c": 1.0}, "q1": {"c": 3.0, "b": 2.0}}
    assert list(run["q0"]) == ["b", "c"]
    assert type(run["q0"]["b"]) is float


def test_a_query_may_have_fewer_documents_than_k():
    one = np.ones((1, 2), dtype=np.float32)
    run = dense_run(one, one, query_ids=["q"], doc_ids=["d"], excluded={"q": ["d"]}, k=5)
    assert run == {"q": {}}


@pytest.mark.parametrize("doc_ids", [["a", "a"], ["a"]])
def test_every_vector_needs_its_own_id(doc_ids):
    vectors = np.ones((2, 2), dtype=np.float32)
    with pytest.raises(EvaluationError, match="document ids"):
        dense_run(vectors, vectors, query_ids=["q", "r"], doc_ids=doc_ids, excluded={}, k=1)


def test_bm25_run():
    queries = {"q0": "jumping cat", "q1": "horses"}
    run = bm25_run(queries, DOCUMENTS, excluded={"q0": {"d0"}}, k=2)
    assert list(run["q0"]) == ["d3", "d2"]
    assert run["q1"] == {}
