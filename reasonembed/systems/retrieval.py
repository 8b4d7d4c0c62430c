"""A system's retriever over a collection, as a run under a protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from reasonembed.artifacts import Artifact
from reasonembed.config import (
    BM25Retriever,
    DenseRetriever,
    EncoderConfig,
    EndpointRetriever,
    HybridRetriever,
    Retriever,
    RunRetriever,
    SystemConfig,
)
from reasonembed.embedder.endpoint import addresses_of
from reasonembed.embedder.vectors import Encoder, encoder_identity
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.metrics import Run
from reasonembed.evaluation.protocols import Protocol
from reasonembed.evaluation.runs import read_run
from reasonembed.evaluation.search import bm25_run, dense_run, hybrid_run, with_duplicates
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.exact import Vectors
from reasonembed.index.places import locate, places_for, read_vectors
from reasonembed.index.shards import plan_shards
from reasonembed.schemas import text_id
from reasonembed.systems.encoding import OpenEmbedder, address_of, planned_texts, query_texts
from reasonembed.systems.local import Work
from reasonembed.systems.workspace import SearchedCorpus, Workspace


@dataclass(frozen=True)
class Asked:
    """What a retriever is asked, and by which rules.

    Attributes:
        collection: Judgments and exclusions.
        queries: Text by query id, perhaps rewritten.
        instruction: What fills the query template.
        protocol: The rules.
        corpus: What is searched.
        workspace: Where vectors lie.
        work: Who computes those that are missing.
    """

    collection: Collection
    queries: Mapping[str, str]
    instruction: str
    protocol: Protocol
    corpus: SearchedCorpus
    workspace: Workspace
    work: Work


def parts_of(system: SystemConfig) -> dict[str, Retriever]:
    """The retrievers of a system by name; the only one bears the system's."""
    if isinstance(system.retrieve, HybridRetriever):
        return system.retrieve.parts
    return {system.name: system.retrieve}


def limited(encoder: EncoderConfig, max_tokens: int | None) -> EncoderConfig:
    """An encoder within a protocol's length; one that takes less keeps its own."""
    if max_tokens is None:
        return encoder
    names = ("max_query_tokens", "max_document_tokens")
    return encoder.model_copy(
        update={name: min(getattr(encoder, name), max_tokens) for name in names}
    )


def retrieve(system: SystemConfig, asked: Asked) -> Run:
    """What a system's retriever finds, before any reranking; after `embed`.

    Raises:
        EvaluationError: A run file does not fit the collection, or no document holds a word.
    """
    runs = {name: _search(part, asked) for name, part in parts_of(system).items()}
    if not isinstance(system.retrieve, HybridRetriever):
        return asked.protocol.settle(runs[system.name], asked.collection)
    hybrid = system.retrieve
    settled: dict[str, Run] = {
        # A query that a run file lacks is one without results.
        name: {query_id: {} for query_id in asked.queries}
        | asked.protocol.settle(run, asked.collection)
        for name, run in runs.items()
    }
    fused = hybrid_run(
        settled,
        fusion=hybrid.fusion,
        k=asked.protocol.keep,
        weights=hybrid.weights or None,
        rrf_constant=hybrid.rrf_constant,
    )
    return asked.protocol.settle(fused, asked.collection)


def _search(retriever: Retriever, asked: Asked) -> Run:
    if isinstance(retriever, BM25Retriever):
        return _bm25(retriever, asked)
    if isinstance(retriever, RunRetriever):
        return _run_file(run_file(retriever, asked.collection), asked)
    return _dense(_encoder_of(retriever, asked), asked)


def _bm25(config: BM25Retriever, asked: Asked) -> Run:
    doc_ids, texts = asked.corpus.everything()
    try:
        index = BM25Index(texts, variant=config.variant, k1=config.k1, b=config.b)
    except ValueError as error:
        raise EvaluationError(f"{asked.collection.name}: {error}; is its corpus whole?") from error
    return bm25_run(
        asked.queries,
        index,
        doc_ids=doc_ids,
        excluded=asked.protocol.masked(asked.collection),
        k=asked.protocol.depth,
    )


def run_file(retriever: RunRetriever, collection: Collection) -> Path:
    """The file that holds a collection's run.

    In the path `{collection}` stands for the collection's name and `{task}` for what follows its
    benchmark: "bright/biology", "biology".
    """
    task = collection.name.rpartition("/")[2]
    path = retriever.path.replace("{collection}", collection.name).replace("{task}", task)
    return Path(path)


def _run_file(path: Path, asked: Asked) -> Run:
    run = read_run(path)
    known = set(asked.corpus.doc_ids)
    strange = {"queries": sorted(run.keys() - asked.queries.keys())}
    strange["documents"] = sorted({one for scores in run.values() for one in scores} - known)
    for what, ids in strange.items():
        if ids:
            raise EvaluationError(
                f"{path}: {len(ids)} {what} of the run are not in {asked.collection.name}, such as "
                f"{ids[:5]}; was it made over another collection?"
            )
    return run


def _encoder_of(part: DenseRetriever | EndpointRetriever, asked: Asked) -> Encoder:
    if isinstance(part, EndpointRetriever):
        return part
    return limited(part.encoder, asked.protocol.length_limit(asked.collection))


def embed(system: SystemConfig, asked: Sequence[Asked]) -> None:
    """Embeds what has no vector yet, for all collections at once: loading a model takes long.

    Args:
        system: Its dense parts are embedded with; others need nothing.
        asked: A collection each, of one workspace.

    Raises:
        ConfigError: An endpoint has no address.
    """
    for name, part in parts_of(system).items():
        if isinstance(part, BM25Retriever | RunRetriever):
            continue
        groups: dict[str, list[Asked]] = {}  # a protocol's length may depend on the benchmark
        for one in asked:
            groups.setdefault(repr(_encoder_of(part, one)), []).append(one)
        for group in groups.values():
            _embed(name, _encoder_of(part, group[0]), group)


def _embed(name: str, encoder: Encoder, asked: Sequence[Asked]) -> None:
    runtime, work = asked[0].workspace.runtime, asked[0].work
    address = address_of(name, encoder, runtime, where=f"the retriever {name}")
    artifact = _vectors(encoder, asked[0].workspace)
    texts = ((text, one.instruction) for one in asked for text in one.queries.values())
    corpora = {one.corpus.artifact.uri: one.corpus.documents for one in asked}
    work.compute(
        planned_texts(corpora, query_texts(texts)),
        artifact,
        OpenEmbedder(encoder, address, runtime, artifact),
        runtime.embed,
        label=f"embed ({name})",
    )


def endpoint_notes(system: SystemConfig, asked: Asked) -> dict[str, Any]:
    """For the provenance: which servers gave vectors, and how many texts they took in part.

    Returns:
        `endpoints`, addresses by the part's name, and `texts_cut`; nothing without an endpoint.
    """
    addresses, num_cut = {}, 0
    for name, part in parts_of(system).items():
        if isinstance(part, EndpointRetriever):
            artifact = _vectors(part, asked.workspace)
            addresses[name] = addresses_of(artifact.place)
            cut = {
                one
                for _, _, rows in artifact.row_groups(columns=["id", "is_cut"])
                for one in rows.filter(rows.column("is_cut")).column("id").to_pylist()
            }
            documents = asked.corpus.documents.table.column("text_id").to_pylist()
            num_cut += len(cut.intersection([*documents, *_query_texts(asked)]))
    return {"endpoints": addresses, "texts_cut": num_cut} if addresses else {}


def _query_texts(asked: Asked) -> list[str]:
    """Ids of the queries' texts."""
    return [text_id(text, instruction=asked.instruction) for text in asked.queries.values()]


def _vectors(encoder: Encoder, workspace: Workspace) -> Artifact:
    identity = encoder_identity(encoder, cache_dir=workspace.runtime.cache_dir)
    return workspace.vectors(encoder, identity)


def _dense(encoder: Encoder, asked: Asked) -> Run:
    """Searches part by part what `embed` embedded."""
    artifact = _vectors(encoder, asked.workspace)
    located = locate(artifact)
    places = places_for(pa.array(_query_texts(asked), pa.string()), located, name=artifact.name)
    return dense_run(
        read_vectors(artifact, places),
        _shards(artifact, located, asked),
        query_ids=list(asked.queries),
        excluded=asked.protocol.masked(asked.collection),
        k=asked.protocol.depth,
    )


def _shards(
    artifact: Artifact, located: pa.Table, asked: Asked
) -> Iterator[tuple[list[str], Vectors]]:
    """Ids and vectors of all documents, copies included, a bounded number at a time.

    Shards follow the places of the vectors, so that no row group is read for several of them.
    """
    size = asked.workspace.runtime.mine.shard_documents
    documents = asked.corpus.documents.table
    for shard in plan_shards(documents, located, name=artifact.name, max_documents=size):
        doc_ids = shard.rows.column("doc_id").to_pylist()
        vectors_ND = read_vectors(artifact, shard.rows)
        yield with_duplicates(doc_ids, vectors_ND, twins=asked.corpus.copies)
