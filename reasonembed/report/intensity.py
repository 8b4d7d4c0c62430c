"""Which queries need reasoning: intensity by task, length and label, early and late in training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

from reasonembed.report.charts import Html, Spread, join, spread_chart, tag
from reasonembed.report.facts import Facts, is_finite

_MOST_TASKS = 24
_PARTS = ("first third of the steps", "last third")


@dataclass(frozen=True)
class _Query:
    task: str
    words: int


@dataclass(frozen=True)
class _Seen:
    """One sample in one step; `late` is 0 in the first third of the steps, 1 in the last."""

    query: _Query
    label: float | None
    intensity: float
    late: int


def by_sample(facts: Facts) -> Html:
    """Charts of the samples' intensity; nothing where no step has noted it."""
    seen = _seen(facts)
    if len({one.late for one in seen}) < 2:
        return join([])
    bounds = _length_bounds(sorted({one.query.words for one in seen}))
    labelled = [one for one in seen if one.label is not None]
    charts = [
        _chart("Reasoning intensity by task", seen, lambda one: (0, one.query.task)),
        _chart(
            "Reasoning intensity by length of the query",
            seen,
            lambda one: _length(one.query.words, bounds),
        ),
    ]
    if labelled:
        title = "Reasoning intensity by label of the positive"
        charts.append(_chart(title, labelled, lambda one: _grade(one.label)))
    heading = tag("h3", "Reasoning intensity of the samples")
    return join([heading, tag("p", _said(seen)), tag("div", *charts, class_="charts")])


def _seen(facts: Facts) -> list[_Seen]:
    steps = facts.sample_steps
    third = len(steps) // 3
    if not third:
        return []
    queries = _queries(facts)
    return [
        _Seen(queries[query_id], label, intensity, late)
        for late, part in enumerate((steps[:third], steps[-third:]))
        for row in part
        for query_id, label, intensity in zip(
            row["query_ids"], row["labels"], row["intensity"], strict=True
        )
        if query_id in queries and is_finite(intensity)
    ]


def _queries(facts: Facts) -> dict[str, _Query]:
    found = {}
    samples = facts.run.artifact("samples")
    for _, _, table in samples.row_groups(columns=["query_id", "task", "query"]):
        for row in table.to_pylist():
            found[row["query_id"]] = _Query(row["task"], len(row["query"].split()))
    return found


def _chart(title: str, seen: list[_Seen], key: Callable[[_Seen], tuple[int, str]]) -> Html:
    groups: dict[tuple[int, str], tuple[list[float], list[float]]] = {}
    for one in seen:
        groups.setdefault(key(one), ([], []))[one.late].append(one.intensity)
    shown = sorted(groups.items())[:_MOST_TASKS]
    spreads = [
        Spread.of(name, values, series=late)
        for (_, name), parts in shown
        for late, values in enumerate(parts)
        if values
    ]
    return spread_chart(
        title,
        spreads,
        names=_PARTS,
        x_label="intensity: quarters, and 10 % to 90 %",
        note=_note(groups, num_shown=len(shown)),
    )


def _note(
    groups: Mapping[tuple[int, str], tuple[list[float], list[float]]], *, num_shown: int
) -> str:
    """Which group is highest and which lowest, of all; at the start if none was seen late."""
    start, end = (
        {name: median(parts[late]) for (_, name), parts in groups.items() if parts[late]}
        for late in (0, 1)
    )
    when, middles = ("end", end) if end else ("start", start)
    low, high = min(middles, key=middles.__getitem__), max(middles, key=middles.__getitem__)
    if len(middles) == 1:
        note = f"At the {when} the median is {middles[high]:.2f}."
    else:
        note = (
            f"At the {when} the median is highest for {high} ({middles[high]:.2f}) and lowest for "
            f"{low} ({middles[low]:.2f})."
        )
    if len(groups) > num_shown:
        note += f" Drawn are the first {num_shown} of {len(groups)} by name."
    return note


def _said(seen: list[_Seen]) -> str:
    early, late = (median(s.intensity for s in seen if s.late == part) for part in (0, 1))
    above = sum(s.intensity > 1 for s in seen if s.late) / sum(s.late for s in seen)
    return (
        f"The median query had an intensity of {early:.2f} in the first third of the steps and of "
        f"{late:.2f} in the last; there, {above:.0%} of them found their positive more easily with "
        "reasoning than without."
    )


def _grade(label: float | None) -> tuple[int, str]:
    """The grade that a label belongs to; expected labels are fractions."""
    grade = round(label or 0)
    return grade, f"label {grade}"


def _length_bounds(words: list[int]) -> list[int]:
    """The longest query of each fourth of the lengths."""
    return sorted({words[(len(words) * part - 1) // 4] for part in range(1, 5)})


def _length(words: int, bounds: list[int]) -> tuple[int, str]:
    place = next(place for place, bound in enumerate(bounds) if words <= bound)
    if place == 0:
        return bounds[0], f"up to {bounds[0]} words"
    return bounds[place], f"{bounds[place - 1] + 1}–{bounds[place]} words"
