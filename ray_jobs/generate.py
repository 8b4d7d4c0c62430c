"""Writes a query from every seed document, on a pool of LLM actors."""

from dataclasses import dataclass

from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Mapper, check_share
from reasonembed.config import GenerateConfig
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.remixer.duplicates import usable_queries
from reasonembed.remixer.generate import QueryGenerator
from reasonembed.run import Run


@dataclass(frozen=True)
class _Make:
    config: GenerateConfig
    run: Run

    def __call__(self, engine: Engine) -> Mapper:
        return QueryGenerator(
            self.config,
            engine=engine,
            corpus=self.run.corpus_store(),
            tasks=self.run.config.task_table,
        )


def run(job: Job) -> dict[str, int]:
    """Commits `queries`."""
    config, runtime = job.run.config.generate, job.run.config.runtime
    artifact = job.run.artifact("queries")
    job.run.begin("generate", artifact)
    make = WithEngine(config.llm, runtime.engine, runtime.cache_dir, _Make(config, job.run))
    run_planned(
        job,
        job.run.artifact("seeds").rows(),
        artifact,
        make,
        runtime.generate,
        label="generate",
        overlap=runtime.generate.overlap,
    )
    counts = check_share(artifact, config.max_failed_share)
    queries = artifact.read(columns=["query_id", "query", "status"])
    _, dropped = usable_queries(queries, max_similarity=config.max_query_similarity)
    return counts | {"ok, but near-duplicates": len(dropped)}


if __name__ == "__main__":
    main(run, stage="generate", description=__doc__)
