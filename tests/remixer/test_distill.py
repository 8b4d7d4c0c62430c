import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.config import DistillConfig
from reasonembed.errors import ConfigError
from reasonembed.llm.protocol import Completion, failure
from reasonembed.remixer.annotate import JudgedQuery, annotation_prompt
from reasonembed.remixer.distill import (
    Analyst,
    compare,
    held_out_queries,
    majority,
    pairs_of,
    plan_trajectories,
    select_trajectories,
)
from reasonembed.schemas import CANDIDATES, TRAJECTORIES, Status, from_rows
from reasonembed.tasks import TASKS
from tests.remixer.fakes import LLM, FakeEngine, corpus_store


def config(**changes):
    return DistillConfig.model_validate({"llm": LLM, "student": "s", "samples": 2} | changes)


def candidates(num_queries, *, depth=12, task="generic", prefix="q"):
    rows = [
        {
            "query_id": f"{prefix}{i:03d}",
            "source_doc_id": f"s{i}",
            "task": task,
            "doc_ids": [f"d{i}-{rank}" for rank in range(1, depth + 1)],
            "scores": [1.0] * depth,
            "origins": [[]] * depth,
            "num_excluded": 0,
            "source_rank": 1,
        }
        for i in range(num_queries)
    ]
    return from_rows(rows, CANDIDATES, where="test candidates")


def plan(table, *, max_pairs=10_000, samples=1, seed=0):
    planned = plan_trajectories(table, max_pairs=max_pairs, samples=samples, seed=seed)
    return planned.to_pylist()


def ranks(rows):
    return [int(row["doc_id"].partition("-")[2]) for row in rows]


# ---- plan -------------------------------------------------------------------------------------


def test_every_pair_is_planned_as_often_as_samples_are_asked_for():
    rows = plan(candidates(3, depth=2), samples=2)
    assert [tuple(row.values()) for row in rows[:5]] == [
        ("q000", "d0-1", "0"),
        ("q000", "d0-1", "1"),
        ("q000", "d0-2", "0"),
        ("q000", "d0-2", "1"),
        ("q001", "d1-1", "0"),
    ]
    assert len(rows) == 12


def test_pairs_are_spread_over_ranks_and_tasks():
    table = pa.concat_tables(
        [candidates(40), candidates(4, task="biology", prefix="b"), candidates(40, prefix="x")]
    )
    rows = plan(table, max_pairs=64)
    bands = [rank.bit_length() for rank in ranks(rows)]
    # Eight cells in turn; of biology's first ranks there are 4 only, the others give more.
    assert {band: bands.count(band) for band in (1, 2, 3, 4)} == {1: 13, 2: 17, 3: 17, 4: 17}
    assert sum(row["query_id"].startswith("b") for row in rows) == 4 + 8 + 9 + 9


def test_the_choice_is_stable():
    table = candidates(60)
    chosen = {tuple(row.values()) for row in plan(table, max_pairs=40)}
    assert chosen == {
        tuple(row.values()) for row in plan(table.take([*range(59, -1, -1)]), max_pairs=40)
    }
    assert chosen != {tuple(row.values()) for row in plan(table, max_pairs=40, seed=1)}
    # One more query in sixty changes few pairs, and more pairs keep those that there are.
    grown = {tuple(row.values()) for row in plan(candidates(61), max_pairs=40)}
    assert len(chosen & grown) > 30
    assert chosen <= {tuple(row.values()) for row in plan(table, max_pairs=80)}


def test_held_out_queries_come_by_source_document_and_near_the_share():
    sources = {f"q{i}-{variant}": f"d{i}" for i in range(400) for variant in range(2)}
    found = held_out_queries(sources, share=0.25, seed=1)
    assert 0.15 < len(found) / len(sources) < 0.35
    assert all((f"q{i}-0" in found) == (f"q{i}-1" in found) for i in range(400))
    assert found < held_out_queries(sources, share=0.5, seed=1)
    assert held_out_queries(sources, share=0.0, seed=1) == frozenset()


@pytest.mark.parametrize("share, cure", [(1e-9, "raise it"), (1.0, "lower it")])
def test_a_share_that_leaves_one_side_empty_is_refused(share, cure):
    with pytest.raises(ConfigError, match=rf"held_out_share .* of 2 queries; {cure}"):
        held_out_queries({"a": "d1", "b": "d2"}, share=share, seed=0)


# ---- teacher ----------------------------------------------------------------------------------


def analyst(answer, *, role="teacher", **changes):
    engine = FakeEngine(answer)
    return engine, Analyst(
        config(**changes),
        llm=LLM,
        role=role,
        engine=engine,
        corpus=corpus_store({"d0-1": "one two three four", "d0-2": "five"}),
        queries={"q000": JudgedQuery("why?", "generic")},
        tasks=TASKS,
    )


def planned(samples=2):
    return plan_trajectories(candidates(1, depth=2), max_pairs=9, samples=samples, seed=0)


def test_rows_hold_prompt_answer_and_label():
    engine, teacher = analyst(lambda _: Completion("so <score>4</score>", "stop", 10, 3))
    rows = teacher(planned()).to_pylist()
    assert [(row["doc_id"], row["sample"]) for row in rows] == [
        ("d0-1", "0"), ("d0-1", "1"), ("d0-2", "0"), ("d0-2", "1")
    ]  # fmt: skip
    prompt = annotation_prompt(
        JudgedQuery("why?", "generic"),
        "one two three four",
        task=TASKS["generic"],
        max_document_words=4_000,
    )
    assert rows[0] == {
        "query_id": "q000", "doc_id": "d0-1", "sample": "0", "task": "generic", "prompt": prompt,
        "answer": "so <score>4</score>", "relevance_label": 4, "status": "ok", "detail": None,
        "finish_reason": "stop", "prompt_tokens": 10, "cached_tokens": 0, "completion_tokens": 3,
        "tries": 1, "seed": rows[0]["seed"], "model": "fake",
    }  # fmt: skip
    assert len({request.seed for request in engine.requests}) == 4
    student_engine, student = analyst(
        lambda _: Completion("<score>4</score>", "stop"), role="student"
    )
    student(planned())
    assert not {r.seed for r in engine.requests} & {r.seed for r in student_engine.requests}


def test_unusable_answers_are_asked_for_again_and_stay_rows():
    def answer(request):
        if "five" in request.prompt:
            return failure("boom")
        return Completion("no score", "stop", 10, 2)

    _, teacher = analyst(answer, tries=3)
    rows = teacher(planned(samples=1)).to_pylist()
    found = [
        (r["status"], r["tries"], r["prompt_tokens"], r["relevance_label"], r["answer"])
        for r in rows
    ]
    assert found == [("invalid", 3, 30, None, "no score"), ("error", 1, 0, None, None)]
    assert "from 1 to 5" in rows[0]["detail"]


# ---- selection --------------------------------------------------------------------------------


def trajectory(query, doc, sample, label, *, task="generic", status=None, answer=None, **tokens):
    values = {"prompt_tokens": 100, "cached_tokens": 0, "completion_tokens": 10, "tries": 1}
    return {
        "query_id": query,
        "doc_id": doc,
        "sample": str(sample),
        "task": task,
        "prompt": f"{query} {doc}",
        "answer": answer or f"{query} {doc} {sample}: {label}",
        "relevance_label": label,
        "status": status or ("ok" if label else "invalid"),
        "detail": None,
        "finish_reason": "stop",
        "seed": 0,
        "model": "m",
    } | values | tokens  # fmt: skip


def table(rows):
    return from_rows(rows, TRAJECTORIES, where="test trajectories")


def pair(query, doc, labels, **more):
    return [trajectory(query, doc, n, label, **more) for n, label in enumerate(labels)]


def select(rows, *, held_out=(), **changes):
    return select_trajectories(table(rows), held_out=held_out, config=config(**changes))


def test_only_what_agrees_parses_and_is_not_held_out_is_kept():
    rows = [
        *pair("q1", "d1", [4, 4, 2]),
        *pair("q1", "d2", [1, 2, 3]),
        *pair("q2", "d1", [5, 5, None]),
        *pair("q3", "d1", [3, 3, 3], answer="the same"),
        *pair("q4", "d1", [2, 2, 2]),
        *pair("q5", "d1", [None, None]),
    ]
    rows[-1]["status"] = "error"
    found = select(rows, held_out={"q4"})
    kept = [(row["query_id"], row["sample"]) for row in found.rows.to_pylist()]
    assert kept == [("q1", "0"), ("q1", "1"), ("q2", "0"), ("q2", "1"), ("q3", "0")]
    assert found.funnel == {
        "asked": 17,
        "against the majority": 1,
        "pair without majority": 3,
        "invalid": 2,
        "error": 1,
        "said twice": 2,
        "held out": 3,
        "kept": 5,
    }
    assert found.labels == {"generic": {3: 1, 4: 2, 5: 2}}


def test_labels_of_each_task_are_balanced_and_pairs_go_before_repeats():
    rows = [row for i in range(10) for row in pair(f"q{i}", "d", [1, 1])]
    rows += pair("q90", "d", [4, 4]) + pair("q91", "d", [1, 1], task="biology")
    found = select(rows, max_per_label=6)
    assert found.labels == {"biology": {1: 2}, "generic": {1: 6, 4: 2}}
    ones = [
        r for r in found.rows.to_pylist() if r["relevance_label"] == 1 and r["task"] == "generic"
    ]
    assert len({row["query_id"] for row in ones}) == 6
    assert found.funnel["over max_per_label"] == 14
    assert found.rows.equals(select(rows[::-1], max_per_label=6).rows)
    assert not found.rows.equals(select(rows, max_per_label=6, seed=1).rows)


@pytest.mark.parametrize(
    "labels, min_agreement, expected",
    [
        ([4, 4, 2], 0.6, 4),
        ([4, 4, 2], 0.7, None),
        ([4, 2], 0.1, None),  # a tie is no majority, however low the bar
        ([4, 4, 2, 2, 1], 0.1, None),
        ([5], 1.0, 5),
        ([], 0.0, None),
    ],
)
def test_majority(labels, min_agreement, expected):
    assert majority(labels, min_agreement=min_agreement) == expected


labelled = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, 2),
        st.lists(st.sampled_from([None, 1, 2, 3]), min_size=1, max_size=4),
    ),
    max_size=12,
    unique_by=lambda value: value[:2],
)


@given(labelled, st.sampled_from([0.3, 0.6, 1.0]), st.sampled_from([None, 1, 3]))
def test_the_funnel_adds_up_and_what_is_kept_agrees(found, min_agreement, limit):
    rows = [row for query, doc, labels in found for row in pair(f"q{query}", f"d{doc}", labels)]
    chosen = select(rows, held_out={"q0"}, min_agreement=min_agreement, max_per_label=limit)
    funnel = dict(chosen.funnel)
    assert funnel.pop("asked") == sum(funnel.values()) == len(rows)
    assert (
        funnel["kept"]
        == chosen.rows.num_rows
        == sum(sum(n.values()) for n in chosen.labels.values())
    )
    for (query, _), kept in pairs_of(chosen.rows).items():
        assert query != "q0"
        assert all(row["status"] == Status.OK for row in kept)
        assert len({row["relevance_label"] for row in kept}) == 1
    assert all(
        limit is None or n <= limit for task in chosen.labels.values() for n in task.values()
    )


# ---- agreement --------------------------------------------------------------------------------


def test_teacher_and_student_are_compared_pair_by_pair():
    teacher = [
        *pair("q1", "d1", [4, 4, 4]),  # student 4: exact
        *pair("q1", "d2", [2, 2, 3]),  # student 3: off by one, on the other side of 3
        *pair("q2", "d1", [1, 1, 1]),  # student 5
        *pair("q2", "d2", [1, 3]),  # no majority: no reference
        *pair("q3", "d1", [5, 5]),  # the student's first analysis failed
    ]
    student = [
        *pair("q1", "d1", [4, 1, 1], prompt_tokens=50, completion_tokens=4),
        *pair("q1", "d2", [3, 3, 3], prompt_tokens=50, completion_tokens=4),
        *pair("q2", "d1", [5, 5, 5], prompt_tokens=50, completion_tokens=4),
        *pair("q2", "d2", [1, 1], prompt_tokens=50, completion_tokens=4),
        *pair("q3", "d1", [None, 5], prompt_tokens=50, completion_tokens=4),
    ]
    found = compare(table(teacher), table(student), min_agreement=0.6)
    assert (found["pairs"], found["pairs without majority"]) == (5, 1)
    agreement = found["agreement"]
    assert (agreement["num_pairs"], agreement["num_unlabelled"]) == (3, 2)
    assert agreement["exact"] == pytest.approx(1 / 3)
    assert agreement["within_one"] == pytest.approx(2 / 3)
    assert agreement["binary"] == pytest.approx(1 / 3)
    # Equal pairs of votes: 1, 1/3, 1, 0, 1 of the teacher.
    assert found["teacher"]["consistency"]["exact"] == pytest.approx((1 + 1 / 3 + 1 + 0 + 1) / 5)
    assert found["student"]["consistency"]["num_pairs"] == 4  # one pair has a single vote
    assert found["student"]["answers"] == {"ok": 12, "invalid": 1}
    costs = [found[side]["cost"] for side in ("teacher", "student")]
    assert [cost["num_pairs"] for cost in costs] == [5, 5]  # one analysis a pair
    assert [cost["read_per_1000"] for cost in costs] == [100_000, 50_000]
    assert [cost["written_per_1000"] for cost in costs] == [10_000, 4_000]


def test_other_pairs_are_no_comparison():
    with pytest.raises(ValueError, match="other pairs"):
        compare(table(pair("q1", "d1", [4])), table(pair("q1", "d2", [4])), min_agreement=0.5)


# ---- a real student ---------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "white", "black", "brown", "grey", "pink")


def coloured_pairs():
    """A task that a 135M model can learn in a dozen steps: the document names the colour or not."""
    for i, colour in enumerate(COLOURS):
        for k, other in enumerate((colour, COLOURS[(i + 3) % 8])):
            yield f"q{i}", f"d{i}-{k}", colour, f"The case is {other}.", 5 if k == 0 else 1


def written(colour, document, label):
    verdict = "It fits" if label == 5 else "It does not fit"
    return (
        f"Step 1: the query asks for {colour}.\nStep 2: {document}\nStep 3: {verdict}.\n"
        f"<score>{label}</score>"
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_student_takes_the_teachers_place(tmp_path):
    from reasonembed.config import EngineRuntime, LLMConfig, TrainRuntime
    from reasonembed.llm.protocol import make_engine
    from reasonembed.models import resolve
    from reasonembed.redapter.sft import ChatTokenizer, fine_tune, save_student

    pairs = list(coloured_pairs())
    asked = {
        query: JudgedQuery(f"Is the case {colour}?", "generic") for query, _, colour, *_ in pairs
    }
    rows = [{"query_id": q, "doc_id": d, "sample": "0"} for q, d, *_ in pairs]
    settings = config(
        samples=1, batch_tokens=3_000, epochs=2, learning_rate=1e-3, dtype="float32",
        lora={"rank": 16, "alpha": 32, "dropout": 0.0}, tries=1,
        sampling={"temperature": 0.0, "max_tokens": 90},
    )  # fmt: skip
    weights = resolve("smollm2-135m-instruct")
    tokenizer = ChatTokenizer(weights)
    examples = [
        tokenizer.example(
            annotation_prompt(asked[q], text, task=TASKS["generic"], max_document_words=100),
            answer=written(colour, text, label),
        )
        for q, _, colour, text, label in pairs
    ]
    reports = []
    result = fine_tune(
        settings,
        examples,
        weights=weights,
        runtime=TrainRuntime(chunk_tokens=400, checkpoint_every=100),
        output_dir=tmp_path / "sft",
        report=lambda metrics, _: reports.append(metrics["loss"]),
    )
    checkpoint = tmp_path / "sft" / f"checkpoint-{result.steps}"
    save_student(settings, checkpoint, weights=weights, output_dir=tmp_path / "model")

    def judge(model):
        llm = LLMConfig(model=str(model), dtype="float32", max_model_len=1024)
        engine = make_engine(llm, EngineRuntime(max_num_seqs=16), cache_dir=None)
        analyst = Analyst(
            settings,
            llm=llm,
            role="student",
            engine=engine,
            corpus=corpus_store({d: text for _, d, _, text, _ in pairs}),
            queries=asked,
            tasks=TASKS,
        )
        found = analyst(pa.Table.from_pylist(rows)).to_pylist()
        engine.close()
        return [row["relevance_label"] for row in found]

    before, after = judge(weights), judge(tmp_path / "model")
    labels = [label for *_, label in pairs]
    # Four steps teach the form, not the judgment: from none of 16 answers with a score to 10.
    assert reports[-1] < 0.5 * reports[0]
    assert sum(label is not None for label in after) >= 8
    right = [sum(a == b for a, b in zip(found, labels, strict=True)) for found in (before, after)]
    assert right[1] > right[0]
