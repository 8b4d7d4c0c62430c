"""Padding-free forward passes: the tokens of many texts in one row, each text attending to itself.

Linear layers see T real tokens and nothing else; positions start anew with each text; attention
takes the bounds of the texts in place of a mask, which would be T x T. Flash attention's
variable-length kernel does so on GPUs in 16 bits (`torch.nn.attention.varlen`). Elsewhere texts of
equal length are stacked and handed to SDPA without a mask: exact, and cheap on CPUs.

Shape legend: B texts, T tokens of all of them, N texts of one length L, H heads of queries, K heads
of keys and values (K divides H), D dimension of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from inspect import signature
from itertools import chain, groupby
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from reasonembed.embedder.tokenisation import TokenIds
from reasonembed.errors import ConfigError

Packing = Literal["auto", "on", "off"]

# Families whose packed vectors are tested to equal the padded ones. Others may mix tokens outside
# of attention (convolutions, recurrent layers) or bring their own attention, as MPNet does.
PACKABLE = ("bert", "llama", "mistral", "modernbert", "qwen2", "qwen3", "roberta", "xlm-roberta")

_IMPLEMENTATION = "reasonembed"
_HALF = (torch.bfloat16, torch.float16)
_KERNEL_HEAD_SIZE = 256
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob")  # of configurations
# Grouped heads have been in the kernel for long; newer releases want to be told.
_TOLD = {"enable_gqa": True}
_GROUPED: dict[str, Any] = _TOLD if "enable_gqa" in signature(varlen_attn).parameters else {}


def use_packing(model: Any, wanted: Packing, *, dtype: torch.dtype | None = None) -> bool:
    """Decides whether forward passes of a model are packed, and readies it for them.

    `auto` packs every family that can be, wherever that is faster: on CPUs, and on GPUs that have
    the kernel in 16 bits. A model that is trained with dropout of its attention weights does not
    use the kernel, and going by length makes a GPU wait in every layer, so it is padded there.

    Args:
        model: A transformers backbone on its device, or one wrapped by peft; in the mode, training
            or evaluation, that it will be used in.
        wanted: `on` and `off` decide by themselves.
        dtype: Of the forward pass; default that of the weights.

    Raises:
        ConfigError: `on` for a family that cannot be packed.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if wanted == "on" and family not in PACKABLE:
        raise ConfigError(
            f"packing: {family} cannot be packed, only {', '.join(PACKABLE)}; choose auto or off"
        )
    if wanted == "off" or family not in PACKABLE:
        return False
    weight = next(model.parameters())
    has_kernel = (dtype or weight.dtype) in _HALF and _is_ampere(weight.device)
    if wanted == "auto" and weight.is_cuda and (not has_kernel or _drops_attention(model)):
        return False
    _register()
    _transformers_model(model).set_attn_implementation(_IMPLEMENTATION)
    return True


def packed_inputs(
    batch: Sequence[TokenIds], *, first_position: int, device: torch.device
) -> dict[str, Any]:
    """What a model readied by `use_packing` takes for one row of texts.

    Args:
        batch: Token ids of B texts, none empty. Texts of equal length should be neighbours.
        first_position: Position of each text's first token.
        device: Of the model.

    Returns:
        `input_ids` and `position_ids` int64 [1, T], the bounds of the texts, and a mask that no
        layer reads: an `attention_mask` of four dimensions is handed through as it is, so that
        none is made.
    """
    lengths = [len(ids) for ids in batch]
    ids_T = flat_ids(batch, total=sum(lengths))
    lengths_B = torch.tensor(lengths)
    ends_B = lengths_B.cumsum(0)
    starts_T = (ends_B - lengths_B).repeat_interleave(lengths_B)
    position_T = torch.arange(len(ids_T)) - starts_T + first_position
    return {
        "input_ids": ids_T[None].to(device),
        "position_ids": position_T[None].to(device),
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "text_bounds": torch.nn.functional.pad(ends_B, (1, 0)).int().to(device),
        "longest_text": max(lengths),
    }


def flat_ids(batch: Iterable[TokenIds], *, total: int) -> Tensor:
    """Token ids of all texts, one after another, int64 [T] on the CPU."""
    ids = np.fromiter(chain.from_iterable(batch), dtype=np.int64, count=total)
    return torch.from_numpy(ids)


def is_causal(model: Any) -> bool:
    """Whether no token sees those after it, in any layer; False where a model does not say."""
    return {_is_causal(m) for m in model.modules() if hasattr(m, "is_causal")} == {True}


def _is_causal(layer: Any) -> bool:
    # By this key of the configuration transformers lets a decoder see both sides.
    both_sides = getattr(getattr(layer, "config", None), "is_causal", True) is False
    return bool(layer.is_causal) and not both_sides


def _transformers_model(model: Any) -> Any:
    from transformers import PreTrainedModel

    return next(m for m in model.modules() if isinstance(m, PreTrainedModel))


def _drops_attention(model: Any) -> bool:
    shares = (getattr(model.config, name, None) or 0 for name in _ATTENTION_DROPOUT)
    return model.training and any(shares)


def _is_ampere(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_IMPLEMENTATION, attend)
    AttentionMaskInterface.register(_IMPLEMENTATION, sdpa_mask)  # for padded batches


def attend(
    module: Any,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    text_bounds: Tensor | None = None,
    longest_text: int = 0,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface: packed where bounds are given, else plain SDPA.

    Args:
        module: Layer that attends; says by `is_causal` whether tokens see those after them.
        query_1HTD: One row of texts; keys and values alike, of K heads.
        key_1KTD: See above.
        value_1KTD: See above.
        attention_mask: Not read in packed rows.
        text_bounds: Where texts begin, and T at the end; int32 [B + 1].
        longest_text: Tokens of the longest text.
        dropout: Share of attention weights that are dropped.
        scaling: Of the scores; default 1/√D.
        sliding_window: Tokens closer than this see one another; default all.
        others: For plain SDPA.

    Returns:
        Mixed values [1, T, H, D], and no attention weights.
    """
    if text_bounds is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        mixed, _ = sdpa_attention_forward(
            module, query_1HTD, key_1KTD, value_1KTD, attention_mask,
            dropout=dropout, scaling=scaling, **others,
        )  # fmt: skip
        return mixed, None
    window = None if sliding_window is None or sliding_window >= longest_text else sliding_window
    heads = (query_1HTD[0], key_1KTD[0], value_1KTD[0])
    if _has_kernel(query_1HTD, dropout=dropout):
        mixed_THD = _kernel(
            *heads, text_bounds, longest_text,
            scale=scaling, causal=_is_causal(module), window=window,
        )  # fmt: skip
    else:
        mixed_THD = _by_length(
            *heads, text_bounds,
            dropout=dropout, scale=scaling, causal=_is_causal(module), window=window,
        )  # fmt: skip
    return mixed_THD[None], None


def _has_kernel(query_1HTD: Tensor, *, dropout: float) -> bool:
    size = query_1HTD.shape[-1]
    is_half = _compute_dtype(query_1HTD) in _HALF
    # The kernel drops nothing: an encoder with dropout of its attention weights is trained by SDPA.
    fits = is_half and dropout == 0 and size <= _KERNEL_HEAD_SIZE and size % 8 == 0
    return fits and _is_ampere(query_1HTD.device)


def _compute_dtype(tensor: Tensor) -> torch.dtype:
    # Under autocast, rotary positions leave queries and keys in float32.
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _kernel(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    bounds_B: Tensor,
    longest: int,
    *,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """Flash attention over texts of any length, [T, H, D]."""
    dtype = _compute_dtype(query_HTD)
    query, key, value = (x.to(dtype).transpose(0, 1) for x in (query_HTD, key_KTD, value_KTD))
    reach = -1 if window is None else window - 1
    mixed = varlen_attn(
        query, key, value, bounds_B, bounds_B, longest, longest,
        scale=scale, window_size=(reach, 0 if causal else reach), **_GROUPED,
    )  # fmt: skip
    return cast(Tensor, mixed)  # a pair only where more is asked for


# Not compiled: it would be anew, for each set of lengths.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _by_length(
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTD: Tensor,
    bounds_B: Tensor,
    *,
    dropout: float,
    scale: float | None,
    causal: bool,
    window: int | None,
) -> Tensor:
    """SDPA of each run of equally long texts, [T, H, D]."""
    runs = [(len(list(run)), length) for length, run in groupby(bounds_B.diff().tolist())]
    sizes = [count * length for count, length in runs]
    # By `split`, whose backward is one concatenation; a slice's is a zero tensor of the full size.
    parts = zip(
        *(torch.split(x, sizes, dim=1) for x in (query_HTD, key_KTD, value_KTD)), strict=True
    )
    mixed = []
    for run, tensors in zip(runs, parts, strict=True):
        query_NHLD, key_NKLD, value_NKLD = (x.unflatten(1, run).transpose(0, 1) for x in tensors)
        band_LL = _band(run[1], causal=causal, window=window, device=query_HTD.device)
        out_NHLD = torch.nn.functional.scaled_dot_product_attention(
            query_NHLD, key_NKLD, value_NKLD,
            attn_mask=band_LL, dropout_p=dropout, scale=scale,
            is_causal=causal and band_LL is None,
            enable_gqa=query_HTD.shape[0] != key_KTD.shape[0],
        )  # fmt: skip
        mixed.append(out_NHLD.transpose(1, 2).flatten(0, 1))
    return torch.cat(mixed)


def _band(length: int, *, causal: bool, window: int | None, device: torch.device) -> Tensor | None:
    """Which tokens see which, bool [L, L]; None if all, or all before them."""
    if window is None or length <= window:
        return None
    position_L = torch.arange(length, device=device)
    distance_LL = position_L[:, None] - position_L[None]
    near_LL = distance_LL.abs() < window
    return near_LL & (distance_LL >= 0) if causal else near_LL
