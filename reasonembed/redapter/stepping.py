"""What every kind of fine-tuning shares: adapters, the run of steps, the update, checkpoints.

Knows neither losses nor batches. A checkpoint is a folder that is there whole or not at all:
`trainer.pt` (step, identity, optimizer) beside whatever holds the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from reasonembed.config import LoRAConfig, TrainRuntime
from reasonembed.errors import DriftError, ModelError

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

Metrics = dict[str, float]
Report = Callable[[Metrics, Path | None], None]

_TRAINER = "trainer.pt"


def with_adapter(model: Any, lora: LoRAConfig, *, task_type: str, name: str) -> Any:
    """The model with low-rank adapters on every projection.

    Args:
        model: A decoder of transformers.
        lora: Rank, scale, dropout.
        task_type: One of peft's `TaskType`.
        name: Of the model, for the message.

    Raises:
        ModelError: It has no projections to adapt.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    adapters = LoraConfig(
        task_type=TaskType(task_type),
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(LORA_TARGETS),
    )
    try:
        return get_peft_model(model, adapters)
    except ValueError as error:
        raise ModelError(f"{name} cannot be adapted: {error}") from error


def take_steps(
    one_step: Callable[[int], Metrics],
    save: Callable[[int], Path],
    *,
    start: int,
    total: int,
    runtime: TrainRuntime,
    rank: int,
    report: Report,
) -> Metrics:
    """Takes the steps from `start` to `total` and reports each; rank 0 saves checkpoints.

    Args:
        one_step: Takes a step, counted from 0.
        save: Writes the checkpoint after so many steps.
        start: Steps that were taken before.
        total: Of the whole run; after the last there is always a checkpoint.
        runtime: `checkpoint_every`.
        rank: Of this worker.
        report: Called once a step with its metrics, and the checkpoint if one was written here.

    Returns:
        Metrics of the last step; empty if none was left to take.
    """
    metrics = Metrics()
    for step in range(start, total):
        metrics = one_step(step)
        done, checkpoint = step + 1, None
        if rank == 0 and (done % runtime.checkpoint_every == 0 or done == total):
            checkpoint = save(done)
        report(metrics, checkpoint)
    return metrics


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Prepares the next step: its learning rate, and no gradients."""
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    loss: torch.Tensor,
    *,
    max_grad_norm: float,
    step: int,
    cure: str,
) -> float:
    """Clips the gradient and moves the parameters.

    Returns:
        Norm of the gradient before it was clipped.

    Raises:
        ModelError: Loss or gradient is not finite; `cure` says what to change.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    if not bool(torch.isfinite(loss) & torch.isfinite(norm)):
        raise ModelError(f"step {step}: loss {float(loss)}, gradient norm {float(norm)}; {cure}")
    optimizer.step()
    return float(norm)


def write_checkpoint(
    output_dir: Path,
    save_weights: Callable[[Path], object],
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    identity: str,
) -> Path:
    """Writes `checkpoint-<step>`, in place of one of that name."""
    target, scratch = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}"
    scratch.mkdir(parents=True, exist_ok=True)
    save_weights(scratch)
    torch.save(
        {"step": step, "identity": identity, "optimizer": optimizer.state_dict()},
        scratch / _TRAINER,
    )
    if target.exists():  # of a run that was resumed from an earlier step, or of another run
        shutil.rmtree(target)
    scratch.rename(target)
    return target


def read_checkpoint(
    checkpoint: Path,
    load_weights: Callable[[Path], object],
    optimizer: torch.optim.Optimizer,
    *,
    identity: str,
    learnt_from: str,
) -> int:
    """Restores weights and optimizer.

    Args:
        checkpoint: Of `write_checkpoint`.
        load_weights: Reads what `save_weights` wrote.
        optimizer: Of the same parameters.
        identity: What the run is made of now.
        learnt_from: What it learns from, for the message.

    Returns:
        Steps that the checkpoint has seen.

    Raises:
        DriftError: It is of another identity.
    """
    saved = torch.load(checkpoint / _TRAINER, weights_only=True, map_location="cpu")
    if saved["identity"] != identity:
        raise DriftError(
            f"{checkpoint} was trained with other settings or {learnt_from} "
            f"({saved['identity']}, now {identity}); train into a new folder"
        )
    load_weights(checkpoint)
    optimizer.load_state_dict(saved["optimizer"])
    return int(saved["step"])
