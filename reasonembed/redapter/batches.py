"""Which samples make which step: a pure function of (samples, seed, step).

Reads the `samples` artifact. Every global batch holds one task only, so that in-batch negatives
come from the query's own corpus. A resumed run sees the batches that the interrupted one would
have seen, and each worker can compute the whole batch without talking to the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reasonembed.config import TrainConfig
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


def samples_from_rows(rows: Iterable[Mapping[str, Any]]) -> list[Sample]:
    """Reads rows of the `samples` artifact (`schemas.SAMPLES`).

    Raises:
        ConfigError: A row has no positive or no negative; nothing can be contrasted then.
    """
    return [_sample(row) for row in rows]


def _sample(row: Mapping[str, Any]) -> Sample:
    return Sample(
        query_id=row["query_id"],
        task=row["task"],
        instruction=row["instruction"],
        query=row["query"],
        rewritten_query=row["rewritten_query"],
        positives=_passages(row, "positives"),
        negatives=_passages(row, "negatives"),
    )


def _passages(row: Mapping[str, Any], side: str) -> tuple[Passage, ...]:
    if not row[side]:
        raise ConfigError(f"sample {row['query_id']!r} has no {side}; assemble must leave it out")
    return tuple(Passage(p["doc_id"], p["text"], p["text_hash"]) for p in row[side])


class BatchPlan:
    """The batches of a training run.

    Each epoch shuffles every task, cuts it into batches of `batch_queries`, drops the task's
    incomplete tail as the released code does, and shuffles the batches of all tasks. As each epoch
    shuffles anew, it is other samples that fall into the tail.

    Args:
        samples: In any order; the plan depends on the set of query ids, not on their order.
        config: `batch_queries`, `group_size`, `epochs`, `max_steps`, `seed`.

    Raises:
        ConfigError: There is no sample, or a task has fewer than `batch_queries`, so that its
            tail would be all of it and the task would silently vanish.
    """

    def __init__(self, samples: Sequence[Sample], config: TrainConfig) -> None:
        self._tasks: dict[str, list[Sample]] = {}
        for sample in sorted(samples, key=lambda s: s.query_id):
            self._tasks.setdefault(sample.task, []).append(sample)
        self._config = config
        self._check()
        self._epoch = -1
        self._order: list[list[Sample]] = []

    def _check(self) -> None:
        wanted = self._config.batch_queries
        small = {task: len(rows) for task, rows in self._tasks.items() if len(rows) < wanted}
        if small or not self._tasks:
            found = ", ".join(f"{task}: {count}" for task, count in sorted(small.items()))
            raise ConfigError(
                f"train.batch_queries is {wanted}, but there are fewer samples of "
                f"{found or 'every task: 0'}; lower train.batch_queries or make more queries"
            )

    @property
    def fingerprint(self) -> str:
        """Hash of the samples' whole content."""
        rows = [repr(sample) for _, rows in sorted(self._tasks.items()) for sample in rows]
        return stable_hash(*rows, size=16)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of all tasks."""
        return sum(len(rows) // self._config.batch_queries for rows in self._tasks.values())

    @property
    def total_steps(self) -> int:
        """`max_steps` if given, which may span several epochs, else all epochs."""
        return self._config.max_steps or self._config.epochs * self.steps_per_epoch

    def batch(self, step: int) -> tuple[Group, ...]:
        """The global batch of a step, counted from 0: `batch_queries` groups of one task."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return tuple(self._group(sample, epoch) for sample in self._order[index])

    def _shuffled(self, epoch: int) -> list[list[Sample]]:
        seed, size = self._config.seed, self._config.batch_queries
        batches: list[list[Sample]] = []
        for task, rows in sorted(self._tasks.items()):
            order = random.Random(row_seed(seed, "task", epoch, task)).sample(rows, len(rows))
            starts = range(0, len(order) - size + 1, size)
            batches += [order[start : start + size] for start in starts]
        random.Random(row_seed(seed, "batches", epoch)).shuffle(batches)
        return batches

    def _group(self, sample: Sample, epoch: int) -> Group:
        rng = random.Random(row_seed(self._config.seed, "group", epoch, sample.query_id))
        wanted = self._config.group_size - 1
        # The released code repeats a list that is too short, so that every group has one size.
        pool = sample.negatives * math.ceil(wanted / len(sample.negatives))
        return Group(sample, (rng.choice(sample.positives), *rng.sample(pool, wanted)))


def rank_slice(groups: Sequence[Group], *, rank: int, world_size: int) -> Sequence[Group]:
    """A worker's contiguous share; the shares of ranks 0, 1, ... concatenate to the batch.

    Raises:
        ConfigError: The batch does not divide by the number of workers.
    """
    if len(groups) % world_size:
        raise ConfigError(
            f"train.batch_queries {len(groups)} does not divide by {world_size} workers"
        )
    share = len(groups) // world_size
    return groups[rank * share : (rank + 1) * share]
