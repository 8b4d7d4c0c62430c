"""vLLM, in this process (starts fast) or through its asynchronous engine (batches overlap).

The only module that imports vLLM. Prompts are rendered by the model's own chat template and handed
over as token ids, so that special tokens are never added twice and lengths are known beforehand.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from reasonembed.config import EngineRuntime, LLMConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.llm.protocol import Completion, Engine, Request, failure
from reasonembed.models import resolve

_T = TypeVar("_T")
_CPU_BATCH_TOKENS = 4_096
_CPU_BLOCK_TOKENS = 32  # vLLM's 128 would leave most of a shared prefix uncached


@dataclass(frozen=True)
class _Prompt:
    """A request as tokens, or the reason why it cannot be asked."""

    token_ids: list[int]
    error: str | None = None


class _Renderer:
    """Chat template, tokenisation and sampling parameters of one model."""

    def __init__(self, path: str, config: LLMConfig) -> None:
        from transformers import AutoTokenizer

        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{config.model} has no chat template; choose an instruction-tuned model"
            )

    def prompt(self, request: Request) -> _Prompt:
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": request.prompt}],
            tokenize=False,
            add_generation_prompt=True,
            **self.config.chat_template_kwargs,
        )
        ids = self.tokenizer(rendered + request.prefill, add_special_tokens=False)["input_ids"]
        room = self.config.max_model_len - len(ids)
        if room < 1:
            return _Prompt(
                ids, f"the prompt has {len(ids)} tokens, the context {self.config.max_model_len}"
            )
        return _Prompt(ids)

    def parameters(self, request: Request, prompt: _Prompt) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if request.choices:
            ids = [self._choice_id(choice) for choice in request.choices]
            return SamplingParams(
                temperature=0.0,
                max_tokens=1,
                logprob_token_ids=ids,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=min(sampling.max_tokens, self.config.max_model_len - len(prompt.token_ids)),
            seed=request.seed,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def completion(self, request: Request, prompt: _Prompt, output: Any) -> Completion:
        answer = output.outputs[0]
        probabilities = {}
        if request.choices:
            logprobs = {
                choice: answer.logprobs[0][self._choice_id(choice)].logprob
                for choice in request.choices
            }
            top = max(logprobs.values())  # taken off, so that no sum of tiny numbers becomes 0
            mass = {choice: math.exp(value - top) for choice, value in logprobs.items()}
            total = math.fsum(mass.values())
            probabilities = {choice: value / total for choice, value in mass.items()}
        return Completion(
            text=answer.text,
            finish_reason=answer.finish_reason or "stop",
            prompt_tokens=len(prompt.token_ids),
            completion_tokens=len(answer.token_ids),
            choice_probabilities=probabilities,
            cached_tokens=output.num_cached_tokens or 0,
        )

    def _choice_id(self, choice: str) -> int:
        ids = self.tokenizer(choice, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ModelError(f"{choice!r} is {len(ids)} tokens of {self.config.model}, not one")
        return int(ids[0])


def make_vllm_engine(config: LLMConfig, runtime: EngineRuntime, *, cache_dir: str | None) -> Engine:
    """Starts vLLM; `auto` takes the process itself without a GPU and the async engine with one."""
    import torch

    path = str(resolve(config.model, cache_dir=cache_dir))
    on_gpu = torch.cuda.is_available()
    _environment(runtime, on_gpu=on_gpu)
    config = config.model_copy(update={"max_model_len": _context(config, runtime)})
    mode = runtime.mode if runtime.mode != "auto" else ("async" if on_gpu else "in_process")
    arguments: dict[str, Any] = {
        "model": path,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": runtime.max_num_seqs,
        "enforce_eager": runtime.enforce_eager or not on_gpu,
        "tensor_parallel_size": runtime.tensor_parallel_size,
        **_executor(runtime),
        "enable_prefix_caching": True,
    }
    if not on_gpu:
        # A seeded request whose prefill is split fails on CPU: its generator cannot step back.
        arguments["enable_chunked_prefill"] = False
        arguments["block_size"] = _CPU_BLOCK_TOKENS
        arguments["max_num_batched_tokens"] = max(_CPU_BATCH_TOKENS, config.max_model_len)
    else:
        arguments |= _gpu_memory(runtime)
    arguments |= _fewer_bits(runtime, on_gpu=on_gpu)
    engine = InProcessEngine if mode == "in_process" else AsyncEngine
    return engine(_Renderer(path, config), arguments)


def _context(config: LLMConfig, runtime: EngineRuntime) -> int:
    """Tokens that a request and its answer may have here."""
    return min(config.max_model_len, runtime.max_model_len or config.max_model_len)


def _gpu_memory(runtime: EngineRuntime) -> dict[str, Any]:
    """What vLLM may take; a size of the cache, where one is given, goes before the share."""
    arguments: dict[str, Any] = {"gpu_memory_utilization": runtime.gpu_memory_utilization}
    if runtime.kv_cache_gib:
        arguments["kv_cache_memory_bytes"] = runtime.kv_cache_gib << 30
    return arguments


def _executor(runtime: EngineRuntime) -> dict[str, str]:
    """Several GPUs of one node by processes: Ray's executor leaves placement groups behind."""
    return {"distributed_executor_backend": "mp"} if runtime.tensor_parallel_size > 1 else {}


def _fewer_bits(runtime: EngineRuntime, *, on_gpu: bool) -> dict[str, Any]:
    """Weights and cache in eight bits, as vLLM wants to be told."""
    chosen = {"quantization": runtime.quantization, "kv_cache_dtype": runtime.kv_cache_dtype}
    arguments = {name: value for name, value in chosen.items() if value == "fp8"}
    if arguments and not on_gpu:
        raise ConfigError(
            f"runtime.engine.{next(iter(arguments))}: fp8 is for GPUs, and this machine has none "
            "that torch sees; set it under by_accelerator for the kinds that have it"
        )
    return arguments


def _environment(runtime: EngineRuntime, *, on_gpu: bool) -> None:
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not on_gpu:  # unset, vLLM takes a fraction of the whole machine's memory
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(runtime.kv_cache_gib or 1)


class InProcessEngine:
    """vLLM's `LLM` without a child process: up in seconds, one batch at a time."""

    def __init__(self, renderer: _Renderer, arguments: dict[str, Any]) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._renderer = renderer
        self._llm: Any = LLM(**arguments)
        self._lock = threading.Lock()

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.complete`."""
        prompts = [self._renderer.prompt(request) for request in requests]
        runnable = [i for i, prompt in enumerate(prompts) if prompt.error is None]
        with self._lock:
            outputs = self._llm.generate(
                [{"prompt_token_ids": prompts[i].token_ids} for i in runnable],
                [self._renderer.parameters(requests[i], prompts[i]) for i in runnable],
                use_tqdm=False,
            )
        done = dict(zip(runnable, outputs, strict=True))
        return [
            self._renderer.completion(request, prompt, done[i])
            if prompt.error is None
            else failure(prompt.error)
            for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True))
        ]

    def close(self) -> None:
        """See `Engine.close`."""
        self._llm = None


class PoolingEngine:
    """vLLM as an encoder, in this process: token ids in, normalised last hidden states out.

    Whether that is what the model's contract says is for the caller to check.

    Args:
        model_dir: Checkpoint folder.
        dtype: Of the weights.
        max_tokens: Of the longest text.
        batch_tokens: Of a forward pass, where no text is longer.
        runtime: How vLLM is run.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        dtype: str,
        max_tokens: int,
        batch_tokens: int,
        runtime: EngineRuntime,
    ) -> None:
        import torch

        on_gpu = torch.cuda.is_available()
        _environment(runtime, on_gpu=on_gpu)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM
        from vllm.config import PoolerConfig

        arguments: dict[str, Any] = {
            "model": str(model_dir),
            "dtype": dtype,
            "max_model_len": max_tokens,
            "max_num_seqs": runtime.max_num_seqs,
            "max_num_batched_tokens": max(batch_tokens, max_tokens),
            "enforce_eager": runtime.enforce_eager or not on_gpu,
            "tensor_parallel_size": runtime.tensor_parallel_size,
            **_executor(runtime),
            # A shared instruction would be read from the cache, at other roundings than alone.
            "enable_prefix_caching": False,
            "runner": "pooling",
            "convert": "embed",
            # `use_activation` is vLLM's word for the L2 norm.
            "pooler_config": PoolerConfig(seq_pooling_type="LAST", use_activation=True),
        }
        if on_gpu:
            arguments |= _gpu_memory(runtime)
        self._llm: Any = LLM(**arguments)
        self._lock = threading.Lock()

    def embed(self, sequences: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Vectors in the given order, float32 [N, D]; one call at a time.

        Args:
            sequences: Token ids, none empty; nothing is added to them.
        """
        prompts = [{"prompt_token_ids": list(ids)} for ids in sequences]
        with self._lock:
            outputs = self._llm.embed(prompts, use_tqdm=False)
        return np.asarray([output.outputs.embedding for output in outputs], dtype=np.float32)

    def close(self) -> None:
        """Frees the engine."""
        self._llm = None


class AsyncEngine:
    """vLLM's `AsyncLLM` on a loop of its own: callers' batches share the running batch."""

    def __init__(self, renderer: _Renderer, arguments: dict[str, Any]) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self._renderer = renderer
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def start() -> Any:
            return AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))

        self._llm: Any = self._run(start())

    def complete(self, requests: Sequence[Request]) -> list[Completion]:
        """See `Engine.complete`."""
        return self._run(self._gather(requests))

    def close(self) -> None:
        """See `Engine.close`."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
            self._loop.call_soon_threadsafe(self._loop.stop)

    async def _gather(self, requests: Sequence[Request]) -> list[Completion]:
        return list(await asyncio.gather(*(self._one(request) for request in requests)))

    async def _one(self, request: Request) -> Completion:
        from vllm.v1.engine.exceptions import EngineDeadError

        prompt = self._renderer.prompt(request)
        if prompt.error is not None:
            return failure(prompt.error)
        parameters = self._renderer.parameters(request, prompt)
        stream = self._llm.generate(
            {"prompt_token_ids": prompt.token_ids},
            parameters,
            request_id=f"{request.request_id}-{id(request)}",
        )
        try:
            output = [part async for part in stream][-1]
        except EngineDeadError:
            # A dead engine answers nothing ever again; leaving the process makes the cluster
            # start a new actor and run the batch elsewhere.
            os._exit(1)
        except ValueError as error:  # vLLM's word for a request that it will not take
            return failure(str(error))
        return self._renderer.completion(request, prompt, output)

    def _run(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            self.close()
