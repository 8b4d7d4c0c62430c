"""The page of a results folder: figures, differences, and the queries in which systems differ.

Reads the folder, what `evaluation.results` and `evaluation.excerpts` left there; and, of a system
that is the export of a run, which training samples lie next to the queries.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reasonembed import __version__
from reasonembed.config import flatten
from reasonembed.errors import EvaluationError, ReasonEmbedError
from reasonembed.evaluation.comparison_text import coarse_lines
from reasonembed.evaluation.excerpts import Looked, read_excerpts
from reasonembed.evaluation.leaderboard import (
    SHORT,
    Leaderboard,
    benchmark_tasks,
    leaderboard,
    published,
)
from reasonembed.evaluation.protocols import PROTOCOLS
from reasonembed.evaluation.results import RESULT_FILE, Result, find_result_files, read_result
from reasonembed.evaluation.standings import Difference, Standings, System, compare_systems
from reasonembed.report.blame import Closest, closest_samples
from reasonembed.report.charts import NOTHING, Html, join, number, table, tag
from reasonembed.report.drilldown import drilldown
from reasonembed.report.facts import METRICS, signed
from reasonembed.report.frame import write_page
from reasonembed.run import Run

FILE = "report.html"
_ByQuery = dict[str, dict[str, list[Closest]]]  # and by system
BASELINE = "bm25"  # where it was measured; else the first system by name
MAX_LISTS = 1_200  # lists of ten that the page holds, so that it stays below some 10 MB


@dataclass(frozen=True)
class _Task:
    """The results on one collection under one protocol."""

    protocol: str
    collection: str
    results: Mapping[str, tuple[Path, Result]]
    """Folder and result by the system's name; of several seeds the first."""

    @property
    def name(self) -> str:
        return f"{self.collection} ({self.protocol})"

    @cached_property
    def values(self) -> dict[str, dict[str, float]]:
        """The headline by query and system."""
        found: dict[str, dict[str, float]] = {}
        for system, (_, result) in self.results.items():
            for query_id, metrics in result.metrics.per_query.items():
                found.setdefault(query_id, {})[system] = metrics[result.headline]
        return found

    @property
    def headline(self) -> str:
        return next(iter(self.results.values()))[1].headline

    def telling(self) -> list[str]:
        """Its queries, those first in which systems differ most; of one system the worst first."""

        def rank(query_id: str) -> tuple[float, float, str]:
            figures = self.values[query_id].values()
            return min(figures) - max(figures), min(figures), query_id

        return sorted(self.values, key=rank)


def write_benchmark_report(results_dir: Path) -> Path:
    """Writes `report.html` into a results folder, over an earlier one.

    Raises:
        EvaluationError: The folder holds no result, or a damaged one.
        StorageError: The file cannot be written.
    """
    found = find_result_files(results_dir)
    if not found:
        raise EvaluationError(f"{results_dir} holds no result to write about; evaluate first")
    results, tasks = [result for _, result in found], _tasks(found)
    sections = {
        "Figures": _figures(results),
        "Leaderboard": _leaderboards(found),
        "Differences": _differences(results),
        "Queries": _queries(tasks),
        "How it was made": _origin(results),
    }
    anchors = {title: title.lower().replace(" ", "-") for title in sections}
    body = [
        _head(results_dir, results),
        tag("nav", *(tag("a", title, href=f"#{anchors[title]}") for title in sections)),
        *(
            tag("section", tag("h2", title, id=anchors[title]), part)
            for title, part in sections.items()
        ),
    ]
    file = results_dir / FILE
    title = f"Evaluation {results_dir.resolve().name}"
    cure = "the results themselves are kept"
    write_page(file, title=title, body=join(body), script="queries.js", cure=cure)
    return file


def _tasks(found: Sequence[tuple[Path, Result]]) -> list[_Task]:
    grouped: dict[tuple[str, str], dict[str, tuple[Path, Result]]] = {}
    for file, result in found:  # sorted by seed
        of_task = grouped.setdefault((result.protocol, result.collection), {})
        of_task.setdefault(result.system, (file.parent, result))
    return [_Task(*key, systems) for key, systems in sorted(grouped.items())]


def _head(results_dir: Path, results: Sequence[Result]) -> Html:
    protocols = {
        name: f"{name}: {PROTOCOLS[name].about}" if name in PROTOCOLS else name
        for name in sorted({result.protocol for result in results})
    }
    described = {
        "Protocol": "; ".join(protocols.values()),
        "Systems": ", ".join(sorted({result.system for result in results})),
        "Collections": ", ".join(sorted({result.collection for result in results})),
        **_common(results),
        "Written": f"{time.strftime('%Y-%m-%d %H:%M %Z')}, reasonembed {__version__}, "
        f"Python {platform.python_version()}",
    }
    items = [part for key, text in described.items() for part in (tag("dt", key), tag("dd", text))]
    title = tag("h1", f"Evaluation {results_dir.resolve().name}")
    return tag("header", title, tag("dl", *items, class_="facts"))


# ---- figures ------------------------------------------------------------------------------------


def _figures(results: Sequence[Result]) -> Html:
    rows = [
        [
            result.collection,
            result.protocol,
            _named(result),
            *(number(result.metrics.mean.get(metric), 4) for metric in METRICS),
            number(result.credited.mean[result.headline], 4) if result.credited else NOTHING,
            number(len(result.metrics.per_query)),
            number(result.metrics.num_missing),
            number(result.metrics.num_ties),
        ]
        for result in results
    ]
    head = ["collection", "protocol", "system", *METRICS.values()]
    head += ["copies credited", "queries", "missing", "ties"]
    said = (
        "Means over queries, as trec_eval measures them. Copies credited: the headline "
        "metric where a copy of a gold document counts as gold, which no official "
        "figure does. Missing: queries for which a system returned nothing at all; they count 0. "
        "Ties: documents whose score another one of their query has, too."
    )
    align = "lll" + "r" * (len(head) - 3)
    return join([table(head, rows, align=align), tag("p", said, class_="muted small")])


def _named(result: Result) -> str:
    return result.system if result.seed is None else f"{result.system} (seed {result.seed})"


def _leaderboards(found: Sequence[tuple[Path, Result]]) -> Html:
    """Ours beside what others published, for each benchmark of which something was published."""
    benchmarks = sorted({result.benchmark for _, result in found} & benchmark_tasks().keys())
    if not benchmarks:
        said = "Of these collections no figures were published that could stand beside ours."
        return tag("p", said, class_="empty")
    parts = []
    for benchmark in benchmarks:
        parts.append(tag("h3", benchmark))
        try:
            parts.append(_board(leaderboard(found, benchmark=benchmark)))
        except EvaluationError as error:  # figures that make no row are still worth a page
            parts.append(tag("p", f"They make no table: {error}", class_="bad"))
    return join(parts)


def _board(board: Leaderboard) -> Html:
    rows: list[list[object]] = []
    for row in sorted(board.rows, key=lambda row: not row.is_ours):
        name: object = tag("strong", f"{row.name} (ours)") if row.is_ours else row.name
        rows.append([name, row.protocol, *_points(board, row.values, row.average)])
        if row.is_ours and row.published is not None:
            by_task, average = row.difference()
            said = f"minus {row.published.name} as published"
            if row.published.protocol != row.protocol:
                said += f" (under {row.published.protocol}: not comparable)"
            cells = _points(board, by_task, average, signs=True)
            rows.append([tag("span", said, class_="muted"), "", *cells])
    head = ["system", "protocol", "mean", *(SHORT.get(task, task) for task in board.tasks)]
    said = (
        "nDCG@10 × 100. A mean is given for whole rows alone. Figures of different protocols are "
        "not comparable; a published row's protocol is the one of ours that comes closest."
    )
    sources = [
        [one.name, one.source, one.date, one.uncertain]
        for one in published()
        if one.benchmark == board.benchmark
    ]
    titles = ["system", "published in", "when", "what is uncertain"]
    return join(
        [
            table(head, rows, align="ll" + "r" * (len(head) - 2)),
            tag("p", said, class_="muted small"),
            tag("details", tag("summary", "Sources"), table(titles, sources, align="llll")),
        ]
    )


def _points(
    board: Leaderboard,
    values: Mapping[str, float],
    average: float | None,
    *,
    signs: bool = False,
) -> list[str]:
    def shown(value: float | None) -> str:
        if value is None:
            return NOTHING
        return f"{value:+.1f}".replace("-", "−") if signs else number(value, 1)

    return [shown(average), *(shown(values.get(task)) for task in board.tasks)]


# ---- differences --------------------------------------------------------------------------------


def _differences(results: Sequence[Result]) -> Html:
    """A table for each protocol and benchmark of which several systems have all collections."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        key = result.protocol, result.benchmark
        groups.setdefault(key, []).append(result)
    parts = [_compared(*key, group) for key, group in sorted(groups.items())]
    said = (
        "Each system minus the first. The interval is a bootstrap over queries: how far the mean "
        "depends on which queries were asked. p is of a two-sided randomisation test, and then by "
        "Holm's method: read off below 0.05, the chance of any false finding among all means over "
        "collections is below 5 %, and likewise among all single collections of a table. None of "
        "this knows what other seeds of training would give."
    )
    return join([tag("p", said, class_="muted small"), *parts])


def _compared(protocol: str, benchmark: str, results: Sequence[Result]) -> Html:
    heading = tag("h3", f"{benchmark} under {protocol}")
    of_system: dict[str, list[Result]] = {}
    for result in results:
        of_system.setdefault(result.system, []).append(result)
    wanted = {result.collection for result in results}
    whole = [
        System(name, own)
        for name, own in sorted(of_system.items(), key=lambda pair: (pair[0] != BASELINE, pair[0]))
        if {result.collection for result in own} == wanted
    ]
    others = sorted(of_system.keys() - {system.name for system in whole})
    parts: list[object] = [heading]
    if others:
        parts.append(tag("p", f"Without all {len(wanted)} collections: {', '.join(others)}."))
    if len(whole) < 2:
        parts.append(tag("p", "There are no two systems to compare.", class_="empty"))
        return join(parts)
    try:
        parts.append(_difference_table(compare_systems(whole)))
    except EvaluationError as error:  # figures that cannot be compared are still worth a page
        parts.append(tag("p", f"They cannot be compared: {error}", class_="bad"))
    return join(parts)


def _difference_table(found: Standings) -> Html:
    first = found.standings[0]

    def row(one: Difference) -> list[object]:
        mine = next(each for each in found.standings if each.system == one.system)
        a, b = (
            (each.overall if one.collection is None else each.by_collection[one.collection])
            for each in (mine, first)
        )
        paired = one.found
        return [
            one.system,
            one.collection or tag("strong", "mean over collections"),
            f"{number(a, 4)} − {number(b, 4)}",
            _coloured(signed(paired.mean_difference), paired.low, paired.high),
            f"{signed(paired.low)} to {signed(paired.high)}",
            number(paired.p_value, 4),
            number(one.p_corrected, 4),
            f"{paired.wins} / {paired.ties} / {paired.losses}",
        ]

    head = ["system", "on", f"{found.metric}, minus {first.system}", "difference"]
    head += ["95 % interval", "p", "p, Holm", "better / equal / worse"]
    return join(
        [
            table(head, map(row, found.differences), align="lllrrrrr"),
            *(tag("p", line, class_="muted small") for line in coarse_lines(found)),
        ]
    )


def _coloured(text: str, low: float, high: float) -> Html:
    kind = "good" if low > 0 else "bad" if high < 0 else "muted"
    return tag("span", text, class_=kind)


# ---- queries ------------------------------------------------------------------------------------


def _queries(tasks: Sequence[_Task]) -> Html:
    systems = list(dict.fromkeys(system for task in tasks for system in task.results))
    most = max(1, MAX_LISTS // sum(len(task.results) for task in tasks))
    looks: list[Html] = []
    problems: list[str] = []
    for place, task in enumerate(tasks):
        closest, unread = _closest(task, task.telling()[:most])
        looks += _looks(task, place, systems, closest)
        problems += unread
    if not looks:
        said = "No texts lie beside these results, so no query can be shown."
        return tag("p", said, class_="empty")
    said = (
        f"Of each collection and protocol at most {number(most)} queries, those in which the "
        "systems' figures lie farthest apart (of a single system: its worst). Texts are cut. Where "
        "a system was trained with several seeds, the first is shown."
    )
    return join(
        [
            tag("p", said, class_="muted small"),
            *(tag("p", problem, class_="muted small") for problem in problems),
            _controls(tasks, systems),
            tag("div", *looks, id="looks"),
        ]
    )


def _closest(task: _Task, query_ids: Sequence[str]) -> tuple[_ByQuery, list[str]]:
    """The training samples next to queries by system, where known; and what cannot be read."""
    found: _ByQuery = {query_id: {} for query_id in query_ids}
    problems: list[str] = []
    for system, (_, result) in task.results.items():
        try:
            run = _trained_run(result)
            near = closest_samples(run, query_ids) if run is not None else {}
        except ReasonEmbedError as error:
            problems.append(f"The closest training samples of {system} cannot be shown: {error}")
            continue
        for query_id, samples in near.items():
            found[query_id][system] = samples
    return found, problems


def _trained_run(result: Result) -> Run | None:
    """The run whose export the system is, if it lies there and was asked the same queries.

    A run that was trained again since has another model in the same place, and other samples.
    """
    model = Path(str(flatten(result.provenance).get("system.retrieve.encoder.model")))
    own = model.parent.parent / "evaluate" / "after"
    if model.parts[-2:] != ("export", "model") or not (own / RESULT_FILE).is_file():
        return None
    run = Run.existing(model.parent.parent)
    exported = run.directory("export").finished() or {}
    identity = result.provenance.get("identity", {})
    is_same = read_result(own).provenance["collection"] == result.provenance["collection"]
    is_same &= identity.get(f"retrieve.{result.system}.weights", "") == exported.get("weights")
    return run if is_same else None


def _looks(task: _Task, place: int, systems: Sequence[str], closest: _ByQuery) -> Iterable[Html]:
    excerpts = {system: read_excerpts(folder) for system, (folder, _) in task.results.items()}
    for query_id in closest:
        looked: dict[str, Looked] = {
            system: found[query_id] for system, found in excerpts.items() if query_id in found
        }
        if looked:
            values = task.values[query_id]
            numbers = (f"{values[one]:.6g}" if one in values else "-" for one in systems)
            yield drilldown(
                looked,
                values=values,
                metric=task.headline,
                label=task.name,
                closest=closest[query_id],
                data_group=place,
                data_values=" ".join(numbers),
            )


def _controls(tasks: Sequence[_Task], systems: Sequence[str]) -> Html:
    """Chooses and sorts; hidden where scripts do not run, as nothing would happen."""
    numbered = list(enumerate(systems))
    orders = {
        "written": "as written: largest differences first",
        "loss": "largest loss of the system against the other",
        "gain": "largest gain of the system over the other",
        "lowest": "lowest figure of the system",
    }
    words = Html('<input type="search" placeholder="words of a query, ids">')
    return tag(
        "form",
        _choice("Collection", [("", "all"), *((n, task.name) for n, task in enumerate(tasks))]),
        _choice("System", numbered),
        _choice("against", [*numbered[1:], *numbered[:1]]),
        _choice("Order", orders.items()),
        tag("label", "Holds", words),
        tag("output", aria_live="polite"),
        id="controls",
        class_="controls",
        hidden="",
    )


def _choice(label: str, options: Iterable[tuple[object, str]]) -> Html:
    return tag("label", label, tag("select", *(tag("option", t, value=v) for v, t in options)))


# ---- provenance ---------------------------------------------------------------------------------


def _common(results: Sequence[Result]) -> dict[str, str]:
    """What all results were made with; settings and identities stand with each result."""
    first, *others = map(_made, results)
    return {
        key: _said(value)
        for key, value in first.items()
        if "." not in key and all(key in one and one[key] == value for one in others)
    }


def _origin(results: Sequence[Result]) -> Html:
    """What differs from result to result; the rest stands in the head."""
    common = _common(results)
    parts = []
    for result in results:
        own = {key: value for key, value in _made(result).items() if key not in common}
        items = [part for k, v in own.items() for part in (tag("dt", k), tag("dd", _said(v)))]
        name = f"{result.collection} ({result.protocol}), {_named(result)}"
        parts.append(tag("details", tag("summary", name), tag("dl", *items, class_="facts")))
    said = "What all results have in common stands at the top; here is what each has of its own."
    return join([tag("p", said, class_="muted small"), *parts])


def _made(result: Result) -> dict[str, Any]:
    """Provenance by flat key, the packages in one line."""
    packages = result.provenance.get("packages") or {}
    said = ", ".join(f"{name} {version}" for name, version in packages.items())
    return flatten(result.provenance | {"packages": said})


def _said(value: Any) -> str:
    return NOTHING if value in (None, "") else str(value)
