"""Any OpenAI-compatible server as an engine, through the `openai` package.

`Request.choices` needs `logprobs`; `Request.prefill` needs a server that continues the last
message (vLLM and SGLang do, by the two extra fields below).

A request that fails is tried again by the client with growing pauses, or those that the server
asks for, and then becomes an error row. A server that has answered nothing for
`runtime.dead_after_s` is sent one short request more; one that cannot answer that ends the stage,
before all its rows have become error rows.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from reasonembed.config import EngineRuntime, LLMConfig, SamplingConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.llm.protocol import Completion, Request, failure

_MAX_TOP_LOGPROBS = 20  # of the OpenAI protocol
_MAX_RETRIES = 5
_ABOUT_THE_REQUEST = {400, 413, 422}  # of a server that lives: too long, or not understood
# Rows can be what a server chokes on, and must become rows; this it can answer if it can anything.
_LAST_REQUEST = Request("last", "Say yes.", SamplingConfig(temperature=0.0, max_tokens=1), seed=0)


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
            max_retries=_MAX_RETRIES,
        )
        self._hasty = self._client.with_options(max_retries=0)
        # A body that is no JSON, or no UTF-8, reaches the caller as a ValueError.
        self._errors: tuple[type[Exception], ...] = (openai.APIError, ValueError)
        self._pool = ThreadPoolExecutor(runtime.concurrency)
        self._silence, self._dead_after_s = _Silence(), runtime.dead_after_s

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.complete`.

        Raises:
            ModelError: The server has answered nothing for `runtime.dead_after_s`.
        """
        self._silence.asked()
        answers = [self._pool.submit(self._one, request, self._client) for request in requests]
        try:
            while wait(answers, timeout=self._left_s()).not_done:
                self._check_life()
            self._check_life()
        finally:
            for answer in answers:  # none is left, or nobody will read them
                answer.cancel()
        return [answer.result() for answer in answers]

    def close(self) -> None:
        """See `Engine.close`."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _left_s(self) -> float:
        return max(0.0, self._dead_after_s - self._silence.seconds())

    def _check_life(self) -> None:
        if self._left_s() > 0 or self._one(_LAST_REQUEST, self._hasty).finish_reason != "error":
            return
        if self._left_s() > 0:  # it refused that one request, or answered another one meanwhile
            return
        raise ModelError(
            f"{self._client.base_url} has answered nothing for {self._silence.seconds():.0f} s "
            f"(runtime.engine.dead_after_s: {self._dead_after_s:g}); the last error: "
            f"{self._silence.error}\nSee to the server and run again: what is done stays done; "
            "--retry error asks again for rows that failed before this."
        )

    def _one(self, request: Request, client: Any) -> Completion:
        try:
            answer = client.chat.completions.create(**self._arguments(request))
        except self._errors as error:
            said = f"{type(error).__name__}: {error}"
            if getattr(error, "status_code", None) in _ABOUT_THE_REQUEST:
                self._silence.broken()
            else:
                self._silence.goes_on(said)
            return failure(said)
        try:
            # Some servers answer 200 with an error object, or with text that is no JSON.
            completion = self._read(request, answer)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            said = f"{self._config.model}: the server sent no answer: {answer!r:.300}"
            self._silence.goes_on(said)
            return failure(said)
        self._silence.broken()
        return completion

    def _read(self, request: Request, answer: Any) -> Completion:
        choice = answer.choices[0]
        probabilities: dict[str, float] = {}
        if request.choices:
            probabilities = _choice_probabilities(choice.logprobs, request.choices)
            if not probabilities:
                return failure(
                    f"{self._config.model}: none of {list(request.choices)} is among the first "
                    f"{_MAX_TOP_LOGPROBS} tokens that the server gave log-probabilities for"
                )
        usage = answer.usage
        details = getattr(usage, "prompt_tokens_details", None)
        return Completion(
            # A model may stop inside a character that takes two escapes; half of one is no text.
            text=(choice.message.content or "").encode(errors="replace").decode(),
            finish_reason=str(choice.finish_reason or "stop"),
            prompt_tokens=int(usage.prompt_tokens or 0) if usage else 0,
            completion_tokens=int(usage.completion_tokens or 0) if usage else 0,
            choice_probabilities=probabilities,
            cached_tokens=int(details.cached_tokens or 0) if details else 0,
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


class _Silence:
    """How long a server that was asked has answered nothing, and its last error since then."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._since = time.monotonic()
        self.error: str | None = None

    def asked(self) -> None:
        """Requests begin; time in which nobody asked is no silence of a server that answered."""
        if self.error is None:
            self.broken()

    def goes_on(self, error: str) -> None:
        """The server has failed to answer."""
        with self._lock:
            self.error = error

    def broken(self) -> None:
        """The server has answered."""
        with self._lock:
            self._since, self.error = time.monotonic(), None

    def seconds(self) -> float:
        """Its length so far."""
        with self._lock:
            return time.monotonic() - self._since


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
