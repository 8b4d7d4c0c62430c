"""Which samples make which step: a pure function of (samples, seed, epoch, step).

Reads the `samples` artifact; rows that are held out are never trained on. Every global batch holds
one task only, so that in-batch negatives come from the query's own corpus; tasks too small for that
may share batches, if `train.small_tasks` says so. A resumed run sees the batches that the
interrupted one would have seen, and each worker can compute the whole batch without talking to the
others, whatever their number.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from reasonembed.config import PAPER_TASK_BATCHES, TaskBatch, TrainConfig
from reasonembed.errors import ConfigError
from reasonembed.redapter.shares import share_sizes
from reasonembed.schemas import row_seed, stable_hash


@dataclass(frozen=True)
class Passage:
    """A document of a sample."""

    doc_id: str
    text: str
    text_hash: str


Labels = tuple[float | None, ...]


@dataclass(frozen=True)
class Sample:
    """One row of the `samples` artifact.

    Attributes:
        query_id: Of the row.
        task: Its task.
        instruction: What the query asks for.
        query: q.
        rewritten_query: q′; equal to q where nothing was rewritten.
        positives: At least one.
        negatives: At least one; none has the text of a positive.
        positive_labels: Relevance label of each positive; None where there is none.
        negative_labels: The same of the negatives.
        num_contradictions: Negatives left out because a positive has the same text.
    """

    query_id: str
    task: str
    instruction: str
    query: str
    rewritten_query: str
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]
    positive_labels: Labels
    negative_labels: Labels
    num_contradictions: int = 0


@dataclass(frozen=True)
class Group:
    """A query with the passages that it brings to a step: its positives, then hard negatives.

    Attributes:
        sample: The query.
        passages: As many as `group_size` says.
        labels: Of each passage.
        num_positives: One, unless `train.targets` asks for more.
    """

    sample: Sample
    passages: tuple[Passage, ...]
    labels: Labels
    num_positives: int = 1


_ROWS_AT_ONCE = 500
MIXED = "(small tasks)"
"""Name of what tasks form together that are too small for a batch of their own."""


def read_samples(tables: Iterable[pa.Table]) -> list[Sample]:
    """Training samples from tables of `schemas.SAMPLES`; see `samples_from_rows`."""
    return samples_from_rows(
        row
        for table in tables
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE)
        for row in batch.to_pylist()
    )


def samples_from_rows(rows: Iterable[Mapping[str, Any]], *, split: str = "train") -> list[Sample]:
    """Samples of a split from rows of `schemas.SAMPLES`; those of another are passed over.

    A passage that many queries share is kept once: of the 8 million of the paper's samples about
    one in seven is another text. A negative with the text of a positive is left out and counted.

    Raises:
        ConfigError: A row has no positive or no negative; nothing can be contrasted then.
    """
    known: dict[Passage, Passage] = {}
    return [_sample(row, known) for row in rows if row["split"] == split]


def _sample(row: Mapping[str, Any], known: dict[Passage, Passage]) -> Sample:
    for side in ("positives", "negatives"):
        if not row[side]:
            raise ConfigError(
                f"sample {row['query_id']!r} has no {side}; assemble must leave it out"
            )
    found = {p["text_hash"] for p in row["positives"]}
    negatives = [p for p in row["negatives"] if p["text_hash"] not in found]
    if not negatives:
        raise ConfigError(
            f"sample {row['query_id']!r} has no negatives but texts that are its positives too; "
            "assemble must leave it out"
        )
    return Sample(
        query_id=row["query_id"],
        task=row["task"],
        instruction=row["instruction"],
        query=row["query"],
        rewritten_query=row["rewritten_query"],
        positives=_passages(row["positives"], known),
        negatives=_passages(negatives, known),
        positive_labels=tuple(p.get("label") for p in row["positives"]),
        negative_labels=tuple(p.get("label") for p in negatives),
        num_contradictions=len(row["negatives"]) - len(negatives),
    )


def _passages(
    rows: Iterable[Mapping[str, Any]], known: dict[Passage, Passage]
) -> tuple[Passage, ...]:
    found = (Passage(p["doc_id"], p["text"], p["text_hash"]) for p in rows)
    return tuple(known.setdefault(passage, passage) for passage in found)


@dataclass(frozen=True)
class TaskCount:
    """What a whole run makes of a task's samples.

    Attributes:
        samples: Of the task.
        shown: Times that one of them is in a batch.
        never_shown: Of them, those that no batch holds.
        batch: The batches that they go into: the task, or `MIXED`.
    """

    samples: int
    shown: int
    never_shown: int
    batch: str


@dataclass(frozen=True)
class _Turn:
    """A sample in an epoch; with the tail carried over, its batch may be one of the next epoch."""

    sample: Sample
    epoch: int


class BatchPlan:
    """The batches of a training run.

    Each epoch shuffles every task, cuts it into batches of the task's size and shuffles the
    batches of all tasks. What is left of a task when its batches are cut, its tail, opens the
    task's next epoch (`tail: carry`), so that every sample has its turn once an epoch, or is
    dropped as by the released code (`tail: paper`); as each epoch shuffles anew, it is other
    samples that fall into the tail. No batch holds a sample twice: of an epoch that is opened by a
    tail, the samples of the tail come after its first batch.

    Tasks with fewer samples than one of their batches are refused, or (`small_tasks: merge`) form
    one mixed task together, with the common shape `batch_queries` x `group_size`.

    Args:
        samples: In any order; the plan depends on the set of query ids, not on their order.
        config: `batch_queries`, `group_size`, `task_batches`, `tail`, `small_tasks`, `targets`,
            `epochs`, `max_steps`, `seed`.
        num_workers: Of the training; their shares of a batch differ by one query at most.

    Raises:
        ConfigError: There is no sample; or a task has fewer than one batch, or small tasks have
            not enough together, so that they would silently vanish; or there are more workers than
            queries in a batch; or graded targets are asked for and a label is missing.
    """

    def __init__(
        self, samples: Sequence[Sample], config: TrainConfig, *, num_workers: int = 1
    ) -> None:
        self._config = config
        self._tasks: dict[str, list[Sample]] = {}
        for sample in sorted(samples, key=lambda s: s.query_id):
            self._tasks.setdefault(sample.task, []).append(sample)
        if not self._tasks:
            raise ConfigError("there are no samples to train on: none at all, or all held out")
        self._check_labels()
        self._pools = self._pooled()
        self._check_workers(num_workers)
        self._epoch = -1
        self._batches: list[list[_Turn]] = []
        self._tails: dict[str, list[_Turn]] = {}

    # ---- shapes and checks ------------------------------------------------------------------

    def shape(self, pool: str) -> TaskBatch:
        """Queries in a global batch of a task (or of `MIXED`), and passages that each brings."""
        common = TaskBatch(
            batch_queries=self._config.batch_queries, group_size=self._config.group_size
        )
        own = self._config.task_batches
        return (PAPER_TASK_BATCHES if own == "paper" else own).get(pool, common)

    def _key(self, pool: str) -> str:
        own = self._config.task_batches
        if own == "paper":
            if pool in PAPER_TASK_BATCHES:
                return f"batch_queries of train.task_batches (paper) for {pool}"
            return "train.batch_queries"
        return f"train.{f'task_batches.{pool}.' if pool in own else ''}batch_queries"

    def _pooled(self) -> dict[str, list[Sample]]:
        is_small = {
            task: len(rows) < self.shape(task).batch_queries
            for task, rows in sorted(self._tasks.items())
        }
        small = [task for task in is_small if is_small[task]]
        if small and self._config.small_tasks == "refuse":
            counts = [
                f"{self._key(task)} is {self.shape(task).batch_queries}, of {task} there are "
                f"{len(self._tasks[task])}"
                for task in small
            ]
            raise ConfigError(
                f"too few samples for one batch: {'; '.join(counts)}; lower it, make more queries "
                "or set train.small_tasks to merge"
            )
        pools = {task: self._tasks[task] for task in is_small if not is_small[task]}
        if small:
            pools[MIXED] = self._mixed(small)
        return pools

    def _mixed(self, small: Sequence[str]) -> list[Sample]:
        rows = sorted((s for task in small for s in self._tasks[task]), key=lambda s: s.query_id)
        if len(rows) < self._config.batch_queries:
            raise ConfigError(
                f"too few samples for one batch: train.batch_queries is "
                f"{self._config.batch_queries}, of the small tasks {', '.join(small)} together "
                f"there are {len(rows)}; lower it or make more queries"
            )
        return rows

    def _check_workers(self, num_workers: int) -> None:
        few = [
            f"{self._key(pool)} {size} ({pool}) is less than one query for each of {num_workers} "
            "workers"
            for pool in self._pools
            if (size := self.shape(pool).batch_queries) < num_workers
        ]
        if few:
            raise ConfigError("; ".join(few))

    def _check_labels(self) -> None:
        if self._config.targets != "graded":
            return
        for rows in self._tasks.values():
            for sample in rows:
                if None in sample.positive_labels or None in sample.negative_labels:
                    raise ConfigError(
                        f"train.targets 'graded' needs a label of every passage; sample "
                        f"{sample.query_id!r} has passages without; use 'paper' or 'several'"
                    )

    # ---- what there is ----------------------------------------------------------------------

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
    def num_contradictions(self) -> int:
        """Negatives that were left out because a positive of their query has the same text."""
        return sum(s.num_contradictions for rows in self._tasks.values() for s in rows)

    def steps_before(self, epoch: int) -> int:
        """Full batches of all tasks in the epochs before this one (from 0)."""
        if self._config.tail == "paper":
            return epoch * sum(
                len(rows) // self.shape(pool).batch_queries for pool, rows in self._pools.items()
            )
        return sum(
            epoch * len(rows) // self.shape(pool).batch_queries
            for pool, rows in self._pools.items()
        )

    @property
    def total_steps(self) -> int:
        """`max_steps` if given, which may span several epochs, else all epochs."""
        return self._config.max_steps or self.steps_before(self._config.epochs)

    def counts(self) -> dict[str, TaskCount]:
        """What the whole run shows of each task, and what it never does."""
        shown: Counter[str] = Counter()
        for turns in self._all_batches():
            shown.update(turn.sample.query_id for turn in turns)
        pool_of = {s.task: pool for pool, rows in self._pools.items() for s in rows}
        return {
            task: TaskCount(
                samples=len(rows),
                shown=sum(shown[s.query_id] for s in rows),
                never_shown=sum(not shown[s.query_id] for s in rows),
                batch=pool_of[task],
            )
            for task, rows in sorted(self._tasks.items())
        }

    def _all_batches(self) -> Iterator[list[_Turn]]:
        tails: dict[str, list[_Turn]] = {}
        left, epoch = self.total_steps, 0
        while left > 0:
            batches, tails = self._cut(epoch, tails)
            yield from batches[:left]
            left, epoch = left - len(batches), epoch + 1

    def notes(self) -> list[str]:
        """What a user should know of the plan: merged tasks, samples that are never shown."""
        lines = []
        counts = self.counts()
        merged = [task for task, count in counts.items() if count.batch == MIXED]
        if merged:
            lines.append(f"tasks too small for a batch of their own share batches: {merged}")
        for task, count in counts.items():
            if count.never_shown:
                lines.append(
                    f"{task}: {count.never_shown} of {count.samples} samples are in no batch of "
                    f"this run (tail: {self._config.tail})"
                )
        if self.num_contradictions:
            lines.append(
                f"{self.num_contradictions} negatives left out: a positive has the same text"
            )
        return lines

    # ---- batches ----------------------------------------------------------------------------

    def batch(self, step: int) -> tuple[Group, ...]:
        """The global batch of a step, counted from 0: one task's groups, all of one size."""
        if step < self.steps_before(max(self._epoch, 0)):
            self._epoch, self._tails = -1, {}  # an epoch's tail is known from those before it
        while step >= self.steps_before(self._epoch + 1):
            self._epoch += 1
            self._batches, self._tails = self._cut(self._epoch, self._tails)
        turns = self._batches[step - self.steps_before(self._epoch)]
        size = self.shape(self._pool_of(turns)).group_size
        return tuple(self._group(turn, size) for turn in turns)

    def _pool_of(self, turns: Sequence[_Turn]) -> str:
        task = turns[0].sample.task
        return task if task in self._pools else MIXED

    def _cut(
        self, epoch: int, tails: Mapping[str, list[_Turn]]
    ) -> tuple[list[list[_Turn]], dict[str, list[_Turn]]]:
        """An epoch's batches and what they leave over."""
        batches: list[list[_Turn]] = []
        new_tails: dict[str, list[_Turn]] = {}
        for pool, rows in sorted(self._pools.items()):
            size = self.shape(pool).batch_queries
            order = self._opened(epoch, pool, rows, tail=tails.get(pool, []))
            full = len(order) // size * size
            batches += [order[start : start + size] for start in range(0, full, size)]
            if self._config.tail == "carry":
                new_tails[pool] = order[full:]
        random.Random(row_seed(self._config.seed, "batches", epoch)).shuffle(batches)
        return batches, new_tails

    def _opened(
        self, epoch: int, pool: str, rows: Sequence[Sample], *, tail: list[_Turn]
    ) -> list[_Turn]:
        """The tail of the epoch before, then this epoch's turns in their order."""
        rng = random.Random(row_seed(self._config.seed, "task", epoch, pool))
        turns = [_Turn(sample, epoch) for sample in rng.sample(rows, len(rows))]
        if not tail:
            return turns
        again = {turn.sample.query_id for turn in tail}
        others = [turn for turn in turns if turn.sample.query_id not in again]
        head = others[: self.shape(pool).batch_queries - len(tail)]
        first = {turn.sample.query_id for turn in head}
        return [*tail, *head, *(turn for turn in turns if turn.sample.query_id not in first)]

    def _group(self, turn: _Turn, group_size: int) -> Group:
        sample = turn.sample
        rng = random.Random(row_seed(self._config.seed, "group", turn.epoch, sample.query_id))
        positives = self._positives(sample, rng, group_size)
        wanted = group_size - len(positives)
        # The released code repeats a list that is too short, so that every group has one size.
        pool = list(range(len(sample.negatives))) * math.ceil(wanted / len(sample.negatives))
        negatives = rng.sample(pool, wanted)
        return Group(
            sample,
            (*(sample.positives[i] for i in positives), *(sample.negatives[i] for i in negatives)),
            (
                *(sample.positive_labels[i] for i in positives),
                *(sample.negative_labels[i] for i in negatives),
            ),
            len(positives),
        )

    def _positives(self, sample: Sample, rng: random.Random, group_size: int) -> list[int]:
        every = range(len(sample.positives))
        if self._config.targets == "paper":
            return [rng.choice(every)]
        # Half of the group at most: a group without hard negatives teaches little.
        return rng.sample(every, min(len(every), group_size // 2))


def rank_slice(groups: Sequence[Group], *, rank: int, world_size: int) -> Sequence[Group]:
    """A worker's contiguous share; the shares of ranks 0, 1, ... concatenate to the batch."""
    sizes = share_sizes(len(groups), world_size=world_size)
    start = sum(sizes[:rank])
    return groups[start : start + sizes[rank]]
