"""Query synthesis: one query from one seed document. Reads `seeds`, writes `queries`.

An answer that fails a check is asked for again with another seed, and is a failed row if that fails
too; `detail` names the check, so that reports count the reasons.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from reasonembed.config import GenerateConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.remixer.answers import (
    Answer,
    Verdict,
    ask,
    clean,
    cut_words,
    last_sentence_end,
    prompt_template,
    verdict,
)
from reasonembed.schemas import QUERIES, Status, from_rows
from reasonembed.tasks import RELATIONS, Task

_WORD = re.compile(r"\w+")
_COPY_WORDS = 8
_LOOP_WORDS, _LOOP_TIMES, _MAX_LOOPING_SHARE = 5, 3, 1 / 3

# "I can't get this to work" and "sorry if this is basic" are how people ask; "I can't help with
# that" is how models refuse.
_REFUSAL = re.compile(
    r"""(?:(?:i['\u2019]m|i\ am|we\ are)\ (?:very\ |so\ )?sorry | sorry)[,.;:]?\ +
        (?:but\ +)?(?:no\b | (?:i|we)\ (?:am\ unable|cannot|can['\u2019]t|won['\u2019]t)\ +
        (?:to\ +)?(?:help|assist|comply|fulfil|provide|generate|create|write|answer|do\ that))
      | as\ an?\ (?:ai|(?:large\ )?language\ model)(?:\ (?:language\ )?model|\ assistant)?
        (?:,|\ i\b)
      | i\ (?:am\ unable\ to|cannot|can['\u2019]t|won['\u2019]t)\ +
        (?:help(?!\ (?:but|feeling|noticing|thinking|wondering))|assist|comply|fulfil)""",
    re.IGNORECASE | re.VERBOSE,
)

_NOUN = r"(?:texts?|passages?|documents?|articles?|excerpts?|snippets?)"
# What follows shows that the person's own is meant: "this document I am writing".
_NOT_OWN = r"\b(?!\s+(?:that\s+|which\s+)?(?:i|we|he|she|they|my|our)\b|\s+i['\u2019])"
_THING = rf"{_NOUN}{_NOT_OWN}"
_SAYS = (
    r"(?:say|state|mention|describe|explain|discuss|argue|claim|suggest|imply|implie|present|refer|"
    r"outline|define|provide|mean)"
)
_POINTS_AT_TEXT = re.compile(
    rf"""\b(?:
      (?:the|this|that|these|those)\s+(?:above|provided|given|following|preceding|accompanying)\s+
        (?:(?:code|text|reference|short)\s+)?{_THING}(?!\s*[:\n])  # after a colon it stands there
    | (?:the|this)\s+{_NOUN}\s+(?:above|provided|given|in\s+question)\b(?!\s+(?:by|to|in|as|for))
    | above\s+{_THING}
    | (?:the|this)\s+(?:passages?|excerpts?){_NOT_OWN}(?!\s+(?:of|from|through|between|to|into)\b)
    | (?:according\s+to|based\s+on|referring\s+to)\s+(?:the|this)\s+{_THING}
    | (?:mentioned|described|explained|discussed|stated|outlined|presented|defined|given|provided)
        \s+(?:in|by)\s+(?:the|this)\s+{_THING}
    | (?:as|the\s+\w+)\s+(?:mentioned|described|explained|discussed|stated|outlined)\s+above
    | (?:the|this)\s+{_NOUN}\s+{_SAYS}s\b
    | (?:does|do|did)\s+(?:the|this)\s+{_NOUN}\s+{_SAYS}\b
    | (?:author|topic|purpose|summary|main\s+(?:idea|point|argument|claim))\s+of\s+(?:the|this)\s+
        {_THING}
    | in\s+(?:the|this)\s+{_NOUN},
    )""",
    re.IGNORECASE | re.VERBOSE,
)
# Someone who speaks of a text of their own has said so: "I'm reading an article ...".
_INTRODUCES_TEXT = re.compile(
    rf"\b(?:an?|my|our|his|her|their|some|another|two)\s+(?:[\w'\u2019-]+\s+){{0,3}}?{_NOUN}\b",
    re.IGNORECASE,
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
        answers = ask(
            self._engine,
            [self._request(row) for row in rows],
            lambda i, completion: self._judge(rows[i], completion),
            tries=self._config.tries,
        )
        done = [self._row(row, answer) for row, answer in zip(rows, answers, strict=True)]
        return from_rows(done, QUERIES, where="queries")

    def _request(self, seed: dict[str, Any]) -> Request:
        task = self._tasks[seed["task"]]
        document = self._corpus.text(seed["source_doc_id"])
        prompt = prompt_template(self._config.prompt).substitute(
            document_kind=task.document_kind,
            query_kind=task.query_kind,
            relation=RELATIONS[task.relation],
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

    def _judge(self, seed: dict[str, Any], completion: Completion) -> tuple[str, Verdict]:
        said = completion.text.strip()
        query = clean(self._config.opening + completion.text) if said else ""
        outcome = verdict(completion)
        if outcome.status == Status.TRUNCATED and self._config.keep_truncated:
            query, outcome = last_sentence_end(query), Verdict(Status.OK, outcome.detail)
        if outcome.status == Status.OK:
            document = self._corpus.text(seed["source_doc_id"])
            outcome = fault(query, document, self._config) or outcome
        return query, outcome

    def _row(self, seed: dict[str, Any], answer: Answer) -> dict[str, Any]:
        return {
            "query_id": seed["query_id"],
            "query": answer.text,
            "source_doc_id": seed["source_doc_id"],
            "task": seed["task"],
            **answer.fields(model=self._config.llm.model),
        }


def fault(query: str, document: str, config: GenerateConfig) -> Verdict | None:
    """Why a query cannot be used: no query at all (`invalid`), or one that gives too much away.

    Args:
        query: The answer proper.
        document: Its source.
        config: Limits.
    """
    if not query:
        return Verdict(Status.INVALID, "the answer is empty")
    if len(query) > config.max_query_chars:
        return Verdict(
            Status.INVALID, f"runs on: {len(query)} characters, limit {config.max_query_chars}"
        )
    if (share := looping_share(query)) > _MAX_LOOPING_SHARE:
        return Verdict(Status.INVALID, f"runs on: {share:.0%} of its words are repetitions")
    if _REFUSAL.match(query):
        return Verdict(Status.INVALID, "the model refused")
    if points_at_source(query):
        return Verdict(Status.FILTERED, "points at the source text")
    if (share := copied_share(query, document)) > config.max_copied_share:
        return Verdict(Status.FILTERED, f"{share:.0%} of its {_COPY_WORDS}-grams are the source's")
    return None


def points_at_source(query: str) -> bool:
    """Whether a query speaks of a text that only its writer has seen.

    "What does the passage say" does; "this document I am writing" does not, nor what speaks of a
    text that the query has introduced ("I found an article ... the article says").
    """
    found = _POINTS_AT_TEXT.search(query)
    return found is not None and not _INTRODUCES_TEXT.search(query, 0, found.start())


def looping_share(text: str) -> float:
    """Share in [0, 1] of the words in the longest stretch that says the same three times over.

    In direct succession, as a model does that has lost its way; what comes again elsewhere, like a
    log's lines or a problem's examples, is no loop.
    """
    words = _WORD.findall(text.lower())
    before: dict[tuple[str, ...], int] = {}
    longest = period = length = 0
    for position, gram in enumerate(_ngrams(words, _LOOP_WORDS)):
        gap = position - before.get(gram, -len(words))
        length = length + 1 if gap == period else 1
        period, before[gram] = gap, position
        if length >= (_LOOP_TIMES - 1) * period:
            longest = max(longest, period + length + _LOOP_WORDS - 1)
    return longest / len(words) if words else 0.0


def copied_share(query: str, document: str) -> float:
    """Share in [0, 1] of the query's word 8-grams that also stand in the document.

    A query of fewer than 8 words has no such n-gram and counts 0.
    """
    grams, source = (
        set(_ngrams(_WORD.findall(text.lower()), _COPY_WORDS)) for text in (query, document)
    )
    return len(grams & source) / len(grams) if grams else 0.0


def _ngrams(words: list[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
