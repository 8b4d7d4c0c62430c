"""Writes the reasoning-augmented query q′ of every query, on a pool of LLM actors."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Mapper, check_share
from reasonembed.config import RewriteConfig
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.remixer.duplicates import usable_queries
from reasonembed.remixer.mine import keeping_to_source
from reasonembed.remixer.rewrite import Rewriter
from reasonembed.tasks import Task


@dataclass(frozen=True)
class _Make:
    config: RewriteConfig
    tasks: dict[str, Task]

    def __call__(self, engine: Engine) -> Mapper:
        return Rewriter(self.config, engine=engine, tasks=self.tasks)


def run(job: Job) -> dict[str, int]:
    """Commits `rewrites`."""
    config, runtime = job.run.config.rewrite, job.run.config.runtime
    artifact = job.run.artifact("rewrites")
    job.run.begin("rewrite", artifact)
    queries = job.run.artifact("queries").read(columns=["query_id", "query", "task", "status"])
    limit = job.run.config.generate.max_query_similarity
    planned, _ = usable_queries(queries, max_similarity=limit)
    if (bound := job.run.config.mine.max_source_rank) is not None:
        mined = job.run.artifact("candidates").rows(columns=["query_id", "source_rank"])
        kept = [keeping_to_source(some, max_source_rank=bound)["query_id"] for some in mined]
        known = pa.chunked_array([one for ids in kept for one in ids.chunks], pa.string())
        planned = planned.filter(pc.is_in(planned["query_id"], known))
    make = WithEngine(
        config.llm, runtime.engine, runtime.cache_dir, _Make(config, job.run.config.task_table)
    )
    pool = runtime.rewrite
    run_planned(job, planned, artifact, make, pool, label="rewrite", overlap=pool.overlap)
    return check_share(artifact, config.max_failed_share)


if __name__ == "__main__":
    main(run, stage="rewrite", description=__doc__)
