"""Runs as files: TREC run files, tables of `schemas.RUNS`, and JSON as others write it."""

from __future__ import annotations

import gzip
import io
import logging
import math
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.files import (
    columns,
    is_json,
    lines_of,
    parse_json,
    read_content,
    read_text,
)
from reasonembed.evaluation.metrics import Run, best_first, score_array
from reasonembed.evaluation.qrels import check_excluded
from reasonembed.schemas import RUNS, conform, from_rows

_PARQUET = b"PAR1"
_TREC_SUFFIXES = (".trec", ".txt", ".run")
_GZIP_LEVEL = 6  # 9 takes three times as long and saves a twentieth

log = logging.getLogger(__name__)


def read_run(path: Path) -> Run:
    """Reads a run, gzip-packed or not, in whichever form it is.

    TREC: `query_id Q0 doc_id rank score tag`. JSON: {query: {document: score}}. Parquet: a table
    of `schemas.RUNS`.

    Returns:
        Every query's documents best first, equal scores as in the file.

    Raises:
        EvaluationError: It cannot be read or is damaged, a line or value has not the form, a score
            is not finite, or a query or document stands twice; the place is named.
        SchemaError: A Parquet file has other columns.
    """
    content = read_content(path)
    if content.startswith(_PARQUET):
        try:
            table = pq.read_table(io.BytesIO(content))
        except (pa.ArrowException, OSError) as error:
            raise EvaluationError(f"{path} is damaged or cut off: {error}") from error
        return from_table(conform(table, RUNS, where=str(path)), where=str(path))
    if path.name.removesuffix(".gz").endswith(".parquet"):
        raise EvaluationError(f"{path} is no Parquet file, or its beginning is lost")
    text = read_text(path)
    return _from_json(text, path) if is_json(path, text) else _from_trec(text, path)


def write_run(run: Run, path: Path, *, tag: str) -> None:
    """Writes a run in the form that its name asks for.

    Args:
        run: Score by query id and doc id.
        path: Ends in `.parquet`, or in `.trec`, `.txt` or `.run`, to which `.gz` may be added.
        tag: Of the system, in a TREC file.

    Raises:
        EvaluationError: The name ends otherwise, or as `write_trec`.
    """
    if path.suffix == ".parquet":
        pq.write_table(to_table(run), path)
    elif path.name.removesuffix(".gz").endswith(_TREC_SUFFIXES):
        write_trec(run, path, tag=tag)
    else:
        raise EvaluationError(
            f"{path}: runs are written as .parquet or as {', '.join(_TREC_SUFFIXES)} (.gz)"
        )


def write_trec(run: Run, path: Path, *, tag: str) -> None:
    """Writes `query_id Q0 doc_id rank score tag` lines, best first; equal scores as in the run.

    Scores are written so that reading gives the same numbers back. A name that ends in `.gz` is
    packed; equal runs give equal files.

    Raises:
        EvaluationError: An id or the tag is empty or holds white space, which would shift columns,
            or a score is no finite number.
    """
    _check_names([tag])
    _check_names(run)
    lines = []
    for query_id, given in run.items():
        _check_names(given)
        scores = dict(zip(given, score_array(query_id, given).tolist(), strict=True))
        for rank, doc_id in enumerate(best_first(scores), start=1):
            lines.append(f"{query_id} Q0 {doc_id} {rank} {scores[doc_id]!r} {tag}\n")
    content = "".join(lines).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content, _GZIP_LEVEL, mtime=0)
    path.write_bytes(content)


def write_both(run: Run, table: Path, trec: Path, *, tag: str) -> dict[str, str]:
    """Writes a run as a table and, where its ids can stand there, as a TREC file.

    Args:
        run: Score by query id and doc id.
        table: Ends in `.parquet`.
        trec: See `write_run`.
        tag: Of the system.

    Returns:
        For the provenance: why there is no TREC file, under `no_trec_file`; else nothing.
    """
    write_run(run, table, tag=tag)
    try:
        write_run(run, trec, tag=tag)
    except EvaluationError as error:  # blanks in ids; the table holds the same run
        log.warning("%s is not written, %s holds the run: %s", trec, table.name, error)
        return {"no_trec_file": str(error)}
    return {}


def to_table(run: Run) -> pa.Table:
    """A table of `schemas.RUNS`, one row a query, best first; scores become float32."""
    rows: list[dict[str, object]] = []
    for query_id, scores in run.items():
        doc_ids = best_first(scores)
        ordered = [scores[doc_id] for doc_id in doc_ids]
        rows.append({"query_id": query_id, "doc_ids": doc_ids, "scores": ordered})
    return from_rows(rows, RUNS, where="runs")


def from_table(table: pa.Table, *, where: str = "runs") -> Run:
    """The run that a table of `schemas.RUNS` holds.

    Args:
        table: One row a query.
        where: What is read, for the message.

    Raises:
        EvaluationError: A query or, under a query, a document stands twice, the two lists of a row
            differ in length, or a score is not finite.
    """
    run: Run = {}
    for row in table.to_pylist():
        query_id, doc_ids, scores = row["query_id"], row["doc_ids"], row["scores"]
        if query_id in run or len(set(doc_ids)) != len(doc_ids) or len(doc_ids) != len(scores):
            raise EvaluationError(
                f"{where}: query {query_id!r} stands twice, or holds a document twice, or has "
                f"{len(doc_ids)} documents with {len(scores)} scores"
            )
        run[query_id] = dict(zip(doc_ids, scores, strict=True))
    return _in_order(run, where=where)


def without_excluded(
    run: Mapping[str, Mapping[str, float]],
    qrels: Mapping[str, Mapping[str, int]],
    excluded: Mapping[str, frozenset[str]],
) -> tuple[Run, int]:
    """A run without the documents that its queries must not get back, and how many those were.

    What stood below moves up, but nothing comes after the end: a list that was cut before the
    removal is shorter than one that was cut after it.

    Raises:
        EvaluationError: A document is gold and excluded.
    """
    check_excluded(qrels, excluded)
    kept: Run = {}
    for query_id, scores in run.items():
        out = excluded.get(query_id, frozenset())
        kept[query_id] = {doc_id: score for doc_id, score in scores.items() if doc_id not in out}
    return kept, sum(map(len, run.values())) - sum(map(len, kept.values()))


def _from_trec(text: str, path: Path) -> Run:
    """A TREC run; ranks are ignored, as trec_eval does.

    A line of seven columns is refused: the seventh may be a comment, or an id held a blank.
    """
    run: Run = {}
    for number, line in lines_of(text):
        try:
            query_id, _, doc_id, _, score, _ = columns(line, 6)
            value = float(score)
            if not math.isfinite(value):
                raise ValueError(line)
        except ValueError:
            raise EvaluationError(
                f"{path}, line {number}: expected `query_id Q0 doc_id rank score tag` with a "
                f"finite score, got {line[:80]!r}; ids with blanks need tabs between the columns"
            ) from None
        scores = run.setdefault(query_id, {})
        if doc_id in scores:
            raise EvaluationError(
                f"{path}, line {number}: document {doc_id!r} stands twice for query {query_id!r}"
            )
        scores[doc_id] = value
    return _in_order(run, where=str(path))


def _from_json(text: str, path: Path) -> Run:
    value = parse_json(text, where=str(path))
    if not isinstance(value, dict) or not all(isinstance(one, dict) for one in value.values()):
        raise EvaluationError(f"{path}: expected JSON of {{query: {{document: score}}}}")
    return _in_order(value, where=str(path))


def _in_order(run: Run, *, where: str) -> Run:
    """Checks the scores of a run that was read, and puts its documents in order."""
    try:
        for query_id, scores in run.items():
            score_array(query_id, scores)
    except EvaluationError as error:
        raise EvaluationError(f"{where}: {error}") from None
    return {
        query_id: {doc_id: scores[doc_id] for doc_id in best_first(scores)}
        for query_id, scores in run.items()
    }


def _check_names(names: Mapping[str, object] | list[str]) -> None:
    # ASCII white space and nothing else ends a column, as in C; all at once, because it is faster.
    encoded = [name.encode() for name in names]
    if b" ".join(encoded).split() == encoded and b"#" not in encoded:
        return
    wrong = next(name for name in names if name.encode().split() != [name.encode()] or name == "#")
    raise EvaluationError(
        f"{wrong!r} cannot stand in a TREC run file: ids and tags must be non-empty and free of "
        "white space, and # begins a comment; write a table instead"
    )
