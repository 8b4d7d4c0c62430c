"""Supervised fine-tuning of a chat model on the tokens of its answers.

Reads prompts with the answers that are to be learnt and a checkpoint; writes a checkpoint of the
same kind. Knows torch.distributed, not who started the workers, as `loop` does.

Scale: the loss of a step is the mean over ALL answer tokens of the global batch, and gradients are
summed over workers, so any number of workers gives the one gradient; a mean of the workers' means
would weigh the tokens of short answers more.

Shape legend: N texts, T padded tokens, K last tokens that hold every answer, V vocabulary.
"""

from __future__ import annotations

import math
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reasonembed.config import DistillConfig, TrainRuntime, fingerprint, flatten
from reasonembed.embedder.contract import load_tokenizer
from reasonembed.embedder.encode import budget_batches
from reasonembed.errors import ConfigError, ModelError
from reasonembed.models import quiet_transformers, weights_fingerprint
from reasonembed.redapter.checkpoints import Checkpoints, load_learnt
from reasonembed.redapter.sharding import Placed, place, weights_dtype
from reasonembed.redapter.step import Reduction, SumAtEnd
from reasonembed.redapter.stepping import (
    IsLeaving,
    Metrics,
    Report,
    never,
    set_rate,
    take_steps,
    update,
)
from reasonembed.schemas import row_seed, stable_hash

_MAX_GRAD_NORM = 1.0
_NO_TARGET = -100
_DECIDES = {"lora", "epochs", "learning_rate", "warmup_share", "batch_tokens", "dtype", "seed"}


@dataclass(frozen=True)
class Example:
    """A conversation as tokens.

    Attributes:
        ids: The rendered prompt, the answer, and the end token.
        num_answer: How many of the last are the answer and its end: these carry the loss.
    """

    ids: tuple[int, ...]
    num_answer: int


class ChatTokenizer:
    """Conversations to tokens, as an engine that serves the model reads and writes them.

    The prompt is rendered by the chat template and tokenised alone, then the answer, so that the
    border between them lies where it lies in generation. The end token is learnt, too.

    Args:
        weights: Checkpoint folder.
        template_arguments: For the chat template (`LLMConfig.chat_template_kwargs`).

    Raises:
        ModelError: The tokenizer has no chat template or no end-of-sequence token.
    """

    def __init__(
        self, weights: Path, *, template_arguments: Mapping[str, bool | int | str] | None = None
    ) -> None:
        self._tokenizer = load_tokenizer(weights)
        self._arguments = template_arguments or {}
        if not self._tokenizer.chat_template or self._tokenizer.eos_token_id is None:
            raise ModelError(
                f"{weights} has no chat template or no end token; choose an instruction-tuned model"
            )

    def example(self, prompt: str, *, answer: str) -> Example:
        """One user message and the answer to it."""
        rendered = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            **self._arguments,
        )
        read, written = (
            self._tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (rendered, answer)
        )
        return Example((*read, *written, self._tokenizer.eos_token_id), len(written) + 1)


class StepPlan:
    """The batches of all epochs: a pure function of (lengths, seed).

    Each epoch shuffles the examples and fills one step after the other until one more example
    would make examples × longest pass `batch_tokens`.

    Args:
        examples: In a fixed order.
        config: `batch_tokens`, `epochs`, `seed`.

    Raises:
        ConfigError: There is no example.
    """

    def __init__(self, examples: Sequence[Example], config: DistillConfig) -> None:
        if not examples:
            raise ConfigError(
                "no trajectory is left to learn from; lower distill.min_agreement, raise "
                "distill.max_tokens, or choose another teacher"
            )
        self._examples = examples
        self._steps: list[list[int]] = []
        for epoch in range(config.epochs):
            order = list(range(len(examples)))
            random.Random(row_seed(config.seed, "sft epoch", epoch)).shuffle(order)
            self._fill(order, limit=config.batch_tokens)

    def _fill(self, order: list[int], *, limit: int) -> None:
        batch: list[int] = []
        longest = 0
        for index in order:
            longest = max(longest, len(self._examples[index].ids))
            if batch and (len(batch) + 1) * longest > limit:
                self._steps.append(batch)
                batch, longest = [], len(self._examples[index].ids)
            batch.append(index)
        self._steps.append(batch)

    @property
    def total_steps(self) -> int:
        """Of all epochs."""
        return len(self._steps)

    @property
    def fingerprint(self) -> str:
        """Hash of the examples and their order."""
        return stable_hash(*(repr(example) for example in self._examples), size=16)

    def batch(self, step: int) -> list[Example]:
        """The global batch of a step, longest first, so that every worker gets like lengths."""
        chosen = [self._examples[index] for index in self._steps[step]]
        return sorted(chosen, key=lambda example: (-len(example.ids), example.ids))


# ---- one step ---------------------------------------------------------------------------------


def answer_loss(model: Any, batch: Sequence[Example]) -> Tensor:
    """Sum of -log p(token | all before it) over the answers' tokens; differentiable.

    Padding is on the left: the answers then end in the same column, and logits, the largest tensor
    of all, are computed for the last K positions alone.

    Args:
        model: A causal language model of transformers, or one wrapped by peft.
        batch: At least one example.

    Returns:
        float32 scalar, in nats.
    """
    device = next(model.parameters()).device
    width, kept = max(len(e.ids) for e in batch), max(e.num_answer for e in batch)
    ids_NT = torch.tensor([[*[0] * (width - len(e.ids)), *e.ids] for e in batch], device=device)
    lengths_N = torch.tensor([len(e.ids) for e in batch], device=device)
    answers_N = torch.tensor([e.num_answer for e in batch], device=device)
    columns_T = torch.arange(width, device=device)
    mask_NT = columns_T[None] >= width - lengths_N[:, None]
    logits_NKV = model(
        input_ids=ids_NT,
        attention_mask=mask_NT.long(),
        position_ids=(mask_NT.cumsum(dim=1) - 1).clamp(min=0),
        logits_to_keep=kept + 1,
        use_cache=False,
    ).logits
    is_answer_NT = columns_T[None] >= width - answers_N[:, None]
    target_NT = ids_NT.masked_fill(~is_answer_NT, _NO_TARGET)
    return torch.nn.functional.cross_entropy(
        logits_NKV[:, :-1].float().flatten(0, 1),
        target_NT[:, -kept:].flatten(),
        ignore_index=_NO_TARGET,
        reduction="sum",
    )


def sft_step(
    loss: Callable[[Sequence[Example]], Tensor],
    batch: Sequence[Example],
    *,
    parameters: Sequence[torch.nn.Parameter],
    chunk_tokens: int,
    seed: int,
    reduction: Reduction | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Tensor:
    """Adds the gradient of the global batch's mean token loss to `parameters` on every worker.

    Args:
        loss: Summed loss of some examples (`answer_loss`).
        batch: Of all workers; each takes its share, which may be empty.
        parameters: What is trained.
        chunk_tokens: Padded tokens a forward.
        seed: Of this step and worker; dropout is drawn from it.
        reduction: How gradients are summed; default `SumAtEnd`.
        rank: Of this worker.
        world_size: Number of workers.

    Returns:
        The mean loss a token of the global batch; detached float32 scalar.
    """
    reduction = reduction or SumAtEnd()
    num_tokens = sum(example.num_answer for example in batch)
    shares = [
        _chunks(batch[one::world_size], chunk_tokens=chunk_tokens) for one in range(world_size)
    ]
    chunks = shares[rank]
    if reduction.needs_equal_passes:
        chunks += [[] for _ in range(max(map(len, shares)) - len(chunks))]
    total = torch.zeros((), device=parameters[0].device)
    for number, chunk in enumerate(chunks):
        torch.manual_seed(row_seed(seed, number))
        # Who has no example left passes the shortest one for nothing.
        part = loss(chunk) / num_tokens if chunk else 0 * loss(batch[-1:])
        reduction.before_backward(is_last=number == len(chunks) - 1)
        part.backward()  # type: ignore[no-untyped-call]
        total += part.detach()
    reduction.finish(parameters)
    if world_size > 1:
        dist.all_reduce(total)
    return total


def _chunks(batch: Sequence[Example], *, chunk_tokens: int) -> list[list[Example]]:
    lengths = [len(example.ids) for example in batch]
    return [[batch[i] for i in rows] for rows in budget_batches(lengths, batch_tokens=chunk_tokens)]


# ---- the loop ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SFTResult:
    """How a run ended.

    Attributes:
        steps: Steps that the weights have seen, those before a resume included.
        metrics: Of the last step; empty if a finished run was resumed.
    """

    steps: int
    metrics: Metrics


@dataclass(frozen=True)
class _State:
    placed: Placed
    optimizer: torch.optim.Optimizer


def learning_rate_at(step: int, *, total_steps: int, config: DistillConfig) -> float:
    """Linear warm-up, then half a cosine towards zero; a function of the step (from 0) alone."""
    warmup = math.ceil(total_steps * config.warmup_share)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def fine_tune(
    config: DistillConfig,
    examples: Sequence[Example],
    *,
    weights: Path,
    runtime: TrainRuntime,
    output_dir: Path,
    report: Report,
    resume_from: Path | None = None,
    is_leaving: IsLeaving = never,
    rank: int = 0,
    world_size: int = 1,
    is_shared: bool = True,
) -> SFTResult:
    """Trains adapters or, without `lora`, all weights; with workers in an initialised group.

    A resumed run continues where the interrupted one would have been (same machine, same number of
    workers and chunk size): batches, rates and dropout are functions of the step. On CPUs it does
    so bit for bit, on GPUs up to the order in which their kernels sum.

    Args:
        config: What decides the result.
        examples: All of them, on every worker, in the same order.
        weights: Checkpoint of the student.
        runtime: Device, sharding, chunk size, checkpoint interval.
        output_dir: Seen by all workers, unless it is not shared; receives `checkpoint-<step>`
            folders.
        report: Called once a step on every rank with that step's metrics, and with the checkpoint
            if one was begun, else None.
        resume_from: A checkpoint folder, of any number of workers.
        is_leaving: Whether a machine is about to go; see `take_steps`.
        rank: Of this worker.
        world_size: Number of workers.
        is_shared: Whether `output_dir` is the same folder for all workers; see `Checkpoints`.

    Raises:
        ConfigError: There is nothing to learn.
        ModelError: The student cannot be loaded or adapted, or a loss is not finite.
        DriftError: The checkpoint is of other settings or examples.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    plan = StepPlan(examples, config)
    state = _prepare(config, weights, runtime)
    checkpoints = Checkpoints(
        output_dir,
        state.placed,
        state.optimizer,
        identity=_identity(config, plan, weights),
        is_shared=is_shared,
    )
    start = checkpoints.load(resume_from, learnt_from="answers") if resume_from else 0
    total = plan.total_steps
    metrics = take_steps(
        partial(_one_step, config, plan, state, runtime=runtime, rank=rank, world_size=world_size),
        checkpoints,
        start=start,
        total=total,
        runtime=runtime,
        report=report,
        is_leaving=is_leaving,
    )
    return SFTResult(total, metrics)


def _prepare(config: DistillConfig, weights: Path, runtime: TrainRuntime) -> _State:
    model = _load(weights, dtype=weights_dtype(config.lora, dtype=config.dtype))
    torch.manual_seed(row_seed(config.seed, "student"))
    placed = place(
        model,
        lora=config.lora,
        task_type="CAUSAL_LM",
        name=config.student,
        dtype=config.dtype,
        runtime=runtime,
    )
    optimizer = torch.optim.AdamW(placed.parameters, lr=config.learning_rate, weight_decay=0.0)
    return _State(placed, optimizer)


def _load(weights: Path, *, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            return AutoModelForCausalLM.from_pretrained(weights, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ModelError(f"{weights} cannot be loaded: {error}") from error


def _one_step(
    config: DistillConfig,
    plan: StepPlan,
    state: _State,
    step: int,
    *,
    runtime: TrainRuntime,
    rank: int,
    world_size: int,
) -> Metrics:
    began = time.perf_counter()
    batch = plan.batch(step)
    rate = learning_rate_at(step, total_steps=plan.total_steps, config=config)
    set_rate(state.optimizer, rate)

    def loss_of(examples: Sequence[Example]) -> Tensor:
        with state.placed.precision():
            return answer_loss(state.placed.model, examples)

    loss = sft_step(
        loss_of,
        batch,
        parameters=state.placed.parameters,
        chunk_tokens=runtime.chunk_tokens,
        seed=row_seed(config.seed, "dropout", step, rank),
        reduction=state.placed.reduction,
        rank=rank,
        world_size=world_size,
    )
    norm = update(
        state.optimizer,
        state.placed.parameters,
        loss,
        max_grad_norm=_MAX_GRAD_NORM,
        step=step,
        cure="lower distill.learning_rate or use distill.dtype float32",
    )
    seconds = time.perf_counter() - began
    return {
        "step": float(step),
        "loss": float(loss),
        "learning_rate": rate,
        "grad_norm": norm,
        "answer_tokens": float(sum(example.num_answer for example in batch)),
        "step_s": seconds,
        "tokens_per_s": sum(len(example.ids) for example in batch) / seconds,
    }


def _identity(config: DistillConfig, plan: StepPlan, weights: Path) -> str:
    identity = flatten(config.model_dump(mode="json", include=_DECIDES)) | {
        "total_steps": plan.total_steps,
        "examples": plan.fingerprint,
        "weights": weights_fingerprint(weights),
    }
    return fingerprint(identity)


# ---- the result -------------------------------------------------------------------------------


def save_student(
    config: DistillConfig, checkpoint: Path, *, weights: Path, output_dir: Path
) -> None:
    """Writes an ordinary checkpoint: merged weights, tokenizer, chat template.

    Merged in float32, whatever the student was trained in, for 16 bits would round small updates
    away; then cast to `config.dtype`.

    Args:
        config: What the student was trained under.
        checkpoint: Of `fine_tune`.
        weights: Checkpoint that the training began with.
        output_dir: Made anew; replaced if it exists.

    Raises:
        ModelError: Weights or checkpoint cannot be loaded.
    """
    placed = _prepare(
        config.model_copy(update={"dtype": "float32"}), weights, TrainRuntime()
    ).placed
    load_learnt(checkpoint, placed)
    merged = placed.model if config.lora is None else placed.model.merge_and_unload()
    scratch = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    with quiet_transformers():
        merged.to(getattr(torch, config.dtype)).save_pretrained(scratch)
        load_tokenizer(weights).save_pretrained(scratch)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    scratch.rename(output_dir)
