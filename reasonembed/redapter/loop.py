"""The training loop: adapters or all weights of a backbone under RI-InfoNCE.

Reads the `samples` artifact and a checkpoint; writes what was learnt. Knows torch.distributed, not
who started the workers: placement, restarts and storage are the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from reasonembed.config import TrainConfig, TrainRuntime, fingerprint, flatten
from reasonembed.embedder.contract import TokenisationContract, resolve_contract
from reasonembed.embedder.encode import budget_batches, load_backbone
from reasonembed.embedder.packing import use_packing
from reasonembed.embedder.pooling import forward
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, TokenIds
from reasonembed.errors import ConfigError
from reasonembed.redapter.batches import BatchPlan, Group, Sample, rank_slice
from reasonembed.redapter.best import Best
from reasonembed.redapter.checkpoints import Checkpoints, write_weights
from reasonembed.redapter.devices import peak_flops
from reasonembed.redapter.flops import Work
from reasonembed.redapter.loss import LossOutput
from reasonembed.redapter.objective import (
    batch_loss,
    check_dimensions,
    has_rewrites,
    intensity_cap,
    step_metrics,
)
from reasonembed.redapter.progress import Progress
from reasonembed.redapter.sharding import Placed, place, weights_dtype
from reasonembed.redapter.step import LocalBatch, contrastive_step
from reasonembed.redapter.stepping import (
    IsLeaving,
    Metrics,
    Report,
    clip,
    never,
    set_rate,
    take_steps,
)
from reasonembed.redapter.validate import HeldOut, Validation, Validator
from reasonembed.redapter.workers import all_true
from reasonembed.schemas import row_seed, stable_hash

if TYPE_CHECKING:
    from reasonembed.redapter.log import Observe


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: Steps that the weights have seen, those before a resume included.
        weights_dir: What was learnt: a folder of peft, or of transformers if all weights were
            trained; written by rank 0.
        contract: What it was trained under.
        metrics: Of the last step; empty if a finished run was resumed.
    """

    steps: int
    weights_dir: Path
    contract: TokenisationContract
    metrics: Metrics


@dataclass(frozen=True)
class _State:
    placed: Placed
    optimizer: torch.optim.Optimizer
    tokenizer: ContractTokenizer
    contract: TokenisationContract
    progress: Progress
    work: Work
    is_packed: bool

    def encode(self, batch: Sequence[TokenIds]) -> torch.Tensor:
        """Vectors of token ids, with dropout where the model has it."""
        with self.placed.precision():
            return forward(self.placed.model, self.contract, batch, packed=self.is_packed)


def learning_rate_at(step: int, *, total_steps: int, config: TrainConfig) -> float:
    """Linear warm-up, then linear decay; a function of the step (from 0) alone.

    Differs from the released code by one step: its first step has rate 0 and changes nothing.
    """
    warmup = math.ceil(total_steps * config.warmup_share)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * (total_steps - step) / max(1, total_steps - warmup)


def train(
    config: TrainConfig,
    samples: Sequence[Sample],
    *,
    weights: Path,
    runtime: TrainRuntime,
    output_dir: Path,
    report: Report,
    held_out: Sequence[HeldOut] = (),
    observe: Observe | None = None,
    resume_from: Path | None = None,
    is_leaving: IsLeaving = never,
    rank: int = 0,
    world_size: int = 1,
    is_shared: bool = True,
) -> TrainResult:
    """Fine-tunes adapters or, without `lora`, all weights; with workers in an initialised group.

    A resumed run continues bit for bit where the interrupted one would have been (same machine,
    same number of workers and chunk size): batches, rates and dropout are functions of the step.
    On another number of workers the batches and rates are the same, and what differs is the order
    of sums and which dropout is drawn.

    Args:
        config: What decides the result.
        samples: All of them, on every worker.
        weights: Checkpoint of the backbone.
        runtime: Device, sharding, chunk size, checkpoint interval.
        output_dir: Seen by all workers, unless it is not shared; receives `checkpoint-<step>`
            folders and `weights`.
        report: Called once a step on every rank with that step's metrics, and with the checkpoint
            if one was begun, else None.
        held_out: What is measured every `validate_every` steps, on every worker alike; see
            `validate.read_held_out`.
        observe: Called once a step with its number, its global batch and what it gave.
        resume_from: A checkpoint folder, of any number of workers.
        is_leaving: Whether a machine is about to go; see `take_steps`.
        rank: Of this worker.
        world_size: Number of workers.
        is_shared: Whether `output_dir` is the same folder for all workers; see `Checkpoints`.

    Raises:
        ConfigError: Samples or workers do not fit the batch, or the runtime asks for what is not
            there.
        ModelError: The backbone cannot be loaded or has no projections to adapt, or a loss is not
            finite.
        DriftError: The checkpoint is of another configuration, other samples or another number of
            steps.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    plan = BatchPlan(samples, config, num_workers=world_size)
    state = _prepare(config, weights, runtime)
    checkpoints = Checkpoints(
        output_dir,
        state.placed,
        state.optimizer,
        identity=_identity(config, plan, state.contract),
        memory=state.progress,
        is_shared=is_shared,
    )
    start = checkpoints.load(resume_from, learnt_from="samples") if resume_from else 0
    learnt = output_dir / "weights"
    write = partial(write_weights, state.placed, weights=weights, dtype=state.contract.dtype)
    best = None
    if config.keep == "best":
        best = Best(output_dir, write, is_fresh=start == 0, rank=rank)
    one_step = partial(
        _one_step,
        config,
        plan,
        state,
        runtime=runtime,
        observe=observe,
        rank=rank,
        world_size=world_size,
    )
    measure = partial(_measure, state, runtime=runtime, rank=rank, world_size=world_size)
    metrics = take_steps(
        _validated(one_step, config, plan, held_out, state, measure=measure, best=best),
        checkpoints,
        start=start,
        total=plan.total_steps,
        runtime=runtime,
        report=report,
        is_leaving=is_leaving,
    )
    if best is None:
        write(learnt)
    else:
        best.place(learnt)
    return TrainResult(plan.total_steps, learnt, state.contract, metrics)


def _prepare(config: TrainConfig, weights: Path, runtime: TrainRuntime) -> _State:
    contract = replace(
        resolve_contract(weights, config.encoder),
        matryoshka_dimensions=config.matryoshka_dimensions,
    )
    if not contract.pool_template:
        raise ConfigError(
            "train.encoder.pool_template false is for encoding with finished models; training "
            "pools every token"
        )
    check_dimensions(config, dimension=contract.dimension)
    dtype = weights_dtype(config.lora, dtype=contract.dtype)
    backbone = load_backbone(
        weights, dtype=dtype, layers=contract.layers, attention=contract.attention
    )
    torch.manual_seed(row_seed(config.seed, "adapter"))
    placed = place(
        backbone.model,
        lora=config.lora,
        task_type="FEATURE_EXTRACTION",
        name=config.encoder.model,
        dtype=contract.dtype,
        runtime=runtime,
    )
    optimizer = torch.optim.AdamW(placed.parameters, lr=config.learning_rate, weight_decay=0.0)
    tokenizer = ContractTokenizer(backbone.tokenizer, contract)
    work = Work.of(placed.model, trains_all=config.lora is None)
    is_packed = use_packing(placed.model, runtime.packing, dtype=getattr(torch, contract.dtype))
    return _State(placed, optimizer, tokenizer, contract, Progress(), work, is_packed)


def _validated(
    one_step: Callable[[int], Metrics],
    config: TrainConfig,
    plan: BatchPlan,
    held_out: Sequence[HeldOut],
    state: _State,
    *,
    measure: Callable[[Validator], Metrics],
    best: Best | None,
) -> Callable[[int], Metrics]:
    if config.validate_every is None:
        return one_step
    validator = Validator(held_out, config, shape=plan.shape, tokenizer=state.tokenizer)
    validation = Validation(
        config, total=plan.total_steps, measure=partial(measure, validator), best=best
    )
    return validation.around(one_step)


def _measure(
    state: _State, validator: Validator, *, runtime: TrainRuntime, rank: int, world_size: int
) -> Metrics:
    state.placed.model.eval()
    try:
        return validator.measure(
            state.encode,
            batch_tokens=runtime.chunk_tokens,
            is_packed=state.is_packed,
            rank=rank,
            world_size=world_size,
        )
    finally:
        state.placed.model.train()


def _one_step(
    config: TrainConfig,
    plan: BatchPlan,
    state: _State,
    step: int,
    *,
    runtime: TrainRuntime,
    rank: int,
    world_size: int,
    observe: Observe | None = None,
) -> Metrics:
    began = time.perf_counter()
    groups = plan.batch(step)
    local = _tokenise(
        rank_slice(groups, rank=rank, world_size=world_size),
        state.tokenizer,
        limit=state.contract.max_query_tokens,
        with_rewritten=has_rewrites(groups),
    )
    rate = learning_rate_at(step, total_steps=plan.total_steps, config=config)
    set_rate(state.optimizer, rate)
    cap = intensity_cap(config, state.progress)
    output = contrastive_step(
        state.encode,
        local,
        num_queries=len(groups),
        global_loss=batch_loss(config, groups, step=step, cap=cap),
        parameters=state.placed.parameters,
        cut=partial(budget_batches, batch_tokens=runtime.chunk_tokens, packed=state.is_packed),
        seed=row_seed(config.seed, "dropout", step, rank),
        reduction=state.placed.reduction,
        gradient_scale=config.gradient_scale,
    )
    norm, is_taken = _move(config, state, step, groups, output.loss)
    seconds = time.perf_counter() - began
    if observe is not None:
        observe(step, groups, output.loss)
    share = _peak_share(state, local, seconds)
    return (
        step_metrics(output.loss, cap=cap)
        | ({"intensity_cap": cap} if math.isfinite(cap) else {})
        | share
        | {
            "step": float(step),
            "batch": batch_number(groups),
            "learning_rate": rate,
            "grad_norm": norm,
            "is_skipped": float(not is_taken),
            "queries_at_limit": float(output.num_at_limit),
            "step_s": seconds,
            "tokens_per_s": output.num_tokens / seconds,
        }
    )


def _move(
    config: TrainConfig, state: _State, step: int, groups: Sequence[Group], loss: LossOutput
) -> tuple[float, bool]:
    """Clips the gradient and moves the parameters, unless something is not finite.

    Returns:
        Norm of the gradient before it was clipped, and whether the step was taken.
    """
    norm = clip(state.placed.parameters, max_grad_norm=config.max_grad_norm)
    value = float(loss.loss)
    is_taken = state.progress.count_step(
        step,
        loss=value,
        norm=norm,
        # One decision: who goes on alone waits for ever in the next collective.
        is_finite=all_true(
            math.isfinite(value) and math.isfinite(norm), device=state.placed.device
        ),
        query_ids=[group.sample.query_id for group in groups],
        max_skipped_steps=config.max_skipped_steps,
        cure="lower train.learning_rate or use train.encoder.dtype float32",
    )
    if is_taken:
        state.optimizer.step()
        # Where nothing was rewritten every ratio is 1 and says nothing about κ.
        if config.intensity_cap == "adaptive" and has_rewrites(groups):
            state.progress.observe(loss.ratio_B, quantile=config.intensity_cap_quantile)
    return norm, is_taken


def batch_number(groups: Sequence[Group]) -> float:
    """A hash of the queries of a batch, in order, that a float holds exactly."""
    return float(int(stable_hash(*(group.sample.query_id for group in groups), size=6), 16))


def _peak_share(state: _State, local: LocalBatch, seconds: float) -> Metrics:
    """What this worker did of what its device could have done; empty for other devices."""
    device = state.placed.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return {"peak_share": state.work.step(local) / seconds / peak} if peak else {}


def _tokenise(
    groups: Sequence[Group], tokenizer: ContractTokenizer, *, limit: int, with_rewritten: bool
) -> LocalBatch:
    def query_ids(texts: Sequence[str]) -> list[TokenIds]:
        # A batch has one instruction, unless small tasks share it.
        found: list[TokenIds] = [()] * len(groups)
        for instruction in {group.sample.instruction for group in groups}:
            rows = [i for i, g in enumerate(groups) if g.sample.instruction == instruction]
            ids = tokenizer.tokenise(
                [texts[i] for i in rows], role=Role.QUERY, instruction=instruction
            )
            for row, one in zip(rows, ids, strict=True):
                found[row] = one
        return found

    queries = query_ids([group.sample.query for group in groups])
    rewritten = query_ids([g.sample.rewritten_query for g in groups]) if with_rewritten else []
    passages = [passage.text for group in groups for passage in group.passages]
    return LocalBatch(
        queries=queries,
        rewritten_queries=rewritten,
        passages=tokenizer.tokenise(passages, role=Role.DOCUMENT),
        num_at_limit=sum(len(ids) >= limit for ids in queries),
    )


def _identity(config: TrainConfig, plan: BatchPlan, contract: TokenisationContract) -> str:
    identity = flatten(config, prefix="train") | {
        "total_steps": plan.total_steps,
        "samples": plan.fingerprint,
        "contract": contract.fingerprint(),
    }
    return fingerprint(identity)
