import pyarrow as pa
import pytest

from reasonembed import tasks
from reasonembed.config import RewriteConfig, SamplingConfig
from reasonembed.remixer.answers import prompt_template
from reasonembed.remixer.rewrite import Rewriter
from reasonembed.schemas import REWRITES, row_seed
from tests.remixer.fakes import LLM, fails, says

CONFIG = RewriteConfig(llm=LLM, sampling=SamplingConfig(max_tokens=100))


def rewrite(engine, *, query="why does it $stall", **changes):
    table = pa.Table.from_pylist([{"query_id": "q1", "query": query, "task": "biology"}])
    result = Rewriter(CONFIG.model_copy(update=changes), engine=engine)(table)
    assert result.schema == REWRITES
    (row,) = result.to_pylist()
    return row


def test_reasoning_follows_the_query():
    row = rewrite(says("<think>hm</think>The loop waits."))
    assert row["rewritten_query"] == "why does it $stall\nThe loop waits."
    assert (row["status"], row["detail"], row["seed"]) == (
        "ok",
        None,
        row_seed(42, "q1", "rewrite"),
    )


def test_reasoning_alone_where_asked():
    row = rewrite(says("The loop waits."), keep_query=False)
    assert row["rewritten_query"] == "The loop waits."


@pytest.mark.parametrize(
    ("engine", "status", "detail"),
    [
        (fails("no route"), "error", "no route"),
        (says("  "), "invalid", "the answer is empty"),
        (says("no sentence ends", "length"), "truncated", "cut off after 3 tokens"),
        (says("<think>It is. Perhaps", "length"), "truncated", "cut off after 3 tokens"),
    ],
)
@pytest.mark.parametrize("keep_query", [True, False])
def test_what_cannot_be_used_is_null(engine, status, detail, keep_query):
    row = rewrite(engine, keep_query=keep_query)
    assert (row["rewritten_query"], row["status"], row["detail"]) == (None, status, detail)


def test_reasoning_that_was_cut_counts_up_to_its_last_sentence():
    row = rewrite(says("The loop waits. Then it", "length"))
    assert row["rewritten_query"] == "why does it $stall\nThe loop waits."
    assert (row["status"], row["detail"]) == ("ok", "cut off after 5 tokens")
    assert row["finish_reason"] == "length"


def test_the_prompt_holds_the_query_and_nothing_else_of_the_run():
    # Whatever could leak: columns beside the query are there to be ignored.
    table = pa.Table.from_pylist(
        [
            {
                "query_id": "q1",
                "query": "why does it stall",
                "task": "biology",
                "source_doc_id": "SOURCE-ID",
                "positives": ["POSITIVE TEXT"],
                "source_text": "SOURCE TEXT",
            }
        ]
    )
    engine = says("x.")
    Rewriter(CONFIG, engine=engine)(table)
    (request,) = engine.requests
    assert request.prompt == prompt_template("rewrite").substitute(
        document_kind=tasks.get("biology").document_kind,
        max_words=70,  # 0.7 words a token
        query="why does it stall",
    )
    assert request.prefill == ""


def test_a_long_query_is_cut_in_the_prompt_but_not_in_the_result():
    engine = says("x.")
    row = rewrite(engine, query="one two three", max_document_words=2)
    assert "one two" in engine.requests[0].prompt
    assert "three" not in engine.requests[0].prompt
    assert row["rewritten_query"] == "one two three\nx."


def test_rows_come_back_in_order():
    rows = [{"query_id": f"q{i}", "query": f"query {i}", "task": "generic"} for i in range(5)]
    table = Rewriter(CONFIG, engine=says("x."))(pa.Table.from_pylist(rows))
    assert table.column("query_id").to_pylist() == [f"q{i}" for i in range(5)]
    assert len(set(table.column("seed").to_pylist())) == 5
