"""Embeds the corpus and the queries with every embedding model that mines."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Artifact
from reasonembed.config import DenseRetriever, EncoderConfig, EndpointRetriever
from reasonembed.embedder.vectors import Encoder
from reasonembed.index.places import first_of_each, locate, places_for, read_vectors
from reasonembed.remixer.duplicates import usable_queries
from reasonembed.remixer.mine import MINER, Documents, read_documents
from reasonembed.schemas import text_id
from reasonembed.systems.encoding import (
    OpenEmbedder,
    address_of,
    dimension_of,
    matrix,
    planned_texts,
    query_texts,
)


def vectors(job: Job, encoder: Encoder) -> Artifact:
    """Where an encoder's vectors are committed."""
    dimension = dimension_of(encoder, cache_dir=job.run.config.runtime.cache_dir)
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
        queries: Rows of `encoding.TEXTS`.

    Raises:
        ConfigError: The encoder is an endpoint without an address.
    """
    runtime = job.run.config.runtime
    address = address_of(name, encoder, runtime, where=f"mine.also.{name}")
    artifact = vectors(job, encoder)
    planned = planned_texts({job.run.artifact("corpus").uri: documents}, queries)
    make = OpenEmbedder(encoder, address, runtime, artifact)
    run_planned(job, planned, artifact, make, runtime.embed, label=f"embed ({name})")
    return artifact


def used_queries(job: Job) -> pa.Table:
    """The used queries, as rows of `encoding.TEXTS`."""
    config = job.run.config
    limit = config.generate.max_query_similarity
    queries, _ = usable_queries(job.run.artifact("queries").read(), max_similarity=limit)
    tasks = config.task_table
    return query_texts(
        (row["query"], tasks[row["task"]].instruction)
        for row in queries.select(["query", "task"]).to_pylist()
    )


def evaluation_queries(job: Job) -> pa.Table:
    """The evaluation's queries, as rows of `encoding.TEXTS`."""
    return query_texts((text, job.run.instruction) for text in job.run.collection.queries.values())


def trained_texts(trained: pa.Table) -> pa.Table:
    """Queries of training samples (`query`, `instruction`), as rows of `encoding.TEXTS`."""
    rows = trained.select(["query", "instruction"]).to_pylist()
    return query_texts((row["query"], row["instruction"]) for row in rows)


def embed_evaluated(
    job: Job,
    name: str,
    encoder: EncoderConfig,
    documents: Documents,
    *,
    beside: pa.Table | None = None,
) -> Artifact:
    """Commits vectors of the evaluation's queries and the distinct documents.

    Args:
        job: Surroundings.
        name: Of the system.
        encoder: What embeds.
        documents: Of the corpus.
        beside: More rows of `encoding.TEXTS` to embed while the model is loaded.
    """
    texts = evaluation_queries(job)
    if beside is not None:
        texts = first_of_each(pa.concat_tables([texts, beside]), "id")
    return embed(job, name, encoder, documents, texts)


def evaluated_queries(job: Job, artifact: Artifact) -> tuple[list[str], NDArray[np.float32]]:
    """Ids of the evaluation's queries and their vectors, float32 [Q, D]."""
    queries = job.run.collection.queries
    query_ids = sorted(queries)
    ids = [text_id(queries[one], instruction=job.run.instruction) for one in query_ids]
    return query_ids, matrix(artifact, ids)


def document_shards(
    job: Job, artifact: Artifact, documents: Documents
) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    """Ids and vectors of the distinct documents, `runtime.mine.shard_documents` at a time."""
    located, size = locate(artifact), job.run.config.runtime.mine.shard_documents
    for start in range(0, documents.table.num_rows, size):
        part = documents.table.slice(start, size)
        ids = part.column("text_id").combine_chunks()
        vectors_ND = read_vectors(artifact, places_for(ids, located, name=artifact.name))
        yield part.column("doc_id").to_pylist(), vectors_ND


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
    texts = used_queries(job)
    asked = first_of_each(pa.concat_tables([texts, evaluation_queries(job)]), "id")
    for name, encoder in dense_retrievers(job).items():
        embed(job, name, encoder, documents, asked if name == MINER else texts)
    return {"document texts": documents.table.num_rows, "query texts": texts.num_rows}


if __name__ == "__main__":
    main(run, stage="embed", description=__doc__)
