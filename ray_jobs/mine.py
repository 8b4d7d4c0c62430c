"""Mines candidates for every query, its source and the source's duplicates shut out."""

import pyarrow.compute as pc

from ray_jobs.embed import document_texts, embed, matrix, query_texts
from ray_jobs.job import Job, main
from reasonembed.remixer.mine import mine_candidates
from reasonembed.schemas import Status


def run(job: Job) -> dict[str, int]:
    """Commits `candidates`; the search is exact and takes seconds, so the driver does it."""
    config = job.run.config.mine
    artifact = job.run.artifact("candidates")
    job.run.begin("mine", artifact)
    queries = job.run.artifact("queries").read()
    queries = artifact.missing(queries.filter(pc.field("status") == str(Status.OK)))
    if queries.num_rows:
        # Through `embed`, which refuses vectors of another encoder and adds what is missing.
        miner = job.run.encoders.miner
        doc_ids, doc_vectors_ND = matrix(
            embed(job, "miner", miner, "documents", document_texts(job))
        )
        ids, vectors_QD = matrix(embed(job, "miner", miner, "queries", query_texts(job)))
        row_of = {id_: row for row, id_ in enumerate(ids)}
        rows = [row_of[id_] for id_ in queries.column("query_id").to_pylist()]
        table = mine_candidates(
            queries,
            vectors_QD[rows],
            doc_ids,
            doc_vectors_ND,
            corpus=job.run.corpus_store(),
            config=config,
        )
        artifact.commit(f"candidates-{len(artifact.commits()):06d}", table)
    done = artifact.read()
    return {
        "queries": done.num_rows,
        "candidates": sum(len(ids) for ids in done.column("doc_ids").to_pylist()),
        "documents shut out": sum(done.column("num_excluded").to_pylist()),
    }


if __name__ == "__main__":
    main(run, stage="mine", description=__doc__)
