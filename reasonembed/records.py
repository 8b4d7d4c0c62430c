"""Rows of Parquet and JSONL files, and which files make up one table.

Every row comes with its place, for messages. Corpora raise `CorpusError` and collections
`EvaluationError`, so the reader is told which.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from reasonembed.errors import ReasonEmbedError

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
GZIP = b"\x1f\x8b"
"""What gzip-packed files begin with."""

_BATCH_ROWS = 4096
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.[a-z.]+")


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes:
        place: Where it stands, for messages: `line 7` (JSONL, from 1) or `row 6` (Parquet, from 0).
        fields: Values by column.
    """

    place: str
    fields: Mapping[str, Any]


def read_records(
    path: Path, *, error: type[ReasonEmbedError], columns: Collection[str] | None = None
) -> Iterator[Record]:
    """Rows of a `.parquet`, `.jsonl` or `.jsonl.gz` file; blank lines are no rows.

    Args:
        path: The file.
        error: What is raised.
        columns: Columns of a Parquet file that are wanted; default all.

    Raises:
        ReasonEmbedError: As `error`: the file is of another kind, ends early or is damaged.
    """
    if path.name.endswith(".parquet"):
        return _parquet_records(path, error, columns)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return read_json_lines(path, error=error)
    raise error(f"{path}: unknown kind of file; use .parquet, .jsonl or .jsonl.gz")


def parquet_columns(path: Path, *, error: type[ReasonEmbedError]) -> list[str]:
    """Names of the columns of a Parquet file.

    Raises:
        ReasonEmbedError: As `error`: it is none, or ends early.
    """
    try:
        return list(pq.read_schema(path).names)
    except (pa.ArrowException, OSError) as wrong:
        raise _no_parquet(path, wrong, error) from wrong


def shown(value: object) -> str:
    """A value for a message: its type, and its beginning."""
    return f"{type(value).__name__} {repr(value)[:60]}"


def table_files(folder: Path, name: str, *, error: type[ReasonEmbedError]) -> list[Path]:
    """The files of one table: `name.parquet`, its shards, `name.jsonl` or `name.jsonl.gz`.

    Shards are called `name-00000-of-00003.parquet`, as on the hub.

    Returns:
        The files in the order of their rows; none if the folder holds no such table.

    Raises:
        ReasonEmbedError: As `error`: some shards are missing.
    """
    shards = sorted(folder.glob(f"{name}-*-of-*.parquet"))
    if shards:
        check_shards(shards, error=error)
        return shards
    whole = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return [path for path in whole if path.is_file()][:1]


def check_shards(paths: Iterable[Path], *, error: type[ReasonEmbedError]) -> None:
    """Makes sure that, of files numbered `-00000-of-00003`, all three are there.

    Raises:
        ReasonEmbedError: As `error`: the message names those that are missing.
    """
    there: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if parts := _SHARD.fullmatch(path.name):
            table = (path.parent, parts["stem"], int(parts["count"]))
            there.setdefault(table, set()).add(int(parts["number"]))
    for (folder, stem, count), numbers in there.items():
        missing = sorted(set(range(count)) - numbers)
        if missing:
            raise error(
                f"{folder}: {stem!r} has {count} files, of which {len(missing)} are missing, such "
                f"as number {missing[0]:05d}; download it again"
            )


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for `object_pairs_hook`.

    Raises:
        ValueError: A key stands twice; most readers keep the last and say nothing.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"{twice!r} stands twice in one object; keep one")
    return found


def read_json_lines(path: Path | Traversable, *, error: type[ReasonEmbedError]) -> Iterator[Record]:
    """Rows of a file of JSON objects, one a line, gzip-packed or not, whatever its name.

    Raises:
        ReasonEmbedError: As `error`: it cannot be read, or a line is no JSON object.
    """
    for place, line in _lines(path, error):
        try:
            fields = json.loads(line, object_pairs_hook=object_of)
        except json.JSONDecodeError as wrong:
            raise error(
                f"{path}, {place}: not valid JSON ({wrong.msg} at column {wrong.colno}); "
                "write one JSON object a line"
            ) from wrong
        except ValueError as wrong:
            raise error(f"{path}, {place}: {wrong}") from wrong
        if not isinstance(fields, dict):
            raise error(f"{path}, {place}: a JSON object is needed, got {shown(fields)}")
        yield Record(place, fields)


def _lines(path: Path | Traversable, error: type[ReasonEmbedError]) -> Iterator[tuple[str, str]]:
    """Place and text of every line that is not blank."""
    for number, line in enumerate(_raw_lines(path, error), start=1):
        place = f"line {number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as wrong:
            raise error(
                f"{path}, {place}: not valid UTF-8 ({wrong.reason} at byte {wrong.start}); "
                "convert the file to UTF-8"
            ) from wrong
        if text.strip():
            yield place, text


def _raw_lines(path: Path | Traversable, error: type[ReasonEmbedError]) -> Iterator[bytes]:
    try:
        with path.open("rb") as raw:
            is_packed = raw.read(len(GZIP)) == GZIP or path.name.endswith(".gz")
            raw.seek(0)
            yield from gzip.GzipFile(fileobj=raw) if is_packed else raw
    except (OSError, EOFError, zlib.error) as wrong:
        raise error(f"{path}: cannot be read ({wrong}); is the file whole?") from wrong


def _parquet_records(
    path: Path, error: type[ReasonEmbedError], columns: Collection[str] | None
) -> Iterator[Record]:
    try:
        with pq.ParquetFile(path) as file:
            names = [n for n in file.schema_arrow.names if columns is None or n in columns]
            row = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=names):
                for index in range(batch.num_rows):
                    yield _parquet_record(path, batch, error, index=index, row=row + index)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as wrong:
        raise _no_parquet(path, wrong, error) from wrong


def _parquet_record(
    path: Path, batch: pa.RecordBatch, error: type[ReasonEmbedError], *, index: int, row: int
) -> Record:
    place = f"row {row}"
    try:
        fields = {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as wrong:
        raise error(
            f"{path}, {place}: not valid UTF-8 ({wrong.reason} at byte {wrong.start}); "
            "write the strings as UTF-8"
        ) from wrong
    return Record(place, fields)


def _no_parquet(path: Path, wrong: Exception, error: type[ReasonEmbedError]) -> ReasonEmbedError:
    return error(f"{path}: cannot be read as Parquet ({wrong}); is the file whole?")
