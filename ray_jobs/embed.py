"""Embeds the corpus and the queries with the miner."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ray_jobs.job import Job, main
from ray_jobs.ledger import Mapper, run_planned
from reasonembed.artifacts import Artifact
from reasonembed.config import EncoderConfig, RuntimeConfig
from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.encode import Embedder
from reasonembed.models import resolve
from reasonembed.remixer.mine import distinct_documents
from reasonembed.schemas import Status, from_rows

Content = Literal["documents", "queries", "evaluation"]
TEXTS = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("instruction", pa.string()),  # null for documents
    ]
)


@dataclass(frozen=True)
class EmbedTexts:
    """Builds an embedder inside its actor and maps texts to vectors."""

    encoder: EncoderConfig
    runtime: RuntimeConfig
    schema: pa.Schema

    def __call__(self) -> Mapper:
        """Loads the weights; called once in each actor."""
        embedder = Embedder.load(
            self.encoder,
            cache_dir=self.runtime.cache_dir,
            batch_tokens=self.runtime.batch_tokens,
            threads=self.runtime.embed.threads,
        )
        return lambda texts: self._vectors(embedder, texts)

    def _vectors(self, embedder: Embedder, texts: pa.Table) -> pa.Table:
        rows: list[dict[str, object]] = []
        for instruction in texts.column("instruction").unique().to_pylist():
            part = texts.filter(
                pc.equal(pc.fill_null(texts.column("instruction"), ""), instruction or "")
            )
            wanted = part.column("text").to_pylist()
            if instruction is None:
                vectors_ND = embedder.encode_documents(wanted)
            else:
                vectors_ND = embedder.encode_queries(wanted, instruction=instruction)
            ids = part.column("id").to_pylist()
            rows += [{"id": id_, "vector": v} for id_, v in zip(ids, vectors_ND, strict=True)]
        return from_rows(rows, self.schema, where="embeddings")


def embed(
    job: Job, name: str, encoder: EncoderConfig, content: Content, texts: pa.Table
) -> Artifact:
    """Commits vectors of `texts` (rows of `TEXTS`) by one encoder; the same vectors only once."""
    identity = job.run.encoder_identity(encoder)
    path = resolve(encoder.model, cache_dir=job.run.config.runtime.cache_dir)
    dimension = resolve_contract(path, encoder).dimension
    artifact = job.run.vectors(name, content, dimension=dimension)
    used = sorted({str(text) for text in texts.column("instruction").to_pylist()})
    artifact.begin(identity | job.run.vectors_input(content) | {"instructions": used})
    make = EmbedTexts(encoder, job.run.config.runtime, artifact.schema)
    pool = job.run.config.runtime.embed
    run_planned(job, texts, artifact, make, pool, label=f"embed {content} ({name})")
    return artifact


def document_texts(job: Job) -> pa.Table:
    """The corpus's distinct texts, as rows of `TEXTS`."""
    store = job.run.corpus_store()
    ids = distinct_documents(store)
    rows = [{"id": id_, "text": store.text(id_), "instruction": None} for id_ in ids]
    return from_rows(rows, TEXTS, where="documents")


def query_texts(job: Job) -> pa.Table:
    """The usable queries, as rows of `TEXTS`."""
    rows = [
        {
            "id": row["query_id"],
            "text": row["query"],
            "instruction": job.run.config.task_table[row["task"]].instruction,
        }
        for row in job.run.artifact("queries").read().to_pylist()
        if row["status"] == Status.OK
    ]
    return from_rows(rows, TEXTS, where="queries")


def evaluation_texts(job: Job) -> pa.Table:
    """The evaluation's queries, as rows of `TEXTS`."""
    rows = [
        {"id": id_, "text": text, "instruction": job.run.instruction}
        for id_, text in job.run.collection.queries.items()
    ]
    return from_rows(rows, TEXTS, where="evaluation queries")


def matrix(artifact: Artifact) -> tuple[list[str], NDArray[np.float32]]:
    """Ids and vectors of an embeddings artifact, in the order of the ids."""
    table = artifact.read()
    dimension = artifact.schema.field("vector").type.list_size
    flat = table.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    vectors_ND = np.ascontiguousarray(flat.reshape(-1, dimension), dtype=np.float32)
    return table.column("id").to_pylist(), vectors_ND


def run(job: Job) -> dict[str, int]:
    """Commits `embeddings/miner-documents` and `embeddings/miner-queries`."""
    miner = job.run.encoders.miner
    documents = embed(job, "miner", miner, "documents", document_texts(job))
    queries = embed(job, "miner", miner, "queries", query_texts(job))
    return {
        "document vectors": documents.read(columns=["id"]).num_rows,
        "query vectors": queries.read(columns=["id"]).num_rows,
    }


if __name__ == "__main__":
    main(run, stage="embed", description=__doc__)
