import random

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.remixer import duplicates
from reasonembed.remixer.duplicates import (
    near_duplicate_queries,
    near_duplicates,
    shingles,
    similarity,
    usable_queries,
)

words = st.lists(st.sampled_from(["why", "does", "it", "stall", "now", "so"]), max_size=9)
texts = st.dictionaries(st.text("abcd", min_size=1, max_size=3), words.map(" ".join), max_size=9)
limits = st.sampled_from([0.1, 0.3, 0.5, 0.8, 1.0])


def near(queries, limit):
    return near_duplicate_queries(list(queries), list(queries.values()), max_similarity=limit)


def alike(a, b, limit):
    value = similarity(a, b)
    return value > limit or value == 1


def brute_force(queries, limit):
    """The rule as it is stated, every pair looked at."""
    grams = {query_id: shingles(text, size=3) for query_id, text in queries.items()}
    kept, dropped = [], {}
    for one in sorted(queries):
        twins = [other for other in kept if alike(grams[one], grams[other], limit)]
        if twins:
            dropped[one] = min(twins)
        else:
            kept.append(one)
    return dropped


def test_shingles_do_not_see_case_and_punctuation_and_stay_what_they_are():
    assert shingles("Why does IT stall?", size=3) == shingles("why, does it... stall", size=3)
    assert len(shingles("why does it stall", size=3)) == 2
    assert len(shingles("why does it why does it", size=3)) == 3  # a set
    # Stored nowhere, but jobs on different machines must find the same duplicates.
    assert shingles("why does it", size=3) == {0xDDF10914BFD5FE3C}


def test_short_texts_are_one_shingle_and_blank_ones_none():
    assert len(shingles("why", size=3)) == len(shingles("???", size=3)) == 1
    assert shingles("why", size=3) != shingles("how", size=3)
    assert shingles(" \n", size=3) == frozenset()


@given(words, words)
def test_similarity_is_jaccards(a, b):
    first, second = (shingles(" ".join(one), size=2) for one in (a, b))
    union = first | second
    expected = len(first & second) / len(union) if union else 0
    assert similarity(first, second) == pytest.approx(expected)
    assert similarity(first, second) == similarity(second, first)


@given(texts, limits)
def test_no_query_is_left_out_wrongly_and_what_stands_for_it_is_kept(queries, limit):
    dropped = near(queries, limit)
    for left_out, kept in dropped.items():
        a, b = (shingles(queries[one], size=3) for one in (left_out, kept))
        assert alike(a, b, limit)
        assert kept < left_out
        assert kept not in dropped


@given(texts, limits, st.randoms(use_true_random=False))
def test_the_result_follows_from_the_set_of_queries(queries, limit, rng):
    shuffled = list(queries.items())
    rng.shuffle(shuffled)
    assert near(dict(shuffled), limit) == near(queries, limit)


@pytest.mark.parametrize("limit", [0.3, 0.5, 0.8, 0.9, 1.0])
def test_the_bands_find_what_comparing_all_pairs_finds(limit):
    # Pairs of every similarity, most of them near the limit where bands are weakest.
    rng = random.Random(7)
    vocabulary = [f"word{i}" for i in range(3_000)]
    queries = {}
    for i in range(150):
        text = rng.choices(vocabulary, k=60)
        changed = list(text)
        for _ in range(rng.randint(0, 14)):
            changed[rng.randrange(60)] = rng.choice(vocabulary)
        queries |= {f"q{i}-a": " ".join(text), f"q{i}-b": " ".join(changed)}
    found = near(queries, limit)
    assert found == brute_force(queries, limit)
    assert 5 < len(found) < 150  # there was something to find and something to leave


@pytest.mark.parametrize("limit", [0.06, 0.1, 0.25, 0.5, 0.8, 0.95, 0.999, 1.0])
def test_the_promised_recall_at_the_limit(limit):
    bands, rows = duplicates._bands(limit)
    assert bands * rows <= duplicates._PERMUTATIONS
    assert 1 - (1 - limit**rows) ** bands >= 0.999


def test_a_chain_of_near_duplicates_keeps_what_is_like_nothing_that_is_kept():
    # a is like b and b is like c, but a is not like c: only b goes.
    a, b, c = "1 2 3 4 5 6 7 8", "2 3 4 5 6 7 8 9", "3 4 5 6 7 8 9 10"
    assert near({"a": a, "b": b, "c": c}, 0.6) == {"b": "a"}


def test_equal_queries_are_near_duplicates_at_any_limit():
    assert near({"a": "why stall", "b": "Why stall?", "c": "why not"}, 1.0) == {"b": "a"}


def test_usable_queries_are_ok_and_one_of_each_kind():
    text = "why does my loop stall when the file is large"
    rows = [
        {"query_id": "q3", "query": text, "status": "ok", "task": "t"},
        {"query_id": "q1", "query": None, "status": "invalid", "task": "t"},
        {"query_id": "q2", "query": text.upper(), "status": "ok", "task": "t"},
        {"query_id": "q0", "query": "something else", "status": "ok", "task": "t"},
    ]
    table, dropped = usable_queries(pa.Table.from_pylist(rows), max_similarity=0.8)
    assert table.to_pylist() == [rows[2], rows[3]]  # whole rows, in their order
    assert dropped == {"q3": "q2"}
    empty = pa.Table.from_pylist(rows).slice(0, 0)
    assert usable_queries(empty, max_similarity=0.8) == (empty, {})


@given(texts, st.sets(st.text("abcd", min_size=1, max_size=3), max_size=3), st.floats(0, 0.99))
def test_near_duplicates_of_given_documents_are_those_that_all_pairs_show(
    documents, given_ids, limit
):
    grams = {doc_id: shingles(text, size=5) for doc_id, text in documents.items()}
    expected = {
        doc_id
        for doc_id in documents.keys() - given_ids
        if any(similarity(grams[doc_id], grams[one]) > limit for one in given_ids & grams.keys())
    }
    assert near_duplicates(documents, of=given_ids, max_similarity=limit) == expected
