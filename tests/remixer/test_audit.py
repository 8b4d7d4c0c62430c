import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.evaluation.datasets import Collection
from reasonembed.remixer.audit import NEGATIVES_PER_QUERY, Agreement, agreement, plan_audit
from reasonembed.schemas import JUDGMENTS, from_rows
from tests.remixer.fakes import corpus_store


def collection(num_queries=3, *, gold=("gold", "gold2"), excluded=()):
    names = [f"q{i}" for i in range(num_queries)]
    return Collection(
        name="test",
        queries=dict.fromkeys(names, "text"),
        qrels={name: dict.fromkeys(gold, 1) for name in names},
        excluded=dict.fromkeys(names, frozenset(excluded)),
        task="generic",
        instruction="Find.",
        corpus_source=None,
    )


def judgments(labels, *, column="relevance_label"):
    """Rows from {query: {doc: label or None}}; a label `error` is a failed row."""
    rows = []
    for query_id, documents in labels.items():
        for doc_id, label in documents.items():
            failed = label == "error"
            row = {
                "query_id": query_id,
                "doc_id": doc_id,
                "relevance_label": None,
                "expected_label": None,
                "confidence": None,
                "analysis": None,
                "votes": [],
                "quick_label": None,
                "route": "full",
                "status": "error" if failed else "ok",
                "detail": None,
                "finish_reason": None,
                "prompt_tokens": 0,
                "cached_tokens": 0,
                "completion_tokens": 0,
                "tries": 1,
                "seed": 0,
                "model": "m",
            }
            rows.append(row | ({} if failed else {column: label}))
    return from_rows(rows, JUDGMENTS, where="test")


def brute_force(labels):
    """Every query by itself: the expected result of a random order among equals."""
    auc, top1, chance, pairs = [], [], [], 0
    for documents in labels.values():
        gold = [label for doc, label in documents.items() if doc == "gold" and label is not None]
        other = [label for doc, label in documents.items() if doc != "gold" and label is not None]
        if not gold or not other:
            continue
        auc.append(
            np.mean([1.0 if gold[0] > one else 0.5 if gold[0] == one else 0.0 for one in other])
        )
        firsts = [  # over all orders of the documents, is the gold one first after a stable sort?
            max(order, key=lambda item: item[0])[1]
            for order in itertools.permutations([(gold[0], True), *((one, False) for one in other)])
        ]
        top1.append(np.mean(firsts))
        chance.append(1 / (1 + len(other)))
        pairs += 1 + len(other)
    if not auc:
        return None
    return Agreement(pairs, np.mean(auc), np.mean(top1), np.mean(chance))


labels = st.dictionaries(
    st.sampled_from(["q0", "q1", "q2"]),
    st.dictionaries(
        st.sampled_from(["gold", "a", "b", "c"]), st.none() | st.integers(1, 5), max_size=4
    ),
)


@given(labels)
def test_agreement_is_that_of_a_slow_count(given_labels):
    found = agreement(judgments(given_labels), collection(), column="relevance_label")
    expected = brute_force(given_labels)
    if expected is None:
        assert found is None
        return
    assert found.num_pairs == expected.num_pairs
    assert found.auc == pytest.approx(expected.auc)
    assert found.top1 == pytest.approx(expected.top1)
    assert found.chance_top1 == pytest.approx(expected.chance_top1)


def test_an_annotator_that_always_says_the_same_is_at_chance():
    same = {f"q{i}": dict.fromkeys(("gold", "a", "b", "c"), 3) for i in range(3)}
    found = agreement(judgments(same), collection(), column="relevance_label")
    assert found == Agreement(num_pairs=12, auc=0.5, top1=0.25, chance_top1=0.25)


def test_a_perfect_and_a_perverse_annotator():
    perfect = {"q0": {"gold": 5, "a": 1, "b": 2}}
    found = agreement(judgments(perfect), collection(), column="relevance_label")
    assert (found.auc, found.top1) == (1.0, 1.0)
    perverse = {"q0": {"gold": 1, "a": 5, "b": 2}}
    found = agreement(judgments(perverse), collection(), column="relevance_label")
    assert (found.auc, found.top1) == (0.0, 0.0)


def test_expected_labels_are_read_from_their_own_column():
    table = judgments({"q0": {"gold": 2.5, "a": 2.25}}, column="expected_label")
    assert agreement(table, collection(), column="expected_label").auc == 1.0
    assert agreement(table, collection(), column="relevance_label") is None


def test_failed_rows_do_not_count():
    table = judgments({"q0": {"gold": 4, "a": "error", "b": 3}, "q1": {"gold": "error", "a": 3}})
    assert agreement(table, collection(), column="relevance_label").num_pairs == 2


def plan(doc_ids, *, num_queries=2, corpus=None, seed=0, **parts):
    source = collection(**parts)
    rng = np.random.default_rng(0)
    queries_QD = rng.standard_normal((len(source.queries), 4)).astype(np.float32)
    vectors_ND = rng.standard_normal((len(doc_ids), 4)).astype(np.float32)
    pairs = plan_audit(
        source,
        list(source.queries),
        queries_QD,
        doc_ids,
        vectors_ND,
        num_queries=num_queries,
        seed=seed,
        corpus=corpus,
    )
    planned = {}
    for row in pairs.to_pylist():
        planned.setdefault(row["query_id"], []).append(row["doc_id"])
    return planned, queries_QD, vectors_ND


def test_one_gold_document_and_the_nearest_others():
    doc_ids = ["gold2", "x", "gold", "a", "b", "c", "d"]
    planned, queries_QD, vectors_ND = plan(doc_ids, num_queries=3, excluded=["x"])
    assert len(planned) == 3
    for query_id, documents in planned.items():
        scores = vectors_ND @ queries_QD[int(query_id[1:])]
        by_score = sorted(range(len(doc_ids)), key=lambda row: -scores[row])
        best = [doc_ids[row] for row in by_score if doc_ids[row] in "abcd"]
        assert documents == ["gold", *best[:NEGATIVES_PER_QUERY]]


def test_queries_are_chosen_by_seed_alone():
    doc_ids = ["gold", "gold2", "a", "b"]
    first = plan(doc_ids, num_queries=5, seed=1, **{})[0]
    assert set(first) == {"q0", "q1", "q2"}  # no more than there are
    ten = [set(plan(doc_ids, num_queries=1)[0]) for _ in range(2)]
    assert ten[0] == ten[1]
    chosen = {tuple(plan(doc_ids, num_queries=1, seed=seed)[0]) for seed in range(10)}
    assert len(chosen) > 1


def test_a_duplicate_of_gold_is_no_negative():
    # The searched documents stand for their duplicates, and `gold` itself is not among them.
    corpus = corpus_store(
        {"twin": "answer", "gold": "answer", "gold2": "answer 2", "a": "1", "b": "2", "c": "3"}
    )
    planned, _, _ = plan(["twin", "gold2", "a", "b", "c"], corpus=corpus)
    for documents in planned.values():
        assert documents[0] == "gold"
        assert sorted(documents[1:]) == ["a", "b", "c"]
