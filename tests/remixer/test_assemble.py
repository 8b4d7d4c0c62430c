import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed import tasks
from reasonembed.artifacts import Artifact
from reasonembed.config import AssembleConfig
from reasonembed.corpus import text_hash
from reasonembed.errors import ConfigError
from reasonembed.remixer import assemble as module
from reasonembed.remixer.assemble import (
    FATES,
    HELD_OUT,
    TRAIN,
    Assembler,
    Inputs,
    Placed,
    SampleWriter,
    split_of,
)
from reasonembed.schemas import CANDIDATES, JUDGMENTS, QUERIES, REWRITES, SAMPLES, from_rows
from tests.remixer.fakes import corpus_store

DOCS = {f"d{i}": f"text {i}" for i in range(6)} | {"twin": "text  0"}
THRESHOLD = AssembleConfig()
RANK = AssembleConfig(rule="rank", rank_positives=1, rank_negatives=2)


def row(schema, **values):
    """A row with these values; the other columns are null or blank."""

    def blank(field):
        if field.nullable:
            return None
        kind = field.type
        return "" if pa.types.is_string(kind) else [] if pa.types.is_list(kind) else 0

    return {field.name: values.get(field.name, blank(field)) for field in schema}


def query(query_id, status="ok", *, text=None, source="d0"):
    text = text or f"text of {query_id}"
    return row(
        QUERIES,
        query_id=query_id,
        query=text if status == "ok" else None,
        source_doc_id=source,
        task="generic",
        status=status,
    )


def judgment(query_id, doc_id, label, *, expected=None, status="ok"):
    return row(
        JUDGMENTS,
        query_id=query_id,
        doc_id=doc_id,
        relevance_label=label,
        expected_label=expected,
        status=status,
    )


def rewrite(query_id, status="ok"):
    text = f"rewrite of {query_id}" if status == "ok" else None
    return row(REWRITES, query_id=query_id, rewritten_query=text, status=status)


def table(rows, schema):
    made = from_rows(rows, schema, where="test")
    return made.sort_by([(name, "ascending") for name in made.column_names if name[-3:] == "_id"])


def assembler(
    queries,
    judgments,
    rewrites,
    config=THRESHOLD,
    *,
    candidates=None,
    max_source_rank=None,
    source_ranks=None,
):
    """Where no candidates are given, a query's are all documents in the order of their ids."""
    ranked = {one["query_id"]: list(DOCS) for one in queries} | (candidates or {})
    found = [
        row(CANDIDATES, query_id=q, doc_ids=doc_ids, source_rank=(source_ranks or {}).get(q))
        for q, doc_ids in ranked.items()
    ]
    return Assembler(
        Inputs(
            queries=table(queries, QUERIES),
            candidates=table(found, CANDIDATES).select(module.CANDIDATE_COLUMNS),
            judgments=table(judgments, JUDGMENTS).select(module.JUDGED_COLUMNS),
            rewrites=table(rewrites, REWRITES),
            corpus=corpus_store(DOCS),
        ),
        config=config,
        tasks=tasks.TASKS,
        max_query_similarity=0.8,
        max_source_rank=max_source_rank,
    )


def assemble(*args, **kinds):
    """The funnel and the samples, as Arrow would keep them."""
    made = assembler(*args, **kinds)
    rows = [placed.row for placed in made.samples()]
    return made.funnel, from_rows(rows, SAMPLES, where="test").to_pylist()


def ids(labelled):
    return [one["doc_id"] for one in labelled]


def test_a_sample_holds_everything_that_training_needs():
    _, samples = assemble(
        [query("q")], [judgment("q", "d1", 4), judgment("q", "d2", 1)], [rewrite("q")]
    )
    assert samples == [
        {
            "query_id": "q",
            "task": "generic",
            "instruction": tasks.get("generic").instruction,
            "query": "text of q",
            "rewritten_query": "rewrite of q",
            "positives": [
                {"doc_id": "d1", "text": "text 1", "label": 4.0, "text_hash": text_hash("text 1")}
            ],
            "negatives": [
                {"doc_id": "d2", "text": "text 2", "label": 1.0, "text_hash": text_hash("text 2")}
            ],
            "source_doc_id": "d0",
            "split": "train",
        }
    ]


@pytest.mark.parametrize(
    ("config", "positives", "negatives"),
    [
        (THRESHOLD, ["d5", "d4", "d3"], ["d1", "d2"]),
        (AssembleConfig(positive_min=5, negative_max=1), ["d5"], ["d1"]),
        (AssembleConfig(max_positives=2, max_negatives=1), ["d5", "d4"], ["d1"]),
    ],
)
def test_threshold_splits_at_its_bounds_and_caps_keep_the_best(config, positives, negatives):
    judgments = [judgment("q", f"d{label}", label) for label in range(1, 6)]
    _, (sample,) = assemble([query("q")], judgments, [rewrite("q")], config)
    assert (ids(sample["positives"]), ids(sample["negatives"])) == (positives, negatives)


def test_of_equal_labels_the_miners_best_come_first():
    labels = {"d0": 3, "d1": 2, "d2": 3, "d3": 1, "d4": 4, "d5": 2}
    _, (sample,) = assemble(
        [query("q")],
        [judgment("q", doc_id, label) for doc_id, label in labels.items()],
        [rewrite("q")],
        AssembleConfig(max_positives=2, max_negatives=2),
        candidates={"q": ["d5", "d3", "d2", "d1", "d0", "d4"]},
    )
    assert ids(sample["positives"]) == ["d4", "d2"]
    assert ids(sample["negatives"]) == ["d5", "d3"]  # by rank, not by label


@pytest.mark.parametrize("config", [THRESHOLD, RANK])
def test_judgments_of_documents_that_are_no_candidates_any_more_do_not_count(config):
    judgments = [judgment("q", f"d{i}", i, expected=float(i)) for i in range(1, 6)]
    _, (sample,) = assemble(
        [query("q")], judgments, [rewrite("q")], config, candidates={"q": ["d4", "d2", "d1"]}
    )
    assert (ids(sample["positives"]), ids(sample["negatives"])) == (["d4"], ["d2", "d1"])
    funnel, samples = assemble([query("q")], judgments, [rewrite("q")], candidates={"q": []})
    assert funnel["no positive"] == 1 and not samples


def test_rank_takes_the_best_and_the_worst_by_expected_label():
    judgments = [
        judgment("q", f"d{i}", 3, expected=expected)
        for i, expected in enumerate([2.5, 3.5, 1.5, 3.5, 2.0])
    ]
    _, (sample,) = assemble([query("q")], judgments, [rewrite("q")], RANK)
    assert ids(sample["positives"]) == ["d1"]  # ties: the miner's better one
    assert ids(sample["negatives"]) == ["d2", "d4"]  # the worst two, the miner's best first
    assert [one["label"] for one in sample["negatives"]] == [1.5, 2.0]


@pytest.mark.parametrize(("count", "fate"), [(0, "no positive"), (1, "no negative")])
def test_rank_never_uses_a_document_on_both_sides(count, fate):
    judgments = [judgment("q", f"d{i}", 3, expected=3.0) for i in range(count)]
    assert assemble([query("q")], judgments, [rewrite("q")], RANK)[0][fate] == 1


@pytest.mark.parametrize("config", [THRESHOLD, RANK])
def test_judgments_without_a_label_or_that_failed_do_not_count(config):
    judgments = [
        judgment("q", "d1", 5, expected=4.0),
        judgment("q", "d2", 1, expected=2.0),
        judgment("q", "d3", None),
        judgment("q", "d4", 5, expected=5.0, status="truncated"),
        judgment("q", "d5", 1, expected=1.0, status="error"),
    ]
    _, (sample,) = assemble([query("q")], judgments, [rewrite("q")], config)
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
        query("same-again", text="text of fine"),
        query("strays"),
    ]
    ranks = {one["query_id"]: 4 for one in queries} | {"strays": 5}
    judged = ("failed", "no-rewrite", "bad-rewrite", "all-good", "fine", "same-again", "strays")
    judgments = [
        *[judgment(q, "d1", 5) for q in judged],
        *[judgment(q, "d2", 1) for q in [*judged, "all-bad"] if q != "all-good"],
        judgment("not-a-query", "d1", 5),
    ]
    rewritten = ("failed", "all-bad", "all-good", "unjudged", "fine", "same-again", "strays")
    rewrites = [rewrite(q) for q in rewritten]
    rewrites.append(rewrite("bad-rewrite", "error"))
    funnel, samples = assemble(queries, judgments, rewrites, max_source_rank=4, source_ranks=ranks)
    assert funnel == {
        "no usable query": 1,
        "near-duplicate query": 1,
        "strays from its source": 1,
        "no usable rewrite": 2,
        "no positive": 2,
        "no negative": 1,
        "sample": 1,
    }
    assert tuple(funnel) == FATES
    assert [sample["query_id"] for sample in samples] == ["fine"]


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
    funnel, samples = assemble(
        [query(f"q{i}", status) for i, status in enumerate(queries)],
        [
            judgment(f"q{q}", f"d{d}", label, expected=expected, status=status)
            for (q, d), (label, expected, status) in judged.items()
        ],
        [rewrite(f"q{i}", status) for i, status in rewritten.items()],
        config,
    )
    assert sum(funnel.values()) == len(queries)
    assert funnel["sample"] == len(samples)
    for sample in samples:
        positives, negatives = ids(sample["positives"]), ids(sample["negatives"])
        assert positives and negatives
        assert not set(positives) & set(negatives)
        lowest = min(one["label"] for one in sample["positives"])
        if config is RANK:
            assert lowest >= max(one["label"] for one in sample["negatives"])


# ---- the split ------------------------------------------------------------------------------


def judged_of(sources, config):
    """A sample for each query; `sources` gives its source document."""
    names = [f"q{i}" for i in range(len(sources))]
    _, samples = assemble(
        [query(name, source=source) for name, source in zip(names, sources, strict=True)],
        [judgment(name, f"d{i}", label) for name in names for i, label in ((1, 5), (2, 1))],
        [rewrite(name) for name in names],
        config,
    )
    return {sample["query_id"]: sample["split"] for sample in samples}


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7])
def test_all_variants_of_a_document_and_of_its_duplicates_fall_together(share):
    config = AssembleConfig(held_out_share=share)
    sources = ["d0", "d3", "twin", "d0", "d3", "d4"]
    splits = judged_of(sources, config)
    assert splits["q0"] == splits["q2"] == splits["q3"]  # twin has the text of d0
    assert splits["q1"] == splits["q4"]
    alone = judged_of(sources[:2], config)  # what else there is moves nothing
    assert alone == {name: splits[name] for name in alone}


def test_the_share_is_kept_and_a_larger_one_holds_out_the_same_and_more():
    groups = [text_hash(str(i)) for i in range(4000)]
    held = {
        share: {g for g in groups if split_of(g, share) == HELD_OUT}
        for share in (0.0, 0.1, 0.4, 1.0)
    }
    assert not held[0.0] and held[1.0] == set(groups)
    assert held[0.1] < held[0.4]
    # Four standard deviations of a binomial: 4 · √(4000 · p · (1 − p)).
    assert abs(len(held[0.1]) - 400) < 76 and abs(len(held[0.4]) - 1600) < 124


# ---- writing --------------------------------------------------------------------------------


def placed(query_id, *, split=TRAIN, positives=("p",), place=None):
    passage = [{"doc_id": t, "text": t, "label": None, "text_hash": text_hash(t)} for t in ("n",)]
    good = [{"doc_id": t, "text": t, "label": 5.0, "text_hash": text_hash(t)} for t in positives]
    made = {"positives": good, "negatives": passage, "split": split}
    return Placed(place or query_id, row(SAMPLES, query_id=query_id, **made))


@pytest.fixture
def artifact(tmp_path):
    return Artifact.declared(tmp_path / "samples", "samples")


def test_counts_tell_how_many_held_out_positives_training_knows(artifact):
    writer = SampleWriter(artifact)
    writer.write([placed("a", positives=["x", "y"]), placed("b", positives=["y"])], name="one")
    writer.write([placed("c", split=HELD_OUT, positives=["y", "z", "new"])], name="two")
    writer.write([placed("d", positives=["z"])], name="three")
    assert writer.counts() == {
        "train": 3,
        "held out": 1,
        "held-out positives": 3,
        "held-out positives seen in training": 2,
    }


def test_a_writer_that_was_killed_goes_on_to_the_same_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PART_ROWS", 3)

    def rows(stop_at=None):
        for number in range(8):
            if number == stop_at:
                raise KeyboardInterrupt
            yield placed(f"q{number}", split=HELD_OUT if number % 3 else TRAIN)

    def parts(artifact):
        return [(commit.part, commit.rows, commit.keys_digest) for commit in artifact.commits()]

    whole = Artifact.declared(tmp_path / "whole", "samples")
    uninterrupted = SampleWriter(whole)
    assert uninterrupted.write(rows(), name="samples") == 8
    assert [part[:2] for part in parts(whole)] == [
        ("samples-00000", 3), ("samples-00001", 3), ("samples-00002", 2),
    ]  # fmt: skip

    killed = Artifact.declared(tmp_path / "killed", "samples")
    with pytest.raises(KeyboardInterrupt):
        SampleWriter(killed).write(rows(stop_at=4), name="samples")
    first = killed.commits()
    assert [commit.part for commit in first] == ["samples-00000"]
    again = SampleWriter(killed)
    assert again.write(rows(), name="samples") == 8
    assert parts(killed) == parts(whole) and killed.commits()[0] == first[0]
    assert again.counts() == uninterrupted.counts()
    assert killed.read() == whole.read() == pa.concat_tables(whole.parts())


def test_parts_are_cut_by_the_length_of_their_texts_too(artifact, monkeypatch):
    monkeypatch.setattr(module, "_PART_CHARS", 20)
    rows = [placed(f"q{i}", positives=["t" * 9]) for i in range(5)]
    SampleWriter(artifact).write(rows, name="samples")
    assert [commit.rows for commit in artifact.commits()] == [2, 2, 1]


def test_an_id_that_occurs_twice_is_an_error_that_names_both_places(artifact):
    writer = SampleWriter(artifact)
    writer.write([placed("q", place="one.jsonl line 3")], name="one")
    with pytest.raises(ConfigError, match=r"'q' is in one\.jsonl line 3 and in two line 7"):
        writer.write([placed("q", place="two line 7")], name="two")


def test_part_by_part_gives_the_rows_that_reading_at_once_gives(artifact):
    def rows(*samples):
        return from_rows([sample.row for sample in samples], SAMPLES, where="test")

    artifact.commit("b", rows(placed("q1", positives=["first"])))
    artifact.commit("a", rows(placed("q1", positives=["late"]), placed("q0")))
    found = pa.concat_tables(artifact.parts()).sort_by("query_id")
    assert found == artifact.read() and found.num_rows == 2


def test_the_source_as_positive_changes_nothing_but_the_positive():
    made = (
        [query("q", source="d0"), query("without", source="d5")],
        [judgment("q", "d1", 4), judgment("q", "d2", 1), judgment("without", "d3", 1)],
        [rewrite("q"), rewrite("without")],
    )
    candidates = {"q": ["d1", "d2"], "without": ["d3"]}
    funnel, (annotated,) = assemble(*made, candidates=candidates)
    control = AssembleConfig(positives_from="source")
    same, (sample,) = assemble(*made, control, candidates=candidates)
    assert same == funnel
    assert sample["positives"] == [
        {"doc_id": "d0", "text": "text 0", "label": 5.0, "text_hash": text_hash("text 0")}
    ]
    assert sample | {"positives": None} == annotated | {"positives": None}


def test_the_source_cannot_be_the_positive_of_samples_that_were_made_elsewhere():
    with pytest.raises(ValueError, match="samples that this run makes"):
        AssembleConfig(positives_from="source", sources=[{"path": "elsewhere"}])
