"""Writes what the tests on made-up clusters have seen into `docs/chaos.md` and `autoscaling.md`.

    CHAOS_TABLE=benchmarks/results/chaos.json pytest -m chaos tests/ray/test_chaos.py
    AUTOSCALING_TIMELINE=benchmarks/results/autoscaling.json \
        pytest -m chaos tests/ray/test_pool_autoscaling.py
    python benchmarks/cluster_tables.py

A page keeps its words; what stands between its two marks is written anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
BEGIN, END = "<!-- measured -->", "<!-- /measured -->"
Row = dict[str, Any]

# ---- chaos --------------------------------------------------------------------------------------


def chaos_table(rows: Sequence[Row]) -> str:
    """A line for each run, and a sum."""
    head = (
        "| seed | engine | kills | drains | while at work | rows | computed again | at most "
        "| steps again | equal | seconds |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [head, *(_chaos_line(row) for row in rows), "", _chaos_sum(rows)]
    return "\n".join(lines)


def _chaos_line(row: Row) -> str:
    is_compared = row["equal"] is not None
    cells = [
        row["seed"],
        row["engine"],
        row["kills"],
        row["drains"],
        ", ".join(row["stages"]) or "–",
        row["rows"],
        row["recomputed"] if is_compared else "–",
        row["bound"] if is_compared else "–",
        row["steps_repeated"] if is_compared else "–",
        {True: "yes", False: "no", None: "ids once"}[row["equal"]],
        f"{row['seconds']:.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _chaos_sum(rows: Sequence[Row]) -> str:
    compared = [row for row in rows if row["equal"] is not None]
    kills, drains = sum(row["kills"] for row in rows), sum(row["drains"] for row in rows)
    again, made = (sum(row[name] for row in compared) for name in ("recomputed", "rows"))
    bound, equal = sum(row["bound"] for row in compared), sum(row["equal"] for row in compared)
    return (
        f"{len(rows)} runs, {kills} machines killed and {drains} drained while a stage was at "
        f"work; {equal} of {len(compared)} runs with the scripted engine equal the undisturbed "
        f"one; {again} of {made} rows were computed again, {bound} might have been."
    )


# ---- autoscaling --------------------------------------------------------------------------------

_WIDTH, _LEFT, _PANEL, _GAP, _TOP = 760, 90, 84, 26, 26
_PANELS = (
    ("pending", "pending rows", "#b45309"),
    ("actors", "actors", "#1d4ed8"),
    ("machines", "machines", "#15803d"),
)


def autoscaling_table(moments: Sequence[Row]) -> str:
    """The moments at which a number of actors or machines changed."""
    head = "| seconds | stage | pending rows | actors | machines |\n|---|---|---|---|---|"
    changes = [moments[0]] + [
        now
        for before, now in pairwise(moments)
        if any(before[name] != now[name] for name in ("stage", "actors", "machines"))
    ]
    lines = [
        f"| {one['seconds']:.1f} | {one['stage'] or 'done'} | {one['pending']} | {one['actors']} "
        f"| {one['machines']} |"
        for one in changes
    ]
    return "\n".join([head, *lines])


def autoscaling_svg(moments: Sequence[Row]) -> str:
    """Pending rows, actors and machines over time, one below the other."""
    height = _TOP + len(_PANELS) * (_PANEL + _GAP) + 14
    span = max(moments[-1]["seconds"], 1.0)

    def across(seconds: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - 14) * seconds / span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        'font-family="sans-serif" font-size="12">',
        "<title>Pending rows, actors and machines over time</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        *_stages(moments, across, height),
    ]
    for number, (name, label, colour) in enumerate(_PANELS):
        top = _TOP + number * (_PANEL + _GAP)
        parts += _panel(moments, name, label, colour, top=top, across=across)
    for tick in range(0, int(span) + 1, 10 if span < 150 else 30):
        parts.append(
            f'<text x="{across(tick):.1f}" y="{height - 6}" text-anchor="middle" '
            f'fill="#374151">{tick} s</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _stages(moments: Sequence[Row], across: Callable[[float], float], height: int) -> list[str]:
    """A line where a stage with a pool begins, and its name."""
    starts = [
        now
        for before, now in pairwise(moments)
        if before["stage"] != now["stage"] and now["stage"] in ("generate", "annotate", "embed", "")
    ]
    parts = []
    for one in starts:
        x = across(one["seconds"])
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="14" y2="{height - 20}" stroke="#d1d5db"/>'
            f'<text x="{x + 3:.1f}" y="14" fill="#374151">{one["stage"] or "done"}</text>'
        )
    return parts


def _panel(
    moments: Sequence[Row],
    name: str,
    label: str,
    colour: str,
    *,
    top: int,
    across: Callable[[float], float],
) -> list[str]:
    most = max(max(one[name] for one in moments), 1)
    points, last = [], 0.0
    for one in moments:
        x, y = across(one["seconds"]), top + _PANEL * (1 - one[name] / most)
        points += [f"{x:.1f},{last:.1f}"] * bool(points) + [f"{x:.1f},{y:.1f}"]
        last = y
    bottom = top + _PANEL
    return [
        f'<line x1="{_LEFT}" x2="{_WIDTH - 14}" y1="{bottom}" y2="{bottom}" stroke="#9ca3af"/>',
        f'<text x="{_LEFT - 8}" y="{top + 10}" text-anchor="end" fill="#374151">{most}</text>',
        f'<text x="{_LEFT - 8}" y="{bottom}" text-anchor="end" fill="#374151">0</text>',
        f'<text x="{_LEFT - 8}" y="{top + _PANEL / 2 + 4:.0f}" text-anchor="end" '
        f'fill="{colour}">{label}</text>',
        f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="2"/>',
    ]


# ---- pages --------------------------------------------------------------------------------------


def between_marks(page: str, text: str) -> str:
    """A page with something else between its marks.

    Raises:
        ValueError: It has no marks.
    """
    changed, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}",
        lambda _: f"{BEGIN}\n{text}\n{END}",
        page,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError(f"the page must have {BEGIN} and {END} once, it has {count} pairs")
    return changed


def _renew(page: str, result: str, table: Callable[[Sequence[Row]], str]) -> list[Row]:
    file = RESULTS / result
    if not file.is_file():
        return []
    rows: list[Row] = json.loads(file.read_text())
    target = DOCS / page
    target.write_text(between_marks(target.read_text(), table(rows)))
    return rows


def main() -> None:
    """Both pages, as far as there are results."""
    _renew("chaos.md", "chaos.json", chaos_table)
    if moments := _renew("autoscaling.md", "autoscaling.json", autoscaling_table):
        (DOCS / "autoscaling.svg").write_text(autoscaling_svg(moments))


if __name__ == "__main__":
    main()
