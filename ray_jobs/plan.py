"""Plans seeds: which documents queries are written from, and how."""

from ray_jobs.job import Job, main
from reasonembed.errors import CorpusError
from reasonembed.remixer.plan import SeedPlan, held_out_documents, plan_seeds
from reasonembed.run import Run


def run(job: Job) -> dict[str, int]:
    """Commits `seeds`; the plan is deterministic, and a grown corpus adds a part."""
    artifact = job.run.artifact("seeds")
    job.run.begin("plan", artifact)
    plan = _plan(job.run)
    if not plan.seeds.num_rows:
        raise CorpusError(
            f"no document may be a seed: {plan.funnel}; widen plan.min_chars/max_chars"
        )
    new = artifact.missing(plan.seeds)
    if new.num_rows:
        artifact.commit(f"seeds-{len(artifact.commits()):06d}", new)
    seeds = artifact.read(columns=["query_id"]).num_rows
    return {"seeds": seeds} | {f"not a seed: {k}": v for k, v in plan.funnel.items()}


def _plan(run: Run) -> SeedPlan:
    corpus = run.artifact("corpus").read()
    # Now and not in the last stage, when the hours have been spent.
    run.collection.check_against(corpus.column("doc_id").to_pylist())
    held_out = held_out_documents(corpus, run.collection, run.config.plan)
    config = run.config.filter
    if config is None:
        return plan_seeds(corpus, run.config.plan, held_out=held_out)
    domains = run.artifact("domains").read()
    return plan_seeds(
        corpus,
        run.config.plan,
        held_out=held_out,
        domains=domains,
        min_probability=config.min_probability,
    )


if __name__ == "__main__":
    main(run, stage="plan", description=__doc__)
