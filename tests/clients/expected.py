"""What the tests serve, and how vectors are compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

PACKAGED = "all-minilm-l6-v2"
LIMIT = 64
SERVE = {
    "model": PACKAGED,
    "name": "minilm",
    "aliases": ["org/minilm"],
    "encoder": {
        "model": PACKAGED,
        "pooling": "mean",
        # An instruction, so that queries and documents differ as those of our own models do.
        "query_template": "Instruct: {instruction}\nQuery: {query}",
        "max_query_tokens": LIMIT,
        "max_document_tokens": LIMIT,
    },
    "dimensions": [128],
}
DOCUMENTS = {
    "leaf": "A layer of cells forms at the base of each leaf in autumn and cuts it off.",
    "moss": "Moss holds water like a sponge and has no roots at all.",
    "tax": "Taxes pay for roads, bridges and the people who mend them.",
    "root": "Roots hold the soil in place when heavy rain falls on a slope.",
    "bread": "Yeast eats sugar and gives off gas, which makes the dough rise.",
    "moon": "The moon pulls at the oceans, and the water rises twice a day.",
}


@dataclass(frozen=True)
class Computed:
    """What the embedder gives without a server.

    Attributes:
        path: Folder of the weights.
        vectors: float32 [N, D].
        ids: Token ids, one list a text.
    """

    path: Path
    vectors: np.ndarray
    ids: list[list[int]]


def cosines(one: object, other: object) -> np.ndarray:
    """Of vectors with vectors, row by row."""
    a, b = (np.atleast_2d(np.asarray(side, dtype=np.float64)) for side in (one, other))
    assert a.shape == b.shape
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


def same(one: object, other: object) -> bool:
    """Whether vectors are equal but for the order of float32 sums in another batch."""
    return bool((cosines(one, other) >= 1 - 1e-6).all())
