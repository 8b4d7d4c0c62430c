"""Asks an LLM which documents belong to the task's domain, before seeds are chosen."""

from dataclasses import dataclass

from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Mapper, check_share
from reasonembed.config import FilterConfig
from reasonembed.errors import ConfigError
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.remixer.filter import DomainFilter, plan_filter
from reasonembed.remixer.plan import held_out_documents
from reasonembed.run import Run


@dataclass(frozen=True)
class _Make:
    config: FilterConfig
    run: Run

    def __call__(self, engine: Engine) -> Mapper:
        return DomainFilter(
            self.config,
            engine=engine,
            corpus=self.run.corpus_store(),
            tasks=self.run.config.task_table,
        )


def run(job: Job) -> dict[str, int]:
    """Commits `domains`."""
    config, runtime = job.run.config.filter, job.run.config.runtime
    if config is None:
        raise ConfigError("the stage filter needs a section filter: in the configuration")
    artifact = job.run.artifact("domains")
    job.run.begin("filter", artifact)
    corpus, plan = job.run.artifact("corpus").read(), job.run.config.plan
    held_out = held_out_documents(corpus, job.run.collection, plan)
    planned = plan_filter(corpus, plan, held_out=held_out)
    make = WithEngine(config.llm, runtime.engine, runtime.cache_dir, _Make(config, job.run))
    pool = runtime.filter
    run_planned(job, planned, artifact, make, pool, label="filter", overlap=pool.overlap)
    return check_share(artifact, config.max_failed_share)


if __name__ == "__main__":
    main(run, stage="filter", description=__doc__)
