"""From token ids to one vector a text, whether the batch is padded or packed.

Which positions are real follows from the lengths of the texts, never from comparing ids with a
padding id: that may be the end token's own, or stand inside a text.

Shape legend: B texts, L tokens of the longest, T tokens of all, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from reasonembed.embedder.contract import Pooling, TokenisationContract, first_position
from reasonembed.embedder.packing import flat_ids, is_causal, packed_inputs
from reasonembed.embedder.tokenisation import TokenIds

_causal: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


def pool(hidden_BLD: Tensor, lengths: Sequence[int], pooling: Pooling, *, skip: int = 0) -> Tensor:
    """Pools hidden states of texts that are padded on the right, or packed into one row.

    Args:
        hidden_BLD: Any float dtype. Packed: [1, T, D]. What stands in padding is ignored, NaN
            included.
        lengths: Tokens of each text, at least 1.
        pooling: Last token, mean of all tokens, or first token.
        skip: First tokens of each text that do not enter the mean; of a text that has no more
            tokens, all do.

    Returns:
        [B, D] in float32 (float64 stays as it is), not normalised.
    """
    rows, width = hidden_BLD.shape[:2]
    hidden_ND, device = hidden_BLD.flatten(0, 1), hidden_BLD.device
    lengths_B = torch.tensor(lengths)  # on the CPU, so that no device is waited for
    # One row holds all texts one after another, also where it is a single padded one.
    first_B = lengths_B.cumsum(0) - lengths_B if rows == 1 else torch.arange(rows) * width
    if pooling is Pooling.CLS:
        return _precise(hidden_ND[first_B.to(device)])
    if pooling is Pooling.LAST:
        return _precise(hidden_ND[(first_B + lengths_B - 1).to(device)])
    pooled = [n - skip if n > skip else n for n in lengths]
    pooled_B = torch.tensor(pooled)
    if len(hidden_ND) > sum(pooled):
        first_B = first_B + lengths_B - pooled_B
        shift_T = (first_B - pooled_B.cumsum(0) + pooled_B).repeat_interleave(pooled_B)
        hidden_ND = hidden_ND[(shift_T + torch.arange(len(shift_T))).to(device)]
    return torch.segment_reduce(_precise(hidden_ND), "mean", lengths=pooled_B.to(device), axis=0)


def _precise(values: Tensor) -> Tensor:
    # float64 stays: tests compare with it.
    return values.to(torch.promote_types(values.dtype, torch.float32))


def forward(
    model: Any,
    contract: TokenisationContract,
    batch: Sequence[TokenIds],
    *,
    packed: bool = False,
    skip: int = 0,
) -> Tensor:
    """Embeds one batch; differentiable.

    Args:
        model: A transformers backbone without head, or one wrapped by peft.
        contract: Names pooling and normalisation.
        batch: Token ids, at least one text, none empty.
        packed: One row without padding, for models that `packing.use_packing` readied; else a
            batch padded on the right. The vectors are the same up to rounding.
        skip: First tokens of each text that do not enter the mean; see `pool`.

    Returns:
        float32 [B, D] on the model's device.

    Raises:
        ValueError: A text has no token at all, so there is nothing to pool.
    """
    if not all(batch):
        raise ValueError("a text without any token cannot be embedded; append an end token")
    # Equal lengths become neighbours, so that attention takes them at once.
    order = sorted(range(len(batch)), key=lambda i: -len(batch[i])) if packed else range(len(batch))
    texts = [batch[i] for i in order]
    hidden_BLD = model(**_inputs(model, texts, packed=packed)).last_hidden_state
    vectors_BD = pool(hidden_BLD, [len(ids) for ids in texts], contract.pooling, skip=skip)
    if packed:
        vectors_BD = vectors_BD[torch.tensor(order).argsort().to(vectors_BD.device)]
    return torch.nn.functional.normalize(vectors_BD, dim=-1) if contract.normalise else vectors_BD


def _inputs(model: Any, batch: Sequence[TokenIds], *, packed: bool) -> dict[str, Any]:
    device = next(model.parameters()).device
    config = getattr(model, "config", None)
    first = first_position(
        getattr(config, "model_type", None), padding_id=getattr(config, "pad_token_id", None)
    )
    if packed:
        return packed_inputs(batch, first_position=first, device=device)
    if model not in _causal:
        _causal[model] = is_causal(model)
    return _padded_inputs(batch, first_position=first, has_mask=not _causal[model], device=device)


def _padded_inputs(
    batch: Sequence[TokenIds], *, first_position: int, has_mask: bool, device: torch.device
) -> dict[str, Tensor]:
    lengths_B = torch.tensor([len(ids) for ids in batch])
    inside_BL = torch.arange(int(lengths_B.max())) < lengths_B[:, None]
    # 0 is as good as any padding id: padded positions reach no vector.
    ids_BL = torch.zeros(inside_BL.shape, dtype=torch.int64)
    ids_BL[inside_BL] = flat_ids(batch, total=int(lengths_B.sum()))
    inputs = {"input_ids": ids_BL}
    # Padding on the right stands after every token, so causal attention never reads it; and
    # kernels are faster without a mask.
    if has_mask:
        inputs["attention_mask"] = inside_BL.long()
    if first_position:  # else positions are 0..n-1, as every model numbers them by itself
        inputs["position_ids"] = (first_position + torch.arange(inside_BL.shape[1])).expand_as(
            ids_BL
        )
    return {name: tensor.to(device) for name, tensor in inputs.items()}
