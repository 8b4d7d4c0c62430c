"""A vectors artifact as the embedding job leaves it, and the mining job in one process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from reasonembed.artifacts import Artifact
from reasonembed.index.places import locate
from reasonembed.index.shards import (
    CommittedHits,
    ShardSearch,
    block_keys,
    block_rows,
    group_queries,
    plan_shards,
)
from reasonembed.schemas import ARTIFACTS, embeddings

NAME = "encoder-0123"
DIMENSION = 3


def vectors_artifact(folder: Path, dimension: int) -> Artifact:
    return Artifact(folder, schema=embeddings(dimension), key=("id",), name=NAME)


def hits_artifact(folder: Path) -> Artifact:
    return Artifact(folder, name="hits", **vars(ARTIFACTS["hits"]))


def commit(artifact: Artifact, part: str, ids: list[str], vectors: np.ndarray) -> None:
    flat = pa.array(np.ascontiguousarray(vectors, dtype=np.float32).reshape(-1))
    rows = pa.FixedSizeListArray.from_arrays(flat, artifact.schema.field("vector").type.list_size)
    artifact.commit(part, pa.table({"id": pa.array(ids, pa.string()), "vector": rows}))


def coarse(rng: np.random.Generator, rows: int) -> np.ndarray:
    """Vectors of few values, so that ties are the rule."""
    return rng.integers(-2, 3, (rows, DIMENSION)).astype(np.float32)


class Search:
    """Searches shard by shard and commits each pair's hits on its own, as workers do.

    `searched` tells how many pairs of a shard and a block the last call had to search.
    """

    def __init__(self, folder: Path, *, max_documents: int, max_queries: int, k: int) -> None:
        self.vectors = vectors_artifact(folder / "vectors", DIMENSION)
        self.hits = hits_artifact(folder / "hits")
        self.max_documents, self.max_queries, self.k = max_documents, max_queries, k
        self.searched = 0

    def __call__(self, documents: pa.Table, queries: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        """Scores and positions in `documents`, [Q, K], in the order of `queries`."""
        located, k = locate(self.vectors), self.k
        shards = plan_shards(documents, located, name=NAME, max_documents=self.max_documents)
        known = CommittedHits(self.hits).blocks()
        blocks = group_queries(queries, known, k=k, max_queries=self.max_queries)
        keys = [block_keys(block, shards, name=NAME, k=k) for block in blocks]
        tables = {shard.key: shard.rows for shard in shards}
        for block, of_shards in zip(blocks, keys, strict=True):
            tables |= dict.fromkeys(of_shards, block_rows(block, located, name=NAME))
        self._search(
            [
                {"shard": shard.key, "query_block": of_shards[number]}
                for number, shard in enumerate(shards)
                for of_shards in keys
            ],
            tables,
        )
        found, doc_ids = CommittedHits(self.hits), documents.column("doc_id").combine_chunks()
        row_of = {one: row for row, one in enumerate(queries.column("query_id").to_pylist())}
        scores_QK = np.full((queries.num_rows, k), -np.inf, np.float32)
        positions_QK = np.full((queries.num_rows, k), -1)
        for block, of_shards in zip(blocks, keys, strict=True):
            pairs = [(shard.key, key) for shard, key in zip(shards, of_shards, strict=True)]
            rows = [row_of[one] for one in block.column("query_id").to_pylist()]
            if pairs:
                scores, positions = found.merged(pairs, doc_ids=doc_ids, k=k)
                scores_QK[rows, : scores.shape[1]] = scores
                positions_QK[rows, : scores.shape[1]] = positions
        return scores_QK, positions_QK

    def _search(self, pairs: list[dict[str, str]], tables: dict[str, pa.Table]) -> None:
        self.searched = 0
        if not pairs:
            return
        todo = self.hits.missing(pa.Table.from_pylist(pairs))
        one = ShardSearch(
            self.vectors, shard=tables.__getitem__, block=tables.__getitem__, k=self.k
        )
        for row in range(todo.num_rows):
            self.hits.commit(f"a-{len(self.hits.commits())}", one(todo.slice(row, 1)))
        self.searched = todo.num_rows
