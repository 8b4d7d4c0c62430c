"""Domain filter: a model says which documents belong to the task's domain.

Reads `corpus`, writes `domains`. Corpora that were gathered from the web hold pages about anything;
a query that is written from one of those trains for nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pyarrow as pa

from reasonembed.config import FilterConfig, PlanConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.answers import Verdict, cut_words, llm_fields, prompt_template, verdict
from reasonembed.remixer.plan import sift
from reasonembed.schemas import DOMAINS, Status, from_rows, row_seed
from reasonembed.tasks import Task

YES, NO = "Yes", "No"
DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
    ]
)
"""What is asked about."""


def plan_filter(corpus: pa.Table, config: PlanConfig, *, held_out: Collection[str]) -> pa.Table:
    """The documents that may become seeds by every rule that needs no model, as `DOCUMENTS`.

    Args:
        corpus: Table of `schemas.CORPUS`.
        config: Lengths in characters.
        held_out: See `plan.sift`.
    """
    tasks = sift(corpus, config, held_out=held_out).tasks
    rows: list[dict[str, object]] = [{"doc_id": doc, "task": task} for doc, task in tasks.items()]
    return from_rows(rows, DOCUMENTS, where="planned domain questions")


class DomainFilter:
    """Asks yes or no of each document, as one constrained token; one row in, one row out."""

    def __init__(
        self,
        config: FilterConfig,
        *,
        engine: Engine,
        corpus: CorpusStore,
        tasks: Mapping[str, Task],
    ) -> None:
        self._config, self._engine = config, engine
        self._corpus, self._tasks = corpus, tasks

    def __call__(self, documents: pa.Table) -> pa.Table:
        """Maps rows of `DOCUMENTS` to rows of `schemas.DOMAINS`."""
        rows = documents.to_pylist()
        requests = [self._request(row) for row in rows]
        answers = self._engine.complete(requests)
        done = [
            self._row(row, request, answer)
            for row, request, answer in zip(rows, requests, answers, strict=True)
        ]
        return from_rows(done, DOMAINS, where="domains")

    def _request(self, row: dict[str, Any]) -> Request:
        prompt = prompt_template("filter").substitute(
            domain=self._config.domain or self._tasks[row["task"]].display_name,
            document=cut_words(self._corpus.text(row["doc_id"]), self._config.max_document_words),
        )
        seed = row_seed(self._config.seed, row["doc_id"], "domain")
        sampling = self._config.sampling
        return Request(f"{row['doc_id']}|domain", prompt, sampling, seed, choices=(YES, NO))

    def _row(self, row: dict[str, Any], request: Request, answer: Completion) -> dict[str, Any]:
        probability = answer.choice_probabilities.get(YES)
        if answer.finish_reason == "error":
            outcome = verdict(answer)
        elif probability is None:
            outcome = Verdict(Status.ERROR, "the engine gave no probabilities of Yes and No")
        else:  # one token was asked for, so that it stopped there is no truncation
            outcome = Verdict(Status.OK, self._cut(row["doc_id"]))
        return {
            "doc_id": row["doc_id"],
            "task": row["task"],
            "probability": probability,
            **llm_fields(outcome, answer, seed=request.seed, model=self._config.llm.model),
        }

    def _cut(self, doc_id: str) -> str | None:
        words, limit = len(self._corpus.text(doc_id).split()), self._config.max_document_words
        return f"judged by the first {limit} of {words} words" if words > limit else None
