"""Judges every (query, candidate) pair 1–5 after a written analysis, on a pool of LLM actors."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Artifact, Mapper, check_share
from reasonembed.config import AnnotateConfig
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.remixer.annotate import Annotator, JudgedQuery, plan_pairs, query_blocks
from reasonembed.remixer.mine import keeping_to_source
from reasonembed.run import Run
from reasonembed.schemas import Status


@dataclass(frozen=True)
class _Make:
    config: AnnotateConfig
    run: Run
    queries: dict[str, JudgedQuery]

    def __call__(self, engine: Engine) -> Mapper:
        corpus = self.run.corpus_store()
        return Annotator(
            self.config,
            engine=engine,
            corpus=corpus,
            queries=self.queries,
            tasks=self.run.config.task_table,
        )


def judge(
    job: Job, pairs: pa.Table, artifact: Artifact, queries: dict[str, JudgedQuery], *, label: str
) -> dict[str, Any]:
    """Commits judgments of `pairs` to `artifact`, and says how they went."""
    config, runtime = job.run.config.annotate, job.run.config.runtime
    make = WithEngine(
        config.llm, runtime.engine, runtime.cache_dir, _Make(config, job.run, queries)
    )
    pool = runtime.annotate
    run_planned(
        job, pairs, artifact, make, pool, label=label, overlap=pool.overlap, cut=query_blocks
    )
    counts = check_share(artifact, config.max_failed_share)
    spent = artifact.history(columns=["prompt_tokens", "cached_tokens"])
    read, cached = (pc.sum(column).as_py() or 0 for column in spent.columns)
    return {**counts, "cached share of tokens read": round(cached / read, 3) if read else 0}


def run(job: Job) -> dict[str, Any]:
    """Commits `judgments`."""
    artifact = job.run.artifact("judgments")
    job.run.begin("annotate", artifact)
    candidates = keeping_to_source(
        job.run.artifact("candidates").read(), max_source_rank=job.run.config.mine.max_source_rank
    )
    pairs = plan_pairs(candidates, limit=job.run.config.annotate.candidates_per_query)
    queries = {
        row["query_id"]: JudgedQuery(row["query"], row["task"])
        for row in job.run.artifact("queries").read().to_pylist()
        if row["status"] == Status.OK
    }
    return judge(job, pairs, artifact, queries, label="annotate")


if __name__ == "__main__":
    main(run, stage="annotate", description=__doc__)
