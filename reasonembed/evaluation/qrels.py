"""Relevance judgments and exclusions from files, as others write them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.files import (
    columns,
    get_string,
    insert,
    is_json,
    lines_of,
    parse_json,
    read_text,
)
from reasonembed.evaluation.metrics import Qrels
from reasonembed.records import read_json_lines, shown

NOTHING = "N/A"
"""What BRIGHT writes in place of an empty list of ids."""

_SHOWN = 5  # ids named in a message
_COLUMNS = (  # of JSON lines
    ("query-id", "query_id", "q_id"),
    ("corpus-id", "doc_id", "p_id"),
    ("score", "relevance"),
)


def read_qrels(file: Path | Traversable) -> Qrels:
    """Reads judgments, gzip-packed or not, in whichever form they are.

    TREC: `query_id 0 doc_id relevance` between blanks or tabs. BEIR: `query-id corpus-id score`
    between tabs, with or without its header. JSON: {query: {document: relevance}}. JSON lines
    (`.jsonl`): one judgment each, under BEIR's names, R2MED's or ours. Rows of relevance 0 and
    below are kept; see `gold_of`.

    Raises:
        EvaluationError: It cannot be read, a line or value has not the form, a pair stands twice,
            or nothing is judged; the place is named.
    """
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        qrels = _from_json_lines(file)
    else:
        text = read_text(file)
        qrels = _from_json(text, file) if is_json(file, text) else _from_lines(text, file)
    if not qrels:
        raise EvaluationError(f"{file} holds no judgments")
    return qrels


def gold_of(qrels: Mapping[str, Mapping[str, int]]) -> Qrels:
    """Only what is relevant; a query without gold stays, with nothing under it."""
    return {
        query_id: {doc_id: relevance for doc_id, relevance in judged.items() if relevance > 0}
        for query_id, judged in qrels.items()
    }


def read_excluded(file: Path | Traversable) -> dict[str, frozenset[str]]:
    """Reads which documents a query must not get back, gzip-packed or not.

    Either lines `query_id doc_id` between blanks or tabs, or JSON lines with "excluded_ids" and
    "query_id" (or "id", as BRIGHT's examples have it). BRIGHT's "N/A" is no document.

    Raises:
        EvaluationError: It cannot be read, or a line has not the form; the place is named.
    """
    text = read_text(file)
    found: dict[str, set[str]] = {}
    if is_json(file, text):
        for row in read_json_lines(file, error=EvaluationError):
            query_id, doc_ids = _excluded_row(row.fields, where=f"{file}, {row.place}")
            found.setdefault(query_id, set()).update(doc_ids)
    else:
        for number, line in lines_of(text):
            fields = columns(line, 2)
            if len(fields) != 2 or not all(fields):
                raise EvaluationError(
                    f"{file}, line {number}: expected `query_id doc_id`, got {line[:80]!r}"
                )
            found.setdefault(fields[0], set()).add(fields[1])
    return {query_id: frozenset(doc_ids - {NOTHING}) for query_id, doc_ids in found.items()}


def check_excluded(
    qrels: Mapping[str, Mapping[str, int]], excluded: Mapping[str, frozenset[str]]
) -> None:
    """Makes sure that no document is gold and excluded.

    Raises:
        EvaluationError: One is; the message names the query and the documents.
    """
    for query_id, doc_ids in excluded.items():
        both = sorted(id_ for id_ in doc_ids if qrels.get(query_id, {}).get(id_, 0) > 0)
        if both:
            raise EvaluationError(
                f"query {query_id!r} has documents that are gold and excluded: {both[:_SHOWN]}; a "
                "document can be one of the two"
            )


def _from_lines(text: str, file: Path | Traversable) -> Qrels:
    qrels: Qrels = {}
    for place, (number, line) in enumerate(lines_of(text)):
        between_tabs = line.split("\t")
        fields = between_tabs if len(between_tabs) == 3 else columns(line, 4)
        if place == 0 and len(fields) == 3 and fields[-1] == "score":  # BEIR's header
            continue
        where = f"{file}, line {number}"
        try:
            query_id, doc_id, relevance = fields[0], fields[-2], int(fields[-1])
            complete = bool(len(fields) in (3, 4) and query_id and doc_id)
        except (ValueError, IndexError):
            complete = False
        if not complete:
            raise EvaluationError(
                f"{where}: expected query-id, corpus-id and a whole-number score between tabs "
                f"(BEIR), or `query_id 0 doc_id relevance` (TREC), got {line[:80]!r}"
            )
        insert(qrels.setdefault(query_id, {}), doc_id, relevance, where=where)
    return qrels


def _from_json_lines(file: Path | Traversable) -> Qrels:
    qrels: Qrels = {}
    for row in read_json_lines(file, error=EvaluationError):
        where = f"{file}, {row.place}"
        query_id, doc_id = (get_string(row.fields, *names, where=where) for names in _COLUMNS[:2])
        name = next((name for name in _COLUMNS[2] if name in row.fields), _COLUMNS[2][0])
        relevance = _whole(row.fields.get(name), where=f"{where}: {name!r}")
        insert(qrels.setdefault(query_id, {}), doc_id, relevance, where=where)
    return qrels


def _whole(value: object, *, where: str) -> int:
    """A whole number, perhaps written as 1.0; NaN and infinity, which JSON may hold, are none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
        raise EvaluationError(f"{where} must be a whole number, got {shown(value)}")
    return int(value)


def _from_json(text: str, file: Path | Traversable) -> Qrels:
    value = parse_json(text, where=str(file))
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise EvaluationError(f"{file}: expected JSON of {{query: {{document: relevance}}}}")
    qrels: Qrels = {}
    for query_id, judged in value.items():
        qrels[query_id] = {
            doc_id: _whole(relevance, where=f"{file}: query {query_id!r}, document {doc_id!r}")
            for doc_id, relevance in judged.items()
        }
    return qrels


def _excluded_row(fields: Mapping[str, Any], *, where: str) -> tuple[str, list[str]]:
    query_id, doc_ids = fields.get("query_id", fields.get("id")), fields.get("excluded_ids")
    if (
        isinstance(query_id, str)
        and isinstance(doc_ids, list)
        and all(isinstance(one, str) for one in doc_ids)
    ):
        return query_id, doc_ids
    raise EvaluationError(
        f'{where}: expected {{"query_id": …, "excluded_ids": [ids]}}, got {shown(fields)}'
    )
