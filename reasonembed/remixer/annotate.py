"""Graded relevance by a reasoning LLM. Reads `candidates`, writes `judgments`.

Every pair is judged after a written analysis in three steps, by one analysis or by the median of
several. With a cascade, the grade is asked for at once first, and analysed where that is unsure.
The prompt runs template → query → document, so that all candidates of a query share the longest
possible prefix; a question that follows an analysis or precedes it shares all of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import fmean, median_low
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.config import AnnotateConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.answers import (
    Answer,
    Verdict,
    ask,
    cut_words,
    llm_fields,
    prompt_template,
    verdict,
)
from reasonembed.schemas import JUDGMENTS, Status, conform, from_rows, row_seed
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
    lists = pc.list_slice(candidates.column("doc_ids").combine_chunks(), 0, limit)
    query_ids = candidates.column("query_id").combine_chunks()
    pairs = {
        "query_id": query_ids.take(pc.list_parent_indices(lists)),
        "doc_id": pc.list_flatten(lists),
    }
    return conform(pa.table(pairs), PAIRS, where="pairs")


def query_blocks(pairs: pa.Table, rows: int) -> list[pa.Table]:
    """Cuts pairs into blocks of at most `rows`, between queries where that is possible.

    A query that is cut in two has its prefix computed twice, so only one that has more pairs than
    a block has room for is cut.
    """
    query_ids = pairs.column("query_id").to_pylist()
    starts, border = [0], 0
    for i in range(1, len(query_ids)):
        if query_ids[i] != query_ids[i - 1]:
            border = i
        if i - starts[-1] == rows:
            starts.append(border if border > starts[-1] else i)
    ends = [*starts[1:], len(query_ids)]
    return [pairs.slice(start, end - start) for start, end in zip(starts, ends, strict=True)]


def annotation_prompt(
    query: JudgedQuery, document: str, *, task: Task, max_document_words: int
) -> str:
    """The question about one pair, the document last."""
    return prompt_template("annotate").substitute(
        relevance=task.relevance,
        query_kind=task.query_kind,
        document_kind=task.document_kind,
        query=query.text,
        document=cut_words(document, max_document_words),
    )


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
        judged = [_Pair(row, self._request(**row)) for row in pairs.to_pylist()]
        if self._config.cascade:
            self._ask_at_once(judged)
        analysed = [pair for pair in judged if pair.route != "quick"]
        done = iter(self._analyse([one for pair in analysed for one in self._samples(pair)]))
        for pair in analysed:
            pair.analyses = list(islice(done, self._config.samples))
        return from_rows([self._row(pair) for pair in judged], JUDGMENTS, where="judgments")

    def _request(self, query_id: str, doc_id: str) -> Request:
        query = self._queries[query_id]
        prompt = annotation_prompt(
            query,
            self._corpus.text(doc_id),
            task=self._tasks[query.task],
            max_document_words=self._config.max_document_words,
        )
        seed = row_seed(self._config.seed, query_id, doc_id)
        return Request(f"{query_id}|{doc_id}", prompt, self._config.sampling, seed)

    def _samples(self, pair: _Pair) -> list[Request]:
        first = pair.request
        others = range(1, self._config.samples)
        return [first, *(replace(first, seed=row_seed(first.seed, "sample", n)) for n in others)]

    def _ask_at_once(self, pairs: Sequence[_Pair]) -> None:
        """The cascade's first pass: the grade without an analysis; decides each pair's route."""
        cascade = self._config.cascade
        assert cascade is not None
        asked = [replace(pair.request, prefill=_OPEN_SCORE, choices=GRADES) for pair in pairs]
        for pair, grades in zip(pairs, self._engine.complete(asked), strict=True):
            pair.quick = grades
            if max(grades.choice_probabilities.values(), default=0.0) >= cascade.min_confidence:
                drawn = row_seed(self._config.seed, "checked", *pair.row.values()) / 2**31
                pair.route = "checked" if drawn < cascade.checked_share else "quick"

    def _analyse(self, requests: Sequence[Request]) -> list[_Analysis]:
        answers = ask(self._engine, requests, self._judge, tries=self._config.tries)
        grades: dict[int, Completion] = {}
        if self._config.label_from == "expected":
            grades = self._ask_grades(requests, answers)
        return [_Analysis(answer, grades.get(i)) for i, answer in enumerate(answers)]

    def _judge(self, _: int, completion: Completion) -> tuple[str, Verdict]:
        found, text = verdict(completion), completion.text
        if self._config.label_from == "expected":
            # The grade is asked for after the analysis, so an analysis that was cut is no loss.
            is_cut = found.status == Status.TRUNCATED
            return text, Verdict(Status.OK, found.detail) if is_cut else found
        if found.status == Status.OK and written_score(text) is None:
            found = Verdict(Status.INVALID, "no whole number from 1 to 5 inside score tags")
        return text, found

    def _ask_grades(
        self, requests: Sequence[Request], answers: Sequence[Answer]
    ) -> dict[int, Completion]:
        """Probability of each grade as the token after the analysis and an open score tag."""
        usable = [i for i, answer in enumerate(answers) if answer.text is not None]
        if not usable:
            return {}
        analyses = [answers[i].completion.text.partition(_OPEN_SCORE)[0].rstrip() for i in usable]
        asked = [
            replace(requests[i], prefill=f"{analysis}\n{_OPEN_SCORE}", choices=GRADES)
            for i, analysis in zip(usable, analyses, strict=True)
        ]
        return dict(zip(usable, self._engine.complete(asked), strict=True))

    def _row(self, pair: _Pair) -> dict[str, Any]:
        quick = pair.quick.choice_probabilities if pair.quick else {}
        judged = pair.judgment() if pair.analyses else pair.quick_judgment()
        return {
            **pair.row,
            "relevance_label": judged.label,
            "expected_label": _mean(judged.probabilities),
            "confidence": judged.confidence,
            "analysis": judged.answer.text or None if pair.analyses else None,
            "votes": pair.votes,
            "quick_label": _mean(quick),
            "route": pair.route,
            **llm_fields(
                judged.outcome,
                pair.with_all_tokens(judged.answer),
                seed=judged.seed,
                model=self._config.llm.model,
                tries=sum(analysis.answer.tries for analysis in pair.analyses) or 1,
            ),
        }


@dataclass(frozen=True)
class _Analysis:
    """One written analysis and, with `label_from: expected`, the grades asked for after it."""

    answer: Answer
    grades: Completion | None

    @property
    def outcome(self) -> Verdict:
        """Whether it can be used, and why not."""
        if self.grades is not None and self.grades.finish_reason == "error":
            return verdict(self.grades)
        return self.answer.outcome

    @property
    def label(self) -> int | None:
        """Its vote; None where it cannot be used."""
        if self.outcome.status != Status.OK:
            return None
        if self.grades is not None:
            return _likeliest(self.grades.choice_probabilities)
        return written_score(self.answer.completion.text)


@dataclass(frozen=True)
class _Judgment:
    label: int | None
    confidence: float | None
    probabilities: dict[str, float]
    answer: Completion
    outcome: Verdict
    seed: int


@dataclass
class _Pair:
    """A pair on its way from the question to the row."""

    row: dict[str, Any]
    request: Request
    route: str = "full"
    quick: Completion | None = None
    analyses: list[_Analysis] = field(default_factory=list)

    @property
    def votes(self) -> list[int]:
        return [label for analysis in self.analyses if (label := analysis.label) is not None]

    def judgment(self) -> _Judgment:
        """What the analyses say: the lower median of their votes, which is always one of them."""
        votes = self.votes
        label = median_low(votes) if votes else None
        kept = next(analysis for analysis in self.analyses if analysis.label == label)
        used = [analysis.grades for analysis in self.analyses if analysis.label is not None]
        asked = [grades.choice_probabilities for grades in used if grades is not None]
        mean = {g: fmean(one[g] for one in asked) for g in GRADES} if asked else {}
        confidence = mean.get(str(label))
        if label and not mean and len(self.analyses) > 1:
            confidence = votes.count(label) / len(votes)
        answer = kept.answer
        return _Judgment(label, confidence, mean, answer.completion, kept.outcome, answer.seed)

    def quick_judgment(self) -> _Judgment:
        """What the first pass says."""
        assert self.quick is not None
        probabilities = self.quick.choice_probabilities
        label = _likeliest(probabilities)
        return _Judgment(
            label,
            probabilities[str(label)],
            probabilities,
            self.quick,
            Verdict(Status.OK),
            self.request.seed,
        )

    def with_all_tokens(self, answer: Completion) -> Completion:
        """`answer` with the tokens of everything that was asked about the pair."""
        asked = [one for each in self.analyses for one in (each.answer.completion, each.grades)]
        spent = [one for one in (*asked, self.quick) if one is not None]
        return replace(
            answer,
            prompt_tokens=sum(one.prompt_tokens for one in spent),
            completion_tokens=sum(one.completion_tokens for one in spent),
            cached_tokens=sum(one.cached_tokens for one in spent),
        )


def _likeliest(probabilities: Mapping[str, float]) -> int:
    return int(max(GRADES, key=lambda grade: probabilities[grade]))


def _mean(probabilities: Mapping[str, float]) -> float | None:
    """The mean grade; None without probabilities."""
    return sum(int(grade) * p for grade, p in probabilities.items()) or None
