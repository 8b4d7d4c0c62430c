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

from reasonembed.config import AnnotateConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.answers import Verdict, cut_words, llm_fields, prompt_template, verdict
from reasonembed.schemas import JUDGMENTS, Status, from_rows, row_seed
from reasonembed.tasks import Task

GRADES = ("1", "2", "3", "4", "5")
_SCORE = re.compile(r"<score>((?:(?!<score>).)*?)</score>", re.IGNORECASE | re.DOTALL)
_GRADE = re.compile(r"\s*([1-5])\s*(?:/\s*5\s*)?")
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
    """The grade inside the last pair of score tags; None where that holds no whole 1–5.

    The last, because a model that repeats the instructions writes their example first. `4/5` is
    read as 4; `4.5` and `7` are no grades, and no earlier pair stands in for them.
    """
    found = _SCORE.findall(text)
    grade = _GRADE.fullmatch(found[-1]) if found else None
    return int(grade[1]) if grade else None


class Annotator:
    """Judges pairs; one row in, one row out."""

    def __init__(
        self,
        config: AnnotateConfig,
        *,
        engine: Engine,
        corpus: CorpusStore,
        queries: Mapping[str, JudgedQuery],
        tasks: Mapping[str, Task],
    ) -> None:
        self._config, self._engine, self._corpus = config, engine, corpus
        self._queries, self._tasks = queries, tasks

    def __call__(self, pairs: pa.Table) -> pa.Table:
        """Maps rows of `PAIRS` to rows of `schemas.JUDGMENTS`."""
        rows = pairs.to_pylist()
        requests = [self._request(row["query_id"], row["doc_id"]) for row in rows]
        answers = self._engine.complete(requests)
        followed: Sequence[Completion | None] = [None] * len(rows)
        if self._config.label_from == "expected":
            followed = self._ask_grades(requests, answers)
        done = [
            self._row(row, request, answer, grades)
            for row, request, answer, grades in zip(rows, requests, answers, followed, strict=True)
        ]
        return from_rows(done, JUDGMENTS, where="judgments")

    def _request(self, query_id: str, doc_id: str) -> Request:
        query = self._queries[query_id]
        task = self._tasks[query.task]
        prompt = prompt_template("annotate").substitute(
            relevance=task.relevance,
            query_kind=task.query_kind,
            document_kind=task.document_kind,
            query=query.text,
            document=cut_words(self._corpus.text(doc_id), self._config.max_document_words),
        )
        seed = row_seed(self._config.seed, query_id, doc_id)
        return Request(f"{query_id}|{doc_id}", prompt, self._config.sampling, seed)

    def _ask_grades(
        self, requests: Sequence[Request], answers: Sequence[Completion]
    ) -> list[Completion | None]:
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
        found: list[Completion | None] = [None] * len(requests)
        for i, completion in zip(usable, followed, strict=True):
            found[i] = completion
        return found

    def _row(
        self,
        pair: dict[str, Any],
        request: Request,
        answer: Completion,
        followed: Completion | None,
    ) -> dict[str, Any]:
        label, outcome = self._label(answer, followed)
        probabilities = followed.choice_probabilities if followed else {}
        expected = sum(int(grade) * p for grade, p in probabilities.items()) or None
        return {
            **pair,
            "relevance_label": label,
            "expected_label": expected,
            "confidence": probabilities.get(str(label)),
            "analysis": answer.text or None,
            **llm_fields(outcome, answer, seed=request.seed, model=self._config.llm.model),
        }

    def _label(self, answer: Completion, followed: Completion | None) -> tuple[int | None, Verdict]:
        outcome = verdict(answer)
        if followed is not None:
            # The grade is asked for after the analysis, so an analysis that was cut is no loss.
            if followed.finish_reason == "error":
                return None, verdict(followed)
            probabilities = followed.choice_probabilities
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
