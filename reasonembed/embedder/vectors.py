"""What identifies vectors, where they lie, and texts to rows of `embeddings`, a block at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reasonembed.artifacts import Artifact
from reasonembed.config import EncoderConfig, EndpointRetriever, fingerprint, flatten
from reasonembed.errors import ModelError
from reasonembed.models import resolve, weights_fingerprint
from reasonembed.schemas import conform, embeddings
from reasonembed.storage import Place, last_part

ENCODING_VERSION = 1
"""Of how texts become vectors here; raised when the same weights and settings give others."""
_Vectors = NDArray[np.float32]


Encoder = EncoderConfig | EndpointRetriever


def encoder_identity(
    encoder: Encoder, *, cache_dir: str | None = None, weights: str | None = None
) -> dict[str, Any]:
    """What decides the vectors of an encoder: its settings and its weights, flat.

    Args:
        encoder: What embeds.
        cache_dir: Of packaged weights.
        weights: Their fingerprint, where it is known; else they are looked for and read.
    """
    if isinstance(encoder, EndpointRetriever):  # behind an address nobody sees the weights
        return flatten(encoder, prefix="endpoint")
    if weights is None:
        weights = weights_fingerprint(resolve(encoder.model, cache_dir=cache_dir))
    settings = flatten(encoder.model_copy(update={"model": last_part(encoder.model)}))
    made = {"weights": weights, "encoding": ENCODING_VERSION}
    return {f"encoder.{key}": value for key, value in settings.items()} | made


def vectors_artifact(
    place: Path | Place, encoder: Encoder, *, identity: dict[str, Any], dimension: int
) -> Artifact:
    """Everything that one encoder has embedded, keyed by `schemas.text_id`.

    The folder is named by what decides a vector (weights, contract) and the key by what was
    embedded, so a stale vector cannot be found, and whoever embeds may share the place.

    Args:
        place: Folder of the vectors of all encoders.
        encoder: What embeds.
        identity: Of `encoder_identity`.
        dimension: Of a vector.
    """
    name = f"{last_part(encoder.model)}-{fingerprint(identity)[:12]}"
    schema = embeddings(dimension, is_endpoint=isinstance(encoder, EndpointRetriever))
    return Artifact(str(Place(place) / name), schema=schema, key=("id",), name=name)


class TextEmbedder(Protocol):
    """What `Embedder` and `EndpointEmbedder` have in common."""

    def encode_queries(self, texts: Sequence[str], *, instruction: str = "") -> _Vectors:
        """Vectors of queries, float32 [N, D]."""

    def encode_documents(self, texts: Sequence[str]) -> _Vectors:
        """Vectors of documents, float32 [N, D]."""


class EmbedPlanned:
    """Maps planned texts to their vectors.

    A row is a query (`id`, `text`, `instruction`) or, where `text` is null, a document: `id`,
    `corpus` (address of the corpus artifact) and its place there (`part`, `group`, `row`). The
    documents of one row group are in memory at a time.

    Args:
        embedder: What embeds.
        schema: Of the vectors artifact.
    """

    def __init__(self, embedder: TextEmbedder, schema: pa.Schema) -> None:
        self._embedder, self._schema = embedder, schema
        self._texts = lru_cache(maxsize=1)(_texts)  # blocks follow one another in a row group

    def __call__(self, planned: pa.Table) -> pa.Table:
        """One row a text; see `vector_rows` for what is refused."""
        is_document = pc.is_null(planned.column("text"))
        queries = planned.filter(pc.invert(is_document))
        found = [self._documents(planned.filter(is_document))]
        for instruction in queries.column("instruction").unique().to_pylist():
            asked = queries.filter(pc.equal(queries.column("instruction"), instruction))
            texts = asked.column("text").to_pylist()
            vectors_ND = self._embedder.encode_queries(texts, instruction=instruction)
            found.append(self._rows(asked, texts, vectors_ND))
        return pa.concat_tables(found)

    def _documents(self, places: pa.Table) -> pa.Table:
        if not places.num_rows:
            return self._schema.empty_table()
        columns = ("corpus", "part", "group", "row")
        rows = zip(*(places.column(name).to_pylist() for name in columns), strict=True)
        texts = [self._texts(corpus, part, group)[row].as_py() for corpus, part, group, row in rows]
        return self._rows(places, texts, self._embedder.encode_documents(texts))

    def _rows(self, planned: pa.Table, texts: Sequence[str], vectors_ND: _Vectors) -> pa.Table:
        cut: frozenset[str] = getattr(self._embedder, "cut", frozenset())  # an endpoint's
        is_cut = [text in cut for text in texts]
        return vector_rows(planned.column("id"), vectors_ND, self._schema, is_cut=is_cut)


def _texts(corpus: str, part: str, group: int) -> pa.ChunkedArray:
    artifact = Artifact.declared(corpus, "corpus")
    return artifact.row_group(part, group, columns=["text"]).column("text")


def vector_rows(
    ids: pa.ChunkedArray,
    vectors_ND: _Vectors,
    schema: pa.Schema,
    *,
    is_cut: Sequence[bool] = (),
) -> pa.Table:
    """Rows of `schemas.embeddings`.

    Args:
        ids: Of the texts.
        vectors_ND: Their vectors.
        schema: Of an encoder.
        is_cut: For an endpoint's schema, whether the server took a text in part.

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
    columns = {"id": ids, "vector": vectors}
    if "is_cut" in schema.names:
        columns["is_cut"] = pa.array(is_cut, pa.bool_())
    return conform(pa.table(columns), schema, where="embeddings")
