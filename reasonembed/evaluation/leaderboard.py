"""Our figures beside those that others published, task by task.

Published figures stand in `data/published.yaml`, each with its source and date. A mean over a
benchmark's tasks is given for whole rows alone: seven of twelve tasks are another benchmark.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.comparison_text import aligned, metric_name
from reasonembed.evaluation.results import Result
from reasonembed.evaluation.standings import System, check_same_data, check_seeds

METRIC = "ndcg@10"  # of all published figures
SHORT = {
    "biology": "Bio",
    "earth_science": "Earth",
    "economics": "Econ",
    "psychology": "Psy",
    "robotics": "Rob",
    "stackoverflow": "Stack",
    "sustainable_living": "Sust",
    "leetcode": "Leet",
    "pony": "Pony",
    "aops": "AoPS",
    "theoremqa_questions": "TheoQ",
    "theoremqa_theorems": "TheoT",
    "bioinformatics": "Bioinf",
    "medical-sciences": "MedSci",
    "medxpertqa-exam": "MedX",
    "medqa-diag": "MedQA",
    "pmc-treatment": "PMC-T",
    "pmc-clinical": "PMC-C",
    "iiyi-clinical": "IIYi",
}
"""Names of tasks as published tables write them."""


@dataclass(frozen=True)
class Published:
    """Figures that somebody published for one system.

    Attributes:
        name: As its authors call it.
        system: Its name in our catalogue; None if it has none there.
        benchmark: Such as "bright".
        protocol: The one of ours whose rules come closest, as far as the source tells; "unknown"
            where it does not.
        values: nDCG@10 × 100 by task; those that were published.
        average: As it was published; None if it was not.
        source: Where it was published.
        date: When, as far as it is known.
        uncertain: What is not known; how it was read.
    """

    name: str
    system: str | None
    benchmark: str
    protocol: str
    values: dict[str, float]
    average: float | None
    source: str
    date: str
    uncertain: str


@dataclass(frozen=True)
class Row:
    """One row of a leaderboard.

    Attributes:
        name: Of the system.
        protocol: Under which the figures stand.
        is_ours: Whether we measured it.
        values: Metric × 100 by task; those that there are.
        average: Of whole rows: as published, else the mean over the tasks. None of others.
        published: Of a published row, what it stands for; of ours, what it is compared with: the
            row of the same system, under the same protocol where there is one.
    """

    name: str
    protocol: str
    is_ours: bool
    values: dict[str, float]
    average: float | None
    published: Published | None = None

    def difference(self) -> tuple[dict[str, float], float | None]:
        """Ours minus published, by task that both have, and of the averages."""
        if self.published is None:
            return {}, None
        theirs = self.published.values
        by_task = {
            task: value - theirs[task] for task, value in self.values.items() if task in theirs
        }
        if self.average is None or self.published.average is None:
            return by_task, None
        return by_task, self.average - self.published.average


@dataclass(frozen=True)
class Leaderboard:
    """Published rows and ours on one benchmark.

    Attributes:
        benchmark: Such as "bright".
        metric: nDCG@10 beside published rows, else the headline of ours.
        tasks: In the order of its tables.
        rows: Published ones by average, then ours.
        revisions: Of the data that our rows stand on.
    """

    benchmark: str
    metric: str
    tasks: tuple[str, ...]
    rows: tuple[Row, ...]
    revisions: tuple[str, ...]


@cache
def published() -> tuple[Published, ...]:
    """All published rows, in the order of the file."""
    data = _data()
    return tuple(_published(row, data) for row in data["rows"])


def benchmark_tasks() -> dict[str, tuple[str, ...]]:
    """The tasks of each benchmark that has published rows."""
    return {name: tuple(tasks) for name, tasks in _data()["tasks"].items()}


@cache
def _data() -> dict[str, Any]:
    source = files("reasonembed.evaluation") / "data" / "published.yaml"
    loaded: dict[str, Any] = yaml.safe_load(source.read_text(encoding="utf-8"))
    return loaded


def _published(row: Mapping[str, Any], data: Mapping[str, Any]) -> Published:
    tasks, source = data["tasks"][row["benchmark"]], data["sources"][row["source"]]
    given = row.get("values") or [None] * len(tasks)
    values = {task: float(x) for task, x in zip(tasks, given, strict=True) if x is not None}
    average = row.get("average")
    if average is None and len(values) == len(tasks):
        average = statistics.fmean(values.values())
    return Published(
        name=row["name"],
        system=row.get("system"),
        benchmark=row["benchmark"],
        protocol=row["protocol"],
        values=values,
        average=average,
        source=source["where"],
        date=str(source["date"]),
        uncertain="; ".join(filter(None, (row.get("uncertain"), f"read {source['read']}"))),
    )


def leaderboard(found: Sequence[tuple[Path, Result]], *, benchmark: str) -> Leaderboard:
    """Published rows and ours on one benchmark.

    Args:
        found: Ours, each with its file; those of other benchmarks are left out. Several seeds of
            one system become one row, the mean over the seeds of each task.
        benchmark: Such as "bright".

    Raises:
        EvaluationError: There is nothing on that benchmark, ours have several headlines, a result
            lacks the metric, one stands twice, a row's seeds differ from task to task, or results
            of one protocol stand on different data.
    """
    ours = [one for _, one in found if one.benchmark == benchmark]
    theirs = [row for row in published() if row.benchmark == benchmark]
    if not ours and not theirs:
        raise EvaluationError(
            f"no results and no published figures for benchmark {benchmark!r}; published are: "
            f"{', '.join(benchmark_tasks())}"
        )
    tasks = benchmark_tasks().get(benchmark) or tuple(sorted({_task(one) for one in ours}))
    metric = METRIC if theirs else _headline(ours)
    rows = [Row(one.name, one.protocol, False, one.values, one.average, one) for one in theirs]
    rows.sort(key=lambda row: (row.average is None, -(row.average or 0)))
    return Leaderboard(
        benchmark=benchmark,
        metric=metric,
        tasks=tasks,
        rows=(*rows, *_ours(_systems(found, benchmark), theirs, tasks, metric=metric)),
        revisions=tuple(sorted({one.provenance["revision"] for one in ours} - {""})),
    )


def _headline(results: Sequence[Result]) -> str:
    headlines = sorted({one.headline for one in results})
    if len(headlines) > 1:
        raise EvaluationError(
            f"the results on {results[0].benchmark} have several headlines: "
            f"{', '.join(headlines)}; there is no common figure to rank them by"
        )
    return headlines[0]


def _systems(found: Sequence[tuple[Path, Result]], benchmark: str) -> list[System]:
    """Ours by system and protocol; a copy of a result is no seed of its own."""
    groups: dict[tuple[str, str], list[tuple[Path, Result]]] = {}
    for file, result in found:
        if result.benchmark == benchmark:
            groups.setdefault((result.protocol, result.system), []).append((file, result))
    systems = [
        System(system, [result for _, result in own], [file.parent for file, _ in own])
        for (_, system), own in sorted(groups.items())
    ]
    for one in systems:
        check_seeds(one)
    for _, of_protocol in groupby(systems, key=_protocol):
        check_same_data(list(of_protocol))
    return sorted(systems, key=lambda one: (one.name, _protocol(one)))


def _protocol(system: System) -> str:
    return system.results[0].protocol


def _ours(
    systems: Sequence[System], theirs: Sequence[Published], tasks: Sequence[str], *, metric: str
) -> list[Row]:
    rows = []
    for system in systems:
        by_task: dict[str, list[float]] = {}
        for result in system.results:
            if metric not in result.metrics.mean:
                raise EvaluationError(f"{result.system} has no {metric} on {result.collection}")
            by_task.setdefault(_task(result), []).append(100 * result.metrics.mean[metric])
        means = {task: statistics.fmean(by_task[task]) for task in tasks if task in by_task}
        seeds = len(next(iter(by_task.values())))
        rows.append(
            Row(
                name=system.name if seeds == 1 else f"{system.name} ({seeds} seeds)",
                protocol=_protocol(system),
                is_ours=True,
                values=means,
                average=statistics.fmean(means.values()) if len(means) == len(tasks) else None,
                published=_same_system(system.name, _protocol(system), theirs),
            )
        )
    return rows


def _same_system(system: str, protocol: str, theirs: Sequence[Published]) -> Published | None:
    same = [one for one in theirs if one.system == system]
    return min(same, key=lambda one: (one.protocol != protocol, -len(one.values)), default=None)


def _task(result: Result) -> str:
    return result.collection.removeprefix(f"{result.benchmark}/")


def leaderboard_lines(board: Leaderboard) -> list[str]:
    """The board as a table for a terminal, and where its published rows stand."""
    head = ("system", "protocol", "mean", *(SHORT.get(task, task) for task in board.tasks))
    table: list[tuple[str, ...]] = [head]
    for row in board.rows:
        shown = row.average, row.values
        mark = "→ " if row.is_ours else ""
        table.append((f"{mark}{row.name}", row.protocol, *_cells(board, *shown, sign="")))
        if row.is_ours and row.published is not None:
            by_task, average = row.difference()
            other = row.published.protocol
            label = f"  minus published ({row.published.name})"
            under = "" if other == row.protocol else f"of {other}!"
            table.append((label, under, *_cells(board, average, by_task, sign="+")))
    sources = dict.fromkeys(
        f"{row.published.source} ({row.published.date})"
        for row in board.rows
        if row.published is not None
    )
    return [
        f"{board.benchmark}: {metric_name(board.metric)} × 100, {len(board.tasks)} tasks; → marks "
        "figures of our own."
        + (f" Their data: {', '.join(board.revisions)}." if board.revisions else ""),
        "",
        *aligned(table, align="<<" + ">" * (len(head) - 2)),
        "",
        "Rows that lack tasks have no mean, but the number of tasks they have. Figures of "
        "different protocols are not comparable; that of a published row is the one of ours that "
        "comes closest. What is uncertain about each row: --json.",
        *(f"Published in {source}." for source in sources),
    ]


def leaderboard_json(board: Leaderboard) -> dict[str, Any]:
    """The board as JSON values; rows with their source, date, and what is uncertain."""
    rows = []
    for row in board.rows:
        by_task, average = row.difference() if row.is_ours else ({}, None)
        rows.append(asdict(row) | {"difference": by_task, "difference_of_average": average})
    return asdict(board) | {"rows": rows}


def _cells(
    board: Leaderboard, average: float | None, values: Mapping[str, float], *, sign: str
) -> list[str]:
    missing = f"{len(values)} of {len(board.tasks)}"
    return [
        missing if average is None else f"{average:{sign}.1f}",
        *(f"{values[task]:{sign}.1f}" if task in values else "–" for task in board.tasks),
    ]
