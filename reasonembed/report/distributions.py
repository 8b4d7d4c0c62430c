"""Distributions: labels and lengths of queries."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from reasonembed.report.charts import Html, bar_chart, join, meter, number, table, tag
from reasonembed.report.facts import NOT_RUN, Facts, is_finite


def distributions(facts: Facts) -> Html:
    """Histograms of what the stages have left so far."""
    parts: list[object] = []
    judged = facts.rows("judgments", "relevance_label", "expected_label")
    if judged is not None:
        grades = Counter(judged.column("relevance_label").to_pylist())
        bars = [(str(grade), float(grades[grade])) for grade in range(1, 6)]
        bars.append(("none", float(grades[None])))
        parts.append(bar_chart("Relevance label of judged pairs", bars, x_label="label"))
        if expected := judged.column("expected_label").drop_null().to_pylist():
            title = "Expected label of judged pairs"
            parts.append(bar_chart(title, _quarters(expected), x_label="label"))
    lengths = [*_lengths(facts), *_labels_by_condition(facts)]
    parts += lengths[:1]
    if not parts:
        return NOT_RUN
    return join([tag("div", *parts, class_="charts"), *lengths[1:]])


def _quarters(labels: Iterable[float]) -> list[tuple[str, float]]:
    """Counts from 1 to 5 in steps of a quarter, each bar named by its lower end where whole."""
    counts = Counter(min(15, max(0, int((label - 1) * 4))) for label in labels if is_finite(label))
    return [(f"{1 + i // 4}" if i % 4 == 0 else "", float(counts[i])) for i in range(16)]


def _lengths(facts: Facts) -> list[Html]:
    """A histogram of words a query, and a table of asked against written."""
    seeds = facts.rows("seeds", "query_id", "min_words", "max_words")
    queries = facts.rows("queries", "query_id", "query")
    if seeds is None or queries is None:
        return []
    asked = {row["query_id"]: (row["min_words"], row["max_words"]) for row in seeds.to_pylist()}
    written: dict[tuple[int, int], list[int]] = {}
    for row in queries.to_pylist():
        if row["query"] is not None and row["query_id"] in asked:
            written.setdefault(asked[row["query_id"]], []).append(len(row["query"].split()))
    if not written:
        return []
    every = [words for counts in written.values() for words in counts]
    return [
        bar_chart("Query length", _histogram(every), x_label="words, from"),
        tag("h3", "Query length against the range that was asked for"),
        table(
            ["words asked", "queries", "shorter, within, longer", "within", "median", "longest"],
            [
                _length_row(low, high, sorted(counts))
                for (low, high), counts in sorted(written.items())
            ],
            align="lrlrrr",
        ),
    ]


def _labels_by_condition(facts: Facts) -> list[Html]:
    """Tables of labels by task, requested length and education level."""
    judged = facts.rows("judgments", "query_id", "relevance_label")
    seeds = facts.rows("seeds", "query_id", "task", "min_words", "max_words", "education_level")
    if judged is None or seeds is None or not judged.num_rows:
        return []
    # Grouped before they are joined: pairs are many, queries and grades are few.
    counts = judged.group_by(["query_id", "relevance_label"]).aggregate([([], "count_all")])
    rows = counts.join(seeds, keys="query_id", join_type="inner").to_pylist()
    parts: list[Html] = []
    for title, condition in _CONDITIONS.items():
        groups: dict[tuple[object, ...], Counter[int | None]] = {}
        for row in rows:
            group = groups.setdefault(tuple(row[name] for name in condition), Counter())
            group[row["relevance_label"]] += row["count_all"]
        shown = [_label_row(group, counts) for group, counts in sorted(groups.items())]
        head = [title, "pairs", "4–5, 3, 1–2", *"12345", "none", "mean"]
        parts += [
            tag("h3", f"Relevance label by {title}"),
            table(head, shown, align="lrlrrrrrrr"),
        ]
    return parts


_CONDITIONS = {
    "task": ("task",),
    "words asked": ("min_words", "max_words"),
    "education level": ("education_level",),
}


def _label_row(group: tuple[object, ...], counts: Counter[int | None]) -> list[object]:
    graded = max(1, counts.total() - counts[None])
    shares = [(counts[5] + counts[4]) / graded, counts[3] / graded]
    shares.append((counts[2] + counts[1]) / graded)
    label = ", ".join(f"{share:.0%}" for share in shares)
    mean = sum(grade * n for grade, n in counts.items() if grade) / graded
    return [
        "–".join(map(str, group)),
        number(counts.total()),
        meter(*shares, label=label, order=(3, 1, 2)),
        *(f"{counts[grade] / graded:.0%}" for grade in range(1, 6)),
        number(counts[None]),
        number(mean, 2),
    ]


def _histogram(values: Sequence[int]) -> list[tuple[str, float]]:
    width = max(1, -(-(max(values) + 1) // 10))
    counts = Counter(value // width for value in values)
    return [(str(i * width), float(counts[i])) for i in range(max(values) // width + 1)]


def _length_row(low: int, high: int, counts: Sequence[int]) -> list[object]:
    shorter = sum(words < low for words in counts) / len(counts)
    longer = sum(words > high for words in counts) / len(counts)
    within = 1 - shorter - longer
    label = f"{shorter:.0%} shorter, {within:.0%} within, {longer:.0%} longer"
    return [
        f"{low}–{high}",
        number(len(counts)),
        meter(shorter, within, longer, label=label, order=(2, 1, 3)),
        f"{within:.0%}",
        number(counts[len(counts) // 2]),
        number(counts[-1]),
    ]
