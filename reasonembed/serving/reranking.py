"""Who orders documents by their relevance to a query, and how cosines are computed."""

from __future__ import annotations

from typing import Literal

import numpy as np

from reasonembed.serving.errors import ApiError
from reasonembed.serving.protocol import Scores, ServedModel, Vectors

Reranker = Literal["cosine", "annotator"]
"""Who orders documents: the served embedder, or the LLM that grades."""

LOWEST_COSINE = -1.0
ANNOTATOR = "annotator"
"""Suffix of the served model's name that stands for the annotator."""


def reranker(
    name: str | None,
    *,
    model: ServedModel,
    annotator: str | None,
    default: Reranker,
    param: str = "model",
) -> Reranker:
    """Who is meant by a request's `model`.

    Args:
        name: The served model's name or an alias, one of these with `:annotator`, or the
            annotator's own; None for the default.
        model: What is served.
        annotator: The annotator's name; None where there is none.
        default: Where no name is given.
        param: The request's field, for the message.

    Raises:
        ApiError: 404 nobody has that name.
    """
    if name is None:
        return default
    names = (model.name, *model.aliases)
    if name in names:
        return "cosine"
    if annotator is not None and name in (annotator, *(f"{one}:{ANNOTATOR}" for one in names)):
        return "annotator"
    grades = f", and {model.name}:{ANNOTATOR} for grades" if annotator else ""
    message = f"no reranker of that name; there is {model.name!r} for cosines{grades}"
    raise ApiError(404, message, param=param, code="model_not_found")


def cosines(queries: Vectors, documents_ND: Vectors) -> Scores:
    """Cosine of a query with each document, or row by row; float32, 0 with a vector of zeros.

    Summed in float64, row by row, so that a cosine does not depend on the other documents.

    Args:
        queries: float32; one vector [D] for all documents, or one for each [N, D].
        documents_ND: float32.
    """
    left, documents = queries.astype(np.float64), documents_ND.astype(np.float64)
    norms = np.linalg.norm(documents, axis=1) * np.linalg.norm(left, axis=-1)
    products = (documents * left).sum(axis=1)
    scores = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return np.asarray(scores, dtype=np.float32)
