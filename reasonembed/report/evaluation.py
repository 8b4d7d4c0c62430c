"""The scorecard: every system, the paired comparison, the queries that moved most."""

from __future__ import annotations

from typing import Any

from reasonembed.errors import ReasonEmbedError
from reasonembed.report.charts import Html, join, meter, number, table, tag
from reasonembed.report.facts import NOT_RUN, SYSTEMS, Facts, excerpt, signed

NUM_MOVERS = 5
_METRICS = {
    "ndcg@10": "nDCG@10",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
    "recip_rank": "MRR",
}


def evaluated(facts: Facts) -> Html:
    """Metrics of each system, what training changed, and in which queries."""
    card = facts.scorecard
    if card is None:
        return NOT_RUN
    systems = {key: card["systems"][key] for key in SYSTEMS if key in card["systems"]}
    best = {metric: max(figures[metric] for figures in systems.values()) for metric in _METRICS}
    rows = [
        [
            SYSTEMS[key],
            *(_score(figures[metric], best[metric]) for metric in _METRICS),
            meter(figures["ndcg@10"], label=f"nDCG@10 {number(figures['ndcg@10'], 4)}"),
        ]
        for key, figures in systems.items()
    ]
    return join(
        [
            table(["", *_METRICS.values(), "nDCG@10, of 1"], rows, align="lrrrrl"),
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
    """The queries that gained and lost most."""
    before, after = (card["per_query"].get(name, {}) for name in ("before", "after"))
    change = {id_: after[id_] - before[id_] for id_ in sorted(after.keys() & before.keys())}
    ranked = sorted(change, key=lambda id_: -change[id_])
    texts, gold, problem = _collection(facts)
    parts = [tag("p", problem, class_="muted small")] if problem else []
    for title, ids in (
        ("Gained most", [id_ for id_ in ranked[:NUM_MOVERS] if change[id_] > 0]),
        ("Lost most", [id_ for id_ in ranked[::-1][:NUM_MOVERS] if change[id_] < 0]),
    ):
        rows = [
            [
                join([excerpt(texts.get(id_), 260), " ", tag("code", id_)]),
                f"{number(before[id_], 3)} → {number(after[id_], 3)}",
                ", ".join(sorted(gold.get(id_, ()))),
            ]
            for id_ in ids
        ]
        content = table(["query", "nDCG@10", "gold"], rows, align="lrl") if rows else None
        parts += [tag("h3", title), content or tag("p", "None.", class_="empty")]
    return parts


def _collection(facts: Facts) -> tuple[Any, Any, str]:
    """Texts and gold of the evaluation; the scorecard alone where the collection is gone."""
    try:
        return facts.run.collection.queries, facts.run.collection.qrels, ""
    except ReasonEmbedError as error:
        return {}, {}, f"Texts are missing, the collection cannot be read: {error}"
