from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed import tasks
from reasonembed.config import RewriteConfig, SamplingConfig
from reasonembed.llm.protocol import Completion
from reasonembed.remixer.answers import prompt_template
from reasonembed.remixer.rewrite import Rewriter
from reasonembed.schemas import REWRITES, row_seed
from reasonembed.tasks import TASKS
from tests.remixer.fakes import LLM, FakeEngine, fails, says

CONFIG = RewriteConfig(llm=LLM, sampling=SamplingConfig(max_tokens=100))


def rewrite(engine, *, query="why does it $stall", **changes):
    table = pa.Table.from_pylist([{"query_id": "q1", "query": query, "task": "biology"}])
    result = Rewriter(CONFIG.model_copy(update=changes), engine=engine, tasks=TASKS)(table)
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
    Rewriter(CONFIG, engine=engine, tasks=TASKS)(table)
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
    table = Rewriter(CONFIG, engine=says("x."), tasks=TASKS)(pa.Table.from_pylist(rows))
    assert table.column("query_id").to_pylist() == [f"q{i}" for i in range(5)]
    assert len(set(table.column("seed").to_pylist())) == 5


def test_what_cannot_be_used_is_asked_for_again():
    seed = row_seed(42, "q1", "rewrite")
    first = Completion("no sentence ends", "length", 10, 3)
    second = Completion("The loop waits.", "stop", 10, 3)
    engine = FakeEngine(lambda request: first if request.seed == seed else second)
    row = rewrite(engine)
    assert row["rewritten_query"] == "why does it $stall\nThe loop waits."
    assert (row["status"], row["tries"], row["completion_tokens"]) == ("ok", 2, 6)
    assert row["seed"] == row_seed(seed, "again", 1)
    # What is whole up to its last sentence is good at the first try.
    assert rewrite(says("The loop waits. Then it", "length"))["tries"] == 1


@pytest.fixture(scope="module")
def tokenise(tmp_path_factory):
    """Token ids of a query under a contract's limit, instruction and end token included."""
    from transformers import AutoTokenizer

    from reasonembed.embedder.contract import Attention, Pooling, TokenisationContract
    from reasonembed.embedder.tokenisation import ContractTokenizer, Role
    from tests.embedder.tiny import save_tokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def contract(limit):
        return TokenisationContract(
            model="tiny",
            weights="",
            query_template="Instruct: {instruction}\nQuery: {query}",
            attention=Attention.CAUSAL,
            pooling=Pooling.LAST,
            dtype="float32",
            dimension=1,
            append_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
            max_query_tokens=limit,
            max_document_tokens=limit,
        )

    def ids(text, limit=10_000):
        keeper = ContractTokenizer(tokenizer, contract(limit))
        return keeper.tokenise([text], role=Role.QUERY, instruction="task")[0][:-1]

    return ids


prose = st.lists(
    st.sampled_from(["why", "does", "a set.", "keep?", "order", "dict!", "x = 1"]), min_size=1
).map(" ".join)


@given(prose, prose, st.integers(20, 120))
def test_truncation_takes_reasoning_and_never_more_of_the_query_than_without(
    tokenise, query, reasoning, limit
):
    text = rewrite(says(reasoning), query=query)["rewritten_query"]
    alone, together = tokenise(query, limit), tokenise(text, limit)
    assert together[: len(alone)] == alone  # the query first, as much of it as fits by itself
    whole = tokenise(query)
    if len(whole) >= limit - 1:  # the end token takes one
        assert together == alone  # no room: the reasoning goes, all of it
    else:
        assert together[: len(whole)] == whole


def test_a_query_longer_than_the_limit_leaves_no_room_for_reasoning(tokenise):
    query = "why does a set keep the order " * 40
    text = rewrite(says("The loop waits."), query=query.strip())["rewritten_query"]
    assert tokenise(text, 64) == tokenise(query.strip(), 64)
    assert text.startswith(query.strip())  # cut by the encoder's limit only, which may be raised
