import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.config import AssembleConfig
from reasonembed.corpus import text_hash
from reasonembed.remixer.assemble import assemble_samples
from reasonembed.schemas import JUDGMENTS, QUERIES, REWRITES, SAMPLES, from_rows
from tests.remixer.fakes import corpus_store

DOCS = {f"d{i}": f"text {i}" for i in range(6)}
LLM_FIELDS = {
    "detail": None,
    "finish_reason": "stop",
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "seed": 0,
    "model": "m",
}
THRESHOLD = AssembleConfig()
RANK = AssembleConfig(rule="rank", rank_positives=1, rank_negatives=2)


def query(query_id, status="ok"):
    return {
        "query_id": query_id,
        "query": f"text of {query_id}" if status == "ok" else None,
        "source_doc_id": "d0",
        "task": "generic",
        "status": status,
        **LLM_FIELDS,
    }


def judgment(query_id, doc_id, label, *, expected=None, status="ok"):
    return {
        "query_id": query_id,
        "doc_id": doc_id,
        "relevance_label": label,
        "expected_label": expected,
        "confidence": None,
        "analysis": None,
        "status": status,
        **LLM_FIELDS,
    }


def rewrite(query_id, status="ok"):
    text = f"rewrite of {query_id}" if status == "ok" else None
    return {"query_id": query_id, "rewritten_query": text, "status": status, **LLM_FIELDS}


def assemble(queries, judgments, rewrites, config=THRESHOLD):
    return assemble_samples(
        from_rows(queries, QUERIES, where="test"),
        from_rows(judgments, JUDGMENTS, where="test"),
        from_rows(rewrites, REWRITES, where="test"),
        corpus=corpus_store(DOCS),
        config=config,
        instructions={"generic": "Find."},
    )


def ids(labelled):
    return [one["doc_id"] for one in labelled]


def test_a_sample_holds_everything_that_training_needs():
    assembly = assemble(
        [query("q")], [judgment("q", "d1", 4), judgment("q", "d2", 1)], [rewrite("q")]
    )
    assert assembly.samples.schema == SAMPLES
    assert assembly.samples.to_pylist() == [
        {
            "query_id": "q",
            "task": "generic",
            "instruction": "Find.",
            "query": "text of q",
            "rewritten_query": "rewrite of q",
            "positives": [
                {"doc_id": "d1", "text": "text 1", "label": 4.0, "text_hash": text_hash("text 1")}
            ],
            "negatives": [
                {"doc_id": "d2", "text": "text 2", "label": 1.0, "text_hash": text_hash("text 2")}
            ],
            "source_doc_id": "d0",
        }
    ]


@pytest.mark.parametrize(
    ("config", "positives", "negatives"),
    [
        (THRESHOLD, ["d3", "d4", "d5"], ["d1", "d2"]),
        (AssembleConfig(positive_min=5, negative_max=1), ["d5"], ["d1"]),
    ],
)
def test_threshold_splits_at_its_bounds(config, positives, negatives):
    judgments = [judgment("q", f"d{label}", label) for label in range(1, 6)]
    (sample,) = assemble([query("q")], judgments, [rewrite("q")], config).samples.to_pylist()
    assert (ids(sample["positives"]), ids(sample["negatives"])) == (positives, negatives)


def test_rank_takes_the_best_and_the_worst_by_expected_label():
    judgments = [
        judgment("q", f"d{i}", 3, expected=expected)
        for i, expected in enumerate([2.5, 3.5, 1.5, 3.5, 2.0])
    ]
    (sample,) = assemble([query("q")], judgments, [rewrite("q")], RANK).samples.to_pylist()
    assert ids(sample["positives"]) == ["d1"]  # ties: the smaller id
    assert ids(sample["negatives"]) == ["d4", "d2"]
    assert [one["label"] for one in sample["negatives"]] == [2.0, 1.5]


@pytest.mark.parametrize(("count", "fate"), [(0, "no positive"), (1, "no negative")])
def test_rank_never_uses_a_document_on_both_sides(count, fate):
    judgments = [judgment("q", f"d{i}", 3, expected=3.0) for i in range(count)]
    assert assemble([query("q")], judgments, [rewrite("q")], RANK).funnel[fate] == 1


@pytest.mark.parametrize("config", [THRESHOLD, RANK])
def test_judgments_without_a_label_or_that_failed_do_not_count(config):
    judgments = [
        judgment("q", "d1", 5, expected=4.0),
        judgment("q", "d2", 1, expected=2.0),
        judgment("q", "d3", None),
        judgment("q", "d4", 5, expected=5.0, status="truncated"),
        judgment("q", "d5", 1, expected=1.0, status="error"),
    ]
    (sample,) = assemble([query("q")], judgments, [rewrite("q")], config).samples.to_pylist()
    assert (ids(sample["positives"]), ids(sample["negatives"])) == (["d1"], ["d2"])


def test_each_query_has_one_fate():
    queries = [
        query("failed", "truncated"),
        query("no-rewrite"),
        query("bad-rewrite"),
        query("all-bad"),
        query("all-good"),
        query("unjudged"),
        query("fine"),
    ]
    judgments = [
        *[
            judgment(q, "d1", 5)
            for q in ("failed", "no-rewrite", "bad-rewrite", "all-good", "fine")
        ],
        *[judgment(q, "d2", 1) for q in ("failed", "no-rewrite", "bad-rewrite", "all-bad", "fine")],
        judgment("not-a-query", "d1", 5),
    ]
    rewrites = [rewrite(q) for q in ("failed", "all-bad", "all-good", "unjudged", "fine")]
    rewrites.append(rewrite("bad-rewrite", "error"))
    assembly = assemble(queries, judgments, rewrites)
    assert assembly.funnel == {
        "no usable query": 1,
        "no usable rewrite": 2,
        "no positive": 2,
        "no negative": 1,
        "sample": 1,
    }
    assert assembly.samples.column("query_id").to_pylist() == ["fine"]


statuses = st.sampled_from(["ok", "error", "truncated"])
judgments_of_queries = st.dictionaries(
    st.tuples(st.integers(0, 4), st.integers(0, 5)),
    st.tuples(st.none() | st.integers(1, 5), st.none() | st.floats(1, 5, width=32), statuses),
    max_size=15,
)


@given(
    st.lists(statuses, max_size=5),
    judgments_of_queries,
    st.dictionaries(st.integers(0, 4), statuses),
    st.sampled_from([THRESHOLD, RANK]),
)
def test_the_funnel_adds_up_and_no_document_stands_on_both_sides(
    queries, judged, rewritten, config
):
    assembly = assemble(
        [query(f"q{i}", status) for i, status in enumerate(queries)],
        [
            judgment(f"q{q}", f"d{d}", label, expected=expected, status=status)
            for (q, d), (label, expected, status) in judged.items()
        ],
        [rewrite(f"q{i}", status) for i, status in rewritten.items()],
        config,
    )
    assert sum(assembly.funnel.values()) == len(queries)
    assert assembly.funnel["sample"] == assembly.samples.num_rows
    for sample in assembly.samples.to_pylist():
        positives, negatives = ids(sample["positives"]), ids(sample["negatives"])
        assert positives and negatives
        assert not set(positives) & set(negatives)
        lowest = min(one["label"] for one in sample["positives"])
        if config is RANK:
            assert lowest >= max(one["label"] for one in sample["negatives"])
