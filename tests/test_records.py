from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.errors import CorpusError, EvaluationError
from reasonembed.records import check_shards, parquet_columns, read_records, table_files


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_a_table_is_its_shards_or_one_file(tmp_path: Path):
    def names(table: str) -> list[str]:
        return [path.name for path in table_files(tmp_path, table, error=CorpusError)]

    touch(tmp_path, "a.jsonl", "a.jsonl.gz", "ab.parquet", "c-00001-of-00002.parquet")
    touch(tmp_path, "c-00000-of-00002.parquet", "c_more-00000-of-00001.parquet")
    assert names("a") == ["a.jsonl"]
    assert names("ab") == ["ab.parquet"]
    assert names("c") == ["c-00000-of-00002.parquet", "c-00001-of-00002.parquet"]
    assert names("d") == []
    assert table_files(tmp_path / "nowhere", "a", error=CorpusError) == []


@given(st.sets(st.integers(0, 5)), st.integers(1, 6))
def test_shards_are_whole_or_refused(numbers: set[int], count: int):
    paths = [Path(f"x/t-{number:05d}-of-{count:05d}.parquet") for number in numbers]
    missing = set(range(count)) - numbers
    if numbers and missing:
        with pytest.raises(CorpusError, match=f"{len(missing)} are missing, .* {min(missing):05d}"):
            check_shards(paths, error=CorpusError)
    else:
        check_shards(paths, error=CorpusError)


def test_files_without_numbers_are_no_shards():
    check_shards([Path("a.parquet"), Path("b-2-of-3.parquet")], error=CorpusError)


def test_rows_of_some_columns(tmp_path: Path):
    file = tmp_path / "t.parquet"
    pq.write_table(pa.table({"id": ["a", "b"], "ids": [["x"], []], "big": ["", ""]}), file)
    rows = list(read_records(file, error=CorpusError, columns=("id", "ids")))
    assert [row.place for row in rows] == ["row 0", "row 1"]
    assert [row.fields for row in rows] == [{"id": "a", "ids": ["x"]}, {"id": "b", "ids": []}]
    assert parquet_columns(file, error=CorpusError) == ["id", "ids", "big"]


def test_json_lines_may_be_packed_under_any_name(tmp_path: Path):
    file = tmp_path / "of-others.jsonl"
    for content in (b'{"id": "a"}\n\n{"id": "b"}', gzip.compress(b'{"id": "a"}\n\n{"id": "b"}')):
        file.write_bytes(content)
        rows = list(read_records(file, error=CorpusError))
        assert [(row.place, row.fields["id"]) for row in rows] == [("line 1", "a"), ("line 3", "b")]


def test_a_key_that_stands_twice_is_refused(tmp_path: Path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b", "text": "x", "id": "c"}\n')
    with pytest.raises(CorpusError, match=r"t.jsonl, line 2: 'id' stands twice in one object"):
        list(read_records(file, error=CorpusError))


def test_the_error_is_the_callers(tmp_path: Path):
    file = tmp_path / "t.csv"
    with pytest.raises(EvaluationError, match="unknown kind of file"):
        read_records(file, error=EvaluationError)
    file = tmp_path / "t.parquet"
    file.write_bytes(b"PAR1 cut off")
    with pytest.raises(EvaluationError, match=r"cannot be read as Parquet .*is the file whole"):
        parquet_columns(file, error=EvaluationError)
    with pytest.raises(EvaluationError, match="cannot be read as Parquet"):
        list(read_records(file, error=EvaluationError))
