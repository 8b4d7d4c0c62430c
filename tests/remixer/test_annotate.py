import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed import tasks
from reasonembed.config import AnnotateConfig, EngineRuntime, LLMConfig
from reasonembed.errors import SchemaError
from reasonembed.llm.protocol import Completion, failure
from reasonembed.llm.scripted import FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED, ScriptedEngine
from reasonembed.remixer.annotate import (
    GRADES,
    PAIRS,
    Annotator,
    JudgedQuery,
    plan_pairs,
    written_score,
)
from reasonembed.schemas import CANDIDATES, JUDGMENTS, from_rows, row_seed
from tests.remixer.fakes import LLM, FakeEngine, corpus_store, fails, says

WRITTEN = AnnotateConfig(llm=LLM)
EXPECTED = AnnotateConfig(llm=LLM, label_from="expected")
QUERIES = {"q1": JudgedQuery("why does it $stall", "generic"), "q2": JudgedQuery("how", "biology")}
TEXTS = {"d1": "first document text", "d2": "second document text"}
PROBABILITIES = dict(zip(GRADES, (0.1, 0.1, 0.2, 0.5, 0.1), strict=True))


def pairs(*keys):
    rows = [{"query_id": query_id, "doc_id": doc_id} for query_id, doc_id in keys]
    return from_rows(rows, PAIRS, where="test")


def judge(engine, *keys, config=WRITTEN, texts=TEXTS):
    annotator = Annotator(config, engine=engine, corpus=corpus_store(texts), queries=QUERIES)
    return annotator(pairs(*keys or [("q1", "d1")])).to_pylist()


def two_step(analysis, grades):
    """An engine whose answer to the first request and to the question for grades differ."""
    return FakeEngine(lambda request: grades if request.choices else analysis)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<score>4</score>", 4),
        ("... so <score> 5 </score> it is", 5),
        ("<score>4/5</score>", 4),
        ("<score>4 / 5</score>", 4),
        ("<SCORE>1</SCORE>", 1),
        ("<score>\n3\n</score>", 3),
        ("for example <score>2</score>, but <score>4</score>", 4),
        ("<score><score>4</score>", 4),
        ("<score>4", None),
        ("4", None),
        ("", None),
        ("<score></score>", None),
        ("<score>4.5</score>", None),
        ("<score>7</score>", None),
        ("<score>0</score>", None),
        ("<score>45</score>", None),
        ("<score>-3</score>", None),
        ("<score>four</score>", None),
        ("<score>4/10</score>", None),
        ("for example <score>2</score>, but <score>4.5</score>", None),
        ("for example <score>2</score>, but <score>7</score>", None),
    ],
)
def test_written_score(text, score):
    assert written_score(text) == score


@given(st.text(), st.integers(1, 5))
def test_whatever_stands_before_the_last_tags_does_not_count(text, grade):
    assert written_score(f"{text}<score>{grade}</score>") == grade


@given(st.text(st.sampled_from("<score>/12345. 7"), max_size=40))
def test_a_score_is_a_grade_or_none(text):
    assert written_score(text) in {None, 1, 2, 3, 4, 5}


@pytest.mark.parametrize(
    ("engine", "label", "status", "detail"),
    [
        (says("Step 1 ... <score>4</score>"), 4, "ok", None),
        (says("no tags"), None, "invalid", "no whole number from 1 to 5 inside score tags"),
        (
            says("early <score>4</score>", "length"),
            None,
            "truncated",
            "cut off after 2 tokens",
        ),
        (fails("no route"), None, "error", "no route"),
    ],
)
def test_written_labels(engine, label, status, detail):
    (row,) = judge(engine)
    assert (row["relevance_label"], row["status"], row["detail"]) == (label, status, detail)
    assert row["expected_label"] is None
    assert row["confidence"] is None
    assert len(engine.requests) == 1  # nothing further is asked


def test_the_trajectory_is_kept_as_written():
    (row,) = judge(says("Step 1.\n <score>4</score> \n"))
    assert row["analysis"] == "Step 1.\n <score>4</score> \n"
    (row,) = judge(fails())
    assert row["analysis"] is None


def test_expected_labels_are_the_mean_under_the_score_token():
    engine = two_step(
        Completion("Because. <score>2</score>", "stop", 50, 9),
        Completion("4", "length", 60, 1, PROBABILITIES),
    )
    (row,) = judge(engine, config=EXPECTED)
    # 0.1 x 1 + 0.1 x 2 + 0.2 x 3 + 0.5 x 4 + 0.1 x 5
    assert row["expected_label"] == pytest.approx(3.4)
    assert row["relevance_label"] == 4  # of the probabilities, not of what was written
    assert row["confidence"] == pytest.approx(0.5)
    assert (row["status"], row["completion_tokens"]) == ("ok", 9)
    asked = engine.requests[1]
    assert asked.choices == GRADES
    assert asked.prefill == "Because.\n<score>"
    assert asked.prompt == engine.requests[0].prompt


def test_an_analysis_that_was_cut_still_gets_its_expected_label():
    engine = two_step(
        Completion("Because it", "length", 50, 9), Completion("4", "length", 60, 1, PROBABILITIES)
    )
    (row,) = judge(engine, config=EXPECTED)
    assert (row["status"], row["relevance_label"]) == ("ok", 4)
    assert row["detail"] == "cut off after 9 tokens"
    assert engine.requests[1].prefill == "Because it\n<score>"


def test_a_failed_question_for_grades_fails_the_row_with_its_reason():
    engine = two_step(Completion("Because.", "stop"), failure("the context is full"))
    (row,) = judge(engine, config=EXPECTED)
    assert (row["status"], row["detail"]) == ("error", "the context is full")
    assert row["relevance_label"] is None
    assert row["expected_label"] is None


def test_no_grades_are_asked_of_an_analysis_that_failed():
    engine = FakeEngine(
        lambda request: (
            Completion("4", "length", 0, 1, PROBABILITIES)
            if request.choices
            else failure("boom")
            if "second" in request.prompt
            else Completion("Fine.", "stop")
        )
    )
    rows = judge(engine, ("q1", "d1"), ("q1", "d2"), ("q2", "d1"), config=EXPECTED)
    assert [row["status"] for row in rows] == ["ok", "error", "ok"]
    assert [bool(request.choices) for request in engine.requests] == [False] * 3 + [True] * 2


@given(st.lists(st.floats(0.001, 1), min_size=5, max_size=5))
def test_an_expected_label_lies_between_1_and_5(weights):
    total = sum(weights)
    grades = {grade: weight / total for grade, weight in zip(GRADES, weights, strict=True)}
    engine = two_step(Completion("x", "stop"), Completion("", "length", 0, 1, grades))
    (row,) = judge(engine, config=EXPECTED)
    assert 1 <= row["expected_label"] <= 5
    assert row["confidence"] == pytest.approx(max(grades.values()), rel=1e-6)


def test_candidates_of_a_query_share_the_prompt_up_to_the_document():
    engine = says("<score>1</score>")
    judge(engine, ("q1", "d1"), ("q1", "d2"))
    first, second = (request.prompt for request in engine.requests)
    head = first[: first.index(TEXTS["d1"])]
    assert second.startswith(head)
    task = tasks.get("generic")
    template, query = head.index(task.relevance), head.index(QUERIES["q1"].text)
    assert template < query
    assert query > len(head) * 0.8  # nothing of the template is left for behind the query


def test_requests_carry_the_pair_its_task_and_a_seed_of_its_own():
    engine = says("<score>1</score>")
    judge(
        engine,
        ("q1", "d1"),
        ("q2", "d1"),
        config=WRITTEN.model_copy(update={"max_document_words": 2}),
    )
    one, two = engine.requests
    assert (one.request_id, two.request_id) == ("q1|d1", "q2|d1")
    assert (one.seed, two.seed) == (row_seed(42, "q1", "d1"), row_seed(42, "q2", "d1"))
    assert tasks.get("biology").relevance in two.prompt
    assert "first document" in one.prompt
    assert TEXTS["d1"] not in one.prompt  # cut to two words


@pytest.mark.parametrize("label_from", ["written", "expected"])
def test_one_row_in_one_row_out_for_every_way_to_fail(label_from):
    texts = {
        "fine": "tasks keep running",
        "error": FAIL_ERROR,
        "cut": FAIL_TRUNCATED,
        "void": FAIL_INVALID,
    }
    engine = ScriptedEngine(LLMConfig(model="scripted", engine="scripted"), EngineRuntime())
    config = AnnotateConfig(llm=LLM, label_from=label_from)
    annotator = Annotator(config, engine=engine, corpus=corpus_store(texts), queries=QUERIES)
    table = annotator(pairs(*[("q1", doc_id) for doc_id in texts]))
    assert table.schema == JUDGMENTS
    assert table.column("doc_id").to_pylist() == list(texts)
    expected = {
        "written": ["ok", "error", "truncated", "invalid"],
        "expected": ["ok", "error", "ok", "ok"],  # a grade needs no finished analysis
    }
    assert table.column("status").to_pylist() == expected[label_from]


def test_plan_pairs_keeps_the_best_of_each_query_side_by_side():
    rows = [
        {
            "query_id": query_id,
            "source_doc_id": "s",
            "task": "generic",
            "retriever": "r",
            "doc_ids": doc_ids,
            "scores": [0.0] * len(doc_ids),
            "num_excluded": 1,
        }
        for query_id, doc_ids in (("q1", ["a", "b", "c"]), ("q2", ["c"]), ("q3", []))
    ]
    candidates = from_rows(rows, CANDIDATES, where="test")
    assert plan_pairs(candidates, limit=2) == pairs(("q1", "a"), ("q1", "b"), ("q2", "c"))
    assert plan_pairs(candidates.slice(0, 0), limit=2) == pairs()


def test_pairs_need_both_ids():
    with pytest.raises(SchemaError, match="doc_id"):
        from_rows([{"query_id": "q1"}], PAIRS, where="test")
    assert PAIRS.field("doc_id").type == pa.string()
