import pytest

from reasonembed.config import EngineRuntime, GenerateConfig, LLMConfig
from reasonembed.llm.protocol import Completion, failure
from reasonembed.llm.scripted import (
    FAIL_ERROR,
    FAIL_INVALID,
    FAIL_TRUNCATED,
    ScriptedEngine,
)
from reasonembed.remixer.generate import (
    QueryGenerator,
    copied_share,
    looping_share,
    points_at_source,
)
from reasonembed.schemas import QUERIES, SEEDS, from_rows, row_seed
from reasonembed.tasks import RELATIONS, TASKS
from tests.remixer.fakes import LLM, FakeEngine, corpus_store, fails, says

DOCUMENT = "one two three four five six seven eight nine ten eleven twelve"
CONFIG = GenerateConfig(llm=LLM, max_copied_share=0.4, max_query_chars=200)


def generator(engine, texts, config=CONFIG):
    return QueryGenerator(config, engine=engine, corpus=corpus_store(texts), tasks=TASKS)


def seeds(*doc_ids, task="generic"):
    rows = [
        {
            "query_id": f"q-{doc_id}",
            "source_doc_id": doc_id,
            "task": task,
            "min_words": 20,
            "max_words": 90,
            "education_level": "college",
            "seed": 7 + i,
        }
        for i, doc_id in enumerate(doc_ids)
    ]
    return from_rows(rows, SEEDS, where="test")


def generate(engine, *, document=DOCUMENT, task="generic", **changes):
    config = CONFIG.model_copy(update=changes)
    table = generator(engine, {"d": document}, config)(seeds("d", task=task))
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
        "cached_tokens": 0,
        "completion_tokens": 6,
        "tries": 1,
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
        (says("w" * 201), "invalid", "runs on: 201 characters, limit 200"),
        (says("Why " + "oh why " * 20), "invalid", "runs on: 100% of its words are repetitions"),
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


def test_an_answer_that_cannot_be_used_is_asked_for_again_with_another_seed():
    texts = {"fine": "a", "mended": "b", "lost": "c", "broken": "d"}
    first = {
        "q-fine": Completion("Why?", "stop", 10, 2),
        "q-mended": Completion("What does the passage say?", "stop", 10, 5),
        "q-lost": Completion("Why does", "length", 10, 64),
        "q-broken": failure("no route"),
    }
    second = {
        "q-mended": Completion("Why does it fly?", "stop", 10, 4),
        "q-lost": Completion("  ", "stop", 10, 1),
    }

    def answer(request):
        is_first = request.seed in range(7, 11)
        return (first if is_first else second)[request.request_id]

    engine = FakeEngine(answer)
    table = generator(engine, texts)(seeds(*texts))
    assert table.column("query").to_pylist() == ["Why?", "Why does it fly?", None, None]
    assert table.column("status").to_pylist() == ["ok", "ok", "invalid", "error"]
    assert table.column("tries").to_pylist() == [1, 2, 2, 1]
    assert table.column("seed").to_pylist() == [
        7,
        row_seed(8, "again", 1),
        row_seed(9, "again", 1),
        10,
    ]
    assert table.column("prompt_tokens").to_pylist() == [10, 20, 20, 0]
    assert table.column("completion_tokens").to_pylist() == [2, 9, 65, 0]
    assert [one.request_id for one in engine.requests[4:]] == ["q-mended", "q-lost"]


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
    table = generator(engine, texts, config)(seeds(*texts))
    assert table.schema == QUERIES
    assert table.column("query_id").to_pylist() == [f"q-{doc_id}" for doc_id in texts]
    assert table.column("status").to_pylist() == ["ok", "error", "truncated", "invalid"]


def test_a_bad_row_leaves_its_neighbours_alone():
    engine = FakeEngine(
        lambda request: failure("boom") if "bad" in request.prompt else Completion("Why?", "stop")
    )
    stage = generator(engine, {"a": "good one", "b": "bad one", "c": "good 2"})
    assert stage(seeds("a", "b", "c")).column("query").to_pylist() == ["Why?", None, "Why?"]


def test_no_rows_in_no_rows_out():
    assert generator(fails(), {})(seeds()).num_rows == 0


@pytest.mark.parametrize("task", ["biology", "leetcode", "pony", "aops", "theoremqa_theorems"])
def test_the_prompt_tells_what_ties_query_and_document(task):
    engine = says("Why?")
    generate(engine, task=task)
    (request,) = engine.requests
    told = [relation for relation, text in RELATIONS.items() if text in request.prompt]
    assert told == [TASKS[task].relation]
    assert TASKS[task].query_kind in request.prompt
    assert TASKS[task].document_kind in request.prompt


POINTING = (
    "What does the passage say?",
    "Given the Following  Text, why?",
    "Based on the document, which of the two is faster?",
    "According to the article, why do moths fly to light?",
    "Why is that so, as described in the text?",
    "How does the method discussed in this article work?",
    "What is the main idea of the text?",
    "In this document, why is a lock needed?",
    "Using the provided document, explain the lock.",
    "Explain the snippet above.",
    "What would the above excerpt imply for a farmer?",
    "How does this passage relate to photosynthesis?",
    "The text explains a lock, but why is it needed?",
    "Why, as mentioned above, do moths fly in circles?",
    "I want to solve the problem given in the passage.",
    "Does the article state who found it?",
    "Read this passage. Why?",
    "Can the theorem in the given text be used here?",
    "What do the passages describe?",
    "Who is the author of this article?",
    "Why does the provided code snippet work?",
)
NATURAL = (
    "How do I number the pages of this document I am writing?",
    "I found an article on moths. The article says they steer by the moon. Is that so?",
    "My document has two columns. How do I make the document print on one page?",
    "How do I centre the text in a box?",
    "Why does the text field lose its focus when I press Enter?",
    "Which method of the document object adds a node?",
    "Given a text and a pattern, return every place where the pattern occurs.",
    "I have the following text:\nfoo bar\nHow do I count its words?",
    "How do I change the text of a label?",
    "Does the passage of time make the metal weaker?",
    "What widens the passage between the two chambers?",
    "The passage from north to south is closed; which winds would open it?",
    "According to the documentation it should close, but it stays open.",
    "As I mentioned above, the loop never ends.",
    "The article I read says that it is safe. Is it?",
    "The text that my program prints is garbled.",
    "How do I read the document given by the user?",
    "Where is the context of a task kept?",
    "Is there a constitutional article on this?",
    "I wrote a snippet to sort names, and the snippet above a certain length fails.",
)


@pytest.mark.parametrize("query", POINTING)
def test_what_speaks_of_a_text_that_only_its_writer_has_seen(query):
    assert points_at_source(query)


@pytest.mark.parametrize("query", NATURAL)
def test_natural_uses_of_the_same_words_are_left_alone(query):
    assert not points_at_source(query)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I cannot help with that.",
        "Sorry, I can't create such a post.",
        "As an AI language model, I do not have questions.",
        "I am unable to assist with this.",
        "I cannot comply.",
    ],
)
def test_refusals(text):
    assert generate(says(text))["detail"] == "the model refused"


@pytest.mark.parametrize(
    "text",
    [
        "Sorry, I am new to this: why does it stall?",
        "I'm sorry if this is basic, but why does it stall?",
        "I can't help but wonder why it stalls.",
        "I cannot create a folder; why?",
        "As an AI researcher, I wonder why it stalls.",
        "I am unable to start it. Why?",
    ],
)
def test_people_who_are_sorry_or_unable_do_not_refuse(text):
    assert generate(says(text))["status"] == "ok"


PROSE = (
    "I keep bees on a roof in a city where summers are hot, and last week one colony hung outside "
    "its box for three evenings while another, two metres away, stayed in. Both have the same age "
    "and the same queen line. What decides whether bees hang outside, and should I do something?"
)


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        (PROSE, 0, 0),
        ("", 0, 0),
        ("why " * 6, 0, 0),  # too short to be three times the same
        ("help me " * 30, 1, 1),
        (PROSE + " and why does it" * 20, 0.5, 0.7),
        (" ".join([PROSE] * 4), 1, 1),  # a loop as long as the text
        (f"{PROSE} {PROSE}", 0, 0),  # said twice is said, not looped
        (" ".join(f"Road {i} leads from town {i} to town {i + 1}." for i in range(9)), 0, 0),
        (" and so it goes on ".join(["I keep bees on a roof."] * 2 + [PROSE] * 2), 0, 0),
    ],
)
def test_looping_share(text, low, high):
    assert low <= looping_share(text) <= high


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
