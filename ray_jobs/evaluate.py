"""Searches the evaluation collection with BM25, the miner, and the backbone before and after."""

from typing import Any

import pyarrow.parquet as pq

from ray_jobs.embed import evaluated_vectors
from ray_jobs.job import Job, main
from reasonembed.evaluation.metrics import Run as RankedRun
from reasonembed.evaluation.runs import to_table, write_trec
from reasonembed.evaluation.scorecard import scorecard
from reasonembed.evaluation.systems import bm25_run, dense_run, with_duplicates
from reasonembed.remixer.mine import MINER, read_documents


def run(job: Job) -> dict[str, Any]:
    """Writes `evaluate/`: a run a system, and the figures."""
    directory = job.run.directory("evaluate")
    job.run.begin("evaluate", directory)
    if (finished := directory.finished()) is not None:
        return _headline(finished)
    store, collection = job.run.corpus_store(), job.run.collection
    collection.check_against(store.doc_ids)
    runs = _runs(job)
    for name, ranked in runs.items():
        pq.write_table(to_table(ranked), job.run.dir / "evaluate" / f"{name}.parquet")
        write_trec(ranked, job.run.dir / "evaluate" / f"{name}.trec", tag=name)
    card = scorecard(runs, collection, baseline="before", system="after")
    directory.finish(card)
    return _headline(card)


def _headline(card: dict[str, Any]) -> dict[str, str]:
    return {name: f"nDCG@10 {figures['ndcg@10']:.4f}" for name, figures in card["systems"].items()}


def _runs(job: Job) -> dict[str, RankedRun]:
    store, collection, config = job.run.corpus_store(), job.run.collection, job.run.config.evaluate
    runs: dict[str, RankedRun] = {}
    if config.bm25:
        documents = {doc_id: store.text(doc_id) for doc_id in store.doc_ids}
        runs["bm25"] = bm25_run(
            collection.queries, documents, excluded=collection.excluded, k=config.top_k
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
        query_ids, query_vectors_QD, *found = evaluated_vectors(job, label, encoder, distinct)
        doc_ids, doc_vectors_ND = with_duplicates(
            *found, twins=lambda doc_id: store.group_members(store.group(doc_id))
        )
        runs[name] = dense_run(
            query_vectors_QD,
            doc_vectors_ND,
            query_ids=query_ids,
            doc_ids=doc_ids,
            excluded=collection.excluded,
            k=config.top_k,
        )
    return runs


if __name__ == "__main__":
    main(run, stage="evaluate", description=__doc__)
