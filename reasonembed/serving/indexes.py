"""Indexes of a service: of one or several parts, and a part that lies on disk."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from reasonembed.index.exact import merge_topk
from reasonembed.index.store import BenchmarkQuery, StoredIndex
from reasonembed.serving.concurrency import aside, together
from reasonembed.serving.protocol import (
    IndexInfo,
    IndexPart,
    Positions,
    Scores,
    StoredDocument,
    Vectors,
)

_ROWS = 64  # queries of one product: where more of them would only make others wait longer
_WORDS_ROWS, _WORDS_CHARACTERS = 8, 4_096  # of one search by words: some milliseconds
_T = TypeVar("_T")
Found = tuple[Scores, Positions]
"""Scores and positions, one row a query, best first."""


class ServedIndex:
    """An index whose vectors may be cut over several parts; part 0 also answers the rest.

    Args:
        info: What is said of it.
        parts: At least one; their vectors together are the index's.
        queries: Of a benchmark, where the index was made from one.
    """

    def __init__(
        self,
        info: IndexInfo,
        parts: Sequence[IndexPart],
        *,
        queries: Sequence[BenchmarkQuery] = (),
    ) -> None:
        self.info, self.parts, self.queries = info, tuple(parts), tuple(queries)

    async def dense(
        self, queries_QD: Vectors, *, k: int, excluded: Sequence[Sequence[str]]
    ) -> Found:
        """As `index.exact.search` over all parts, which are asked at once; some queries a call."""
        found = []
        for start in range(0, len(queries_QD), _ROWS):
            rows = slice(start, start + _ROWS)
            parts = await together(
                *(part.dense(queries_QD[rows], k=k, excluded=excluded[rows]) for part in self.parts)
            )
            found.append(await _merged(parts, k))
        return _joined(found)

    async def bm25(
        self, texts: Sequence[str], *, k: int, excluded: Sequence[Sequence[str]]
    ) -> Found:
        """See `IndexPart.bm25`; a call takes some queries, and others' come in between."""
        return _joined(
            [
                await self.parts[0].bm25(texts[rows], k=k, excluded=excluded[rows])
                for rows in _slices(texts)
            ]
        )

    async def doc_ids(self, positions: Sequence[int]) -> list[str]:
        """See `IndexPart.doc_ids`."""
        return await self.parts[0].doc_ids(positions)

    async def documents(self, positions: Sequence[int]) -> list[StoredDocument]:
        """See `IndexPart.documents`."""
        return await self.parts[0].documents(positions)

    async def find(self, doc_ids: Sequence[str]) -> list[int | None]:
        """See `IndexPart.find`."""
        return await self.parts[0].find(doc_ids)


@dataclass(eq=False)
class _Search:
    """A dense search that waits, and what was found for its first queries."""

    queries_QD: Vectors
    k: int
    excluded: Sequence[Positions]
    answer: asyncio.Future[Found]
    found: list[Found] = field(default_factory=list)
    num_done: int = 0

    def next_rows(self, share: int) -> slice:
        return slice(self.num_done, min(self.num_done + share, len(self.queries_QD)))


class LocalPart:
    """A part of an index in this process; see `protocol.IndexPart`.

    Dense searches that come while one runs are made as one matrix product after it, each with an
    equal share of its rows: the documents are read from memory once for all of them. A search that
    finds nothing running begins at once. One that was cancelled is left out of the next product.
    What they exclude is looked up before, so that nobody waits for another's list. Products,
    searches by words and look-ups have a thread each: none stands still because of another.

    Args:
        stored: What is searched.
        rows: Queries of one product.
    """

    def __init__(self, stored: StoredIndex, *, rows: int = _ROWS) -> None:
        self.stored, self._rows = stored, rows
        self._waiting: list[_Search] = []
        self._turn: asyncio.Task[None] | None = None
        self._products, self._words, self._reads = (
            ThreadPoolExecutor(1, f"{stored.about.name}-{kind}")
            for kind in ("dense", "bm25", "read")
        )

    @classmethod
    def load(cls, path: str | Path, *, part: tuple[int, int] = (0, 1)) -> LocalPart:
        """Opens an index; see `StoredIndex.load`."""
        return cls(StoredIndex.load(path, part=part))

    @property
    def info(self) -> IndexInfo:
        """What the service says of the index."""
        about = self.stored.about
        return IndexInfo(
            name=about.name,
            num_documents=about.num_documents,
            dimension=about.dimension,
            model=about.model,
            fingerprint=about.fingerprint,
            task=about.task,
            instruction=about.instruction,
            kinds=about.kinds,
            digest=self.stored.digest,
        )

    async def dense(
        self, queries_QD: Vectors, *, k: int, excluded: Sequence[Sequence[str]]
    ) -> Found:
        """See `StoredIndex.dense`.

        Raises:
            ValueError: The search does not fit the index; no other one notices.
        """
        self._check(queries_QD, k, excluded)
        if not len(queries_QD):
            return self.stored.dense(queries_QD, k=k)
        shut_out = await self._shut_out(excluded)
        answer: asyncio.Future[Found]
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append(_Search(queries_QD, k, shut_out, answer))
        if self._turn is None:
            self._turn = asyncio.create_task(self._take_turns())
        return await answer

    async def bm25(
        self, texts: Sequence[str], *, k: int, excluded: Sequence[Sequence[str]]
    ) -> Found:
        """See `StoredIndex.bm25`."""
        shut_out = await self._shut_out(excluded)
        return await _in(
            self._words, lambda: self.stored.bm25(texts, k=k, excluded=shut_out or None)
        )

    async def doc_ids(self, positions: Sequence[int]) -> list[str]:
        """Ids in the given order."""
        return await _in(self._reads, lambda: self.stored.doc_ids(positions))

    async def documents(self, positions: Sequence[int]) -> list[StoredDocument]:
        """Documents in the given order."""
        found = await _in(self._reads, lambda: self.stored.documents(positions))
        return [StoredDocument(one.doc_id, one.text, one.title) for one in found]

    async def find(self, doc_ids: Sequence[str]) -> list[int | None]:
        """Position of each id; None for one that the index does not hold."""
        return await _in(self._reads, lambda: self.stored.find(doc_ids))

    def close(self) -> None:
        """Lets the threads go; searches under way come to their end."""
        for thread in (self._products, self._words, self._reads):
            thread.shutdown(wait=False)

    async def _shut_out(self, excluded: Sequence[Sequence[str]]) -> Sequence[Positions]:
        if not any(excluded):
            return ()
        return await _in(self._reads, lambda: self.stored.shut_out(excluded))

    def _check(self, queries_QD: Vectors, k: int, excluded: Sequence[Sequence[str]]) -> None:
        """What would make a product fail that others share."""
        dimension = self.stored.about.dimension
        if queries_QD.ndim != 2 or queries_QD.shape[1] != dimension or k < 1:
            raise ValueError(
                f"queries of shape {queries_QD.shape} and k {k} for an index of dimension "
                f"{dimension}"
            )
        if excluded and len(excluded) != len(queries_QD):
            raise ValueError(f"excluded has {len(excluded)} entries for {len(queries_QD)} queries")
        if not np.isfinite(queries_QD).all():
            raise ValueError("a query is not finite")

    async def _take_turns(self) -> None:
        """Searches until nothing waits."""
        try:
            while self._waiting:
                self._waiting = [one for one in self._waiting if not one.answer.done()]
                turn = self._waiting[: self._rows]
                share = max(1, self._rows // max(1, len(turn)))
                taken = [(one, one.next_rows(share)) for one in turn]
                if taken:
                    await self._one_product(taken)
                    # Those that found no place come first now, and who has more to ask, last.
                    self._waiting = self._waiting[len(turn) :] + turn
        finally:
            self._turn = None

    async def _one_product(self, taken: Sequence[tuple[_Search, slice]]) -> None:
        try:
            found = await _in(self._products, lambda: self._search(taken))
        except Exception as error:  # handed to those who asked; whoever comes next is served
            for one, _ in taken:
                if not one.answer.done():
                    one.answer.set_exception(error)
            return
        for (one, rows), part in zip(taken, found, strict=True):
            one.found.append(part)
            one.num_done = rows.stop
            if one.num_done == len(one.queries_QD) and not one.answer.done():
                one.answer.set_result(_joined(one.found))

    def _search(self, taken: Sequence[tuple[_Search, slice]]) -> list[Found]:
        """One product; each search gets its own first k, which those of the largest begin with."""
        none = np.empty(0, np.int64)
        excluded: list[Positions] = []
        for one, rows in taken:
            excluded += one.excluded[rows] if one.excluded else [none] * (rows.stop - rows.start)
        queries_QD = np.concatenate([one.queries_QD[rows] for one, rows in taken])
        scores_QK, positions_QK = self.stored.dense(
            queries_QD, k=max(one.k for one, _ in taken), excluded=excluded
        )
        ends = np.cumsum([rows.stop - rows.start for _, rows in taken])[:-1]
        of_each = zip(taken, np.split(scores_QK, ends), np.split(positions_QK, ends), strict=True)
        return [
            (scores[:, : one.k], positions[:, : one.k]) for (one, _), scores, positions in of_each
        ]


async def _in(thread: ThreadPoolExecutor, call: Callable[[], _T]) -> _T:
    return await asyncio.get_running_loop().run_in_executor(thread, call)


def _slices(texts: Sequence[str]) -> Iterator[slice]:
    """Some queries each, or a long one alone."""
    start = size = 0
    for stop, text in enumerate(texts):
        size += len(text)
        if stop > start and (stop - start == _WORDS_ROWS or size > _WORDS_CHARACTERS):
            yield slice(start, stop)
            start, size = stop, len(text)
    yield slice(start, len(texts))


async def _merged(parts: Sequence[Found], k: int) -> Found:
    if len(parts) == 1:
        return parts[0]
    return await aside(sum(scores.size for scores, _ in parts), lambda: merge_topk(parts, k=k))


def _joined(found: Sequence[Found]) -> Found:
    scores, positions = zip(*found, strict=True)
    return np.concatenate(scores), np.concatenate(positions)
