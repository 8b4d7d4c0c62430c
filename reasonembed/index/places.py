"""Where rows lie in an artifact's parts, so that a worker opens only what it needs.

A table of places has the columns `part`, `group` (row group in the part) and `row` (in the group).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reasonembed.artifacts import Artifact
from reasonembed.errors import StorageError
from reasonembed.index.exact import NO_DOCUMENT

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Wanted:
    """Rows of one row group, and where in the table of places they were asked for."""

    part: str
    group: int
    rows: Indices
    where: Indices


def places_of(part: str, group: int, num_rows: int) -> dict[str, pa.Array]:
    """The place of every row of a row group, as columns."""
    return {
        "part": pa.repeat(part, num_rows),
        "group": pa.repeat(pa.scalar(group, pa.int32()), num_rows),
        "row": pa.array(np.arange(num_rows, dtype=np.int32)),
    }


def by_row_group(places: pa.Table) -> Iterator[Wanted]:
    """Cuts places by row group, in no promised order."""
    if not places.num_rows:
        return
    parts = places.column("part").combine_chunks().dictionary_encode()
    groups = places.column("group").to_numpy()
    rows = places.column("row").to_numpy().astype(np.int64)
    codes = parts.indices.to_numpy().astype(np.int64) * (int(groups.max()) + 1) + groups
    order = np.argsort(codes, kind="stable")
    for where in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        part = parts.dictionary[int(parts.indices[int(where[0])].as_py())].as_py()
        yield Wanted(part, int(groups[where[0]]), rows[where], where)


def locate(artifact: Artifact) -> pa.Table:
    """Where each committed vector lies: `id` and its place; the first row of an id counts."""
    schema = pa.schema(
        [("id", pa.string()), ("part", pa.string()), ("group", pa.int32()), ("row", pa.int32())]
    )
    tables = [
        pa.table({"id": table.column("id"), **places_of(part, group, table.num_rows)})
        for part, group, table in artifact.row_groups(columns=["id"])
    ]
    return first_of_each(pa.concat_tables(tables) if tables else schema.empty_table(), "id")


def first_of_each(table: pa.Table, column: str) -> pa.Table:
    """The first row of each value of a column, in the order of the table."""
    numbered = pa.table(
        {"value": table.column(column), "row": np.arange(table.num_rows, dtype=np.int64)}
    )
    rows = numbered.group_by("value").aggregate([("row", "min")]).column("row_min")
    return table.take(np.sort(rows.to_numpy()))


def places_for(ids: pa.Array, located: pa.Table, *, name: str) -> pa.Table:
    """The places of ids, in their order.

    Raises:
        StorageError: One of them has no vector.
    """
    rows = pc.index_in(ids, value_set=located.column("id").combine_chunks())
    if rows.null_count:
        example = pc.filter(ids, pc.is_null(rows))[0].as_py()
        raise StorageError(
            f"{name}: {rows.null_count} of {len(ids)} texts have no vector, such as {example}; run "
            "the stage embed"
        )
    return located.select(["part", "group", "row"]).take(rows)


def read_vectors(
    artifact: Artifact, places: pa.Table, *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Vectors in the order of their places, float32 [N, D]; one row group is in memory at a time.

    Args:
        artifact: Where they are committed.
        places: See the module.
        out: Filled in place of an array of its own, such as one that is a file.

    Raises:
        StorageError: See `Artifact.row_group`.
    """
    dimension = artifact.schema.field("vector").type.list_size
    vectors_ND = np.empty((places.num_rows, dimension), dtype=np.float32) if out is None else out
    for wanted in by_row_group(places):
        column = artifact.row_group(wanted.part, wanted.group, columns=["vector"]).column(0)
        flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        vectors_ND[wanted.where] = flat.reshape(-1, dimension)[wanted.rows]
    return vectors_ND


def excluded_positions(excluded: pa.ChunkedArray, doc_ids: pa.Array) -> list[list[int]]:
    """Positions in `doc_ids` of each query's excluded documents, of those that are in it."""
    lists = excluded.combine_chunks()
    found = pc.index_in(lists.flatten(), value_set=doc_ids).fill_null(NO_DOCUMENT).to_numpy()
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())[:-1]
    return [part[part >= 0].tolist() for part in np.split(found, ends)] if len(lists) else []
