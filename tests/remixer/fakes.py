"""A corpus from a dictionary, and an engine that answers as it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pyarrow as pa

from reasonembed.config import LLMConfig
from reasonembed.corpus import CorpusStore, text_hash
from reasonembed.llm.protocol import Completion, Request, failure
from reasonembed.schemas import CORPUS, from_rows

LLM = LLMConfig(model="fake", engine="scripted")


def corpus_table(texts: Mapping[str, str], *, task: str = "generic") -> pa.Table:
    rows = [
        {
            "doc_id": doc_id,
            "text": text,
            "title": "",
            "task": task,
            "parent_id": None,
            "text_hash": text_hash(text),
            "group_id": text_hash(text),
        }
        for doc_id, text in texts.items()
    ]
    return from_rows(rows, CORPUS, where="test corpus")


def corpus_store(texts: Mapping[str, str]) -> CorpusStore:
    return CorpusStore(corpus_table(texts))


class FakeEngine:
    """Answers each request by a function and keeps what it was asked."""

    def __init__(self, answer: Callable[[Request], Completion]) -> None:
        self._answer = answer
        self.requests: list[Request] = []

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        self.requests += requests
        return [self._answer(request) for request in requests]

    def close(self) -> None:
        """Nothing to free."""


def says(text: str, finish_reason: str = "stop") -> FakeEngine:
    return FakeEngine(lambda _: Completion(text, finish_reason, 10, len(text.split())))


def fails(reason: str = "boom") -> FakeEngine:
    return FakeEngine(lambda _: failure(reason))
