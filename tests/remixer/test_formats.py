import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from ray_jobs import assemble
from ray_jobs.job import Job
from reasonembed import tasks
from reasonembed.artifacts import Artifact
from reasonembed.cli import app
from reasonembed.config import SampleSource, parse
from reasonembed.corpus import text_hash
from reasonembed.errors import ConfigError, DriftError, QualityError, SchemaError
from reasonembed.progress import Reporter
from reasonembed.remixer import formats
from reasonembed.remixer.assemble import HELD_OUT, TRAIN, Placed, SampleWriter, split_of
from reasonembed.remixer.formats import export_samples, finished_samples, read_source
from reasonembed.run import Run
from reasonembed.schemas import SAMPLES, from_rows

LINE = {"prompt": "Find.", "query": "q", "reasoning_query": "q'", "pos": ["a", "b"], "neg": ["c"]}


def sample(query_id="q1", **values):
    def passage(text, label=None):
        return {"doc_id": f"d-{text}", "text": text, "label": label, "text_hash": text_hash(text)}

    return {
        "query_id": query_id,
        "task": "biology",
        "instruction": "Find.",
        "query": f"query {query_id}",
        "rewritten_query": f"rewritten {query_id}",
        "positives": [passage("good", 4.5), passage("better", 5.0)],
        "negatives": [passage("bad", 1.0), passage("worse"), passage("worst", 2.0)],
        "source_doc_id": "d0",
        "split": TRAIN,
    } | values


def artifact(folder, rows, *, parts=2):
    """A run's finished samples, in two parts."""
    samples = Artifact.declared(folder / "samples", "samples")
    writer = SampleWriter(samples)
    middle = len(rows) // parts
    for number, some in enumerate([rows[:middle], rows[middle:]]):
        writer.write([Placed(row["query_id"], row) for row in some], name=f"part-{number}")
    samples.finish({"samples": len(rows)})
    return samples


def export(samples, out, form, *, split="all", max_negatives=15):
    return export_samples(
        samples,
        out,
        form=form,
        split=split,
        anchor=lambda instruction, query: f"{instruction}|{query}",
        max_negatives=max_negatives,
    )


def read(path, form, *, task=None, share=0.0):
    source = SampleSource(path=str(path), form=form, task=task)
    rows = list(read_source(source, tasks=tasks.TASKS, held_out_share=share))
    table = from_rows([placed.row for placed in rows], SAMPLES, where="test")
    return table.to_pylist(), [placed.place for placed in rows]


def write_lines(file, *lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file


# ---- there and back -------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = texts.filter(str.strip)
labels = st.none() | st.floats(1, 5, width=32)
passages = st.lists(
    st.builds(
        lambda text, doc_id, label: {
            "doc_id": doc_id,
            "text": text,
            "label": label,
            "text_hash": text_hash(text),
        },
        texts,
        texts,
        labels,
    ),
    min_size=1,
    max_size=3,
)
sample_lists = st.lists(
    st.fixed_dictionaries(
        {
            "query_id": words,
            "task": st.sampled_from(["biology", "my/task", "généric"]),
            "instruction": texts,
            "query": words,
            "rewritten_query": words,
            "positives": passages,
            "negatives": passages,
            "source_doc_id": st.none() | words,
            "split": st.sampled_from([TRAIN, HELD_OUT]),
        }
    ),
    min_size=1,
    max_size=5,
    unique_by=lambda row: row["query_id"],
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rows=sample_lists, form=st.sampled_from(["parquet", "reasonembed", "flagembedding", "run"]))
def test_what_is_exported_is_imported_again(tmp_path_factory, rows, form):
    folder = tmp_path_factory.mktemp("there-and-back")
    samples = artifact(folder, rows)
    path = folder
    if form != "run":
        path = folder / "out"
        assert export(samples, path, form).rows == len(rows)
    found, places = read(path, form)
    if form == "flagembedding":  # no place for a rewritten query
        rows = [row | {"rewritten_query": row["query"]} for row in rows]

    def by_id(some):
        return sorted(some, key=lambda row: row["query_id"])

    assert by_id(found) == by_id(rows)
    assert len(set(places)) == len(places)


def test_the_released_form_is_a_file_a_task_with_the_labels_beside_it(tmp_path):
    samples = artifact(tmp_path, [sample(), sample("q2", task="pony", source_doc_id=None)])
    export(samples, tmp_path / "out", "reasonembed")
    names = [file.name for file in sorted((tmp_path / "out").iterdir())]
    assert names == ["biology-formatted.jsonl", "pony-formatted.jsonl"]
    (line,) = (tmp_path / "out" / names[0]).read_text().splitlines()
    assert json.loads(line) == {
        "prompt": "Find.",
        "query": "query q1",
        "reasoning_query": "rewritten q1",
        "pos": ["good", "better"],
        "pos_ids": ["d-good", "d-better"],
        "pos_scores": [4.5, 5.0],
        "neg": ["bad", "worse", "worst"],
        "neg_ids": ["d-bad", "d-worse", "d-worst"],
        "neg_scores": [1.0, None, 2.0],
        "query_id": "q1",
        "task": "biology",
        "source_doc_id": "d0",
        "split": "train",
    }


def test_sentence_transformers_gets_columns_for_every_positive(tmp_path):
    few = sample("q2", negatives=sample()["negatives"][1:])
    samples = artifact(tmp_path, [sample(), few])
    written = export(samples, tmp_path / "st.parquet", "sentence-transformers")
    assert (written.samples, written.rows) == (2, 4)
    assert "2 negatives (a sample has 2 at least" in written.note
    table = pq.read_table(tmp_path / "st.parquet")
    assert table.column_names == ["anchor", "positive", "negative_1", "negative_2"]
    assert [list(row.values()) for row in table.to_pylist()] == [
        ["Find.|query q1", "good", "bad", "worse"],
        ["Find.|query q1", "better", "bad", "worse"],
        ["Find.|query q2", "good", "worse", "worst"],
        ["Find.|query q2", "better", "worse", "worst"],
    ]
    export(samples, tmp_path / "one.parquet", "sentence-transformers", max_negatives=1)
    assert pq.read_schema(tmp_path / "one.parquet").names[2:] == ["negative_1"]


def test_datasets_loads_what_sentence_transformers_gets(tmp_path):
    datasets = pytest.importorskip("datasets")
    export(artifact(tmp_path, [sample()]), tmp_path / "st.parquet", "sentence-transformers")
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "st.parquet"), cache_dir=str(tmp_path / "cache")
    )["train"]
    assert loaded.column_names[:3] == ["anchor", "positive", "negative_1"]
    assert loaded[1]["positive"] == "better"


@pytest.mark.parametrize(("split", "expected"), [("train", ["a"]), ("held_out", ["b"])])
def test_only_the_split_that_is_asked_for_is_written(tmp_path, split, expected):
    samples = artifact(tmp_path, [sample("a"), sample("b", split=HELD_OUT)])
    export(samples, tmp_path / "out.jsonl", "flagembedding", split=split)
    assert [row["query_id"] for row in read(tmp_path / "out.jsonl", "flagembedding")[0]] == expected


def test_export_refuses_what_it_would_overwrite_and_what_is_empty(tmp_path):
    samples = artifact(tmp_path, [sample()])
    (tmp_path / "there").write_text("mine")
    with pytest.raises(ConfigError, match="there exists"):
        export(samples, tmp_path / "there", "parquet")
    assert (tmp_path / "there").read_text() == "mine"
    with pytest.raises(ConfigError, match="no samples of the split held_out"):
        export(samples, tmp_path / "new", "parquet", split="held_out")


@pytest.mark.parametrize("form", ["parquet", "reasonembed", "flagembedding"])
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, form):
    samples = artifact(tmp_path, [sample("a"), sample("b")])
    tables = list(samples.parts())

    def broken(self):
        yield tables[0]
        yield tables[0]  # after the pass that counts
        raise OSError("disk full")

    made = []
    monkeypatch.setattr(
        formats._Selection,
        "tables",
        lambda self: iter(tables) if not made and (made.append(1) or True) else broken(self),
    )
    with pytest.raises(OSError, match="disk full"):
        export(samples, tmp_path / "out" / "file", form)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("form", ["parquet", "reasonembed"])
def test_what_a_killed_export_has_left_is_not_shipped(tmp_path, form):
    samples = artifact(tmp_path, [sample("a"), sample("b")])
    left = tmp_path / ".out-partial"
    left.mkdir()
    (left / "gone-formatted.jsonl").write_text("{}")
    export(samples, tmp_path / "out", form)
    assert not left.exists()
    assert form == "parquet" or len(list((tmp_path / "out").iterdir())) == 1


# ---- reading what others have written -------------------------------------------------------


def test_the_released_form_is_read_as_it_is(tmp_path):
    extra = {"train_group_size": 16, "batch_size": 8}
    write_lines(tmp_path / "biology-formatted.jsonl", LINE | extra, LINE | {"query": "other"})
    with gzip.open(tmp_path / "pony-formatted.jsonl.gz", "wb") as stream:
        stream.write(b"\xef\xbb\xbf" + json.dumps(LINE).encode() + b"\n\n")  # a BOM, a blank line
    (first, second, third), places = read(tmp_path, "reasonembed")
    assert first | {"query_id": ""} == {
        "query_id": "",
        "task": "biology",
        "instruction": "Find.",
        "query": "q",
        "rewritten_query": "q'",
        "positives": [
            {"doc_id": text_hash(t), "text": t, "label": None, "text_hash": text_hash(t)}
            for t in "ab"
        ],
        "negatives": [
            {"doc_id": text_hash("c"), "text": "c", "label": None, "text_hash": text_hash("c")}
        ],
        "source_doc_id": None,
        "split": TRAIN,
    }
    assert (second["task"], third["task"]) == ("biology", "pony")
    assert len({first["query_id"], second["query_id"], third["query_id"]}) == 3
    assert places[1] == f"{tmp_path / 'biology-formatted.jsonl'} line 2"


def test_a_query_that_is_repeated_keeps_all_its_samples_and_ids_are_stable(tmp_path):
    file = write_lines(tmp_path / "pony-formatted.jsonl", LINE, LINE | {"pos": ["z"]}, LINE)
    found, _ = read(file, "reasonembed")
    ids = [row["query_id"] for row in found]
    assert ids == [ids[0], f"{ids[0]}-2", f"{ids[0]}-3"]
    assert read(file, "reasonembed")[0] == found


def test_without_a_rewritten_query_the_query_stands_for_it(tmp_path):
    line = {"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [5], "neg_scores": [1.5]}
    file = write_lines(tmp_path / "x.jsonl", line, line | {"query": "p", "prompt": "Own."})
    (first, second), _ = read(file, "flagembedding", task="pony")
    assert first["rewritten_query"] == first["query"] == "q"
    assert first["instruction"] == tasks.get("pony").instruction
    assert second["instruction"] == "Own."
    assert (first["positives"][0]["label"], first["negatives"][0]["label"]) == (5.0, 1.5)


def test_samples_without_a_split_are_held_out_by_document_or_else_by_query(tmp_path):
    lines = [LINE | {"query": f"query {i}"} for i in range(40)]
    lines += [LINE | {"query": f"variant {i}", "source_doc_id": f"d{i % 10}"} for i in range(40)]
    lines.append(LINE | {"query": "fixed", "split": "held_out"})
    file = write_lines(tmp_path / "pony-formatted.jsonl", *lines)
    found, _ = read(file, "reasonembed", share=0.3)
    splits = [row["split"] for row in found]
    assert splits[:40] == [split_of(text_hash(f"query {i}"), 0.3) for i in range(40)]
    assert splits[40:50] == splits[50:60] == splits[60:70] == splits[70:80]
    assert {*splits[:40]} == {*splits[40:80]} == {TRAIN, HELD_OUT}
    assert splits[-1] == HELD_OUT
    assert {row["split"] for row in read(file, "reasonembed")[0][:-1]} == {TRAIN}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": None}, "query must be a text, not missing"),
        ({"query": "  "}, "query is blank"),
        ({"reasoning_query": None}, "reasoning_query must be a text"),
        ({"prompt": None}, "prompt must be a text"),
        ({"pos": []}, r"pos must be a list of texts, one at least; it is \[\]"),
        ({"neg": "text"}, "neg must be a list of texts"),
        ({"neg": ["a", 3]}, "neg must be a text, not 3"),
        ({"pos_scores": [1]}, "pos_scores must be a list as long as its texts, 2"),
        ({"pos_scores": [1, "5"]}, "pos_scores must hold numbers, not '5'"),
        ({"pos_scores": [1, float("nan")]}, "pos_scores must hold numbers, not nan"),
        ({"split": "test"}, "split is 'test', not train or held_out"),
        ({"pos": ["a", "\ud800"]}, "pos holds half of a surrogate pair"),
    ],
)
def test_a_row_of_bad_form_is_an_error_with_file_and_line(tmp_path, change, message):
    file = write_lines(tmp_path / "pony-formatted.jsonl", LINE, LINE | change)
    with pytest.raises(SchemaError, match=f"pony-formatted.jsonl line 2: .*{message}"):
        read(file, "reasonembed")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n{oops\n", "line 2: no JSON"),
        (b'{"query": "\xff"}\n', "line 1: no JSON"),
        (b"[1]\n", "line 1: a JSON object is needed, this is list"),
    ],
)
def test_a_line_that_is_no_object_is_an_error_with_its_number(tmp_path, content, message):
    (tmp_path / "pony-formatted.jsonl").write_bytes(content)
    with pytest.raises(SchemaError, match=message):
        read(tmp_path, "reasonembed")


def test_a_reasoning_query_is_not_thrown_away_by_the_wrong_form(tmp_path):
    file = write_lines(tmp_path / "pony-formatted.jsonl", LINE)
    with pytest.raises(SchemaError, match=r"line 1: .*set form: reasonembed"):
        read(file, "flagembedding")


def test_a_torn_archive_is_an_error_that_names_it(tmp_path):
    file = tmp_path / "pony-formatted.jsonl.gz"
    file.write_bytes(gzip.compress((json.dumps(LINE) + "\n").encode() * 1000)[:60])
    with pytest.raises(SchemaError, match=r"pony-formatted\.jsonl\.gz cannot be read"):
        read(file, "reasonembed")


def test_the_task_comes_from_the_row_the_configuration_or_the_name(tmp_path):
    own = write_lines(tmp_path / "own.jsonl", LINE | {"task": "another"})
    assert read(own, "reasonembed", task="pony")[0][0]["task"] == "another"
    named = write_lines(tmp_path / "pony-formatted.jsonl", LINE)
    assert read(named, "reasonembed", task="biology")[0][0]["task"] == "biology"
    nameless = write_lines(tmp_path / "data.jsonl", LINE)
    with pytest.raises(ConfigError, match=r"data\.jsonl tells no task: set task in assemble"):
        read(nameless, "reasonembed")
    with pytest.raises(ConfigError, match="there is no task 'ponies'"):
        read(nameless, "reasonembed", task="ponies")
    bare = write_lines(tmp_path / "bare.jsonl", {k: LINE[k] for k in ("query", "pos", "neg")})
    bare.write_text(bare.read_text().replace("}", ', "task": "another"}'))
    with pytest.raises(ConfigError, match="no prompt, and there is no task 'another'"):
        read(bare, "flagembedding")


def test_a_path_with_nothing_to_read_is_an_error(tmp_path):
    for form in ("parquet", "reasonembed", "flagembedding"):
        for path in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ConfigError, match="is no file and no folder with files that end"):
                read(path, form)
    with pytest.raises(ConfigError, match="holds no finished samples"):
        read(tmp_path, "run")


def test_samples_of_a_stage_that_was_killed_are_not_taken_for_all(tmp_path):
    samples = Artifact.declared(tmp_path / "samples", "samples")
    SampleWriter(samples).write([Placed("a", sample())], name="samples")
    with pytest.raises(ConfigError, match="no finished samples"):
        finished_samples(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": []}, "row 1: a sample needs positives and negatives"),
        ({"split": "dev"}, "row 1: split is 'dev'"),
    ],
)
def test_parquet_rows_that_cannot_be_trained_on_are_errors(tmp_path, change, message):
    rows = [sample("a"), sample("b") | change]
    pq.write_table(from_rows(rows, SAMPLES, where="test"), tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=message):
        read(tmp_path, "parquet")


def test_parquet_of_other_columns_or_none_is_an_error_that_names_the_file(tmp_path):
    pq.write_table(pa.table({"query": ["q"]}), tmp_path / "x.parquet")
    with pytest.raises(SchemaError, match=r"x\.parquet: missing columns"):
        read(tmp_path, "parquet")
    (tmp_path / "x.parquet").write_text("not Parquet")
    with pytest.raises(SchemaError, match=r"x\.parquet cannot be read as Parquet"):
        read(tmp_path, "parquet")


# ---- the stage and the command --------------------------------------------------------------


def run_of(folder, *sources, **assemble):
    data = {
        "run_dir": str(folder),
        "corpus": {"source": "unused.jsonl"},
        "mine": {"encoder": {"model": "unused"}},
        "assemble": {"sources": list(sources), **assemble},
        "train": {"encoder": {"model": "unused"}, "group_size": 3},
    }
    for stage in ("generate", "annotate", "rewrite"):
        data[stage] = {"llm": {"model": "unused"}}
    return Run(parse(data, where="test"))


def assemble_stage(run):
    said = io.StringIO()
    return assemble.run(Job(run, Reporter(Console(file=said, width=200)))), said.getvalue()


def test_the_stage_takes_samples_from_several_sources_and_finishes_once(tmp_path):
    released = write_lines(tmp_path / "pony-formatted.jsonl", LINE, LINE | {"query": "two"})
    bare = write_lines(tmp_path / "bare.jsonl", {"query": "x", "pos": ["a"], "neg": ["c"]})
    run = run_of(
        tmp_path / "run",
        {"path": str(released), "form": "reasonembed"},
        {"path": str(bare), "form": "flagembedding", "task": "biology"},
    )
    counts, said = assemble_stage(run)
    expected = {"sample": 3, "train": 3, "held out": 0}
    assert expected.items() <= counts.items()
    first, second = said.splitlines()
    assert first.endswith("2 samples from " + str(released))
    assert second.endswith("all intensities are 1 and the loss is plain InfoNCE")
    assert (
        finished_samples(run.dir).read(columns=["task"]).column("task").to_pylist().count("pony")
        == 2
    )
    commits = run.artifact("samples").commits()
    assert assemble_stage(run) == (counts, "")
    assert run.artifact("samples").commits() == commits

    write_lines(released, LINE)  # other samples in the same place
    with pytest.raises(DriftError, match=r"source\.0\.content"):
        assemble_stage(run)


def test_a_run_as_a_source_is_known_by_its_samples_not_by_its_logs(tmp_path):
    made = write_lines(tmp_path / "pony-formatted.jsonl", LINE)
    first = run_of(tmp_path / "first", {"path": str(made), "form": "reasonembed"})
    assemble_stage(first)
    second = run_of(tmp_path / "second", {"path": str(first.dir)})
    assert assemble_stage(second)[0]["sample"] == 1
    (first.dir / "timeline.jsonl").write_text("{}")
    assert assemble_stage(second)[1] == ""
    assert second.artifact("samples").read() == first.artifact("samples").read()

    twice = run_of(tmp_path / "third", {"path": str(first.dir)}, {"path": str(second.dir)})
    with pytest.raises(ConfigError, match=r"is in .*first row 0 and in .*second row 0"):
        assemble_stage(twice)


def test_a_source_without_samples_is_an_error(tmp_path):
    empty = write_lines(tmp_path / "pony-formatted.jsonl")
    run = run_of(tmp_path / "run", {"path": str(empty), "form": "reasonembed"})
    with pytest.raises(QualityError, match=r"pony-formatted\.jsonl holds no sample"):
        assemble_stage(run)
    assert run.artifact("samples").finished() is None


def test_the_command_writes_the_form_that_is_asked_for(tmp_path):
    run = run_of(tmp_path)
    artifact(tmp_path, [sample("a"), sample("b", split=HELD_OUT)])
    run.save_config()
    out = tmp_path / "st.parquet"
    command = ["samples", str(tmp_path), "--form", "sentence-transformers", "--out", str(out)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith("1 samples, 2 rows:")
    rows = pq.read_table(out).to_pylist()
    assert rows[0] == {
        "anchor": "Instruct: Find.\nQuery: query a",
        "positive": "good",
        "negative_1": "bad",
        "negative_2": "worse",
    }
