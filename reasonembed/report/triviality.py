"""How trivial the positives are, beside the source document as positive."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reasonembed.artifacts import Artifact, StageDirectory
from reasonembed.config import flatten
from reasonembed.remixer.triviality import (
    Measure,
    Spread,
    Triviality,
    Vectors,
    choose_queries,
    triviality,
)
from reasonembed.report.charts import NOTHING, Html, join, number, table, tag
from reasonembed.report.facts import NOT_RUN, Facts
from reasonembed.storage import Place, last_part

MAX_QUERIES, MAX_DOCUMENTS = 1_000, 20_000  # what takes seconds, not minutes
_VERDICTS = {
    "less": ("less trivial", "good"),
    "more": ("more trivial", "bad"),
    "equal": ("no difference that these queries can show", "muted"),
    "unknown": (NOTHING, "muted"),
}
_ON_TOPIC_RANK = 100


def trivial(facts: Facts) -> Html:
    """A row for each measure; the control stands beside it."""
    ids = facts.rows("samples", "query_id")
    corpus = facts.corpus
    if ids is None or corpus is None:
        return NOT_RUN
    chosen = choose_queries(ids.column("query_id").to_pylist(), most=MAX_QUERIES)
    samples = facts.table("samples", "query_id", chosen)
    found = triviality(
        samples,
        corpus,
        vectors=_miner_vectors(facts),
        candidates=facts.table("candidates", "query_id", chosen),
        max_queries=MAX_QUERIES,
        max_documents=MAX_DOCUMENTS,
    )
    if not found.measures:
        return tag("p", "There is no sample to measure.", class_="empty")
    said = (
        f"{number(found.num_queries)} of {number(ids.num_rows)} samples; ranks among "
        f"{number(found.num_documents)} distinct texts, the source among them. The control takes "
        "the source document of the same query as its positive. A query counts once, by the mean "
        "over its positives. Means, medians in brackets; the interval is a bootstrap over queries."
    )
    rows = [_row(one) for one in found.measures.values()]
    head = ["", "more trivial is", "positives", "control", "difference", "95 % interval", "so"]
    meanings = [f"{one.kind.title}: {one.kind.meaning}" for one in found.measures.values()]
    notes = [*_off_topic(found), *found.notes]
    return join(
        [
            tag("p", said),
            table(head, rows, align="llrrrrl"),
            *(tag("p", note, class_="muted small") for note in notes),
            tag("ul", *(tag("li", text) for text in meanings), class_="muted small"),
        ]
    )


def _row(one: Measure) -> list[object]:
    words, kind = _VERDICTS[one.verdict]
    gap = one.difference
    return [
        one.kind.title,
        one.kind.more_trivial,
        _spread(one.positives),
        _spread(one.sources),
        _signed(gap.mean_difference) if gap else NOTHING,
        f"{_signed(gap.low)} to {_signed(gap.high)}" if gap else NOTHING,
        tag("span", words, class_=kind),
    ]


def _spread(spread: Spread | None) -> str:
    return f"{_figure(spread.mean)} ({_figure(spread.median)})" if spread else NOTHING


def _figure(value: float) -> str:
    return number(value, 1 if abs(value) >= 10 else 3)


def _signed(value: float) -> str:
    return f"{'−' if value < 0 else '+'}{_figure(abs(value))}"


def _off_topic(found: Triviality) -> list[str]:
    """A control that is not trivial says something else: the queries leave their sources."""
    ranks = [
        found.measures[name].sources
        for name in ("dense_rank", "bm25_rank")
        if name in found.measures
    ]
    control = next((spread for spread in ranks if spread), None)
    if control is None or control.median <= _ON_TOPIC_RANK:
        return []
    return [
        f"Half of the queries rank their own source below {number(control.median)}: they hardly "
        "speak of it, so the control is no copy of the query and the comparison says little. A "
        "model that keeps to the document is needed, or mine.max_source_rank, which sets aside "
        "the queries that do not."
    ]


# ---- vectors ------------------------------------------------------------------------------------


class _Stored:
    """Vectors of a run, read as they are asked for."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact

    def __call__(self, ids: Collection[str]) -> Vectors:
        wanted = pa.array(sorted(ids), pa.string())
        rows = self._artifact.read(only=pc.field("id").isin(wanted))
        flat = rows.column("vector").combine_chunks().flatten().to_numpy(zero_copy_only=False)
        size = self._artifact.schema.field("vector").type.list_size
        vectors_ND = flat.reshape(-1, size).astype(np.float32)
        return dict(zip(rows.column("id").to_pylist(), vectors_ND, strict=True))


def _miner_vectors(facts: Facts) -> _Stored | None:
    """The miner's vectors, by what their folder says of itself: no weights are needed for that."""
    config = facts.config
    encoder = config.mine.encoder
    wanted = flatten(
        encoder.model_copy(update={"model": last_part(encoder.model)}), prefix="encoder"
    )
    mined = facts.run.artifact("candidates").stage()
    if mined is not None and "weights" in mined.identity:
        wanted["weights"] = mined.identity["weights"]
    found = []
    for folder in facts.run.vectors_place.children():
        stage = StageDirectory(str(folder), name=folder.name).stage()
        if stage is not None and wanted.items() <= stage.identity.items():
            found.append(folder)
    # Where the candidates name no weights, nobody can tell which one of two has mined.
    return _stored(found[0]) if len(found) == 1 else None


def _stored(folder: Place) -> _Stored | None:
    parts = [part for part in (folder / "data").children() if part.name.endswith(".parquet")]
    if not parts:
        return None
    schema = pq.read_schema(parts[0].path, filesystem=parts[0].fs)
    return _Stored(Artifact(str(folder), schema=schema, key=("id",), name=folder.name))
