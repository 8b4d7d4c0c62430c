"""Files of the field: text, packed or not, with columns between blanks or tabs; rows of fields."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from reasonembed.errors import EvaluationError
from reasonembed.records import GZIP, object_of, read_records, shown

_Value = TypeVar("_Value")

_LINES = (".trec", ".tsv", ".txt", ".run", ".qrels")  # an id may begin with "{"


def read_content(file: Path | Traversable) -> bytes:
    """The bytes of a file, unpacked if gzip packed them, whatever its name.

    Raises:
        EvaluationError: It cannot be read, or its packed content is damaged or cut off.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error
    if not content.startswith(GZIP):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise EvaluationError(
            f"{file} is damaged or cut off ({error}); fetch or write it again"
        ) from error


def read_text(file: Path | Traversable) -> str:
    """The text of a file, unpacked if need be, without the mark that Windows puts before it.

    Raises:
        EvaluationError: As `read_content`, or it is not UTF-8.
    """
    try:
        return read_content(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{file} is not UTF-8: {error}") from error


def lines_of(text: str) -> Iterator[tuple[int, str]]:
    """Number and content of each line that is neither blank nor a comment (`# …`).

    Only a line feed ends a line: other characters that Python takes for one occur in ids.
    """
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip() and not line.startswith("# "):
            yield number, line.removesuffix("\r")


def blank_columns(line: str) -> list[str]:
    """Columns between blanks or tabs; as in C, a non-breaking blank is part of an id."""
    return [column.decode() for column in line.encode().split()]


def columns(line: str, count: int) -> list[str]:
    """Columns between tabs, which lets ids hold blanks, if there are `count`; else by blanks."""
    between_tabs = line.split("\t")
    return between_tabs if len(between_tabs) == count else blank_columns(line)


def parse_json(text: str, *, where: str) -> Any:
    """A JSON value, whole numbers as float.

    Raises:
        EvaluationError: It is not JSON, or a key stands twice in an object.
    """
    try:
        return json.loads(text, object_pairs_hook=object_of, parse_int=float)
    except json.JSONDecodeError as error:
        raise EvaluationError(f"{where}: not JSON, or cut off: {error}") from error
    except ValueError as error:  # a key that stands twice
        raise EvaluationError(f"{where}: {error}") from error


def is_json(file: Path | Traversable, text: str) -> bool:
    """Whether a file holds JSON: its name says so, or its name says nothing and it begins so."""
    name = file.name.removesuffix(".gz")
    if name.endswith((".json", ".jsonl")):
        return True
    return not name.endswith(_LINES) and text.lstrip()[:1] == "{"


def read_rows(paths: Sequence[Path]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Place (file and line or row) and fields of every row of some files of one table."""
    for path in paths:
        for record in read_records(path, error=EvaluationError):
            yield f"{path}, {record.place}", record.fields


def get_string(row: Mapping[str, Any], *names: str, where: str) -> str:
    """The first of some columns that the row has.

    Raises:
        EvaluationError: It is no string, or blank, or there is none of the columns.
    """
    name = next((name for name in names if name in row), names[0])
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(
            f"{where}: {name!r} must be a string that is not blank, got {shown(value)}"
        )
    return value


def get_ids(row: Mapping[str, Any], name: str, *, where: str) -> list[str]:
    """A column of ids, as they stand.

    Raises:
        EvaluationError: It is no list of strings, or one of them is empty.
    """
    ids = row.get(name)
    if not isinstance(ids, list) or not all(isinstance(one, str) and one for one in ids):
        raise EvaluationError(f"{where}: {name!r} must be a list of ids, got {shown(ids)}")
    return ids


def insert(table: dict[str, _Value], key: str, value: _Value, *, where: str) -> None:
    """Adds an entry.

    Raises:
        EvaluationError: The key is there already.
    """
    if key in table:
        raise EvaluationError(f"{where}: {key!r} stands there twice; keep one")
    table[key] = value
