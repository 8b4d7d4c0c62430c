"""What a measurement says to a person: one table for each benchmark, and what its figures mean."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from reasonembed.evaluation import protocols
from reasonembed.evaluation.comparison_text import LEVEL, aligned, metric_name, percent
from reasonembed.evaluation.results import Result
from reasonembed.evaluation.standings import Difference, System, compare_systems

_BESIDE = ("recall@10", "recall@100", "recip_rank")
_MEANING = {
    "ndcg": "nDCG@{k}: how far the documents that answer a query stand at the top of its first "
    "{k}; 100 if they stand before all others, 0 if none is there.",
    "recall": "recall@{k}: the share of the documents that answer a query which are among its "
    "first {k}.",
}
_CREDITED = "copies credited"  # as docs and report call it
_WIDE = 11  # columns of a table that still fit a terminal with their whole names


def table_lines(results: Sequence[Result], *, place: Path) -> list[str]:
    """A table for each benchmark, or for each collection that stands alone.

    Args:
        results: Of one protocol; the same systems on every collection.
        place: Where the results lie.
    """
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.benchmark, []).append(result)
    lines = [line for name, group in groups.items() for line in (*_table(name, group), "")]
    return [*lines, f"Results, runs and figures of every query: {place / results[0].protocol}"]


def _table(name: str, results: Sequence[Result]) -> list[str]:
    """Head, systems in rows, what was missing or tied, meaning, and the two that matter most."""
    first = results[0]
    by_system: dict[str, list[Result]] = {}
    for result in results:
        by_system.setdefault(result.system, []).append(result)
    one_task = len(next(iter(by_system.values()))) == 1
    rows = _metrics(by_system) if one_task else _tasks(by_system)
    return [
        _head(name, next(iter(by_system.values()))),
        f"Protocol {first.protocol}: {protocols.get(first.protocol).about}.",
        "",
        *aligned(rows, align="<" + ">" * (len(rows[0]) - 1)),
        "",
        *_notes(by_system),
        _meaning(first.headline),
        *_difference(by_system),
    ]


def _head(name: str, results: Sequence[Result]) -> str:
    queries = sum(len(result.metrics.per_query) for result in results)
    revisions = dict.fromkeys(filter(None, (one.provenance["revision"] for one in results)))
    tasks = f", {len(results)} tasks" if len(results) > 1 else ""
    revision = f", revision {', '.join(revisions)}" if revisions else ""
    return f"{name}: {queries:,} queries{tasks}{revision}; figures × 100"


def _metrics(by_system: dict[str, list[Result]]) -> list[tuple[str, ...]]:
    """One task: its metrics in columns."""
    headline = next(iter(by_system.values()))[0].headline
    names = tuple(dict.fromkeys((headline, *_BESIDE)))
    return [
        ("system", *map(metric_name, names), f"{metric_name(headline)}, {_CREDITED}"),
        *(
            (
                system,
                *(percent(result.metrics.mean[name]) for name in names),
                percent((result.credited or result.metrics).mean[headline]),
            )
            for system, (result,) in by_system.items()
        ),
    ]


def _tasks(by_system: dict[str, list[Result]]) -> list[tuple[str, ...]]:
    """Several tasks: the headline of each in columns, their plain mean before, credited after."""
    some = next(iter(by_system.values()))
    names = [result.collection.rpartition("/")[2] for result in some]
    if len(names) > _WIDE:
        names = [_short(name) for name in names]
    rows = []
    for system, results in by_system.items():
        values = [result.metrics.mean[result.headline] for result in results]
        credited = [(one.credited or one.metrics).mean[one.headline] for one in results]
        mean, with_copies = (percent(statistics.fmean(of)) for of in (values, credited))
        rows.append((system, mean, *map(percent, values), with_copies))
    head = f"{metric_name(some[0].headline)} of"
    return [(head, "mean", *names, f"mean, {_CREDITED}"), *rows]


def _short(name: str) -> str:
    """`theoremqa_questions` → `theoq`, as BRIGHT's tables have it; `biology` → `bio`."""
    first, _, second = name.partition("_")
    return f"{first[:4]}{second[:1]}" if second else name[:5]


def _notes(by_system: dict[str, list[Result]]) -> list[str]:
    """What a reader must know before trusting a figure."""
    lines = []
    for system, results in by_system.items():
        ties = sum(result.metrics.num_ties for result in results)
        missing = sum(result.metrics.num_missing for result in results)
        said = [f"{missing:,} queries have no answer and count 0"] if missing else []
        said += [f"{ties:,} documents tie with another of their query"] if ties else []
        for field, what in (
            ("rewrites_failed", "queries could not be rewritten and stayed as they were"),
            ("judgments_failed", "pairs could not be judged and count as the mean"),
            ("texts_cut", "texts were too long for the endpoint and were cut"),
        ):
            failed = sum(result.provenance.get(field, 0) for result in results)
            said += [f"{failed:,} {what}"] if failed else []
        if any("length" in result.provenance for result in results):
            said.append("texts are as long as the endpoint takes them, whatever the protocol says")
        if said:
            lines.append(f"{system}: {'; '.join(said)}.")
    return lines


def _meaning(headline: str) -> str:
    measure, _, k = headline.partition("@")
    return _MEANING[measure].format(k=k)


def _difference(by_system: dict[str, list[Result]]) -> list[str]:
    """The first system against the best of the others, with what chance can do."""
    if len(by_system) < 2:
        return []
    means = {
        system: statistics.fmean(result.metrics.mean[result.headline] for result in results)
        for system, results in by_system.items()
    }
    first, *others = by_system
    best = max(others, key=lambda system: means[system])
    # Against all: the best of several was picked by its figure, which chance lifts.
    compared = compare_systems([System(name, own) for name, own in by_system.items()])
    row = next(one for one in compared.differences if one.system == best)
    return [_sentence(row, first, best, metric_name(compared.metric), among=len(others))]


def _sentence(row: Difference, first: str, best: str, metric: str, *, among: int) -> str:
    found = row.found
    word = "above" if found.mean_difference >= 0 else "below"
    is_sure = (found.low > 0 or found.high < 0) and row.p_corrected < LEVEL
    sure = "" if is_sure else "; with other queries it could be none"
    corrected = f", corrected for {among} comparisons" if among > 1 else ""
    return (
        f"{best} is {percent(abs(found.mean_difference))} {metric} {word} {first} (95 % interval "
        f"{100 * found.low:+.1f} to {100 * found.high:+.1f}, p = {row.p_corrected:.4f}{corrected})"
        f"{sure}."
    )
