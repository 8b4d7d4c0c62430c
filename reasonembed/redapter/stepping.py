"""What every kind of fine-tuning shares: the run of steps, and the update.

Knows neither losses nor batches, nor how the model is placed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.distributed.tensor import DTensor

from reasonembed.config import TrainRuntime
from reasonembed.errors import ModelError
from reasonembed.redapter.checkpoints import Checkpoints, Saved

Metrics = dict[str, float]
Report = Callable[[Metrics, Saved | None], None]
IsLeaving = Callable[[], bool]


def never() -> bool:
    """Machines stay."""
    return False


def take_steps(
    one_step: Callable[[int], Metrics],
    checkpoints: Checkpoints,
    *,
    start: int,
    total: int,
    runtime: TrainRuntime,
    report: Report,
    is_leaving: IsLeaving = never,
) -> Metrics:
    """Takes the steps from `start` to `total`, saves checkpoints, and reports each step.

    Args:
        one_step: Takes a step, counted from 0.
        checkpoints: Where they go; those beyond `start` are removed first.
        start: Steps that were taken before.
        total: Of the whole run; after the last there is always a checkpoint.
        runtime: `checkpoint_every`, `async_checkpoints`.
        report: Called once a step on every worker with its metrics, and with the checkpoint if one
            was begun, on all workers alike; at the end all of them are whole.
        is_leaving: Asked after each step but the last on every worker, with one answer for all:
            whether a machine is about to go. Then there is a checkpoint at once, and nothing else
            until it is whole.

    Returns:
        Metrics of the last step; empty if none was left to take.
    """
    checkpoints.forget_after(start)
    metrics = Metrics()
    for step in range(start, total):
        metrics = one_step(step)
        done, saved = step + 1, None
        is_urgent = done == total or is_leaving()
        if is_urgent or done % runtime.checkpoint_every == 0:
            saved = checkpoints.save(done)
            if is_urgent or not runtime.async_checkpoints:
                saved.wait()
        report(metrics, saved)
    return metrics


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Prepares the next step: its learning rate, and no gradients."""
    for settings in optimizer.param_groups:
        settings["lr"] = rate
    optimizer.zero_grad(set_to_none=True)


def clip(parameters: Sequence[torch.nn.Parameter], *, max_grad_norm: float) -> float:
    """Scales the gradient down to `max_grad_norm` if it is longer; over all shards of it.

    Returns:
        Its norm before, equal on all workers; not finite if an entry is not.
    """
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


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
    norm = clip(parameters, max_grad_norm=max_grad_norm)
    if not (math.isfinite(float(loss)) and math.isfinite(norm)):
        raise ModelError(f"step {step}: loss {float(loss)}, gradient norm {norm}; {cure}")
    optimizer.step()
    return norm
