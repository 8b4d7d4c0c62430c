"""How to read this: what the figures can bear, given these models and this annotator."""

from __future__ import annotations

from reasonembed.remixer.audit import Agreement, agreement
from reasonembed.report.charts import Html, tag
from reasonembed.report.facts import UNTRAINED, Facts

_CREDIBLE_AUC = 0.6
_AUC_WORDS = (
    (0.45, "worse than guessing"),
    (0.55, "no better than guessing"),
    (_CREDIBLE_AUC, "poor"),
    (0.7, "weak"),
    (0.8, "fair"),
    (0.9, "good"),
)


def honest(facts: Facts) -> Html:
    """What these figures show, and what they cannot."""
    paragraphs = _about_rivals(facts)
    if facts.llms():
        paragraphs = [_about_models(facts), *_about_annotator(facts), *paragraphs]
    else:
        paragraphs.insert(0, "The samples were made elsewhere: nothing of how is known here.")
    return tag("div", *(tag("p", text) for text in paragraphs), class_="honest")


def _about_models(facts: Facts) -> str:
    models = [model for model, _ in facts.llms()]
    stages = ("generate", "annotate", "rewrite")
    engines = {getattr(facts.config, stage).llm.engine for stage in stages}
    if "scripted" in engines:
        return (
            "No language model ran here: the answers come from a script. The figures show that "
            "the stages fit together and nothing else."
        )
    if any("135m" in model.lower() for model in models):
        return (
            "A language model of 135 million parameters writes and judges here. This shows that "
            "the machine works, from a corpus to a trained and measured embedder; it does not "
            "show what the method reaches. For that, put a model that can reason in its place."
        )
    return (
        f"The figures hold for these models ({', '.join(models)}) on this collection. The "
        "interval says how much depends on which queries were asked; it knows nothing of other "
        "training seeds."
    )


def _about_annotator(facts: Facts) -> list[str]:
    if not facts.config.annotate.audit_queries:
        return [
            "The annotator was not measured (annotate.audit_queries is 0), so how far its labels "
            "can be trusted is unknown."
        ]
    judged = facts.rows("audit")
    if judged is None:
        return ["The annotator has not been measured yet (stage audit)."]
    # The label that decides what becomes a positive is the one whose quality matters.
    used = "expected_label" if facts.config.assemble.rule == "rank" else "relevance_label"
    names = {"relevance_label": "grade (1 to 5)", "expected_label": "expected grade"}
    said = []
    for column, name in names.items():
        figures = agreement(judged, facts.run.collection, column=column)
        if figures is not None:
            role = ", which makes the samples," if column == used else ""
            said.append(f"The annotator's {name}{role} is {_about_agreement(figures)}")
            if column == used and figures.auc < _CREDIBLE_AUC:
                said.append("No gain can be credited to judgements like these.")
    return said or ["The annotator cannot be measured: no query has gold and others judged."]


def _about_agreement(figures: Agreement) -> str:
    word = next((word for limit, word in _AUC_WORDS if figures.auc < limit), "very good")
    return (
        f"{word}: AUC {figures.auc:.2f}, where 0.5 is guessing; the gold document comes first in "
        f"{figures.top1:.0%} of queries, where guessing gives {figures.chance_top1:.0%} "
        f"({figures.num_pairs} pairs whose gold is known)."
    )


def _about_rivals(facts: Facts) -> list[str]:
    systems = (facts.scorecard or {}).get("systems", {})
    if "after" not in systems:
        return []
    after = systems["after"]["ndcg@10"]
    ahead = [
        name
        for key, name in UNTRAINED.items()
        if key in systems and systems[key]["ndcg@10"] > after
    ]
    if not ahead:
        return []
    return [f"Ranked better than the trained model, without any training: {', '.join(ahead)}."]
