"""Indexes over a few documents in memory, and a service that searches them."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from reasonembed.config import EchoConfig, ServeConfig
from reasonembed.index import exact
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.store import BenchmarkQuery
from reasonembed.serving.app import create_app
from reasonembed.serving.echo import VOCABULARY_SIZE, EchoModel
from reasonembed.serving.indexes import ServedIndex
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import (
    EmbedItem,
    Forwarded,
    IndexInfo,
    Prepared,
    ServedModel,
    StoredDocument,
)
from reasonembed.serving.search import SearchService
from reasonembed.serving.service import EmbeddingService

LIMIT = 40
INSTRUCTION = "Find what helps."
MODEL = ServedModel(
    name="echo",
    fingerprint="f",
    dimension=64,
    max_query_tokens=LIMIT,
    max_document_tokens=LIMIT,
    vocabulary_size=VOCABULARY_SIZE,
    created=7,
    default_instruction="Find.",
    aliases=("org/echo",),
)
DOCUMENTS = [
    StoredDocument("leaf-1", "trees lose their leaves in autumn when days get short"),
    StoredDocument("leaf-2", "Abscission\na layer of cells cuts the leaf off", "Abscission"),
    StoredDocument("leaf-copy", "trees lose their leaves in autumn when days get short"),
    StoredDocument("moss/a b", "moss holds water and has no roots at all"),
    StoredDocument("road", "taxes pay for the road and the bridge"),
    StoredDocument("root", "roots hold the soil in place when rain falls"),
    StoredDocument("soil", "rain carries the soil away where trees are gone"),
]
QUERIES = [
    "why do trees lose their leaves in autumn",
    "what holds the soil when rain falls",
    "who pays for the road",
]
GOLD = [
    BenchmarkQuery("q1", QUERIES[0], {"leaf-1": 1, "leaf-2": 2}, ("leaf-copy",)),
    BenchmarkQuery("q2", QUERIES[1], {"root": 1}),
]


class Direct:
    """In place of replicas: embeds at once."""

    def __init__(self, model: EchoModel) -> None:
        self.model = model
        self.calls: list[int] = []

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        self.calls.append(len(inputs))
        return Forwarded(self.model.forward(list(inputs)))


def echo_embeddings(**limits: Any) -> EmbeddingService:
    """The real service over hashes."""
    model = EchoModel(EchoConfig(max_tokens=LIMIT), default_instruction="Find.")
    settings = ServeConfig(model="echo", limits=limits)
    return EmbeddingService(
        MODEL, model, Direct(model), limits=settings.limits, cache_mib=0, metrics=Metrics()
    )


def vectors_of(texts: Sequence[str], *, instruction: str | None = None) -> np.ndarray[Any, Any]:
    """Vectors of documents, or of queries where an instruction is given."""
    model = EchoModel(EchoConfig(max_tokens=LIMIT), default_instruction="Find.")
    role: Any = "document" if instruction is None else "query"
    prepared = model.prepare([EmbedItem(one, role, instruction, "end") for one in texts])
    return model.forward([one for one in prepared if isinstance(one, Prepared)])


class ShelfPart:
    """A part of an index in memory."""

    def __init__(
        self, documents: Sequence[StoredDocument], *, start: int = 0, stop: int | None = None
    ) -> None:
        self._documents, self._start = documents, start
        self._stop = len(documents) if stop is None else stop
        self._vectors = vectors_of([one.text for one in documents])[start : self._stop]
        self._bm25 = BM25Index([one.text for one in documents])
        self.failure: Exception | None = None
        self.read: list[int] = []

    async def dense(
        self, queries_QD: Any, *, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Any, Any]:
        self._fail()
        shut = [
            [one - self._start for one in self._copies(ids) if self._start <= one < self._stop]
            for ids in excluded
        ]
        scores, positions = exact.search(queries_QD, self._vectors, k=k, excluded=shut)
        return scores, np.where(positions >= 0, positions + self._start, positions)

    async def bm25(
        self, texts: Sequence[str], *, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Any, Any]:
        self._fail()
        return self._bm25.search(texts, k=k, excluded=[self._copies(ids) for ids in excluded])

    async def doc_ids(self, positions: Sequence[int]) -> list[str]:
        return [self._documents[one].doc_id for one in positions]

    async def documents(self, positions: Sequence[int]) -> list[StoredDocument]:
        self.read += positions
        return [self._documents[one] for one in positions]

    async def find(self, doc_ids: Sequence[str]) -> list[int | None]:
        self._fail()
        known = {one.doc_id: place for place, one in enumerate(self._documents)}
        return [known.get(one) for one in doc_ids]

    def _copies(self, doc_ids: Sequence[str]) -> list[int]:
        texts = {one.text for one in self._documents if one.doc_id in doc_ids}
        return [place for place, one in enumerate(self._documents) if one.text in texts]

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


def shelf(
    name: str = "garden",
    *,
    documents: Sequence[StoredDocument] = DOCUMENTS,
    parts: int = 1,
    instruction: str | None = INSTRUCTION,
    kinds: tuple[str, ...] = ("dense", "bm25", "hybrid"),
) -> ServedIndex:
    """An index, cut into parts."""
    info = IndexInfo(name, len(documents), 64, "echo", "f", "biology", instruction, kinds)
    borders = np.linspace(0, len(documents), parts + 1).astype(int).tolist()
    made = [ShelfPart(documents, start=start, stop=stop) for start, stop in pairwise(borders)]
    return ServedIndex(info, made, queries=GOLD)


class Rewrites:
    """q′ by adding words; a query with `dumb` in it has none."""

    def __init__(self) -> None:
        self.asked: list[tuple[tuple[str, ...], str]] = []
        self.failure: Exception | None = None

    async def rewrite(self, queries: Sequence[str], *, task: str) -> list[str | None]:
        self.asked.append((tuple(queries), task))
        if self.failure is not None:
            raise self.failure
        return [None if "dumb" in one else f"{one} abscission layer of cells" for one in queries]


class Grades:
    """Grades that follow from the text's hash; a document with `moss` in it has none."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int, str]] = []
        self.failure: Exception | None = None

    async def grade(self, query: str, documents: Sequence[str], *, task: str) -> list[float | None]:
        self.asked.append((query, len(documents), task))
        if self.failure is not None:
            raise self.failure
        return [grade_of(one) for one in documents]


def grade_of(text: str) -> float | None:
    """1, 1.5, … 5."""
    if "moss" in text:
        return None
    return 1 + hashlib.blake2b(text.encode(), digest_size=1).digest()[0] % 9 / 2


def shelf_service(
    *indexes: ServedIndex,
    rewriting: Any = None,
    grading: Any = None,
    embeddings: EmbeddingService | None = None,
    **fields: Any,
) -> Service:
    """The parts of an app; `fields` are a `ServeConfig`'s."""
    if grading is not None:
        llm = {"model": "judge", "engine": "scripted"}
        fields.setdefault("rerank", {"llm": llm, "max_document_words": 8})
    settings = ServeConfig(model="echo", allow_anonymous=True, **fields)
    embeddings = embeddings or echo_embeddings()
    search = SearchService(
        embeddings,
        {one.info.name: one for one in indexes},
        rewriting=rewriting,
        grading=grading,
        limits=settings.limits,
    )
    return Service(embeddings, settings, Metrics(), search=search)


def shelf_client(*indexes: ServedIndex, **fields: Any) -> TestClient:
    """A client of such an app; failures are answers."""
    app = create_app(shelf_service(*indexes, **fields))
    return TestClient(app, raise_server_exceptions=False)


def run(call: Any) -> Any:
    """The result of a coroutine."""
    return asyncio.run(call)
