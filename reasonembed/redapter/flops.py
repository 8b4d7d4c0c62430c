"""How much work a step is, from the architecture alone; see `Work`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reasonembed.embedder.packing import is_causal

if TYPE_CHECKING:
    from reasonembed.redapter.step import LocalBatch


@dataclass(frozen=True)
class Work:
    """Floating point operations that a model needs, an addition and a multiplication being two.

    A text of n tokens takes 2 P n + A n² forward: P weights of matrices and, for QKᵀ and AV in
    each layer, A = 4 · layers · heads · head size, half of it where attention is causal. Backward
    takes the same once for the gradient of the activations, twice in attention, and once more in P
    for the gradient of the weights if all are trained. Adapters themselves, norms and embeddings
    are left out: under 2 %.

    Only what the method needs counts. What memory costs, the second forward pass of the gradient
    cache or of activation checkpointing, lowers the share of the peak, and so does padding.

    Attributes:
        weights: P.
        attention: A.
        trains_all: Whether gradients of P are needed, and not of adapters alone.
    """

    weights: int
    attention: float
    trains_all: bool

    @classmethod
    def of(cls, model: Any, *, trains_all: bool) -> Work:
        """The work of a transformers model, with or without peft's adapters."""
        weights = sum(
            parameter.numel()
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and "embed" not in name and "lora_" not in name
        )
        config = model.config
        head = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        attention = 4.0 * config.num_hidden_layers * config.num_attention_heads * head
        return cls(weights, attention / 2 if is_causal(model) else attention, trains_all)

    def forward(self, lengths: Iterable[int]) -> float:
        """Operations of one forward pass over texts of so many tokens."""
        return sum(2.0 * self.weights * n + self.attention * n * n for n in lengths)

    def backward(self, lengths: Iterable[int]) -> float:
        """Operations of the backward pass that belongs to it."""
        passes = 2 if self.trains_all else 1
        return sum(2.0 * passes * self.weights * n + 2 * self.attention * n * n for n in lengths)

    def step(self, batch: LocalBatch) -> float:
        """Operations of a worker's share: q and passages both ways, q′ forward only."""
        trained = [len(ids) for ids in (*batch.queries, *batch.passages)]
        rewritten = [len(ids) for ids in batch.rewritten_queries]
        return self.forward(trained) + self.backward(trained) + self.forward(rewritten)
