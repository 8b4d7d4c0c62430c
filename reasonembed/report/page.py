"""The page as a whole: its sections in order, and the file that it is written to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reasonembed.report.annotator import annotator
from reasonembed.report.card import write_card
from reasonembed.report.charts import Html, join, tag
from reasonembed.report.contamination import contaminated
from reasonembed.report.costs import costs
from reasonembed.report.distributions import distributions
from reasonembed.report.evaluation import evaluated
from reasonembed.report.examples import examples
from reasonembed.report.facts import Facts
from reasonembed.report.frame import write_page
from reasonembed.report.funnel import funnel
from reasonembed.report.head import header, result
from reasonembed.report.origin import origin
from reasonembed.report.reading import honest
from reasonembed.report.training import trained
from reasonembed.report.triviality import trivial
from reasonembed.run import Run
from reasonembed.storage import Place

FILE = "report.html"
_LOG = logging.getLogger(__name__)


def write_report(run: Run) -> Path | Place:
    """Writes `report.html` into the run's directory, and its model's card, over earlier ones.

    Args:
        run: Finished or not.

    Returns:
        Where it lies.

    Raises:
        StorageError: The file cannot be written.
    """
    facts = Facts(run)
    parts = [_guarded(build, facts) for build in (header, result)]
    parts.append(tag("nav", *(tag("a", s.title, href=f"#{s.anchor}") for s in _SECTIONS)))
    for section in _SECTIONS:
        heading = tag("h2", section.title, id=section.anchor)
        parts.append(tag("section", heading, _guarded(section.build, facts)))
    with run.writing("") as folder:
        write_page(
            folder / FILE,
            title=f"ReasonEmbed run {run.name}",
            body=join(parts),
            cure="nothing of the run is lost, ask for the report again",
        )
    write_card(facts)
    file = run.place / FILE
    return file.local if file.is_local else file


def _guarded(build: Callable[[Facts], Html], facts: Facts) -> Html:
    """A part of the page; a file that cannot be read takes the place of this part alone."""
    try:
        return build(facts)
    except Exception as error:  # after hours of work, one torn file must not cost the whole report
        _LOG.warning("report: %s", build.__name__, exc_info=True)
        said = f"This part cannot be drawn: {type(error).__name__}: {error}"
        return tag("p", said, class_="bad")


@dataclass(frozen=True)
class _Section:
    anchor: str
    title: str
    build: Callable[[Facts], Html]


_SECTIONS = (
    _Section("reading", "How to read this", honest),
    _Section("funnel", "From documents to steps", funnel),
    _Section("examples", "Examples", examples),
    _Section("distributions", "Distributions", distributions),
    _Section("triviality", "Triviality", trivial),
    _Section("contamination", "Contamination", contaminated),
    _Section("annotator", "Annotator", annotator),
    _Section("training", "Training", trained),
    _Section("evaluation", "Evaluation", evaluated),
    _Section("costs", "Time and tokens", costs),
    _Section("origin", "How it was made", origin),
)
