"""Charts and tables as HTML: no script, no network, colours from the page's style sheet.

Whatever is not `Html` already is escaped where it is put in, so no text of a corpus or of a model
can become markup.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")
_MOST_MARKS = 300  # of one series; more overlap and only make the file large
_WIDTH, _HEIGHT = 440, 230  # of the drawing; small, so that its text stays legible on a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 424, 12, 186
_ROW = 20  # height of a bar that lies
_SMALLEST, _LARGEST = 1e-12, 1e15  # spans and values beyond these have no place on an axis
NOTHING = "–"

Point = tuple[float, float]


class Html(str):
    """Markup; every other string is text."""

    __slots__ = ()


def escape(value: object) -> Html:
    """Text as markup; characters that HTML cannot hold become `\ufffd`."""
    if isinstance(value, Html):
        return value
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", str(value))))


def tag(name: str, *children: object, **attributes: object) -> Html:
    """An element; `class_` is written `class`, and `_` inside a name `-`."""
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"'
        for key, value in attributes.items()
    )
    return Html(f"<{name}{written}>{''.join(map(escape, children))}</{name}>")


def join(parts: Iterable[object], separator: object = "") -> Html:
    """Parts side by side."""
    return Html(escape(separator).join(map(escape, parts)))


def number(value: object, digits: int = 0) -> str:
    """A number with thousands separators; a dash where there is none or it is not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NOTHING
    return f"{value:,.{digits}f}"


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, align: str) -> Html:
    """A table that scrolls sideways where it must.

    Args:
        head: A title for each column.
        rows: Cells.
        align: One letter for each column: `l`, or `r` for numbers.
    """
    kinds = [{"l": "text", "r": "number"}[letter] for letter in align]

    def row(cells: Sequence[object], name: str) -> Html:
        return tag(
            "tr", *(tag(name, cell, class_=kind) for cell, kind in zip(cells, kinds, strict=True))
        )

    body = tag("tbody", *(row(cells, "td") for cells in rows))
    return tag("div", tag("table", tag("thead", row(head, "th")), body), class_="scroll")


def meter(*shares: float, label: str, order: Sequence[int] = (1, 2, 3)) -> Html:
    """A bar, filled from the left by each share in turn.

    Args:
        shares: From 0 to 1; what is not is cut, what is not finite counts 0.
        order: The colour of each share, 1 to 3.
        label: What the bar says, for those who do not see it.
    """
    widths = [min(1.0, max(0.0, share)) if math.isfinite(share) else 0.0 for share in shares]
    fills = [
        tag("span", class_=f"fill s{place}", style=f"width:{100 * width:.1f}%")
        for place, width in zip(order, widths, strict=False)
    ]
    return tag("div", *fills, class_="meter", role="img", aria_label=label, title=label)


@dataclass(frozen=True)
class Series:
    """What a chart draws.

    Attributes:
        name: For the legend.
        points: x and y in the order of x; those that are not finite, or vast, are left out.
        form: A line, a dot for each point, or a dashed line to compare the others with.
    """

    name: str
    points: Sequence[Point]
    form: Literal["line", "dots", "mark"] = "line"


def line_chart(title: str, series: Sequence[Series], *, x_label: str, note: str = "") -> Html:
    """Series over one pair of axes; a sentence where there is nothing to draw.

    Args:
        title: What is drawn.
        series: Up to three, and marks.
        x_label: Of the axis below.
        note: One sentence that says what the chart tells.
    """
    kept = [Series(one.name, _drawable(one.points), one.form) for one in series]
    points = [point for one in kept for point in one.points]
    if not points:
        return _figure(title, (), tag("p", "no data", class_="empty"))
    axes = _Axes.around(points)
    drawn = [_draw(one, axes, place) for place, one in enumerate(kept, start=1) if one.points]
    legend = [(one.name, _colour(one, place)) for place, one in enumerate(kept, start=1)]
    span = f"{number(axes.y.low, 4)} to {number(axes.y.high, 4)}"
    drawing = _svg(f"{title}, {span}", axes.grid(x_label), *drawn)
    return _figure(title, legend if len(kept) > 1 else [], drawing, note=note)


def _colour(series: Series, place: int) -> str:
    return "mark" if series.form == "mark" else f"s{place}"


def bar_chart(title: str, bars: Sequence[tuple[str, float]], *, x_label: str) -> Html:
    """One bar a name, with its value above; a sentence where all are zero."""
    if not any(value > 0 for _, value in bars):
        return _figure(title, (), tag("p", "no data", class_="empty"))
    top = max(value for _, value in bars)
    slot = (_RIGHT - 10) / len(bars)
    drawn = []
    for place, (name, value) in enumerate(bars):
        height = (_BOTTOM - _TOP - 16) * value / top
        middle = 10 + slot * (place + 0.5)
        drawn += [
            tag(
                "rect",
                tag("title", f"{name}: {number(value)}"),
                x=f"{middle - slot * 0.38:.1f}",
                y=f"{_BOTTOM - height:.1f}",
                width=f"{slot * 0.76:.1f}",
                height=f"{height:.1f}",
                class_="s1",
            ),
            _text(middle, _BOTTOM + 17, name, "middle"),
        ]
        if value:
            drawn.append(_text(middle, _BOTTOM - height - 5, number(value), "middle"))
    floor = tag("line", x1=10, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="axis")
    described = ", ".join(f"{name}: {number(value)}" for name, value in bars if value)
    label = _text((10 + _RIGHT) / 2, _HEIGHT - 8, x_label, "middle")
    return _figure(title, (), _svg(f"{title}: {described}", *drawn, floor, label))


@dataclass(frozen=True)
class Spread:
    """How some values lie: 10 % of them are below `low`, 90 % below `high`, the rest in quarters.

    Attributes:
        name: What they belong to.
        series: Which of the chart's series they belong to, from 0.
    """

    name: str
    series: int
    low: float
    first: float
    median: float
    third: float
    high: float

    @classmethod
    def of(cls, name: str, values: Sequence[float], *, series: int) -> Spread:
        """The spread of at least one value."""
        ordered = sorted(values)
        at = [ordered[round(share * (len(ordered) - 1))] for share in (0.1, 0.25, 0.5, 0.75, 0.9)]
        return cls(name, series, *at)


def spread_chart(
    title: str, spreads: Sequence[Spread], *, names: Sequence[str], x_label: str, note: str = ""
) -> Html:
    """A bar from quarter to quarter for each spread, one below the other, with its median.

    Args:
        title: What is drawn.
        spreads: In order; those of one name stand together and are named once.
        names: Of the series.
        x_label: Of the axis.
        note: One sentence that says what the chart tells.
    """
    if not spreads:
        return _figure(title, (), tag("p", "no data", class_="empty"), note=note)
    ends = [end for one in spreads for end in (one.low, one.high)]
    left, bottom = 130, _TOP + _ROW * len(spreads)
    scale = _Scale.over(ends, left, _RIGHT, step=0)
    drawn = []
    for tick in scale.ticks:
        x = f"{scale.at(tick):.1f}"
        drawn.append(tag("line", x1=x, x2=x, y1=_TOP, y2=bottom, class_="grid"))
        drawn.append(_text(scale.at(tick), bottom + 17, _short(tick), "middle"))
    for place, one in enumerate(spreads):
        drawn.append(_spread(one, scale, _TOP + _ROW * place))
        if place == 0 or spreads[place - 1].name != one.name:
            short = one.name if len(one.name) <= 19 else f"{one.name[:18]}…"
            named = tag("title", one.name)
            y = _TOP + _ROW * (place + 0.5) + 4
            drawn.append(_text(left - 8, y, join([named, short]), "end"))
    drawn.append(_text((left + _RIGHT) / 2, bottom + 36, x_label, "middle"))
    described = ", ".join(
        f"{one.name} {names[one.series]}: median {_short(one.median)}" for one in spreads
    )
    legend = [(name, f"s{place}") for place, name in enumerate(names, start=1)]
    drawing = _svg(f"{title}: {described}", *drawn, height=bottom + 44)
    return _figure(title, legend, drawing, note=note)


def _spread(one: Spread, scale: _Scale, top: float) -> Html:
    middle, colour = top + _ROW / 2, f"s{one.series + 1}"
    low, median, high = (f"{scale.at(value):.1f}" for value in (one.low, one.median, one.high))
    first, third = scale.at(one.first), scale.at(one.third)
    bar = tag(
        "rect",
        tag("title", " – ".join(_short(v) for v in (one.first, one.median, one.third))),
        x=f"{first:.1f}",
        y=f"{middle - 5:.1f}",
        width=f"{max(1.0, third - first):.1f}",
        height=10,
        class_=f"band {colour}",
    )
    whole = tag("line", x1=low, x2=high, y1=middle, y2=middle, class_=f"line {colour}")
    mark = tag("line", x1=median, x2=median, y1=middle - 7, y2=middle + 7, class_="median")
    return join([whole, bar, mark])


def smoothed(points: Sequence[Point], *, share: float = 0.1) -> list[Point]:
    """Each point's mean with its neighbours, together `share` of the series and at least three."""
    finite = _drawable(points)
    reach = max(1, round(len(finite) * share / 2))
    out = []
    for place, (x, _) in enumerate(finite):
        near = [y for _, y in finite[max(0, place - reach) : place + reach + 1]]
        out.append((x, math.fsum(near) / len(near)))
    return out


def _drawable(points: Sequence[Point]) -> list[Point]:
    # A comparison with NaN is false, so that NaN goes as well.
    return [(x, y) for x, y in points if abs(x) <= _LARGEST and abs(y) <= _LARGEST]


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    ticks: list[float]
    start: float
    stop: float

    @classmethod
    def over(cls, values: Sequence[float], start: float, stop: float, *, step: float) -> _Scale:
        """Whole ticks around the values, at least `step` apart."""
        low, high = min(values), max(values)
        if high - low <= max(1e-9 * max(abs(low), abs(high)), _SMALLEST):
            room = abs(low) * 0.1 if abs(low) > _SMALLEST else 1.0
            low, high = min(low, max(0.0, low - room)), high + room
        step = max(step, _round_step((high - low) / 4))
        first, last = math.floor(low / step), math.ceil(high / step)
        ticks = [tick * step for tick in range(first, last + 1)]
        return cls(ticks[0], ticks[-1], ticks, start, stop)

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + (self.stop - self.start) * share


def _round_step(step: float) -> float:
    """The next of 1, 2, 2.5, 5 and 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))


@dataclass(frozen=True)
class _Axes:
    x: _Scale
    y: _Scale

    @classmethod
    def around(cls, points: Sequence[Point]) -> _Axes:
        return cls(
            _Scale.over([x for x, _ in points], _LEFT, _RIGHT, step=1),
            _Scale.over([y for _, y in points], _BOTTOM, _TOP, step=0),
        )

    def grid(self, x_label: str) -> Html:
        lines = []
        for tick in self.y.ticks:
            y = f"{self.y.at(tick):.1f}"
            lines.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"))
            lines.append(_text(_LEFT - 6, self.y.at(tick) + 4, _short(tick), "end"))
        lines += [
            _text(self.x.at(tick), _BOTTOM + 17, _short(tick), "middle") for tick in self.x.ticks
        ]
        lines.append(tag("line", x1=_LEFT, x2=_RIGHT, y1=_BOTTOM, y2=_BOTTOM, class_="axis"))
        lines.append(_text((_LEFT + _RIGHT) / 2, _HEIGHT - 8, x_label, "middle"))
        return join(lines)


def _short(value: float) -> str:
    rounded = float(f"{value:.6g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:g}"


def _draw(series: Series, axes: _Axes, place: int) -> Html:
    marks = _thinned(series.points)
    if series.form == "dots" or len(marks) == 1:
        return join(
            tag(
                "circle",
                tag("title", f"{_short(x)}: {y:.6g}"),
                cx=f"{axes.x.at(x):.1f}",
                cy=f"{axes.y.at(y):.1f}",
                r=2.5 if len(marks) > 1 else 5,
                class_=f"dot {_colour(series, place)}",
            )
            for x, y in marks
        )
    path = " ".join(f"{axes.x.at(x):.1f},{axes.y.at(y):.1f}" for x, y in marks)
    return tag("polyline", points=path, class_=f"line {_colour(series, place)}")


def _thinned(points: Sequence[Point]) -> list[Point]:
    if len(points) <= _MOST_MARKS:
        return list(points)
    stride = (len(points) - 1) / (_MOST_MARKS - 1)
    return [points[round(place * stride)] for place in range(_MOST_MARKS)]


def _svg(description: str, *children: object, height: int = _HEIGHT) -> Html:
    inside = (tag("title", description), *children)
    return tag("svg", *inside, viewBox=f"0 0 {_WIDTH} {height}", role="img")


def _text(x: float, y: float, text: object, anchor: str) -> Html:
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)


def _figure(title: str, legend: Sequence[tuple[str, str]], body: Html, *, note: str = "") -> Html:
    """A drawing with its title, the colour of each of its names, and what it tells."""
    names = [
        tag("span", tag("i", class_=f"key {colour}"), name, class_="legend")
        for name, colour in legend
    ]
    said = [tag("p", note, class_="note")] if note else []
    return tag("figure", tag("figcaption", tag("strong", title), *names), body, *said)
