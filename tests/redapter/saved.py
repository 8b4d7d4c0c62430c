"""What a checkpoint holds, read without a model."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save


def state_of(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint.parent / f"{checkpoint.name}.pt"
    dcp_to_torch_save(checkpoint, file)
    return torch.load(file, weights_only=True)


def learnt(checkpoint: Path) -> dict[str, torch.Tensor]:
    return state_of(checkpoint)["learnt"]
