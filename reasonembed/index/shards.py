"""Exact search over a corpus that need not fit one process: shards, blocks of queries, their merge.

Reads a vectors artifact, writes `hits`. A shard is a group of committed parts, a block a group of
queries with what each must not return; both are named by the hash of what they hold, so committed
hits stay valid for as long as their names are asked for, and a corpus that grew is searched in its
new shards alone. Scores are exact and depend on two vectors only (`index.exact`), so that shards
change no result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import Artifact
from reasonembed.index.exact import (
    NO_DOCUMENT,
    Filter,
    Positions,
    Scores,
    Vectors,
    merge_topk,
    search,
)
from reasonembed.index.places import excluded_positions, places_for, read_vectors
from reasonembed.schemas import HITS, conform, stable_hash

_HITS_IN_BLOCK = 2**20  # ids and scores of one block and shard: some 30 MB


@dataclass(frozen=True)
class Shard:
    """Vectors that are searched together: `doc_id` and place, by doc id."""

    key: str
    rows: pa.Table


def plan_shards(
    documents: pa.Table, located: pa.Table, *, name: str, max_documents: int
) -> list[Shard]:
    """Groups committed parts into shards; vectors of texts that nobody asks for are left out.

    What one attempt of a job committed never shares a shard with what another did: later parts make
    new shards and leave the old ones as they are.

    Args:
        documents: `doc_id` and `text_id` of the documents to be searched.
        located: See `places.locate`.
        name: Of the vectors artifact.
        max_documents: Of a shard; a part that holds more is a shard of its own.

    Raises:
        StorageError: A document has no vector.
    """
    ids = documents.column("text_id").combine_chunks()
    places = places_for(ids, located, name=name)
    rows = pa.table({**_columns(documents, "doc_id", "text_id"), **_columns(places)})
    age = pc.index_in(ids, value_set=located.column("id").combine_chunks())
    rows = rows.take(np.argsort(age.to_numpy(), kind="stable"))
    return [
        _shard(rows.slice(start, stop - start), name)
        for start, stop in _part_groups(rows.column("part"), max_documents)
    ]


def _part_groups(parts: pa.ChunkedArray, max_rows: int) -> Iterator[tuple[int, int]]:
    """Start and end of runs of whole parts of one attempt, none longer than `max_rows`."""
    if not len(parts):
        return
    codes = parts.combine_chunks().dictionary_encode().indices.to_numpy()
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    start, attempt = 0, ""
    for low, high in pairwise(edges):
        own = parts[low].as_py().partition("-")[0]  # the ledger names parts <attempt>-<number>
        if low > start and (own != attempt or high - start > max_rows):
            yield start, low
            start = low
        attempt = own
    yield start, len(codes)


def _shard(rows: pa.Table, name: str) -> Shard:
    rows = rows.sort_by("doc_id")
    held = pc.binary_join_element_wise(rows.column("doc_id"), rows.column("text_id"), "\x1f")
    key = stable_hash(name, *held.to_pylist(), size=16)
    return Shard(key, rows.drop_columns(["text_id"]))


def group_queries(
    queries: pa.Table, known: Iterable[list[str]], *, k: int, max_queries: int
) -> list[pa.Table]:
    """Cuts queries into blocks; those of an earlier search stay together where they can.

    Args:
        queries: `query_id`, `text_id` and `excluded` (doc ids, each a list).
        known: Query ids of blocks that were searched before.
        k: Results a query.
        max_queries: Of a new block; fewer where k is large, to bound its hits.

    Returns:
        Tables of `queries`' rows; each row in one of them.
    """
    row_of = {id_: row for row, id_ in enumerate(queries.column("query_id").to_pylist())}
    blocks, taken = [], np.zeros(queries.num_rows, dtype=bool)
    size = max(1, min(max_queries, _HITS_IN_BLOCK // k))
    for query_ids in known:
        rows = [row_of.get(query_id, -1) for query_id in query_ids]
        if 0 < len(rows) <= size and min(rows) >= 0 and not taken[rows].any():
            blocks.append(queries.take(rows))
            taken[rows] = True
    rest = queries.filter(~taken)
    return blocks + [rest.slice(start, size) for start in range(0, rest.num_rows, size)]


def block_rows(queries: pa.Table, located: pa.Table, *, name: str) -> pa.Table:
    """A block as `ShardSearch` reads it: `query_id`, `excluded`, and the place of the vector.

    Raises:
        StorageError: A query has no vector.
    """
    ids = queries.column("text_id").combine_chunks()
    places = places_for(ids, located, name=name)
    return pa.table({**_columns(queries, "query_id", "excluded"), **_columns(places)})


def block_keys(queries: pa.Table, shards: Sequence[Shard], *, name: str, k: int) -> list[str]:
    """Name of a block in each shard: what is asked, and what of the shard must not be returned.

    A document that is shut out and lies in another shard does not count, so that new documents,
    which come in new shards, leave the names of what was searched as they are.
    """
    asked = queries.select(["query_id", "text_id"]).to_pylist()
    whole = stable_hash(name, k, *(f"{row['query_id']}\x1e{row['text_id']}" for row in asked))
    excluded = queries.column("excluded").combine_chunks()
    owners, ids = pc.list_parent_indices(excluded), excluded.flatten()
    keys = []
    for shard in shards:
        held = pc.is_in(ids, value_set=shard.rows.column("doc_id").combine_chunks())
        pairs = zip(owners.filter(held).to_pylist(), ids.filter(held).to_pylist(), strict=True)
        shut = sorted(f"{owner}\x1e{doc_id}" for owner, doc_id in pairs)
        keys.append(stable_hash(whole, *shut, size=16))
    return keys


class ShardSearch:
    """Maps planned pairs of a shard and a block to rows of `schemas.HITS`.

    Holds one shard at a time: plan the pairs of a shard next to each other.

    Args:
        vectors: Where the vectors lie.
        shard: The rows of a shard, by key.
        block: The rows of a block, by key.
        k: Results a query.
        device: Of the search, such as `cuda`; default the CPU's cores.
    """

    def __init__(
        self,
        vectors: Artifact,
        *,
        shard: Callable[[str], pa.Table],
        block: Callable[[str], pa.Table],
        k: int,
        device: str | None = None,
    ) -> None:
        self._vectors, self._shard, self._block, self._k = vectors, shard, block, k
        self._key = ""
        self._doc_ids = pa.array([], pa.string())
        self._documents_ND: Vectors | None = None
        self._accelerator = _accelerator(device) if device else None

    def __call__(self, planned: pa.Table) -> pa.Table:
        """Searches every planned pair."""
        found = [self._hits(row["shard"], row["query_block"]) for row in planned.to_pylist()]
        return conform(pa.concat_tables(found), HITS, where="hits")

    def _hits(self, shard: str, block: str) -> pa.Table:
        documents_ND = self._load(shard)
        rows = self._block(block)
        scores_QK, positions_QK = search(
            read_vectors(self._vectors, rows),
            documents_ND,
            k=self._k,
            excluded=excluded_positions(rows.column("excluded"), self._doc_ids),
            accelerator=self._accelerator,
        )
        return _as_row(
            shard, block, rows.column("query_id"), scores_QK, positions_QK, self._doc_ids
        )

    def _load(self, shard: str) -> Vectors:
        if self._documents_ND is None or shard != self._key:
            self._documents_ND = None  # freed before the next one is read
            rows = self._shard(shard)
            self._documents_ND = read_vectors(self._vectors, rows)
            self._doc_ids, self._key = rows.column("doc_id").combine_chunks(), shard
        return self._documents_ND


def _accelerator(device: str) -> Filter:
    from reasonembed.index.accelerator import TorchFilter  # torch, seconds to load

    return TorchFilter(device)


def _as_row(
    shard: str,
    block: str,
    query_ids: pa.ChunkedArray,
    scores_QK: Scores,
    positions_QK: Positions,
    doc_ids: pa.Array,
) -> pa.Table:
    found_QK = positions_QK != NO_DOCUMENT
    ends = np.concatenate([[0], np.cumsum(found_QK.sum(axis=1))]).astype(np.int32)
    ids = pa.ListArray.from_arrays(ends, doc_ids.take(pa.array(positions_QK[found_QK])))
    scores = pa.ListArray.from_arrays(ends, pa.array(scores_QK[found_QK]))
    whole = [0, len(query_ids)]
    return pa.table(
        {
            "shard": [shard],
            "query_block": [block],
            "query_ids": pa.ListArray.from_arrays(whole, query_ids.combine_chunks()),
            "doc_ids": pa.ListArray.from_arrays(whole, ids),
            "scores": pa.ListArray.from_arrays(whole, scores),
        }
    )


class CommittedHits:
    """The rows of a `hits` artifact, found by their key and read one at a time."""

    def __init__(self, hits: Artifact) -> None:
        self._hits = hits
        self._places: dict[tuple[str, str], tuple[str, int, int]] = {}
        for part, group, table in hits.row_groups(columns=["shard", "query_block"]):
            for row, key in enumerate(table.to_pylist()):
                place = (part, group, row)
                self._places.setdefault((key["shard"], key["query_block"]), place)

    def blocks(self) -> Iterator[list[str]]:
        """Query ids of every block that was searched."""
        seen: set[str] = set()
        for (_, block), (part, group, row) in self._places.items():
            if block not in seen:
                seen.add(block)
                column = self._hits.row_group(part, group, columns=["query_ids"]).column(0)
                yield column[row].as_py()

    def merged(
        self, pairs: Iterable[tuple[str, str]], *, doc_ids: pa.Array, k: int
    ) -> tuple[Scores, Positions]:
        """The top k of a block over all shards.

        Args:
            pairs: Keys of each shard, and of the block in that shard; all were searched.
            doc_ids: All documents, sorted; results are positions in it.
            k: Results a query.

        Returns:
            scores_QK and positions_QK, score descending, then doc id ascending; filled with -inf
            and -1.
        """
        best: list[tuple[Scores, Positions]] = []
        for pair in pairs:
            part, group, row = self._places[pair]
            columns = ["doc_ids", "scores"]
            table = self._hits.row_group(part, group, columns=columns).slice(row, 1)
            best = [merge_topk([*best, _matrices(table, doc_ids)], k=k)]
        if not best:
            raise ValueError("a search needs at least one shard")
        return best[0]


def _matrices(table: pa.Table, doc_ids: pa.Array) -> tuple[Scores, Positions]:
    """Scores and positions of one row of hits, [Q, K] with short rows filled."""
    ids = table.column("doc_ids").combine_chunks().flatten()
    scores = table.column("scores").combine_chunks().flatten()
    lengths_Q = pc.list_value_length(ids).to_numpy()
    shape = (len(ids), int(lengths_Q.max(initial=0)))
    found_QK = np.arange(shape[1]) < lengths_Q[:, None]
    scores_QK = np.full(shape, -np.inf, dtype=np.float32)
    positions_QK = np.full(shape, NO_DOCUMENT, dtype=np.int64)
    scores_QK[found_QK] = scores.flatten().to_numpy()
    positions_QK[found_QK] = pc.index_in(ids.flatten(), value_set=doc_ids).to_numpy()
    return scores_QK, positions_QK


def _columns(table: pa.Table, *names: str) -> dict[str, pa.ChunkedArray]:
    return {name: table.column(name) for name in names or table.column_names}
