"""The reasoning-augmented query q′. Reads `queries`, writes `rewrites`.

Written from the query alone: a rewrite that saw the positives or the source would leak them, and
reasoning intensity would no longer tell where reasoning helps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from reasonembed.config import RewriteConfig
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
from reasonembed.schemas import REWRITES, Status, from_rows, row_seed
from reasonembed.tasks import Task

_WORDS_PER_TOKEN = 0.7  # English prose under byte-pair tokenizers, rounded down


class Rewriter:
    """Writes q′; one row in, one row out."""

    def __init__(self, config: RewriteConfig, *, engine: Engine, tasks: Mapping[str, Task]) -> None:
        self._config, self._engine, self._tasks = config, engine, tasks

    def __call__(self, queries: pa.Table) -> pa.Table:
        """Maps rows with `query_id`, `query`, `task` to rows of `schemas.REWRITES`."""
        rows = queries.to_pylist()
        answers = ask(
            self._engine,
            [self._request(row) for row in rows],
            lambda _, completion: self._judge(completion),
            tries=self._config.tries,
        )
        done = [self._row(row, answer) for row, answer in zip(rows, answers, strict=True)]
        return from_rows(done, REWRITES, where="rewrites")

    def _request(self, row: dict[str, Any]) -> Request:
        prompt = prompt_template("rewrite").substitute(
            document_kind=self._tasks[row["task"]].document_kind,
            max_words=int(self._config.sampling.max_tokens * _WORDS_PER_TOKEN),
            query=cut_words(row["query"], self._config.max_document_words),
        )
        seed = row_seed(self._config.seed, row["query_id"], "rewrite")
        return Request(
            f"{row['query_id']}|rewrite",
            prompt,
            self._config.sampling,
            seed,
            prefill=self._config.opening,
        )

    def _judge(self, completion: Completion) -> tuple[str, Verdict]:
        reasoning = clean(self._config.opening + completion.text) if completion.text else ""
        outcome = verdict(completion)
        if outcome.status == Status.TRUNCATED and last_sentence_end(reasoning):
            # Reasoning that stops at its budget is whole up to its last sentence.
            reasoning, outcome = last_sentence_end(reasoning), Verdict(Status.OK, outcome.detail)
        if outcome.status == Status.OK and not reasoning:
            outcome = Verdict(Status.INVALID, "the answer is empty")
        return reasoning, outcome

    def _row(self, row: dict[str, Any], answer: Answer) -> dict[str, Any]:
        text = answer.text
        if text is not None and self._config.keep_query:
            # The query first: encoders cut the end, so what a limit takes away is reasoning.
            text = f"{row['query']}\n{text}"
        return {
            "query_id": row["query_id"],
            "rewritten_query": text,
            **answer.fields(model=self._config.llm.model),
        }
