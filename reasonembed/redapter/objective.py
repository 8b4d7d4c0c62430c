"""From a batch of groups to its loss: targets, masks and settings of `loss.ri_info_nce`.

Every worker knows the whole batch, so that all of this needs no message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonembed.config import TrainConfig
from reasonembed.errors import ConfigError
from reasonembed.redapter.batches import Group
from reasonembed.redapter.loss import (
    LossOutput,
    equal_text_mask,
    known_positive_mask,
    label_targets,
    ri_info_nce,
)
from reasonembed.redapter.progress import Progress


def has_rewrites(groups: Sequence[Group]) -> bool:
    """Whether any q′ of the batch differs from its q; if none does, q′ is not embedded at all."""
    return any(g.sample.rewritten_query != g.sample.query for g in groups)


def intensity_cap(config: TrainConfig, progress: Progress) -> float:
    """κ of the next step."""
    return progress.cap if config.intensity_cap == "adaptive" else config.intensity_cap


def check_dimensions(config: TrainConfig, *, dimension: int) -> None:
    """Refuses shorter vectors that are not shorter.

    Raises:
        ConfigError: One of `matryoshka_dimensions` is not below the model's.
    """
    if wrong := [d for d in config.matryoshka_dimensions if d >= dimension]:
        raise ConfigError(
            f"train.matryoshka_dimensions {wrong} must lie below the {dimension} of "
            f"{config.encoder.model}; the full dimension is always trained"
        )


def batch_loss(
    config: TrainConfig, groups: Sequence[Group], *, step: int, cap: float
) -> Callable[[Tensor, Tensor, Tensor], LossOutput]:
    """The loss of a global batch as a function of query_BD, rewritten_BD and doc_MD.

    Args:
        config: Temperature, intensity, targets, masks, dimensions.
        groups: Of all workers in rank order.
        step: From 0; intensity weights the losses from `intensity_start_step` on, if there are
            rewritten queries at all: where there are none, dropout's noise would be the weights.
        cap: κ.
    """
    columns = batch_columns(groups)
    target_BM = soft_targets(config, groups)
    mask_BM = batch_mask(config, groups)
    is_weighted = has_rewrites(groups) and step >= config.intensity_start_step

    def compute(query_BD: Tensor, rewritten_BD: Tensor, doc_MD: Tensor) -> LossOutput:
        device = query_BD.device
        return ri_info_nce(
            query_BD,
            rewritten_BD,
            doc_MD,
            columns.positive_B.to(device),
            temperature=config.temperature,
            cap=cap,
            epsilon=config.intensity_epsilon,
            is_weighted=is_weighted,
            mask_BM=None if mask_BM is None else mask_BM.to(device),
            targets=config.targets,
            target_BM=None if target_BM is None else target_BM.to(device, doc_MD.dtype),
            smoothing=config.intensity_smoothing,
            dimensions=config.matryoshka_dimensions,
        )

    return compute


@dataclass(frozen=True)
class Columns:
    """Where a query's own passages stand among those of the batch.

    Attributes:
        positive_B: int64, the positive that was drawn first.
        positive_BM: bool, all positives that its group brings.
        group_BM: bool, all passages that its group brings.
    """

    positive_B: Tensor
    positive_BM: Tensor
    group_BM: Tensor


def batch_columns(groups: Sequence[Group]) -> Columns:
    """Columns of a batch whose groups are of one size and lie one after another."""
    size, num_groups = len(groups[0].passages), len(groups)
    offset_M = torch.arange(num_groups * size)[None] - torch.arange(num_groups)[:, None] * size
    num_positives_B1 = torch.tensor([group.num_positives for group in groups])[:, None]
    return Columns(
        positive_B=torch.arange(num_groups) * size,
        positive_BM=(offset_M >= 0) & (offset_M < num_positives_B1),
        group_BM=(offset_M >= 0) & (offset_M < size),
    )


def soft_targets(config: TrainConfig, groups: Sequence[Group]) -> Tensor | None:
    """What a query asks of each passage of the batch, float64 [B, M]; None for one positive.

    `several`: 1 / |P_i| at its positives; `graded`: `loss.label_targets` over its own group.
    """
    if config.targets == "paper":
        return None
    columns = batch_columns(groups)
    if config.targets == "several":
        chosen_BM = columns.positive_BM.double()
        return chosen_BM / chosen_BM.sum(dim=1, keepdim=True)
    target_BM = torch.zeros(columns.group_BM.shape, dtype=torch.float64)
    # The plan has refused samples without labels.
    rows = [[label or 0.0 for label in group.labels] for group in groups]
    label_BG = torch.tensor(rows, dtype=torch.float64)
    target_BM[columns.group_BM] = label_targets(label_BG).flatten()
    return target_BM


def batch_mask(config: TrainConfig, groups: Sequence[Group]) -> Tensor | None:
    """Passages that are no negatives of a query, bool [B, M]; None where nothing is masked."""
    columns = batch_columns(groups)
    own_BM = columns.group_BM if config.targets == "graded" else columns.positive_BM
    hashes = [passage.text_hash for group in groups for passage in group.passages]
    masks = []
    if "known_positives" in config.masks:
        masks.append(known_positive_mask(hashes, known_positives(groups), own_BM))
    if "equal_texts" in config.masks:
        masks.append(equal_text_mask(hashes, own_BM))
    return torch.stack(masks).any(dim=0) if masks else None


def known_positives(groups: Sequence[Group]) -> list[set[str]]:
    """Text hashes of each query's positives; samples of the same query know each other's.

    By text, so that neither another id nor other white space hides one.
    """
    known: dict[str, set[str]] = {}
    for group in groups:
        hashes = {passage.text_hash for passage in group.sample.positives}
        known.setdefault(group.sample.query, set()).update(hashes)
    return [known[group.sample.query] for group in groups]


def step_metrics(output: LossOutput, *, cap: float) -> dict[str, float]:
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
