"""Requests for documents: rewrite, encode, search, fuse, rerank."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from reasonembed.config import LimitsConfig
from reasonembed.index.exact import NO_DOCUMENT
from reasonembed.index.fusion import rrf
from reasonembed.serving.concurrency import VECTOR, aside, together
from reasonembed.serving.errors import ApiError, unavailable
from reasonembed.serving.indexes import Found as _Found
from reasonembed.serving.indexes import ServedIndex
from reasonembed.serving.places import Places
from reasonembed.serving.protocol import (
    EmbedItem,
    Grading,
    IndexInfo,
    Rewriting,
    StoredDocument,
    Unavailable,
    Vectors,
)
from reasonembed.serving.reranking import LOWEST_COSINE, cosines
from reasonembed.serving.searches import Asked, Found, Hit, Kind, Searched, Wanted
from reasonembed.serving.service import Embedded, EmbeddingService, Timings
from reasonembed.tasks import TASKS

log = logging.getLogger(__name__)

FUSION_DEPTH = 100
"""Results of each retriever that a hybrid search fuses, where no more are asked for."""
NO_INDEX = "this service has no index; give it one with --index"
_CHARACTERS_A_TOKEN = 16  # of a query that is read before it is cut into tokens; 4 are usual
_READ = 512  # documents of a call: others' come in between, and their sizes are counted in no time
_GRADED = 4  # largest requests whose documents the annotator may have before it
_REWRITTEN = 256  # queries that the LLM may have before it: some minutes of its work
_PARTS = ("tokenize", "rewrite", "encode", "search", "rerank")
_KINDS: tuple[Kind, ...] = ("dense", "bm25", "hybrid")


class SearchService:
    """Searches in the indexes of a service.

    Args:
        embeddings: Embeds the queries.
        indexes: By name.
        rewriting: Writes q′, if configured.
        grading: Judges documents, if configured.
        limits: What a request may ask for, and how many may be under way.

    Attributes:
        embeddings: As given.
        indexes: As given.
        rewriting: As given.
        grading: As given.
        places: Of queries that are searched for.
        graded: Of documents before the annotator, whoever asks for their grades.
        rewritten: Of queries before the LLM.
    """

    def __init__(
        self,
        embeddings: EmbeddingService,
        indexes: Mapping[str, ServedIndex],
        *,
        rewriting: Rewriting | None = None,
        grading: Grading | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        self.embeddings, self.indexes = embeddings, dict(indexes)
        self.rewriting, self.grading = rewriting, grading
        self._limits = limits = limits or LimitsConfig()
        self.places = Places(limits.max_queued_searches, what="queries")
        self.graded = Places(_GRADED * limits.max_rerank_documents, what="documents to grade")
        self.rewritten = Places(_REWRITTEN, what="queries to rewrite")

    def index(self, name: str | None) -> ServedIndex:
        """The index of that name; None for the only one.

        Raises:
            ApiError: 404 there is none of that name, 400 one of several must be named.
        """
        if not self.indexes:
            raise ApiError(404, NO_INDEX, param="index", code="index_not_found")
        names = ", ".join(sorted(self.indexes))
        if name is None and len(self.indexes) > 1:
            raise ApiError(400, f"name one of the indexes: {names}", param="index")
        served = next(iter(self.indexes.values())) if name is None else self.indexes.get(name)
        if served is None:
            message = f"unknown index {(name or '')[:80]!r}; there are: {names}"
            raise ApiError(404, message, param="index", code="index_not_found")
        return served

    async def search(
        self, index: str | None, asked: Sequence[Asked], *, wanted: Wanted
    ) -> Searched:
        """Searches one index.

        Args:
            index: Its name; None for the only one.
            asked: Each has its own results.
            wanted: What they have in common.

        Raises:
            ApiError: 404 no such index, 400 it cannot be searched so, 429 too much is under way,
                503 it cannot answer now, and as `EmbeddingService.embed`.
        """
        served = self.index(index)
        kind = self._kind(served.info, wanted)
        self._check_amount(asked, wanted)
        self._check_instructions(asked)
        asked = self._readable(asked, kind, wanted)
        if not asked:
            return Searched(served.info, kind, (), dict.fromkeys(_PARTS, 0.0), 0)
        try:
            with self._room(len(asked), wanted):
                return await _Search(self, served, kind, asked, wanted).run()
        except Unavailable as error:
            message = f"index {served.info.name!r} cannot be searched so now: {error}"
            raise unavailable(message) from error

    async def document(self, index: str | None, doc_id: str) -> StoredDocument:
        """The document of that id.

        Raises:
            ApiError: 404 no such index or document, 503 the index cannot answer now.
        """
        served = self.index(index)
        try:
            (position,) = await served.find([doc_id])
            if position is None:
                message = f"index {served.info.name!r} has no document {doc_id[:80]!r}"
                raise ApiError(404, message, param="id", code="document_not_found")
            (document,) = await served.documents([position])
        except Unavailable as error:
            raise unavailable(f"index {served.info.name!r} cannot answer now: {error}") from error
        return document

    def _kind(self, info: IndexInfo, wanted: Wanted) -> Kind:
        """How to search, where what is wanted can be had.

        Raises:
            ApiError: 400 it cannot.
        """
        kind = wanted.kind or next(kind for kind in _KINDS if kind in info.kinds)
        if kind not in info.kinds:
            message = f"index {info.name!r} has no {kind} search; it has: {', '.join(info.kinds)}"
            raise ApiError(400, message, param="kind")
        if wanted.rewrite and self.rewriting is None:
            message = "no LLM is configured to rewrite queries; start the service with `rewrite:`"
            raise ApiError(400, message, param="rewrite")
        if wanted.is_graded and self.grading is None:
            message = "no annotator is configured; rerank by cosine, or start it with `rerank:`"
            raise ApiError(400, message, param="rerank.model")
        if wanted.rerank and wanted.num_reranked < wanted.top_k:
            message = f"rerank.depth {wanted.num_reranked} is less than top_k {wanted.top_k}"
            raise ApiError(400, message, param="rerank.depth")
        return kind

    def _check_amount(self, asked: Sequence[Asked], wanted: Wanted) -> None:
        """Refuses what would cost too much, or be too large an answer.

        Raises:
            ApiError: 400: it would.
        """
        limits, number = self._limits, len(asked)
        k, depth = wanted.top_k, wanted.num_reranked
        if k > limits.max_top_k:
            message = f"{wanted.top_k_param} {k} is more than {limits.max_top_k}"
            raise ApiError(400, message, param=wanted.top_k_param)
        num_excluded = sum(len(one.excluded_ids) for one in asked)
        for size, limit, what, param in (
            (number * k, limits.max_hits, f"{k} hits each", wanted.top_k_param),
            (number * depth, limits.max_rerank_documents, f"{depth} to rerank", "rerank.depth"),
            (num_excluded, limits.max_excluded_ids, "their excluded ids", "excluded_ids"),
        ):
            if size > limit:
                message = (
                    f"{number} queries with {what} make {size}, over the limit of {limit} a "
                    "request; ask for less, or send fewer queries at once"
                )
                raise ApiError(400, message, param=param)

    def _check_instructions(self, asked: Sequence[Asked]) -> None:
        """Refuses instructions that the model does not take, before anything is paid for.

        Raises:
            ApiError: 400: there is one.
        """
        model = self.embeddings.model
        if not model.takes_instruction and any(one.instruction is not None for one in asked):
            message = f"instruction: {model.name} takes no instruction; leave it out"
            raise ApiError(400, message, param="instruction")

    @property
    def longest_query(self) -> int:
        """Characters of a query that words are searched with or an LLM reads, which take it whole.

        An annotator reads it again with every document.
        """
        return self.embeddings.model.max_query_tokens * _CHARACTERS_A_TOKEN

    def check_size(self, num_bytes: int, wanted: Wanted) -> None:
        """Refuses what no answer may hold.

        Raises:
            ApiError: 400: the hits' documents are too large together.
        """
        limit = self._limits.max_answer_bytes
        if num_bytes > limit:
            message = (
                f"the documents of the hits make more than {limit} bytes (max_answer_bytes); ask "
                "for fewer hits, send fewer queries at once, or read documents one by one"
            )
            raise ApiError(400, message, param=wanted.top_k_param)

    def _readable(self, asked: Sequence[Asked], kind: Kind, wanted: Wanted) -> Sequence[Asked]:
        """Queries no longer than makes sense where other readers than the embedder take them whole.

        Raises:
            ApiError: 400 one is longer and may not be cut.
        """
        limit = self.longest_query
        if kind == "dense" and not wanted.rewrite and not wanted.is_graded:
            return asked
        for number, one in enumerate(asked):
            if len(one.query) > limit and wanted.truncate == "none":
                message = (
                    f"{wanted.param}[{number}]: longer than the limit of {limit} characters of a "
                    "query that is searched by words, rewritten or graded by; shorten it, or set "
                    "truncate"
                )
                raise ApiError(400, message, param=wanted.param)
        kept = slice(-limit, None) if wanted.truncate == "start" else slice(limit)
        return [replace(one, query=one.query[kept], is_cut=len(one.query) > limit) for one in asked]

    @contextmanager
    def _room(self, number: int, wanted: Wanted) -> Iterator[None]:
        """Places for all that a request needs, so that none is refused half way.

        Raises:
            ApiError: 429 there are too few.
        """
        with ExitStack() as room:
            room.enter_context(self.places.take(number))
            if wanted.rewrite:
                room.enter_context(self.rewritten.take(number))
            if wanted.is_graded:
                room.enter_context(self.graded.take(number * wanted.num_reranked))
            yield


class _Candidate(NamedTuple):
    """A result before the cut; `score` is the search's or the cosine reranker's."""

    position: int
    doc_id: str
    score: float
    grade: float | None = None


@dataclass
class _Search:
    """One request on its way through the parts."""

    service: SearchService
    served: ServedIndex
    kind: Kind
    asked: Sequence[Asked]
    wanted: Wanted
    timings_ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_PARTS, 0.0))
    num_tokens: int = 0
    truncated: frozenset[int] = frozenset()
    timings: Timings = field(default_factory=Timings)
    documents: dict[int, StoredDocument] = field(default_factory=dict)
    num_bytes: int = 0

    async def run(self) -> Searched:
        """The answer."""
        rewritten = await self._rewrite()
        texts = [new or one.query for new, one in zip(rewritten, self.asked, strict=True)]
        vectors_QD = await self._encode(texts, rewritten)
        with self._timed("search"):
            unknown = await self._unknown_excluded()
            candidates = await self._candidates(texts, vectors_QD)
        with self._timed("rerank"):
            candidates = await self._rerank(candidates, vectors_QD)
        hits = await self._hits([row[: self.wanted.top_k] for row in candidates])
        found = tuple(Found(*one) for one in zip(hits, rewritten, unknown, strict=True))
        return Searched(
            self.served.info,
            self.kind,
            found,
            self.timings_ms,
            self.num_tokens,
            tuple(
                sorted(self.truncated.union(n for n, one in enumerate(self.asked) if one.is_cut))
            ),
            self.timings,
            self.num_bytes,
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings_ms[part] += (time.perf_counter() - start) * 1_000

    def _task(self, one: Asked) -> str:
        return one.task or self.served.info.task

    async def _rewrite(self) -> list[str | None]:
        """q′ of each query; None where none is wanted or the LLM failed."""
        rewritten: list[str | None] = [None] * len(self.asked)
        rewriting = self.service.rewriting
        if not self.wanted.rewrite or rewriting is None:
            return rewritten
        rows: dict[str, list[int]] = {}
        for row, one in enumerate(self.asked):
            rows.setdefault(self._task(one), []).append(row)
        with self._timed("rewrite"):
            try:
                texts = await together(
                    *(
                        rewriting.rewrite([self.asked[row].query for row in of_task], task=task)
                        for task, of_task in rows.items()
                    )
                )
            except Unavailable as error:  # a search without q′ is worth more than none
                log.warning("queries are searched as they are, no q′ can be had: %s", error)
                return rewritten
        for of_task, of_rows in zip(texts, rows.values(), strict=True):
            for row, text in zip(of_rows, of_task, strict=True):
                rewritten[row] = text
        return rewritten

    async def _encode(
        self, texts: Sequence[str], rewritten: Sequence[str | None]
    ) -> Vectors | None:
        """Vectors of what is searched for; None where nothing needs them."""
        rerank = self.wanted.rerank
        if self.kind == "bm25" and not (rerank and rerank.by == "cosine"):
            return None
        items = [
            EmbedItem(text, "query", self._instruction(one), "end" if new else self.wanted.truncate)
            for text, one, new in zip(texts, self.asked, rewritten, strict=True)
        ]
        with self._timed("encode"):
            embedded = await self._embed(items, param=self.wanted.param)
        self.truncated = frozenset(embedded.truncated)
        tokenize_ms = embedded.timings.tokenize_s * 1_000
        self.timings_ms["tokenize"] = tokenize_ms
        self.timings_ms["encode"] = max(0.0, self.timings_ms["encode"] - tokenize_ms)
        return embedded.vectors_ND

    async def _embed(self, items: Sequence[EmbedItem], *, param: str) -> Embedded:
        embedded = await self.service.embeddings.embed(items, param=param)
        self.num_tokens += sum(embedded.num_tokens)
        self.timings += embedded.timings
        return embedded

    def _instruction(self, one: Asked) -> str | None:
        model = self.service.embeddings.model
        if not model.takes_instruction:
            return None  # a task still tells the LLM what is asked
        if one.instruction is not None:
            return one.instruction
        return TASKS[one.task].instruction if one.task else self.served.info.instruction

    async def _unknown_excluded(self) -> list[int]:
        """For each query how many excluded ids the index does not hold."""
        lists = {one.excluded_ids for one in self.asked}
        doc_ids = list({doc_id for ids in lists for doc_id in ids})
        places = await self.served.find(doc_ids) if doc_ids else []
        unknown = {one for one, place in zip(doc_ids, places, strict=True) if place is None}
        numbers = {ids: len(unknown.intersection(ids)) for ids in lists}
        return [numbers[one.excluded_ids] for one in self.asked]

    async def _candidates(
        self, texts: Sequence[str], vectors_QD: Vectors | None
    ) -> list[list[_Candidate]]:
        """Results of the search, best first, those below the lowest score left out."""
        wanted = self.wanted
        depth = max(wanted.top_k, wanted.num_reranked)
        k = max(depth, FUSION_DEPTH) if self.kind == "hybrid" else depth
        searches: dict[str, Coroutine[Any, Any, _Found]] = {}
        excluded = [one.excluded_ids for one in self.asked]
        if self.kind != "bm25":
            assert vectors_QD is not None
            searches["dense"] = self.served.dense(vectors_QD, k=k, excluded=excluded)
        if self.kind != "dense":
            searches["bm25"] = self.served.bm25(texts, k=k, excluded=excluded)
        found = dict(zip(searches, await together(*searches.values()), strict=True))
        doc_ids = await self._doc_ids(found)
        num_found = sum(positions.size for _, positions in found.values())
        return await aside(
            num_found,
            lambda: [self._row(row, found, doc_ids, depth) for row in range(len(self.asked))],
        )

    async def _doc_ids(self, found: Mapping[str, _Found]) -> dict[int, str]:
        """Of all that was found, by position."""
        every = [positions.ravel() for _, positions in found.values()]
        order = np.setdiff1d(np.concatenate(every), [NO_DOCUMENT]).tolist()
        if not order:
            return {}
        return dict(zip(order, await self.served.doc_ids(order), strict=True))

    def _row(
        self, row: int, found: Mapping[str, _Found], doc_ids: Mapping[int, str], depth: int
    ) -> list[_Candidate]:
        """Candidates of one query."""
        ranked = {
            name: [
                _Candidate(place, doc_ids[place], score)
                for score, place in zip(scores[row].tolist(), positions[row].tolist(), strict=True)
                if place != NO_DOCUMENT
            ]
            for name, (scores, positions) in found.items()
        }
        candidates = _fused(ranked, depth) if self.kind == "hybrid" else ranked[self.kind]
        lowest = self.wanted.min_score
        return [one for one in candidates if lowest is None or one.score >= lowest]

    async def _rerank(
        self, candidates: list[list[_Candidate]], vectors_QD: Vectors | None
    ) -> list[list[_Candidate]]:
        """The same candidates in the reranker's order; equal ones stay in the search's."""
        rerank = self.wanted.rerank
        # A dense search is in the order of the embedder's scores already.
        if rerank is None or (rerank.by == "cosine" and self.kind == "dense"):
            return candidates
        candidates = [row[: rerank.depth] for row in candidates]
        await self._read(candidates)
        if rerank.by == "annotator":
            return await together(
                *(self._graded(one, row) for one, row in zip(self.asked, candidates, strict=True))
            )
        assert vectors_QD is not None
        return await self._by_cosine(candidates, vectors_QD)

    async def _graded(self, one: Asked, row: list[_Candidate]) -> list[_Candidate]:
        """By grade; those without one come last."""
        assert self.service.grading is not None
        if not row:
            return []
        texts = [self.documents[candidate.position].text for candidate in row]
        try:
            grades = await self.service.grading.grade(one.query, texts, task=self._task(one))
        except Unavailable as error:  # as without q′
            log.warning("documents stay in the order of the search, none is graded: %s", error)
            return row
        graded = [each._replace(grade=grade) for each, grade in zip(row, grades, strict=True)]
        return sorted(graded, key=lambda each: -(each.grade or 0.0))

    async def _by_cosine(
        self, candidates: list[list[_Candidate]], vectors_QD: Vectors
    ) -> list[list[_Candidate]]:
        """By cosine with what was searched for; blank documents have no vector and come last."""
        places = list(
            dict.fromkeys(
                each.position
                for row in candidates
                for each in row
                if self.documents[each.position].text.strip()
            )
        )
        if not places:
            return candidates
        items = [EmbedItem(self.documents[place].text, truncate="end") for place in places]
        embedded = await self._embed(items, param="rerank")
        row_of = {place: row for row, place in enumerate(places)}

        def by_cosine(query_D: Vectors, row: list[_Candidate]) -> list[_Candidate]:
            rows = [row_of[each.position] for each in row if each.position in row_of]
            scores = iter(cosines(query_D, embedded.vectors_ND[rows]).tolist())
            new = [
                each._replace(score=next(scores) if each.position in row_of else LOWEST_COSINE)
                for each in row
            ]
            return sorted(new, key=lambda each: -each.score)

        return await aside(
            sum(map(len, candidates)) * VECTOR,
            lambda: list(map(by_cosine, vectors_QD, candidates)),
        )

    async def _read(self, candidates: Sequence[Sequence[_Candidate]]) -> None:
        """Gets the documents of candidates that are not there yet."""
        positions = {each.position for row in candidates for each in row}
        await self._read_at(sorted(positions - self.documents.keys()))

    async def _read_at(self, positions: Sequence[int]) -> None:
        if positions:
            read = await self.served.documents(positions)
            self.documents.update(zip(positions, read, strict=True))

    async def _read_hits(self, candidates: Sequence[Sequence[_Candidate]]) -> None:
        """Gets the documents of an answer, some at a time, as long as they are not too large.

        Raises:
            ApiError: 400 they are.
        """
        times = Counter(each.position for row in candidates for each in row)
        positions = sorted(times)
        for start in range(0, len(positions), _READ):
            some = positions[start : start + _READ]
            await self._read_at([one for one in some if one not in self.documents])
            self.num_bytes += sum(
                times[one] * len(self.documents[one].text.encode()) for one in some
            )
            self.service.check_size(self.num_bytes, self.wanted)

    async def _hits(self, candidates: Sequence[Sequence[_Candidate]]) -> list[tuple[Hit, ...]]:
        if self.wanted.with_documents:
            await self._read_hits(candidates)
        documents = self.documents if self.wanted.with_documents else {}
        return await aside(
            sum(map(len, candidates)),
            lambda: [
                tuple(
                    Hit(each.doc_id, each.score, rank, documents.get(each.position), each.grade)
                    for rank, each in enumerate(row, start=1)
                )
                for row in candidates
            ],
        )


def _fused(ranked: Mapping[str, Sequence[_Candidate]], k: int) -> list[_Candidate]:
    """The k best by reciprocal rank fusion."""
    position = {one.doc_id: one.position for row in ranked.values() for one in row}
    doc_ids = {name: [one.doc_id for one in row] for name, row in ranked.items()}
    return [_Candidate(position[one.doc_id], one.doc_id, one.score) for one in rrf(doc_ids, k=k)]
