"""Training samples from judged candidates.

Reads `queries`, `candidates`, `judgments`, `rewrites`; writes `samples`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import Artifact
from reasonembed.config import AssembleConfig
from reasonembed.corpus import CorpusStore
from reasonembed.errors import ConfigError
from reasonembed.remixer.duplicates import usable_queries
from reasonembed.remixer.mine import keeping_to_source
from reasonembed.schemas import SAMPLES, Status, from_rows, stable_hash
from reasonembed.tasks import Task

JUDGED_COLUMNS = ["query_id", "doc_id", "status", "relevance_label", "expected_label"]
"""What of `schemas.JUDGMENTS` is needed here; the analyses are long."""
CANDIDATE_COLUMNS = ["query_id", "doc_ids", "source_rank"]
"""What of `schemas.CANDIDATES` is needed here."""

FATES = (
    "no usable query",
    "near-duplicate query",
    "strays from its source",
    "no usable rewrite",
    "no positive",
    "no negative",
    "sample",
)
"""What can become of a query, in the order in which it is asked."""

TRAIN, HELD_OUT = "train", "held_out"
_HIGHEST = 5

_PART_ROWS, _PART_CHARS = 2_000, 2**28  # of a committed part; far below Arrow's 2 GiB a column

Row = dict[str, Any]


@dataclass(frozen=True)
class Placed:
    """A row of `schemas.SAMPLES`, and where it comes from, for messages."""

    place: str
    row: Row


@dataclass(frozen=True)
class Inputs:
    """What samples are made of; tables as `Artifact.read` gives them, sorted by query.

    Attributes:
        queries: `schemas.QUERIES`.
        candidates: `CANDIDATE_COLUMNS` of `schemas.CANDIDATES`.
        judgments: `JUDGED_COLUMNS` of `schemas.JUDGMENTS`.
        rewrites: `schemas.REWRITES`.
        corpus: Texts and duplicate groups.
    """

    queries: pa.Table
    candidates: pa.Table
    judgments: pa.Table
    rewrites: pa.Table
    corpus: CorpusStore


class Assembler:
    """Splits each query's judged candidates into positives and hard negatives.

    `threshold` is the paper's rule (arXiv:2510.08252): label ≥ 3 positive, ≤ 2 negative, a query
    without both is dropped. `rank` orders a query's own candidates by expected label and takes the
    best and the worst: for annotators whose grades cannot be compared between queries.

    Only judgments of a query's present candidates count, so that samples follow from the
    candidates, whatever was judged in earlier rounds of mining.

    `positives_from: source` is a control and no method: the same queries with the same negatives,
    but the document that each was written from as its one positive.

    Args:
        inputs: What the samples are made of.
        config: The rule.
        tasks: By name, for the query instructions.
        max_query_similarity: See `duplicates.usable_queries`.
        max_source_rank: See `mine.keeping_to_source`.

    Attributes:
        funnel: Queries by fate (`FATES`); whole once `samples` is used up.
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        config: AssembleConfig,
        tasks: Mapping[str, Task],
        max_query_similarity: float,
        max_source_rank: int | None,
    ) -> None:
        self.funnel = dict.fromkeys(FATES, 0)
        self._inputs, self._config, self._tasks = inputs, config, tasks
        usable, _ = usable_queries(inputs.queries, max_similarity=max_query_similarity)
        self._unique = set(usable.column("query_id").to_pylist())
        kept = keeping_to_source(inputs.candidates, max_source_rank=max_source_rank)
        mined = set(inputs.candidates.column("query_id").to_pylist())
        self._strays = mined.difference(kept.column("query_id").to_pylist())
        self._candidates = _ByQuery(inputs.candidates.select(["query_id", "doc_ids"]))
        self._judgments = _ByQuery(inputs.judgments)
        self._rewrites = _ByQuery(inputs.rewrites.select(["query_id", "rewritten_query", "status"]))

    def samples(self) -> Iterator[Placed]:
        """Rows of `schemas.SAMPLES` in order of query ids, one at a time."""
        for query in self._inputs.queries.to_pylist():
            sample = self._sample(query)
            if sample is not None:
                yield Placed(f"query {query['query_id']}", sample)

    def _sample(self, query: Row) -> Row | None:
        query_id = query["query_id"]
        rewrites = [r for r in self._rewrites.of(query_id) if r["status"] == Status.OK]
        positives, negatives = split_judged(self._judged(query_id), self._config)
        fate = self._fate(query, bool(rewrites), bool(positives), bool(negatives))
        self.funnel[fate] += 1
        if fate != "sample":
            return None
        source = query["source_doc_id"]
        return {
            "query_id": query_id,
            "task": query["task"],
            "instruction": self._tasks[query["task"]].instruction,
            "query": query["query"],
            "rewritten_query": rewrites[0]["rewritten_query"],
            "positives": self._positives(positives, source),
            "negatives": self._labelled(negatives),
            "source_doc_id": source,
            "split": split_of(self._inputs.corpus.group(source), self._config.held_out_share),
        }

    def _fate(self, query: Row, is_rewritten: bool, has_positive: bool, has_negative: bool) -> str:
        answers = (
            query["status"] == Status.OK,
            query["query_id"] in self._unique,
            query["query_id"] not in self._strays,
            is_rewritten,
            has_positive,
            has_negative,
        )
        return FATES[answers.index(False)] if not all(answers) else FATES[-1]

    def _judged(self, query_id: str) -> list[Row]:
        """Judgments of the present candidates, the miner's best first."""
        rank = {
            doc_id: position
            for row in self._candidates.of(query_id)
            for position, doc_id in enumerate(row["doc_ids"])
        }
        rows = [
            row
            for row in self._judgments.of(query_id)
            if row["status"] == Status.OK and row["doc_id"] in rank
        ]
        return sorted(rows, key=lambda row: rank[row["doc_id"]])

    def _positives(self, annotated: list[Row], source: str) -> list[Row]:
        if self._config.positives_from == "annotated":
            return self._labelled(annotated)
        # The control: the very queries and negatives of the method, so that nothing else differs.
        # Nobody judged the source; the query was written from it, hence the highest label.
        return self._labelled(
            [{"doc_id": source, "relevance_label": _HIGHEST, "expected_label": None}]
        )

    def _labelled(self, rows: list[Row]) -> list[Row]:
        corpus = self._inputs.corpus
        return [
            {
                "doc_id": row["doc_id"],
                "text": corpus.text(row["doc_id"]),
                "label": grade(row),
                "text_hash": corpus.group(row["doc_id"]),
            }
            for row in rows
        ]


class _ByQuery:
    """Rows of a table that is sorted by query id, by query id; copies nothing."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        self._spans: dict[str, tuple[int, int]] = {}
        offset = 0
        for chunk in table.column("query_id").chunks:
            runs = pc.run_end_encode(chunk, run_end_type=pa.int64())
            ends = [offset + end for end in runs.run_ends.to_pylist()]
            for query_id, start, end in zip(
                runs.values.to_pylist(), [offset, *ends], ends, strict=False
            ):
                first, last = self._spans.get(query_id, (start, start))
                assert last == start, f"rows of {query_id} do not lie together"
                self._spans[query_id] = first, end
            offset += len(chunk)

    def of(self, query_id: str) -> list[Row]:
        start, end = self._spans.get(query_id, (0, 0))
        rows: list[Row] = self._table.slice(start, end - start).to_pylist()
        return rows


def grade(judgment: Row) -> float:
    """The label that a sample keeps: the expected one where there is one, else the written one."""
    expected = judgment["expected_label"]
    return float(judgment["relevance_label"] if expected is None else expected)


def split_judged(judged: list[Row], config: AssembleConfig) -> tuple[list[Row], list[Row]]:
    """Positives, the highest labels first, and negatives, the miner's best first, of one query.

    Args:
        judged: Rows of `JUDGED_COLUMNS`, the miner's best first; ties keep this order.
        config: Rule and caps.
    """
    if config.rule == "threshold":
        graded = [row for row in judged if row["relevance_label"] is not None]
        positives = [row for row in graded if row["relevance_label"] >= config.positive_min]
        negatives = [row for row in graded if row["relevance_label"] <= config.negative_max]
    else:
        graded = [row for row in judged if row["expected_label"] is not None]
        ranked = sorted(graded, key=lambda row: -row["expected_label"])
        positives, rest = ranked[: config.rank_positives], ranked[config.rank_positives :]
        worst = {row["doc_id"] for row in rest[-config.rank_negatives :]}
        negatives = [row for row in judged if row["doc_id"] in worst]
    best = sorted(positives, key=lambda row: -grade(row))
    return best[: config.max_positives], negatives[: config.max_negatives]


def split_of(group: str, share: float) -> str:
    """`train` or `held_out`: a hash of the duplicate group decides, and nothing else.

    All variants of a document, and of its duplicates, fall together; a corpus that grows moves no
    document; a larger share holds out what a smaller one does, and more.

    Args:
        group: The source document's duplicate group.
        share: Of the groups that is held out, 0..1.
    """
    return HELD_OUT if int(stable_hash("held out", group), 16) < share * 2**64 else TRAIN


class SampleWriter:
    """Commits samples in parts whose names and contents follow from their order.

    Started again after a kill it leaves alone the parts that are there, and the rest become the
    same as they would have been. It holds one part, and of the others ids and hashes.

    Args:
        artifact: Of `schemas.SAMPLES`.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._committed = {commit.part for commit in artifact.commits()}
        self._places: dict[str, str] = {}
        self._splits: Counter[str] = Counter()
        self._positives: dict[str, set[str]] = {TRAIN: set(), HELD_OUT: set()}

    def write(self, samples: Iterable[Placed], *, name: str) -> int:
        """Commits the parts `name-00000`, `name-00001`, ... and returns the number of samples.

        Raises:
            ConfigError: A query id occurs twice, here or in what was written before.
            SchemaError: A row does not fit `schemas.SAMPLES`.
        """
        before = self._splits.total()
        for number, rows in enumerate(_parts(map(self._noted, samples))):
            part = f"{name}-{number:05d}"
            if part not in self._committed:
                self._artifact.commit(part, from_rows(rows, SAMPLES, where=f"samples {part}"))
        return self._splits.total() - before

    def _noted(self, sample: Placed) -> Row:
        row = sample.row
        if (first := self._places.get(row["query_id"])) is not None:
            raise ConfigError(
                f"sample {row['query_id']!r} is in {first} and in {sample.place}; leave one of "
                "them out of assemble.sources"
            )
        self._places[row["query_id"]] = sample.place
        self._splits[row["split"]] += 1
        self._positives[row["split"]] |= {one["text_hash"] for one in row["positives"]}
        return row

    def counts(self) -> dict[str, int]:
        """Samples of each split, and how far the held-out positives are known from training.

        A leak of this kind cannot be ruled out: one document is relevant to many queries.
        """
        held_out = self._positives[HELD_OUT]
        return {
            "train": self._splits[TRAIN],
            "held out": self._splits[HELD_OUT],
            "held-out positives": len(held_out),
            "held-out positives seen in training": len(held_out & self._positives[TRAIN]),
        }


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    chars = 0
    for row in rows:
        part.append(row)
        chars += sum(len(one["text"]) for one in [*row["positives"], *row["negatives"]])
        if len(part) == _PART_ROWS or chars >= _PART_CHARS:
            yield part
            part, chars = [], 0
    if part:
        yield part
