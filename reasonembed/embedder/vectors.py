"""Texts to rows of `embeddings`, a block at a time; what a worker of the embedding job does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reasonembed.artifacts import Artifact
from reasonembed.errors import ModelError
from reasonembed.schemas import conform

_Vectors = NDArray[np.float32]


class TextEmbedder(Protocol):
    """What `Embedder` and `EndpointEmbedder` have in common."""

    def encode_queries(self, texts: Sequence[str], *, instruction: str = "") -> _Vectors:
        """Vectors of queries, float32 [N, D]."""

    def encode_documents(self, texts: Sequence[str]) -> _Vectors:
        """Vectors of documents, float32 [N, D]."""


class EmbedPlanned:
    """Maps planned texts to their vectors.

    A row is a query (`id`, `text`, `instruction`) or, where `text` is null, a document of the
    corpus (`id` and its place: `part`, `group`, `row`).

    Args:
        embedder: What embeds.
        schema: Of the vectors artifact.
        corpus: Holds the documents; those of one row group are in memory at a time.
    """

    def __init__(self, embedder: TextEmbedder, schema: pa.Schema, *, corpus: Artifact) -> None:
        self._embedder, self._schema = embedder, schema
        # Blocks follow one another inside a row group.
        self._texts = lru_cache(maxsize=1)(
            lambda part, group: corpus.row_group(part, group, columns=["text"]).column("text")
        )

    def __call__(self, planned: pa.Table) -> pa.Table:
        """One row a text; see `vector_rows` for what is refused."""
        is_document = pc.is_null(planned.column("text"))
        queries = planned.filter(pc.invert(is_document))
        found = [self._documents(planned.filter(is_document))]
        for instruction in queries.column("instruction").unique().to_pylist():
            asked = queries.filter(pc.equal(queries.column("instruction"), instruction))
            vectors_ND = self._embedder.encode_queries(
                asked.column("text").to_pylist(), instruction=instruction
            )
            found.append(vector_rows(asked.column("id"), vectors_ND, self._schema))
        return pa.concat_tables(found)

    def _documents(self, places: pa.Table) -> pa.Table:
        if not places.num_rows:
            return self._schema.empty_table()
        rows = zip(
            *(places.column(name).to_pylist() for name in ("part", "group", "row")), strict=True
        )
        texts = [self._texts(part, group)[row].as_py() for part, group, row in rows]
        return vector_rows(
            places.column("id"), self._embedder.encode_documents(texts), self._schema
        )


def vector_rows(ids: pa.ChunkedArray, vectors_ND: _Vectors, schema: pa.Schema) -> pa.Table:
    """Rows of `schemas.embeddings`.

    Raises:
        ModelError: The vectors have another dimension or number, or one of them is zero or not
            finite.
    """
    dimension = schema.field("vector").type.list_size
    if vectors_ND.shape != (len(ids), dimension):
        raise ModelError(
            f"vectors of shape {vectors_ND.shape} for {len(ids)} texts from {ids[0]} on; expected "
            f"{dimension} dimensions"
        )
    for fault, bad in (
        ("is not finite", ~np.isfinite(vectors_ND).all(axis=1)),
        ("is zero", ~vectors_ND.any(axis=1)),
    ):
        if bad.any():
            raise ModelError(
                f"the vector of text {ids[int(bad.argmax())]} {fault}, {int(bad.sum())} of "
                f"{len(ids)} in its block are; nothing of the block was kept. Does the model work "
                "in this dtype, and is the text more than white space?"
            )
    flat = pa.array(np.ascontiguousarray(vectors_ND, dtype=np.float32).reshape(-1))
    vectors = pa.FixedSizeListArray.from_arrays(flat, dimension)
    return conform(pa.table({"id": ids, "vector": vectors}), schema, where="embeddings")
