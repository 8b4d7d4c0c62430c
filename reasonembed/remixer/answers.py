"""What the LLM stages share: prompts as package data, second tries, and the fate of each answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from reasonembed.llm.protocol import Completion, Engine, Request
from reasonembed.schemas import Status, row_seed, stable_hash
from reasonembed.tasks import RELATIONS

_WRAPPED = re.compile(
    r"""```(?:\w*\n)?((?:(?!```).)+)``` | "([^"]+)" | “([^“”]+)”""", re.DOTALL | re.VERBOSE
)
_ASKED_AGAIN = (Status.TRUNCATED, Status.INVALID, Status.FILTERED)


@cache
def prompt_template(name: str) -> Template:
    """The prompt of a stage: `filter`, `generate`, `generate-short`, `annotate` or `rewrite`."""
    text = files("reasonembed.remixer").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")
    return Template(text)


def prompt_fingerprint(name: str) -> str:
    """Hash of the prompt's text and of what relations put into it; part of a stage's identity."""
    template = prompt_template(name)
    filled_in = RELATIONS.values() if "relation" in template.get_identifiers() else ()
    return stable_hash(template.template, *filled_in)


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is usable, and why not."""

    status: Status
    detail: str | None = None


def verdict(completion: Completion) -> Verdict:
    """The verdict that follows from the engine alone, before the text is looked at."""
    if completion.finish_reason == "error":
        return Verdict(Status.ERROR, completion.error or "the engine gave no reason")
    if completion.finish_reason == "length":
        return Verdict(Status.TRUNCATED, f"cut off after {completion.completion_tokens} tokens")
    return Verdict(Status.OK)


def llm_fields(
    outcome: Verdict, completion: Completion, *, seed: int, model: str, tries: int = 1
) -> dict[str, Any]:
    """The columns that every LLM stage's rows carry (`schemas`)."""
    return {
        "status": str(outcome.status),
        "detail": outcome.detail,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "cached_tokens": completion.cached_tokens,
        "completion_tokens": completion.completion_tokens,
        "tries": tries,
        "seed": seed,
        "model": model,
    }


@dataclass(frozen=True)
class Answer:
    """What came of a row's question.

    Attributes:
        text: What is kept of the last answer; null unless it is usable.
        outcome: Whether it is usable, and why not.
        completion: The last completion, with the tokens of all tries.
        seed: Of the last try.
        tries: Answers asked for.
    """

    text: str | None
    outcome: Verdict
    completion: Completion
    seed: int
    tries: int

    def fields(self, *, model: str) -> dict[str, Any]:
        """The columns that every LLM stage's rows carry."""
        return llm_fields(
            self.outcome, self.completion, seed=self.seed, model=model, tries=self.tries
        )


Judge = Callable[[int, Completion], tuple[str, Verdict]]
"""Number of the request and its completion → the text proper, and whether it is usable."""


def ask(engine: Engine, requests: Sequence[Request], judge: Judge, *, tries: int) -> list[Answer]:
    """One answer a request, in order; those that cannot be used are asked for again.

    A further try has a seed of its own, `row_seed(request.seed, "again", n)` from n = 1. Engine
    errors are not tried again (the engine has done so), and neither is greedy decoding, which
    would say the same.

    Args:
        engine: Who is asked; each round of tries is one call.
        requests: One a row.
        judge: Looks at every completion, engine errors included.
        tries: Most answers that are asked for a row.
    """
    answers: dict[int, Answer] = {}
    todo = dict(enumerate(requests))
    for number in range(1, tries + 1):
        if not todo:
            break
        completions = engine.complete(list(todo.values()))
        for (i, request), completion in zip(todo.items(), completions, strict=True):
            text, outcome = judge(i, completion)
            total = _with_tokens_of(answers.get(i), completion)
            kept = text if outcome.status == Status.OK else None
            answers[i] = Answer(kept, outcome, total, request.seed, number)
        todo = {
            i: replace(requests[i], seed=row_seed(requests[i].seed, "again", number))
            for i in todo
            if answers[i].outcome.status in _ASKED_AGAIN and requests[i].sampling.temperature > 0
        }
    return [answers[i] for i in range(len(requests))]


def _with_tokens_of(earlier: Answer | None, completion: Completion) -> Completion:
    if earlier is None:
        return completion
    return replace(
        completion,
        prompt_tokens=completion.prompt_tokens + earlier.completion.prompt_tokens,
        cached_tokens=completion.cached_tokens + earlier.completion.cached_tokens,
        completion_tokens=completion.completion_tokens + earlier.completion.completion_tokens,
    )


def clean(text: str) -> str:
    """The answer proper: without hidden thinking, one pair of quotes or fences, and blanks.

    Thinking that never ends holds no answer. Quotes that do not pair up with each other (`"a" or
    "b"`) are part of the answer.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0].strip()
    wrapped = _WRAPPED.fullmatch(text)
    return wrapped[wrapped.lastindex or 0].strip() if wrapped else text


def cut_words(text: str, max_words: int) -> str:
    """The first `max_words` words with their spacing; the whole text where it is shorter."""
    if len(text.split()) <= max_words:
        return text
    rest = text.split(None, max_words)[max_words]
    return text[: len(text) - len(rest)].rstrip()


def last_sentence_end(text: str) -> str:
    """`text` up to its last full sentence; empty where there is none."""
    ends = [text.rfind(mark) for mark in (". ", "? ", "! ", ".\n", "?\n", "!\n")]
    if text.rstrip().endswith((".", "?", "!")):
        return text.rstrip()
    return text[: max(ends) + 1] if max(ends) >= 0 else ""
