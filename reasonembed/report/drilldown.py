"""One query as a person looks at it: gold, what each system returned, what was excluded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from reasonembed.evaluation.excerpts import NUM_FOUND, Looked
from reasonembed.report.blame import Closest, came_back
from reasonembed.report.charts import NOTHING, Html, escape, join, number, table, tag
from reasonembed.report.facts import excerpt

NUM_GOLD = 10
_IN_CELL, _BELOW, _IN_SUMMARY = 70, 240, 150  # characters


def drilldown(
    looked: Mapping[str, Looked],
    *,
    values: Mapping[str, float],
    metric: str,
    label: str = "",
    closest: Mapping[str, Sequence[Closest]] | None = None,
    **attributes: object,
) -> Html:
    """A query that opens at a click or a key.

    Args:
        looked: What each system returned for it; at least one. The systems stand side by side.
        values: The query's figure by system.
        metric: What the figures are.
        label: What the query is a part of.
        closest: The training samples next to it, of those systems of which they are known.
        attributes: Of the element.
    """
    one = next(iter(looked.values()))
    figures = [f"{name} {number(values.get(name), 3)}" for name in looked]
    said = [
        tag("code", one.query_id),
        *([tag("span", label, class_="muted")] if label else []),
        tag("span", excerpt(" ".join(one.query.split()), _IN_SUMMARY), dir="auto"),
        tag("span", f"{metric}: {', '.join(figures)}", class_="muted small"),
    ]
    parts: list[object] = [
        tag("summary", join(said, " ")),
        tag("blockquote", one.query, class_="query", dir="auto"),
        tag("p", "Gold", class_="label"),
        _gold(looked),
        tag("p", "What came back", class_="label"),
        _found(looked),
        tag("p", _excluded(one)),
    ]
    for name, samples in (closest or {}).items():
        label = f"Closest training samples of {name}"
        parts += [tag("p", label, class_="label"), _closest(samples, looked.get(name, one))]
    parts.append(_texts(looked))
    return tag("details", *parts, class_="look", **attributes)


def _gold(looked: Mapping[str, Looked]) -> Html:
    """Gold documents, those that came back first, with their place in each system."""
    one = next(iter(looked.values()))

    def best(doc_id: str) -> tuple[int, str]:
        return min(each.ranks.get(doc_id, 10**9) for each in looked.values()), doc_id

    ordered = sorted(one.gold, key=best)
    rows = [
        [
            join([tag("code", doc_id), _grade(one.gold, doc_id)], " "),
            _quote(_text(looked, doc_id), _BELOW),
            *(number(each.ranks.get(doc_id)) for each in looked.values()),
        ]
        for doc_id in ordered[:NUM_GOLD]
    ]
    rest = len(ordered) - NUM_GOLD
    more = tag("p", f"and {number(rest)} more", class_="muted small") if rest > 0 else ""
    head = ["document", "it begins", *(f"place by {name}" for name in looked)]
    return join([table(head, rows, align="ll" + "r" * len(looked)), more])


def _grade(gold: Mapping[str, int], doc_id: str) -> str:
    return f"(relevance {gold[doc_id]})" if max(gold.values()) > 1 else ""


def _found(looked: Mapping[str, Looked]) -> Html:
    """The first documents of each system, side by side."""
    length = max(len(each.found) for each in looked.values())
    rows = [
        [number(place + 1), *(_cell(each, place) for each in looked.values())]
        for place in range(length)
    ]
    if not rows:
        return tag("p", "Nothing, from any system.", class_="empty")
    depth = [f"{name}: {number(each.num_found)}" for name, each in looked.items()]
    note = tag("p", f"The first {NUM_FOUND} of {', '.join(depth)}.", class_="muted small")
    return join([table(["", *looked], rows, align="r" + "l" * len(looked)), note])


def _cell(each: Looked, place: int) -> object:
    if place >= len(each.found):
        return NOTHING
    doc_id = each.found[place]
    gold = [tag("b", "gold", class_="good")] if doc_id in each.gold else []
    beginning = excerpt(" ".join(each.texts.get(doc_id, "").split()), _IN_CELL)
    return join(
        [
            join([tag("code", doc_id), number(each.scores[place], 4), *gold], " "),
            tag("span", beginning, class_="muted small", dir="auto"),
        ],
        Html("<br>"),
    )


def _excluded(one: Looked) -> str:
    if not one.num_excluded:
        return "Nothing was excluded."
    others = one.num_excluded - len(one.excluded)
    more = f" and {number(others)} more" if others else ""
    return f"Excluded, so that no system can return it: {', '.join(one.excluded)}{more}."


def _closest(closest: Sequence[Closest], one: Looked) -> Html:
    if not closest:
        return tag("p", "None.", class_="empty")
    rows = [
        [
            number(sample.similarity, 4),
            join([tag("code", sample.query_id), _quote(sample.query, _BELOW)]),
            ", ".join(
                doc_id if label is None else f"{doc_id} ({number(label, 2)})"
                for doc_id, label in sample.positives.items()
            ),
            tag("ul", *(tag("li", said) for said in came_back(sample, one))),
        ]
        for sample in closest
    ]
    head = ["cosine", "training query", "its positives (label)", "of what came back it knew"]
    return table(head, rows, align="rlll")


def _texts(looked: Mapping[str, Looked]) -> Html:
    """The beginning of every document that came back, once."""
    found = dict.fromkeys(doc_id for each in looked.values() for doc_id in each.found)
    rows = [
        [tag("code", doc_id), _quote(text, _BELOW)]
        for doc_id in found
        if (text := _text(looked, doc_id))
    ]
    if not rows:
        return escape("")
    head = tag("summary", "How the documents begin that came back")
    return tag("details", head, table(["document", "it begins"], rows, align="ll"))


def _text(looked: Mapping[str, Looked], doc_id: str) -> str:
    return next((each.texts[doc_id] for each in looked.values() if doc_id in each.texts), "")


def _quote(text: str, limit: int) -> Html:
    return tag("span", excerpt(" ".join(text.split()), limit) or NOTHING, dir="auto")
