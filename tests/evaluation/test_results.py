from __future__ import annotations

import dataclasses
import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.corpus import CorpusStore
from reasonembed.errors import EvaluationError, StorageError
from reasonembed.evaluation import results
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.results import (
    FORMAT,
    RESULT_FILE,
    corpus_fingerprint,
    find_result_files,
    provenance,
    read_result,
    result_dir,
    write_result,
)
from reasonembed.schemas import CORPUS, from_rows
from tests.evaluation.results_of import metrics_of, result_of


def place(tmp_path, system="bm25", collection="bright/pony", protocol="bright", seed=None):
    folder = result_dir(tmp_path, protocol=protocol, collection=collection, system=system)
    return folder if seed is None else folder / f"seed-{seed}"


def test_names_become_folders_below_the_results(tmp_path):
    assert place(tmp_path) == tmp_path / "bright" / "bright%2Fpony" / "bm25"
    assert place(tmp_path, system="..").name == "%2E."
    assert place(tmp_path, collection="data/mémoire").parent.name == "data%2Fm%C3%A9moire"
    with pytest.raises(EvaluationError, match="need a name"):
        place(tmp_path, system="")


@given(st.lists(st.text(min_size=1), unique=True))
def test_different_names_are_different_folders(tmp_path_factory, names):
    root = tmp_path_factory.getbasetemp()
    folders = {place(root, system=name) for name in names}
    assert len(folders) == len(names)
    for folder in folders:
        assert folder.resolve().parent == place(root).parent.resolve()
        assert len(folder.name) < 256 and not folder.name.startswith(".")


def test_long_names_stay_apart(tmp_path):
    one, other = (place(tmp_path, system="x" * 300 + end) for end in "ab")
    assert one != other
    write_result(result_of([0.5]), one)  # the file system takes it
    assert read_result(one).system == "bm25"


def test_what_is_written_is_read_to_the_last_bit(tmp_path):
    third = 0.1 + 0.2  # no short decimal
    given = dataclasses.replace(
        result_of([1 / 3, third, 0.0], seed=7, system="mémoire/8B"),
        credited=metrics_of([1, third, 2 / 3]),
        provenance={**result_of([0]).provenance, "packages": {"numpy": "2.1"}, "commit": None},
    )
    file = write_result(given, tmp_path / "deep" / "folder")
    assert read_result(file) == read_result(file.parent) == given
    assert json.loads(file.read_text())["format"] == FORMAT
    assert [one.name for one in file.parent.iterdir()] == [RESULT_FILE]


def test_a_result_is_replaced_whole_or_not_at_all(tmp_path):
    write_result(result_of([0.5]), tmp_path)
    bad = dataclasses.replace(result_of([0.5]), metrics=metrics_of([float("nan")]))
    with pytest.raises(EvaluationError, match="bm25 on bright/pony cannot be written"):
        write_result(bad, tmp_path)
    unwritable = dataclasses.replace(result_of([0.5]), provenance={"when": object()})
    with pytest.raises(EvaluationError, match="cannot be written"):
        write_result(unwritable, tmp_path)
    assert read_result(tmp_path) == result_of([0.5])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_result(result_of([0.5]), tmp_path / "file" / "folder")


def damage(content, path, value):
    *parents, last = path
    for name in parents:
        content = content[name]
    if value is None:
        del content[last]
    else:
        content[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "other/3", r"'format' is 'other/3', not 'reasonembed-result/1'"),
        (["format"], None, "has no field 'format'; is it a result"),
        (["system"], 7, "'system' is 7, not str"),
        (["seed"], True, "'seed' is True, not null or int"),
        (["metrics"], [], r"'metrics' is \[\], not dict"),
        (["metrics", "mean", "ndcg@10"], "0.5", "'metrics.mean.ndcg@10' is '0.5', not a finite"),
        (["metrics", "mean", "ndcg@10"], 0.75, "metrics.mean.ndcg@10 is 0.75, but the mean of its"),
        (["metrics", "per_query", "q0", "ndcg@10"], 0.9, "the file was changed"),
        (["metrics", "per_query", "q0", "ndcg@10"], None, "per_query.q0 has no 'ndcg@10'"),
        (["metrics", "per_query", "q0"], [1], r"metrics.per_query.q0 must be an object"),
        (["metrics", "per_query"], {}, "per_query holds no query"),
        (["metrics", "num_ties"], 1.5, "'metrics.num_ties' is 1.5, not int"),
        (["provenance", "corpus"], None, "has no field 'provenance.corpus'"),
    ],
)
def test_damage_is_refused_with_file_and_field(tmp_path, path, value, message):
    file = write_result(result_of([0.25, 0.75]), tmp_path)
    content = json.loads(file.read_text())
    damage(content, path, value)
    file.write_text(json.dumps(content))
    with pytest.raises(EvaluationError, match=message) as refused:
        read_result(file)
    assert str(file) in str(refused.value)


@pytest.mark.parametrize("text", ["", '{"format": ', "[1]", "\xff"])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / RESULT_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(EvaluationError, match=r"result\.json"):
        read_result(tmp_path)
    with pytest.raises(EvaluationError, match="cannot be read"):
        read_result(tmp_path / "missing.json")


def test_results_are_found_in_order(tmp_path):
    given = [
        result_of([0.1], system=system, collection=collection, seed=seed)
        for collection in ("bright/aops", "bright/pony")
        for system, seed in (("bm25", None), ("trained", 1), ("trained", 2))
    ]
    for one in reversed(given):
        write_result(one, place(tmp_path, one.system, one.collection, seed=one.seed))
    assert [result for _, result in find_result_files(tmp_path)] == given
    with pytest.raises(EvaluationError, match="no folder"):
        find_result_files(tmp_path / "nowhere")


def store(*texts):
    rows = [
        {"doc_id": doc_id, "text": text, "title": "", "task": "generic", "parent_id": None}
        | {"text_hash": text, "group_id": text}
        for doc_id, text in texts
    ]
    return CorpusStore(from_rows(rows, CORPUS, where="test"))


def test_a_corpus_is_its_ids_and_texts():
    same = [corpus_fingerprint(store(*texts)) for texts in ([("a", "x"), ("b", "y")],) * 2]
    swapped = corpus_fingerprint(store(("b", "y"), ("a", "x")))
    assert {*same, swapped} == {same[0]}
    assert corpus_fingerprint(store(("a", "y"), ("b", "x"))) != same[0]
    assert corpus_fingerprint(store(("a", "x"))) != same[0]


def test_provenance_says_how_a_result_was_made(tmp_path):
    collection = Collection(
        name="bright/pony",
        queries={"q0": "?"},
        qrels={"q0": {"d": 1}},
        excluded={},
        task="pony",
        instruction="",
        corpus_source=None,
        revision="current",
    )
    made = provenance(collection, corpus="documents-1", instruction="Given …")
    assert (made["revision"], made["collection"]) == ("current", collection.fingerprint())
    assert (made["corpus"], made["instruction"]) == ("documents-1", "Given …")
    assert {"numpy", "pytrec-eval-terrier"} <= made["packages"].keys()
    assert made["time"].endswith("+00:00")
    result = dataclasses.replace(result_of([0.5]), provenance=made)
    assert read_result(write_result(result, tmp_path)) == result


def git(folder, *arguments):
    who = ("-c", "user.name=n", "-c", "user.email=e@e")
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


def test_the_commit_is_that_of_a_checkout_of_this_project(tmp_path, monkeypatch):
    checkout = tmp_path / "checkout"
    (checkout / "reasonembed").mkdir(parents=True)
    (checkout / "ray_jobs").mkdir()
    assert results._commit(checkout) == (None, None)
    results._commit.cache_clear()
    git(checkout, "init")
    (checkout / "reasonembed" / "a.py").write_text("1")
    git(checkout, "add", ".")
    git(checkout, "commit", "-m", "first")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))  # as in a hook of another repository
    commit, is_dirty = results._commit(checkout)
    assert len(commit) == 40 and is_dirty is False
    assert results._commit(checkout / "reasonembed") == (None, None)  # lies inside another
    (checkout / "results.json").write_text("2")  # no code
    results._commit.cache_clear()
    assert results._commit(checkout) == (commit, False)
    (checkout / "reasonembed" / "b.py").write_text("2")
    results._commit.cache_clear()
    assert results._commit(checkout) == (commit, True)
