"""Descent through a run, as lines of text: of one query, or of everything one document went into.

Both read the rows of their subject alone, never a whole artifact of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.corpus import CorpusStore
from reasonembed.errors import ConfigError
from reasonembed.remixer.plan import held_out_documents, sift
from reasonembed.run import Run

_EXCERPT = 300
_MOST_QUERIES = 50  # of a document that many queries hold
Row = dict[str, Any]


def trace_query(run: Run, query_id: str) -> Iterator[str]:
    """Says, stage by stage, what became of a query.

    Raises:
        ConfigError: No such query was planned, nor did one come with samples from elsewhere.
    """
    seed, sample = (_one(run, kind, "query_id", query_id) for kind in ("seeds", "samples"))
    if seed is None and sample is None:
        raise ConfigError(f"{run.place} has planned no query {query_id!r}; ids are in seeds/")
    if seed is not None:
        yield from _planned(seed, run.corpus_store())
        yield from _generated(_one(run, "queries", "query_id", query_id))
        yield from _mined(run, query_id)
        yield from _rewritten(_one(run, "rewrites", "query_id", query_id))
    yield from _sampled(sample)


def _planned(seed: Row, corpus: CorpusStore) -> Iterator[str]:
    yield f"seed       document {seed['source_doc_id']} ({seed['task']})"
    yield f"           {_short(corpus.text(seed['source_doc_id']))}"
    yield (
        f"           asked for {seed['min_words']}-{seed['max_words']} words, "
        f"{seed['education_level']}, seed {seed['seed']}"
    )


def _generated(query: Row | None) -> Iterator[str]:
    if query is None:
        yield "query      not written yet"
        return
    yield f"query      {_outcome(query)}"
    if query["query"]:
        yield f"           {_short(query['query'])}"


def _outcome(row: Row) -> str:
    """Status, reason and effort of a row that a model was asked for."""
    reason = f" - {row['detail']}" if row["detail"] else ""
    tries = f", {row['tries']} tries" if row["tries"] > 1 else ""
    return f"{row['status']}{reason} ({row['model']}, {row['completion_tokens']} tokens{tries})"


def _mined(run: Run, query_id: str) -> Iterator[str]:
    found = _one(run, "candidates", "query_id", query_id)
    if found is None:
        yield "candidates none yet"
        return
    yield (
        f"candidates {len(found['doc_ids'])}, {found['num_excluded']} shut out (the source, its "
        f"near-duplicates and listed documents); the source itself {_source_rank(found)}"
    )
    judgments = {row["doc_id"]: row for row in _rows(run, "judgments", "query_id", query_id)}
    ranked = zip(found["doc_ids"], found["origins"], strict=True)
    for rank, (doc_id, origins) in enumerate(ranked, start=1):
        said = _judged(judgments.get(doc_id))
        yield f"  {rank:3d}      {doc_id} [{_origins(origins)}]: {said}"
    for doc_id in sorted(judgments.keys() - set(found["doc_ids"])):
        yield f"    -      {doc_id} [no candidate any more]: {_judged(judgments[doc_id])}"


def _source_rank(row: Row) -> str:
    rank = row["source_rank"]
    return "stands below them for the miner" if rank is None else f"is the miner's number {rank}"


def _origins(origins: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(f"{one['retriever']} {one['rank']}" for one in origins)


def _judged(row: Row | None) -> str:
    if row is None:
        return "not judged"
    parts = [_label(row)]
    if len(row["votes"]) > 1:
        parts.append(f"votes {' '.join(map(str, row['votes']))}")
    if row["quick_label"] is not None:
        parts.append(f"{row['route']}, quick label {row['quick_label']:.2f}")
    if row["tries"] > 1:
        parts.append(f"{row['tries']} tries")
    return f"{', '.join(parts)} - {_short(row['analysis'], 120)}"


def _label(row: Row) -> str:
    if row["relevance_label"] is None:
        return f"{row['status']} ({row['detail']})"
    expected = row["expected_label"]
    beside = "" if expected is None else f", expected {expected:.2f}"
    return f"label {row['relevance_label']}{beside}"


def _rewritten(row: Row | None) -> Iterator[str]:
    if row is not None:
        yield f"rewrite    {_outcome(row)}"
        yield f"           {_short(row['rewritten_query'])}"


def _sampled(sample: Row | None) -> Iterator[str]:
    if sample is None:
        yield "sample     none"
        return
    yield f"sample     {sample['split']}, task {sample['task']}"
    for side in ("positives", "negatives"):
        yield f"           {side}: {', '.join(map(_graded, sample[side]))}"


def _graded(row: Row) -> str:
    return (
        f"{row['doc_id']} ({'no label' if row['label'] is None else format(row['label'], '.2f')})"
    )


# ---- the other way round ------------------------------------------------------------------------


def trace_document(run: Run, doc_id: str) -> Iterator[str]:
    """Says what a document was used for: as a seed, as a candidate, in samples.

    Raises:
        ConfigError: The corpus holds no such document.
    """
    table = run.artifact("corpus").read()
    corpus = CorpusStore(table)
    if doc_id not in corpus:
        raise ConfigError(f"the corpus of {run.place} holds no document {doc_id!r}")
    twins = [one for one in corpus.group_members(corpus.group(doc_id)) if one != doc_id]
    equal = f"; equal text: {', '.join(twins)}" if twins else ""
    yield f"document   {doc_id} ({corpus.task(doc_id)}){equal}"
    yield f"           {_short(corpus.text(doc_id))}"
    yield from _as_seed(run, table, doc_id)
    yield from _as_candidate(run, doc_id)
    yield from _in_samples(run, doc_id)


def _as_seed(run: Run, corpus: pa.Table, doc_id: str) -> Iterator[str]:
    # Safe beside the rule of one row a key: a query's source never changes.
    seeds = _rows(run, "seeds", "source_doc_id", doc_id)
    if not seeds:
        planned = bool(run.artifact("seeds").commits())
        yield f"seed       no: {_why_no_seed(run, corpus, doc_id) if planned else 'none planned'}"
    for seed in seeds:
        yield f"seed       of {seed['query_id']}"
        yield from _generated(_one(run, "queries", "query_id", seed["query_id"]))


def _why_no_seed(run: Run, corpus: pa.Table, doc_id: str) -> str:
    """The rule of the plan that shut a document out, by asking the plan."""
    config = run.config.plan
    held_out = held_out_documents(corpus, run.collection, config)
    # A document's fate hangs on its equals with a smaller id and on no other document.
    group = corpus.filter(pc.field("doc_id") == doc_id).column("group_id")[0].as_py()
    equals = corpus.filter((pc.field("group_id") == group) & (pc.field("doc_id") <= doc_id))
    before = sift(equals.filter(pc.field("doc_id") < doc_id), config, held_out=held_out).funnel
    sifted = sift(equals, config, held_out=held_out)
    fate = next((why for why, n in sifted.funnel.items() if n > before[why]), None)
    if fate is not None:
        return fate
    domain = _one(run, "domains", "doc_id", doc_id) if run.config.filter else None
    if run.config.filter and (domain is None or domain["probability"] is None):
        return "the domain filter has no answer for it"
    if domain is not None and run.config.filter:
        least = run.config.filter.min_probability
        if domain["probability"] < least:
            return f"another domain (probability {domain['probability']:.2f}, needed {least:.2f})"
    return "over the cap of its task"


def _as_candidate(run: Run, doc_id: str) -> Iterator[str]:
    """Queries whose candidates hold it; lists cannot be asked for an element, so all are read."""
    candidates = run.artifact("candidates").read(columns=["query_id", "doc_ids"])
    lists = candidates.column("doc_ids")
    holders = candidates.take(_lists_that_hold(lists, doc_id)).column("query_id").to_pylist()
    yield f"candidate  of {len(holders)} queries{_cut(holders)}"
    shown = holders[:_MOST_QUERIES]
    found = {row["query_id"]: row for row in _many(run, "candidates", shown)}
    judged = {row["query_id"]: row for row in _rows(run, "judgments", "doc_id", doc_id)}
    for query_id in shown:
        place = found[query_id]["doc_ids"].index(doc_id)
        origins = _origins(found[query_id]["origins"][place])
        yield f"  {place + 1:3d}      {query_id} [{origins}]: {_judged(judged.get(query_id))}"


def _lists_that_hold(lists: pa.ChunkedArray, doc_id: str) -> pa.Array:
    """Rows whose list holds the id."""
    rows: list[int] = []
    start = 0
    for chunk in lists.chunks:
        hits = pc.filter(pc.list_parent_indices(chunk), pc.equal(chunk.flatten(), doc_id))
        rows += [start + row for row in hits.to_pylist()]
        start += len(chunk)
    return pa.array(sorted(set(rows)), pa.int64())


def _in_samples(run: Run, doc_id: str) -> Iterator[str]:
    sides: dict[str, list[str]] = {"positives": [], "negatives": []}
    for part in run.artifact("samples").parts():  # one at a time: samples hold every text
        ids = part.column("query_id")
        for side, held in sides.items():
            documents = pa.chunked_array(
                [_ids_of(chunk) for chunk in part.column(side).chunks], pa.list_(pa.string())
            )
            held += ids.take(_lists_that_hold(documents, doc_id)).to_pylist()
    for side, held in sides.items():
        yield f"{side[:-1]}   in {len(held)} samples{_cut(held)}"
        if held:
            yield f"           {', '.join(sorted(held)[:_MOST_QUERIES])}"


def _ids_of(labelled: pa.ListArray) -> pa.ListArray:
    """The `doc_id` of each struct of a list array."""
    lengths = pc.list_value_length(labelled).to_numpy(zero_copy_only=False)
    offsets = pa.array([0, *lengths.cumsum().tolist()], pa.int32())
    return pa.ListArray.from_arrays(offsets, pc.struct_field(labelled.flatten(), "doc_id"))


def _cut(ids: Sequence[str]) -> str:
    return f", of which {_MOST_QUERIES} are shown" if len(ids) > _MOST_QUERIES else ""


def _rows(run: Run, kind: str, column: str, value: str) -> list[Row]:
    return list(run.artifact(kind).read(only=pc.field(column) == value).to_pylist())


def _one(run: Run, kind: str, column: str, value: str) -> Row | None:
    rows = _rows(run, kind, column, value)
    return rows[0] if rows else None


def _many(run: Run, kind: str, query_ids: Sequence[str]) -> list[Row]:
    wanted = pc.field("query_id").isin(pa.array(query_ids, pa.string()))
    return list(run.artifact(kind).read(only=wanted).to_pylist())


def _short(text: str | None, limit: int = _EXCERPT) -> str:
    flat = " ".join((text or "").split())
    return flat if len(flat) <= limit else f"{flat[:limit]} …"
