import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.config import LengthBucket, PlanConfig
from reasonembed.evaluation.datasets import Collection
from reasonembed.remixer.plan import held_out_documents, plan_seeds, query_id
from reasonembed.schemas import DOMAINS, SEEDS, from_rows
from tests.remixer.fakes import corpus_table

CONFIG = PlanConfig(min_chars=3, max_chars=20)

doc_ids = st.text(st.sampled_from("abcdefgh"), min_size=1, max_size=4)
corpora = st.dictionaries(doc_ids, st.sampled_from([f"text {i}" for i in range(12)]), max_size=12)


def sources(plan):
    return plan.seeds.column("source_doc_id").to_pylist()


def test_each_rule_sets_documents_aside_and_is_counted():
    texts = {
        "gold": "an answer",
        "twin-of-gold": "an answer",
        "same-but-for-blanks": "an   answer",
        "short": "ab",
        "long": "x" * 21,
        "first": "some text",
        "second": "some text",
        "one": "other text",
        "two": "more text",
    }
    plan = plan_seeds(
        corpus_table(texts), CONFIG.model_copy(update={"max_seeds_per_task": 2}), held_out={"gold"}
    )
    assert plan.funnel == {
        "held out for evaluation": 3,
        "too short": 1,
        "too long": 1,
        "exact duplicate": 1,
        "domain unknown": 0,
        "other domain": 0,
        "over the cap": 1,
    }
    assert plan.seeds.num_rows == 2
    assert set(sources(plan)) < {"first", "one", "two"}


def test_bounds_are_inclusive():
    plan = plan_seeds(corpus_table({"low": "abc", "high": "x" * 20}), CONFIG, held_out=())
    assert set(sources(plan)) == {"low", "high"}


def test_the_cap_holds_for_each_task():
    table = corpus_table({f"d{i}": f"text {i}" for i in range(8)})
    tasks = ["biology", "economics"] * 4
    table = table.set_column(table.column_names.index("task"), table.schema.field("task"), [tasks])
    plan = plan_seeds(table, CONFIG.model_copy(update={"max_seeds_per_task": 3}), held_out=())
    assert Counter(plan.seeds.column("task").to_pylist()) == {"biology": 3, "economics": 3}
    assert plan.funnel["over the cap"] == 2


def test_variants_are_rows_of_their_own():
    config = CONFIG.model_copy(update={"variants": 3})
    plan = plan_seeds(corpus_table({"d": "a text"}), config, held_out=())
    assert plan.seeds.column("query_id").to_pylist() == [query_id("d", i) for i in range(3)]
    assert len(set(plan.seeds.column("seed").to_pylist())) == 3


def test_ids_stay_what_they_are():
    # An id that changed would orphan every committed row of every run.
    assert query_id("asyncio.run", 0) == "q-6c46106c9c9123d0"


def test_an_empty_corpus_gives_an_empty_plan():
    plan = plan_seeds(corpus_table({}), CONFIG, held_out=())
    assert plan.seeds.num_rows == 0
    assert plan.seeds.schema == SEEDS


@given(corpora, st.sets(doc_ids, max_size=3), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_of_rows(texts, held_out, rng):
    config = CONFIG.model_copy(update={"max_seeds_per_task": 4})
    items = list(texts.items())
    plan = plan_seeds(corpus_table(dict(items)), config, held_out=held_out)
    rng.shuffle(items)
    assert plan_seeds(corpus_table(dict(items)), config, held_out=held_out) == plan


@given(corpora, st.sets(doc_ids, max_size=3))
def test_nothing_held_out_is_a_seed_in_any_copy_and_every_document_has_a_fate(texts, held_out):
    plan = plan_seeds(corpus_table(texts), CONFIG, held_out=held_out)
    shut_texts = {texts[doc_id] for doc_id in held_out & texts.keys()}
    assert not shut_texts & {texts[doc_id] for doc_id in sources(plan)}
    assert len({texts[doc_id] for doc_id in sources(plan)}) == plan.seeds.num_rows
    assert sum(plan.funnel.values()) + plan.seeds.num_rows == len(texts)


@given(corpora, corpora, st.sets(doc_ids, max_size=3), st.integers(1, 6))
def test_a_growing_corpus_moves_at_most_as_many_seeds_as_documents_came(texts, more, held_out, cap):
    new = {doc_id: text for doc_id, text in more.items() if doc_id not in texts}
    config = CONFIG.model_copy(update={"max_seeds_per_task": cap})
    before = set(sources(plan_seeds(corpus_table(texts), config, held_out=held_out)))
    after = set(sources(plan_seeds(corpus_table(texts | new), config, held_out=held_out)))
    assert len(before - after) <= len(new)
    assert len(after - before) <= len(new)


def domains(probabilities):
    """Rows of `domains`; a document whose probability is None is an error row."""
    rows = [
        {
            "doc_id": doc_id,
            "task": "generic",
            "probability": probability,
            "status": "error" if probability is None else "ok",
            "detail": None,
            "finish_reason": "length",
            "prompt_tokens": 1,
            "cached_tokens": 0,
            "completion_tokens": 1,
            "tries": 1,
            "seed": 0,
            "model": "m",
        }
        for doc_id, probability in probabilities.items()
    ]
    return from_rows(rows, DOMAINS, where="test")


def test_documents_of_another_domain_or_of_none_that_is_known_are_no_seeds():
    texts = {"yes": "one", "limit": "two", "no": "three", "error": "four", "unasked": "five"}
    plan = plan_seeds(
        corpus_table(texts),
        CONFIG,
        held_out=(),
        domains=domains({"yes": 0.9, "limit": 0.5, "no": 0.25, "error": None}),
        min_probability=0.5,
    )
    assert set(sources(plan)) == {"yes", "limit"}
    assert plan.funnel["other domain"] == 1
    assert plan.funnel["domain unknown"] == 2


def test_the_cap_counts_documents_of_the_domain_only():
    texts = {f"d{i}": f"text {i}" for i in range(8)}
    config = CONFIG.model_copy(update={"max_seeds_per_task": 3})
    asked = domains({f"d{i}": float(i % 2) for i in range(8)})
    plan = plan_seeds(corpus_table(texts), config, held_out=(), domains=asked, min_probability=0.5)
    assert plan.seeds.num_rows == 3
    assert plan.funnel["other domain"] == 4
    assert plan.funnel["over the cap"] == 1


def collection(*, gold, excluded):
    return Collection(
        name="test",
        queries={"q": "why"},
        qrels={"q": dict.fromkeys(gold, 1)},
        excluded={"q": frozenset(excluded)},
        task="generic",
        instruction="",
        corpus_source=None,
    )


def test_what_an_evaluation_names_and_what_is_nearly_its_gold_is_held_out():
    text = "a moth that flies to a light keeps it at one angle as it would keep the moon"
    texts = {
        "gold": text,
        "near-gold": f"{text} above",
        "excluded": text.replace("moth", "beetle and a wasp and a fly"),
        "near-excluded": text.replace("moth", "beetle and a wasp and a fly") + " above",
        "other": "something else",
    }
    named = collection(gold=["gold"], excluded=["excluded", "not-in-the-corpus"])
    corpus = corpus_table(texts)
    held_out = held_out_documents(corpus, named, CONFIG)
    assert held_out == {"gold", "near-gold", "excluded", "not-in-the-corpus"}
    strict = CONFIG.model_copy(update={"max_gold_similarity": 1.0})
    assert held_out_documents(corpus, named, strict) == held_out - {"near-gold"}


def test_a_seeds_conditions_do_not_depend_on_other_documents():
    texts = {f"d{i}": f"text {i}" for i in range(10)}
    rows = plan_seeds(corpus_table(texts), CONFIG, held_out=()).seeds.to_pylist()
    for row in random.Random(0).sample(rows, 4):
        doc_id = row["source_doc_id"]
        alone = plan_seeds(corpus_table({doc_id: texts[doc_id]}), CONFIG, held_out=())
        assert alone.seeds.to_pylist() == [row]


@settings(max_examples=5)
@given(st.integers(0, 2**31))
def test_conditions_are_drawn_by_weight(seed):
    config = CONFIG.model_copy(
        update={
            "seed": seed,
            "lengths": (
                LengthBucket(min_words=1, max_words=10, weight=1),
                LengthBucket(min_words=11, max_words=20, weight=3),
            ),
            "education_levels": {"college": 1.0, "phd": 1.0},
        }
    )
    texts = {f"d{i}": f"text {i}" for i in range(600)}
    rows = plan_seeds(corpus_table(texts), config, held_out=()).seeds.to_pylist()
    longer = sum(row["max_words"] == 20 for row in rows)
    college = sum(row["education_level"] == "college" for row in rows)
    # Six standard deviations of a binomial of 600: 64 at p = 3/4 and 74 at p = 1/2.
    assert longer == pytest.approx(450, abs=64)
    assert college == pytest.approx(300, abs=74)
