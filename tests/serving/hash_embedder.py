from __future__ import annotations

import hashlib

import numpy as np

from reasonembed.serving.protocol import EmbedItem, EmbedResult, ItemError, Outcome

DIMENSION = 24
LIMIT = 10


class HashEmbedder:
    """A vector that depends on the item alone; counts words as tokens.

    A text that holds "poison" makes its whole batch fail, "nan" gives a vector that is not finite.
    """

    def __init__(self) -> None:
        self.batches: list[list[EmbedItem]] = []

    async def embed(self, items: list[EmbedItem]) -> list[Outcome]:
        self.batches.append(items)
        if any("poison" in str(item.content) for item in items):
            raise RuntimeError("the model broke")
        return [self.outcome(item) for item in items]

    def outcome(self, item: EmbedItem) -> Outcome:
        content = item.content
        words = content.split() if isinstance(content, str) else list(content)
        if len(words) > LIMIT and item.truncate == "none":
            return ItemError(f"longer than the limit of {LIMIT} tokens", is_callers_fault=True)
        seed = hashlib.blake2b(repr((item.role, item.instruction, words[:LIMIT])).encode())
        rng = np.random.default_rng(list(seed.digest()))
        vector = rng.standard_normal(DIMENSION, dtype=np.float32)
        if content == "nan":
            vector[3] = np.nan
        return EmbedResult(vector, len(words[:LIMIT]), is_truncated=len(words) > LIMIT)
