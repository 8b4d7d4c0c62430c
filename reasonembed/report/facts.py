"""What the sections read of a run, each file once, and how they all write a figure."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.corpus import CorpusStore
from reasonembed.evaluation.comparison_text import metric_name
from reasonembed.redapter.log import SampleLog, TrainLog
from reasonembed.remixer.contamination import Contamination
from reasonembed.report.charts import NOTHING, Point, number, tag
from reasonembed.run import Run

SYSTEMS = {
    "bm25": "BM25",
    "miner": "Miner",
    "before": "Backbone before training",
    "after": "After training",
}
METRICS = {
    name: metric_name(name)
    for name in ("ndcg@10", "recall@1", "recall@10", "recall@100", "recip_rank")
}
"""Metrics that pages show, as they are written."""

UNTRAINED = {"bm25": "BM25", "miner": "the miner"}
NOT_RUN = tag("p", "Not run yet.", class_="empty")


class Facts:
    """Everything that the sections read, each file once."""

    def __init__(self, run: Run) -> None:
        self.run, self.config = run, run.config
        # Set by the section that searches for it: that takes long, and the card says it as well.
        self.contamination: Sequence[Contamination] | None = None

    @cached_property
    def timeline(self) -> list[dict[str, Any]]:
        """Every attempt of every stage, in order."""
        return self.run.timeline()

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """The training log."""
        return TrainLog(self.run.local("train/log.jsonl")).steps()

    @cached_property
    def sample_steps(self) -> list[dict[str, Any]]:
        """What each sample gave in each step of the training."""
        return SampleLog(self.run.local("train/samples.jsonl")).steps()

    @cached_property
    def scorecard(self) -> dict[str, Any] | None:
        """What the evaluation found; None before it."""
        return self.run.directory("evaluate").finished()

    @cached_property
    def corpus(self) -> CorpusStore | None:
        """The corpus; None before it is committed."""
        return self.run.corpus_store() if self.run.artifact("corpus").commits() else None

    def points(self, metric: str) -> list[Point]:
        """A metric of the training log over the steps; what is not finite is left out."""
        return [
            (float(row["step"]), float(row[metric]))
            for row in self.steps
            if is_finite(row.get(metric))
        ]

    def llms(self) -> list[tuple[str, str]]:
        """Each language model with what it does."""
        roles = {
            "filter": "filters",
            "generate": "writes",
            "annotate": "judges",
            "rewrite": "rewrites",
        }
        work: dict[str, list[str]] = {}
        for stage, verb in roles.items():
            if stage in self.run.stages:
                work.setdefault(getattr(self.config, stage).llm.model, []).append(verb)
        return [(model, ", ".join(verbs)) for model, verbs in work.items()]

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        """The timeline of one stage, failed attempts included."""
        return [note for note in self.timeline if note.get("stage") == stage]

    def seconds(self, stage: str) -> float:
        """Wall time of all attempts."""
        return math.fsum(finite(note.get("seconds")) for note in self.attempts(stage))

    def result(self, stage: str) -> dict[str, Any]:
        """What the stage said of itself when it was last done."""
        done = [note for note in self.attempts(stage) if note.get("outcome") == "done"]
        result = done[-1].get("result") if done else None
        return result if isinstance(result, dict) else {}

    def state(self, stage: str) -> str:
        """`done`, `failed`, `begun` or `not run yet`."""
        attempts = self.attempts(stage)
        if attempts:
            return "done" if attempts[-1].get("outcome") == "done" else "failed"
        begun = any(output.stage() for output in self.run.outputs(stage))
        return "begun" if begun else "not run yet"

    def rows(self, kind: str, *columns: str) -> pa.Table | None:
        """Columns of an artifact, one row of each key; None where nothing is committed."""
        artifact = self.run.artifact(kind)
        return artifact.read(columns=list(columns)) if artifact.commits() else None

    def table(self, kind: str, column: str, ids: Collection[str]) -> pa.Table:
        """Rows with one of these ids, read without loading the others' texts."""
        wanted = pc.field(column).isin(pa.array(ids, pa.string()))
        return self.run.artifact(kind).read(only=wanted)

    def some(self, kind: str, column: str, ids: Collection[str]) -> list[dict[str, Any]]:
        """Rows with one of these ids, as `table` reads them."""
        rows: list[dict[str, Any]] = self.table(kind, column, ids).to_pylist()
        return rows


def is_finite(value: object) -> bool:
    """Whether it is a number that can be shown."""
    return number(value) != NOTHING


def finite(value: Any) -> float:
    """The number, or 0 where there is none."""
    return float(value) if is_finite(value) else 0.0


def excerpt(text: object, limit: int) -> str:
    """The first words of a text, about `limit` characters of them."""
    whole = str(text or "").strip()
    if len(whole) <= limit:
        return whole
    return whole[:limit].rsplit(maxsplit=1)[0] + " …"


def signed(value: float) -> str:
    """A difference with its sign, also where it is positive."""
    return f"{value:+.4f}".replace("-", "−") if is_finite(value) else NOTHING
