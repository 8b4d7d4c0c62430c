from types import SimpleNamespace

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from reasonembed.cli import app
from reasonembed.errors import ConfigError
from reasonembed.report import blame as room
from reasonembed.report.blame import blame, blame_lines, trained_queries
from tests.report.small_run import Builder


@pytest.fixture(scope="module")
def samples(whole):
    return {row["query_id"]: row for row in whole.run.artifact("samples").read().to_pylist()}


def test_the_nearest_samples_come_first_with_what_they_taught(whole, samples):
    found = blame(whole.run, "e1")
    assert [one.similarity for one in found] == pytest.approx([0.9, 0.5])
    for one in found:
        row = samples[one.query_id]
        assert (one.query, one.source_doc_id) == (row["query"], row["source_doc_id"])
        assert one.positives == {part["doc_id"]: part["label"] for part in row["positives"]}
        assert one.part_of(row["positives"][0]["doc_id"]) == "positive"
        assert one.part_of(row["negatives"][0]["doc_id"]) == "negative"
        assert one.part_of(row["source_doc_id"]) == "source"
        assert one.part_of("nowhere") == ""


def test_what_came_back_stands_beside_what_was_learnt(whole, samples):
    said = "\n".join(blame_lines(whole.run, "e0"))
    assert "asked 0 plain" in said
    assert "  1      2.0000  d0  [gold, 1]" in said and "  2      1.0000  d5" in said
    nearest = blame(whole.run, "e0")[0]
    assert f"0.9000   {nearest.query_id}" in said and nearest.query in said
    assert "d0, which came back as number 1, was its positive" in said


def test_gold_that_did_not_come_back_is_named(whole):
    said = "\n".join(blame_lines(whole.run, "e1"))
    assert "returned   0 documents" in said and "-      gold: d1" in said


def test_the_command_prints_it(whole):
    whole.run.save_config()
    done = CliRunner().invoke(app, ["blame", str(whole.run.dir), "e2"])
    assert done.exit_code == 0 and "closest    2 training samples" in done.output


def test_mistakes_name_the_cure(whole, tmp_path):
    with pytest.raises(ConfigError, match=r"asks no query 'q-1'.*`trace`"):
        blame(whole.run, "q-1")
    builder = Builder(tmp_path).make("corpus")
    with pytest.raises(ConfigError, match="not evaluated yet"):
        blame(builder.run, "e0")
    builder.run.directory("evaluate").begin({})
    builder.run.directory("evaluate").finish({})
    with pytest.raises(ConfigError, match="--from evaluate --fresh"):
        blame(builder.run, "e0")


def test_held_out_samples_are_no_training_queries(whole, samples, monkeypatch):
    artifact = whole.run.artifact("samples")
    assert set(trained_queries(artifact).column("query_id").to_pylist()) == set(samples)
    monkeypatch.setattr(room, "TRAIN", "held_out")
    assert trained_queries(artifact).num_rows == 0


def test_however_many_samples_there_are_all_are_compared():
    rows = [
        {"query_id": f"q{n}", "query": f"why {n}", "instruction": "", "split": "train"}
        for n in range(82_000)
    ]
    table = pa.Table.from_pylist(rows)
    assert trained_queries(SimpleNamespace(read=table.select)).num_rows == 82_000
