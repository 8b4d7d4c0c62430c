"""Measures the annotator: it judges pairs of the evaluation, whose gold is known."""

from functools import partial

from ray_jobs.annotate import judge
from ray_jobs.embed import embed_evaluated, evaluated_queries
from ray_jobs.job import Job, main
from reasonembed.remixer.annotate import JudgedQuery
from reasonembed.remixer.audit import plan_audit
from reasonembed.remixer.mine import MINER, read_documents
from reasonembed.systems.encoding import matrix


def run(job: Job) -> dict[str, int]:
    """Commits `audit`; never used for training."""
    config = job.run.config.annotate
    if not config.audit_queries:
        return {"pairs": 0}
    artifact = job.run.artifact("audit")
    job.run.begin("audit", artifact)
    collection = job.run.collection
    documents = read_documents(job.run.artifact("corpus"))
    vectors = embed_evaluated(job, MINER, job.run.encoders.miner, documents)
    pairs = plan_audit(
        collection,
        *evaluated_queries(job, vectors),
        documents.doc_ids.to_pylist(),
        matrix(vectors, documents.table.column("text_id").to_pylist()),
        num_queries=config.audit_queries,
        corpus=job.run.corpus_store(),
        seed=config.seed,
    )
    task = job.run.config.corpus.task
    queries = {id_: JudgedQuery(text, task) for id_, text in collection.queries.items()}
    return judge(job, pairs, artifact, partial(dict, queries), label="audit the annotator")


if __name__ == "__main__":
    main(run, stage="audit", description=__doc__)
