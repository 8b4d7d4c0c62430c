"""Which samples make which step: a pure function of (samples, seed, step).

Reads the `samples` artifact; rows that are held out are never trained on. Every global batch holds
one task only, so that in-batch negatives come from the query's own corpus. A resumed run sees the
batches that the interrupted one would have seen, and each worker can compute the whole batch
without talking to the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from reasonembed.config import TaskBatch, TrainConfig
from reasonembed.errors import ConfigError
from reasonembed.schemas import row_seed, stable_hash


@dataclass(frozen=True)
class Passage:
    """A labelled document of a sample."""

    doc_id: str
    text: str
    text_hash: str


@dataclass(frozen=True)
class Sample:
    """One row of the `samples` artifact."""

    query_id: str
    task: str
    instruction: str
    query: str
    rewritten_query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]


@dataclass(frozen=True)
class Group:
    """A query with the passages that it brings to a step: its positive, then hard negatives."""

    sample: Sample
    passages: tuple[Passage, ...]


_ROWS_AT_ONCE = 500


def read_samples(tables: Iterable[pa.Table]) -> list[Sample]:
    """Training samples from tables of `schemas.SAMPLES`; see `samples_from_rows`."""
    return samples_from_rows(
        row
        for table in tables
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE)
        for row in batch.to_pylist()
    )


def samples_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Training samples from rows of `schemas.SAMPLES`; those that are held out are passed over.

    A passage that many queries share is kept once: of the 8 million of the paper's samples about
    one in seven is another text.

    Raises:
        ConfigError: A row has no positive or no negative; nothing can be contrasted then.
    """
    known: dict[Passage, Passage] = {}
    return [_sample(row, known) for row in rows if row["split"] == "train"]


def _sample(row: Mapping[str, Any], known: dict[Passage, Passage]) -> Sample:
    return Sample(
        query_id=row["query_id"],
        task=row["task"],
        instruction=row["instruction"],
        query=row["query"],
        rewritten_query=row["rewritten_query"],
        positives=_passages(row, "positives", known),
        negatives=_passages(row, "negatives", known),
    )


def _passages(
    row: Mapping[str, Any], side: str, known: dict[Passage, Passage]
) -> tuple[Passage, ...]:
    if not row[side]:
        raise ConfigError(f"sample {row['query_id']!r} has no {side}; assemble must leave it out")
    found = (Passage(p["doc_id"], p["text"], p["text_hash"]) for p in row[side])
    return tuple(known.setdefault(passage, passage) for passage in found)


class BatchPlan:
    """The batches of a training run.

    Each epoch shuffles every task, cuts it into batches of the task's size, drops the task's
    incomplete tail as the released code does, and shuffles the batches of all tasks. As each epoch
    shuffles anew, it is other samples that fall into the tail.

    Args:
        samples: In any order; the plan depends on the set of query ids, not on their order.
        config: `batch_queries`, `group_size`, `task_batches`, `epochs`, `max_steps`, `seed`.
        num_workers: Of the training; each takes an equal share of every batch.

    Raises:
        ConfigError: There is no sample; or a task has fewer than one batch, so that its tail would
            be all of it and the task would silently vanish; or its batch cannot be shared out.
    """

    def __init__(
        self, samples: Sequence[Sample], config: TrainConfig, *, num_workers: int = 1
    ) -> None:
        self._tasks: dict[str, list[Sample]] = {}
        for sample in sorted(samples, key=lambda s: s.query_id):
            self._tasks.setdefault(sample.task, []).append(sample)
        self._config = config
        self._check(num_workers)
        self._epoch = -1
        self._order: list[list[Sample]] = []

    def shape(self, task: str) -> TaskBatch:
        """Queries in a global batch of the task, and passages that each brings."""
        common = TaskBatch(
            batch_queries=self._config.batch_queries, group_size=self._config.group_size
        )
        return self._config.task_batches.get(task, common)

    def _check(self, num_workers: int) -> None:
        if not self._tasks:
            raise ConfigError("there are no samples to train on: none at all, or all held out")
        small, uneven = [], []
        for task, rows in sorted(self._tasks.items()):
            own = task in self._config.task_batches
            key = f"train.{f'task_batches.{task}.' if own else ''}batch_queries"
            wanted = self.shape(task).batch_queries
            if len(rows) < wanted:
                small.append(f"{key} is {wanted}, of {task} there are {len(rows)}")
            if wanted % num_workers:
                uneven.append(f"{key} {wanted} ({task}) does not divide by {num_workers} workers")
        if small:
            raise ConfigError(
                f"too few samples for one batch: {'; '.join(small)}; lower it or make more queries"
            )
        if uneven:
            raise ConfigError("; ".join(uneven))

    @property
    def fingerprint(self) -> str:
        """Hash of the samples' whole content."""
        rows = (
            stable_hash(sample, size=16)
            for _, rows in sorted(self._tasks.items())
            for sample in rows
        )
        return stable_hash(*rows, size=16)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of all tasks."""
        return sum(
            len(rows) // self.shape(task).batch_queries for task, rows in self._tasks.items()
        )

    @property
    def total_steps(self) -> int:
        """`max_steps` if given, which may span several epochs, else all epochs."""
        return self._config.max_steps or self._config.epochs * self.steps_per_epoch

    def batch(self, step: int) -> tuple[Group, ...]:
        """The global batch of a step, counted from 0: one task's groups, all of one size."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return tuple(self._group(sample, epoch) for sample in self._order[index])

    def _shuffled(self, epoch: int) -> list[list[Sample]]:
        seed = self._config.seed
        batches: list[list[Sample]] = []
        for task, rows in sorted(self._tasks.items()):
            order = random.Random(row_seed(seed, "task", epoch, task)).sample(rows, len(rows))
            size = self.shape(task).batch_queries
            starts = range(0, len(order) - size + 1, size)
            batches += [order[start : start + size] for start in starts]
        random.Random(row_seed(seed, "batches", epoch)).shuffle(batches)
        return batches

    def _group(self, sample: Sample, epoch: int) -> Group:
        rng = random.Random(row_seed(self._config.seed, "group", epoch, sample.query_id))
        wanted = self.shape(sample.task).group_size - 1
        # The released code repeats a list that is too short, so that every group has one size.
        pool = sample.negatives * math.ceil(wanted / len(sample.negatives))
        return Group(sample, (rng.choice(sample.positives), *rng.sample(pool, wanted)))


def rank_slice(groups: Sequence[Group], *, rank: int, world_size: int) -> Sequence[Group]:
    """A worker's contiguous share; the shares of ranks 0, 1, ... concatenate to the batch."""
    assert len(groups) % world_size == 0, "the plan has checked that batches can be shared out"
    share = len(groups) // world_size
    return groups[rank * share : (rank + 1) * share]
