"""Planned rows in, committed rows out: the one way in which a stage uses Ray Data.

The driver plans ids, subtracts those that are committed, and cuts the rest into blocks; an actor
pool maps blocks; each block is committed by the task that writes it. Nothing is shuffled, and the
only copy of an expensive row is in the object store just as long as one write takes.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy, Datasink
from ray.data.block import Block, BlockAccessor

from reasonembed.artifacts import CommittedRows, Ledger, Mapper, equal_blocks
from reasonembed.config import PoolConfig
from reasonembed.errors import ReasonEmbedError
from reasonembed.systems.local import Surroundings

_WRITE_CPUS = 0.1  # a write is short and must find room beside a pool that holds the machine
_MAX_RESTARTS = 8  # a block that kills its actor each time must end the stage, not loop


class LedgerSink(Datasink[list[str]]):
    """Commits every block to an artifact, from the task that holds it.

    A write task that Ray repeats gets the same part names and replaces its own work; a task of
    another attempt of the job has another attempt id and never touches it.
    """

    def __init__(self, artifact: Ledger) -> None:
        self._artifact, self._attempt = artifact, uuid.uuid4().hex[:12]

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[str]:
        """Writes and commits; data first, commit record second."""
        parts = []
        for number, block in enumerate(blocks):
            table = BlockAccessor.for_block(block).to_arrow()
            if table.num_rows:
                part = f"{self._attempt}-{ctx.task_idx:06d}-{number:03d}"
                parts.append(self._artifact.commit(part, table).part)
        return parts


@dataclass(frozen=True)
class _Broken:
    error: ReasonEmbedError

    def __call__(self, block: pa.Table) -> pa.Table:
        raise self.error


class Worker:
    """An actor that maps blocks with something that is expensive to build."""

    def __init__(self, *, make: Callable[[], Mapper]) -> None:
        try:
            self._map = make()
        except ReasonEmbedError as error:
            # Raised with the first block: Ray hands on what a call raises, but not what
            # a constructor does.
            self._map = _Broken(error)

    def __call__(self, block: pa.Table) -> pa.Table:
        """One block in, one block out."""
        return self._map(block)


class OverlappingWorker(Worker):
    """The same for engines that take several blocks at once."""

    async def __call__(self, block: pa.Table) -> AsyncIterator[pa.Table]:
        """One block in, one block out; other blocks run meanwhile."""
        yield await asyncio.to_thread(self._map, block)


def run_planned(
    job: Surroundings,
    planned: pa.Table,
    artifact: Ledger,
    make: Callable[[], Mapper],
    pool: PoolConfig,
    *,
    label: str,
    overlap: int = 1,
    cut: Callable[[pa.Table, int], list[pa.Table]] | None = None,
) -> int:
    """Computes the rows of `planned` that `artifact` lacks.

    Args:
        job: A `Job`, or what stands in for one.
        planned: Rows with the artifact's key; all of them, those that are done included.
        artifact: Where rows are committed.
        make: Builds the mapper inside an actor; must be picklable.
        pool: Actors and rows in a block.
        label: For the progress line.
        overlap: Blocks that an actor takes at once.
        cut: Cuts rows into blocks of at most so many; default all of that size but the last.

    Returns:
        Number of rows that were computed now.
    """
    todo = artifact.missing(planned, retry=job.retry)
    if not todo.num_rows:
        return 0
    blocks = (cut or equal_blocks)(todo, pool.batch_rows)
    dataset = ray.data.from_arrow(blocks).map_batches(
        OverlappingWorker if overlap > 1 else Worker,
        fn_constructor_kwargs={"make": make},
        batch_size=None,
        batch_format="pyarrow",
        # At least 1.75 blocks in flight for each that runs, or Ray never grows the pool.
        compute=ActorPoolStrategy(
            min_size=pool.min_actors,
            max_size=pool.max_actors,
            max_tasks_in_flight_per_actor=2 * overlap,
        ),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
        max_restarts=_MAX_RESTARTS,
        max_task_retries=_MAX_RESTARTS,
        **({"max_concurrency": overlap} if overlap > 1 else {}),
    )
    before = planned.num_rows - todo.num_rows
    counter = CommittedRows(artifact)
    with job.reporter.watching(
        label, total=planned.num_rows, done=lambda: before + counter.new(), unit="rows"
    ):
        dataset.write_datasink(LedgerSink(artifact), ray_remote_args={"num_cpus": _WRITE_CPUS})
    return todo.num_rows
