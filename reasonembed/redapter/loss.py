"""RI-InfoNCE: contrastive loss weighted by reasoning intensity (arXiv:2510.08252).

Shape legend: B queries of the global batch, M passages of the global batch, D dimension.

A sample is reasoning-intensive if its rewritten query q′ finds the positive more easily than the
query q does. Two details come from the released code, for the paper leaves them open: the ratio is
cut at 0 below, and normalisation runs over the global batch. Normalising each worker's share and
averaging would be another objective.

What goes past the paper (several positives, graded labels, smoothing, Matryoshka dimensions, masks)
is off by default, and with one positive, no label and no mask it is InfoNCE again.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LABEL_TEMPERATURE = 0.25
"""A grade more of the label is worth a factor of e^4, about 55, of the soft target."""


@dataclass(frozen=True)
class LossOutput:
    """What a global batch gave.

    Attributes:
        loss: Scalar; the only field that carries a gradient.
        losses_B: Loss of each query, in full dimension.
        rewritten_losses_B: Loss of each rewritten query against the same passages.
        ratio_B: l / (l′ + ε), neither cut nor smoothed.
        intensity_B: Reasoning intensity, in [0, cap].
        weight_B: What each query's loss was multiplied by; sums to 1.
        positive_rank_B: Rank of the positive among the passages that count, 1 is best; ties are
            resolved in the positive's favour, and other positives of the query stand in no way.
    """

    loss: Tensor
    losses_B: Tensor
    rewritten_losses_B: Tensor
    ratio_B: Tensor
    intensity_B: Tensor
    weight_B: Tensor
    positive_rank_B: Tensor


def precise(values: Tensor) -> Tensor:
    """float32, or float64 if it is that already."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def scores(
    query_BD: Tensor, doc_MD: Tensor, *, temperature: float, mask_BM: Tensor | None = None
) -> Tensor:
    """s(q, d) = q·d / τ [B, M], in float32 or better; -inf where `mask_BM` is true.

    Args:
        query_BD: Vectors of norm 1, any float dtype.
        doc_MD: Vectors of norm 1, any float dtype.
        temperature: τ.
        mask_BM: Passages that are no negatives of a query.
    """
    with torch.autocast(query_BD.device.type, enabled=False):
        scores_BM = precise(query_BD) @ precise(doc_MD).T / temperature
    return scores_BM if mask_BM is None else scores_BM.masked_fill(mask_BM, float("-inf"))


# ---- from scores to each query's loss -----------------------------------------------------------


def info_nce(scores_BM: Tensor, positive_B: Tensor) -> Tensor:
    """Each query's loss l_i = -log softmax(s_i)[p(i)] over all passages, [B].

    Args:
        scores_BM: From `scores`.
        positive_B: int64, column of each query's positive.
    """
    return torch.nn.functional.cross_entropy(scores_BM, positive_B, reduction="none")


def several_nce(scores_BM: Tensor, target_BM: Tensor) -> Tensor:
    """l_i = mean over p in P_i of -log [ e^s(p) / (e^s(p) + Σ_{n not in P_i} e^s(n)) ], [B].

    Each positive has to beat the negatives; it does not compete with the query's other positives.
    So l_i can reach 0 whatever their number, and RI keeps its meaning: with all passages in the
    denominator (arXiv:2004.11362, L_out) it could not fall below log |P_i|. The other form,
    -log Σ_p softmax[p], is content with one positive that is found already and has next to no
    gradient for the others.

    Args:
        scores_BM: From `scores`; positives must not be masked.
        target_BM: Positive where a passage is one of the query's positives, at least once a row.
    """
    is_positive_BM = target_BM > 0
    lowest = torch.finfo(scores_BM.dtype).min  # -inf everywhere would make the gradient NaN
    negative_BM = scores_BM.masked_fill(is_positive_BM | scores_BM.isneginf(), lowest)
    negatives_B1 = torch.logsumexp(negative_BM, dim=1, keepdim=True)
    positive_BM = torch.where(is_positive_BM, scores_BM, 0.0)
    # -log [e^s / (e^s + e^n)] = softplus(n - s)
    losses_BM = torch.nn.functional.softplus(negatives_B1 - positive_BM)
    losses_BM = torch.where(is_positive_BM, losses_BM, 0.0)
    return losses_BM.sum(dim=1) / is_positive_BM.sum(dim=1)


def graded_nce(scores_BM: Tensor, target_BM: Tensor) -> Tensor:
    """l_i = KL(t_i ‖ softmax(s_i)) = Σ_d t_id (log t_id - log softmax(s_i)[d]), [B].

    The cross entropy with soft targets (ListNet) less their entropy, a constant: l_i can reach 0.

    Args:
        scores_BM: From `scores`; passages with a target must not be masked.
        target_BM: t, not negative, sums to 1 in each row; from `label_targets`.
    """
    log_BM = torch.where(target_BM > 0, torch.log_softmax(scores_BM, dim=1), 0.0)
    return (torch.xlogy(target_BM, target_BM) - target_BM * log_BM).sum(dim=1)


def label_targets(label_BG: Tensor) -> Tensor:
    """t_i = softmax(label_i / 0.25) over the passages of the query's own group, [B, G].

    Args:
        label_BG: Relevance labels 1..5, expected ones (fractions) as well.
    """
    return torch.softmax(precise(label_BG) / LABEL_TEMPERATURE, dim=1)


Targets = Literal["paper", "several", "graded"]


def query_losses(
    scores_BM: Tensor, positive_B: Tensor, *, targets: Targets, target_BM: Tensor | None
) -> Tensor:
    """Each query's loss under a kind of target, [B]; without `target_BM` all are InfoNCE."""
    if targets == "paper" or target_BM is None:
        return info_nce(scores_BM, positive_B)
    of = several_nce if targets == "several" else graded_nce
    return of(scores_BM, target_BM)


# ---- reasoning intensity ------------------------------------------------------------------------


def intensity_ratio(losses_B: Tensor, rewritten_losses_B: Tensor, *, epsilon: float) -> Tensor:
    """l_i / (l′_i + ε), [B]; nothing flows back through it."""
    return losses_B.detach() / (rewritten_losses_B.detach() + epsilon)


def reasoning_intensity(ratio_B: Tensor, *, cap: float) -> Tensor:
    """RI_i = clamp(l_i / (l′_i + ε), 0, κ), [B]; κ may be infinite."""
    return ratio_B.clamp(0.0, cap)


def smoothed(intensity_B: Tensor, *, share: float) -> Tensor:
    """(1 - λ) RI_i + λ mean_j RI_j, [B]: the weights go from RI's (λ = 0) to uniform (λ = 1).

    Args:
        intensity_B: From `reasoning_intensity`.
        share: λ.
    """
    return intensity_B if share == 0 else torch.lerp(intensity_B, intensity_B.mean(), share)


def intensity_weights(intensity_B: Tensor) -> Tensor:
    """w_i = RI_i / Σ_j RI_j over the global batch, [B]; uniform if every intensity is 0."""
    total = intensity_B.sum()
    uniform_B = torch.full_like(intensity_B, 1 / len(intensity_B))
    return torch.where(total > 0, intensity_B / total, uniform_B)


# ---- the loss of a global batch -----------------------------------------------------------------


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
    targets: Targets = "paper",
    target_BM: Tensor | None = None,
    smoothing: float = 0.0,
    dimensions: Sequence[int] = (),
) -> LossOutput:
    """L = Σ_i w_i l_i, or the mean of l_i before weighting starts.

    Args:
        query_BD: Vectors of q, norm 1.
        rewritten_BD: Vectors of q′, norm 1; compared with the same passages, never trained on.
        doc_MD: Vectors of all passages of the global batch, norm 1.
        positive_B: int64, column of each query's positive; of the one that was drawn first.
        temperature: τ.
        cap: κ, may be infinite.
        epsilon: Keeps the ratio finite where l′ is 0.
        is_weighted: False gives the mean; intensity is reported in both cases.
        mask_BM: Passages that are no negatives of a query.
        targets: Which loss a query has: `info_nce`, `several_nce` or `graded_nce`.
        target_BM: What the latter two ask for.
        smoothing: λ of `smoothed`.
        dimensions: Lengths d < D; l_i is then the mean of the losses over the first d entries,
            brought to norm 1 again, and over all (arXiv:2205.13147). Intensity is that of all D.
    """

    def losses(query: Tensor, doc: Tensor) -> tuple[Tensor, Tensor]:
        scores_BM = scores(query, doc, temperature=temperature, mask_BM=mask_BM)
        found_B = query_losses(scores_BM, positive_B, targets=targets, target_BM=target_BM)
        return found_B, scores_BM

    losses_B, scores_BM = losses(query_BD, doc_MD)
    with torch.no_grad():
        rewritten_losses_B, _ = losses(rewritten_BD, doc_MD)
        ratio_B = intensity_ratio(losses_B, rewritten_losses_B, epsilon=epsilon)
        intensity_B = reasoning_intensity(ratio_B, cap=cap)
        weight_B = torch.full_like(intensity_B, 1 / len(intensity_B))
        if is_weighted:
            weight_B = intensity_weights(smoothed(intensity_B, share=smoothing))
        rank_B = positive_ranks(scores_BM, positive_B, target_BM=target_BM)
    shorter = [losses(_first(query_BD, d), _first(doc_MD, d))[0] for d in dimensions]
    trained_B = torch.stack([losses_B, *shorter]).mean(dim=0) if shorter else losses_B
    return LossOutput(
        loss=(weight_B * trained_B).sum(),
        losses_B=losses_B.detach(),
        rewritten_losses_B=rewritten_losses_B,
        ratio_B=ratio_B,
        intensity_B=intensity_B,
        weight_B=weight_B,
        positive_rank_B=rank_B,
    )


def _first(vectors_ND: Tensor, dimension: int) -> Tensor:
    return torch.nn.functional.normalize(precise(vectors_ND[:, :dimension]), dim=-1)


def positive_ranks(
    scores_BM: Tensor, positive_B: Tensor, *, target_BM: Tensor | None = None
) -> Tensor:
    """1 + the number of passages that are scored above the positive and ought not to be, int64 [B].

    Args:
        scores_BM: From `scores`.
        positive_B: Column of each query's positive.
        target_BM: If given, passages of as high a target as the positive's do not count.
    """
    is_above_BM = scores_BM > scores_BM.gather(1, positive_B[:, None])
    if target_BM is not None:
        is_above_BM &= target_BM < target_BM.gather(1, positive_B[:, None])
    return 1 + is_above_BM.sum(dim=1)


# ---- masks --------------------------------------------------------------------------------------


def known_positive_mask(
    doc_hashes: Sequence[str], positive_hashes: Sequence[Set[str]], own_BM: Tensor
) -> Tensor:
    """Marks passages that are known positives of a query, bool [B, M].

    A passage whose text equals one of the query's positives, the chosen one included, is no
    negative of that query; the columns of its own targets are never marked.

    Differs from the paper: the released code masks nothing. Off unless `train.masks` asks for it.

    Args:
        doc_hashes: Text hash of each passage of the global batch.
        positive_hashes: Text hashes of all known positives of each query.
        own_BM: bool, columns of each query's own targets.
    """
    columns: dict[str, list[int]] = {}
    for column, text in enumerate(doc_hashes):
        columns.setdefault(text, []).append(column)
    mask_BM = torch.zeros_like(own_BM)
    for row, known in enumerate(positive_hashes):
        mask_BM[row, [c for text in known for c in columns.get(text, ())]] = True
    return mask_BM & ~own_BM


def equal_text_mask(doc_hashes: Sequence[str], own_BM: Tensor) -> Tensor:
    """Marks passages whose text a query has seen in an earlier column, bool [B, M].

    A text then counts once in a query's denominator, however many groups bring it. Of the texts of
    a query's own targets all other columns are marked, earlier ones too; the targets never are.

    Differs from the paper: the released code counts each. Off unless `train.masks` asks for it.

    Args:
        doc_hashes: Text hash of each passage of the global batch.
        own_BM: bool, columns of each query's own targets.
    """
    first: dict[str, int] = {}  # column of each text
    first_M = torch.tensor([first.setdefault(text, c) for c, text in enumerate(doc_hashes)])
    is_later_M = first_M != torch.arange(len(first_M))
    has_target_BM = torch.zeros_like(own_BM)  # at the first column of the target's text
    rows, columns = own_BM.nonzero(as_tuple=True)
    has_target_BM[rows, first_M[columns]] = True
    return (is_later_M[None] | has_target_BM[:, first_M]) & ~own_BM
