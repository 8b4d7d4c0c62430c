from __future__ import annotations

import json
from pathlib import Path

import pytest

from reasonembed import tasks
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.datasets import Collection, load_collection


def make_collection(**changes) -> Collection:
    fields = {
        "name": "small",
        "queries": {"q1": "why?", "q2": "how?"},
        "qrels": {"q1": {"d1": 1}, "q2": {"d2": 2, "d3": 1}},
        "excluded": {"q1": frozenset({"d9"})},
        "task": "generic",
        "instruction": "Find help.",
        "corpus_source": None,
    }
    return Collection(**(fields | changes))


def write_beir(folder: Path, **changes: str) -> Path:
    contents = {
        "queries.jsonl": '{"_id": "q1", "text": "why?"}\n{"_id": "train-only", "text": "x"}\n',
        "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td 2\t1\nq1\td3\t0\n",
    }
    for name, content in (contents | changes).items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
    return folder


def test_beir_folder(tmp_path: Path):
    excluded = json.dumps({"query_id": "q1", "excluded_ids": ["d3", "d7"]})
    folder = write_beir(tmp_path / "set", **{"excluded.jsonl": excluded, "corpus.jsonl": ""})
    collection = load_collection(str(folder), task=tasks.get("biology"))
    assert collection.name == "set"
    assert collection.queries == {"q1": "why?"}
    assert collection.qrels == {"q1": {"d1": 2, "d 2": 1}}
    assert collection.excluded == {"q1": frozenset({"d3", "d7"})}
    assert (collection.task, collection.corpus_source) == ("biology", str(folder))
    assert collection.instruction.startswith("Given a Biology post")


def test_a_folder_without_corpus_says_so(tmp_path: Path):
    assert load_collection(str(write_beir(tmp_path))).corpus_source is None


def test_a_row_of_relevance_zero_is_not_gold(tmp_path: Path):
    write_beir(tmp_path, **{"qrels/test.tsv": "q1\td1\t0\n"})
    with pytest.raises(EvaluationError, match="'q1' needs gold documents"):
        load_collection(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", "q1 d1 1\n", r"test.tsv, line 1: expected query-id"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t1\n", "line 2: 'd1' stands there twice"),
        ("qrels/test.tsv", "q1\td1\t0.5\n", "whole-number score"),
        ("qrels/test.tsv", "q1\td1\t1\nq8\td1\t1\n", r"1 query ids of the qrels .*\['q8'\]"),
        ("queries.jsonl", "{", "queries.jsonl, line 1: not JSON"),
        ("queries.jsonl", "[]", "line 1: expected an object"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}', "'text' must be a string"),
        ("queries.jsonl", '{"_id": 7, "text": "x"}', "'_id' must be a string .* got 7"),
        ("excluded.jsonl", '{"query_id": "q1", "excluded_ids": "d1"}', "must be a list of ids"),
        ("excluded.jsonl", '{"query_id": "q1", "excluded_ids": ["d1"]}', "gold and excluded"),
    ],
)
def test_malformed_folders_are_named(tmp_path: Path, file: str, content: str, message: str):
    write_beir(tmp_path, **{file: content})
    with pytest.raises(EvaluationError, match=message):
        load_collection(str(tmp_path))


def test_a_missing_file_and_an_unknown_name_are_named(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"test\.tsv cannot be read"):
        load_collection(str(tmp_path))
    with pytest.raises(EvaluationError, match="no collection 'nowhere'"):
        load_collection("nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qrels": {"q1": {"d1": 1}}}, "'q2' needs gold"),
        ({"qrels": {"q1": {"d1": 0}, "q2": {"d2": 1}}}, "'q1' needs gold"),
        ({"excluded": {"q2": frozenset({"d3"})}}, r"gold and excluded: \['d3'\]"),
        ({"excluded": {"q3": frozenset({"d1"})}}, r"1 query ids of the exclusions .*'q3'"),
    ],
)
def test_contradictions_are_refused(changes, message: str):
    with pytest.raises(EvaluationError, match=message):
        make_collection(**changes)


def test_the_corpus_must_hold_all_gold():
    make_collection().check_against(["d1", "d2", "d3"])
    with pytest.raises(EvaluationError, match=r"1 gold documents .* \['d2'\]"):
        make_collection().check_against(["d1", "d3", "d9"])


def test_twins_of_gold_are_credited_unless_excluded():
    twins = {"d1": ["d1", "d9", "d10"], "d2": ["d2"], "d3": ["d3", "d30"]}
    credited = make_collection().credit_duplicates(twins.__getitem__)
    assert credited.qrels == {"q1": {"d1": 1, "d10": 1}, "q2": {"d2": 2, "d3": 1, "d30": 1}}
    assert credited.name != make_collection().name
