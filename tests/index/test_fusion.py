from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.index.fusion import Origin, quota, rrf, weighted

LISTS = st.dictionaries(
    st.sampled_from(["miner", "bm25", "run"]),
    st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8),
    min_size=1,
)
K = st.integers(1, 10)


def origins_by_hand(ranked, doc_id):
    return {Origin(name, ids.index(doc_id) + 1) for name, ids in ranked.items() if doc_id in ids}


@given(LISTS, K, st.integers(1, 80))
def test_rrf_is_the_sum_of_reciprocal_ranks(ranked, k, constant):
    fused = rrf(ranked, k=k, constant=constant)
    found = {doc_id for ids in ranked.values() for doc_id in ids}
    sums = {
        one: sum(1 / (constant + origin.rank) for origin in origins_by_hand(ranked, one))
        for one in found
    }
    assert len(fused) == min(k, len(found))
    for one in fused:
        assert one.score == pytest.approx(sums[one.doc_id])
        assert set(one.origins) == origins_by_hand(ranked, one.doc_id)
    assert [(-one.score, one.doc_id) for one in fused] == sorted(
        (-one.score, one.doc_id) for one in fused
    )
    assert (
        min([one.score for one in fused], default=0)
        >= max([sums[one] for one in found - {one.doc_id for one in fused}], default=0) - 1e-12
    )  # sums in another order


@given(LISTS, K)
def test_the_order_of_retrievers_does_not_matter_to_rrf(ranked, k):
    turned = dict(reversed(ranked.items()))
    assert [(one.doc_id, one.score) for one in rrf(ranked, k=k)] == [
        (one.doc_id, one.score) for one in rrf(turned, k=k)
    ]


def test_equal_sums_stand_by_doc_id():
    fused = rrf({"miner": ["z", "b"], "bm25": ["a", "c"]}, k=3)
    assert [one.doc_id for one in fused] == ["a", "z", "b"]


def test_weighted_brings_each_retriever_to_the_same_scale():
    scored = {
        "miner": {"a": 8.0, "b": 6.0, "c": 4.0},
        "bm25": {"d": 0.3, "b": 0.1},
        "run": {"c": 5},
    }
    fused = weighted(scored, k=4, weights={"miner": 2.0, "bm25": 1.0, "run": 0.5})
    # b is in the middle of one list and the last of another; c is the last, and alone in its list.
    assert [(one.doc_id, one.score) for one in fused] == [
        ("a", 2.0),
        ("b", 1.0),
        ("d", 1.0),
        ("c", 0.5),
    ]
    assert fused[1].origins == (Origin("miner", 2), Origin("bm25", 2))


@given(LISTS, K, st.data())
def test_quota_takes_so_many_new_ones_of_each(ranked, k, data):
    quotas = {name: data.draw(st.integers(1, 5)) for name in ranked}
    fused = quota(ranked, k=k, quotas=quotas)
    ids = [one.doc_id for one in fused]
    assert len(set(ids)) == len(ids) <= min(k, sum(quotas.values()))
    assert [one.score for one in fused] == [1 / place for place in range(1, len(ids) + 1)]
    for one in fused:
        assert set(one.origins) == origins_by_hand(ranked, one.doc_id)
    if len(ids) < k:  # then every retriever gave its quota, or all that it had
        for name, own in ranked.items():
            assert set(own) <= set(ids) or len(set(own) & set(ids)) >= quotas[name]


def test_quota_goes_in_turn_and_a_shared_document_counts_for_its_first_finder():
    ranked = {"miner": ["a", "b", "c"], "bm25": ["a", "d", "e"]}
    fused = quota(ranked, k=9, quotas={"miner": 2, "bm25": 2})
    assert [one.doc_id for one in fused] == ["a", "d", "b", "e"]
    assert fused[0].origins == (Origin("miner", 1), Origin("bm25", 1))
    assert [one.doc_id for one in quota(ranked, k=3, quotas={"miner": 2, "bm25": 2})] == [
        "a",
        "d",
        "b",
    ]
