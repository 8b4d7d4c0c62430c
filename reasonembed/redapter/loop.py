"""The training loop: LoRA on a causal backbone under RI-InfoNCE.

Reads the `samples` artifact and a checkpoint; writes adapters. Knows torch.distributed, not who
started the workers: placement, restarts and storage are the caller's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from reasonembed.config import TrainConfig, TrainRuntime, fingerprint, flatten
from reasonembed.embedder.contract import TokenisationContract, resolve_contract
from reasonembed.embedder.encode import load_backbone
from reasonembed.embedder.pooling import forward
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, TokenIds
from reasonembed.redapter.batches import BatchPlan, Group, Sample, rank_slice
from reasonembed.redapter.loss import LossOutput, false_negative_mask, ri_info_nce
from reasonembed.redapter.step import LocalBatch, contrastive_step
from reasonembed.redapter.stepping import (
    Metrics,
    Report,
    read_checkpoint,
    set_rate,
    take_steps,
    update,
    with_adapter,
    write_checkpoint,
)
from reasonembed.schemas import row_seed


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
        steps: Steps that the adapter has seen, those before a resume included.
        adapter_dir: Checkpoint of the last step; only rank 0's path is written to.
        contract: What the adapter was trained under.
        metrics: Of the last step; empty if a finished run was resumed.
    """

    steps: int
    adapter_dir: Path
    contract: TokenisationContract
    metrics: Metrics


@dataclass(frozen=True)
class _State:
    model: Any
    parameters: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    tokenizer: ContractTokenizer
    contract: TokenisationContract


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
    resume_from: Path | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> TrainResult:
    """Fine-tunes adapters; with `world_size` > 1 in each process of an initialised group.

    A resumed run continues bit for bit where the interrupted one would have been (same machine,
    same number of workers and chunk size): batches, rates and dropout are functions of the step.

    Args:
        config: What decides the result.
        samples: All of them, on every worker.
        weights: Checkpoint of the backbone.
        runtime: Threads, chunk size, checkpoint interval.
        output_dir: Receives `checkpoint-<step>` folders, written by rank 0.
        report: Called once a step on every rank with that step's metrics; the path is given on
            rank 0 when a checkpoint has been written, else None.
        resume_from: A checkpoint folder.
        rank: Of this worker.
        world_size: Number of workers.

    Raises:
        ConfigError: Samples or workers do not fit the batch.
        ModelError: The backbone cannot be loaded or has no projections to adapt, or a loss is not
            finite.
        DriftError: The checkpoint is of another configuration, other samples or another number of
            steps.
    """
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    plan = BatchPlan(samples, config, num_workers=world_size)
    state = _prepare(config, weights, use_gpu=runtime.use_gpu)
    identity = _identity(config, plan, state.contract)
    start = _resume(state, resume_from, identity=identity) if resume_from else 0
    total = plan.total_steps
    metrics = take_steps(
        partial(_one_step, config, plan, state, runtime=runtime, rank=rank, world_size=world_size),
        partial(_save, state, output_dir, identity=identity),
        start=start,
        total=total,
        runtime=runtime,
        rank=rank,
        report=report,
    )
    final = resume_from if start == total and resume_from else output_dir / f"checkpoint-{total}"
    return TrainResult(total, final, state.contract, metrics)


def _prepare(config: TrainConfig, weights: Path, *, use_gpu: bool) -> _State:
    contract = resolve_contract(weights, config.encoder)
    backbone = load_backbone(weights, dtype=contract.dtype, layers=contract.layers)
    torch.manual_seed(row_seed(config.seed, "adapter"))
    model = with_adapter(
        backbone.model, config.lora, task_type="FEATURE_EXTRACTION", name=config.encoder.model
    )
    model = model.to("cuda" if use_gpu else "cpu").train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=0.0)
    tokenizer = ContractTokenizer(backbone.tokenizer, contract)
    return _State(model, parameters, optimizer, tokenizer, contract)


def _one_step(
    config: TrainConfig,
    plan: BatchPlan,
    state: _State,
    step: int,
    *,
    runtime: TrainRuntime,
    rank: int,
    world_size: int,
) -> Metrics:
    began = time.perf_counter()
    groups = plan.batch(step)
    local = _tokenise(rank_slice(groups, rank=rank, world_size=world_size), state.tokenizer)
    rate = learning_rate_at(step, total_steps=plan.total_steps, config=config)
    set_rate(state.optimizer, rate)
    output = contrastive_step(
        lambda ids: forward(state.model, state.contract, ids),
        local,
        global_loss=_global_loss(config, groups, step=step),
        parameters=state.parameters,
        chunk_texts=runtime.chunk_texts,
        seed=row_seed(config.seed, "dropout", step, rank),
    )
    norm = update(
        state.optimizer,
        state.parameters,
        output.loss,
        max_grad_norm=config.max_grad_norm,
        step=step,
        cure="lower train.learning_rate or use train.encoder.dtype float32",
    )
    seconds = time.perf_counter() - began
    return step_metrics(output, cap=config.intensity_cap) | {
        "step": float(step),
        "learning_rate": rate,
        "grad_norm": norm,
        "step_s": seconds,
        "tokens_per_s": local.num_tokens / seconds,
    }


def _tokenise(groups: Sequence[Group], tokenizer: ContractTokenizer) -> LocalBatch:
    def query_ids(texts: list[str]) -> list[TokenIds]:
        pairs = zip(groups, texts, strict=True)
        return [
            tokenizer.tokenise([text], role=Role.QUERY, instruction=group.sample.instruction)[0]
            for group, text in pairs
        ]

    passages = [passage.text for group in groups for passage in group.passages]
    return LocalBatch(
        queries=query_ids([group.sample.query for group in groups]),
        rewritten_queries=query_ids([group.sample.rewritten_query for group in groups]),
        passages=tokenizer.tokenise(passages, role=Role.DOCUMENT),
    )


def _global_loss(
    config: TrainConfig, groups: Sequence[Group], *, step: int
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], LossOutput]:
    positives = _positive_columns(groups)
    # Where no query was rewritten, intensities are 1 but for dropout's noise: no weights then.
    has_rewrites = any(g.sample.rewritten_query != g.sample.query for g in groups)
    mask_BM = positive_mask(groups) if config.mask_false_negatives else None

    def compute(
        query_BD: torch.Tensor, rewritten_BD: torch.Tensor, doc_MD: torch.Tensor
    ) -> LossOutput:
        return ri_info_nce(
            query_BD,
            rewritten_BD,
            doc_MD,
            torch.tensor(positives, device=query_BD.device),
            temperature=config.temperature,
            cap=config.intensity_cap,
            epsilon=config.intensity_epsilon,
            is_weighted=has_rewrites and step >= config.intensity_start_step,
            mask_BM=None if mask_BM is None else mask_BM.to(query_BD.device),
        )

    return compute


def positive_mask(groups: Sequence[Group]) -> torch.Tensor:
    """Passages of a batch that are known positives of a query, bool [B, M].

    By text, so that neither another id nor other white space hides one; samples of the same query
    know each other's positives. See `loss.false_negative_mask`.
    """
    known: dict[str, set[str]] = {}
    for group in groups:
        hashes = {passage.text_hash for passage in group.sample.positives}
        known.setdefault(group.sample.query, set()).update(hashes)
    return false_negative_mask(
        [passage.text_hash for group in groups for passage in group.passages],
        [known[group.sample.query] for group in groups],
        _positive_columns(groups),
    )


def _positive_columns(groups: Sequence[Group]) -> list[int]:
    return [row * len(group.passages) for row, group in enumerate(groups)]


def step_metrics(output: LossOutput, *, cap: float) -> Metrics:
    """What a step says about itself; intensity is computed from step 0, weighted or not.

    Args:
        output: Of the global batch.
        cap: κ.

    Returns:
        `loss`, means of l and l′, minimum, median and maximum of the intensity, the share of
        samples at the cap, the effective batch size 1/Σw², and the mean rank of the positive.
    """
    intensity_B = output.intensity_B
    values = {
        "loss": output.loss,
        "query_loss": output.losses_B.mean(),
        "rewritten_loss": output.rewritten_losses_B.mean(),
        "intensity_min": intensity_B.min(),
        "intensity_median": intensity_B.median(),
        "intensity_max": intensity_B.max(),
        "intensity_capped_share": (intensity_B >= cap).float().mean(),
        "effective_batch_size": 1 / output.weight_B.square().sum(),
        "positive_rank": output.positive_rank_B.float().mean(),
    }
    return {name: float(value) for name, value in values.items()}


def _identity(config: TrainConfig, plan: BatchPlan, contract: TokenisationContract) -> str:
    identity = flatten(config, prefix="train") | {
        "total_steps": plan.total_steps,
        "samples": plan.fingerprint,
        "contract": contract.fingerprint(),
    }
    return fingerprint(identity)


def _save(state: _State, output_dir: Path, step: int, *, identity: str) -> Path:
    # Embeddings are frozen; without the flag peft asks the hub whether they were resized.
    save_weights = partial(state.model.save_pretrained, save_embedding_layers=False)
    return write_checkpoint(output_dir, save_weights, state.optimizer, step=step, identity=identity)


def _resume(state: _State, checkpoint: Path, *, identity: str) -> int:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    def load_weights(folder: Path) -> None:
        set_peft_model_state_dict(state.model, load_file(folder / "adapter_model.safetensors"))

    return read_checkpoint(
        checkpoint, load_weights, state.optimizer, identity=identity, learnt_from="samples"
    )
