import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed import tasks
from reasonembed.config import AnnotateConfig, CascadeConfig, EngineRuntime, LLMConfig
from reasonembed.errors import SchemaError
from reasonembed.llm.protocol import Completion, failure
from reasonembed.llm.scripted import FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED, ScriptedEngine
from reasonembed.remixer.annotate import (
    GRADES,
    PAIRS,
    Annotator,
    JudgedQuery,
    plan_pairs,
    query_blocks,
    written_score,
)
from reasonembed.schemas import CANDIDATES, JUDGMENTS, from_rows, row_seed
from tests.remixer.fakes import LLM, FakeEngine, corpus_store, fails, says

WRITTEN = AnnotateConfig(llm=LLM, tries=1)
EXPECTED = AnnotateConfig(llm=LLM, label_from="expected")
CASCADE = AnnotateConfig(llm=LLM, cascade=CascadeConfig(min_confidence=0.9, checked_share=0.0))
QUERIES = {"q1": JudgedQuery("why does it $stall", "generic"), "q2": JudgedQuery("how", "biology")}
TEXTS = {"d1": "first document text", "d2": "second document text"}
PROBABILITIES = dict(zip(GRADES, (0.1, 0.1, 0.2, 0.5, 0.1), strict=True))


def pairs(*keys):
    rows = [{"query_id": query_id, "doc_id": doc_id} for query_id, doc_id in keys]
    return from_rows(rows, PAIRS, where="test")


def judge(engine, *keys, config=WRITTEN, texts=TEXTS):
    annotator = Annotator(
        config, engine=engine, corpus=corpus_store(texts), queries=QUERIES, tasks=tasks.TASKS
    )
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
    assert row["votes"] == ([] if label is None else [label])
    assert (row["route"], row["quick_label"], row["tries"]) == ("full", None, 1)
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
    assert (row["status"], row["votes"], row["tries"]) == ("ok", [4], 1)
    assert (row["prompt_tokens"], row["completion_tokens"]) == (110, 10)  # of both questions
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
    annotator = Annotator(
        config, engine=engine, corpus=corpus_store(texts), queries=QUERIES, tasks=tasks.TASKS
    )
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
            "origins": [[{"retriever": "miner", "rank": i + 1}] for i in range(len(doc_ids))],
            "doc_ids": doc_ids,
            "scores": [0.0] * len(doc_ids),
            "num_excluded": 1,
            "source_rank": 1,
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


def in_turn(*texts, finish_reason="stop"):
    """An engine that says these one after the other, then the last one for ever."""
    left = list(texts)
    return FakeEngine(
        lambda _: Completion(left.pop(0) if len(left) > 1 else left[0], finish_reason, 10, 3)
    )


def score(grade):
    return f"{grade} it is. <score>{grade}</score>"


def test_an_answer_without_a_score_is_asked_for_again_and_the_others_are_not():
    engine = FakeEngine(
        lambda request: Completion(
            "no score" if "second" in request.prompt and len(engine.requests) < 4 else score(2),
            "stop",
            10,
            3,
        )
    )
    config = AnnotateConfig(llm=LLM, tries=3)
    first, second = judge(engine, ("q1", "d1"), ("q1", "d2"), config=config)
    asked = [request.seed for request in engine.requests]
    seed = row_seed(42, "q1", "d2")
    again = [row_seed(seed, "again", n) for n in (1, 2)]
    assert asked == [row_seed(42, "q1", "d1"), seed, *again]
    assert (first["tries"], first["prompt_tokens"], first["seed"]) == (1, 10, asked[0])
    assert (second["status"], second["relevance_label"]) == ("ok", 2)
    assert (second["tries"], second["completion_tokens"]) == (3, 9)  # of all that was asked for
    assert second["seed"] == again[-1]  # of the answer that is kept


def test_tries_are_bounded_and_the_row_says_why():
    engine = says("no score")
    (row,) = judge(engine, config=AnnotateConfig(llm=LLM, tries=3))
    assert (row["status"], row["tries"], len(engine.requests)) == ("invalid", 3, 3)
    assert row["analysis"] == "no score"
    assert len({request.seed for request in engine.requests}) == 3


def test_the_label_is_the_lower_median_of_the_votes_and_the_analysis_one_that_voted_so():
    engine = in_turn(*[score(grade) for grade in (5, 2, 4, 2, 4)])
    (row,) = judge(engine, config=WRITTEN.model_copy(update={"samples": 5}))
    assert (row["relevance_label"], row["votes"]) == (4, [5, 2, 4, 2, 4])
    assert row["analysis"] == score(4)
    assert row["confidence"] == pytest.approx(2 / 5)
    assert (row["tries"], row["prompt_tokens"], row["completion_tokens"]) == (5, 50, 15)
    assert row["seed"] == engine.requests[2].seed
    even = in_turn(*[score(grade) for grade in (5, 2, 3, 4)])
    (row,) = judge(even, config=WRITTEN.model_copy(update={"samples": 4}))
    assert row["relevance_label"] == 3  # of 3 and 4 in the middle the lower


def test_samples_have_seeds_of_their_own_and_the_first_is_that_of_one_sample():
    engine = says(score(1))
    judge(engine, ("q1", "d1"), ("q2", "d1"), config=WRITTEN.model_copy(update={"samples": 3}))
    seeds = [request.seed for request in engine.requests]
    assert len(set(seeds)) == 6
    assert (seeds[0], seeds[3]) == (row_seed(42, "q1", "d1"), row_seed(42, "q2", "d1"))
    prompts = [request.prompt for request in engine.requests]
    assert prompts[0] == prompts[1] == prompts[2] != prompts[3]  # side by side


def test_votes_leave_out_analyses_that_cannot_be_used():
    engine = in_turn("nothing", score(3), "nothing", score(5))
    (row,) = judge(engine, config=WRITTEN.model_copy(update={"samples": 4}))
    assert (row["status"], row["votes"], row["relevance_label"]) == ("ok", [3, 5], 3)
    assert row["confidence"] == pytest.approx(0.5)
    (row,) = judge(says("nothing"), config=WRITTEN.model_copy(update={"samples": 2}))
    assert (row["status"], row["votes"], row["confidence"]) == ("invalid", [], None)


def test_several_expected_labels_are_averaged():
    sure = dict(zip(GRADES, (0.0, 0.0, 0.0, 0.2, 0.8), strict=True))
    replies = [PROBABILITIES, sure, sure]
    engine = FakeEngine(
        lambda request: (
            Completion("5", "length", 60, 1, replies.pop(0))
            if request.choices
            else Completion("Because.", "stop", 50, 9)
        )
    )
    (row,) = judge(engine, config=EXPECTED.model_copy(update={"samples": 3}))
    assert row["expected_label"] == pytest.approx((3.4 + 4.8 + 4.8) / 3)
    assert (row["relevance_label"], row["votes"]) == (5, [4, 5, 5])
    assert row["confidence"] == pytest.approx((0.1 + 0.8 + 0.8) / 3)  # mean probability of a 5


def quick_engine(probabilities, analysis=None):
    """Answers the first pass by text of the document, and every analysis alike."""

    def answer(request):
        if request.prefill == "<score>":
            grades = next(p for text, p in probabilities.items() if text in request.prompt)
            return Completion("", "length", 100, 1, dict(zip(GRADES, grades, strict=True)))
        return Completion(analysis or score(3), "stop", 101, 40)

    return FakeEngine(answer)


SURE, UNSURE = (0.0, 0.95, 0.05, 0.0, 0.0), (0.0, 0.5, 0.5, 0.0, 0.0)


def test_a_cascade_analyses_only_what_its_first_pass_is_unsure_of():
    engine = quick_engine({"first": SURE, "second": UNSURE})
    sure, unsure = judge(engine, ("q1", "d1"), ("q1", "d2"), config=CASCADE)
    assert (sure["route"], sure["status"], sure["relevance_label"]) == ("quick", "ok", 2)
    assert sure["expected_label"] == sure["quick_label"] == pytest.approx(2.05)
    assert sure["confidence"] == pytest.approx(0.95)
    assert (sure["analysis"], sure["votes"], sure["tries"]) == (None, [], 1)
    assert (sure["prompt_tokens"], sure["completion_tokens"]) == (100, 1)
    assert (unsure["route"], unsure["relevance_label"], unsure["votes"]) == ("full", 3, [3])
    assert unsure["quick_label"] == pytest.approx(2.5)
    assert unsure["expected_label"] is None  # nobody asked for it after the analysis
    assert unsure["analysis"] == score(3)
    assert (unsure["prompt_tokens"], unsure["completion_tokens"]) == (201, 41)  # of both passes
    quick, _, full = engine.requests
    assert quick.choices == GRADES
    assert (full.choices, full.prefill) == ((), "")


def test_a_checked_share_of_the_sure_pairs_is_analysed_too():
    texts = {f"d{i}": f"first {i}" for i in range(200)}
    keys = [("q1", doc_id) for doc_id in texts]

    def routes(share, docs=keys):
        cascade = CascadeConfig(min_confidence=0.9, checked_share=share)
        config = CASCADE.model_copy(update={"cascade": cascade})
        rows = judge(quick_engine({"first": SURE}), *docs, config=config, texts=texts)
        assert {row["relevance_label"] for row in rows if row["route"] == "checked"} <= {3}
        return {row["doc_id"]: row["route"] for row in rows}

    some = routes(0.3)
    assert set(some.values()) == {"quick", "checked"}
    assert 30 <= list(some.values()).count("checked") <= 90  # 60 expected, 4.6 standard deviations
    assert routes(0.3, keys[100:]).items() <= some.items()  # whatever else is judged with it
    assert set(routes(0.0).values()) == {"quick"}
    assert set(routes(1.0).values()) == {"checked"}


def test_a_first_pass_that_fails_is_followed_by_an_analysis():
    engine = FakeEngine(
        lambda request: (
            failure("no grades here") if request.choices else Completion(score(4), "stop")
        )
    )
    (row,) = judge(engine, config=CASCADE)
    assert (row["route"], row["relevance_label"], row["quick_label"]) == ("full", 4, None)


def test_a_cascade_goes_with_expected_labels_and_samples():
    config = CASCADE.model_copy(update={"label_from": "expected", "samples": 2})
    engine = FakeEngine(
        lambda request: (
            Completion("", "length", 1, 1, dict(zip(GRADES, UNSURE, strict=True)))
            if request.choices
            else Completion("Because.", "stop", 1, 1)
        )
    )
    (row,) = judge(engine, config=config)
    assert (row["route"], row["votes"]) == ("full", [2, 2])
    assert row["expected_label"] == row["quick_label"] == pytest.approx(2.5)
    assert (row["tries"], row["prompt_tokens"]) == (
        2,
        5,
    )  # two analyses, grades after each, once first


def test_cached_tokens_are_added_up():
    engine = FakeEngine(
        lambda request: (
            Completion("4", "length", 60, 1, PROBABILITIES, cached_tokens=48)
            if request.choices
            else Completion("Because.", "stop", 50, 9, cached_tokens=16)
        )
    )
    (row,) = judge(engine, config=EXPECTED)
    assert (row["prompt_tokens"], row["cached_tokens"]) == (110, 64)


@given(st.lists(st.integers(1, 7), max_size=12), st.integers(1, 9))
def test_blocks_cut_a_query_only_where_it_has_no_room(sizes, rows):
    table = pairs(*[(f"q{i}", f"d{k}") for i, size in enumerate(sizes) for k in range(size)])
    blocks = query_blocks(table, rows)
    assert pa.concat_tables(blocks) == table
    assert all(block.num_rows <= rows for block in blocks)
    for i, size in enumerate(sizes):
        parts = sum(f"q{i}" in block.column("query_id").to_pylist() for block in blocks)
        assert parts == -(-size // rows)
    if table.num_rows:
        assert all(block.num_rows for block in blocks)
