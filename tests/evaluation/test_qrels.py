from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.qrels import gold_of, read_excluded, read_qrels

JUDGED = {"q/1": {"d\u2019\u00f4": 2, 'say "x"': 0}, "q2": {"a\u00a0b": -1, "c": 1}}
ROWS = [(query, doc, level) for query, judged in JUDGED.items() for doc, level in judged.items()]
BEIR = "".join(f"{query}\t{doc}\t{level}\n" for query, doc, level in ROWS)
JSON_LINES = "".join(
    json.dumps({"query_id": query, "doc_id": doc, "relevance": level}) + "\n"
    for query, doc, level in ROWS
)
TREC = "".join(f"{query}\t0\t{doc}\t{level}\n" for query, doc, level in ROWS)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test.tsv", "query-id\tcorpus-id\tscore\n" + BEIR),
        ("test.tsv", BEIR),
        ("qrels.txt", "# by hand\n" + TREC + "\n"),
        ("qrels.json", json.dumps(JUDGED)),
        ("of-others", json.dumps(JUDGED, indent=1)),
        ("qrels.jsonl", JSON_LINES),
    ],
)
@pytest.mark.parametrize("is_packed", [False, True])
def test_every_form_is_recognised_and_keeps_odd_ids(tmp_path: Path, name, text, is_packed):
    content = text.encode()
    file = tmp_path / (f"{name}.gz" if is_packed else name)
    file.write_bytes(gzip.compress(content) if is_packed else content)
    assert read_qrels(file) == JUDGED


def test_trec_between_blanks_with_carriage_returns(tmp_path: Path):
    (tmp_path / "qrels").write_bytes(b"301 0 CR93E-1282  1\r\n301 0 x#1 0\r\n")
    assert read_qrels(tmp_path / "qrels") == {"301": {"CR93E-1282": 1, "x#1": 0}}


def test_only_relevance_above_zero_is_gold():
    assert gold_of({"q1": {"a": 1, "b": 0, "c": -2}, "q2": {"a": 0}}) == {"q1": {"a": 1}, "q2": {}}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("q.txt", "q 0 d\n", "line 1: expected query-id, corpus-id"),
        ("q.txt", "q 0 d 1\nq 0 d 0.5\n", "line 2: expected"),
        ("q.txt", "q 0 d 1\nq 0 d 1\n", "line 2: 'd' stands there twice"),
        ("q.tsv", "q\td\tscore\nq\td\tscore\n", "line 2: expected"),
        ("q.tsv", "q\t\t1\n", "line 1: expected"),
        ("q.txt", "q\n", "line 1: expected"),
        ("q.txt", "\n", "holds no judgments"),
        ("q.json", "{}", "holds no judgments"),
        ("q.json", '{"q": {"d": 0.5}}', "query 'q', document 'd' must be a whole number"),
        ("q.json", '{"q": {"d": "1"}}', "must be a whole number, got str '1'"),
        ("q.json", '{"q": {"d": NaN}}', "must be a whole number, got float nan"),
        ("q.json", '{"q": {"d": -Infinity}}', "must be a whole number, got float -inf"),
        ("q.jsonl", '{"q_id": "q", "p_id": "d", "score": 1, "score": 0}', "'score' stands twice"),
        ("q.json", '{"q": {"d": 1, "d": 0}}', "'d' stands twice"),
        ("q.json", '{"q": 1}', "expected JSON of"),
    ],
)
def test_malformed_judgments_are_named(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_qrels(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.txt", "q1 a/b.txt\nq1\tc d\nq2 N/A\n"),
        (
            "x.jsonl",
            '{"query_id": "q1", "excluded_ids": ["a/b.txt", "c d"]}\n'
            '{"id": "q2", "excluded_ids": ["N/A"], "query": "why?"}\n',
        ),
    ],
)
def test_exclusions(tmp_path: Path, name: str, text: str):
    (tmp_path / name).write_text(text)
    assert read_excluded(tmp_path / name) == {"q1": {"a/b.txt", "c d"}, "q2": frozenset()}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.txt", "q1 a b\n", "line 1: expected `query_id doc_id`"),
        ("x.txt", "q1 a\nq1\n", "line 2: expected"),
        ("x.jsonl", '{"query_id": "q1"}', "line 1: expected"),
        ("x.jsonl", '{"query_id": "q1", "excluded_ids": "a"}', "line 1: expected"),
        ("x.jsonl", '{"query_id": 1, "excluded_ids": ["a"]}', "line 1: expected"),
        ("x.jsonl", "[1]", "line 1: a JSON object is needed"),
        ("x.jsonl", "{", "line 1: not valid JSON"),
        ("x.jsonl", '{"id": "q", "excluded_ids": [], "id": "p"}', "line 1: 'id' stands twice"),
    ],
)
def test_malformed_exclusions_are_named(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        read_excluded(tmp_path / name)
