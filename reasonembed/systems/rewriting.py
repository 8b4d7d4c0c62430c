"""Queries as an LLM rewrites them before a system searches. Writes a `rewrites` artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from reasonembed import tasks
from reasonembed.artifacts import Artifact, Mapper, check_share
from reasonembed.config import RewriteConfig, RuntimeConfig
from reasonembed.evaluation.collection import Collection
from reasonembed.llm.protocol import Engine
from reasonembed.remixer.rewrite import Rewriter
from reasonembed.schemas import Status
from reasonembed.systems.local import Work
from reasonembed.systems.together import Share, ask_together


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
    asked: Sequence[tuple[Collection, Artifact]],
    config: RewriteConfig,
    *,
    work: Work,
    runtime: RuntimeConfig,
) -> list[Rewritten]:
    """Rewrites what the artifacts lack and reads all of them.

    Args:
        asked: Collections, each with where its queries' rewrites lie.
        config: How they are rewritten.
        work: Who rewrites.
        runtime: How.

    Raises:
        QualityError: More queries of a collection failed than `max_failed_share` allows.
    """
    ask_together(
        [_share(collection, artifact, config) for collection, artifact in asked],
        config.llm,
        pool=runtime.rewrite,
        runtime=runtime,
        work=work,
        label="rewrite queries",
    )
    return [_read(collection, artifact, config) for collection, artifact in asked]


def _share(collection: Collection, artifact: Artifact, config: RewriteConfig) -> Share:
    rows = [
        {"query_id": query_id, "query": text, "task": collection.task}
        for query_id, text in collection.queries.items()
    ]
    make = _Make(config, tasks.get(collection.task))
    return Share(pa.Table.from_pylist(rows), artifact, make)


def _read(collection: Collection, artifact: Artifact, config: RewriteConfig) -> Rewritten:
    check_share(artifact, config.max_failed_share)
    found = {
        row["query_id"]: row["rewritten_query"]
        for row in artifact.read(columns=["query_id", "rewritten_query", "status"]).to_pylist()
        if row["status"] == Status.OK
    }
    queries = {query_id: found.get(query_id, text) for query_id, text in collection.queries.items()}
    return Rewritten(queries, len(queries) - len(found))
