"""Judges every (query, candidate) pair 1–5 after a written analysis, on a pool of LLM actors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
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

# Called in the actor: a driver that plans millions of pairs does not hold their queries.
_Queries = Callable[[], dict[str, JudgedQuery]]


@dataclass(frozen=True)
class _Make:
    config: AnnotateConfig
    run: Run
    queries: _Queries

    def __call__(self, engine: Engine) -> Mapper:
        corpus = self.run.corpus_store()
        return Annotator(
            self.config,
            engine=engine,
            corpus=corpus,
            queries=self.queries(),
            tasks=self.run.config.task_table,
        )


def judge(
    job: Job,
    pairs: pa.Table | Iterable[pa.Table],
    artifact: Artifact,
    queries: _Queries,
    *,
    label: str,
) -> dict[str, Any]:
    """Commits judgments of `pairs` to `artifact`, and says how they went.

    Args:
        job: Surroundings.
        pairs: Rows of `annotate.PAIRS`, those of a query side by side.
        artifact: Of `schemas.JUDGMENTS`.
        queries: Gives the queries by their id; picklable.
        label: For the progress line.
    """
    config, runtime = job.run.config.annotate, job.run.config.runtime
    make = WithEngine(
        config.llm, runtime.engine, runtime.cache_dir, _Make(config, job.run, queries)
    )
    pool = runtime.annotate
    run_planned(
        job, pairs, artifact, make, pool, label=label, overlap=pool.overlap, cut=query_blocks
    )
    counts = check_share(artifact, config.max_failed_share)
    read = cached = 0
    for _, _, spent in artifact.row_groups(columns=["prompt_tokens", "cached_tokens"]):
        read += pc.sum(spent["prompt_tokens"]).as_py() or 0
        cached += pc.sum(spent["cached_tokens"]).as_py() or 0
    return {**counts, "cached share of tokens read": round(cached / read, 3) if read else 0}


def run(job: Job) -> dict[str, Any]:
    """Commits `judgments`."""
    artifact = job.run.artifact("judgments")
    job.run.begin("annotate", artifact)
    queries = partial(_judged_queries, job.run)
    return judge(job, _pairs(job.run), artifact, queries, label="annotate")


def _pairs(run: Run) -> Iterator[pa.Table]:
    bound, limit = run.config.mine.max_source_rank, run.config.annotate.candidates_per_query
    columns = ["query_id", "doc_ids", "source_rank"]
    for some in run.artifact("candidates").rows(columns=columns):
        yield plan_pairs(keeping_to_source(some, max_source_rank=bound), limit=limit)


def _judged_queries(run: Run) -> dict[str, JudgedQuery]:
    columns = ["query_id", "query", "task", "status"]
    return {
        row["query_id"]: JudgedQuery(row["query"], row["task"])
        for some in run.artifact("queries").rows(columns=columns)
        for row in some.to_pylist()
        if row["status"] == Status.OK
    }


if __name__ == "__main__":
    main(run, stage="annotate", description=__doc__)
