import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.systems.reranking import reorder

RUN = {"q": {"a": 9.0, "b": 8.0, "c": 7.0, "d": 6.0, "e": 5.0}}


def order(grades, **settings):
    return list(reorder(RUN, {"q": grades}, **settings)["q"])


def test_the_top_stands_by_grade_and_equal_grades_by_the_retriever():
    grades = {"a": 1.0, "b": 3.0, "c": 5.0, "d": 3.0}
    assert order(grades, top=4, weight=1.0) == ["c", "b", "d", "a", "e"]
    assert order(grades, top=2, weight=1.0) == ["b", "a", "c", "d", "e"]


def test_a_document_without_a_grade_counts_as_the_mean():
    assert order({"a": 1.0, "c": 5.0}, top=3, weight=1.0) == ["c", "b", "a", "d", "e"]
    assert order({}, top=3, weight=1.0) == list("abcde")


def test_weights_mix_grade_and_score():
    grades = {"a": 4.0, "b": 5.0, "c": 1.0}
    assert order(grades, top=3, weight=0.0) == list("abcde")
    assert order(grades, top=3, weight=0.5) == ["a", "b", "c", "d", "e"]  # 0.875, 0.75, 0
    assert order(grades, top=3, weight=0.9) == ["b", "a", "c", "d", "e"]  # 0.775, 0.95, 0


def test_copies_go_on_tying():
    run = {"q": {"a": 2.0, "twin": 2.0, "b": 1.0}}
    found = reorder(run, {"q": {"a": 3.0, "twin": 3.0, "b": 3.0}}, top=3, weight=1.0)["q"]
    assert found["a"] == found["twin"] > found["b"]


@pytest.mark.parametrize("grade", [5.0, None])  # also where judging failed
def test_copies_tie_where_the_cut_would_part_them(grade):
    run = {"q": {"a": 3.0, "b": 2.0, "other": 2.0, "twin": 2.0, "c": 1.0}}
    grades = {"q": {"a": 1.0, "b": grade, "twin": grade, "c": 5.0}}  # c: of another text's copy
    found = reorder(run, grades, top=2, weight=1.0)["q"]
    assert found["b"] == found["twin"]
    assert found["b"] > found["a"] or grade is None
    assert min(found["a"], found["b"]) > found["other"] > found["c"]


def test_trec_eval_sees_the_retriever_s_order_among_equal_grades():
    # By the grade alone trec_eval would put "b" first, for it takes the larger id.
    found = reorder(RUN, {"q": dict.fromkeys("abcde", 4.0)}, top=5, weight=1.0)
    assert evaluate_run(found, {"q": {"a": 1}}).mean["recip_rank"] == 1.0


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=2), st.floats(-5, 5, width=32)),
    st.integers(1, 8),
    st.sampled_from([0.0, 0.3, 1.0]),
    st.randoms(use_true_random=False),
)
def test_a_permutation_whose_scores_trec_eval_can_tell_apart(scores, top, weight, rng):
    ranked = sorted(scores, key=lambda doc_id: -scores[doc_id])
    grades = {doc_id: float(rng.randint(1, 5)) for doc_id in ranked[:top] if rng.random() < 0.8}
    found = reorder({"q": scores}, {"q": grades}, top=top, weight=weight)["q"]
    assert sorted(found) == sorted(scores)
    assert set(list(found)[:top]) == set(ranked[:top]) and list(found)[top:] == ranked[top:]
    values = np.array(list(found.values()), dtype=np.float32)
    assert (np.diff(values) <= 0).all()
    for one, other in zip(list(found), list(found)[1:], strict=False):
        if found[one] == found[other]:
            assert scores[one] == scores[other]


def test_an_empty_run_stays_empty():
    assert reorder({"q": {}}, {}, top=5, weight=0.5) == {"q": {}}
    assert reorder({}, {}, top=5, weight=0.5) == {}


@pytest.mark.parametrize("top", [1, 5, 50])
def test_nothing_below_the_top_rises(top):
    grades = {"e": 5.0} | dict.fromkeys("abcd", 1.0)
    found = order({k: v for k, v in grades.items() if k in "abcde"[:top]}, top=top, weight=1.0)
    assert (found[0] == "e") == (top >= 5)
