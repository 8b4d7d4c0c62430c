"""Candidate mining with the source document shut out. Reads `queries`, writes `candidates`.

The source, every exact duplicate of it and every near-duplicate are masked before the cut
(arXiv:2510.08252: top-k over D minus d*), so that each query gets its full k. Duplicate texts count
once: one document of a group stands for it. Texts are read a row group at a time and only where
they are needed; what is held are ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reasonembed.artifacts import Artifact
from reasonembed.config import MineConfig
from reasonembed.errors import ConfigError, CorpusError
from reasonembed.evaluation.runs import read_run
from reasonembed.index.exact import NO_DOCUMENT, Positions, Scores
from reasonembed.index.fusion import Fused, Origin, quota, rrf
from reasonembed.index.places import (
    Wanted,
    by_row_group,
    excluded_positions,
    first_of_each,
    places_of,
)
from reasonembed.remixer.duplicates import shingles, similarity
from reasonembed.schemas import CANDIDATES, from_rows, text_id
from reasonembed.tasks import Task

MINER = "miner"
"""Name of the miner among the origins of a candidate."""
_SHINGLE_WORDS = 5
_Values = NDArray[np.uint64]


# Documents.


@dataclass(frozen=True)
class Documents:
    """What may be searched, without texts: one document for each group of equal texts.

    Attributes:
        table: By doc id: `doc_id`, `text_id` (key of its vector), the place of its text (`part`,
            `group`, `row`), `chars` (length of the text) and `copies` (documents of the group).
        members: Every document of the corpus.
        stands_for: For each of `members` the row of `table` that stands for it.
    """

    table: pa.Table
    members: pa.Array
    stands_for: NDArray[np.int64]

    @property
    def doc_ids(self) -> pa.Array:
        """Ids of the documents that stand for their groups, sorted."""
        return self.table.column("doc_id").combine_chunks()

    @property
    def num_copies(self) -> NDArray[np.int64]:
        """Documents in each group."""
        copies: NDArray[np.int64] = self.table.column("copies").to_numpy()
        return copies

    def positions(self, doc_ids: Sequence[str]) -> NDArray[np.int64]:
        """Rows of `table` that stand for documents.

        Raises:
            CorpusError: A document is not in the corpus.
        """
        rows = pc.index_in(pa.array(doc_ids, pa.string()), value_set=self.members)
        if rows.null_count:
            unknown = doc_ids[pc.is_null(rows).index(True).as_py()]
            raise CorpusError(
                f"doc_id {unknown!r} is not in the corpus of {len(self.members)} documents; was "
                "another corpus, or another limit, used upstream?"
            )
        found: NDArray[np.int64] = self.stands_for[rows.to_numpy()]
        return found


def read_documents(corpus: Artifact) -> Documents:
    """Goes through the corpus twice: for ids and groups, then for the texts that stand for them.

    Of a group the document that was committed first stands for all, by id where they came together,
    so that a corpus that grows keeps its documents.
    """
    rows = [
        pa.table({**dict(zip(table.column_names, table.columns, strict=True)), **places})
        for part, group, table in corpus.row_groups(columns=["doc_id", "group_id"])
        for places in [places_of(part, group, table.num_rows)]
    ]
    if not rows:
        raise CorpusError(f"{corpus.uri} holds no document; run the stage corpus")
    table = pa.concat_tables(rows)
    age = pc.index_in(table.column("part"), value_set=table.column("part").unique())
    members = first_of_each(
        table.append_column("age", age).sort_by([("age", "ascending"), ("doc_id", "ascending")]),
        "doc_id",
    )
    chosen = first_of_each(members, "group_id").sort_by("doc_id")
    groups = members.column("group_id").combine_chunks()
    stands_for = pc.index_in(groups, value_set=chosen.column("group_id").combine_chunks())
    rows_of_members = stands_for.to_numpy().astype(np.int64)
    texts = _text_ids(corpus, chosen)
    copies = np.bincount(rows_of_members, minlength=chosen.num_rows)
    found = chosen.select(["doc_id", "part", "group", "row"])
    for name, column in {**texts, "copies": copies}.items():
        found = found.append_column(name, pa.array(column))
    return Documents(found, members.column("doc_id").combine_chunks(), rows_of_members)


def _text_ids(corpus: Artifact, places: pa.Table) -> dict[str, Any]:
    ids = np.empty(places.num_rows, dtype=object)
    chars = np.empty(places.num_rows, dtype=np.int64)
    for wanted in by_row_group(places):
        for where, text in zip(wanted.where, texts_of(corpus, wanted), strict=True):
            ids[where], chars[where] = text_id(text, instruction=None), len(text)
    return {"text_id": pa.array(ids, pa.string()), "chars": chars}


def texts_of(corpus: Artifact, wanted: Wanted) -> list[str]:
    """The texts of some rows of one row group."""
    column = corpus.row_group(wanted.part, wanted.group, columns=["text"]).column("text")
    texts: list[str] = column.take(pa.array(wanted.rows)).to_pylist()
    return texts


def texts_at(corpus: Artifact, places: pa.Table) -> list[str]:
    """Texts in the order of their places; all of them are in memory."""
    texts: list[str] = [""] * places.num_rows
    for wanted in by_row_group(places):
        for where, text in zip(wanted.where, texts_of(corpus, wanted), strict=True):
            texts[where] = text
    return texts


# What is shut out.


class SourceIndex:
    """Finds the source documents that a text nearly repeats.

    Exact: two sets whose Jaccard similarity passes t share more than t|A| elements, so that each
    one's |A| - floor(t|A|) smallest must meet the other's (prefix filter; Chaudhuri, Ganti and
    Kaushik, ICDE 2006). Only pairs that meet there are compared in full.

    Args:
        texts: Of the sources.
        max_similarity: Similarity of word 5-grams up to which a text is no near-duplicate.
    """

    def __init__(self, texts: Iterable[str], *, max_similarity: float) -> None:
        self._limit = max_similarity
        grams = [_sorted_grams(text) for text in texts]
        prefixes = [self._prefix(one) for one in grams]
        # One array for all, because a worker gets it without a copy.
        self._grams = np.concatenate([*grams, np.empty(0, dtype=np.uint64)])
        self._ends = np.cumsum([0, *(len(one) for one in grams)])
        values = np.concatenate([*prefixes, np.empty(0, dtype=np.uint64)])
        owners = np.repeat(np.arange(len(prefixes)), [len(prefix) for prefix in prefixes])
        order = np.argsort(values, kind="stable")
        self._values, self._owners = values[order], owners[order]

    def sources_of(self, text: str) -> list[int]:
        """Sources, by position, that are more like the text than allowed."""
        grams = _sorted_grams(text)
        prefix = self._prefix(grams)
        low = np.searchsorted(self._values, prefix, side="left")
        high = np.searchsorted(self._values, prefix, side="right")
        meeting = {
            int(owner)
            for start, stop in zip(low, high, strict=True)
            for owner in self._owners[start:stop]
        }
        if not meeting:
            return []
        whole = frozenset(grams.tolist())
        return sorted(
            source for source in meeting if similarity(whole, self._source(source)) > self._limit
        )

    def _source(self, number: int) -> frozenset[int]:
        return frozenset(self._grams[self._ends[number] : self._ends[number + 1]].tolist())

    def _prefix(self, grams: _Values) -> _Values:
        # A shade below the limit, so that rounding makes the prefix longer, never shorter.
        return grams[: len(grams) - int(len(grams) * self._limit * (1 - 1e-9))]


def _sorted_grams(text: str) -> _Values:
    return np.sort(np.fromiter(shingles(text, size=_SHINGLE_WORDS), dtype=np.uint64))


@dataclass(frozen=True)
class ShutOut:
    """Documents that are no candidates, as rows of `Documents.table`.

    Attributes:
        always: For no query: the documents that a list names, and their duplicates.
        by_source: For queries of a source, itself included.
    """

    always: frozenset[int]
    by_source: Mapping[int, frozenset[int]]

    def of(self, source: int) -> frozenset[int]:
        """What a query of this source must not get, beside what no query gets."""
        return self.by_source[source] - self.always

    def num_documents(self, source: int, copies: NDArray[np.int64]) -> int:
        """Documents that are shut out for a query of this source, every copy counted."""
        return int(copies[list(self.always | self.by_source[source])].sum())


def shut_out(
    documents: Documents,
    sources: Iterable[int],
    *,
    near: Iterable[tuple[int, int]],
    exclude_ids: str | None,
) -> ShutOut:
    """Gathers what must not be returned.

    Args:
        documents: What may be searched.
        sources: Rows of the source documents.
        near: Pairs (row of a source, row of a near-duplicate).
        exclude_ids: A file with one doc id a line.

    Raises:
        ConfigError: The file cannot be read, or names a document that is not in the corpus.
    """
    by_source = {int(source): {int(source)} for source in sources}
    for source, document in near:
        by_source[source].add(document)
    listed = _read_ids(exclude_ids, documents) if exclude_ids else frozenset()
    return ShutOut(listed, {source: frozenset(rows) for source, rows in by_source.items()})


# Queries.


def plan_queries(
    queries: pa.Table, documents: Documents, shut: ShutOut, *, tasks: Mapping[str, Task]
) -> pa.Table:
    """Queries in the form that `index.shards` takes: `query_id`, `text_id`, `excluded`, and more.

    Args:
        queries: Rows of `schemas.QUERIES` that are used.
        documents: What may be searched.
        shut: Documents that are no candidates.
        tasks: By name; a query is embedded under its task's instruction.

    Returns:
        By query id; beside the columns above `query`, `source_doc_id`, `task`, `num_excluded`.
    """
    rows = queries.select(["query_id", "query", "source_doc_id", "task"]).sort_by("query_id")
    sources = documents.positions(rows.column("source_doc_id").to_pylist()).tolist()
    doc_ids = documents.doc_ids
    excluded = [
        doc_ids.take(pa.array(sorted(shut.of(one)), pa.int64())).to_pylist() for one in sources
    ]
    texts = zip(rows.column("query").to_pylist(), rows.column("task").to_pylist(), strict=True)
    ids = [text_id(text, instruction=tasks[task].instruction) for text, task in texts]
    counts = {one: shut.num_documents(one, documents.num_copies) for one in set(sources)}
    return (
        rows.append_column("text_id", pa.array(ids, pa.string()))
        .append_column("excluded", pa.array(excluded, pa.list_(pa.string())))
        .append_column("num_excluded", pa.array([counts[one] for one in sources], pa.int32()))
    )


# Candidates.


class RunFile:
    """A run over our query ids as a retriever.

    Args:
        path: The file, in any form that `runs.read_run` reads.
        documents: What may be searched; a document that another stands for counts as that one.
        always: Rows of documents that no query gets.

    Raises:
        ConfigError: The file cannot be read, or names a document that is not in the corpus.
        EvaluationError: See `runs.read_run`.
    """

    def __init__(self, path: str, documents: Documents, *, always: frozenset[int]) -> None:
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"no run file at {file}")
        run = read_run(file)
        try:  # all at once: every call hashes the whole corpus
            ids = [doc_id for scores in run.values() for doc_id in scores]
            positions = documents.positions(ids)
        except CorpusError as error:
            raise _locate_unknown(file, run, documents) from error
        ends = np.cumsum([0, *(len(scores) for scores in run.values())])
        self._rows = {
            query_id: _best_of_each(positions[start:stop], list(scores.values()))
            for (query_id, scores), (start, stop) in zip(run.items(), pairwise(ends), strict=True)
        }
        self._doc_ids, self._always = documents.doc_ids, always

    def missing(self, query_ids: Iterable[str]) -> int:
        """Queries that the run says nothing of."""
        return sum(query_id not in self._rows for query_id in query_ids)

    def search(self, queries: pa.Table, *, k: int) -> tuple[Scores, Positions]:
        """The first k documents that a query may get; filled with -inf and -1."""
        scores_QK = np.full((queries.num_rows, k), -np.inf, dtype=np.float32)
        positions_QK = np.full((queries.num_rows, k), NO_DOCUMENT, dtype=np.int64)
        excluded = excluded_positions(queries.column("excluded"), self._doc_ids)
        for row, query_id in enumerate(queries.column("query_id").to_pylist()):
            barred = self._always.union(excluded[row])
            found = self._rows.get(query_id, {})
            kept = [(one, score) for one, score in found.items() if one not in barred][:k]
            positions_QK[row, : len(kept)] = [one for one, _ in kept]
            scores_QK[row, : len(kept)] = [score for _, score in kept]
        return scores_QK, positions_QK


def _best_of_each(positions: NDArray[np.int64], scores: Sequence[float]) -> dict[int, float]:
    """Score by document; of duplicates the best, which comes first."""
    best: dict[int, float] = {}
    for position, score in zip(positions.tolist(), scores, strict=True):
        best.setdefault(position, score)
    return best


def _read_ids(path: str, documents: Documents) -> frozenset[int]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"mine.exclude_ids: {path} cannot be read: {error}") from error
    ids = [line.strip() for line in lines if line.strip()]
    try:
        return frozenset(documents.positions(ids).tolist())
    except CorpusError as error:
        raise ConfigError(f"mine.exclude_ids: {path}: {error}") from error


def _locate_unknown(
    file: Path, run: Mapping[str, Iterable[str]], documents: Documents
) -> ConfigError:
    known = set(documents.members.to_pylist())
    query_id, doc_id = next(
        (query_id, doc_id)
        for query_id, doc_ids in run.items()
        for doc_id in doc_ids
        if doc_id not in known
    )
    return ConfigError(
        f"{file}, query {query_id!r}: document {doc_id!r} is not in the corpus of {len(known)} "
        "documents; was the run made over another corpus?"
    )


def candidates(
    queries: pa.Table,
    found: Mapping[str, tuple[Scores, Positions]],
    *,
    doc_ids: pa.Array,
    source_scores_Q: Scores,
    config: MineConfig,
) -> pa.Table:
    """Rows of `schemas.CANDIDATES`: the only retriever's list, or the fusion of all.

    Args:
        queries: Of `plan_queries`.
        found: By retriever, scores and positions in `doc_ids`, [Q, K], in the order of `queries`;
            position -1 fills a row.
        doc_ids: Of all documents.
        source_scores_Q: What the miner gives each query's source.
        config: `top_k`, `fusion`.
    """
    source_ranks = _ranks(source_scores_Q, found[MINER][0], top_k=config.top_k)
    names = sorted(found, key=lambda name: (name != MINER, name))
    ids = np.asarray(doc_ids.to_numpy(zero_copy_only=False))
    columns = ["query_id", "source_doc_id", "task", "num_excluded"]
    table = []
    for row, query in enumerate(queries.select(columns).to_pylist()):
        ranked = {name: _ids(found[name][1][row], ids) for name in names}
        if len(names) == 1:
            fused = _alone(names[0], ranked[names[0]], found[names[0]][0][row])
        elif config.fusion == "quota":
            fused = quota(ranked, k=config.top_k, quotas=config.quotas)
        else:
            fused = rrf(ranked, k=config.top_k, constant=config.rrf_constant)
        table.append(
            {
                **query,
                "doc_ids": [one.doc_id for one in fused],
                "scores": [one.score for one in fused],
                "origins": [[vars(origin) for origin in one.origins] for one in fused],
                "source_rank": source_ranks[row],
            }
        )
    return from_rows(table, CANDIDATES, where="candidates")


def _ranks(scores_Q: Scores, found_QK: Scores, *, top_k: int) -> list[int | None]:
    """Rank of a score among those that were found, 1 is best; None beyond `top_k`."""
    better_Q = (found_QK > scores_Q[:, None]).sum(axis=1).tolist()
    return [better + 1 if better < top_k else None for better in better_Q]


def keeping_to_source(mined: pa.Table, *, max_source_rank: int | None) -> pa.Table:
    """Rows of `schemas.CANDIDATES` whose queries have not strayed from their source.

    A query that a model wrote from a document and that does not find this document is about
    something else. Asking for the round trip is how synthetic queries are filtered elsewhere
    (Promptagator, arXiv:2209.11755); it shuts out what the writer got wrong, not what is hard,
    where the bound is generous.
    """
    if max_source_rank is None:
        return mined
    return mined.filter(pc.field("source_rank") <= max_source_rank)


def _ids(positions_K: Positions, ids: NDArray[Any]) -> list[str]:
    names: list[str] = ids[positions_K[positions_K != NO_DOCUMENT]].tolist()
    return names


def _alone(name: str, doc_ids: list[str], scores_K: Scores) -> list[Fused]:
    pairs = zip(doc_ids, scores_K.tolist(), strict=False)
    return [
        Fused(doc_id, score, (Origin(name, rank),))
        for rank, (doc_id, score) in enumerate(pairs, start=1)
    ]


@dataclass(frozen=True)
class Churn:
    """How much candidates differ from those that were mined before.

    Attributes:
        compared: Queries that had candidates before.
        changed: Those whose list is another one.
        replaced: Over all compared queries, the sum of the share of old candidates that are gone.
    """

    compared: int = 0
    changed: int = 0
    replaced: float = 0.0

    def __add__(self, other: Churn) -> Churn:
        return Churn(
            self.compared + other.compared,
            self.changed + other.changed,
            self.replaced + other.replaced,
        )


def churn(new: pa.Table, old: pa.Table) -> Churn:
    """Compares candidates with those of before, query by query."""
    before = dict(zip(old["query_id"].to_pylist(), old["doc_ids"].to_pylist(), strict=True))
    total = Churn()
    for query_id, now in zip(new["query_id"].to_pylist(), new["doc_ids"].to_pylist(), strict=True):
        if (then := before.get(query_id)) is not None:
            gone = len(set(then) - set(now)) / max(1, len(then))
            total += Churn(1, int(then != now), gone)
    return total


def changed_rows(new: pa.Table, old: pa.Table) -> pa.Table:
    """The rows of `new` that `old` does not hold in the same form."""
    before = {row["query_id"]: row for row in old.to_pylist()}
    return new.filter(
        pa.array([row != before.get(row["query_id"]) for row in new.to_pylist()], pa.bool_())
    )
