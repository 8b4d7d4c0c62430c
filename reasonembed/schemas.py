"""The Arrow schema of every hand-off, in pipeline order; the place to start reading.

Between any two stages lies Parquet with one of these schemas. Ids are strings, deterministic, and
exist before a model runs, so that every stage is "planned ids minus committed ids". A failed row is
a row: `status` tells what happened, `detail` why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from numbers import Integral

import pyarrow as pa

from reasonembed.errors import SchemaError


class Status(StrEnum):
    """What became of a row that a model was asked for."""

    OK = "ok"
    TRUNCATED = "truncated"  # the model reached its token limit
    INVALID = "invalid"  # the answer has not the form that was asked for
    ERROR = "error"  # the engine refused or failed
    FILTERED = "filtered"  # a stated rule set the row aside


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


_LLM_FIELDS = [
    _required("status", pa.string()),
    pa.field("detail", pa.string()),  # why the status is not ok
    pa.field("finish_reason", pa.string()),  # as the engine gave it: stop, length, ...
    _required("prompt_tokens", pa.int32()),
    _required("cached_tokens", pa.int32()),  # of these, found in the prefix cache; 0 where unknown
    _required("completion_tokens", pa.int32()),
    _required("tries", pa.int16()),  # answers asked for; tokens are those of all of them
    _required("seed", pa.int64()),
    _required("model", pa.string()),
]

CORPUS = pa.schema(
    [
        _required("doc_id", pa.string()),
        _required("text", pa.string()),
        _required("title", pa.string()),
        _required("task", pa.string()),
        pa.field("parent_id", pa.string()),  # the long document that a passage was cut from
        _required("text_hash", pa.string()),  # of the whitespace-normalised text
        _required("group_id", pa.string()),  # documents with equal text share a group
    ]
)
SEEDS = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("source_doc_id", pa.string()),
        _required("task", pa.string()),
        _required("min_words", pa.int32()),
        _required("max_words", pa.int32()),
        _required("education_level", pa.string()),
        _required("seed", pa.int64()),
    ]
)
DOMAINS = pa.schema(
    [
        _required("doc_id", pa.string()),
        _required("task", pa.string()),
        pa.field("probability", pa.float32()),  # of yes, of belonging to the domain
        *_LLM_FIELDS,
    ]
)
QUERIES = pa.schema(
    [
        _required("query_id", pa.string()),
        pa.field("query", pa.string()),  # null unless status is ok
        _required("source_doc_id", pa.string()),
        _required("task", pa.string()),
        *_LLM_FIELDS,
    ]
)
_ORIGIN = pa.list_(
    pa.struct([_required("retriever", pa.string()), _required("rank", pa.int32())])  # from 1
)
CANDIDATES = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("source_doc_id", pa.string()),
        _required("task", pa.string()),
        _required("doc_ids", pa.list_(pa.string())),  # best first, after fusion
        _required("scores", pa.list_(pa.float32())),  # of the fusion; of the only retriever
        _required("origins", pa.list_(_ORIGIN)),  # of each candidate
        _required("num_excluded", pa.int32()),  # documents shut out before the cut
        # Of the source by the miner, among what may be found; null beyond the miner's top k.
        pa.field("source_rank", pa.int32()),
    ]
)
HITS = pa.schema(
    [
        _required("shard", pa.string()),  # hash of the parts that it is made of
        _required("query_block", pa.string()),  # hash of the queries and of what they exclude
        _required("query_ids", pa.list_(pa.string())),
        _required("doc_ids", pa.list_(pa.list_(pa.string()))),  # of each query, best first
        _required("scores", pa.list_(pa.list_(pa.float32()))),
    ]
)
JUDGMENTS = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("doc_id", pa.string()),
        pa.field("relevance_label", pa.int8()),  # 1..5, null where the answer holds none
        pa.field(
            "expected_label", pa.float32()
        ),  # mean of 1..5 under the score token, if asked for
        pa.field("confidence", pa.float32()),  # probability of the label; of written votes, share
        pa.field("analysis", pa.string()),  # the trajectory that gave the label, as written
        _required("votes", pa.list_(pa.int8())),  # labels of all analyses that held one
        pa.field("quick_label", pa.float32()),  # expected label of the cascade's first pass
        _required("route", pa.string()),  # `full`, `quick` or `checked` (sure, analysed as well)
        *_LLM_FIELDS,
    ]
)
TRAJECTORIES = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("doc_id", pa.string()),
        _required("sample", pa.string()),  # number of the analysis of this pair, from 0
        _required("task", pa.string()),
        _required("prompt", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("relevance_label", pa.int8()),
        *_LLM_FIELDS,
    ]
)
REWRITES = pa.schema(
    [
        _required("query_id", pa.string()),
        pa.field("rewritten_query", pa.string()),  # null unless status is ok
        *_LLM_FIELDS,
    ]
)
_LABELLED = pa.list_(
    pa.struct(
        [
            _required("doc_id", pa.string()),
            _required("text", pa.string()),
            pa.field("label", pa.float32()),
            _required("text_hash", pa.string()),
        ]
    )
)
SAMPLES = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("task", pa.string()),
        _required("instruction", pa.string()),
        _required("query", pa.string()),
        _required("rewritten_query", pa.string()),
        _required("positives", _LABELLED),
        _required("negatives", _LABELLED),
        pa.field("source_doc_id", pa.string()),  # null where samples of another origin name none
        _required("split", pa.string()),  # `train` or `held_out`
    ]
)
RUNS = pa.schema(
    [
        _required("query_id", pa.string()),
        _required("doc_ids", pa.list_(pa.string())),
        _required("scores", pa.list_(pa.float32())),
    ]
)


def embeddings(dimension: int, *, dtype: str = "float32", is_endpoint: bool = False) -> pa.Schema:
    """Schema of `embeddings`: one vector an id.

    Args:
        dimension: Length of every vector.
        dtype: `float32` or `float16`.
        is_endpoint: A server gives them, and may find a text too long: `is_cut`.
    """
    value = pa.float16() if dtype == "float16" else pa.float32()
    fields = [_required("id", pa.string()), _required("vector", pa.list_(value, dimension))]
    return pa.schema(fields + [_required("is_cut", pa.bool_())] * is_endpoint)


@dataclass(frozen=True)
class Artifact:
    """What one hand-off is.

    Attributes:
        schema: Its columns.
        key: The columns that identify a row.
        latest_wins: Whether a later row of a key takes the place of an earlier one that is good;
            for what is cheap to make again and follows a growing corpus.
    """

    schema: pa.Schema
    key: tuple[str, ...]
    latest_wins: bool = False


ARTIFACTS: dict[str, Artifact] = {
    "corpus": Artifact(CORPUS, ("doc_id",)),
    "seeds": Artifact(SEEDS, ("query_id",)),
    "domains": Artifact(DOMAINS, ("doc_id",)),
    "queries": Artifact(QUERIES, ("query_id",)),
    "hits": Artifact(HITS, ("shard", "query_block")),
    "candidates": Artifact(CANDIDATES, ("query_id",), latest_wins=True),
    "judgments": Artifact(JUDGMENTS, ("query_id", "doc_id")),
    "trajectories": Artifact(TRAJECTORIES, ("query_id", "doc_id", "sample")),
    "rewrites": Artifact(REWRITES, ("query_id",)),
    "samples": Artifact(SAMPLES, ("query_id",)),
    "runs": Artifact(RUNS, ("query_id",)),
}


def conform(table: pa.Table, schema: pa.Schema, *, where: str) -> pa.Table:
    """Returns `table` with exactly the declared columns, order and types.

    Args:
        table: Any table that holds the declared columns.
        schema: One of this module's schemas.
        where: What is being read or written, for the message.

    Raises:
        SchemaError: A column is missing or unknown, a type cannot be cast without loss, or a
            column that must not be null holds a null.
    """
    _check_names(table.column_names, schema, where=where)
    columns = [_column(table.column(field.name), field, where=where) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def from_rows(rows: list[dict[str, object]], schema: pa.Schema, *, where: str) -> pa.Table:
    """A checked table from row dictionaries; see `conform` for what is refused.

    Every row must hold every column: a key that is misspelt would else become a null.
    """
    declared = set(schema.names)
    for row in rows:
        if row.keys() != declared:
            _check_names(row, schema, where=where)
    columns = [_column([row[f.name] for row in rows], f, where=where) for f in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _check_names(names: Iterable[str], schema: pa.Schema, *, where: str) -> None:
    given = list(names)
    missing = [name for name in schema.names if name not in given]
    unknown = [name for name in given if name not in schema.names]
    double = sorted({name for name in given if given.count(name) > 1})
    if missing or unknown or double:
        raise SchemaError(
            f"{where}: missing columns {missing}, unknown columns {unknown}"
            + (f", columns that stand twice {double}" if double else "")
        )


def _column(values: list[object] | pa.ChunkedArray, field: pa.Field, *, where: str) -> pa.Array:
    try:
        array = _array(values, field.type) if isinstance(values, list) else values
        cast = array.cast(field.type)  # safe: refuses what it cannot keep, nested nulls included
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise SchemaError(
            f"{where}: column {field.name!r} does not fit {field.type}: {error}"
        ) from error
    if not field.nullable and cast.null_count:
        raise SchemaError(f"{where}: column {field.name!r} holds {cast.null_count} null values")
    return cast


def _array(values: list[object], kind: pa.DataType) -> pa.Array:
    if pa.types.is_integer(kind):  # Arrow would cut 1.5 down to 1
        for value in values:
            if value is not None and not isinstance(value, Integral):
                raise TypeError(f"{value!r} is no whole number")
    return pa.array(values, kind)


def stable_hash(*parts: object, size: int = 8) -> str:
    """Hex blake2b of the parts; the same on every machine and Python (ids, seeds, fingerprints)."""
    joined = "\x1f".join(str(part) for part in parts)
    return hashlib.blake2b(joined.encode(), digest_size=size).hexdigest()


def text_id(text: str, *, instruction: str | None) -> str:
    """Key of a vector: of a document's text (no instruction) or of a query under its instruction.

    Bare documents and queries under an empty instruction are different things to an encoder.
    """
    return stable_hash("document" if instruction is None else f"query {instruction}", text, size=16)


def row_seed(run_seed: int, *parts: object) -> int:
    """A seed in [0, 2**31) that depends on the row alone, never on order or threads."""
    return int(stable_hash(run_seed, *parts, size=4), 16) >> 1
