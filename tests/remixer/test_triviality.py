import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.remixer.triviality import (
    KINDS,
    choose_queries,
    longest_copied_run,
    triviality,
)
from reasonembed.schemas import CANDIDATES, SAMPLES, from_rows, text_id
from tests.remixer.fakes import corpus_store

WORDS = st.lists(st.sampled_from("abc"), max_size=8)
TEXTS = {
    "source": "The heron waits in shallow water and strikes at fish with its long bill.",
    "twin": "The  heron waits in shallow water and strikes at fish with its long bill.",
    "concept": "Refraction bends light where it leaves water, so things seem raised.",
    "other": "Mountains erode under wind.",
    "far": "Sourdough bread rises slowly.",
}
QUERY = "How can a heron in shallow water and so on judge where fish stand, if light bends?"


def sample(query_id="q1", query=QUERY, positives=("concept",), source="source", texts=TEXTS):
    return {
        "query_id": query_id,
        "task": "generic",
        "instruction": "Find.",
        "query": query,
        "rewritten_query": query,
        "positives": [
            {"doc_id": one, "text": texts[one], "label": 4.0, "text_hash": one} for one in positives
        ],
        "negatives": [],
        "source_doc_id": source,
        "split": "train",
    }


def samples(*rows):
    return from_rows(list(rows), SAMPLES, where="test")


def lookup(vectors):
    table = {text_id(TEXTS[doc], instruction=None): v for doc, v in vectors.items() if doc in TEXTS}
    table[text_id(QUERY, instruction="Find.")] = vectors["query"]
    return lambda ids: {id_: np.array(table[id_]) for id_ in ids if id_ in table}


@given(WORDS, WORDS)
def test_longest_run_against_all_runs(a, b):
    runs = {tuple(a[i:j]) for i, j in itertools.combinations(range(len(a) + 1), 2)} & {
        tuple(b[i:j]) for i, j in itertools.combinations(range(len(b) + 1), 2)
    }
    assert longest_copied_run(a, b) == max(map(len, runs), default=0)


def test_each_measure_by_hand():
    row = sample(query="The heron, shallow water, a fish: light bends?")
    found = triviality(samples(row), corpus_store(TEXTS))
    figures = {name: (m.positives.mean, m.sources.mean) for name, m in found.measures.items()}
    # Of the query 6 words count: heron shallow water fish light bend. Of concept 10, where water,
    # light and bend are shared; of source 9, where heron, shallow, water and fish are.
    assert figures["shared_words"] == (3 / 6, 4 / 6)
    assert figures["jaccard"] == (3 / 13, 4 / 11)
    assert figures["copied_words"] == (1, 2)  # the heron; shallow water
    assert found.num_queries == 1
    assert found.num_documents == 4  # the twin counts once


def test_bm25_rank_counts_the_source_and_puts_strangers_next_to_last():
    texts = {"source": "heron heron heron", "close": "heron pond", "b": "bread", "c": "stone"}
    rows = sample(query="heron", positives=("close", "b"), texts=texts)
    found = triviality(samples(rows), corpus_store(texts)).measures["bm25_rank"]
    assert found.sources.mean == 1
    assert found.positives.mean == (2 + 3) / 2  # b shares no word: after the two that do
    assert found.difference.mean_difference == 1.5
    assert found.verdict == "less"


def test_dense_rank_is_that_of_the_vectors():
    vectors = {"query": [1.0, 0.0], "source": [0.9, 0], "concept": [0.5, 0], "other": [0.7, 0]}
    have = lookup(vectors | {"far": [0.1, 0.0]})
    found = triviality(samples(sample()), corpus_store(TEXTS), vectors=have)
    dense = found.measures["dense_rank"]
    assert (dense.positives.mean, dense.sources.mean) == (3, 1)
    assert found.notes == ()


def test_of_equal_texts_any_may_be_the_one_that_was_embedded():
    vectors = {"query": [1.0, 0.0], "twin": [0.9, 0], "concept": [0.5, 0], "other": [0.7, 0]}
    have = lookup(vectors | {"far": [0.1, 0.0]})
    found = triviality(samples(sample()), corpus_store(TEXTS), vectors=have)
    dense = found.measures["dense_rank"]
    assert (dense.positives.mean, dense.sources.mean) == (3, 1)


def test_without_vectors_the_candidates_tell_the_positives_rank():
    row = {
        "query_id": "q1",
        "source_doc_id": "source",
        "task": "generic",
        "doc_ids": ["far", "concept"],
        "scores": [1.0, 0.5],
        "origins": [
            [{"retriever": "bm25", "rank": 1}],
            [{"retriever": "bm25", "rank": 2}, {"retriever": "miner", "rank": 7}],
        ],
        "num_excluded": 2,
        "source_rank": 1,
    }
    mined = from_rows([row], CANDIDATES, where="test")
    missing = lookup({"query": [1.0, 0.0]})  # the documents' are gone
    found = triviality(samples(sample()), corpus_store(TEXTS), vectors=missing, candidates=mined)
    dense = found.measures["dense_rank"]
    assert (dense.positives.mean, dense.sources, dense.verdict) == (7, None, "unknown")
    assert "vectors are not at hand" in found.notes[-1]


def test_samples_of_another_origin_have_no_control():
    texts = TEXTS | {"elsewhere": "The heron is a bird."}
    rows = sample(positives=("elsewhere",), source=None, texts=texts)
    found = triviality(samples(rows), corpus_store(TEXTS))
    assert found.measures["shared_words"].sources is None
    assert "bm25_rank" not in found.measures  # it stands in no corpus that ranks could be of
    assert "1 samples name no source" in found.notes[0]


def test_a_query_counts_once_however_many_positives_it_has():
    rows = [sample("q1", positives=("source",) * 9), sample("q2", positives=("far",))]
    found = triviality(samples(*rows), corpus_store(TEXTS)).measures["copied_words"]
    assert found.positives.mean == (4 + 0) / 2
    assert found.num_queries == 2


def test_a_large_corpus_is_ranked_in_part_and_says_so():
    texts = TEXTS | {f"d{i}": f"filler number {i}" for i in range(50)}
    found = triviality(samples(sample()), corpus_store(texts), max_documents=10)
    assert found.num_documents == 10
    assert "among 10 of 54 distinct texts" in found.notes[0]
    ranks = found.measures["bm25_rank"]
    assert (ranks.positives.mean, ranks.sources.mean) == (1, 2)  # both are always kept


@given(st.sets(st.text(min_size=1, max_size=4), max_size=30), st.integers(1, 10))
def test_the_choice_of_queries_is_stable(ids, most):
    chosen = choose_queries(ids, most=most)
    assert chosen == choose_queries(sorted(ids), most=most)
    assert set(chosen) <= set(choose_queries(ids, most=most + 1))


def test_limit_of_queries_is_kept():
    rows = samples(*(sample(f"q{i}") for i in range(20)))
    assert triviality(rows, corpus_store(TEXTS), max_queries=5).num_queries == 5


@pytest.mark.parametrize(
    ("positive", "source", "verdict"), [("far", "source", "less"), ("source", "far", "more")]
)
def test_every_measure_says_which_way_trivial_lies(positive, source, verdict):
    vectors = {"query": [1.0], "source": [0.9], "concept": [0.5], "other": [0.4], "far": [0.1]}
    rows = sample(positives=(positive,), source=source)
    found = triviality(samples(rows), corpus_store(TEXTS), vectors=lookup(vectors))
    assert {name: one.verdict for name, one in found.measures.items()} == dict.fromkeys(
        KINDS, verdict
    )


def test_no_samples_no_measures():
    empty = triviality(pa.table(SAMPLES.empty_table()), corpus_store(TEXTS))
    assert (empty.num_queries, dict(empty.measures)) == (0, {})
