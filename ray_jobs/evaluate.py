"""Searches the evaluation collection with BM25, the miner, and the backbone before and after."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_jobs.embed import (
    document_shards,
    embed_evaluated,
    evaluated_queries,
    trained_texts,
    vectors,
)
from ray_jobs.job import Job, main
from reasonembed.corpus import CorpusStore
from reasonembed.evaluation.excerpts import write_excerpts
from reasonembed.evaluation.metrics import Metrics, evaluate_run
from reasonembed.evaluation.metrics import Run as RankedRun
from reasonembed.evaluation.results import (
    RUN_PROTOCOL,
    Result,
    corpus_fingerprint,
    provenance,
    write_result,
)
from reasonembed.evaluation.runs import to_table, write_both
from reasonembed.evaluation.scorecard import METRIC, scorecard
from reasonembed.evaluation.search import bm25_run, dense_run, with_duplicates
from reasonembed.index.bm25 import BM25Index
from reasonembed.remixer.mine import MINER, read_documents
from reasonembed.report.blame import CLOSEST_FILE, NUM_CLOSEST, trained_queries
from reasonembed.schemas import text_id
from reasonembed.systems.encoding import matrix


def run(job: Job) -> dict[str, Any]:
    """Writes `evaluate/`: a run a system, and the figures."""
    directory = job.run.directory("evaluate")
    job.run.begin("evaluate", directory)
    if (finished := directory.finished()) is not None:
        return _headline(finished)
    store, collection = job.run.corpus_store(), job.run.collection
    collection.check_against(store.doc_ids)
    trained = trained_queries(job.run.artifact("samples"))
    runs = _runs(job, store, trained)
    measured = {name: evaluate_run(ranked, collection.qrels) for name, ranked in runs.items()}
    with job.run.writing("evaluate") as folder:
        pq.write_table(to_table(_closest(job, trained)), folder / CLOSEST_FILE)
        _write_results(job, store, runs, measured, place=folder)
    card = scorecard(measured, collection, baseline="before", system="after")
    directory.finish(card)
    return _headline(card)


def _write_results(
    job: Job,
    store: CorpusStore,
    runs: dict[str, RankedRun],
    measured: dict[str, Metrics],
    *,
    place: Path,
) -> None:
    """Runs, and a folder a system, which `reasonembed evaluate compare` reads."""
    collection = job.run.collection
    identity, corpus = job.run.identity("evaluate"), corpus_fingerprint(store)
    credited = collection.credit_duplicates(_copies(store)).qrels
    for name, ranked in runs.items():
        folder = place / name
        table, trec = (folder.with_name(f"{name}{suffix}") for suffix in (".parquet", ".trec"))
        made = provenance(
            collection,
            corpus=corpus,
            instruction=job.run.instruction,
            identity=identity,
            **write_both(ranked, table, trec, tag=name),
        )
        result = Result(
            system=name,
            seed=job.run.config.train.seed if name == "after" else None,
            collection=collection.name,
            benchmark=collection.benchmark or collection.name,
            protocol=RUN_PROTOCOL,
            headline=METRIC,
            metrics=measured[name],
            credited=evaluate_run(ranked, credited),
            provenance=made,
        )
        write_result(result, folder)
        write_excerpts(
            folder,
            collection,
            ranked,
            texts=lambda ids: {doc_id: store.text(doc_id) for doc_id in ids if doc_id in store},
        )


def _copies(store: CorpusStore) -> Callable[[str], Sequence[str]]:
    """Documents of equal text, the given one included; itself alone if it is not there."""

    def copies(doc_id: str) -> Sequence[str]:
        return store.group_members(store.group(doc_id)) if doc_id in store else (doc_id,)

    return copies


def _headline(card: dict[str, Any]) -> dict[str, str]:
    return {name: f"nDCG@10 {figures['ndcg@10']:.4f}" for name, figures in card["systems"].items()}


def _runs(job: Job, store: CorpusStore, trained: pa.Table) -> dict[str, RankedRun]:
    collection, config = job.run.collection, job.run.config.evaluate
    copies = _copies(store)
    runs: dict[str, RankedRun] = {}
    if config.bm25:
        runs["bm25"] = bm25_run(
            collection.queries,
            BM25Index([store.text(doc_id) for doc_id in store.doc_ids]),
            doc_ids=store.doc_ids,
            excluded=collection.excluded,
            k=config.top_k,
        )
    encoders = job.run.encoders
    distinct = read_documents(job.run.artifact("corpus"))
    systems = [
        ("miner", MINER, encoders.miner),
        ("before", "backbone", encoders.backbone),
        ("after", "trained", encoders.trained),
    ]
    if "mine" not in job.run.stages:  # where samples were imported
        del systems[0]
    for name, label, encoder in systems:
        beside = trained_texts(trained) if name == "after" else None
        artifact = embed_evaluated(job, label, encoder, distinct, beside=beside)
        query_ids, query_vectors_QD = evaluated_queries(job, artifact)
        runs[name] = dense_run(
            query_vectors_QD,
            (
                with_duplicates(*shard, twins=copies)
                for shard in document_shards(job, artifact, distinct)
            ),
            query_ids=query_ids,
            excluded=collection.excluded,
            k=config.top_k,
        )
    return runs


def _closest(job: Job, trained: pa.Table) -> RankedRun:
    """The training queries next to each evaluated one, by the trained model's vectors."""
    asked = job.run.collection.queries
    near = trained.to_pylist()
    artifact = vectors(job, job.run.encoders.trained)
    ids = [text_id(text, instruction=job.run.instruction) for text in asked.values()]
    ids += [text_id(row["query"], instruction=row["instruction"]) for row in near]
    found = matrix(artifact, ids)
    return dense_run(
        found[: len(asked)],
        [([row["query_id"] for row in near], found[len(asked) :])],
        query_ids=list(asked),
        excluded={},
        k=NUM_CLOSEST,
    )


if __name__ == "__main__":
    main(run, stage="evaluate", description=__doc__)
