"""The arithmetic of work, memory and traffic; every figure of a plan comes from here.

Forward, an addition and a multiplication being two: 2 N + 2 L d s̄ operations a token, N weights of
matrices, L layers, d = heads x head size, s̄ the mean length of a text under causal attention (twice
that where tokens see all others), and 2 h V where logits are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from reasonembed.planner.shapes import ModelShape

FORWARD_AND_BACKWARD = 3
_OPTIMIZER_BYTES = 16  # of a trained weight: bf16 and its gradient, fp32 copy and two moments


def forward(shape: ModelShape, *, mean_length: float, is_causal: bool | None = None) -> float:
    """Operations a token of a forward pass over texts of so many tokens."""
    causal = shape.is_causal if is_causal is None else is_causal
    width = shape.layers * shape.attention_width
    return 2 * shape.active_weights + (2 if causal else 4) * width * mean_length


def logits(shape: ModelShape) -> float:
    """Operations of one token's scores over the vocabulary."""
    return 2.0 * shape.embedding


def training_passes(*, is_lora: bool, recomputes: bool = False, cache_share: float = 0.0) -> float:
    """Forward passes that a trained token costs.

    Backward takes two where all weights are trained and one where adapters are: gradients of the
    frozen matrices themselves are not needed.

    Args:
        is_lora: Whether adapters alone are trained.
        recomputes: Activations are computed again in the backward pass (checkpointing).
        cache_share: Of the tokens, those embedded once more for the gradient cache: (K - 1) / K of
            K chunks, since the last one keeps its graph (arXiv:2101.06983).
    """
    return (2 if is_lora else FORWARD_AND_BACKWARD) + recomputes + cache_share


def training_flops(shape: ModelShape, *, tokens: float, mean_length: float, passes: float) -> float:
    """Operations of training on so many tokens; `passes` of `training_passes`."""
    return tokens * passes * forward(shape, mean_length=mean_length)


def prompt_tokens_a_pair(
    *, template: float, query: float, document: float, pairs_a_query: float, caching: str
) -> float:
    """Tokens that are computed of the question about one pair; the rest is in the prefix cache.

    Args:
        template: Tokens of the instructions, which stand first.
        query: Tokens of the query, which stands second.
        document: Tokens of the document, which stands last.
        pairs_a_query: Documents judged for one query, side by side.
        caching: `none`, `template`, or `query-first`: template and query are shared.
    """
    if caching == "none":
        return template + query + document
    if caching == "template":
        return query + document
    return query / pairs_a_query + document


@dataclass(frozen=True)
class Device:
    """What one accelerator can do; a CPU machine counts as one.

    Attributes:
        name: Such as `H100`.
        flops: Operations a second, dense bfloat16.
        bandwidth: Bytes a second of its memory.
        memory: Bytes.
        interconnect: Bytes a second to its neighbours in one machine.
        is_gpu: Whether it is one.
    """

    name: str
    flops: float
    bandwidth: float
    memory: float
    interconnect: float = 12e9
    is_gpu: bool = True


@dataclass(frozen=True)
class Decode:
    """Writing tokens on one engine.

    Attributes:
        batch: Texts written at once.
        step_s: Seconds of a step, which adds a token to each.
        bytes_a_step: Moved over the memories of the engine's devices.
        bound: `bytes` or `operations`: what takes longer.
        fits: Texts that memory has room for.
    """

    batch: float
    step_s: float
    bytes_a_step: float
    bound: str
    fits: float

    @property
    def tokens_per_s(self) -> float:
        """Of the engine."""
        return self.batch / self.step_s


def memory_batch(
    shape: ModelShape,
    device: Device,
    *,
    context: float,
    devices: int = 1,
    weight_bits: int = 16,
    kv_bits: int = 16,
    share: float = 0.9,
) -> float:
    """Texts of a mean length whose keys and values fit beside the weights; 0 where none does."""
    room = devices * device.memory * share - shape.weights * weight_bits / 8
    return max(0.0, room / (context * shape.kv_bytes(bits=kv_bits)))


def decode(
    shape: ModelShape,
    device: Device,
    *,
    context: float,
    devices: int = 1,
    weight_bits: int = 16,
    kv_bits: int = 16,
    share: float = 0.9,
    most: float = math.inf,
) -> Decode:
    """A step takes max((W + B·ctx·kv) / bandwidth, B·f / operations).

    W is what is read in a step: all matrices and the output table, not the input table, of which a
    row a text is looked up.

    Args:
        shape: The model.
        device: One of the engine's.
        context: Mean tokens that a text has while it is written.
        devices: Of one engine (tensor parallel).
        weight_bits: Of a weight.
        kv_bits: Of keys and values.
        share: Of memory that the engine may take.
        most: Texts at once by configuration.
    """
    fits = memory_batch(
        shape, device, context=context, devices=devices, weight_bits=weight_bits, kv_bits=kv_bits,
        share=share,
    )  # fmt: skip
    batch = max(1.0, min(fits, most))
    kept = (shape.inner_weights + shape.embedding) * weight_bits / 8
    moved = kept + batch * context * shape.kv_bytes(bits=kv_bits)
    each = forward(shape, mean_length=context) + logits(shape)
    seconds = {
        "bytes": moved / (devices * device.bandwidth),
        "operations": batch * each / (devices * device.flops),
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return Decode(batch, seconds[bound], moved, bound, fits)


def training_memory(
    shape: ModelShape, *, is_lora: bool, dtype_bytes: int, workers: int, is_sharded: bool
) -> float:
    """Bytes that weights, gradients and optimizer take on each worker, activations not counted."""
    if is_lora:
        adapters = 0.02 * shape.inner_weights * _OPTIMIZER_BYTES
        return shape.weights * dtype_bytes / (workers if is_sharded else 1) + adapters
    return shape.weights * _OPTIMIZER_BYTES / (workers if is_sharded else 1)


def fsdp_traffic(shape: ModelShape) -> float:
    """Bytes a worker and step in bfloat16: all weights gathered twice, gradients scattered once."""
    return 3 * 2.0 * shape.weights


def hidden_from(shape: ModelShape, device: Device, *, passes: float, utilisation: float) -> float:
    """Tokens a worker and step from which computing hides the traffic of sharded training."""
    seconds = fsdp_traffic(shape) / device.interconnect
    return seconds * device.flops * utilisation / (passes * 2 * shape.active_weights)
