import pytest

from reasonembed.config import EngineRuntime, GenerateConfig, LLMConfig
from reasonembed.llm.protocol import Completion, failure
from reasonembed.llm.scripted import (
    FAIL_ERROR,
    FAIL_INVALID,
    FAIL_TRUNCATED,
    ScriptedEngine,
)
from reasonembed.remixer.generate import QueryGenerator, copied_share
from reasonembed.schemas import QUERIES, SEEDS, from_rows
from tests.remixer.fakes import LLM, FakeEngine, corpus_store, fails, says

DOCUMENT = "one two three four five six seven eight nine ten eleven twelve"
CONFIG = GenerateConfig(llm=LLM, max_copied_share=0.4, max_query_chars=200)


def seeds(*doc_ids):
    rows = [
        {
            "query_id": f"q-{doc_id}",
            "source_doc_id": doc_id,
            "task": "generic",
            "min_words": 20,
            "max_words": 90,
            "education_level": "college",
            "seed": 7 + i,
        }
        for i, doc_id in enumerate(doc_ids)
    ]
    return from_rows(rows, SEEDS, where="test")


def generate(engine, *, document=DOCUMENT, **changes):
    config = CONFIG.model_copy(update=changes)
    table = QueryGenerator(config, engine=engine, corpus=corpus_store({"d": document}))(seeds("d"))
    (row,) = table.to_pylist()
    return row


def test_a_good_answer_is_cleaned_and_kept():
    row = generate(says('<think>hm</think> "Why does my loop stall?"'))
    assert row == {
        "query_id": "q-d",
        "query": "Why does my loop stall?",
        "source_doc_id": "d",
        "task": "generic",
        "status": "ok",
        "detail": None,
        "finish_reason": "stop",
        "prompt_tokens": 10,
        "completion_tokens": 6,
        "seed": 7,
        "model": "fake",
    }


@pytest.mark.parametrize(
    ("engine", "status", "detail"),
    [
        (fails("no route"), "error", "no route"),
        (says("Why does it"), "ok", None),
        (says("Why does it", "length"), "truncated", "cut off after 3 tokens"),
        (says("   "), "invalid", "the answer is empty"),
        (says("<think>on and on"), "invalid", "the answer is empty"),
        (says("w" * 201), "invalid", "201 characters, limit 200"),
        (says("I'm sorry, but no."), "invalid", "the model refused"),
        (says("I can\u2019t help with that."), "invalid", "the model refused"),
        (says("As an AI I have no questions."), "invalid", "the model refused"),
        (says("I can't get my loop to stop, why?"), "ok", None),
        (says("What does the passage say?"), "filtered", "points at the source text"),
        (says("Given the Following  Text, why?"), "filtered", "points at the source text"),
        (says("Why is the context lost?"), "ok", None),
        (says(DOCUMENT), "filtered", "100% of its 8-grams are the source's"),
    ],
)
def test_each_fate(engine, status, detail):
    row = generate(engine)
    assert (row["status"], row["detail"]) == (status, detail)
    assert (row["query"] is None) == (status != "ok")


def test_a_query_that_was_cut_is_kept_to_its_last_sentence_where_asked():
    engine = says("My loop stalls. It began when", "length")
    assert generate(engine)["status"] == "truncated"
    row = generate(engine, keep_truncated=True)
    assert (row["status"], row["query"]) == ("ok", "My loop stalls.")
    assert row["detail"] == "cut off after 6 tokens"


def test_keep_truncated_does_not_keep_what_has_no_sentence_or_other_faults():
    assert generate(says("It began when", "length"), keep_truncated=True)["status"] == "invalid"
    row = generate(says("Read this passage. And", "length"), keep_truncated=True)
    assert row["status"] == "filtered"
    assert generate(fails(), keep_truncated=True)["status"] == "error"


def test_an_opening_is_asked_for_and_stands_in_the_query():
    engine = says(" stop my loop.")
    row = generate(engine, opening="I am trying to")
    assert engine.requests[0].prefill == "I am trying to"
    assert row["query"] == "I am trying to stop my loop."


def test_an_opening_alone_is_no_query():
    row = generate(says("  "), opening="I am trying to")
    assert (row["status"], row["query"]) == ("invalid", None)


def test_the_prompt_holds_the_conditions_and_the_document_up_to_its_limit():
    engine = says("Why?")
    generate(engine, document="$alpha beta gamma", max_document_words=2)
    (request,) = engine.requests
    assert "between 20 and 90 words" in request.prompt
    assert "college education" in request.prompt
    assert "$alpha beta" in request.prompt  # a dollar sign of the corpus is no placeholder
    assert "gamma" not in request.prompt
    assert (request.request_id, request.seed) == ("q-d", 7)
    assert request.sampling == CONFIG.sampling


def test_one_row_in_one_row_out_for_every_way_to_fail():
    texts = {
        "fine": "asyncio tasks keep running while others await",
        "error": f"text {FAIL_ERROR}",
        "cut": f"text {FAIL_TRUNCATED}",
        "void": f"text {FAIL_INVALID}",
    }
    engine = ScriptedEngine(LLMConfig(model="scripted", engine="scripted"), EngineRuntime())
    config = CONFIG.model_copy(update={"max_query_chars": 8_000})
    table = QueryGenerator(config, engine=engine, corpus=corpus_store(texts))(seeds(*texts))
    assert table.schema == QUERIES
    assert table.column("query_id").to_pylist() == [f"q-{doc_id}" for doc_id in texts]
    assert table.column("status").to_pylist() == ["ok", "error", "truncated", "invalid"]


def test_a_bad_row_leaves_its_neighbours_alone():
    engine = FakeEngine(
        lambda request: failure("boom") if "bad" in request.prompt else Completion("Why?", "stop")
    )
    generator = QueryGenerator(
        CONFIG, engine=engine, corpus=corpus_store({"a": "good one", "b": "bad one", "c": "good 2"})
    )
    assert generator(seeds("a", "b", "c")).column("query").to_pylist() == ["Why?", None, "Why?"]


def test_no_rows_in_no_rows_out():
    generator = QueryGenerator(CONFIG, engine=fails(), corpus=corpus_store({}))
    assert generator(seeds()).num_rows == 0


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("one two three four five six seven", 0.0),  # no 8-gram at all
        (DOCUMENT.upper().replace(" ", ", "), 1.0),  # case and punctuation do not hide a copy
        ("zero one two three four five six seven eight", 0.5),
        ("", 0.0),
    ],
)
def test_copied_share(query, expected):
    assert copied_share(query, DOCUMENT) == expected
