from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from reasonembed import tasks
from reasonembed.corpus import read_corpus
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.datasets import PYTHON_STDLIB, load_collection, load_collections
from tests.evaluation.real_data import DATA, needs_data


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


@pytest.mark.parametrize("name", ["queries.tsv", "queries.jsonl"])
def test_queries_and_judgments_of_a_folder_may_be_packed(tmp_path: Path, name: str):
    rows = {"tsv": "q1\twhy\n", "jsonl": '{"_id": "q1", "text": "why"}\n'}
    packed = {f"{name}.gz": rows[name.split(".")[1]], "qrels/test.tsv.gz": "q1\td1\t1\n"}
    for file, text in packed.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(gzip.compress(text.encode()))
    found = load_collection(str(tmp_path))
    assert (found.queries, found.qrels) == ({"q1": "why"}, {"q1": {"d1": 1}})


def test_a_folder_without_corpus_says_so(tmp_path: Path):
    assert load_collection(str(write_beir(tmp_path))).corpus_source is None


def test_queries_that_are_judged_without_gold_are_left_out_and_counted(tmp_path: Path, caplog):
    queries = "".join(json.dumps({"_id": f"q{n}", "text": "why?"}) + "\n" for n in range(3))
    judged = "q0\td1\t0\nq1\td1\t1\nq2\td1\t-1\n"
    write_beir(tmp_path, **{"queries.jsonl": queries, "qrels/test.tsv": judged})
    (tmp_path / "exclude.txt").write_text("q0 d5\nq1 d6\n")
    collection = load_collection(str(tmp_path))
    assert collection.qrels == {"q1": {"d1": 1}} and list(collection.queries) == ["q1"]
    assert collection.excluded == {"q1": frozenset({"d6"})}
    (record,) = caplog.records
    assert "2 of 3 queries have no document of relevance 1 or more, such as 'q0'" in record.message
    write_beir(tmp_path, **{"queries.jsonl": queries, "qrels/test.tsv": "q1\td1\t0\n"})
    with pytest.raises(EvaluationError, match="no query has a document of relevance 1 or more"):
        load_collection(str(tmp_path))


def test_exclusions_of_queries_that_are_nowhere_are_refused(tmp_path: Path):
    write_beir(tmp_path)
    file = tmp_path / "exclude.txt"
    file.write_text("q1 d7\ntrain-only d8\n")  # the second has a text and no judgment
    assert load_collection(str(tmp_path)).excluded == {"q1": frozenset({"d7"})}
    file.write_text("biology-1 d7\nbiology-2 d7\nq1 d8\n")
    message = (
        r"exclude.txt: 2 query ids are neither in .*queries.jsonl nor in .*test.tsv, such as "
        r"\['biology-1', 'biology-2'\]; are these the files of one collection"
    )
    with pytest.raises(EvaluationError, match=message):
        load_collection(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("qrels/test.tsv", "q1 d1\n", r"test.tsv, line 1: expected query-id"),
        ("qrels/test.tsv", "q1\td1\t1\nq1\td1\t1\n", "line 2: 'd1' stands there twice"),
        ("qrels/test.tsv", "q1\td1\t0.5\n", "whole-number score"),
        ("qrels/test.tsv", "", "holds no judgments"),
        ("qrels/test.tsv", "q1\td1\t1\nq8\td1\t1\n", r"1 query ids of the qrels .*\['q8'\]"),
        ("queries.jsonl", "{", "queries.jsonl, line 1: not valid JSON"),
        ("queries.jsonl", "[]", "line 1: a JSON object is needed"),
        ("queries.jsonl", '{"_id": "q1", "text": " "}', "'text' must be a string"),
        ("queries.jsonl", '{"_id": 7, "text": "x"}', "'_id' must be a string .* got int 7"),
        ("queries.jsonl", '{"_id": "q1", "text": "x"}\n' * 2, "line 2: 'q1' stands there twice"),
        ("excluded.jsonl", '{"query_id": "q1", "excluded_ids": "d1"}', "excluded_ids"),
        ("excluded.jsonl", '{"query_id": "q1", "excluded_ids": ["d1"]}', "gold and excluded"),
    ],
)
def test_malformed_folders_are_named(tmp_path: Path, file: str, content: str, message: str):
    write_beir(tmp_path, **{file: content})
    with pytest.raises(EvaluationError, match=message):
        load_collection(str(tmp_path))


def test_missing_files_and_unknown_names(tmp_path: Path):
    with pytest.raises(EvaluationError, match=r"holds no queries: give it queries.jsonl, "):
        load_collection(str(tmp_path))
    with pytest.raises(EvaluationError, match=r"no collection 'nowhere': give .* bright-long"):
        load_collection("nowhere")
    write_beir(tmp_path, **{"topics.test.tsv": "q1\twhy?\n"})
    message = "2 files of queries: queries.jsonl, topics.test.tsv; leave one"
    with pytest.raises(EvaluationError, match=message):
        load_collection(str(tmp_path))


def test_the_embedded_set():
    (collection,) = load_collections(PYTHON_STDLIB)
    assert (collection.task, collection.corpus_source) == (PYTHON_STDLIB, PYTHON_STDLIB)
    assert (collection.benchmark, collection.revision) == ("", "")
    assert len(collection.queries) >= 88


QRELS = "q1 0 d/1 2\nq1 0 d2 0\nq2\t0\tü\t1\n"


def test_trec_files_in_a_folder(tmp_path: Path):
    (tmp_path / "topics.set.tsv").write_text("q1\twhy?\tso\nq2\thow?\nq9\tunjudged\n")
    (tmp_path / "qrels.set.txt").write_text(QRELS, encoding="utf-8")
    (tmp_path / "exclude.set.txt").write_text("q1 d7\nq9 d8\n")  # q9 is asked and not judged
    (tmp_path / "corpus.jsonl").write_text('{"id": "d/1", "text": "x"}')
    collection = load_collection(str(tmp_path))
    assert collection.queries == {"q1": "why?\tso", "q2": "how?"}
    assert collection.qrels == {"q1": {"d/1": 2}, "q2": {"ü": 1}}
    assert collection.excluded == {"q1": frozenset({"d7"})}
    assert read_corpus(str(collection.corpus_source))["doc_id"].to_pylist() == ["d/1"]


def test_trec_files_by_name(tmp_path: Path):
    topics = tmp_path / "topics.jsonl.gz"
    rows = [{"id": "q1", "query": "why?"}, {"id": "q2", "query": "how?"}]
    topics.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    qrels = tmp_path / "judged.gz"
    qrels.write_bytes(gzip.compress(QRELS.encode()))
    spec = f"trec:topics={topics},qrels={qrels}"
    collection = load_collection(spec, task=tasks.get("pony"))
    assert collection.qrels == {"q1": {"d/1": 2}, "q2": {"ü": 1}}
    assert (collection.name, collection.task) == (tmp_path.name, "pony")
    assert load_collection(f"{spec},name=mine").name == "mine"
    assert collection.corpus_source is None
    assert load_collection(f"{spec},corpus=x.parquet").corpus_source == "x.parquet"
    qrels.write_bytes(qrels.read_bytes()[:-9])
    with pytest.raises(EvaluationError, match=r"judged\.gz is damaged or cut off"):
        load_collection(spec)
    for wrong in ("trec:topics=x", "trec", f"{spec},documents=x", f"{spec},corpus="):
        with pytest.raises(EvaluationError, match="the form is trec:topics=FILE,qrels=FILE"):
            load_collection(wrong)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query-id": "q1", "corpus-id": "d1", "score": "1"}, "'score' must be a whole number"),
        ({"query-id": "q1", "corpus-id": "d1", "score": 0.5}, "'score' must be a whole number"),
        ({"q_id": "q1", "p_id": "d1", "score": math.nan}, r"jsonl, line 1: 'score' must .*nan"),
        ({"q_id": "q1", "p_id": "d1", "score": math.inf}, r"jsonl, line 1: 'score' must .*inf"),
        ({"query-id": "q1", "corpus-id": "d1", "score": True}, "'score' must be a whole number"),
        ({"query-id": "q1", "score": 1}, "'corpus-id' must be a string"),
    ],
)
def test_judgments_as_json_lines(tmp_path: Path, row: dict, message: str):
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "why?"}')
    good = {"query_id": "q1", "doc_id": "d1", "relevance": 1.0}
    zero = {"query-id": "q1", "corpus-id": "d2", "score": 0}
    file = tmp_path / "qrels.jsonl"
    file.write_text(f"{json.dumps(good)}\n{json.dumps(zero)}\n")
    assert load_collection(str(tmp_path)).qrels == {"q1": {"d1": 1}}
    file.write_text(json.dumps(row))
    with pytest.raises(EvaluationError, match=message):
        load_collection(str(tmp_path))


@needs_data
def test_scifact_as_others_ship_it():
    scifact = load_collection(str(DATA / "scifact"))
    assert len(scifact.queries) == 300
    assert sum(map(len, scifact.qrels.values())) == 339
    corpus = read_corpus(str(scifact.corpus_source))
    assert corpus.num_rows == 5183
    scifact.check_against(corpus["doc_id"].to_pylist())


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


def test_of_twins_judged_differently_the_best_counts_in_any_order():
    for gold in ({"d1": 2, "d2": 1}, {"d2": 1, "d1": 2}):
        given = make_collection(qrels={"q1": gold, "q2": {"d2": 1}})
        credited = given.credit_duplicates(lambda _: ["d1", "d2", "d4"])
        assert credited.qrels["q1"] == {"d1": 2, "d2": 2, "d4": 2}
        assert credited.qrels["q2"] == {"d1": 1, "d2": 1, "d4": 1}
