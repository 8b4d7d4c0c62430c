"""Any OpenAI-compatible server as an engine, through the `openai` package.

`Request.choices` needs `logprobs`; `Request.prefill` needs a server that continues the last
message (vLLM and SGLang do, by the two extra fields below).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reasonembed.config import EngineRuntime, LLMConfig
from reasonembed.errors import ConfigError
from reasonembed.llm.protocol import Completion, Request, failure

_MAX_TOP_LOGPROBS = 20  # of the OpenAI protocol


class HTTPEngine:
    """Chat completions over HTTP, `runtime.concurrency` at a time; retries are the client's."""

    def __init__(self, config: LLMConfig, runtime: EngineRuntime) -> None:
        import openai

        key = os.environ.get(runtime.api_key_env)
        if key is None and runtime.base_url is None:
            raise ConfigError(
                f"engine openai: set {runtime.api_key_env}, or runtime.engine.base_url to a server"
            )
        self._config = config
        self._client = openai.OpenAI(
            api_key=key or "none",
            base_url=runtime.base_url,
            timeout=runtime.timeout_s,
            max_retries=5,
        )
        self._errors: tuple[type[Exception], ...] = (openai.APIError, json.JSONDecodeError)
        self._pool = ThreadPoolExecutor(runtime.concurrency)

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.complete`."""
        return list(self._pool.map(self._one, requests))

    def close(self) -> None:
        """See `Engine.close`."""
        self._pool.shutdown(wait=False)
        self._client.close()

    def _one(self, request: Request) -> Completion:
        try:
            answer = self._client.chat.completions.create(**self._arguments(request))
        except self._errors as error:
            return failure(f"{type(error).__name__}: {error}")
        # Some servers answer 200 with an error object, or with text that is no JSON.
        choices = getattr(answer, "choices", None)
        if not choices or choices[0].message is None:
            return failure(f"{self._config.model}: the server sent no answer: {answer!r:.300}")
        choice = choices[0]
        probabilities: dict[str, float] = {}
        if request.choices:
            probabilities = _choice_probabilities(choice.logprobs, request.choices)
            if not probabilities:
                return failure(
                    f"{self._config.model}: none of {list(request.choices)} is among the first "
                    f"{_MAX_TOP_LOGPROBS} tokens that the server gave log-probabilities for"
                )
        return Completion(
            # A model may stop inside a character that takes two escapes; half of one is no text.
            text=(choice.message.content or "").encode(errors="replace").decode(),
            finish_reason=choice.finish_reason or "stop",
            prompt_tokens=answer.usage.prompt_tokens if answer.usage else 0,
            completion_tokens=answer.usage.completion_tokens if answer.usage else 0,
            choice_probabilities=probabilities,
        )

    def _arguments(self, request: Request) -> dict[str, Any]:
        messages = [{"role": "user", "content": request.prompt}]
        extra: dict[str, Any] = {}
        if request.prefill:
            messages.append({"role": "assistant", "content": request.prefill})
            extra = {"continue_final_message": True, "add_generation_prompt": False}
        if self._config.chat_template_kwargs:
            extra["chat_template_kwargs"] = self._config.chat_template_kwargs
        arguments: dict[str, Any] = {
            "model": self._config.model,
            "messages": messages,
            "seed": request.seed,
        }
        if request.choices:
            arguments |= {
                "max_tokens": 1,
                "temperature": 0.0,
                "logprobs": True,
                "top_logprobs": _MAX_TOP_LOGPROBS,
            }
        else:
            sampling = request.sampling
            arguments |= {
                "max_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
            }
            if sampling.top_k > 0:
                extra["top_k"] = sampling.top_k
            if sampling.repetition_penalty != 1.0:
                extra["repetition_penalty"] = sampling.repetition_penalty
        return arguments | ({"extra_body": extra} if extra else {})


def _choice_probabilities(logprobs: Any, choices: tuple[str, ...]) -> dict[str, float]:
    """Probabilities over `choices`; one outside the server's top list counts 0."""
    if logprobs is None or not logprobs.content:
        return {}
    mass = dict.fromkeys(choices, 0.0)
    for entry in logprobs.content[0].top_logprobs:
        if (token := entry.token.strip()) in mass:  # "3" and " 3" are two tokens of one grade
            mass[token] += math.exp(entry.logprob)
    total = math.fsum(mass.values())
    return {choice: value / total for choice, value in mass.items()} if total > 0 else {}
