from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.runs import from_table, read_trec, to_table, write_trec
from reasonembed.schemas import RUNS

IDS = st.text(st.characters(codec="utf-8"), min_size=1).filter(lambda text: text.split() == [text])
FLOATS = st.floats(allow_nan=False, allow_infinity=False, width=32)
RUN = st.dictionaries(IDS, st.dictionaries(IDS, FLOATS, min_size=1, max_size=5), max_size=4)


@settings(deadline=None)
@given(run=RUN)
def test_trec_files_and_tables_keep_ids_scores_and_order(run, tmp_path_factory):
    file = tmp_path_factory.mktemp("runs") / "run.txt"
    write_trec(run, file, tag="ours")
    back = read_trec(file)
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
    [("q 1", "d", "t"), ("q", "d\t", "t"), ("q", "", "t"), ("q", "d", "a b")],
)
def test_white_space_in_ids_is_refused(tmp_path: Path, query_id: str, doc_id: str, tag: str):
    with pytest.raises(EvaluationError, match="cannot stand in a TREC run file"):
        write_trec({query_id: {doc_id: 1.0}}, tmp_path / "run.txt", tag=tag)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 d 1 1.0\n", "line 1: expected"),
        ("q Q0 d 1 high t\n", "line 1: expected"),
        ("q Q0 d 1 1.0 t\nq Q0 e 2 nan t\n", "line 2: expected"),
        ("q Q0 d 1 1.0 t\n\nq Q0 d 2 0.5 t\n", "line 3: document 'd' stands twice"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: str, message: str):
    (tmp_path / "run.txt").write_text(content)
    with pytest.raises(EvaluationError, match=message):
        read_trec(tmp_path / "run.txt")


def test_a_table_with_a_document_twice_is_refused():
    table = to_table({"q": {"a": 1.0}})
    twice = table.set_column(1, RUNS.field("doc_ids"), [[["a", "a"]]])
    with pytest.raises(EvaluationError, match="'q' stands twice, or holds a document twice"):
        from_table(twice)
