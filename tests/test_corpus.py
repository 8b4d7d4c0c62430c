import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.corpus import (
    CorpusStore,
    Document,
    check_only_added,
    cut_passages,
    passage_text,
    read_corpus,
    stdlib_documents,
    text_hash,
)
from reasonembed.errors import CorpusError
from reasonembed.schemas import CORPUS


def _jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture(scope="module")
def stdlib() -> CorpusStore:
    return CorpusStore(read_corpus("python-stdlib", task="python_stdlib"))


class TestFiles:
    @pytest.mark.parametrize("id_column", ["doc_id", "_id", "id", "docid"])
    @pytest.mark.parametrize("text_column", ["text", "content", "contents"])
    @pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
    def test_every_kind_with_every_column_name(self, tmp_path, id_column, text_column, kind):
        rows = [{id_column: "a", text_column: "one  two"}, {id_column: "b", text_column: "three"}]
        path = tmp_path / f"corpus.{kind}"
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), path)
        else:
            _jsonl(path, *rows)
        if kind == "jsonl.gz":
            path.write_bytes(gzip.compress(path.read_bytes()))
        table = read_corpus(str(path), task="biology")
        assert table.schema == CORPUS
        assert table["doc_id"].to_pylist() == ["a", "b"]
        assert table["text"].to_pylist() == ["one  two", "three"]
        assert table["task"].to_pylist() == ["biology", "biology"]
        assert table["parent_id"].to_pylist() == [None, None]
        assert table["text_hash"].to_pylist() == [text_hash("one two"), text_hash("three")]

    def test_beir_folder_joins_titles_once(self, tmp_path):
        _jsonl(
            tmp_path / "corpus.jsonl",
            {"_id": "a", "title": "Bees", "text": "They dance."},
            {"_id": "b", "title": "", "text": "No title."},
            {"_id": "c", "title": None, "text": "Null title."},
        )
        table = read_corpus(str(tmp_path))
        assert table["text"].to_pylist() == ["Bees\nThey dance.", "No title.", "Null title."]
        assert table["title"].to_pylist() == ["Bees", "", ""]
        pq.write_table(table, tmp_path / "again.parquet")
        assert read_corpus(str(tmp_path / "again.parquet")).equals(table)

    def test_limit_reads_no_further(self, tmp_path):
        path = _jsonl(tmp_path / "c.jsonl", {"id": "a", "text": "x"}, {"id": "b", "text": ""})
        assert read_corpus(path, limit=1)["doc_id"].to_pylist() == ["a"]

    def test_parquet_with_large_strings_and_many_batches(self, tmp_path):
        ids = [f"d{number}" for number in range(9000)]
        table = pa.table({"id": pa.array(ids, pa.large_string()), "content": ids, "other": ids})
        pq.write_table(table, tmp_path / "c.parquet")
        assert read_corpus(str(tmp_path / "c.parquet"))["doc_id"].to_pylist() == ids

    def test_blank_lines_and_a_byte_order_mark_are_no_records(self, tmp_path):
        path = tmp_path / "c.jsonl"
        path.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\n\n{"id": "b", "text": "y"}\n\n')
        assert read_corpus(str(path))["doc_id"].to_pylist() == ["a", "b"]

    def test_blank_documents_are_kept_and_counted(self, tmp_path, caplog):
        rows = {"id": ["a", "b", "c"], "content": ["x", "", " \n"]}
        pq.write_table(pa.table(rows), tmp_path / "c.parquet")
        store = CorpusStore(read_corpus(str(tmp_path / "c.parquet")))
        assert store.texts(["a", "b", "c"]) == ["x", "", " \n"]
        assert store.group_members(store.group("b")) == ("b", "c")
        assert "2 of 3 documents are blank, such as 'b'" in caplog.text


def _shards(folder: Path, name: str, *parts: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, ids in enumerate(parts):
        table = pa.table({"id": pa.array(ids, pa.string()), "content": [f"of {i}" for i in ids]})
        pq.write_table(table, folder / f"{name}-{number:05d}-of-{len(parts):05d}.parquet")


class TestManyFiles:
    def test_shards_by_a_pattern_a_folder_and_a_corpus_inside_a_folder(self, tmp_path):
        _shards(tmp_path / "all", "biology", ["a", "b"], [], ["c/ô'\""])
        _shards(tmp_path / "all", "pony", ["p"])
        _shards(tmp_path / "beir" / "corpus", "corpus", ["b"], ["a"])
        _shards(tmp_path / "beir", "queries", ["q"])

        def ids(source: Path) -> list[str]:
            return read_corpus(str(source))["doc_id"].to_pylist()

        assert ids(tmp_path / "all" / "biology-*.parquet") == ["a", "b", "c/ô'\""]
        assert ids(tmp_path / "all") == ["a", "b", "c/ô'\"", "p"]
        assert ids(tmp_path / "beir") == ["b", "a"]

    def test_a_missing_shard_and_an_id_in_two_files_are_named(self, tmp_path):
        _shards(tmp_path, "pony", ["a"], ["b"], ["a"])
        message = "id 'a' is on row 0 of pony-00000-.* and on row 0 of pony-00002-"
        with pytest.raises(CorpusError, match=message):
            read_corpus(str(tmp_path / "pony-*"))
        (tmp_path / "pony-00001-of-00003.parquet").unlink()
        message = "'pony' has 3 files, of which 1 are missing, such as number 00001"
        with pytest.raises(CorpusError, match=message):
            read_corpus(str(tmp_path / "pony-*"))

    def test_a_download_that_ends_early(self, tmp_path):
        _shards(tmp_path, "pony", ["a"])
        (file,) = tmp_path.iterdir()
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(CorpusError, match=r"cannot be read as Parquet .*is the file whole\?"):
            read_corpus(str(tmp_path))

    def test_a_corpus_on_the_hub(self, tmp_path, monkeypatch):
        _shards(tmp_path / "documents", "pony", ["a"], ["b"])
        asked: list[object] = []

        def snapshot(repo: str, **options: object) -> str:
            asked.append((repo, options["revision"], options["allow_patterns"]))
            return str(tmp_path)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        source = "hf://datasets/xlangai/BRIGHT@abc/documents/pony*.parquet"
        assert read_corpus(source)["doc_id"].to_pylist() == ["a", "b"]
        assert asked == [("xlangai/BRIGHT", "abc", ["documents/pony*.parquet"])]
        with pytest.raises(CorpusError, match=r"has no file documents/aops\*"):
            read_corpus("hf://datasets/xlangai/BRIGHT/documents/aops*")
        with pytest.raises(CorpusError, match="an address on the hub is"):
            read_corpus("hf://datasets/xlangai")

    def test_a_hub_that_cannot_be_reached(self, monkeypatch):
        def snapshot(repo: str, **options: object) -> str:
            raise ConnectionError("no route")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
        with pytest.raises(CorpusError, match=r"c\.jsonl of the data set a/b .*\(no route\)"):
            read_corpus("hf://datasets/a/b/c.jsonl")


GOOD = b'{"id": "a", "text": "x"}\n'


class TestErrors:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"", "empty.*at least one document"),
            (GOOD + b"\n" + GOOD, "id 'a' is on line 1 and on line 3; make the ids unique"),
            (GOOD + b'{"id": "b", "text": null}\n', "line 2: text is null"),
            (GOOD + b'{"id": " ", "text": "x"}\n', "line 2: id is .* blank"),
            (GOOD + b'{"id": null, "text": "x"}\n', "line 2: id is null"),
            (GOOD + b'{"id": 7, "text": "x"}\n', "line 2: id must be a string, got int 7"),
            (GOOD + b'{"id": "b", "text": "x", "title": 1}\n', "line 2: title must be a string"),
            (GOOD + b'{"id": "b", \n', "line 2: not valid JSON .*one JSON object a line"),
            (GOOD + b"[1]\n", "line 2: a JSON object is needed, got list"),
            (GOOD + b'{"id": "\xff", "text": "x"}\n', "line 2: not valid UTF-8"),
            (GOOD + b'{"id": "b", "text": "\\ud800"}\n', "line 2: text holds half of a surrogate"),
            (b'{"id": "b", "body": "x"}\n', r"line 1: a text column is missing.*is: id, body"),
            (b'{"text": "b", "key": "x"}\n', r"line 1: an id column is missing.*is: text, key"),
        ],
    )
    def test_jsonl(self, tmp_path, content, message):
        path = tmp_path / "c.jsonl"
        path.write_bytes(content)
        with pytest.raises(CorpusError, match=f"{re.escape(str(path))}.*{message}"):
            read_corpus(str(path))

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"id": [], "text": []}, "empty"),
            ({"id": ["a", "b", "a"], "text": ["x"] * 3}, "id 'a' is on row 0 and on row 2"),
            ({"id": ["a", "b"], "text": ["x", None]}, "row 1: text is null"),
            ({"id": ["a", ""], "text": ["x", "y"]}, "row 1: id is .* blank"),
            ({"id": ["a", None], "text": ["x", "y"]}, "row 1: id is null"),
            ({"id": [1, 2], "text": ["x", "y"]}, "row 0: id must be a string, got int 1"),
            ({"id": ["a"], "body": ["x"]}, r"a text column is missing.*is: id, body"),
        ],
    )
    def test_parquet(self, tmp_path, columns, message):
        path = tmp_path / "c.parquet"
        pq.write_table(pa.table(columns), path)
        with pytest.raises(CorpusError, match=message):
            read_corpus(str(path))

    def test_parquet_with_invalid_utf8_names_the_row(self, tmp_path):
        texts = pa.array([b"ok", b"\xff"], pa.binary()).view(pa.string())
        pq.write_table(pa.table({"id": ["a", "b"], "text": texts}), tmp_path / "c.parquet")
        with pytest.raises(CorpusError, match="row 1: not valid UTF-8"):
            read_corpus(str(tmp_path / "c.parquet"))

    def test_what_is_no_corpus_file(self, tmp_path):
        with pytest.raises(CorpusError, match=r"nowhere\.jsonl: no such file"):
            read_corpus(str(tmp_path / "nowhere.jsonl"))
        with pytest.raises(CorpusError, match=r"holds no corpus\.jsonl"):
            read_corpus(str(tmp_path))
        (tmp_path / "c.csv").write_text("id,text\n")
        with pytest.raises(CorpusError, match="unknown kind of file"):
            read_corpus(str(tmp_path / "c.csv"))
        (tmp_path / "c.parquet").write_bytes(b"not parquet")
        with pytest.raises(CorpusError, match="cannot be read as Parquet"):
            read_corpus(str(tmp_path / "c.parquet"))
        (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(GOOD)[:-4])
        with pytest.raises(CorpusError, match="cannot be read"):
            read_corpus(str(tmp_path / "c.jsonl.gz"))
        with pytest.raises(CorpusError, match="limit is 0"):
            read_corpus("python-stdlib", limit=0)


@given(
    st.lists(st.lists(st.integers(1, 60), max_size=12), max_size=8),
    st.integers(1, 20),
    st.integers(20, 50),
)
def test_no_word_is_lost_or_moved_by_cutting(paragraphs, min_words, max_words):
    numbers = iter(range(10_000))
    text = "\n\n".join(
        "\n".join(" ".join(f"w{next(numbers)}" for _ in range(size)) for size in lines)
        for lines in paragraphs
    )
    passages = cut_passages(text, min_words=min_words, max_words=max_words)
    assert " ".join(passages).split() == text.split()
    sizes = [len(passage.split()) for passage in passages]
    assert all(0 < size <= max_words for size in sizes)


def test_passages_follow_paragraphs():
    text = "\n\n".join(["one two three", "four five", "  six", "seven"])
    assert cut_passages(text, min_words=3, max_words=5) == [
        "one two three",
        "four five\n\n  six\n\nseven",
    ]


@given(st.text(), st.text(min_size=1))
def test_joining_a_title_twice_changes_nothing(title, text):
    once = passage_text(title, text)
    assert passage_text(title, once) == once
    assert text in once and title.strip() in once


@given(st.lists(st.sampled_from(["a b", "a  b", " a\nb ", "b a", "ab"]), min_size=1))
def test_equal_words_are_one_group(texts):
    rows = [{"doc_id": f"d{number}", "text": text} for number, text in enumerate(texts)]
    store = CorpusStore(_table(rows))
    for doc_id, text in zip(store.doc_ids, texts, strict=True):
        members = store.group_members(store.group(doc_id))
        twins = [row["doc_id"] for row in rows if row["text"].split() == text.split()]
        assert members == tuple(twins)


def _table(rows: list[dict[str, str]]) -> pa.Table:
    hashes = [text_hash(row["text"]) for row in rows]
    full = [
        {"title": "", "task": "t", "parent_id": None, **row, "text_hash": h, "group_id": h}
        for row, h in zip(rows, hashes, strict=True)
    ]
    return pa.Table.from_pylist(full, schema=CORPUS)


class TestCorpusStore:
    def test_lookups(self):
        store = CorpusStore(
            _table([{"doc_id": "b", "text": "x"}, {"doc_id": "a", "text": "y", "task": "u"}])
        )
        assert len(store) == 2
        assert store.doc_ids == ["b", "a"]
        assert store.text("a") == "y"
        assert store.texts(["a", "b", "a"]) == ["y", "x", "y"]
        assert store.tasks(["a", "b"]) == ["u", "t"]
        assert "a" in store and "z" not in store

    def test_unknown_and_repeated_ids(self):
        store = CorpusStore(_table([{"doc_id": "a", "text": "x"}]))
        for lookup in (store.text, store.task, store.group):
            with pytest.raises(CorpusError, match="'zz' is not in the corpus of 1 documents"):
                lookup("zz")
        with pytest.raises(CorpusError, match="'zz'"):
            store.texts(["a", "zz"])
        with pytest.raises(CorpusError, match="group_id 'zz'"):
            store.group_members("zz")
        with pytest.raises(CorpusError, match="'a' is in rows 0 and 1"):
            CorpusStore(_table([{"doc_id": "a", "text": "x"}, {"doc_id": "a", "text": "y"}]))


class TestStdlib:
    def test_size_and_ids(self, stdlib):
        assert 3000 <= len(stdlib) <= 4800
        for doc_id in (
            "itertools.groupby",
            "collections.Counter.most_common",
            "str.split",
            "os.path.join",
            "collections.abc.Mapping",
            "typing.Union",
            "random.choice",
            "topic:yield#0",
        ):
            assert doc_id in stdlib

    def test_one_home_and_no_inherited_or_private_names(self, stdlib):
        names = [doc_id for doc_id in stdlib.doc_ids if not doc_id.startswith("topic:")]
        assert not [name for name in names if re.search(r"\._", name)]
        for absent in ("io.open", "unittest.mock.asyncio", "collections.Counter.keys", "types.Any"):
            assert absent not in stdlib

    def test_topics_are_passages_with_a_parent_and_heading(self, stdlib):
        documents = [d for d in stdlib_documents() if d.doc_id.startswith("topic:")]
        assert all(len(d.text.split()) <= 220 for d in documents)
        assert all(d.parent_id == d.doc_id.partition("#")[0] for d in documents)
        first = next(d for d in documents if d.doc_id == "topic:yield#0")
        assert first.title == 'The "yield" statement'
        assert first.text.startswith(first.title)

    def test_symbols_open_with_what_can_be_called(self, stdlib):
        assert stdlib.text("itertools.groupby").startswith("groupby(iterable, key=None)\n")
        assert not re.search(r" at 0x[0-9a-f]{4}", "".join(stdlib.texts(stdlib.doc_ids)))

    def test_duplicates_share_a_group(self, stdlib):
        twins = stdlib.group_members(stdlib.group("bytes.isdigit"))
        assert {"bytes.isdigit", "bytearray.isdigit"} <= set(twins) or len(twins) == 1
        assert any(len(stdlib.group_members(stdlib.group(d))) > 1 for d in stdlib.doc_ids)

    def test_another_process_reads_the_same_without_a_sound(self, stdlib):
        program = (
            "import sys\nfrom reasonembed.corpus import *\nimport hashlib\n"
            "t = read_corpus('python-stdlib')\nassert 'torch' not in sys.modules\n"
            "sys.stdout.write(text_hash(' '.join(t['doc_id'].to_pylist() + t['text'].to_pylist())))"
        )
        command = [sys.executable, "-W", "error::DeprecationWarning", "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        joined = " ".join([*stdlib.doc_ids, *stdlib.texts(stdlib.doc_ids)])
        assert (done.stdout, done.stderr) == (text_hash(joined), "")


def test_a_document_cannot_be_changed():
    document = Document("a", "x", "", "t", None)
    with pytest.raises(AttributeError):
        document.text = "y"


def test_a_corpus_may_grow_and_nothing_else():
    def table(**texts):
        return pa.table({"doc_id": list(texts), "text_hash": list(texts.values())})

    check_only_added(table(), table(a="1"))
    check_only_added(table(a="1"), table(b="2", a="1"))
    with pytest.raises(CorpusError, match=r"2 documents .* another text: 'a', 'b'"):
        check_only_added(table(a="1", b="2", c="3"), table(a="9", c="3"))
