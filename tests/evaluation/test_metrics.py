from __future__ import annotations

import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.errors import ConfigError, EvaluationError
from reasonembed.evaluation.datasets import Collection
from reasonembed.evaluation.metrics import (
    METRICS,
    cutoffs_of,
    evaluate_run,
    parse_metrics,
)

# Both sides sum a few doubles; only the order of the sums differs.
TOLERANCE = 1e-12


def reference(scores, judgments, k):
    """nDCG, recall, MAP and precision at k, and reciprocal rank, by their definitions."""
    order = sorted(scores, key=lambda doc: (np.float32(scores[doc]), doc.encode()), reverse=True)
    gains = [max(judgments.get(doc, 0), 0) for doc in order]
    gold = sum(relevance > 0 for relevance in judgments.values())
    hits = [rank for rank, gain in enumerate(gains, start=1) if gain]
    best = sorted((max(relevance, 0) for relevance in judgments.values()), reverse=True)

    def dcg(values):
        return sum(value / math.log2(rank + 1) for rank, value in enumerate(values[:k], start=1))

    at_k = [rank for rank in hits if rank <= k]
    precision = [(hits.index(rank) + 1) / rank for rank in at_k]
    return {
        f"ndcg@{k}": dcg(gains) / dcg(best) if gold else 0.0,
        f"recall@{k}": len(at_k) / gold if gold else 0.0,
        f"map@{k}": sum(precision) / gold if gold else 0.0,
        f"p@{k}": len(at_k) / k,
        "recip_rank": 1 / hits[0] if hits else 0.0,
    }


DOCS = st.sampled_from([f"d{number}" for number in range(12)])
SCORES = st.dictionaries(DOCS, st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 2.0, -1.0]), max_size=12)
JUDGMENTS = st.dictionaries(DOCS, st.integers(-1, 3), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(scores=SCORES, judgments=JUDGMENTS, k=st.sampled_from([1, 3, 10]))
def test_equals_the_definitions(scores, judgments, k):
    metrics = evaluate_run({"q": scores}, {"q": judgments}, ks=[k])
    assert metrics.per_query["q"] == pytest.approx(reference(scores, judgments, k), abs=TOLERANCE)


MANY_DOCS = st.sampled_from([f"d{number}" for number in range(60)])
LONG_RUNS = st.dictionaries(MANY_DOCS, st.sampled_from([0.5, 1.0, 1.0 + 1e-9, 2.0]), max_size=60)


@settings(max_examples=150, deadline=None)
@given(
    scores=LONG_RUNS,
    judgments=st.dictionaries(MANY_DOCS, st.integers(-1, 3), min_size=1, max_size=4),
    k=st.integers(1, 8),
)
def test_documents_that_trec_eval_does_not_get_would_change_nothing(scores, judgments, k):
    measures = {f"ndcg_cut.{k}", f"map_cut.{k}", f"recall.{k}", f"P.{k}", "recip_rank"}
    whole = pytrec_eval.RelevanceEvaluator({"q": judgments}, measures).evaluate({"q": scores})["q"]
    ours = evaluate_run({"q": scores}, {"q": judgments}, ks=[k]).per_query["q"]
    assert ours == {
        f"ndcg@{k}": whole[f"ndcg_cut_{k}"],
        f"map@{k}": whole[f"map_cut_{k}"],
        f"recall@{k}": whole[f"recall_{k}"],
        f"p@{k}": whole[f"P_{k}"],
        "recip_rank": whole["recip_rank"],
    }


def test_a_case_by_hand():
    # b and c tie, so c comes first: the order is a, c, b, d. Gold: c (2), d (1), z (1, not found).
    run = {"q": {"a": 3.0, "b": 2.0, "c": 2.0, "d": 1.0}}
    qrels = {"q": {"a": 0, "b": -1, "c": 2, "d": 1, "z": 1}}
    found = evaluate_run(run, qrels, ks=(1, 3, 5)).mean
    rank_2, rank_4 = 0.6309297535714575, 0.43067655807339306  # 1 / log2(rank + 1)
    ideal = 2 + rank_2 + 0.5
    by_hand = {
        "ndcg@1": 0.0,
        "ndcg@3": 2 * rank_2 / ideal,
        "ndcg@5": (2 * rank_2 + rank_4) / ideal,
        "map@1": 0.0,
        "map@3": (1 / 2) / 3,
        "map@5": (1 / 2 + 2 / 4) / 3,
        "recall@1": 0.0,
        "recall@3": 1 / 3,
        "recall@5": 2 / 3,
        "p@1": 0.0,
        "p@3": 1 / 3,
        "p@5": 2 / 5,
        "recip_rank": 1 / 2,
    }
    assert found == pytest.approx(by_hand, abs=TOLERANCE)


def test_gold_far_below_the_last_cutoff_counts_for_the_reciprocal_rank():
    run = {"q": {f"d{rank}": -float(rank) for rank in range(1, 1_001)}}
    assert evaluate_run(run, {"q": {"d700": 1}}).mean["recip_rank"] == 1 / 700
    assert evaluate_run(run, {"q": {"d5000": 1}}).mean["recip_rank"] == 0.0


def test_one_gold_page_of_two_at_the_top_is_half_the_recall_at_1():
    found = evaluate_run({"q": {"a": 2.0, "b": 1.0}}, {"q": {"a": 1, "b": 1}})
    assert found.mean["recall@1"] == 0.5


def test_credit_for_copies_of_gold_beside_the_official_figure():
    collection = Collection(
        name="small",
        queries={"q": "why?"},
        qrels={"q": {"gold": 1}},
        excluded={},
        task="generic",
        instruction="Find help.",
        corpus_source=None,
    )
    run = {"q": {"copy": 2.0, "gold": 2.0, "other": 1.0}}
    groups = {"gold": ["copy", "gold"]}
    credited = collection.credit_duplicates(lambda doc_id: groups[doc_id])
    # The tie goes to `gold`; of two gold documents one is found at rank 1.
    assert evaluate_run(run, collection.qrels).mean["recall@1"] == 1.0
    assert evaluate_run(run, credited.qrels).mean["recall@1"] == 0.5
    del run["q"]["gold"]
    assert evaluate_run(run, collection.qrels).mean["ndcg@10"] == 0.0
    # One of two at rank 1: 1 / (1 + 1 / log2(3)).
    assert evaluate_run(run, credited.qrels).mean["ndcg@10"] == pytest.approx(0.6131471927654584)


def test_a_query_that_the_run_lacks_counts_zero():
    qrels = {"q1": {"d1": 1}, "q2": {"d1": 1}, "q3": {"d1": 1}, "q4": {"d1": 1}}
    metrics = evaluate_run({"q1": {"d1": 1.0}, "q2": {"other": 1.0}, "q3": {}}, qrels)
    assert metrics.mean["ndcg@10"] == 0.25
    assert metrics.num_missing == 1
    assert metrics.per_query["q4"]["recall@100"] == 0.0


def test_an_empty_run_is_all_zeros():
    metrics = evaluate_run({}, {"q1": {"d1": 1}})
    assert set(metrics.mean.values()) == {0.0}
    assert metrics.num_missing == 1


def test_queries_without_gold_count_zero():
    metrics = evaluate_run({"q1": {"d": 1.0}, "q2": {"d": 1.0}}, {"q1": {"d": 1}, "q2": {"d": 0}})
    assert metrics.mean["ndcg@10"] == 0.5


def test_scores_beyond_float32_tie_as_they_do_for_trec_eval():
    metrics = evaluate_run({"q": {"a": 1e300, "b": 1e299}}, {"q": {"b": 1}})
    assert (metrics.num_ties, metrics.mean["recip_rank"]) == (1, 1.0)


def test_numpy_scores_and_float32_ties():
    run = {"q": {"a": np.float32(1), "b": np.float64(1 + 1e-9), "c": 0, "d": -1.5}}
    metrics = evaluate_run(run, {"q": {"b": 1}})
    assert metrics.num_ties == 1
    # Equal as float32, so the larger id comes first.
    assert metrics.mean["recip_rank"] == 1.0
    assert evaluate_run(run, {"q": {"a": 1}}).mean["recip_rank"] == 0.5


@pytest.mark.parametrize(
    ("run", "qrels", "message"),
    [
        ({"q": {"d": math.nan}}, {"q": {"d": 1}}, "query 'q', document 'd': score nan"),
        ({"q": {"d": np.float32(np.inf)}}, {"q": {"d": 1}}, "is not finite"),
        ({"other": {"d": 1.0}}, {"q": {"d": 1}}, r"1 queries of the run .*'other'"),
        ({}, {}, "no relevance judgments"),
        ({}, {"q": {}}, r"without any judgment in the qrels: \['q'\]"),
        ({"q": {"d": "1.0"}}, {"q": {"d": 1}}, "'d': score '1.0' is not a number but of type str"),
        ({"q": {"e": 1.0, "d": None}}, {"q": {"d": 1}}, "'d': score None is not a number"),
        ({"q": {"d": True}}, {"q": {"d": 1}}, "score True is not a number"),
        ({"q": {7: 1.0}}, {"q": {"d": 1}}, "doc id 7 is not a string"),
        ({7: {"d": 1.0}}, {7: {"d": 1}}, "query 7: ids must be strings"),
        ({}, {"q": {7: 1}}, "ids must be strings"),
        ({}, {"q": {"d": 0.5}}, "relevance must be a whole number"),
        ({}, {"q": {"d": "1"}}, "relevance must be a whole number"),
    ],
)
def test_inconsistent_input_is_refused(run, qrels, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate_run(run, qrels)


def test_cutoffs_must_be_positive():
    with pytest.raises(ValueError, match="cutoffs"):
        evaluate_run({}, {"q": {"d": 1}}, ks=[0])


def test_numpy_relevance_is_converted():
    qrels = {"q": {"d": np.int64(2)}}
    assert evaluate_run({"q": {"d": 1}}, qrels).mean["ndcg@10"] == 1.0


def test_names_of_metrics():
    assert parse_metrics("ndcg@7, recall@100,recip_rank") == ("ndcg@7", "recall@100", "recip_rank")
    assert cutoffs_of(("ndcg@7", "p@1", "map@7")) == (1, 7)
    assert cutoffs_of(("recip_rank",)) == (1,)
    assert len(METRICS) == 25
    for wrong in ("ndcg", "ndcg@0", "mrr", "ndcg@10,", "", "recall@-1", "p@1e3"):
        with pytest.raises(ConfigError, match="unknown metric"):
            parse_metrics(wrong)
    with pytest.raises(ConfigError, match="twice"):
        parse_metrics("p@1,p@1")
