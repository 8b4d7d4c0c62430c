"""The top of a run in the order of an annotator's grades. Writes a `judgments` artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import pyarrow as pa

from reasonembed import tasks
from reasonembed.artifacts import Artifact, Mapper, check_share
from reasonembed.config import AnnotateConfig, RerankConfig, RuntimeConfig
from reasonembed.corpus import CorpusStore
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.metrics import Run, best_first
from reasonembed.llm.protocol import Engine
from reasonembed.remixer.annotate import Annotator, JudgedQuery, plan_pairs, query_blocks
from reasonembed.schemas import Status
from reasonembed.systems.local import Work
from reasonembed.systems.together import Share, ask_together

_Grades = Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class _Make:
    config: AnnotateConfig
    corpus: Artifact
    queries: Mapping[str, JudgedQuery]
    task: tasks.Task

    def __call__(self, engine: Engine) -> Mapper:
        return Annotator(
            self.config,
            engine=engine,
            corpus=CorpusStore(self.corpus.read()),
            queries=self.queries,
            tasks={self.task.name: self.task},
        )


@dataclass(frozen=True)
class Reranked:
    """A run after reranking.

    Attributes:
        run: See `reorder`.
        num_judged: Pairs of a query and a distinct text that the order rests on.
        num_failed: Those of them without a grade.
    """

    run: Run
    num_judged: int
    num_failed: int


@dataclass(frozen=True)
class Found:
    """A run whose top is to be judged.

    Attributes:
        run: Of the retriever.
        collection: Queries and their task.
        config: How many are judged, by what, and how much that weighs.
        artifact: Of the judgments.
        corpus: Holds the documents.
        copies: Documents of equal text, always in one order; the first of them is judged.
    """

    run: Run
    collection: Collection
    config: RerankConfig
    artifact: Artifact
    corpus: Artifact
    copies: Callable[[str], Sequence[str]]

    @cached_property
    def stands_for(self) -> dict[str, str]:
        """The document that is judged for each that was found."""
        found = {doc_id for scores in self.run.values() for doc_id in scores}
        return {doc_id: self.copies(doc_id)[0] for doc_id in found}

    @cached_property
    def pairs(self) -> pa.Table:
        """What is judged."""
        top, first = self.config.top, self.stands_for
        rows = [
            {
                "query_id": query_id,
                "doc_ids": list(dict.fromkeys(first[one] for one in best_first(scores)[:top])),
            }
            for query_id, scores in self.run.items()
        ]
        schema = pa.schema([("query_id", pa.string()), ("doc_ids", pa.list_(pa.string()))])
        return plan_pairs(pa.Table.from_pylist(rows, schema=schema), limit=top)

    def share(self) -> Share:
        """What the annotator is asked."""
        task, texts = self.collection.task, self.collection.queries
        queries = {id_: JudgedQuery(text, task) for id_, text in texts.items()}
        make = _Make(self.config.annotate, self.corpus, queries, tasks.get(task))
        return Share(self.pairs, self.artifact, make)

    def reranked(self) -> Reranked:
        """The run in the order of the judgments.

        Raises:
            QualityError: More of them failed than `annotate.max_failed_share` allows.
        """
        check_share(self.artifact, self.config.annotate.max_failed_share)
        graded, first = _grades(self.artifact), self.stands_for
        columns = (self.pairs.column(name).to_pylist() for name in ("query_id", "doc_id"))
        asked = set(zip(*columns, strict=True))
        grades = {
            query_id: {
                doc_id: graded.get((query_id, first[doc_id]))
                for doc_id in scores
                if (query_id, first[doc_id]) in asked
            }
            for query_id, scores in self.run.items()
        }
        run = reorder(self.run, grades, top=self.config.top, weight=self.config.weight)
        return Reranked(run, self.pairs.num_rows, len(asked - graded.keys()))


def rerank(
    found: Sequence[Found], config: RerankConfig, *, work: Work, runtime: RuntimeConfig
) -> Iterator[Reranked]:
    """Judges the top of all runs, then reorders one after the other.

    The original query is judged, whatever was searched for, and of documents of equal text one.

    Args:
        found: Runs of the retriever, by collection.
        config: Of all of them.
        work: Who judges.
        runtime: How.

    Raises:
        QualityError: See `Found.reranked`.
    """
    ask_together(
        [one.share() for one in found],
        config.annotate.llm,
        pool=runtime.annotate,
        runtime=runtime,
        work=work,
        label=f"judge the top {config.top}",
        cut=query_blocks,
    )
    for one in found:
        yield one.reranked()


def _grades(artifact: Artifact) -> dict[tuple[str, str], float]:
    """Grade by query and document: the expected label, else the mean of the votes."""
    columns = ["query_id", "doc_id", "expected_label", "votes", "status"]
    return {
        (row["query_id"], row["doc_id"]): fmean(row["votes"])
        if row["expected_label"] is None
        else row["expected_label"]
        for row in artifact.read(columns=columns).to_pylist()
        if row["status"] == Status.OK
    }


def reorder(run: Run, grades: _Grades, *, top: int, weight: float) -> Run:
    """The first `top` documents of each query by grade and retriever, then the others as they were.

    The key of a document of the top is weight x grade + (1 - weight) x score, each brought to 0..1
    within the query's top; equal keys keep the retriever's order. A document without a grade counts
    as the mean of those of its query's top. Scores are places counted from the end: trec_eval knows
    scores alone, and would put equal grades in the order of their ids. Only documents that tie
    throughout, by grade and by the retriever's score as copies do, share a place.

    Args:
        run: Of the retriever, best first.
        grades: By query id and doc id of what was judged; None where that failed.
        top: Documents that may change places, with what was judged and ties with the last of them:
            copies that the cut would part.
        weight: Of the grade, 0 to 1.
    """
    return {
        query_id: _reordered(scores, grades.get(query_id, {}), top=top, weight=weight)
        for query_id, scores in run.items()
    }


def _reordered(
    scores: Mapping[str, float], grades: Mapping[str, float | None], *, top: int, weight: float
) -> dict[str, float]:
    first = best_first(scores)[:top]
    cut = scores[first[-1]] if first else 0.0
    first += [one for one in grades if scores[one] == cut and one not in first]
    given = {one: grade for one in first if (grade := grades.get(one)) is not None}
    mean = fmean(given.values()) if given else 0.0
    by_grade = _unit({doc_id: given.get(doc_id, mean) for doc_id in first})
    by_score = _unit({doc_id: scores[doc_id] for doc_id in first})
    keys = {doc_id: (-1.0, score) for doc_id, score in scores.items()}
    for doc_id in first:
        mixed = weight * by_grade[doc_id] + (1 - weight) * by_score[doc_id]
        keys[doc_id] = (mixed, scores[doc_id])
    places = {key: place for place, key in enumerate(sorted(set(keys.values())), start=1)}
    order = sorted(keys, key=lambda doc_id: keys[doc_id], reverse=True)  # stable
    return {doc_id: float(places[keys[doc_id]]) for doc_id in order}


def _unit(values: Mapping[str, float]) -> dict[str, float]:
    """Brought to 0..1; all 0 where they are equal."""
    low, high = min(values.values(), default=0.0), max(values.values(), default=0.0)
    return {key: (value - low) / ((high - low) or 1.0) for key, value in values.items()}
