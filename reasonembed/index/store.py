"""An index as a folder: written once, moved anywhere, searched without being read into memory.

    <index>/index.json        what it is, what made it, size and digest of every file
    <index>/documents.arrow   doc_id, title, text, group; Arrow IPC, by doc id
    <index>/vectors.npy       float32 [N, D], in the order of the documents; may be missing
    <index>/bm25/             see `index.bm25`; may be missing
    <index>/queries.jsonl     benchmark queries with their gold and excluded ids; may be missing

A document's position is its row. Documents of equal text share a group: shutting one out shuts out
all of them. A part of an index holds some of its vectors and everything else.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import digest
from reasonembed.errors import StorageError
from reasonembed.index.bm25 import FILES, BM25Index
from reasonembed.index.exact import (
    NO_DOCUMENT,
    Positions,
    Scores,
    Vectors,
    longest_norm,
    search,
)

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
DOCUMENTS = pa.schema(
    [
        pa.field("doc_id", pa.string(), nullable=False),
        pa.field("title", pa.string()),
        # 64-bit offsets: a batch of whole pages passes what 32 bits reach.
        pa.field("text", pa.large_string(), nullable=False),
        pa.field("group", pa.int32(), nullable=False),
    ]
)
_DOCUMENTS, _VECTORS, _QUERIES, _BM25 = "documents.arrow", "vectors.npy", "queries.jsonl", "bm25"
_BATCH = 65_536  # rows of a batch of documents.arrow
_SCANNED = 1_000  # ids that are compared in the time in which halving finds one
_CURE = "copy the index again, or delete the folder and build it anew"


@dataclass(frozen=True)
class StoredDocument:
    """A document of an index; the text is what was embedded, its title included."""

    doc_id: str
    text: str
    title: str | None


@dataclass(frozen=True)
class BenchmarkQuery:
    """A query whose answers are known.

    Attributes:
        query_id: Of the collection.
        text: What is asked.
        qrels: Relevance (1 or more) of the gold documents.
        excluded_ids: Documents that it must not get back.
    """

    query_id: str
    text: str
    qrels: Mapping[str, int]
    excluded_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """What `index.json` says.

    Attributes:
        name: Of the index.
        model: Name of the model that made the vectors; empty where there are none.
        fingerprint: Of contract and weights (`TokenisationContract.fingerprint`): only queries of
            an equal one can be compared with the vectors.
        task: Of its queries, in `tasks.TASKS`.
        instruction: Of its queries, where the index says one.
        identity: What decided its content, flat.
        num_documents: In it.
        dimension: Of a vector; 0 where there are none.
        longest: `exact.longest_norm` of the vectors.
        has_bm25: Whether it can be searched by words.
        num_queries: Benchmark queries that came along.
        files: Size in bytes and digest of every file.
    """

    name: str
    model: str
    fingerprint: str
    task: str
    instruction: str | None
    identity: Mapping[str, Any]
    num_documents: int = 0
    dimension: int = 0
    longest: float = 0.0
    has_bm25: bool = False
    num_queries: int = 0
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How it can be searched: of `dense`, `bm25`, `hybrid`."""
        dense, bm25 = self.dimension > 0, self.has_bm25
        there = {"dense": dense, "bm25": bm25, "hybrid": dense and bm25}
        return tuple(kind for kind, is_there in there.items() if is_there)

    @property
    def num_bytes(self) -> int:
        """On disk."""
        return sum(int(one["bytes"]) for one in self.files.values())


# Writing.


def write_index(
    folder: Path,
    about: About,
    documents: pa.Table,
    *,
    dimension: int = 0,
    fill: Callable[[Vectors], object] | None = None,
    bm25: BM25Index | None = None,
    queries: Sequence[BenchmarkQuery] = (),
) -> About:
    """Writes an index; `index.json` comes last, so that what a kill left is no index.

    Args:
        folder: Made; empty.
        about: What is known before; counts, norm and files are filled in.
        documents: Rows of `DOCUMENTS`, sorted by doc id, each id once.
        dimension: Of the vectors.
        fill: Writes the vectors into a float32 [N, D] array that lies on disk; None for no vectors.
        bm25: Over the texts in the order of the documents.
        queries: Benchmark queries.

    Returns:
        What `index.json` says.

    Raises:
        ValueError: Documents are not sorted, or a vector is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write_documents(folder / _DOCUMENTS, documents)
    about = replace(about, num_documents=documents.num_rows, num_queries=len(queries))
    if fill is not None:
        longest = _write_vectors(folder / _VECTORS, (documents.num_rows, dimension), fill)
        about = replace(about, dimension=dimension, longest=longest)
    if bm25 is not None:
        bm25.save(folder / _BM25)
        about = replace(about, has_bm25=True)
    if queries:
        lines = "".join(f"{json.dumps(asdict(one))}\n" for one in queries)
        (folder / _QUERIES).write_text(lines, encoding="utf-8")
    about = replace(about, files=_seal(folder))
    data = {"format": FORMAT_VERSION} | asdict(about)
    (folder / INDEX_FILE).write_text(json.dumps(data, indent=1), encoding="utf-8")
    _sync(folder / INDEX_FILE)
    return about


def _write_documents(file: Path, documents: pa.Table) -> None:
    doc_ids = documents.column("doc_id").to_pylist()
    if any(one >= other for one, other in pairwise(doc_ids)):
        raise ValueError("documents must be sorted by doc id, each once")
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, DOCUMENTS) as writer:
        writer.write_table(documents.cast(DOCUMENTS), max_chunksize=_BATCH)


def _write_vectors(file: Path, shape: tuple[int, int], fill: Callable[[Vectors], object]) -> float:
    vectors_ND: np.memmap[Any, Any] = np.lib.format.open_memmap(  # type: ignore[no-untyped-call]
        file, mode="w+", dtype=np.float32, shape=shape
    )
    fill(vectors_ND)
    vectors_ND.flush()
    return longest_norm(np.asarray(vectors_ND))


def _seal(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of each file, by path; all of them are on disk afterwards."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    for file in files:
        _sync(file)
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "digest": digest(file)}
        for file in files
    }


def _sync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# Reading.


def is_index(folder: Path) -> bool:
    """Whether a folder holds an index, whole or damaged."""
    return (folder / INDEX_FILE).is_file()


def read_about(folder: Path) -> About:
    """What a folder's `index.json` says.

    Raises:
        StorageError: There is none, it is damaged, or of another format.
    """
    file = folder / INDEX_FILE
    if not file.is_file():
        raise StorageError(
            f"{folder} holds no index: there is no {INDEX_FILE} in it; make one with `reasonembed "
            "index build`"
        )
    try:
        data = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{file} is damaged ({error}); {_CURE}") from error
    if (found := data.pop("format", None)) != FORMAT_VERSION:
        raise StorageError(
            f"{folder} is an index of format {found!r}, this software reads {FORMAT_VERSION}; "
            "build the index anew, or read it with the version that made it"
        )
    try:
        return About(**data)
    except TypeError as error:
        raise StorageError(f"{file} is damaged ({error}); {_CURE}") from error


def check_files(folder: Path, *, with_digests: bool = False) -> About:
    """Makes sure that the files of an index are those that were written.

    Args:
        folder: Of the index.
        with_digests: Whether every byte is read; sizes are compared in any case.

    Raises:
        StorageError: As `read_about`, or a file is missing, of another size, or changed.
    """
    about = read_about(folder)
    needed = {_DOCUMENTS, *([_VECTORS] if about.dimension else [])}
    needed |= {f"{_BM25}/{name}" for name in FILES} if about.has_bm25 else set()
    if absent := sorted(needed - about.files.keys()):
        raise StorageError(f"{folder}/{INDEX_FILE} does not name {absent[0]}; {_CURE}")
    for name, written in about.files.items():
        file = folder / name
        if not file.is_file():
            raise StorageError(f"{file} is missing; {_CURE}")
        if (size := file.stat().st_size) != written["bytes"]:
            raise StorageError(
                f"{file} has {size:,} bytes, {written['bytes']:,} were written; {_CURE}"
            )
        if with_digests and digest(file) != written["digest"]:
            raise StorageError(f"{file} holds other bytes than were written; {_CURE}")
    return about


class StoredIndex:
    """An index, or a part of its vectors, mapped into memory; safe in several threads.

    Args:
        folder: Checked.
        about: What it says of itself.
        part: Number and count: part 0 of 1 is all of it.

    Attributes:
        digest: Of `index.json`, which holds those of all files: equal ones are equal indexes.
    """

    def __init__(self, folder: Path, about: About, *, part: tuple[int, int] = (0, 1)) -> None:
        self.folder, self.about, self.part = folder, about, part
        number, count = part
        if not 0 <= number < count:
            raise ValueError(f"part {number} of {count}: parts count from 0")
        self._start = about.num_documents * number // count
        stop = about.num_documents * (number + 1) // count
        try:
            self.digest = digest(folder / INDEX_FILE)
            self._documents = pa.ipc.open_file(pa.memory_map(str(folder / _DOCUMENTS))).read_all()
            self.vectors_ND = _mapped(folder / _VECTORS, about) if about.dimension else None
            # A plain array over the same pages: slices of numpy's own class are slow to make.
            whole = None if self.vectors_ND is None else np.asarray(self.vectors_ND)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise StorageError(f"{folder} cannot be read ({error}); {_CURE}") from error
        if self._documents.num_rows != about.num_documents or self._documents.schema != DOCUMENTS:
            raise StorageError(f"{folder / _DOCUMENTS} holds other rows than were written; {_CURE}")
        self._part_ND = None if whole is None else whole[self._start : stop]
        self._bm25 = BM25Index.load(folder / _BM25) if about.has_bm25 else None

    @classmethod
    def load(cls, path: str | Path, *, part: tuple[int, int] = (0, 1)) -> StoredIndex:
        """Opens an index in milliseconds, whatever its size; its pages are read when searched.

        Args:
            path: The folder.
            part: Number and count; the vectors are cut into so many parts, in order.

        Raises:
            StorageError: It is no index, of another format, or files are missing, damaged or cut.
        """
        folder = Path(path)
        return cls(folder, check_files(folder), part=part)

    def __len__(self) -> int:
        return self.about.num_documents

    def dense(
        self,
        queries_QD: Vectors,
        *,
        k: int,
        excluded: Sequence[Positions] | None = None,
    ) -> tuple[Scores, Positions]:
        """The k documents of largest inner product for every query, of those of this part.

        Args:
            queries_QD: float32, of the model with the index's fingerprint.
            k: Results a query, at least 1.
            excluded: For each query positions in the whole index that it must not get back; see
                `shut_out`.

        Returns:
            scores_QK and positions_QK as `exact.search`, positions in the whole index:
            `exact.merge_topk` of all parts is what the whole index finds.

        Raises:
            ValueError: The index holds no vectors, or the queries do not fit; see `exact.search`.
        """
        if self._part_ND is None:
            raise ValueError(f"the index {self.about.name} holds no vectors to search")
        start, stop = self._start, self._start + len(self._part_ND)
        scores_QK, positions_QK = search(
            queries_QD,
            self._part_ND,
            k=k,
            excluded=excluded and [one[(one >= start) & (one < stop)] - start for one in excluded],
            longest=self.about.longest,
        )
        positions_QK[positions_QK != NO_DOCUMENT] += self._start
        return scores_QK, positions_QK

    def bm25(
        self,
        texts: Sequence[str],
        *,
        k: int,
        excluded: Sequence[Positions] | None = None,
    ) -> tuple[Scores, Positions]:
        """The k best documents by BM25, of the whole index; see `BM25Index.search` and `dense`.

        Raises:
            ValueError: The index cannot be searched by words, or k is below 1.
        """
        if self._bm25 is None:
            raise ValueError(f"the index {self.about.name} cannot be searched by words")
        return self._bm25.search(texts, k=k, excluded=excluded)

    def documents(self, positions: Sequence[int]) -> list[StoredDocument]:
        """Documents in the given order."""
        columns = [self._documents.column(name) for name in ("doc_id", "text", "title")]
        return [
            StoredDocument(*(column[int(position)].as_py() for column in columns))
            for position in positions
        ]

    def doc_ids(self, positions: Sequence[int]) -> list[str]:
        """Ids in the given order."""
        ids: list[str] = (
            self._documents.column("doc_id").take(pa.array(positions, pa.int64())).to_pylist()
        )
        return ids

    def find(self, doc_ids: Sequence[str]) -> list[int | None]:
        """Position of each id; None for one that the index does not hold."""
        if len(doc_ids) * _SCANNED < len(self):
            return [self._find(doc_id) for doc_id in doc_ids]
        wanted = pa.array(list(dict.fromkeys(doc_ids)), pa.string())
        matches = pc.is_in(self._documents.column("doc_id"), value_set=wanted)
        rows = np.flatnonzero(matches.to_numpy()).tolist()
        row_of = dict(zip(self.doc_ids(rows), rows, strict=True))
        return [row_of.get(doc_id) for doc_id in doc_ids]

    def shut_out(self, excluded_ids: Sequence[Sequence[str]]) -> list[Positions]:
        """Positions that each query must not get back: its excluded documents and their copies.

        Args:
            excluded_ids: Of each query; equal lists, and ids of several, are looked up once.
        """
        lists = [tuple(ids) for ids in excluded_ids]
        doc_ids = list({doc_id for ids in set(lists) for doc_id in ids})
        row_of = dict(zip(doc_ids, self.find(doc_ids), strict=True))
        members = {ids: self._members([row_of[doc_id] for doc_id in ids]) for ids in set(lists)}
        return [members[ids] for ids in lists]

    def copies(self, doc_ids: Sequence[str]) -> Positions:
        """Positions of documents and of all of equal text; ids that are not there are left out."""
        return self._members(self.find(doc_ids))

    def _members(self, rows: Sequence[int | None]) -> Positions:
        """Positions of all that share a group with one of these."""
        found = [row for row in rows if row is not None]
        if not found:
            return np.empty(0, np.int64)
        groups = np.unique(self._groups[found])
        low = np.searchsorted(self._sorted_groups, groups, side="left")
        counts = np.searchsorted(self._sorted_groups, groups, side="right") - low
        firsts = np.repeat(low - (np.cumsum(counts) - counts), counts)
        members: Positions = self._by_group[firsts + np.arange(counts.sum())]
        return members

    @cached_property
    def queries(self) -> tuple[BenchmarkQuery, ...]:
        """Benchmark queries that came along.

        Raises:
            StorageError: Their file is damaged.
        """
        if not self.about.num_queries:
            return ()
        file = self.folder / _QUERIES
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            return tuple(
                BenchmarkQuery(**row | {"excluded_ids": tuple(row["excluded_ids"])}) for row in rows
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise StorageError(f"{file} is damaged ({error}); {_CURE}") from error

    def rows(self, columns: Sequence[str] = ("doc_id", "title", "text")) -> pa.Table:
        """Columns of all documents, in order; mapped, not read."""
        return self._documents.select(list(columns))

    def _find(self, doc_id: str) -> int | None:
        column, num_rows = self._documents.column("doc_id"), len(self)
        # Halving touches some twenty pages; a table of all ids would be the index's largest cost.
        row = bisect_left(range(num_rows), doc_id, key=lambda one: column[one].as_py())
        return row if row < num_rows and column[row].as_py() == doc_id else None

    @cached_property
    def _groups(self) -> npt.NDArray[np.int32]:
        groups: npt.NDArray[np.int32] = self._documents.column("group").to_numpy()
        return groups

    @cached_property
    def _by_group(self) -> npt.NDArray[np.int64]:
        """Positions by group, then position."""
        return np.argsort(self._groups, kind="stable")

    @cached_property
    def _sorted_groups(self) -> npt.NDArray[np.int32]:
        return self._groups[self._by_group]


def _mapped(file: Path, about: About) -> np.memmap[Any, Any]:
    vectors: np.memmap[Any, Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    expected = (about.num_documents, about.dimension)
    if vectors.dtype != np.float32 or vectors.shape != expected:
        raise ValueError(
            f"vectors are {vectors.dtype} {vectors.shape}, written were float32 {expected}"
        )
    return vectors
