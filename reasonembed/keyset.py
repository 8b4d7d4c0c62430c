"""Keys of more rows than memory should hold: as digests, in temporary files that are mapped.

A digest has 128 bits; that two keys of 10⁹ share one has a chance below 10⁻²⁰. Digests are never
stored for another process to read.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Entries = NDArray[np.void]
"""Of `ENTRY`."""

ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<u8"), ("status", "u1")])
STEP_ROWS = 65_536  # what is held at once
_WORD = 8  # bytes
# Odd multipliers of murmur3 and of splitmix64: two lanes that share nothing but their input.
_LANES = ((0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Digests:
    """One of each row; two uint64 arrays of equal length."""

    high: Words
    low: Words


def slices(table: pa.Table, rows: int = STEP_ROWS) -> Iterator[pa.Table]:
    """A table in pieces of so many rows; the last one may hold fewer."""
    for start in range(0, table.num_rows, rows):
        yield table.slice(start, rows)


def digests(table: pa.Table, key: Iterable[str]) -> Digests:
    """Digests of the key columns of each row: strings, or whole numbers."""
    lanes = [np.full(table.num_rows, seed, np.uint64) for seed in (1, 2)]
    for name in key:
        column = table.column(name).combine_chunks()
        if pa.types.is_integer(column.type):
            lanes = _absorb(lanes, column.cast(pa.int64()).to_numpy().view(np.uint64))
        else:
            lanes = _absorb_texts(lanes, column.cast(pa.large_string()))
    return Digests(*lanes)


def _absorb(lanes: list[Words], words: Words) -> list[Words]:
    return [_mixed(lane ^ words, *keys) for lane, keys in zip(lanes, _LANES, strict=True)]


def _mixed(words: Words, first: int, second: int) -> Words:
    """A permutation of 64-bit words in which every bit of the input moves half of the output."""
    words ^= words >> np.uint64(33)
    words *= np.uint64(first)
    words ^= words >> np.uint64(29)
    words *= np.uint64(second)
    words ^= words >> np.uint64(32)
    return words


def _absorb_texts(lanes: list[Words], texts: pa.LargeStringArray) -> list[Words]:
    """Eight bytes of all texts at a time, their lengths last, so that no two columns run on."""
    _, offsets, data = texts.buffers()
    ends = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1]
    first, last = (int(ends[0]), int(ends[-1])) if len(texts) else (0, 0)
    held = np.zeros(last - first + _WORD, np.uint8)
    if last > first:
        held[: last - first] = np.frombuffer(data, np.uint8)[first:last]
    words = np.ndarray((held.size - _WORD + 1,), "<u8", held, strides=(1,))  # at every byte
    starts, lengths = ends[:-1] - first, np.diff(ends)
    rows = np.arange(len(texts))
    for done in range(0, int(lengths.max(initial=0)), _WORD):
        rows = rows[lengths[rows] > done]
        cut = np.minimum(lengths[rows] - done, _WORD).astype(np.uint64) * np.uint64(8)
        piece = words[starts[rows] + done] & (~np.uint64(0) >> (np.uint64(64) - cut))
        for lane, new in zip(lanes, _absorb([lane[rows] for lane in lanes], piece), strict=True):
            lane[rows] = new
    return _absorb(lanes, lengths.astype(np.uint64))


def content_of(table: pa.Table) -> str:
    """Hash of a table's rows and column names; how they are stored, or cut, does not matter."""
    streams: defaultdict[str, hashlib.blake2b] = defaultdict(
        lambda: hashlib.blake2b(digest_size=16)
    )
    for name in table.column_names:
        streams[f"{name} valid"]  # also of a table without rows
        for chunk in table.column(name).chunks:
            _feed(streams, name, chunk)
    total = hashlib.blake2b(digest_size=16)
    for path, stream in sorted(streams.items()):
        total.update(repr((path, stream.hexdigest())).encode())
    return total.hexdigest()


def _feed(streams: Mapping[str, hashlib.blake2b], path: str, array: pa.Array) -> None:
    """Values, lengths and nulls in a stream each, so that it can be cut anywhere."""
    streams[f"{path} valid"].update(_bytes(array.is_valid()))
    if pa.types.is_struct(array.type):
        for number, child in enumerate(array.flatten()):
            _feed(streams, f"{path}.{array.type.field(number).name}", child)
    elif pa.types.is_list(array.type) or pa.types.is_fixed_size_list(array.type):
        streams[f"{path} length"].update(_bytes(pc.list_value_length(array).cast(pa.int64())))
        _feed(streams, f"{path}[]", array.flatten())
    elif pa.types.is_string(array.type):
        streams[f"{path} length"].update(_bytes(pc.binary_length(array)))
        whole = array.drop_null()
        _, offsets, data = whole.buffers()
        if len(whole) and data is not None:
            ends = np.frombuffer(offsets, np.int32)[whole.offset : whole.offset + len(whole) + 1]
            streams[path].update(memoryview(data)[int(ends[0]) : int(ends[-1])])
    else:
        streams[path].update(_bytes(array))


def _bytes(array: pa.Array) -> bytes:
    if array.null_count:  # what lies below a null is anything
        array = array.fill_null(False if pa.types.is_boolean(array.type) else 0)
    found = array.to_numpy(zero_copy_only=False)
    assert found.dtype != object, f"no bytes of {array.type}"
    return bytes(found.tobytes())


class KeySpool:
    """Keys in the order in which they come, then one entry of each."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
        self.rows = 0

    def add(self, table: pa.Table, *, key: Iterable[str], statuses: NDArray[np.uint8]) -> None:
        """Adds the keys of a table of at most some ten thousand rows.

        Args:
            table: Rows.
            key: Its key columns.
            statuses: A number for the status of each row.
        """
        found = digests(table, key)
        entries = np.empty(table.num_rows, ENTRY)
        entries["high"], entries["low"], entries["status"] = found.high, found.low, statuses
        entries["row"] = np.arange(self.rows, self.rows + table.num_rows, dtype=np.uint64)
        self._file.write(entries.tobytes())
        self.rows += table.num_rows

    def one_a_key(self, *, good: int | None) -> Iterator[Entries]:
        """One entry of each key, ascending by digest, a bounded number at a time.

        Args:
            good: The first entry of this status counts, else the last; None for always the last.
        """
        if not self.rows:
            return
        self._file.flush()
        spooled = np.memmap(self._file, ENTRY, mode="r")
        starts, held = _scattered(spooled)
        for start, end in pairwise(starts):
            if end > start:
                yield _one_of_each(np.array(held[start:end]), good=good)


def _scattered(spooled: Entries) -> tuple[list[int], Entries]:
    """The entries by the first bits of their digest, in their order, and where each lot starts."""
    bits = max(0, int(len(spooled) // STEP_ROWS).bit_length())
    if not bits:
        return [0, len(spooled)], spooled
    shift = np.uint64(64 - bits)
    counts = np.zeros(1 << bits, np.int64)
    for start in range(0, len(spooled), STEP_ROWS):
        lots = (spooled["high"][start : start + STEP_ROWS] >> shift).astype(np.int64)
        counts += np.bincount(lots, minlength=len(counts))
    starts = np.concatenate([[0], np.cumsum(counts)])
    free, held = starts[:-1].copy(), mapped(len(spooled), ENTRY)
    for start in range(0, len(spooled), STEP_ROWS):
        entries = np.array(spooled[start : start + STEP_ROWS])
        lots = (entries["high"] >> shift).astype(np.int64)
        order = np.argsort(lots, kind="stable")
        filled = np.bincount(lots, minlength=len(counts))
        before = np.cumsum(filled) - filled
        held[(free - before)[lots[order]] + np.arange(len(order))] = entries[order]
        free += filled
    return starts.tolist(), held


def _one_of_each(entries: Entries, *, good: int | None) -> Entries:
    order = np.argsort(entries["high"], kind="stable")  # in their order, as they came
    high, low = entries["high"][order], entries["low"][order]
    if ((high[1:] == high[:-1]) & (low[1:] != low[:-1])).any():  # as good as never
        order = np.lexsort((entries["low"], entries["high"]))
        high, low = entries["high"][order], entries["low"][order]
    entries = entries[order]
    same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    last = np.append(first[1:], len(entries)) - 1
    if good is None:
        return np.take(entries, last)
    numbers = np.where(entries["status"] == good, np.arange(len(entries)), len(entries))
    best = np.minimum.reduceat(numbers, first)
    return np.take(entries, np.where(best < len(entries), best, last))


class KeySet:
    """Keys that can be asked for; ascending on disk.

    Args:
        entries: Ascending by digest, see `KeySpool.one_a_key`.
    """

    def __init__(self, entries: Iterable[Entries]) -> None:
        with tempfile.TemporaryFile() as high, tempfile.TemporaryFile() as low:
            for some in entries:
                high.write(some["high"].tobytes())
                low.write(some["low"].tobytes())
            self._high, self._low = _mapped_words(high), _mapped_words(low)

    def __len__(self) -> int:
        return len(self._high)

    def holds(self, asked: Digests) -> Mask:
        """Whether it holds each of these."""
        found = np.zeros(len(asked.high), np.bool_)
        order = np.argsort(asked.high)  # neighbours are looked up in the same pages
        at = np.searchsorted(self._high, asked.high[order])
        while len(order):  # again only where two keys share 64 bits
            inside = at < len(self._high)
            order, at = order[inside], at[inside]
            same = self._high[at] == asked.high[order]
            order, at = order[same], at[same]
            hit = self._low[at] == asked.low[order]
            found[order[hit]] = True
            order, at = order[~hit], at[~hit] + 1
        return found


AntiJoin = Callable[[pa.Table], pa.Table]
"""Planned rows → those of them that are to be computed."""


@dataclass(frozen=True)
class NotIn:
    """Keeps rows whose key is not in a set."""

    done: KeySet
    key: tuple[str, ...]

    def __call__(self, planned: pa.Table) -> pa.Table:
        """The rows of `planned` that are not in the set, in their order."""
        if not len(self.done):
            return planned
        kept = [
            piece.filter(pa.array(~self.done.holds(digests(piece, self.key))))
            for piece in slices(planned)
        ]
        return pa.concat_tables(kept) if kept else planned


class StatusCodes:
    """Numbers for statuses, from 0 in the order in which they are met."""

    def __init__(self, first: str) -> None:
        self.names = [first]

    def of(self, column: pa.ChunkedArray) -> NDArray[np.uint8]:
        """The number of each row's status."""
        texts = pc.fill_null(column, "")
        self.names += [one for one in texts.unique().to_pylist() if one not in self.names]
        codes = pc.index_in(texts, value_set=pa.array(self.names, pa.string()))
        return np.asarray(codes.to_numpy(), dtype=np.uint8)


def mapped(length: int, kind: Any) -> NDArray[Any]:
    """An array of zeros that lies in a file without a name."""
    if not length:
        return np.zeros(0, kind)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, kind, mode="w+", shape=(length,))


def _mapped_words(file: Any) -> Words:
    file.flush()
    return np.memmap(file, "<u8", mode="r") if file.tell() else np.zeros(0, np.uint64)
