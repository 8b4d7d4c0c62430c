"""What the processes that train together ask each other; one on its own asks nobody."""

from __future__ import annotations

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether there is a group of processes."""
    return dist.is_available() and dist.is_initialized()


def all_true(is_true: bool, *, device: torch.device) -> bool:
    """Whether it is true on every worker; a collective, with one answer for all.

    Args:
        is_true: On this worker.
        device: That the workers' group sends from.
    """
    if not is_distributed():
        return is_true
    flag = torch.tensor(float(is_true), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag)
