"""A scripted engine: text that follows from the request alone, for tests and rehearsals.

It loads nothing and is instant, so that a whole run can be rehearsed, killed and resumed. The
answer depends on the request's words and seed only; a prompt that holds one of the marks below
makes it fail in that way.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from reasonembed.config import EngineRuntime, LLMConfig
from reasonembed.llm.protocol import Completion, Request, failure
from reasonembed.schemas import stable_hash

FAIL_ERROR = "SCRIPT-ERROR"
FAIL_TRUNCATED = "SCRIPT-TRUNCATED"
FAIL_INVALID = "SCRIPT-INVALID"

_WORD = re.compile(r"[A-Za-z]{5,}")


class ScriptedEngine:
    """Deterministic completions; each request is noted in `runtime.log_path`, if given.

    The model name may carry a delay for each batch: `scripted` or `scripted:0.05` (seconds).
    """

    def __init__(self, config: LLMConfig, runtime: EngineRuntime) -> None:
        self._delay_s = float(config.model.partition(":")[2] or 0)
        self._log = Path(runtime.log_path) if runtime.log_path else None

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.complete`."""
        if self._log:
            self._note(requests)  # first: what is asked is paid for, whether it is answered or not
        time.sleep(self._delay_s)
        return [self._one(request) for request in requests]

    def close(self) -> None:
        """See `Engine.close`."""

    def _one(self, request: Request) -> Completion:
        if FAIL_ERROR in request.prompt:
            return failure("scripted failure")
        digest = int(stable_hash(request.prompt, request.seed), 16)
        tokens = len(request.prompt.split())
        if request.choices:
            weights = [1 + (digest >> (8 * i)) % 97 for i in range(len(request.choices))]
            total = sum(weights)
            probabilities = {
                choice: weight / total
                for choice, weight in zip(request.choices, weights, strict=True)
            }
            best = max(probabilities, key=lambda choice: probabilities[choice])
            return Completion(best, "length", tokens, 1, probabilities)
        text = _write(request.prompt, digest)
        if FAIL_INVALID in request.prompt:
            text = "   "
        finish = "length" if FAIL_TRUNCATED in request.prompt else "stop"
        return Completion(text, finish, tokens, len(text.split()))

    def _note(self, requests: Sequence[Request]) -> None:
        assert self._log is not None
        lines = "".join(
            json.dumps({"id": request.request_id, "at_ns": time.time_ns()}) + "\n"
            for request in requests
        )
        handle = os.open(self._log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            os.write(handle, lines.encode())  # one append is atomic among actors
        finally:
            os.close(handle)


def _write(prompt: str, digest: int) -> str:
    """Words of the prompt's last part in an order that the digest decides, and a score."""
    words = _WORD.findall(prompt)[-60:] or ["nothing"]
    chosen = [words[(digest * (i + 7) + i * i) % len(words)] for i in range(24)]
    return f"Why does {' '.join(chosen)}? <score>{1 + digest % 5}</score>"
