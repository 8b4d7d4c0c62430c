"""Which training queries lie next to an evaluated one, as the trained model sees them.

The evaluation embeds the training queries with the model that was trained on them and keeps the
nearest of each evaluated query in `evaluate/closest.parquet`; here they are looked up and joined
with their samples. No model is needed for that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import Artifact
from reasonembed.errors import ConfigError
from reasonembed.evaluation.excerpts import EXCERPTS_FILE, Looked, read_excerpts
from reasonembed.evaluation.runs import read_run
from reasonembed.remixer.assemble import TRAIN
from reasonembed.run import Run

CLOSEST_FILE = "closest.parquet"
NUM_CLOSEST = 5
_EXCERPT = 300


@dataclass(frozen=True)
class Closest:
    """A training sample near an evaluated query.

    Attributes:
        query_id: Of the sample.
        similarity: Cosine of the two queries under the trained model.
        query: The training query.
        source_doc_id: What it was written from, where that is known.
        positives: Label by doc id; None where it has none.
        negatives: Doc ids.
    """

    query_id: str
    similarity: float
    query: str
    source_doc_id: str | None
    positives: dict[str, float | None]
    negatives: frozenset[str]

    def part_of(self, doc_id: str) -> str:
        """What a document was to the sample: "positive", "negative", "source" or ""."""
        if doc_id in self.positives:
            return "positive"
        if doc_id in self.negatives:
            return "negative"
        return "source" if doc_id == self.source_doc_id else ""


def trained_queries(samples: Artifact) -> pa.Table:
    """Id, text and instruction of all that was trained on."""
    rows = samples.read(columns=["query_id", "query", "instruction", "split"])
    return rows.filter(pc.equal(rows.column("split"), TRAIN)).drop_columns(["split"])


def closest_samples(run: Run, query_ids: Collection[str]) -> dict[str, list[Closest]]:
    """The training samples nearest to each of some evaluated queries, nearest first.

    Raises:
        ConfigError: The run was not evaluated, or by a version that kept no neighbours, or it was
            not evaluated with one of the queries.
        EvaluationError: A file cannot be read.
    """
    near = read_run(_evaluated(run, CLOSEST_FILE))
    if unknown := sorted(set(query_ids) - near.keys()):
        raise ConfigError(
            f"the evaluation of {run.place} asks no query {unknown[0]!r}; its ids are those of the "
            f"collection {run.config.evaluate.collection}. For a training query there is `trace`"
        )
    wanted = pa.array({one for query_id in query_ids for one in near[query_id]}, pa.string())
    rows = run.artifact("samples").read(only=pc.field("query_id").isin(wanted)).to_pylist()
    samples = {row["query_id"]: row for row in rows}
    return {
        query_id: [
            _closest(samples[one], similarity)
            for one, similarity in near[query_id].items()
            if one in samples
        ]
        for query_id in query_ids
    }


def _closest(sample: dict[str, Any], similarity: float) -> Closest:
    return Closest(
        query_id=sample["query_id"],
        similarity=similarity,
        query=sample["query"],
        source_doc_id=sample["source_doc_id"],
        positives={part["doc_id"]: part["label"] for part in sample["positives"]},
        negatives=frozenset(part["doc_id"] for part in sample["negatives"]),
    )


def blame(run: Run, query_id: str) -> list[Closest]:
    """The training samples nearest to one evaluated query, nearest first.

    Raises:
        ConfigError: See `closest_samples`.
        EvaluationError: See `closest_samples`.
    """
    return closest_samples(run, [query_id])[query_id]


def blame_lines(run: Run, query_id: str) -> Iterator[str]:
    """Says what the trained model returned for an evaluated query, and what it had learnt near it.

    Raises:
        ConfigError: See `blame`.
        EvaluationError: See `closest_samples`.
    """
    samples = blame(run, query_id)
    one = look(run, "after")[query_id]
    yield f"query      {query_id}"
    yield f"           {_short(one.query)}"
    yield f"returned   {one.num_found} documents, by the trained model"
    for place, (doc_id, score) in enumerate(zip(one.found, one.scores, strict=True), start=1):
        said = f"gold, {one.gold[doc_id]}" if doc_id in one.gold else ""
        yield f"  {place:3d}      {score:.4f}  {doc_id}{f'  [{said}]' if said else ''}"
    for doc_id in sorted(one.gold.keys() - set(one.found)):
        yield f"  {one.ranks.get(doc_id, '-'):>3}      gold: {doc_id}"
    if one.num_excluded:
        yield f"excluded   {one.num_excluded}, such as {', '.join(one.excluded)}"
    yield f"closest    {len(samples)} training samples, by the trained model"
    for sample in samples:
        yield from _sample_lines(sample, one)


def _sample_lines(sample: Closest, one: Looked) -> Iterator[str]:
    yield f"  {sample.similarity:.4f}   {sample.query_id}"
    yield f"           {_short(sample.query)}"
    source = f", source: {sample.source_doc_id}" if sample.source_doc_id else ""
    yield f"           positives: {', '.join(sample.positives)}{source}"
    for said in came_back(sample, one):
        yield f"           {said}"


def came_back(sample: Closest, one: Looked) -> list[str]:
    """Which of the documents that came back a sample knew, and as what."""
    return [
        f"{doc_id}, which came back as number {place}, was its {part}"
        for place, doc_id in enumerate(one.found, start=1)
        if (part := sample.part_of(doc_id))
    ]


def look(run: Run, system: str) -> dict[str, Looked]:
    """What one system of the run's evaluation returned, by query.

    Args:
        run: Evaluated.
        system: "bm25", "miner", "before" or "after".

    Raises:
        ConfigError: The run was not evaluated, or by a version that kept no excerpts.
        EvaluationError: A file cannot be read.
    """
    return read_excerpts(_evaluated(run, f"{system}/{EXCERPTS_FILE}").parent)


def _evaluated(run: Run, name: str) -> Path:
    """A file of the evaluation."""
    if run.directory("evaluate").finished() is None:
        raise ConfigError(f"{run.place} is not evaluated yet; finish its stages first")
    file = run.local(f"evaluate/{name}")
    if not file.is_file():
        raise ConfigError(
            f"{file} is missing: the evaluation was made by an earlier version; evaluate again "
            f"with `reasonembed run {run.config_file} --from evaluate --fresh`"
        )
    return file


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _EXCERPT else f"{flat[:_EXCERPT]} …"
