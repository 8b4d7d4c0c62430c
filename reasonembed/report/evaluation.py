"""The scorecard: every system, the paired comparison, the queries that moved most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonembed.errors import ReasonEmbedError
from reasonembed.evaluation.excerpts import Looked
from reasonembed.evaluation.scorecard import SHOWN
from reasonembed.report.blame import Closest, closest_samples, look
from reasonembed.report.charts import Html, join, meter, number, table, tag
from reasonembed.report.drilldown import drilldown
from reasonembed.report.facts import METRICS, NOT_RUN, SYSTEMS, Facts, signed

NUM_MOVERS = 5


def evaluated(facts: Facts) -> Html:
    """Metrics of each system, what training changed, and in which queries."""
    card = facts.scorecard
    if card is None:
        return NOT_RUN
    systems = {key: card["systems"][key] for key in SYSTEMS if key in card["systems"]}
    best = {metric: max(figures[metric] for figures in systems.values()) for metric in SHOWN}
    rows = [
        [
            SYSTEMS[key],
            *(_score(figures[metric], best[metric]) for metric in SHOWN),
            meter(figures["ndcg@10"], label=f"nDCG@10 {number(figures['ndcg@10'], 4)}"),
        ]
        for key, figures in systems.items()
    ]
    return join(
        [
            table(
                ["", *(METRICS[metric] for metric in SHOWN), "nDCG@10, of 1"], rows, align="lrrrrl"
            ),
            tag("p", _paired(card, "comparison", "nDCG@10")),
            tag("p", _paired(card, "deep_comparison", "recall@100")),
            *_movers(facts, card),
        ]
    )


def _score(value: float, best: float) -> object:
    shown = number(value, 4)
    return tag("strong", shown) if value == best else shown


def _paired(card: dict[str, Any], which: str, metric: str) -> str:
    paired = card[which]
    return (
        f"After minus before in {metric}, paired over {number(card['queries'])} queries: "
        f"{signed(paired['mean_difference'])}, 95 % interval {signed(paired['low'])} to "
        f"{signed(paired['high'])} (bootstrap over queries), p = {number(paired['p_value'], 4)} "
        f"(two-sided randomisation test). Better in {paired['wins']} queries, equal in "
        f"{paired['ties']}, worse in {paired['losses']}."
    )


def _movers(facts: Facts, card: dict[str, Any]) -> list[Html]:
    """The queries that gained and lost most, each with what every system returned."""
    before, after = (card["per_query"].get(name, {}) for name in ("before", "after"))
    change = {id_: after[id_] - before[id_] for id_ in sorted(after.keys() & before.keys())}
    ranked = sorted(change, key=lambda id_: -change[id_])
    moved = {
        "Gained most": [id_ for id_ in ranked[:NUM_MOVERS] if change[id_] > 0],
        "Lost most": [id_ for id_ in ranked[::-1][:NUM_MOVERS] if change[id_] < 0],
    }
    every = [id_ for ids in moved.values() for id_ in ids]
    looked, closest, problems = _looked(facts, card, every)
    parts = [tag("p", problem, class_="muted small") for problem in problems]
    for title, ids in moved.items():
        parts.append(tag("h3", title))
        for id_ in ids:
            label = f"{number(before[id_], 3)} → {number(after[id_], 3)}"
            values = {SYSTEMS[name]: of[id_] for name, of in card["per_query"].items()}
            parts.append(
                drilldown(
                    looked[id_],
                    values=values,
                    metric="nDCG@10",
                    label=label,
                    closest=None if closest is None else {SYSTEMS["after"]: closest[id_]},
                )
                if id_ in looked
                else tag("p", join([tag("code", id_), label], " "))
            )
        if not ids:
            parts.append(tag("p", "None.", class_="empty"))
    return parts


_ByQuery = dict[str, dict[str, Looked]]


def _looked(
    facts: Facts, card: dict[str, Any], query_ids: Sequence[str]
) -> tuple[_ByQuery, dict[str, list[Closest]] | None, list[str]]:
    """What each system returned and the closest samples, by query; and what cannot be read."""
    found: _ByQuery = {}
    closest, problems = None, []
    try:
        for key in (key for key in SYSTEMS if key in card["systems"]):
            looked = look(facts.run, key)
            for id_ in query_ids:
                found.setdefault(id_, {})[SYSTEMS[key]] = looked[id_]
    except ReasonEmbedError as error:
        problems.append(f"What came back cannot be shown: {error}")
    try:
        closest = closest_samples(facts.run, query_ids)
    except ReasonEmbedError as error:
        problems.append(f"The closest training samples cannot be shown: {error}")
    return found, closest, problems
