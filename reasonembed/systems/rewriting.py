"""Queries as an LLM rewrites them before a system searches. Writes a `rewrites` artifact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa

from reasonembed import tasks
from reasonembed.artifacts import Artifact, Mapper, check_share
from reasonembed.config import RewriteConfig, RuntimeConfig
from reasonembed.evaluation.collection import Collection
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.remixer.rewrite import Rewriter
from reasonembed.schemas import Status
from reasonembed.systems.local import Work


@dataclass(frozen=True)
class _Make:
    config: RewriteConfig
    task: tasks.Task

    def __call__(self, engine: Engine) -> Mapper:
        return Rewriter(self.config, engine=engine, tasks={self.task.name: self.task})


@dataclass(frozen=True)
class Rewritten:
    """Queries as they are searched for.

    Attributes:
        queries: Text by query id; a query whose rewriting failed stays as it was.
        num_failed: Those.
    """

    queries: Mapping[str, str]
    num_failed: int


def rewritten_queries(
    collection: Collection,
    config: RewriteConfig,
    artifact: Artifact,
    *,
    work: Work,
    runtime: RuntimeConfig,
) -> Rewritten:
    """Rewrites what `artifact` lacks and reads all of it.

    Raises:
        QualityError: More queries failed than `max_failed_share` allows.
    """
    rows = [
        {"query_id": query_id, "query": text, "task": collection.task}
        for query_id, text in collection.queries.items()
    ]
    make = _Make(config, tasks.get(collection.task))
    work.compute(
        pa.Table.from_pylist(rows),
        artifact,
        WithEngine(config.llm, runtime.engine, runtime.cache_dir, make),
        runtime.rewrite,
        label=f"rewrite the queries of {collection.name}",
        overlap=runtime.rewrite.overlap,
    )
    check_share(artifact, config.max_failed_share)
    found = {
        row["query_id"]: row["rewritten_query"]
        for row in artifact.read(columns=["query_id", "rewritten_query", "status"]).to_pylist()
        if row["status"] == Status.OK
    }
    queries = {query_id: found.get(query_id, text) for query_id, text in collection.queries.items()}
    return Rewritten(queries, len(queries) - len(found))
