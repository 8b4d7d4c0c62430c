"""Measures the annotator: it judges pairs of the evaluation, whose gold is known."""

from ray_jobs.annotate import judge
from ray_jobs.embed import document_texts, embed, evaluation_texts, matrix
from ray_jobs.job import Job, main
from reasonembed.remixer.annotate import JudgedQuery
from reasonembed.remixer.audit import plan_audit


def run(job: Job) -> dict[str, int]:
    """Commits `audit`; never used for training."""
    config = job.run.config.annotate
    if not config.audit_queries:
        return {"pairs": 0}
    artifact = job.run.artifact("audit")
    job.run.begin("audit", artifact)
    miner, collection = job.run.encoders.miner, job.run.collection
    vectors = embed(job, "miner", miner, "evaluation", evaluation_texts(job))
    documents = embed(job, "miner", miner, "documents", document_texts(job))
    pairs = plan_audit(
        collection,
        *matrix(vectors),
        *matrix(documents),
        num_queries=config.audit_queries,
        corpus=job.run.corpus_store(),
        seed=config.seed,
    )
    task = job.run.config.corpus.task
    queries = {id_: JudgedQuery(text, task) for id_, text in collection.queries.items()}
    return judge(job, pairs, artifact, queries, label="audit the annotator")


if __name__ == "__main__":
    main(run, stage="audit", description=__doc__)
