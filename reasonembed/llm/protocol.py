"""What every engine takes and gives.

One request a row, one completion a request, in order; a request that fails becomes a completion
with `finish_reason="error"`, so that no bad prompt can take its batch down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from reasonembed.artifacts import Mapper
from reasonembed.config import EngineRuntime, LLMConfig, SamplingConfig


@dataclass(frozen=True)
class Request:
    """One prompt.

    Attributes:
        request_id: The row's id; engines that log or script use it.
        prompt: The user message.
        sampling: How tokens are drawn.
        seed: The row's own seed.
        prefill: Text that the answer is made to begin with (the model continues it).
        choices: If given, one token is asked for, and the probabilities of these strings as the
            next token come back, normalised over the choices.
    """

    request_id: str
    prompt: str
    sampling: SamplingConfig
    seed: int
    prefill: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What came back for one request.

    Attributes:
        text: The answer without the prefill; empty on error.
        finish_reason: `stop`, `length`, `error`, or what the engine says.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
        choice_probabilities: Of `Request.choices`; sums to 1; empty if none were asked for.
        error: What failed, where `finish_reason` is `error`.
        cached_tokens: Of the tokens read, those found in the prefix cache; 0 where the engine does
            not say.
    """

    text: str
    finish_reason: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    choice_probabilities: dict[str, float] = field(default_factory=dict)
    error: str | None = None
    cached_tokens: int = 0


class Engine(Protocol):
    """A running model."""

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """Answers all requests, in order; may be called from several threads at once."""

    def close(self) -> None:
        """Frees the model; idempotent."""


def failure(error: str) -> Completion:
    """The completion of a request that could not be answered."""
    return Completion(text="", finish_reason="error", error=error)


def make_engine(config: LLMConfig, runtime: EngineRuntime, *, cache_dir: str | None) -> Engine:
    """Starts the engine that the configuration names; heavy imports happen here and not before."""
    if config.engine == "scripted":
        from reasonembed.llm.scripted import ScriptedEngine

        return ScriptedEngine(config, runtime)
    if config.engine == "openai":
        from reasonembed.llm.http import HTTPEngine

        return HTTPEngine(config, runtime)
    from reasonembed.llm.vllm import make_vllm_engine

    return make_vllm_engine(config, runtime, cache_dir=cache_dir)


@dataclass(frozen=True)
class WithEngine:
    """Builds an LLM stage where it runs: the engine first, then what uses it."""

    llm: LLMConfig
    runtime: EngineRuntime
    cache_dir: str | None
    make: Callable[[Engine], Mapper]

    @property
    def key(self) -> str:
        """Equal keys can share what `load` gives."""
        return repr((self.llm, self.runtime, self.cache_dir))

    def on_accelerator(self, kind: str | None) -> WithEngine:
        """The same for one kind of GPU; see `EngineRuntime.on_accelerator`."""
        return replace(self, runtime=self.runtime.on_accelerator(kind))

    def load(self) -> Engine:
        """Starts the engine."""
        return make_engine(self.llm, self.runtime, cache_dir=self.cache_dir)

    def mapper(self, loaded: Engine) -> Mapper:
        """The stage over a started engine."""
        return self.make(loaded)

    def __call__(self) -> Mapper:
        """Both; called once in each actor."""
        return self.mapper(self.load())
