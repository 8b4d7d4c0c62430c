"""How the labels came about: repeated analyses, the cascade, and the distilled annotator."""

from __future__ import annotations

import json
from typing import Any

from reasonembed.remixer.agreement import LabelAgreement, cascade_report, consistency
from reasonembed.report.charts import NOTHING, Html, join, number, table, tag
from reasonembed.report.facts import NOT_RUN, Facts, is_finite

_COLUMNS = (
    "relevance_label",
    "votes",
    "quick_label",
    "route",
    "prompt_tokens",
    "completion_tokens",
)


def annotator(facts: Facts) -> Html:
    """What is known of the annotator beside its agreement with gold."""
    judged = facts.rows("judgments", *_COLUMNS)
    parts: list[object] = []
    if judged is not None:
        repeats, cascade = consistency(judged), cascade_report(judged)
        if repeats is not None:
            parts.append(
                tag(
                    "p",
                    f"{number(repeats.num_pairs)} pairs were analysed more than once: two analyses "
                    f"give the same label in {repeats.exact:.0%}; the labels of a pair are "
                    f"{number(repeats.mean_spread, 2)} apart on average, and their median counts.",
                )
            )
        if cascade is not None:
            said = (
                f"Cascade over {number(cascade.num_pairs)} pairs: {cascade.quick_share:.0%} took "
                f"the quick label, {cascade.full_share:.0%} were unsure and analysed, "
                f"{cascade.checked_share:.0%} were sure and analysed all the same. It saved "
                f"{_share(cascade.written_saving)} of the tokens written and "
                f"{_share(cascade.read_saving)} of those read (an estimate)."
            )
            parts.append(tag("p", said))
            if cascade.agreement is not None:
                parts.append(tag("p", f"Quick label against analysis: {_say(cascade.agreement)}"))
    parts += _distilled(facts)
    if not parts:
        said = "One analysis a pair, no cascade, no distilled annotator."
        return NOT_RUN if judged is None else tag("p", said)
    return join(parts)


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.0%}"


def _say(found: LabelAgreement) -> str:
    return (
        f"equal in {found.exact:.0%} of {number(found.num_pairs)} pairs, within one in "
        f"{found.within_one:.0%}, on the same side of 3 in {found.binary:.0%}; quadratic-weighted "
        f"kappa {number(found.weighted_kappa, 3)}."
    )


def _distilled(facts: Facts) -> list[Html]:
    """The student beside its teacher, as the distillation left it."""
    raw = (facts.run.place / "annotator" / "agreement.json").read()
    if raw is None:
        return []
    kit = json.loads(raw)
    found = kit["agreement"] or {}
    rows = [[title, _figure(found.get(key))] for key, title in _KIT.items()]
    both = [kit["teacher"], kit["student"]]
    costs = [(one.get("cost") or {}, one.get("consistency") or {}) for one in both]
    beside = [
        ["model", *(", ".join(one["models"]) for one in both)],
        ["two analyses of a pair agree", *(_figure(repeats.get("exact")) for _, repeats in costs)],
        *([title, *(number(cost.get(key)) for cost, _ in costs)] for key, title in _COSTS.items()),
    ]
    grades = [
        [one["grade"], number(one["num_pairs"]), _figure(one["mean_reference"])]
        for one in found.get("calibration", ())
    ]
    return [
        tag("h3", "Distilled annotator"),
        tag("p", f"Both judged the same {number(kit['pairs'])} pairs, which were not learnt from."),
        table(["", "teacher", "student"], beside, align="lrr"),
        table(["student against the teacher's majority", ""], rows, align="lr"),
        table(["student says", "pairs", "teacher's mean"], grades, align="lrr"),
    ]


_KIT = {
    "num_pairs": "pairs that both label",
    "exact": "equal",
    "within_one": "within one",
    "binary": "on the same side of 3",
    "binary_kappa": "Cohen's kappa of that",
    "weighted_kappa": "quadratic-weighted kappa",
}
_COSTS = {
    "read_per_1000": "tokens read for 1,000 pairs",
    "cached_per_1000": "of these from the prefix cache",
    "written_per_1000": "tokens written",
}


def _figure(value: Any) -> str:
    return number(value, 0 if isinstance(value, int) else 3) if is_finite(value) else NOTHING
