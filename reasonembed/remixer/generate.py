"""Query synthesis: one query from one seed document. Reads `seeds`, writes `queries`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from reasonembed.config import GenerateConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.answers import (
    Verdict,
    clean,
    cut_words,
    last_sentence_end,
    llm_fields,
    prompt_template,
    verdict,
)
from reasonembed.schemas import QUERIES, Status, from_rows
from reasonembed.tasks import Task

_NGRAM = 8
# "I can't get this to work" is how people ask; "I can't help with that" is how models refuse.
_REFUSAL = re.compile(
    r"(i['\u2019]m sorry|i am sorry|sorry,|as an ai\b"
    r"|i (cannot|can['\u2019]t|am unable to) (help|assist|comply|fulfil|provide))",
    re.IGNORECASE,
)
_POINTS_AT_TEXT = re.compile(
    r"\b(the|this|above|given|following)\s+(text|passage|document)\b", re.IGNORECASE
)


class QueryGenerator:
    """Writes queries; one row in, one row out, whatever the model does."""

    def __init__(
        self,
        config: GenerateConfig,
        *,
        engine: Engine,
        corpus: CorpusStore,
        tasks: Mapping[str, Task],
    ) -> None:
        self._config, self._engine = config, engine
        self._corpus, self._tasks = corpus, tasks

    def __call__(self, seeds: pa.Table) -> pa.Table:
        """Maps rows of `schemas.SEEDS` to rows of `schemas.QUERIES`."""
        rows = seeds.to_pylist()
        completions = self._engine.complete([self._request(row) for row in rows])
        done = [self._row(row, answer) for row, answer in zip(rows, completions, strict=True)]
        return from_rows(done, QUERIES, where="queries")

    def _request(self, seed: dict[str, Any]) -> Request:
        task = self._tasks[seed["task"]]
        document = self._corpus.text(seed["source_doc_id"])
        prompt = prompt_template(self._config.prompt).substitute(
            document_kind=task.document_kind,
            query_kind=task.query_kind,
            min_words=seed["min_words"],
            max_words=seed["max_words"],
            education_level=seed["education_level"],
            document=cut_words(document, self._config.max_document_words),
        )
        return Request(
            seed["query_id"],
            prompt,
            self._config.sampling,
            seed["seed"],
            prefill=self._config.opening,
        )

    def _row(self, seed: dict[str, Any], completion: Completion) -> dict[str, Any]:
        said = completion.text.strip()
        query = clean(self._config.opening + completion.text) if said else ""
        outcome = verdict(completion)
        if outcome.status == Status.TRUNCATED and self._config.keep_truncated:
            query, outcome = last_sentence_end(query), Verdict(Status.OK, outcome.detail)
        if outcome.status == Status.OK and (fault := self._fault(query, seed)):
            outcome = fault
        return {
            "query_id": seed["query_id"],
            "query": query if outcome.status == Status.OK else None,
            "source_doc_id": seed["source_doc_id"],
            "task": seed["task"],
            **llm_fields(outcome, completion, seed=seed["seed"], model=self._config.llm.model),
        }

    def _fault(self, query: str, seed: dict[str, Any]) -> Verdict | None:
        if not query:
            return Verdict(Status.INVALID, "the answer is empty")
        if len(query) > self._config.max_query_chars:
            return Verdict(
                Status.INVALID, f"{len(query)} characters, limit {self._config.max_query_chars}"
            )
        if _REFUSAL.match(query):
            return Verdict(Status.INVALID, "the model refused")
        if _POINTS_AT_TEXT.search(query):
            return Verdict(Status.FILTERED, "points at the source text")
        share = copied_share(query, self._corpus.text(seed["source_doc_id"]))
        if share > self._config.max_copied_share:
            return Verdict(Status.FILTERED, f"{share:.0%} of its {_NGRAM}-grams are the source's")
        return None


def copied_share(query: str, document: str) -> float:
    """Share in [0, 1] of the query's word 8-grams that also stand in the document.

    A query of fewer than 8 words has no such n-gram and counts 0.
    """
    grams = _ngrams(query)
    return len(grams & _ngrams(document)) / len(grams) if grams else 0.0


def _ngrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)}
