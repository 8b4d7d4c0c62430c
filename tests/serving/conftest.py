from __future__ import annotations

import pytest

from reasonembed.serving.protocol import ServedModel
from tests.serving.hash_embedder import DIMENSION, LIMIT, HashEmbedder


@pytest.fixture
def embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def model() -> ServedModel:
    return ServedModel(
        name="hash",
        dimension=DIMENSION,
        max_query_tokens=LIMIT,
        max_document_tokens=LIMIT,
        vocabulary_size=100,
        created=0,
    )
