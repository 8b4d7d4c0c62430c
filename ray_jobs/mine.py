"""Mines candidates for every query, its source and what repeats the source shut out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from ray_jobs.embed import dense_retrievers, embed, used_queries, vectors
from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from reasonembed.artifacts import Artifact, Mapper
from reasonembed.config import BM25Retriever, RunRetriever
from reasonembed.embedder.vectors import Encoder
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.exact import NO_DOCUMENT, Positions, Scores, pair_scores
from reasonembed.index.places import (
    Wanted,
    by_row_group,
    excluded_positions,
    locate,
    places_for,
    read_vectors,
)
from reasonembed.index.shards import (
    CommittedHits,
    ShardSearch,
    block_keys,
    block_rows,
    group_queries,
    plan_shards,
)
from reasonembed.remixer.duplicates import usable_queries
from reasonembed.remixer.mine import (
    MINER,
    Churn,
    Documents,
    RunFile,
    ShutOut,
    SourceIndex,
    candidates,
    changed_rows,
    churn,
    keeping_to_source,
    plan_queries,
    read_documents,
    shut_out,
    texts_at,
    texts_of,
)
from reasonembed.schemas import stable_hash

# Scores and positions of a block of queries; the number is the block's.
Ranker = Callable[[int, pa.Table], tuple[Scores, Positions]]


@dataclass(frozen=True)
class Plan:
    """What is searched, what is asked, and what must not be found."""

    documents: Documents
    shut: ShutOut
    blocks: list[pa.Table]

    @property
    def searched(self) -> pa.Table:
        """The documents without those that no query gets."""
        return self.documents.table.take(self.searched_rows)

    @property
    def searched_rows(self) -> np.ndarray:
        """Rows of `documents.table`, ascending."""
        rows = np.arange(self.documents.table.num_rows)
        return np.setdiff1d(rows, list(self.shut.always)).astype(np.int64)


def run(job: Job) -> dict[str, Any]:
    """Commits `hits`, and of `candidates` the rows that are new or another list than before."""
    artifact = job.run.artifact("candidates")
    job.run.begin("mine", artifact)
    documents = read_documents(job.run.artifact("corpus"))
    limit = job.run.config.generate.max_query_similarity
    queries, _ = usable_queries(job.run.artifact("queries").read(), max_similarity=limit)
    asked = queries.select(["query_id", "query"]).sort_by("query_id")
    state = {
        "documents": stable_hash(
            *documents.table.select(["text_id", "copies"]).to_pylist(), size=16
        ),
        "queries": stable_hash(*asked.to_pylist(), size=16),
        "identity": stage.fingerprint if (stage := artifact.stage()) else "",
    }
    notes: dict[str, Any] = {}
    if queries.num_rows and artifact.finished() != state:
        plan = _plan(job, documents, queries)
        rankers = _rankers(job, plan, notes)
        if job.shard is not None:  # the others' hits are not there yet, and fusing is cheap
            return {"blocks of queries": len(plan.blocks)}
        notes |= _commit(job, artifact, plan, rankers)
        artifact.finish(state)
    done = artifact.read(columns=["doc_ids", "num_excluded", "source_rank"])
    if (bound := job.run.config.mine.max_source_rank) is not None:
        kept = keeping_to_source(done, max_source_rank=bound)
        notes["queries that stray from their source"] = done.num_rows - kept.num_rows
    return {
        "queries": done.num_rows,
        "candidates": pc.sum(pc.list_value_length(done.column("doc_ids"))).as_py() or 0,
        "documents shut out": pc.sum(done.column("num_excluded")).as_py() or 0,
        **notes,
    }


def _plan(job: Job, documents: Documents, queries: pa.Table) -> Plan:
    config = job.run.config.mine
    if config.top_k >= documents.table.num_rows:
        job.reporter.say(
            f"      mine.top_k {config.top_k} is more than the corpus has to give "
            f"({documents.table.num_rows} distinct texts): queries get fewer candidates"
        )
    sources = np.unique(documents.positions(queries.column("source_doc_id").to_pylist()))
    near = _near_duplicates(job, documents, sources)
    shut = shut_out(documents, sources.tolist(), near=near, exclude_ids=config.exclude_ids)
    tasks = job.run.config.task_table
    planned = plan_queries(queries, documents, shut, tasks=tasks)
    hits = job.run.artifact("hits")
    hits.begin({})  # dated by the keys of its rows
    blocks = group_queries(
        planned,
        CommittedHits(hits).blocks(),
        k=config.top_k,
        max_queries=job.run.config.runtime.mine.query_block,
    )
    return Plan(documents, shut, blocks)


def _near_duplicates(
    job: Job, documents: Documents, sources: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Rows of sources and of documents that nearly repeat them, from tasks over row groups."""
    limit, corpus = job.run.config.mine.max_source_similarity, job.run.artifact("corpus")
    if limit == 1:
        return
    texts = texts_at(corpus, documents.table.take(sources))
    index = ray.put(SourceIndex(texts, max_similarity=limit))
    wanted = list(by_row_group(documents.table))
    found = ray.get([_near_in.remote(corpus, index, one) for one in wanted])
    for one, pairs in zip(wanted, found, strict=True):
        for row, source in pairs:
            yield int(sources[source]), int(one.where[row])


@ray.remote(num_cpus=1)
def _near_in(corpus: Artifact, index: SourceIndex, wanted: Wanted) -> list[tuple[int, int]]:
    texts = texts_of(corpus, wanted)
    return [(row, one) for row, text in enumerate(texts) for one in index.sources_of(text)]


def _rankers(job: Job, plan: Plan, notes: dict[str, Any]) -> dict[str, Ranker]:
    config = job.run.config.mine
    rankers: dict[str, Ranker] = {}
    for name, encoder in dense_retrievers(job).items():
        rankers[name] = _dense(job, name, encoder, plan)
    for name, other in config.also.items():
        if isinstance(other, BM25Retriever):
            rankers[name] = _bm25(job, other, plan)
        elif isinstance(other, RunRetriever):
            file = RunFile(other.path, plan.documents, always=plan.shut.always)
            asked = [id_ for block in plan.blocks for id_ in block.column("query_id").to_pylist()]
            notes[f"queries that {name} lacks"] = file.missing(asked)
            rankers[name] = lambda _, block, file=file: file.search(block, k=config.top_k)
    return rankers


def _dense(job: Job, name: str, encoder: Encoder, plan: Plan) -> Ranker:
    """Searches every shard for every block; what is committed already is not searched again."""
    k, pool = job.run.config.mine.top_k, job.run.config.runtime.mine
    # Through `embed`, which adds what is missing where the stage was begun in the middle.
    artifact = embed(job, name, encoder, plan.documents, used_queries(job))
    located = locate(artifact)
    shards = plan_shards(
        plan.searched, located, name=artifact.name, max_documents=pool.shard_documents
    )
    keys = [block_keys(block, shards, name=artifact.name, k=k) for block in plan.blocks]
    tables = {shard.key: ray.put(shard.rows) for shard in shards}
    for block, of_shards in zip(plan.blocks, keys, strict=True):
        held = ray.put(block_rows(block, located, name=artifact.name))
        tables |= dict.fromkeys(of_shards, held)
    pairs = [
        {"shard": shard.key, "query_block": of_shards[number]}
        for number, shard in enumerate(shards)  # pairs of a shard together: it is loaded once
        for of_shards in keys
    ]
    if pairs:
        planned = pa.Table.from_pylist(pairs)
        hits = job.run.artifact("hits")
        run_planned(
            job,
            planned,
            hits,
            _Search(artifact, tables, k, device="cuda" if pool.num_gpus else None),
            pool,
            label=f"search ({name})",
        )
    found = CommittedHits(job.run.artifact("hits"))

    def rank(number: int, block: pa.Table) -> tuple[Scores, Positions]:
        pairs = [(shard.key, key) for shard, key in zip(shards, keys[number], strict=True)]
        if not pairs:
            return _nothing(block.num_rows)
        return found.merged(pairs, doc_ids=plan.documents.doc_ids, k=k)

    return rank


@dataclass(frozen=True)
class _Search:
    vectors: Artifact
    tables: dict[str, Any]
    k: int
    device: str | None

    def __call__(self) -> Mapper:
        return ShardSearch(
            self.vectors, shard=self._get, block=self._get, k=self.k, device=self.device
        )

    def _get(self, key: str) -> pa.Table:
        return ray.get(self.tables[key])


def _bm25(job: Job, config: BM25Retriever, plan: Plan) -> Ranker:
    searched = plan.searched
    if not searched.num_rows:
        return lambda _, block: _nothing(block.num_rows)
    corpus = job.run.artifact("corpus")
    actor = _BM25.remote(corpus, searched, config)
    rows, k = plan.searched_rows, job.run.config.mine.top_k

    def rank(_: int, block: pa.Table) -> tuple[Scores, Positions]:
        scores_QK, found_QK = ray.get(actor.search.remote(block.select(["query", "excluded"]), k))
        return scores_QK, np.where(found_QK == NO_DOCUMENT, NO_DOCUMENT, rows[found_QK])

    return rank


@ray.remote(num_cpus=1)
class _BM25:
    """The one process that holds the corpus's words."""

    def __init__(self, corpus: Artifact, documents: pa.Table, config: BM25Retriever) -> None:
        self._doc_ids = documents.column("doc_id").combine_chunks()
        # Made with the first call: Ray does not hand on what a constructor raises.
        settings = config.model_dump(exclude={"kind"})
        self._index = cache(lambda: BM25Index(texts_at(corpus, documents), **settings))

    def search(self, block: pa.Table, k: int) -> tuple[Scores, Positions]:
        shut = excluded_positions(block.column("excluded"), self._doc_ids)
        return self._index().search(block.column("query").to_pylist(), k=k, excluded=shut)


def _source_scores(job: Job, plan: Plan) -> Callable[[pa.Table], Scores]:
    """What the miner gives the sources of a block's queries, float32 [Q]."""
    artifact = vectors(job, dense_retrievers(job)[MINER])
    located, texts = locate(artifact), plan.documents.table.column("text_id").combine_chunks()

    def scores(block: pa.Table) -> Scores:
        rows = plan.documents.positions(block.column("source_doc_id").to_pylist())
        ids = (block.column("text_id").combine_chunks(), texts.take(pa.array(rows)))
        queries_QD, sources_QD = (
            read_vectors(artifact, places_for(one, located, name=artifact.name)) for one in ids
        )
        each = np.arange(block.num_rows)
        return pair_scores(queries_QD, sources_QD, each, each)

    return scores


def _nothing(num_queries: int) -> tuple[Scores, Positions]:
    return np.empty((num_queries, 0), np.float32), np.empty((num_queries, 0), np.int64)


def _commit(job: Job, artifact: Artifact, plan: Plan, rankers: dict[str, Ranker]) -> dict[str, Any]:
    """Fuses block by block, commits what differs, and says how much that is."""
    config, total = job.run.config.mine, Churn()
    name = "candidates-before"  # a second round compares with the first one's, until it is done
    place = str(job.run.place / name)
    before = Artifact(place, schema=artifact.schema, key=artifact.key, name=name)
    earlier = before if artifact.finished() is None and before.commits() else artifact
    source_scores = _source_scores(job, plan)
    for number, block in enumerate(plan.blocks):
        found = {name: rank(number, block) for name, rank in rankers.items()}
        new = candidates(
            block,
            found,
            doc_ids=plan.documents.doc_ids,
            source_scores_Q=source_scores(block),
            config=config,
        )
        only = pc.field("query_id").isin(block.column("query_id").combine_chunks())
        total += churn(new, earlier.read(only=only))
        changed = changed_rows(new, artifact.read(only=only))
        if changed.num_rows:
            artifact.commit(f"candidates-{len(artifact.commits()):06d}", changed)
    if not total.compared:
        return {}
    return {
        "queries with other candidates than before": total.changed,
        "share of candidates replaced": round(total.replaced / total.compared, 4),
    }


if __name__ == "__main__":
    main(run, stage="mine", description=__doc__)
