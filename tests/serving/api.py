"""An app over embeddings of hashes, for tests of what stands before them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from starlette.testclient import TestClient

from reasonembed.config import ServeConfig
from reasonembed.serving.app import create_app
from reasonembed.serving.errors import ApiError
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import EmbedItem, Forwarded, Prepared, ServedModel, Vectors
from reasonembed.serving.service import Embedded, EmbeddingService, Timings

DIMENSION = 24
LIMIT = 10
MODEL = ServedModel(
    name="hash",
    fingerprint="f" * 8,
    dimension=DIMENSION,
    dimensions=(8,),
    max_query_tokens=LIMIT,
    max_document_tokens=LIMIT,
    vocabulary_size=100,
    created=7,
    default_instruction="Find.",
    aliases=("org/hash",),
    is_checked=True,
)


class Words:
    """Words as tokens; the id of one is its length."""

    def prepare(self, items: Sequence[EmbedItem]) -> list[Prepared]:
        return [self._one(item) for item in items]

    def tokenise(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def detokenise(self, ids: Sequence[int]) -> list[str]:
        return ["x" * one for one in ids]

    def _one(self, item: EmbedItem) -> Prepared:
        content = item.content
        ids = content if isinstance(content, tuple) else tuple(self.tokenise(content))
        template = (1, 2) if item.role == "query" else ()
        return Prepared((*template, *ids)[:LIMIT], is_truncated=len(template + ids) > LIMIT)


class Hashes:
    """In place of the embedder and of the service over it.

    Every vector depends on its item alone. A text that holds "poison" fails.
    """

    model, preparer = MODEL, Words()
    tokens_per_s, queued_tokens = 1_000.0, 0

    def __init__(self) -> None:
        self.embedder = self
        self.items: list[EmbedItem] = []
        self.last_success: float | None = None

    async def tokenise(self, texts: Sequence[str], work: Any) -> Any:
        return work()

    def check_size(self, tokens: int) -> None:
        pass

    async def embed(
        self, items: Sequence[Any], *, param: str = "input", cutting: str = "", flow: str = ""
    ) -> Embedded | Forwarded:
        if flow:
            return Forwarded(np.zeros((len(items), DIMENSION), np.float32))
        self.items += items
        prepared = self.preparer.prepare(items)
        for index, (item, one) in enumerate(zip(items, prepared, strict=True)):
            if "poison" in str(item.content):
                raise ApiError(500, f"{param}[{index}]: the model failed on it", param=param)
            if one.is_truncated and item.truncate == "none":
                message = f"{param}[{index}]: longer than {LIMIT} tokens; {cutting}"
                raise ApiError(400, message, param=param)
        if "explode" in str(items[0].content):
            raise RuntimeError(str(items))
        return Embedded(
            vectors_ND=np.stack([vector_of(item) for item in items]),
            num_tokens=tuple(len(one.ids) for one in prepared),
            truncated=tuple(index for index, one in enumerate(prepared) if one.is_truncated),
            timings=Timings(0.001, 0.002, 0.003),
        )


def vector_of(item: EmbedItem) -> Vectors:
    """The vector that an item gets."""
    seed = hashlib.blake2b(repr(item).encode()).digest()
    vector = np.random.default_rng(list(seed)).standard_normal(DIMENSION, dtype=np.float32)
    return vector / np.linalg.norm(vector)


def hash_service(embeddings: Any = None, **fields: Any) -> Service:
    """Parts of an app over hashes; `fields` are a `ServeConfig`'s."""
    settings = ServeConfig(model="echo", allow_anonymous=True, **fields)
    made = cast(EmbeddingService, embeddings or Hashes())
    return Service(made, settings, Metrics(), version="1.2.3")


def hash_client(embeddings: Any = None, **fields: Any) -> TestClient:
    """A client of such an app; failures are answers."""
    app = create_app(hash_service(embeddings, **fields))
    return TestClient(app, raise_server_exceptions=False)


def assert_error(
    response: Any, status: int, *, param: str | None = None, code: str | None = None
) -> str:
    """The message of an answer, which must be an error of OpenAI's shape."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, code), error
    assert error["message"]
    assert error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
    return str(error["message"])
