"""From hidden states to one vector a text.

Shape legend: B texts, L padded tokens, D dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reasonembed.embedder.contract import Pooling, TokenisationContract
from reasonembed.embedder.tokenisation import TokenIds


def pool(hidden_BLD: Tensor, lengths_B: Tensor, pooling: Pooling) -> Tensor:
    """Pools right-padded hidden states.

    Args:
        hidden_BLD: Any float dtype; what stands in padding is ignored, NaN included.
        lengths_B: int64, tokens of each text, at least 1.
        pooling: Last token, mean of all tokens, or first token.

    Returns:
        float32 [B, D], not normalised.
    """
    if pooling is Pooling.CLS:
        return hidden_BLD[:, 0].float()
    if pooling is Pooling.LAST:
        rows_B = torch.arange(len(lengths_B), device=hidden_BLD.device)
        return hidden_BLD[rows_B, lengths_B - 1].float()
    positions_L = torch.arange(hidden_BLD.shape[1], device=hidden_BLD.device)
    inside_BL = positions_L[None] < lengths_B[:, None]
    summed_BD = hidden_BLD.float().masked_fill(~inside_BL[..., None], 0).sum(dim=1)
    return summed_BD / lengths_B[:, None]


def forward(model: Any, contract: TokenisationContract, batch: Sequence[TokenIds]) -> Tensor:
    """Embeds one batch; differentiable.

    Padding is on the right: position ids are then 0..n-1 for every architecture without being
    passed, and the mask comes from lengths.

    Args:
        model: A transformers backbone without head, or one wrapped by peft.
        contract: Names pooling and normalisation.
        batch: Token ids, at least one text, none empty.

    Returns:
        float32 [B, D] on the model's device.

    Raises:
        ValueError: A text has no token at all, so there is nothing to pool.
    """
    if not all(batch):
        raise ValueError("a text without any token cannot be embedded; append an end token")
    lengths = [len(ids) for ids in batch]
    width = max(lengths)
    device = next(model.parameters()).device
    # 0 is as good as any padding id: masked positions reach no vector.
    ids_BL = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in batch], device=device)
    lengths_B = torch.tensor(lengths, device=device)
    mask_BL = (torch.arange(width, device=device)[None] < lengths_B[:, None]).long()
    hidden_BLD = model(input_ids=ids_BL, attention_mask=mask_BL).last_hidden_state
    vectors_BD = pool(hidden_BLD, lengths_B, contract.pooling)
    return torch.nn.functional.normalize(vectors_BD, dim=-1) if contract.normalise else vectors_BD
