from __future__ import annotations

import json
import resource
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from reasonembed.errors import StorageError
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.exact import merge_topk
from reasonembed.index.store import (
    StoredIndex,
    check_files,
    is_index,
    read_about,
    write_index,
)
from tests.index.stored import WORDS, about, coarse, documents, example, write

IDS = st.lists(st.integers(0, 25).map(lambda row: f"d{row:03d}"), max_size=3)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return example(tmp_path_factory.mktemp("stored") / "tiny")


@st.composite
def problems(draw):
    dimension, num_documents = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    shape = (num_documents, dimension)
    vectors_ND = draw(hnp.arrays(np.float32, shape, elements=coarse))
    groups = draw(st.lists(st.integers(0, 6), min_size=num_documents, max_size=num_documents))
    num_queries = draw(st.integers(0, 4))
    queries_QD = draw(hnp.arrays(np.float32, (num_queries, dimension), elements=coarse))
    excluded = draw(st.lists(IDS, min_size=num_queries, max_size=num_queries))
    return vectors_ND, groups, queries_QD, excluded


def slow(scores_QN, groups, excluded, *, k, positive=False):
    """All scores, those of excluded groups taken out, sorted by score and position."""
    k = min(k, len(groups))
    shape = (len(scores_QN), k)
    scores, positions = np.full(shape, -np.inf, np.float32), np.full(shape, -1)
    for row, of_query in enumerate(scores_QN):
        barred = {groups[int(one[1:])] for one in excluded[row] if int(one[1:]) < len(groups)}
        left = [
            (-score, place)
            for place, score in enumerate(of_query.tolist())
            if groups[place] not in barred and not (positive and score <= 0)
        ]
        for rank, (negated, place) in enumerate(sorted(left)[:k]):
            scores[row, rank], positions[row, rank] = -negated, place
    return scores, positions


def assert_equal(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


@settings(max_examples=60, deadline=None)
@given(problem=problems(), k=st.integers(1, 25), num_parts=st.integers(1, 5))
def test_dense_equals_the_slow_way_whole_and_in_parts(problem, k, num_parts):
    vectors_ND, groups, queries_QD, excluded = problem
    expected = slow(queries_QD @ vectors_ND.T, groups, excluded, k=k)
    with tempfile.TemporaryDirectory() as folder:
        write(folder_of(folder), documents(["x"] * len(groups), groups=groups), vectors_ND)
        whole = StoredIndex.load(folder_of(folder))
        assert_equal(whole.dense(queries_QD, k=k, excluded=whole.shut_out(excluded)), expected)
        parts = [
            StoredIndex.load(folder_of(folder), part=(number, num_parts)).dense(
                queries_QD, k=k, excluded=whole.shut_out(excluded)
            )
            for number in range(num_parts)
        ]
    assert_equal(merge_topk(parts, k=k), expected)


def folder_of(scratch):
    return Path(scratch) / "index"


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), min_size=1),
    queries=st.lists(st.lists(st.sampled_from((*WORDS, "unknown")), max_size=5).map(" ".join)),
    variant=st.sampled_from(["standard", "query-side"]),
    data=st.data(),
)
def test_saved_bm25_equals_a_fresh_one(texts, queries, variant, data):
    try:
        fresh = BM25Index(texts, variant=variant)
    except ValueError:  # no words
        return
    excluded = [data.draw(st.frozensets(st.integers(0, len(texts) - 1))) for _ in queries]
    with tempfile.TemporaryDirectory() as folder:
        fresh.save(folder_of(folder))
        loaded = BM25Index.load(folder_of(folder))
        loaded.save(folder_of(folder).with_name("again"))
        again = BM25Index.load(folder_of(folder).with_name("again"))
        expected = fresh.search(queries, k=7, excluded=excluded)
        assert_equal(loaded.search(queries, k=7, excluded=excluded), expected)
        assert_equal(again.search(queries, k=7, excluded=excluded), expected)


def test_bm25_shuts_out_copies(stored):
    text = stored.documents([1])[0].text
    _, all_found = stored.bm25([text], k=12)
    assert set(all_found[0, :3]) == {1, 4, 7}
    _, found = stored.bm25([text], k=12, excluded=stored.shut_out([["d004"]]))
    assert not {1, 4, 7} & set(found[0].tolist())
    assert set(found[0].tolist()) - {-1} == set(all_found[0].tolist()) - {1, 4, 7, -1}


def test_bm25_is_the_whole_index_in_every_part(stored):
    part = StoredIndex.load(stored.folder, part=(1, 3))
    assert_equal(part.bm25(["dict order"], k=5), stored.bm25(["dict order"], k=5))


def test_documents_by_position_and_position_by_id(stored):
    first, titled = stored.documents([0, 1])
    assert (first.doc_id, first.title) == ("d000", None)
    assert titled.title == "A title"
    assert stored.doc_ids([11, 0]) == ["d011", "d000"]
    assert stored.find(["d011", "nothing", "", "d000", "zzz"]) == [11, None, None, 0, None]
    assert sorted(stored.copies(["d007", "nothing"]).tolist()) == [1, 4, 7]
    assert stored.copies([]).tolist() == []


@settings(max_examples=50, deadline=None)
@given(ids=st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1))
def test_ids_of_any_script_are_found(ids):
    table = documents(["x"] * len(ids))
    ids = sorted(ids)
    table = table.set_column(0, table.schema.field(0), [ids])
    with tempfile.TemporaryDirectory() as folder:
        write(folder_of(folder), table, np.ones((len(ids), 1), np.float32))
        index = StoredIndex.load(folder_of(folder))
        assert index.find(ids) == list(range(len(ids)))


def test_what_it_says_of_itself(stored):
    said = stored.about
    assert (said.num_documents, said.dimension, said.num_queries) == (12, 4, 1)
    assert said.kinds == ("dense", "bm25", "hybrid")
    assert read_about(stored.folder) == said
    on_disk = sum(file.stat().st_size for file in stored.folder.rglob("*") if file.is_file())
    assert said.num_bytes == on_disk - (stored.folder / "index.json").stat().st_size
    [query] = stored.queries
    assert (query.query_id, query.text) == ("q1", "why\u2028so?")
    assert (query.qrels, query.excluded_ids) == ({"d003": 2}, ("d001",))


def test_vectors_are_mapped_and_not_read(stored):
    assert isinstance(stored.vectors_ND, np.memmap)
    assert not stored.vectors_ND.flags.writeable
    part = StoredIndex.load(stored.folder, part=(1, 2))
    assert np.shares_memory(part._part_ND, part.vectors_ND)
    assert np.shares_memory(part._part_ND, part.vectors_ND[6:])
    assert not np.shares_memory(part._part_ND, part.vectors_ND[:6])
    assert isinstance(stored._bm25._weights_P.base, np.memmap)


def test_loading_holds_none_of_the_matrix(tmp_path):
    rows, dimension = 40_000, 256  # 40 MB
    write(
        tmp_path / "big",
        documents(["x"] * rows, groups=list(range(rows))),
        np.ones((rows, 256), np.float32),
    )
    before = resident_bytes()
    index = StoredIndex.load(tmp_path / "big")
    grown = resident_bytes() - before
    assert len(index) == rows
    assert grown < rows * dimension * 4 / 4, grown


def resident_bytes():
    """Memory that this process holds, pages of mapped files that it touched included."""
    pages = Path("/proc/self/statm")
    if not pages.is_file():
        pytest.skip("this system does not tell a process's memory")
    return int(pages.read_text().split()[1]) * resource.getpagesize()


def test_an_index_of_words_alone_and_one_of_vectors_alone(tmp_path):
    table = documents(["a dict", "a loop"])
    write(tmp_path / "words", table, bm25=True)
    words = StoredIndex.load(tmp_path / "words")
    assert words.about.kinds == ("bm25",)
    with pytest.raises(ValueError, match="the index tiny holds no vectors"):
        words.dense(np.ones((1, 2), np.float32), k=1)
    write(tmp_path / "vectors", table, np.ones((2, 3), np.float32))
    vectors = StoredIndex.load(tmp_path / "vectors")
    assert vectors.about.kinds == ("dense",) and vectors.queries == ()
    with pytest.raises(ValueError, match="cannot be searched by words"):
        vectors.bm25(["a"], k=1)
    with pytest.raises(ValueError, match="queries have 2 dimensions, documents 3"):
        vectors.dense(np.ones((1, 2), np.float32), k=1)


def test_more_parts_than_documents(tmp_path):
    write(tmp_path / "index", documents(["a", "b"]), np.eye(2, dtype=np.float32))
    found = [
        StoredIndex.load(tmp_path / "index", part=(number, 5)).dense(
            np.ones((1, 2), np.float32), k=3
        )
        for number in range(5)
    ]
    assert merge_topk(found, k=3)[1].tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="part 5 of 5"):
        StoredIndex.load(tmp_path / "index", part=(5, 5))


def test_several_threads_at_once(stored):
    queries_QD = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    index = StoredIndex.load(stored.folder)  # nothing is cached yet
    results = [None] * 8

    def ask(number):
        ids = [[f"d{number:03d}"]] * 3
        results[number] = index.dense(queries_QD, k=5, excluded=index.shut_out(ids))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in enumerate(results):
        assert_equal(
            found, stored.dense(queries_QD, k=5, excluded=stored.shut_out([[f"d{number:03d}"]] * 3))
        )


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        return example(tmp_path / "index").folder

    def test_no_index(self, tmp_path):
        assert not is_index(tmp_path)
        with pytest.raises(StorageError, match=r"holds no index: .* `reasonembed index build`"):
            StoredIndex.load(tmp_path)

    @pytest.mark.parametrize(
        "name", ["vectors.npy", "documents.arrow", "queries.jsonl", "bm25/terms.arrow"]
    )
    def test_a_file_that_is_cut_or_gone(self, folder, name):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(StorageError, match=rf"{name} has [\d,]+ bytes, .* build it anew"):
            StoredIndex.load(folder)
        file.unlink()
        with pytest.raises(StorageError, match=rf"{name} is missing; copy the index again"):
            StoredIndex.load(folder)
        file.write_bytes(whole)
        assert len(StoredIndex.load(folder)) == 12

    @pytest.mark.parametrize("name", ["vectors.npy", "documents.arrow", "bm25/weights.npy"])
    def test_a_changed_byte_is_found_by_its_digest(self, folder, name):
        data = bytearray((folder / name).read_bytes())
        data[-20] ^= 1
        (folder / name).write_bytes(data)
        check_files(folder)
        with pytest.raises(StorageError, match=f"{name} holds other bytes than were written"):
            check_files(folder, with_digests=True)

    @pytest.mark.parametrize("name", ["vectors.npy", "documents.arrow", "bm25/bm25.json"])
    def test_a_file_of_rubbish(self, folder, name):
        size = (folder / name).stat().st_size
        (folder / name).write_bytes(b"?" * size)
        with pytest.raises(StorageError, match="build"):
            StoredIndex.load(folder)

    def test_another_format(self, folder):
        data = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps(data | {"format": 99}))
        with pytest.raises(StorageError, match="format 99, this software reads 1; build the index"):
            StoredIndex.load(folder)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}'])
    def test_a_damaged_description(self, folder, text):
        (folder / "index.json").write_text(text)
        with pytest.raises(StorageError, match="index"):
            StoredIndex.load(folder)

    def test_words_of_another_version(self, folder):
        file = folder / "bm25" / "bm25.json"
        file.write_text(file.read_text().replace('"analysis": 1', '"analysis": 9'))
        with pytest.raises(
            StorageError, match=r"words of version 9, .* version 1; build the index"
        ):
            StoredIndex.load(folder)


def test_documents_must_be_sorted_and_distinct(tmp_path):
    table = documents(["a", "b"])
    for wrong in (table.take([1, 0]), table.take([0, 0])):
        with pytest.raises(ValueError, match="sorted by doc id, each once"):
            write_index(tmp_path / "index", about(), wrong)


def test_vectors_must_be_finite(tmp_path):
    vectors_ND = np.array([[1.0], [np.nan]], np.float32)
    with pytest.raises(ValueError, match=r"documents\[1\] is not finite"):
        write(tmp_path / "index", documents(["a", "b"]), vectors_ND)
    assert not is_index(tmp_path / "index")


@settings(max_examples=40, deadline=None)
@given(asked=st.lists(st.sampled_from(["d000", "d007", "d011", "", "d0", "zzz", "d004"])))
def test_many_ids_are_found_as_few_are(stored, asked):
    halved = [stored._find(one) for one in asked]
    assert stored.find(asked) == halved  # of so few documents, all are gone through
    assert stored.shut_out([asked])[0].tolist() == stored.copies(asked).tolist()


def test_what_queries_exclude_is_looked_up_once(stored, monkeypatch):
    asked = []

    def find(doc_ids):
        asked.extend(doc_ids)
        return [None] * len(doc_ids)

    monkeypatch.setattr(stored, "find", find)
    found = stored.shut_out([("d001", "d002"), ("d002",), ("d001", "d002"), ()])
    assert sorted(asked) == ["d001", "d002"]
    assert [one.tolist() for one in found] == [[]] * 4


def test_the_digest_tells_indexes_apart(tmp_path):
    for name, texts in (("one", ["a", "b"]), ("same", ["a", "b"]), ("other", ["a", "c"])):
        write(tmp_path / name, documents(texts))
    one, same, other = (StoredIndex.load(tmp_path / name) for name in ("one", "same", "other"))
    assert one.digest == same.digest != other.digest
