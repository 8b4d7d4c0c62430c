"""How it was made: which artifact came from which, and the whole configuration."""

from __future__ import annotations

import re
from typing import Any

import yaml

from reasonembed.report.charts import NOTHING, Html, escape, join, table, tag
from reasonembed.report.facts import NOT_RUN, Facts


def origin(facts: Facts) -> Html:
    """Every artifact with its inputs, fingerprint and version; passwords are left out."""
    outputs = [output for stage in facts.run.stages for output in facts.run.outputs(stage)]
    made = {output.name: begun for output in outputs if (begun := output.stage())}
    rows = [
        [
            name,
            join([*(_input(key, value, made) for key, value in _inputs(stage.identity))], ", "),
            tag("code", stage.fingerprint),
            stage.version or NOTHING,
        ]
        for name, stage in made.items()
    ]
    settings = facts.config.model_dump(mode="json")
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    text = re.sub(r"//[^/@\s]+@", "//…@", text)  # a password in a server's address stays here
    arrows = "samples → train → export → evaluate"
    if not facts.config.assemble.sources:
        filtered = "domains → " if facts.config.filter else ""
        arrows = (
            f"corpus → {filtered}seeds → queries → candidates → judgments → {arrows}; "
            "queries → rewrites → samples"
        )
    head = ["made", "from", "fingerprint", "version"]
    return join(
        [
            tag("p", arrows),
            table(head, rows, align="llll") if rows else NOT_RUN,
            tag("details", tag("summary", "The whole configuration"), tag("pre", text)),
        ]
    )


def _inputs(identity: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key.removeprefix("input."), value)
        for key, value in sorted(identity.items())
        if key.startswith("input.") and not key.endswith(".content")
    ]


def _input(name: str, fingerprint_then: object, made: dict[str, Any]) -> Html:
    """An input, and whether it is still the one that was used."""
    same = name in made and made[name].fingerprint == fingerprint_then
    return escape(name) if same else join([name, tag("span", " (another one now)", class_="bad")])
