from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from reasonembed.cli import app
from reasonembed.errors import EXIT_CONFIG, EXIT_FAILED, EvaluationError, explain
from reasonembed.evaluation.score import score_files, write_per_query

RUN = """\
q1 Q0 a 1 3.0 t
q1 Q0 b 2 2.0 t
q1 Q0 c 3 2.0 t
q3 Q0 a 1 1.0 t
"""
QRELS = "q1 0 b 1\nq1 0 a 0\nq2 0 a 1\nq3 0 a 0\n"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    (tmp_path / "run[1].trec").write_text(RUN)
    (tmp_path / "qrels.txt").write_text(QRELS)
    (tmp_path / "excluded.txt").write_text("q1 a\nq3 z\n")
    return [str(tmp_path / "run[1].trec"), str(tmp_path / "qrels.txt")]


def score(*arguments: object):
    return CliRunner().invoke(app, ["evaluate", "score", *map(str, arguments)])


def test_the_table_and_what_must_be_known_beside_it(files):
    shown = score(*files, "--metrics", "ndcg@10,recall@1,recall@7,recip_rank")
    assert shown.exit_code == 0
    assert shown.output.splitlines() == [
        files[0],
        "                 @1       @7      @10",
        "ndcg                          0.16667",  # c wins the tie, so b is third: 1 / log2(4) / 3
        "recall      0.00000  0.33333         ",
        "recip_rank  0.11111",
        "queries: 3, every mean is over all of them",
        "missing: 1 (q2) not in the run, counted 0",
        "without a relevant document: 1 (q3), counted 0",
        "ties: 1 of 4 documents (equal as float32; ordered by document id, descending, as "
        "trec_eval does)",
    ]


def test_excluded_documents_are_removed_first(files, tmp_path):
    shown = score(*files, "--excluded", tmp_path / "excluded.txt", "--json")
    found = json.loads(shown.output)
    assert found["removed"] == 1
    assert found["metrics"]["recip_rank"] == 1 / 2 / 3
    assert (found["queries"], found["missing"], found["documents"]) == (3, ["q2"], 3)
    assert len(found["metrics"]) == 25
    printed = score(*files, "--excluded", tmp_path / "excluded.txt").output
    assert "excluded: 1 documents removed from the run" in printed


@pytest.mark.parametrize("name", ["per-query.tsv", "per-query.json"])
def test_figures_of_each_query_are_unrounded(files, tmp_path, name):
    file = tmp_path / name
    assert score(*files, "--metrics", "recip_rank,p@3", "--per-query", file).exit_code == 0
    if name.endswith(".json"):
        found = json.loads(file.read_text())
    else:
        header, *rows = (line.split("\t") for line in file.read_text().splitlines())
        found = {row[0]: dict(zip(header[1:], map(float, row[1:]), strict=True)) for row in rows}
    zeros = {"recip_rank": 0.0, "p@3": 0.0}
    assert found == {"q1": {"recip_rank": 1 / 3, "p@3": 1 / 3}, "q2": zeros, "q3": zeros}


def test_many_missing_queries_are_not_all_named(tmp_path):
    (tmp_path / "run.json").write_text('{"q0": {"d": 1}}')
    (tmp_path / "qrels.txt").write_text("".join(f"q{one} 0 d 1\n" for one in range(9)))
    shown = score(tmp_path / "run.json", tmp_path / "qrels.txt").output
    assert "missing: 8 (q1, q2, q3, q4, q5, …) not in the run" in shown
    complete = score(tmp_path / "run.json", tmp_path / "run.json").output
    assert "missing: none" in complete


@pytest.mark.parametrize(
    ("run", "options", "message", "code"),
    [
        (
            "qx Q0 a 1 1 t\n",
            [],
            "queries of the run are not in the qrels, such as 'qx'",
            EXIT_FAILED,
        ),
        ("q1 Q0 a 1 nan t\n", [], "line 1: expected", EXIT_FAILED),
        (RUN + RUN, [], "document 'a' stands twice for query 'q1'", EXIT_FAILED),
        (RUN, ["--metrics", "ndcg"], "unknown metric 'ndcg'", EXIT_CONFIG),
        (RUN, ["--excluded", "nowhere"], "nowhere cannot be read", EXIT_FAILED),
        (RUN, ["--per-query", "nowhere/x.tsv"], "cannot be written", EXIT_FAILED),
    ],
)
def test_bad_input_is_one_message_and_an_exit_code(files, run, options, message, code):
    Path(files[0]).write_text(run)
    found = score(*files, *options)
    shown, exit_code = explain(found.exception)
    assert message in shown
    assert exit_code == code


def test_excluded_gold_is_refused_by_name(files, tmp_path):
    (tmp_path / "excluded.txt").write_text("q1 b\n")
    with pytest.raises(EvaluationError, match=r"'q1' .* gold and excluded: \['b'\]"):
        score_files(Path(files[0]), Path(files[1]), excluded=tmp_path / "excluded.txt")


def test_exclusions_of_queries_that_are_nowhere_are_refused(files, tmp_path):
    (tmp_path / "excluded.txt").write_text("q1 a\nQ3 z\nQ9 z\n")
    message = r"2 of its 3 query ids are neither in .*qrels\.txt nor in .*, such as \['Q3', 'Q9'\]"
    with pytest.raises(EvaluationError, match=message):
        score_files(Path(files[0]), Path(files[1]), excluded=tmp_path / "excluded.txt")


def test_a_mark_of_windows_before_a_file_is_no_part_of_an_id(files, tmp_path):
    plain = score_files(Path(files[0]), Path(files[1]), excluded=tmp_path / "excluded.txt")
    marked = [*map(Path, files), tmp_path / "excluded.txt"]
    for file in marked:
        file.write_text(file.read_text(), encoding="utf-8-sig")
    assert score_files(marked[0], marked[1], excluded=marked[2]) == plain


def test_a_query_id_with_a_tab_is_not_written_between_tabs(tmp_path):
    with pytest.raises(EvaluationError, match=r"name the file \.json"):
        write_per_query({"q\t1": {"p@1": 0.0}}, tmp_path / "x.tsv")
