"""Graded relevance by a reasoning LLM. Reads `candidates`, writes `judgments`.

Every pair is judged after a written analysis in three steps. The prompt runs template → query →
document, so that all candidates of a query share the longest possible prefix.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from reasonembed import tasks
from reasonembed.config import AnnotateConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.answers import Verdict, cut_words, llm_fields, prompt_template, verdict
from reasonembed.schemas import JUDGMENTS, Status, from_rows, row_seed

GRADES = ("1", "2", "3", "4", "5")
_SCORE = re.compile(r"<score>\s*([1-5])\s*(?:/\s*5\s*)?</score>", re.IGNORECASE)
_OPEN_SCORE = "<score>"
PAIRS = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class JudgedQuery:
    """What the annotator needs to know of a query."""

    text: str
    task: str


def plan_pairs(candidates: pa.Table, *, limit: int) -> pa.Table:
    """Explodes candidates to pairs, those of a query side by side (shared prefix)."""
    rows = candidates.select(["query_id", "doc_ids"]).to_pylist()
    pairs = [
        {"query_id": row["query_id"], "doc_id": doc_id}
        for row in rows
        for doc_id in row["doc_ids"][:limit]
    ]
    return from_rows(pairs, PAIRS, where="pairs")


def written_score(text: str) -> int | None:
    """The grade inside the last pair of score tags; None where there is no whole 1–5.

    The last, because a model that repeats the instructions writes their example first. `4/5` is
    read as 4; `4.5` and `7` are no grades.
    """
    found = _SCORE.findall(text)
    return int(found[-1]) if found else None


class Annotator:
    """Judges pairs; one row in, one row out."""

    def __init__(
        self,
        config: AnnotateConfig,
        *,
        engine: Engine,
        corpus: CorpusStore,
        queries: Mapping[str, JudgedQuery],
    ) -> None:
        self._config, self._engine, self._corpus, self._queries = config, engine, corpus, queries

    def __call__(self, pairs: pa.Table) -> pa.Table:
        """Maps rows of `PAIRS` to rows of `schemas.JUDGMENTS`."""
        rows = pairs.to_pylist()
        requests = [self._request(row["query_id"], row["doc_id"]) for row in rows]
        answers = self._engine.complete(requests)
        if self._config.label_from == "expected":
            probabilities = self._score_probabilities(requests, answers)
        else:
            probabilities = [{} for _ in rows]
        done = [
            self._row(row, request, answer, grades)
            for row, request, answer, grades in zip(
                rows, requests, answers, probabilities, strict=True
            )
        ]
        return from_rows(done, JUDGMENTS, where="judgments")

    def _request(self, query_id: str, doc_id: str) -> Request:
        query = self._queries[query_id]
        task = tasks.get(query.task)
        prompt = prompt_template("annotate").substitute(
            relevance=task.relevance,
            query_kind=task.query_kind,
            document_kind=task.document_kind,
            query=query.text,
            document=cut_words(self._corpus.text(doc_id), self._config.max_document_words),
        )
        seed = row_seed(self._config.seed, query_id, doc_id)
        return Request(f"{query_id}|{doc_id}", prompt, self._config.sampling, seed)

    def _score_probabilities(
        self, requests: Sequence[Request], answers: Sequence[Completion]
    ) -> list[dict[str, float]]:
        """Probability of each grade as the token after the analysis and an open score tag."""
        usable = [i for i, answer in enumerate(answers) if answer.finish_reason != "error"]
        followed = self._engine.complete(
            [
                replace(
                    requests[i],
                    prefill=f"{_analysis(answers[i].text)}\n{_OPEN_SCORE}",
                    choices=GRADES,
                )
                for i in usable
            ]
        )
        found: list[dict[str, float]] = [{} for _ in requests]
        for i, completion in zip(usable, followed, strict=True):
            found[i] = completion.choice_probabilities
        return found

    def _row(
        self,
        pair: dict[str, Any],
        request: Request,
        answer: Completion,
        probabilities: dict[str, float],
    ) -> dict[str, Any]:
        label, outcome = self._label(answer, probabilities)
        expected = sum(int(grade) * p for grade, p in probabilities.items()) or None
        return {
            **pair,
            "relevance_label": label,
            "expected_label": expected,
            "confidence": probabilities.get(str(label)),
            "analysis": answer.text or None,
            **llm_fields(outcome, answer, seed=request.seed, model=self._config.llm.model),
        }

    def _label(
        self, answer: Completion, probabilities: dict[str, float]
    ) -> tuple[int | None, Verdict]:
        outcome = verdict(answer)
        if self._config.label_from == "expected":
            # The grade is asked for after the analysis, so an analysis that was cut is no loss.
            if outcome.status == Status.ERROR:
                return None, outcome
            if not probabilities:
                return None, Verdict(Status.INVALID, "no probabilities for the score token")
            best = max(GRADES, key=lambda grade: probabilities[grade])
            return int(best), Verdict(Status.OK, outcome.detail)
        if outcome.status != Status.OK:
            return None, outcome
        label = written_score(answer.text)
        if label is None:
            return None, Verdict(Status.INVALID, "no whole number from 1 to 5 inside score tags")
        return label, outcome


def _analysis(text: str) -> str:
    return text.partition(_OPEN_SCORE)[0].rstrip()
