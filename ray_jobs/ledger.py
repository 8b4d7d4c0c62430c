"""Planned rows in, committed rows out: the one way in which a stage uses Ray Data.

The driver goes through the planned rows once, leaves out those whose keys are committed, and writes
the rest to the artifact's own storage, in blocks. Only numbers of blocks travel through Ray: an
actor of the pool reads a block, maps it and commits the result. Nothing is shuffled, no row is in
the driver's memory or in the object store, and a block that is repeated finds its own commit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa
import ray.data

from ray_jobs.pools import in_flight, on_this_node, pool_options
from reasonembed.artifacts import Ledger, Mapper
from reasonembed.blocks import Blocks, Cut, write_blocks
from reasonembed.config import PoolConfig
from reasonembed.errors import ReasonEmbedError
from reasonembed.logs import WorkerLog
from reasonembed.progress import Counted
from reasonembed.shards import own_rows
from reasonembed.storage import Place
from reasonembed.systems.local import Surroundings
from reasonembed.tally import Tally

OnCommit = Callable[[str, pa.Table, float], None]
"""Called in the actor with the stage's label, the rows that it has committed, and the seconds."""

_LOG = logging.getLogger(__name__)

_COMPACT_BEYOND = 500  # parts; so many records are still read in an instant
_RAYS_ADVICE = "\nFailed to apply UDF"  # what it adds to every message, on its own settings
_CALLS = 1_024  # calls of actors that a stage's last part is cut into, at least


class Driver(Surroundings, Protocol):
    """A driver: a `Job`, or what stands in for one."""

    @property
    def owner(self) -> str:
        """The same after a restart; a folder's URI where it alone writes what lies below it."""


@dataclass(frozen=True)
class _Broken:
    error: ReasonEmbedError

    def __call__(self, block: pa.Table) -> pa.Table:
        raise self.error


class Worker:
    """An actor that maps and commits blocks, with something that is expensive to build.

    Args:
        make: Builds the mapper.
        blocks: What is planned.
        artifact: Where rows are committed.
        label: Of the stage.
        on_commit: See `OnCommit`.
        log: Where the actor's process logs; None to leave that as it is.
    """

    def __init__(
        self,
        *,
        make: Callable[[], Mapper],
        blocks: Blocks,
        artifact: Ledger,
        label: str,
        on_commit: OnCommit | None = None,
        log: WorkerLog | None = None,
    ) -> None:
        if log is not None:
            log.start()
        started = time.monotonic()
        self._blocks, self._artifact = blocks, artifact
        self._label, self._on_commit = label, on_commit
        try:
            self._map = on_this_node(make)()
        except ReasonEmbedError as error:
            # Raised with the first block: Ray hands on what a call raises, but not what
            # a constructor does.
            self._map = _Broken(error)
        facts = {"label": label, "seconds": round(time.monotonic() - started, 3)}
        _LOG.info("actor ready", extra={"facts": facts})

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """Numbers of blocks in; the number of rows that each has given out, and their tally."""
        done = [self._commit(one) for one in numbers["blocks"].to_pylist()[0]]
        return pa.table(
            {"rows": [rows for rows, _ in done], "tally": [tally.dumps() for _, tally in done]}
        )

    def _commit(self, number: int) -> tuple[int, Tally]:
        started = time.monotonic()
        block = self._blocks.read(number)
        part = f"{self._blocks.attempt}-{number:08d}"
        # Ray repeats what a lost machine has done; what is committed is not paid for twice.
        rows: int = block.num_rows
        if (before := self._artifact.committed(part)) is not None:
            return rows, Tally.of_commit(before)
        table = self._map(block)
        # Nor does one that was taken for lost, and ends late, replace what others may have used.
        if (before := self._artifact.committed(part)) is not None:
            return rows, Tally.of_commit(before)
        if table.num_rows:
            self._artifact.commit(part, table)
        seconds, tally = time.monotonic() - started, Tally.of(table)
        if self._on_commit is not None:
            self._on_commit(self._label, table, seconds)
        facts = {"label": self._label, "part": part, "seconds": round(seconds, 3)}
        _LOG.info("block committed", extra={"facts": facts | {"rows": dict(tally.statuses)}})
        return rows, tally


class OverlappingWorker(Worker):
    """The same for engines that take several blocks at once."""

    async def __call__(self, numbers: pa.Table) -> AsyncIterator[pa.Table]:
        """Numbers of blocks in; other blocks run meanwhile."""
        yield await asyncio.to_thread(super().__call__, numbers)


def run_planned(
    job: Driver,
    planned: pa.Table | Iterable[pa.Table],
    artifact: Ledger,
    make: Callable[[], Mapper],
    pool: PoolConfig,
    *,
    label: str,
    overlap: int = 1,
    cut: Cut | None = None,
    on_commit: OnCommit | None = None,
) -> int:
    """Computes the rows of `planned` that `artifact` lacks.

    Args:
        job: Who asks.
        planned: Rows with the artifact's key; all of them, those that are done included. As many
            tables of one schema where they are more than memory should hold.
        artifact: Where rows are committed.
        make: Builds the mapper inside an actor; must be picklable.
        pool: Actors and rows in a block.
        label: For the progress line.
        overlap: Blocks that an actor takes at once; no more are lost where it dies.
        cut: Cuts rows into blocks of at most so many; default all of that size but the last.
        on_commit: See `OnCommit`; picklable. Default the driver's own, if it has one.

    Returns:
        Number of rows that were computed now.
    """
    if (shard := getattr(job, "shard", None)) is not None:
        planned = own_rows(planned, artifact.key[0], shard)
    keep = artifact.anti_join(retry=job.retry)
    blocks = write_blocks(
        artifact.place, planned, keep=keep, rows=pool.batch_rows, cut=cut, owner=job.owner
    )
    if blocks.rows:
        worker = {
            "make": make,
            "blocks": blocks,
            "artifact": artifact,
            "label": label,
            "on_commit": on_commit or getattr(job, "on_commit", None),
            "log": getattr(job, "worker_log", None),
        }
        _run(job, blocks, worker, pool, overlap=overlap)
        blocks.place.delete()
    if _is_below(artifact.place, job.owner):
        artifact.compact(beyond=_COMPACT_BEYOND)
    return blocks.rows


def _is_below(place: Place, owner: str) -> bool:
    """Whether no other driver writes there."""
    while (parent := place.parent) != place and parent.name:
        if str(parent) == owner:
            return True
        place = parent
    return False


def _run(
    job: Driver, blocks: Blocks, worker: dict[str, object], pool: PoolConfig, *, overlap: int
) -> None:
    # An error of ours has a message and an exit code; wrapped, neither would be seen.
    ray.data.DataContext.get_current().raise_original_map_exception = True
    calls = numbers_for_calls(len(blocks), in_flight=pool.max_actors * in_flight(overlap))
    # Not `from_arrow`: it asks a task for each table, 45 KB of the driver's memory for each.
    dataset = ray.data.from_blocks(calls).map_batches(
        OverlappingWorker if overlap > 1 else Worker,
        fn_constructor_kwargs=worker,
        batch_size=1,  # one row is one call; Ray wants a number as soon as there are GPUs
        batch_format="pyarrow",
        **pool_options(pool, overlap=overlap),
    )
    done, tally = blocks.planned - blocks.rows, Tally()
    with job.reporter.watching(
        str(worker["label"]),
        total=blocks.planned,
        done=lambda: done,
        counted=lambda: Counted(tokens=tally.tokens, failed=tally.failed),
    ):
        # Counted as calls return, which is after their commits: the store is not asked.
        for batch in _batches(dataset):
            done += sum(batch["rows"].to_pylist())
            for one in batch["tally"].to_pylist():
                tally.add(Tally.loads(one))
            if (budget := getattr(job, "budget", None)) is not None:
                budget.guard()  # here: what has come back is committed, and no more is fed


def _batches(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    try:
        yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
    except ReasonEmbedError as error:  # Ray's twin of it, whose text is a traceback
        own = getattr(error, "cause", error)
        own.args = (str(own).partition(_RAYS_ADVICE)[0],)
        raise own from error


def numbers_for_calls(count: int, *, in_flight: int) -> list[pa.Table]:
    """Numbers of blocks, cut into calls of an actor: one a call at the end, before it more.

    So the last actor is not busy for long after the others, and ten million rows are some thousand
    calls.

    Args:
        count: Blocks.
        in_flight: Calls that the pool takes at once.
    """
    calls, start = [], 0
    while start < count:
        size = max(1, (count - start) // max(_CALLS, 2 * in_flight))
        calls.append(pa.table({"blocks": [list(range(start, start + size))]}))
        start += size
    return calls
