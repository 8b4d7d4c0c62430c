"""Planned rows that wait on storage, in blocks; the driver writes them, actors read one at a time.

    <artifact>/_todo/<driver>-<attempt>/00000.arrow     Arrow IPC, a record batch for each block

So neither the driver's memory nor the object store has to hold what is planned.
"""

from __future__ import annotations

import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa

from reasonembed.artifacts import TODO, equal_blocks
from reasonembed.errors import StorageError
from reasonembed.keyset import AntiJoin, slices
from reasonembed.schemas import stable_hash
from reasonembed.storage import Place, storage_error

_FILE_BLOCKS = 1_000
_FILE_BYTES = 64 * 2**20

Cut = Callable[[pa.Table, int], list[pa.Table]]
"""Cuts rows into blocks of at most so many, each from where the last one ended.

What follows a block must not decide where it ends, unless it is the last one: so a table that
comes in pieces is cut as if it were whole.
"""


@dataclass(frozen=True)
class Blocks:
    """Blocks of planned rows, numbered from 0.

    Attributes:
        place: Their folder.
        starts: Number of the first block of each file, and how many there are at the end.
        planned: Rows that were planned.
        rows: Those of them that are to be computed.
    """

    place: Place
    starts: tuple[int, ...]
    planned: int
    rows: int

    def __len__(self) -> int:
        return self.starts[-1]

    @property
    def attempt(self) -> str:
        """A name that no other attempt has."""
        return self.place.name.rpartition("-")[2]

    def read(self, number: int) -> pa.Table:
        """The rows of one block.

        Raises:
            StorageError: It cannot be read.
        """
        file = bisect_right(self.starts, number) - 1
        place = self.place / _name(file)
        try:
            with place.fs.open_input_file(place.path) as stream:
                batch = pa.ipc.open_file(stream).get_batch(number - self.starts[file])
                return pa.Table.from_batches([batch])
        except (OSError, pa.ArrowInvalid) as error:
            raise StorageError(f"planned rows are gone from {place}: {error}") from error


def write_blocks(
    folder: Place,
    planned: pa.Table | Iterable[pa.Table],
    *,
    keep: AntiJoin,
    rows: int,
    cut: Cut | None = None,
    owner: str = "",
) -> Blocks:
    """Writes the rows that are to be computed; what an earlier driver has left is deleted.

    Args:
        folder: Of the artifact.
        planned: Rows with the artifact's key, as one table or as many of one schema.
        keep: Of the planned rows those that are to be computed.
        rows: In a block, at most.
        cut: See `Cut`; default all of that size but the last.
        owner: Names the driver, the same when it starts again; others' blocks are left alone.

    Raises:
        StorageError: They cannot be written; or what `planned` raises.
    """
    mine, todo = stable_hash(owner), folder / TODO
    for stale in todo.children():
        if stale.name.startswith(mine):
            stale.delete()
    writer = _Writer(todo / f"{mine}-{uuid.uuid4().hex[:12]}")
    try:
        for block in _cut(writer.kept(_tables(planned), keep), rows, cut or equal_blocks):
            writer.add(block)
        return writer.finish()
    except BaseException:
        writer.abandon()
        raise


class _Writer:
    def __init__(self, place: Place) -> None:
        self._place, self._starts = place, [0]
        self._planned = self._rows = self._count = 0
        self._sink: pa.NativeFile | None = None
        self._file: pa.RecordBatchFileWriter | None = None

    def kept(self, tables: Iterable[pa.Table], keep: AntiJoin) -> Iterator[pa.Table]:
        for table in tables:
            self._planned += table.num_rows
            yield keep(table)

    def add(self, block: pa.Table) -> None:
        with self._explained():
            if self._sink is None or self._file is None:
                self._sink = self._opened()
                self._file = pa.ipc.new_file(self._sink, block.schema)
            self._file.write_table(block.combine_chunks())
            self._count, self._rows = self._count + 1, self._rows + block.num_rows
            if self._count - self._starts[-1] == _FILE_BLOCKS or self._sink.tell() > _FILE_BYTES:
                self._close()
                self._starts.append(self._count)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(str(self._place.parent), error) from error

    def _opened(self) -> pa.NativeFile:
        place = self._place / _name(len(self._starts) - 1)
        if place.is_local:
            place.local.parent.mkdir(parents=True, exist_ok=True)
        return place.fs.open_output_stream(place.path)

    def _close(self) -> None:
        if self._sink is not None and self._file is not None:
            self._file.close()
            self._sink.close()
        self._sink = self._file = None

    def abandon(self) -> None:
        """After an error, which is the one to be seen."""
        with suppress(OSError):
            self._close()

    def finish(self) -> Blocks:
        with self._explained():
            self._close()
        if self._starts[-1] < self._count:
            self._starts.append(self._count)
        return Blocks(self._place, tuple(self._starts), self._planned, self._rows)


def _tables(planned: pa.Table | Iterable[pa.Table]) -> Iterator[pa.Table]:
    for table in [planned] if isinstance(planned, pa.Table) else planned:
        yield from slices(table)


def _cut(tables: Iterable[pa.Table], rows: int, cut: Cut) -> Iterator[pa.Table]:
    rest: list[pa.Table] = []
    for table in tables:
        if table.num_rows:
            *whole, last = cut(pa.concat_tables([*rest, table]), rows)
            yield from whole
            rest = [last]
    yield from rest


def _name(file: int) -> str:
    return f"{file:05d}.arrow"
