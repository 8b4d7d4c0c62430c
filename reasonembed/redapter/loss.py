"""RI-InfoNCE: contrastive loss weighted by reasoning intensity (arXiv:2510.08252).

Shape legend: B queries of the global batch, M passages of the global batch, D dimension.

A sample is reasoning-intensive if its rewritten query q′ finds the positive more easily than the
query q does. Two details come from the released code, for the paper leaves them open: the ratio is
cut at 0 below, and normalisation runs over the global batch. Normalising each worker's share and
averaging would be another objective.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """What a global batch gave.

    Attributes:
        loss: float32 scalar; the only field that carries a gradient.
        losses_B: InfoNCE of each query.
        rewritten_losses_B: InfoNCE of each rewritten query against the same passages.
        intensity_B: Reasoning intensity, in [0, cap].
        weight_B: What each query's loss was multiplied by; sums to 1.
        positive_rank_B: Rank of the positive among the passages that count, 1 is best; ties are
            resolved in the positive's favour.
    """

    loss: Tensor
    losses_B: Tensor
    rewritten_losses_B: Tensor
    intensity_B: Tensor
    weight_B: Tensor
    positive_rank_B: Tensor


def scores(
    query_BD: Tensor, doc_MD: Tensor, *, temperature: float, mask_BM: Tensor | None = None
) -> Tensor:
    """Cosine over temperature, float32 [B, M]; -inf where `mask_BM` is true.

    Args:
        query_BD: Vectors of norm 1, any float dtype.
        doc_MD: Vectors of norm 1, any float dtype.
        temperature: τ.
        mask_BM: Passages that are no negatives of a query.
    """
    scores_BM = query_BD.float() @ doc_MD.float().T / temperature
    return scores_BM if mask_BM is None else scores_BM.masked_fill(mask_BM, float("-inf"))


def info_nce(scores_BM: Tensor, positive_B: Tensor) -> Tensor:
    """Each query's loss l_i = −log softmax(scores_i)[p(i)] over all passages, [B].

    Args:
        scores_BM: float32, from `scores`.
        positive_B: int64, column of each query's positive.
    """
    return torch.nn.functional.cross_entropy(scores_BM, positive_B, reduction="none")


def reasoning_intensity(
    losses_B: Tensor, rewritten_losses_B: Tensor, *, cap: float, epsilon: float
) -> Tensor:
    """RI_i = clamp(l_i / (l′_i + ε), 0, κ), [B]; nothing flows back through it."""
    ratio_B = losses_B.detach() / (rewritten_losses_B.detach() + epsilon)
    return ratio_B.clamp(0.0, cap)


def intensity_weights(intensity_B: Tensor) -> Tensor:
    """w_i = RI_i / Σ_j RI_j over the global batch, [B]; uniform if every intensity is 0."""
    total = intensity_B.sum()
    uniform_B = torch.full_like(intensity_B, 1 / len(intensity_B))
    return torch.where(total > 0, intensity_B / total, uniform_B)


def ri_info_nce(
    query_BD: Tensor,
    rewritten_BD: Tensor,
    doc_MD: Tensor,
    positive_B: Tensor,
    *,
    temperature: float,
    cap: float,
    epsilon: float,
    is_weighted: bool,
    mask_BM: Tensor | None = None,
) -> LossOutput:
    """L = Σ_i w_i l_i, or the mean of l_i before weighting starts.

    Args:
        query_BD: Vectors of q, norm 1.
        rewritten_BD: Vectors of q′, norm 1; compared with the same passages, never trained on.
        doc_MD: Vectors of all passages of the global batch, norm 1.
        positive_B: int64, column of each query's positive.
        temperature: τ.
        cap: κ.
        epsilon: Keeps the ratio finite where l′ is 0.
        is_weighted: False gives the mean; intensity is reported in both cases.
        mask_BM: Passages that are no negatives of a query, see `false_negative_mask`.
    """
    scores_BM = scores(query_BD, doc_MD, temperature=temperature, mask_BM=mask_BM)
    losses_B = info_nce(scores_BM, positive_B)
    with torch.no_grad():
        rewritten_BM = scores(rewritten_BD, doc_MD, temperature=temperature, mask_BM=mask_BM)
        rewritten_losses_B = info_nce(rewritten_BM, positive_B)
        intensity_B = reasoning_intensity(losses_B, rewritten_losses_B, cap=cap, epsilon=epsilon)
        uniform_B = torch.full_like(intensity_B, 1 / len(intensity_B))
        weight_B = intensity_weights(intensity_B) if is_weighted else uniform_B
        own_B1 = scores_BM.gather(1, positive_B[:, None])
        rank_B = 1 + (scores_BM > own_B1).sum(dim=1)
    return LossOutput(
        loss=(weight_B * losses_B).sum(),
        losses_B=losses_B.detach(),
        rewritten_losses_B=rewritten_losses_B,
        intensity_B=intensity_B,
        weight_B=weight_B,
        positive_rank_B=rank_B,
    )


def false_negative_mask(
    doc_hashes: Sequence[str], positive_hashes: Sequence[Set[str]], positives: Sequence[int]
) -> Tensor:
    """Marks passages that are known positives of a query, bool [B, M].

    A passage whose text equals one of the query's positives, the chosen one included, is no
    negative of that query; the column of the chosen positive itself is never marked.

    Differs from the paper: the released code masks nothing. Off unless
    `train.mask_false_negatives` asks for it.

    Args:
        doc_hashes: Text hash of each passage of the global batch.
        positive_hashes: Text hashes of all known positives of each query.
        positives: Column of each query's positive.
    """
    rows = [
        [text in known and column != own for column, text in enumerate(doc_hashes)]
        for known, own in zip(positive_hashes, positives, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(rows), len(doc_hashes))
