"""Plans seeds: which documents queries are written from, and how."""

from ray_jobs.job import Job, main
from reasonembed.errors import CorpusError
from reasonembed.remixer.plan import plan_seeds


def run(job: Job) -> dict[str, int]:
    """Commits `seeds` as one part; the plan is instant and deterministic."""
    artifact = job.run.artifact("seeds")
    job.run.begin("plan", artifact)
    corpus = job.run.artifact("corpus").read()
    # Now and not in the last stage, when the hours have been spent.
    job.run.collection.check_against(corpus.column("doc_id").to_pylist())
    plan = plan_seeds(
        corpus,
        job.run.config.plan,
        held_out=job.run.collection.named_documents(),
    )
    if not plan.seeds.num_rows:
        raise CorpusError(
            f"no document may be a seed: {plan.funnel}; widen plan.min_chars/max_chars"
        )
    if not artifact.commits():
        artifact.commit("seeds", plan.seeds)
    return {"seeds": plan.seeds.num_rows} | {f"not a seed: {k}": v for k, v in plan.funnel.items()}


if __name__ == "__main__":
    main(run, stage="plan", description=__doc__)
