from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reasonembed.errors import EvaluationError, SchemaError
from reasonembed.evaluation.runs import (
    from_table,
    read_run,
    to_table,
    without_excluded,
    write_both,
    write_run,
    write_trec,
)
from reasonembed.schemas import RUNS

IDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(
    lambda text: text.encode().split() == [text.encode()] and text != "#"
)
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
RUN = st.dictionaries(IDS, st.dictionaries(IDS, FLOATS, min_size=1, max_size=5), max_size=4)


@settings(deadline=None)
@given(run=RUN)
@example(run={"{": {"{}": 0.0}})
def test_trec_files_and_tables_keep_ids_scores_and_order(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("runs") / "run.txt"
    write_trec(run, file, tag="ours")
    back = read_run(file)
    assert back == run
    table = to_table(run)
    assert table.schema == RUNS
    assert from_table(table) == run
    for scores in back.values():
        assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_lines_have_the_six_columns(tmp_path: Path):
    write_trec({"q/1": {"b": 1.0, "a": 2.5, "c": 1.0}}, tmp_path / "run.txt", tag="ours")
    assert (tmp_path / "run.txt").read_text().splitlines() == [
        "q/1 Q0 a 1 2.5 ours",
        "q/1 Q0 b 2 1.0 ours",
        "q/1 Q0 c 3 1.0 ours",
    ]


@pytest.mark.parametrize(
    ("query_id", "doc_id", "tag"),
    [("#", "d", "t"), ("q 1", "d", "t"), ("q", "d\t", "t"), ("q", "", "t"), ("q", "d", "a b")],
)
def test_white_space_in_ids_is_refused(tmp_path: Path, query_id: str, doc_id: str, tag: str):
    with pytest.raises(EvaluationError, match="cannot stand in a TREC run file"):
        write_trec({query_id: {doc_id: 1.0}}, tmp_path / "run.txt", tag=tag)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 my doc 1 1.0 t\n", "line 1: expected"),
        ("q Q0 d 1 1.0\n", "line 1: expected"),
        ("q Q0 page 3 1 0.5 t\n", "line 1: expected .*; ids with blanks need tabs"),
        ("q Q0 d 1 high t\n", "line 1: expected"),
        ("q Q0 d 1 1.0 t\nq Q0 e 2 nan t\n", "line 2: expected"),
        ("q Q0 d 1 1.0 t\n\nq Q0 d 2 0.5 t\n", "line 3: document 'd' stands twice"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: str, message: str):
    (tmp_path / "run.txt").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read_run(tmp_path / "run.txt")


def test_a_table_with_a_document_twice_is_refused():
    table = to_table({"q": {"a": 1.0}})
    twice = table.set_column(1, RUNS.field("doc_ids"), [[["a", "a"]]])
    with pytest.raises(EvaluationError, match="'q' stands twice, or holds a document twice"):
        from_table(twice)


# Slashes, quotes, other scripts, a non-breaking blank, and what begins JSON.
ODD = {
    "q/1": {"leetcode/leetcode_1.txt": 2.5, 'l\u2019h\u00f4pital"s': 2.5, "a\u00a0b": -1.0},
    "{q2": {"\u5b9a\u7406": 0.125},
}


@pytest.mark.parametrize(
    "name", ["run.trec", "run.trec.gz", "run.parquet", "run.json", "run.json.gz"]
)
def test_every_form_is_recognised_and_keeps_odd_ids(tmp_path: Path, name: str):
    file = tmp_path / name
    if ".json" in name:
        text = json.dumps(ODD).encode()
        file.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    else:
        write_run(ODD, file, tag="ours")
    assert read_run(file) == ODD
    renamed = file.rename(tmp_path / "of-others")  # by content alone, but for an id that misleads
    if "trec" not in name:
        assert read_run(renamed) == ODD


def test_packed_files_are_equal_for_equal_runs(tmp_path: Path):
    for name in ("one.trec.gz", "two.trec.gz"):
        write_run(ODD, tmp_path / name, tag="t")
    assert (tmp_path / "one.trec.gz").read_bytes() == (tmp_path / "two.trec.gz").read_bytes()


def test_tabs_let_ids_hold_blanks(tmp_path: Path):
    file = tmp_path / "results.test"
    file.write_text("# made by hand\nq 1\tQ0\td 1\t1\t  2.5\tt\r\nq2 Q0 d 1 2 t\n")
    assert read_run(file) == {"q 1": {"d 1": 2.5}, "q2": {"d": 2.0}}


def test_a_run_whose_ids_no_trec_file_can_hold_is_kept_as_a_table(tmp_path: Path, caplog):
    table, trec = tmp_path / "run.parquet", tmp_path / "run.trec"
    assert write_both({"q": {"d": 1.0}}, table, trec, tag="t") == {}
    assert read_run(trec) == read_run(table) == {"q": {"d": 1.0}}
    trec.unlink()
    named = {"q": {"A title": 1.0}}
    notes = write_both(named, table, trec, tag="t")
    assert "'A title' cannot stand in a TREC run file" in notes["no_trec_file"]
    assert read_run(table) == named and not trec.exists()
    assert "run.trec is not written" in caplog.text


def test_numpy_and_integer_scores_are_written_as_numbers(tmp_path: Path):
    write_trec({"q": {"a": np.float32(0.1), "b": 0}}, tmp_path / "run.txt", tag="t")
    assert read_run(tmp_path / "run.txt") == {"q": {"a": float(np.float32(0.1)), "b": 0.0}}
    with pytest.raises(EvaluationError, match="score nan is not finite"):
        write_trec({"q": {"a": np.nan}}, tmp_path / "run.txt", tag="t")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", b'{"q": {"d": 1, "d": 2}}', "'d' stands twice in one object"),
        ("r.json", b'{"q": {"d": 1}, "q": {"d": 2}}', "'q' stands twice"),
        ("r.json", b'{"q": {"d": "1"}}', "r.json: query 'q', document 'd': score '1' is not a num"),
        ("r.json", b'{"q": {"d": null}}', "score None is not a number"),
        ("r.json", b'{"q": {"d": true}}', "score True is not a number"),
        ("r.json", b'{"q": {"d": NaN}}', "score nan is not finite"),
        ("r.json", b'{"q": ["d"]}', "expected JSON of"),
        ("r.json", b'["q"]', "expected JSON of"),
        ("r.json", b'{"q": {"d": 1', "not JSON, or cut off"),
        ("r.trec.gz", gzip.compress(b"q Q0 d 1 1.0 t\n" * 99)[:-9], "damaged or cut off"),
        ("r.parquet", b"PAR1 and no more", "damaged or cut off"),
        ("r.parquet", b"q Q0 d 1 1.0 t\n", "no Parquet file"),
        ("r.trec", b"\xff Q0 d 1 1.0 t\n", "not UTF-8"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(EvaluationError, match=message):
        read_run(tmp_path / name)


def test_a_missing_file_and_an_unknown_form_are_named(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"nowhere\.trec cannot be read"):
        read_run(tmp_path / "nowhere.trec")
    with pytest.raises(EvaluationError, match=r"runs are written as \.parquet or as"):
        write_run({}, tmp_path / "run.csv", tag="t")


def test_a_parquet_file_with_other_columns_is_refused(tmp_path: Path):
    import pyarrow.parquet as pq

    pq.write_table(to_table({"q": {"d": 1.0}}).drop_columns("scores"), tmp_path / "run.parquet")
    with pytest.raises(SchemaError, match="scores"):
        read_run(tmp_path / "run.parquet")


def test_excluded_documents_leave_the_run():
    run = {"q1": {"a": 3.0, "b": 2.0}, "q2": {"a": 1.0}}
    qrels = {"q1": {"b": 1, "a": 0}, "q2": {"a": 1}}
    assert without_excluded(run, qrels, {"q1": frozenset({"a", "z"})}) == (
        {"q1": {"b": 2.0}, "q2": {"a": 1.0}},
        1,
    )
    with pytest.raises(EvaluationError, match=r"'q2' has documents that are gold and excluded"):
        without_excluded(run, qrels, {"q2": frozenset({"a"})})
