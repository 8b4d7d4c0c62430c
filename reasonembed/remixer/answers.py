"""What all three LLM stages share: prompts as package data, and the fate of each answer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template
from typing import Any

from reasonembed.llm.protocol import Completion
from reasonembed.schemas import Status, stable_hash

_WRAPPED = re.compile(
    r"""```(?:\w*\n)?((?:(?!```).)+)``` | "([^"]+)" | “([^“”]+)”""", re.DOTALL | re.VERBOSE
)


@cache
def prompt_template(name: str) -> Template:
    """The prompt of a stage: `generate`, `annotate` or `rewrite`."""
    text = files("reasonembed.remixer").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")
    return Template(text)


def prompt_fingerprint(name: str) -> str:
    """Hash of the prompt's text; part of its stage's identity."""
    return stable_hash(prompt_template(name).template)


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
        "completion_tokens": completion.completion_tokens,
        "tries": tries,
        "seed": seed,
        "model": model,
    }


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
