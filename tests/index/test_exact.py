from __future__ import annotations

import itertools

import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reasonembed.index.accelerator import TorchFilter
from reasonembed.index.exact import _cores, longest_norm, merge_topk, search

# Few values, so that equal scores and equal documents are the rule; sums are exact in float32.
COARSE = st.integers(-3, 3).map(lambda value: value / 2)
FLOATS = st.floats(-1e3, 1e3, width=32)


def reference(queries, documents, *, k, excluded):
    """One pair at a time, summed in float64, then sorted."""
    num_results = min(k, len(documents))
    scores = np.full((len(queries), num_results), -np.inf, dtype=np.float32)
    positions = np.full((len(queries), num_results), -1, dtype=np.int64)
    for row, query in enumerate(queries.astype(float)):
        pairs = [
            (-float(np.float32((query * document).sum())), position)
            for position, document in enumerate(documents.astype(float))
            if position not in excluded[row]
        ]
        for rank, (negated, position) in enumerate(sorted(pairs)[:num_results]):
            scores[row, rank], positions[row, rank] = -negated, position
    return scores, positions


@st.composite
def problems(draw, elements):
    dimension = draw(st.integers(1, 5))
    num_documents = draw(st.integers(1, 40))
    num_queries = draw(st.integers(0, 5))
    queries = draw(hnp.arrays(np.float32, (num_queries, dimension), elements=elements))
    documents = draw(hnp.arrays(np.float32, (num_documents, dimension), elements=elements))
    copies = draw(st.lists(st.integers(0, num_documents - 1), max_size=8))
    documents = np.concatenate([documents, documents[copies]])
    positions = st.integers(0, len(documents) - 1)
    excluded = [draw(st.frozensets(positions)) for _ in range(num_queries)]
    return queries, documents, excluded


def assert_equal(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@settings(max_examples=150, deadline=None)
@given(
    problem=problems(COARSE) | problems(FLOATS),
    k=st.integers(1, 50),
    query_block=st.integers(1, 6),
    document_block=st.integers(1, 50),
)
def test_equals_the_reference_for_every_block_size(problem, k, query_block, document_block):
    queries, documents, excluded = problem
    found = search(
        queries,
        documents,
        k=k,
        excluded=excluded,
        query_block=query_block,
        document_block=document_block,
    )
    assert found[0].dtype == np.float32
    assert found[1].dtype == np.int64
    assert_equal(found, reference(queries, documents, k=k, excluded=excluded))


@settings(max_examples=100, deadline=None)
@given(
    problem=problems(COARSE) | problems(FLOATS),
    k=st.integers(1, 50),
    query_block=st.integers(1, 6),
    products=st.integers(1, 200),
)
def test_an_accelerator_changes_nothing(problem, k, query_block, products):
    queries, documents, excluded = problem
    found = search(
        queries,
        documents,
        k=k,
        excluded=excluded,
        query_block=query_block,
        accelerator=TorchFilter("cpu", products=products),
    )
    assert_equal(found, reference(queries, documents, k=k, excluded=excluded))


@settings(max_examples=60, deadline=None)
@given(problem=problems(COARSE), k=st.integers(1, 20), data=st.data())
def test_merged_shards_equal_one_search(problem, k, data):
    queries, documents, excluded = problem
    cuts = data.draw(st.lists(st.integers(0, len(documents)), max_size=4).map(sorted))
    edges = [0, *cuts, len(documents)]
    shards = []
    for low, high in itertools.pairwise(edges):
        inside = [{p - low for p in one if low <= p < high} for one in excluded]
        scores, positions = search(queries, documents[low:high], k=k, excluded=inside)
        shards.append((scores, np.where(positions < 0, -1, positions + low)))
    merged = merge_topk(shards, k=k)
    assert_equal(merged, search(queries, documents, k=k, excluded=excluded))


def test_planted_copies_tie_exactly_at_real_size():
    rng = np.random.default_rng(0)
    documents = rng.standard_normal((3_000, 384), dtype=np.float32)
    documents /= np.linalg.norm(documents, axis=1, keepdims=True)
    copies = rng.choice(3_000, size=1_500)
    documents[copies] = documents[copies[0]]
    queries = (
        documents[copies[:3]] + rng.standard_normal((3, 384), dtype=np.float32) / 100
    ).astype(np.float32)
    scores, positions = search(queries, documents, k=200, document_block=512)
    for row in range(3):
        alone = search(queries[row : row + 1], documents, k=200, document_block=77)
        assert_equal(alone, (scores[row : row + 1], positions[row : row + 1]))
    assert len(np.unique(scores)) == 3
    np.testing.assert_array_equal(positions[0], np.unique(copies)[:200])


def test_near_ties_are_ordered_by_the_exact_score():
    """Two documents whose float32 products may come out in the wrong order."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal(1_024, dtype=np.float32)
    documents = np.tile(base, (400, 1))
    documents[np.arange(400), rng.integers(0, 1_024, 400)] += np.float32(1e-4)
    queries = rng.standard_normal((4, 1_024), dtype=np.float32)
    found = search(queries, documents, k=50, document_block=64)
    assert_equal(found, reference(queries, documents, k=50, excluded=[()] * 4))


def test_large_exclusions_cost_no_result():
    rng = np.random.default_rng(2)
    documents = rng.standard_normal((500, 8), dtype=np.float32)
    queries = rng.standard_normal((2, 8), dtype=np.float32)
    best_first = search(queries, documents, k=500)[1]
    excluded = [set(best_first[0, :480].tolist()), set(best_first[1, :10].tolist())]
    positions = search(queries, documents, k=100, excluded=excluded)[1]
    np.testing.assert_array_equal(positions[0, :20], best_first[0, 480:])
    assert (positions[0, 20:] == -1).all()
    np.testing.assert_array_equal(positions[1], best_first[1, 10:110])


def test_no_documents_give_empty_rows():
    scores, positions = search(np.ones((2, 3), np.float32), np.ones((0, 3), np.float32), k=5)
    assert scores.shape == positions.shape == (2, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"queries_QD": np.ones((2, 3))}, "queries must be a float32 matrix, got float64"),
        ({"documents_ND": np.ones(3, np.float32)}, r"documents must be .* shape \(3,\)"),
        ({"documents_ND": np.ones((4, 5), np.float32)}, "queries have 3 dimensions, documents 5"),
        ({"queries_QD": np.full((2, 3), np.nan, np.float32)}, r"queries\[0\] is not finite"),
        ({"documents_ND": np.full((4, 3), np.inf, np.float32)}, r"documents\[0\] is not finite"),
        ({"excluded": [[0]]}, "excluded has 1 entries for 2 queries"),
        ({"excluded": [[0], [4]]}, "excluded position 4 is not in 0..3"),
        ({"excluded": [[-1], []]}, "excluded position -1 is not in 0..3"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {
        "queries_QD": np.ones((2, 3), np.float32),
        "documents_ND": np.ones((4, 3), np.float32),
        "k": 2,
    }
    arguments |= change
    with pytest.raises(ValueError, match=message):
        search(arguments.pop("queries_QD"), arguments.pop("documents_ND"), **arguments)


def test_merge_needs_shards_that_fit():
    one = (np.zeros((1, 2), np.float32), np.zeros((1, 2), np.int64))
    two = (np.zeros((2, 2), np.float32), np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match="at least one shard"):
        merge_topk([], k=3)
    with pytest.raises(ValueError, match="differ in queries"):
        merge_topk([one, two], k=3)


def test_many_queries_are_spread_over_the_cores():
    """As many blocks as cores, each with a product of its own: the same as one after the other."""
    rng = np.random.default_rng(3)
    queries, documents = (rng.standard_normal((n, 16), dtype=np.float32) for n in (300, 2_000))
    _cores.cache_clear()  # it is asked for once a process
    with threadpoolctl.threadpool_limits(2, "blas"):
        found = search(queries, documents, k=7)
        accelerated = search(queries, documents, k=7, accelerator=TorchFilter("cpu"))
        assert {one["num_threads"] for one in threadpoolctl.threadpool_info()} >= {2}
    with threadpoolctl.threadpool_limits(1, "blas"):
        _cores.cache_clear()
        alone = search(queries, documents, k=7, query_block=300)
    _cores.cache_clear()
    assert_equal(found, alone)
    assert_equal(accelerated, alone)


@settings(max_examples=60, deadline=None)
@given(problem=problems(COARSE) | problems(FLOATS), k=st.integers(1, 50), more=st.floats(1, 10))
def test_a_norm_that_is_known_changes_nothing(problem, k, more):
    queries, documents, excluded = problem
    longest = longest_norm(documents)
    assert longest >= np.linalg.norm(documents.astype(float), axis=1).max() * (1 - 1e-6)
    found = search(queries, documents, k=k, excluded=excluded, longest=longest * more)
    assert_equal(found, search(queries, documents, k=k, excluded=excluded))


def test_the_norm_of_documents_that_cannot_be_searched():
    documents = np.ones((3, 4), np.float32)
    assert longest_norm(documents) == 2
    assert longest_norm(documents[:0]) == 0
    for wrong in (np.nan, np.inf, 3e38):
        documents[1] = wrong
        with pytest.raises(ValueError, match=r"documents\[1\] is not finite or too long"):
            longest_norm(documents)


@pytest.mark.parametrize("num_queries", [1, 31, 32, 33])
def test_few_and_many_queries_give_the_same(num_queries):
    rng = np.random.default_rng(5)
    queries = rng.normal(size=(40, 24)).astype(np.float32)
    documents = rng.normal(size=(70_000, 24)).astype(np.float32)
    whole = search(queries, documents, k=7)
    some = search(queries[:num_queries], documents, k=7)
    assert_equal(some, (whole[0][:num_queries], whole[1][:num_queries]))


def test_libraries_are_asked_for_their_threads_once(monkeypatch):
    asked = []
    monkeypatch.setattr(threadpoolctl, "threadpool_info", lambda: asked.append(1) or [])
    _cores.cache_clear()
    for _ in range(3):
        search(np.ones((2, 3), np.float32), np.ones((4, 3), np.float32), k=1)
    _cores.cache_clear()
    assert len(asked) == 1
