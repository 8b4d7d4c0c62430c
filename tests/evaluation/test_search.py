from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.search import bm25_run, dense_run, hybrid_run
from reasonembed.index.bm25 import BM25Index

DOCUMENTS = {"d0": "cats jump", "d1": "dogs bark", "d2": "cats sleep", "d3": "cats jump"}


def test_dense_run_shuts_documents_out_before_the_cut():
    vectors = np.eye(3, dtype=np.float32)
    documents = np.array([[3, 1, 0], [2, 2, 0], [1, 3, 0], [0, 0, 9]], dtype=np.float32)
    run = dense_run(
        vectors[:2],
        [(["a", "b", "c", "d"], documents)],
        query_ids=["q0", "q1"],
        excluded={"q0": {"a", "not in the corpus"}},
        k=2,
    )
    assert run == {"q0": {"b": 2.0, "c": 1.0}, "q1": {"c": 3.0, "b": 2.0}}
    assert list(run["q0"]) == ["b", "c"]
    assert type(run["q0"]["b"]) is float


def test_a_query_may_have_fewer_documents_than_k_and_a_corpus_none():
    one = np.ones((1, 2), dtype=np.float32)
    run = dense_run(one, [(["d"], one)], query_ids=["q"], excluded={"q": ["d"]}, k=5)
    assert run == dense_run(one, [], query_ids=["q"], excluded={}, k=5) == {"q": {}}


@st.composite
def searches(draw):
    """Queries, documents with many ties, exclusions, k, and where to cut the corpus."""
    num_queries, num_documents = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    seed = draw(st.integers(0, 999))
    rng = np.random.default_rng(seed)
    few = rng.standard_normal((3, 4)).astype(np.float32)
    queries = rng.standard_normal((num_queries, 4)).astype(np.float32)
    kinds = rng.integers(0, 3, num_documents)
    doc_ids = [f"d{i}" for i in range(num_documents)]
    excluded = {
        f"q{i}": draw(st.sets(st.sampled_from(doc_ids)).map(frozenset)) for i in range(num_queries)
    }
    edges = sorted(draw(st.sets(st.integers(0, num_documents), max_size=3)))
    return queries, few[kinds], kinds, doc_ids, excluded, draw(st.integers(1, 15)), edges


@given(searches())
def test_shards_change_nothing_and_exclusion_costs_no_result(drawn):
    queries, documents, kinds, doc_ids, excluded, k, edges = drawn
    query_ids = list(excluded)
    whole = dense_run(queries, [(doc_ids, documents)], query_ids=query_ids, excluded=excluded, k=k)
    cuts = zip([0, *edges], [*edges, len(doc_ids)], strict=True)
    parts = ((doc_ids[a:b], documents[a:b]) for a, b in cuts if a < b)
    shards = dense_run(queries, parts, query_ids=query_ids, excluded=excluded, k=k)
    assert {q: list(run.items()) for q, run in whole.items()} == {
        q: list(run.items()) for q, run in shards.items()
    }
    kind = dict(zip(doc_ids, kinds.tolist(), strict=True))
    for query_id, run in whole.items():
        assert not set(run) & excluded[query_id]
        assert len(run) == min(k, len(doc_ids) - len(excluded[query_id]))
        # Duplicates tie exactly and stand in the order of the corpus.
        assert list(run) == sorted(run, key=lambda one: (-run[one], int(one[1:])))
        for one in range(3):
            assert len({score for doc_id, score in run.items() if kind[doc_id] == one}) <= 1


@pytest.mark.parametrize("parts", [[["a", "a"]], [["a"]], [["a", "b"], ["b", "c"]]])
def test_every_vector_needs_its_own_id(parts):
    vectors = np.ones((2, 2), dtype=np.float32)
    with pytest.raises(EvaluationError, match="document ids"):
        dense_run(
            vectors, [(ids, vectors) for ids in parts], query_ids=["q", "r"], excluded={}, k=1
        )


def test_bm25_run():
    queries = {"q0": "jumping cat", "q1": "horses"}
    index = BM25Index(list(DOCUMENTS.values()))
    run = bm25_run(queries, index, doc_ids=list(DOCUMENTS), excluded={"q0": {"d0"}}, k=2)
    assert list(run["q0"]) == ["d3", "d2"]
    assert run["q1"] == {}


DENSE = {"q": {"a": 0.9, "b": 0.5, "c": 0.1}, "r": {}}
SPARSE = {"q": {"b": 30.0, "d": 10.0}, "r": {"e": 7.0}}
RUNS = {"dense": DENSE, "bm25": SPARSE}


def test_hybrid_by_weight():
    run = hybrid_run(RUNS, fusion="weighted", k=3, weights={"dense": 0.75, "bm25": 0.25})
    # By hand: a 0.75*1, b 0.75*0.5 + 0.25*1, c and d are the last of their lists.
    assert run == {"q": {"a": 0.75, "b": pytest.approx(0.625), "c": 0.0}, "r": {"e": 0.25}}
    assert list(run["q"]) == ["a", "b", "c"]
    assert hybrid_run(RUNS, fusion="weighted", k=1)["q"] == {"b": pytest.approx(1.5)}


def test_hybrid_by_reciprocal_rank():
    run = hybrid_run(RUNS, fusion="rrf", k=9, rrf_constant=1)
    assert run["q"] == {"b": pytest.approx(1 / 3 + 1 / 2), "a": 1 / 2, "d": 1 / 3, "c": 1 / 4}
    assert list(run["q"]) == ["b", "a", "d", "c"]


def test_equal_scores_share_a_rank():
    scores = {"a": 3.0, "b": 2.0, "twin": 2.0, "c": 1.0}
    run = hybrid_run({"dense": {"q": scores}}, fusion="rrf", k=9, rrf_constant=1)
    assert run["q"] == {"a": 1 / 2, "b": 1 / 3, "twin": 1 / 3, "c": 1 / 5}


def test_hybrid_wants_the_same_queries():
    with pytest.raises(EvaluationError, match=r"'bm25' lacks 1 queries .*\['q'\]"):
        hybrid_run({"dense": DENSE, "bm25": {"r": {}}}, fusion="rrf", k=3)


SCORED = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([0.0, 0.25, 1.5, 7.0]))


@given(SCORED, SCORED, st.sampled_from(["rrf", "weighted"]), st.integers(1, 8))
def test_hybrid_holds_what_its_parts_hold(one, other, fusion, k):
    run = hybrid_run({"x": {"q": one}, "y": {"q": other}}, fusion=fusion, k=k)
    turned = hybrid_run({"y": {"q": other}, "x": {"q": one}}, fusion=fusion, k=k)
    assert set(run["q"]) <= set(one) | set(other)
    assert len(run["q"]) == min(k, len(set(one) | set(other)))
    assert list(turned["q"].items()) == list(run["q"].items())
    for a in run["q"]:
        for b in run["q"]:  # copies tie in every run, so they tie in the fusion
            if (one.get(a), other.get(a)) == (one.get(b), other.get(b)):
                assert run["q"][a] == run["q"][b]
    assert list(run["q"].values()) == sorted(run["q"].values(), reverse=True)
