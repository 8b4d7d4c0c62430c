"""A comparison of systems as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reasonembed.evaluation.excerpts import read_excerpts
from reasonembed.evaluation.standings import Difference, Standing, Standings, System

EXPLANATION = (
    "95 % interval: if other queries of the same kind were asked, the difference would lie in it "
    "about 95 times of 100. p: how often swapping the two systems' answers at random, query by "
    "query, gives a difference at least this large; below 0.05 it is hardly chance. Where n "
    "comparisons are made, one of them looks good by chance more easily: “p of n” allows for it "
    "(Holm), and * marks where that is below 0.05."
)
LEVEL = 0.05
_ALL = "all, equally weighted"
_QUERY_CHARS = 160


def comparison_lines(compared: Standings) -> list[str]:
    """The table: what each system reached, then each against the baseline."""
    queries = sum(compared.num_queries.values())
    where = ", ".join(
        name + (f" ({compared.revisions[name]})" if compared.revisions[name] else "")
        for name in compared.num_queries
    )
    lines = [
        f"{metric_name(compared.metric)} × 100 under protocol {compared.protocol}, "
        f"{queries:,} queries: {where}",
        "",
        *aligned(
            [
                ("system", "mean", "over seeds"),
                *((one.system, percent(one.overall), _seeds(one)) for one in compared.standings),
            ],
            align="<><",
        ),
    ]
    baseline = compared.standings[0]
    for standing in compared.standings[1:]:
        rows = [one for one in compared.differences if one.system == standing.system]
        lines += ["", f"{standing.system} against {baseline.system}:"]
        lines += aligned(_against(compared, baseline, standing, rows), align="<>>>><>>>")
    return [*lines, "", EXPLANATION, *coarse_lines(compared)]


def coarse_lines(compared: Standings) -> list[str]:
    """Says where so many comparisons are made that the smallest p is not small enough."""
    least = 1 / (compared.num_samples + 1)
    return [
        f"{compared.num_samples:,} swaps give no p below {least:.1g}, and {family:,} times that "
        f"passes {LEVEL}: no difference here can be marked. Compare fewer systems or collections "
        "at a time."
        for family in compared.families
        if family * least >= LEVEL
    ]


def _against(
    compared: Standings, baseline: Standing, own: Standing, rows: Sequence[Difference]
) -> list[tuple[str, ...]]:
    head = ("queries", baseline.system, own.system, "difference", "95 % interval", "p")
    return [
        ("", *head, "p of n", "better/equal/worse"),
        *(_row(compared, baseline, own, row) for row in rows),
    ]


def _row(
    compared: Standings, baseline: Standing, own: Standing, row: Difference
) -> tuple[str, ...]:
    found, counts = row.found, compared.num_queries
    overall, single = compared.families
    if row.collection is None:
        name, queries, family = _ALL, sum(counts.values()), overall
        values = baseline.overall, own.overall
    else:
        name, queries, family = row.collection, counts[row.collection], single
        values = baseline.by_collection[name], own.by_collection[name]
    return (
        name,
        f"{queries:,}",
        *map(percent, values),
        _signed(found.mean_difference) + ("*" if row.p_corrected < LEVEL else " "),
        f"{_signed(found.low)} to {_signed(found.high)}",
        f"{found.p_value:.4f}",
        f"{row.p_corrected:.4f} of {family}",
        f"{found.wins}/{found.ties}/{found.losses}",
    )


def comparison_json(compared: Standings) -> dict[str, Any]:
    """The comparison as JSON values, unrounded, with the value of every query."""
    overall, single = compared.families
    found = asdict(compared) | {"families": {"overall": overall, "by_collection": single}}
    return {"format": "reasonembed-comparison/1", "explanation": EXPLANATION} | found


def moved_lines(compared: Standings, systems: Sequence[System], *, show: int) -> list[str]:
    """The queries that each system won and lost most against the baseline, with their texts.

    Args:
        compared: Of `systems`.
        systems: Texts are read from the excerpts beside their results; without them a query is
            shown by its id.
        show: Queries won and queries lost, each.
    """
    if not show:
        return []
    texts = _texts(systems)
    (baseline, before), *others = compared.values.items()
    lines = []
    for name, own in others:
        changes = {
            (collection, query): value - before[collection][query]
            for collection, values in own.items()
            for query, value in values.items()
        }
        ranked = sorted(changes, key=lambda key: (-changes[key], key))
        won = [key for key in ranked[:show] if changes[key] > 0]
        lost = [key for key in ranked[::-1][:show] if changes[key] < 0]
        for what, keys in (("won", won), ("lost", lost)):
            lines += ["", f"Queries that {name} {what} most against {baseline}:"]
            lines += [
                f"  {percent(before[collection][query])} to {percent(own[collection][query])}  "
                f"{collection} {query}  {texts.get((collection, query), '')}".rstrip()
                for collection, query in keys
            ] or ["  none"]
    return lines


def _texts(systems: Sequence[System]) -> dict[tuple[str, str], str]:
    """First words of the queries, by collection and id."""
    folders: dict[str, list[Path]] = {}
    for system in systems:
        for result, folder in zip(system.results, system.folders, strict=bool(system.folders)):
            folders.setdefault(result.collection, []).append(folder)
    found: dict[tuple[str, str], str] = {}
    for collection, places in folders.items():
        for looked in next(filter(None, map(read_excerpts, places)), {}).values():
            text = " ".join(looked.query.split())
            cut = text if len(text) <= _QUERY_CHARS else text[: _QUERY_CHARS - 1] + "…"
            found[collection, looked.query_id] = cut
    return found


def metric_name(metric: str) -> str:
    """How people write a metric."""
    return metric.replace("ndcg", "nDCG").replace("map@", "MAP@").replace("recip_rank", "MRR")


def _seeds(standing: Standing) -> str:
    if standing.spread is None:
        return ""
    return f"± {100 * standing.spread:.1f} ({len(standing.seeds)} seeds)"


def aligned(rows: Sequence[tuple[str, ...]], *, align: str) -> list[str]:
    """Rows as lines whose columns stand below one another; `align` holds < or > for each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def percent(value: float) -> str:
    """A figure from 0 to 1 as tables have it."""
    return f"{100 * value:.1f}"


def _signed(value: float) -> str:
    # No "-0.0" where a difference vanishes in rounding.
    return f"{round(100 * value, 1) + 0.0:+.1f}"
