import pytest

from reasonembed.config import EngineRuntime, FilterConfig, LLMConfig, PlanConfig, TaskConfig
from reasonembed.llm.protocol import Completion
from reasonembed.llm.scripted import FAIL_ERROR, ScriptedEngine
from reasonembed.remixer.filter import DOCUMENTS, DomainFilter, plan_filter
from reasonembed.remixer.plan import plan_seeds
from reasonembed.schemas import DOMAINS, from_rows, row_seed
from reasonembed.tasks import TASKS, Task
from tests.remixer.fakes import LLM, FakeEngine, corpus_store, corpus_table, fails, says

CONFIG = FilterConfig(llm=LLM)
TEXT = "Moths fly to light."


def thinks(yes):
    answer = Completion("Yes", "length", 10, 1, choice_probabilities={"Yes": yes, "No": 1 - yes})
    return FakeEngine(lambda _: answer)


def ask(engine, *, texts=None, task="biology", tasks=TASKS, **changes):
    texts = texts or {"d": TEXT}
    rows = [{"doc_id": doc_id, "task": task} for doc_id in texts]
    stage = DomainFilter(
        CONFIG.model_copy(update=changes), engine=engine, corpus=corpus_store(texts), tasks=tasks
    )
    return stage(from_rows(rows, DOCUMENTS, where="test"))


def test_one_constrained_token_is_asked_for_and_its_probability_kept():
    engine = thinks(0.75)
    table = ask(engine)
    (row,) = table.to_pylist()
    (request,) = engine.requests
    assert table.schema == DOMAINS
    assert request.choices == ("Yes", "No")
    assert request.sampling.max_tokens == 1
    assert (row["probability"], row["status"], row["detail"]) == (0.75, "ok", None)
    assert (row["doc_id"], row["task"], row["tries"]) == ("d", "biology", 1)
    assert row["seed"] == request.seed == row_seed(42, "d", "domain")


@pytest.mark.parametrize(
    ("task", "domain", "asked"),
    [
        ("earth_science", None, "the field of Earth Science?"),
        ("pony", "Coding", "the field of Coding?"),
        ("law", None, "the field of Court rulings?"),
    ],
)
def test_the_domain_is_the_tasks_or_the_configurations(task, domain, asked):
    own = Task(name="law", **TaskConfig(display_name="Court rulings").model_dump())
    engine = thinks(0.5)
    ask(engine, task=task, tasks={**TASKS, "law": own}, domain=domain)
    assert engine.requests[0].prompt.count(asked) == 2


def test_a_whole_document_is_read_and_one_that_was_cut_says_so():
    engine = thinks(0.5)
    texts = {"short": "one $two three", "long": "one two three four five"}
    short, long = ask(engine, texts=texts, max_document_words=3).to_pylist()
    assert "\none $two three\n" in engine.requests[0].prompt
    assert "\none two three\n" in engine.requests[1].prompt
    assert short["detail"] is None
    assert (long["status"], long["detail"]) == ("ok", "judged by the first 3 of 5 words")


@pytest.mark.parametrize(
    ("engine", "detail"),
    [
        (fails("no route"), "no route"),
        (says("Yes"), "the engine gave no probabilities of Yes and No"),
    ],
)
def test_no_answer_is_a_row(engine, detail):
    (row,) = ask(engine).to_pylist()
    assert (row["status"], row["detail"], row["probability"]) == ("error", detail, None)


def test_one_row_in_one_row_out():
    texts = {f"d{i}": FAIL_ERROR if i == 2 else f"text {i}" for i in range(5)}
    engine = ScriptedEngine(LLMConfig(model="scripted", engine="scripted"), EngineRuntime())
    table = ask(engine, texts=texts)
    assert table.column("doc_id").to_pylist() == list(texts)
    assert table.column("status").to_pylist() == ["ok", "ok", "error", "ok", "ok"]
    assert ask(engine, texts={"d": TEXT}).slice(0, 0).schema == DOMAINS


def test_only_documents_that_could_be_seeds_are_asked_about():
    plan = PlanConfig(min_chars=3, max_chars=20)
    corpus = corpus_table(
        {
            "gold": "an answer",
            "twin": "an answer",
            "short": "ab",
            "b": "text",
            "a": "text",
            "c": "more",
        }
    )
    planned = plan_filter(corpus, plan, held_out={"gold"})
    assert planned.schema == DOCUMENTS
    assert planned.column("doc_id").to_pylist() == ["a", "c"]
    # And every seed of a plan without a filter would have been asked about.
    seeds = plan_seeds(corpus, plan, held_out={"gold"}).seeds
    assert set(seeds.column("source_doc_id").to_pylist()) == {"a", "c"}
