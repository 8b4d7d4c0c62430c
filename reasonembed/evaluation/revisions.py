"""Which revision of a benchmark's data lies here, by its counts.

BRIGHT's figures of different years stand on different queries and judgments under one name, so
counts are compared with those of the revisions that are known (`data/revisions.yaml`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

log = logging.getLogger(__name__)

UNKNOWN = "unknown"
_SAME = " = "  # joins revisions whose counts are equal in a task


@dataclass(frozen=True)
class Counts:
    """Sizes of one task in one revision; `gold` is None where it was never published."""

    queries: int
    documents: int
    gold: int | None


def find_revision(name: str, *, queries: int, gold: int) -> str:
    """The revisions that have these counts, and a warning if none has.

    Args:
        name: Of the collection: benchmark, any options, "/" and task, as in
            "bright+gpt4_reason/biology".
        queries: Number of queries.
        gold: Number of different pairs of query and gold document, by the official judgments.

    Returns:
        Names of the revisions, joined by " = " where a task is the same in several; "unknown" if
        there is none; "" for a benchmark of which no counts are known.
    """
    known = _known(name)
    matching = [
        revision
        for revision, counts in known.items()
        if counts.queries == queries and counts.gold in (gold, None)
    ]
    if matching or not known:
        return _SAME.join(matching)
    there = "; ".join(
        f"{revision} has {counts.queries} queries and {_number(counts.gold)} gold pairs"
        for revision, counts in known.items()
    )
    log.warning(
        "%s: %d queries and %d gold pairs are no revision that is known (%s); its figures cannot "
        "be compared with published ones",
        *(name, queries, gold, there),
    )
    return UNKNOWN


def check_documents(name: str, *, revision: str, documents: int) -> None:
    """Warns if a corpus is not as large as the revision's.

    Args:
        name: Of the collection.
        revision: What `find_revision` returned.
        documents: Number of documents in the corpus that is searched.
    """
    known = _known(name)
    expected = {known[one].documents for one in revision.split(_SAME) if one in known}
    if expected and documents not in expected:
        log.warning(
            "%s: the corpus has %d documents, that of the revision (%s) has %s; is the download "
            "whole, and is it that revision's corpus?",
            *(name, documents, revision, " or ".join(map(str, sorted(expected)))),
        )


def check_one_revision(revisions: Mapping[str, str]) -> None:
    """Warns if the tasks of one benchmark stem from different revisions.

    Args:
        revisions: What `find_revision` returned, by name of the collection.
    """
    sets = [set(revision.split(_SAME)) for revision in revisions.values()]
    if sets and not set.intersection(*sets):
        log.warning(
            "tasks of one benchmark stem from different revisions of its data, which no published "
            "mean does: %s",
            "; ".join(f"{name}: {revision}" for name, revision in revisions.items()),
        )


def _known(name: str) -> Mapping[str, Counts]:
    """Counts by revision of the task that a collection's name ends in."""
    benchmark, _, task = name.partition("/")
    base = benchmark.partition("+")[0].partition("@")[0]
    tables = _table().get(base, {})
    return {revision: of[task or base] for revision, of in tables.items() if (task or base) in of}


@cache
def _table() -> Mapping[str, Mapping[str, Mapping[str, Counts]]]:
    source = files("reasonembed.evaluation") / "data" / "revisions.yaml"
    loaded = yaml.safe_load(source.read_text(encoding="utf-8"))
    return {
        benchmark: {
            revision: {task: Counts(*counts) for task, counts in tasks.items()}
            for revision, tasks in revisions.items()
        }
        for benchmark, revisions in loaded.items()
    }


def _number(count: int | None) -> str:
    return "an unknown number of" if count is None else str(count)
