"""Which texts an encoder is to embed, how it is opened where it runs, and its vectors by text.

What a run's stages and the evaluation of systems share; who computes the rows is their affair.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reasonembed.artifacts import Artifact, Mapper
from reasonembed.config import EndpointRetriever, RuntimeConfig
from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.vectors import EmbedPlanned, Encoder, TextEmbedder
from reasonembed.errors import ConfigError
from reasonembed.index.places import first_of_each, locate, places_for, read_vectors
from reasonembed.models import resolve
from reasonembed.remixer.mine import Documents
from reasonembed.schemas import text_id

TEXTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class OpenEmbedder:
    """Makes an embedding mapper where it runs: the weights, or the connection, first.

    Attributes:
        encoder: What embeds.
        address: Of the server, where the encoder is an endpoint.
        runtime: How.
        artifact: Of the vectors.
    """

    encoder: Encoder
    address: str | None
    runtime: RuntimeConfig
    artifact: Artifact

    @property
    def key(self) -> str:
        """Equal keys can share what `load` gives."""
        return repr((self.encoder, self.address, self.artifact.uri))

    def load(self) -> TextEmbedder:
        """Loads the weights, or opens the connection.

        Raises:
            ModelError: There are none, or behind the address is another model than before.
        """
        if isinstance(self.encoder, EndpointRetriever):
            assert self.address is not None, "checked by `address_of`"
            from reasonembed.embedder.endpoint import EndpointEmbedder, check_same_model

            key = os.environ.get(self.runtime.engine.api_key_env)
            timeout_s = self.runtime.engine.timeout_s
            asking = EndpointEmbedder(
                self.encoder, base_url=self.address, api_key=key, timeout_s=timeout_s
            )
            check_same_model(asking, self.artifact.place, address=self.address)
            return asking
        from reasonembed.embedder.encode import Embedder  # torch, seconds to load

        return Embedder.load(
            self.encoder,
            cache_dir=self.runtime.cache_dir,
            batch_tokens=self.runtime.batch_tokens,
            threads=self.runtime.embed.threads,
        )

    def mapper(self, loaded: TextEmbedder) -> Mapper:
        """The mapper over what `load` gave."""
        return EmbedPlanned(loaded, self.artifact.schema)

    def __call__(self) -> Mapper:
        """Both; called once in each actor."""
        return self.mapper(self.load())


def address_of(name: str, encoder: Encoder, runtime: RuntimeConfig, *, where: str) -> str | None:
    """Where an endpoint answers; None for weights.

    Args:
        name: Of the retriever.
        encoder: What embeds.
        runtime: Holds the addresses.
        where: The key of the configuration that asks for the endpoint, for the message.

    Raises:
        ConfigError: There is no address for it.
    """
    if not isinstance(encoder, EndpointRetriever):
        return None
    address = runtime.endpoints.get(name)
    if address is None:
        raise ConfigError(
            f"{where} is an endpoint, but runtime.endpoints names no address for it; set "
            f"runtime.endpoints.{name} to its address up to /v1"
        )
    return address


def dimension_of(encoder: Encoder, *, cache_dir: str | None = None) -> int:
    """Length of an encoder's vectors."""
    if isinstance(encoder, EndpointRetriever):
        return encoder.dimension
    return resolve_contract(resolve(encoder.model, cache_dir=cache_dir), encoder).dimension


def planned_texts(corpora: Mapping[str, Documents], queries: pa.Table) -> pa.Table:
    """What `EmbedPlanned` maps: every distinct document by its place, and rows of `TEXTS`.

    Documents stand in the order of their places and lengths, so that blocks hold texts of like
    length. A text that several corpora hold stands once.

    Args:
        corpora: Documents by the address of their corpus artifact.
        queries: Rows of `TEXTS`.
    """
    places = pa.concat_tables([_places(uri, documents) for uri, documents in corpora.items()])
    if len(corpora) > 1:
        places = first_of_each(places, "id")
    return pa.concat_tables([places, queries], promote_options="default")


def _places(uri: str, documents: Documents) -> pa.Table:
    rows = documents.table.rename_columns({"text_id": "id"})
    order = [(column, "ascending") for column in ("part", "group", "chars", "id")]
    places = rows.sort_by(order).select(["id", "part", "group", "row"])
    return places.append_column("corpus", pa.repeat(uri, places.num_rows))


def query_texts(pairs: Iterable[tuple[str, str]]) -> pa.Table:
    """Rows of `TEXTS`, each once and the short ones first, from queries and their instructions."""
    rows = [
        {"id": text_id(text, instruction=instruction), "text": text, "instruction": instruction}
        for text, instruction in pairs
    ]
    rows.sort(key=lambda row: (len(row["text"]), row["id"]))
    return first_of_each(pa.Table.from_pylist(rows, schema=TEXTS), "id")


def matrix(artifact: Artifact, ids: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of text ids in their order, float32 [N, D]; all of them are in memory.

    Raises:
        StorageError: One of them has no vector.
    """
    places = places_for(pa.array(ids, pa.string()), locate(artifact), name=artifact.name)
    return read_vectors(artifact, places)
