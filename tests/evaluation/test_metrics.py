from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.metrics import evaluate_run

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
    ],
)
def test_inconsistent_input_is_refused(run, qrels, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate_run(run, qrels)


def test_cutoffs_must_be_positive():
    with pytest.raises(ValueError, match="cutoffs"):
        evaluate_run({}, {"q": {"d": 1}}, ks=[0])
