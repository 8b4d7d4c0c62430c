"""Embeds the corpus and the queries with every embedding model that mines."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
from numpy.typing import NDArray

from ray_jobs.job import Job, main
from ray_jobs.ledger import Mapper, run_planned
from reasonembed.artifacts import Artifact
from reasonembed.config import DenseRetriever, EncoderConfig, EndpointRetriever, RuntimeConfig
from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.endpoint import EndpointEmbedder
from reasonembed.embedder.vectors import EmbedPlanned
from reasonembed.errors import ConfigError
from reasonembed.index.places import first_of_each, locate, places_for, read_vectors
from reasonembed.models import resolve
from reasonembed.remixer.duplicates import usable_queries
from reasonembed.remixer.mine import MINER, Documents, read_documents
from reasonembed.schemas import text_id

TEXTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("instruction", pa.string(), nullable=False),
    ]
)
Encoder = EncoderConfig | EndpointRetriever


@dataclass(frozen=True)
class _Open:
    """Makes a mapper inside its actor: the weights, or the connection, first."""

    encoder: Encoder
    address: str | None
    runtime: RuntimeConfig
    schema: pa.Schema
    corpus: Artifact

    def __call__(self) -> Mapper:
        return EmbedPlanned(self._embedder(), self.schema, corpus=self.corpus)

    def _embedder(self) -> Embedder | EndpointEmbedder:
        if isinstance(self.encoder, EndpointRetriever):
            assert self.address is not None, "checked by `embed`"
            key = os.environ.get(self.runtime.engine.api_key_env)
            timeout_s = self.runtime.engine.timeout_s
            return EndpointEmbedder(
                self.encoder, base_url=self.address, api_key=key, timeout_s=timeout_s
            )
        return Embedder.load(
            self.encoder,
            cache_dir=self.runtime.cache_dir,
            batch_tokens=self.runtime.batch_tokens,
            threads=self.runtime.embed.threads,
        )


def vectors(job: Job, encoder: Encoder) -> Artifact:
    """Where an encoder's vectors are committed."""
    if isinstance(encoder, EndpointRetriever):
        dimension = encoder.dimension
    else:
        path = resolve(encoder.model, cache_dir=job.run.config.runtime.cache_dir)
        dimension = resolve_contract(path, encoder).dimension
    artifact = job.run.vectors(encoder, dimension=dimension)
    artifact.begin(job.run.encoder_identity(encoder))
    return artifact


def embed(
    job: Job, name: str, encoder: Encoder, documents: Documents, queries: pa.Table
) -> Artifact:
    """Commits the vectors that are missing, all by one pool: loading a model takes long.

    Args:
        job: Surroundings.
        name: Of the encoder: a retriever's, or a system's of the evaluation.
        encoder: What embeds.
        documents: Of the corpus.
        queries: Rows of `TEXTS`.

    Raises:
        ConfigError: The encoder is an endpoint without an address.
    """
    runtime = job.run.config.runtime
    address = None
    if isinstance(encoder, EndpointRetriever):
        address = runtime.endpoints.get(name)
        if address is None:
            raise ConfigError(
                f"mine.also.{name} is an endpoint, but runtime.endpoints names no address for it; "
                f"set runtime.endpoints.{name} to its address up to /v1"
            )
    artifact = vectors(job, encoder)
    places = document_places(documents)
    planned = pa.concat_tables([places, queries], promote_options="default")
    make = _Open(encoder, address, runtime, artifact.schema, job.run.artifact("corpus"))
    run_planned(job, planned, artifact, make, runtime.embed, label=f"embed ({name})")
    return artifact


def document_places(documents: Documents) -> pa.Table:
    """Every distinct text by its key and place, so that blocks hold texts of like length."""
    rows = documents.table.rename_columns({"text_id": "id"})
    order = [(column, "ascending") for column in ("part", "group", "chars", "id")]
    return rows.sort_by(order).select(["id", "part", "group", "row"])


def query_texts(job: Job) -> pa.Table:
    """The used queries, as rows of `TEXTS`."""
    config = job.run.config
    limit = config.generate.max_query_similarity
    queries, _ = usable_queries(job.run.artifact("queries").read(), max_similarity=limit)
    tasks = config.task_table
    return _texts(
        (row["query"], tasks[row["task"]].instruction)
        for row in queries.select(["query", "task"]).to_pylist()
    )


def evaluation_texts(job: Job) -> pa.Table:
    """The evaluation's queries, as rows of `TEXTS`."""
    return _texts((text, job.run.instruction) for text in job.run.collection.queries.values())


def _texts(pairs: Iterator[tuple[str, str]]) -> pa.Table:
    rows = [
        {"id": text_id(text, instruction=instruction), "text": text, "instruction": instruction}
        for text, instruction in pairs
    ]
    rows.sort(key=lambda row: (len(row["text"]), row["id"]))
    return first_of_each(pa.Table.from_pylist(rows, schema=TEXTS), "id")


def matrix(artifact: Artifact, ids: list[str]) -> NDArray:
    """Vectors of text ids in their order, float32 [N, D]; all of them are in memory."""
    places = places_for(pa.array(ids, pa.string()), locate(artifact), name=artifact.name)
    return read_vectors(artifact, places)


def evaluated_vectors(
    job: Job, name: str, encoder: EncoderConfig, documents: Documents
) -> tuple[list[str], NDArray, list[str], NDArray]:
    """The evaluation's queries and the distinct documents: ids and vectors of both."""
    queries = job.run.collection.queries
    artifact = embed(job, name, encoder, documents, evaluation_texts(job))
    query_ids = sorted(queries)
    ids = [text_id(queries[one], instruction=job.run.instruction) for one in query_ids]
    text_ids = documents.table.column("text_id").to_pylist()
    found = matrix(artifact, [*ids, *text_ids])
    return query_ids, found[: len(ids)], documents.doc_ids.to_pylist(), found[len(ids) :]


def dense_retrievers(job: Job) -> dict[str, Encoder]:
    """Every retriever that embeds, by name."""
    found: dict[str, Encoder] = {MINER: job.run.encoders.miner}
    for name, other in job.run.config.mine.also.items():
        if isinstance(other, DenseRetriever):
            found[name] = other.encoder
        elif isinstance(other, EndpointRetriever):
            found[name] = other
    return found


def run(job: Job) -> dict[str, int]:
    """Commits the vectors that mining needs, and the miner's of the evaluation with them."""
    documents = read_documents(job.run.artifact("corpus"))
    texts = query_texts(job)
    asked = first_of_each(pa.concat_tables([texts, evaluation_texts(job)]), "id")
    for name, encoder in dense_retrievers(job).items():
        embed(job, name, encoder, documents, asked if name == MINER else texts)
    return {"document texts": documents.table.num_rows, "query texts": texts.num_rows}


if __name__ == "__main__":
    main(run, stage="embed", description=__doc__)
