"""Vectors after the model: cut to a shorter length, or to the signs of their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from reasonembed.serving.errors import ApiError
from reasonembed.serving.protocol import ServedModel, Vectors


def check_dimensions(wanted: int | None, model: ServedModel, *, param: str) -> int:
    """Length of the vectors that a request gets.

    Raises:
        ApiError: 400: the model was not trained for it.
    """
    offered = allowed_dimensions(model)
    if wanted is not None and wanted not in offered:
        listed = ", ".join(str(one) for one in offered)
        raise ApiError(
            400,
            f"{param}: {model.name} has vectors of these lengths: {listed}; leave it out for "
            f"{model.dimension}",
            param=param,
        )
    return wanted or model.dimension


def allowed_dimensions(model: ServedModel) -> list[int]:
    """Lengths that may be asked for, ascending."""
    return sorted({*model.dimensions, model.dimension})


def cut(vectors_ND: Vectors, dimension: int) -> Vectors:
    """First numbers of each vector, with norm 1 again; zero vectors stay zero.

    Args:
        vectors_ND: float32; returned as it is where it has that length.
        dimension: Of the result.
    """
    if dimension == vectors_ND.shape[1]:
        return vectors_ND
    short = vectors_ND[:, :dimension]
    norms = np.linalg.norm(short.astype(np.float64), axis=1, keepdims=True)
    scaled: Vectors = (short / np.where(norms == 0, 1, norms)).astype(np.float32)
    return scaled


def signs(vectors_ND: Vectors, *, signed: bool) -> np.ndarray[Any, np.dtype[Any]]:
    """Whether each number is positive, eight a byte, the first in the highest bit.

    Args:
        vectors_ND: Their length must divide by 8.
        signed: As int8, which is the unsigned byte less 128 ("offset binary"), else as uint8.
    """
    packed = np.packbits(vectors_ND > 0, axis=1)
    return (packed.astype(np.int16) - 128).astype(np.int8) if signed else packed
