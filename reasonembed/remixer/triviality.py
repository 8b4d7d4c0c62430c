"""How trivial are the positives? Each measure beside the control: the source document as positive.

A query that is written from a document repeats it, so that the pair teaches to match words, which
is what mining without the source is against (arXiv:2510.08252). The control is built from the same
queries: what differs between the two groups is the positive alone. Reads `samples` and `corpus`;
writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from reasonembed.corpus import CorpusStore
from reasonembed.evaluation.compare import Comparison, compare
from reasonembed.index.analysis import distinct_terms
from reasonembed.index.bm25 import BM25Index
from reasonembed.remixer.mine import MINER
from reasonembed.schemas import stable_hash, text_id

Vectors = Mapping[str, NDArray[np.float32]]
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Kind:
    """What is measured of a query and a document.

    Attributes:
        title: For people.
        more_trivial: Which end of the scale is the trivial one.
        meaning: One sentence.
    """

    title: str
    more_trivial: Literal["higher", "lower"]
    meaning: str


KINDS = {
    "shared_words": Kind(
        "share of the query's words in the document",
        "higher",
        "Distinct stemmed words of the query without stop words; how many stand in the document.",
    ),
    "jaccard": Kind(
        "Jaccard of the two word sets",
        "higher",
        "Shared distinct words over all distinct words of the two, stemmed, without stop words.",
    ),
    "copied_words": Kind(
        "longest copied run of words",
        "higher",
        "The longest run of words, as written but for case, that stands in both.",
    ),
    "bm25_rank": Kind(
        "BM25 rank",
        "lower",
        "Rank for the query in the corpus, nothing excluded; without a shared word: next to last.",
    ),
    "dense_rank": Kind(
        "rank by the miner", "lower", "Rank for the query in the corpus by the miner's vectors."
    ),
}


@dataclass(frozen=True)
class Spread:
    """One group's figures, one a query."""

    mean: float
    median: float


@dataclass(frozen=True)
class Measure:
    """A measure of the positives, and of the control where it can be had.

    Attributes:
        kind: What is measured.
        num_queries: Queries that it could be measured on; where there is a control, of both.
        positives: Of the positives; a query counts once, by the mean over its positives.
        sources: Of the same queries' source documents.
        difference: Positives minus sources, query by query.
    """

    kind: Kind
    num_queries: int
    positives: Spread
    sources: Spread | None
    difference: Comparison | None

    @property
    def verdict(self) -> Literal["less", "more", "equal", "unknown"]:
        """Are the positives less or more trivial than the control, beyond the 95 % interval?"""
        if self.difference is None:
            return "unknown"
        low, high = self.difference.low, self.difference.high
        if low <= 0 <= high:
            return "equal"
        is_higher = low > 0
        return "more" if is_higher == (self.kind.more_trivial == "higher") else "less"


@dataclass(frozen=True)
class Triviality:
    """What was measured.

    Attributes:
        measures: By name, in the order of `KINDS`; without those that nothing could be said of.
        num_queries: Samples that were looked at.
        num_documents: Distinct texts that ranks are counted among.
        notes: What could not be measured as asked, and why.
    """

    measures: Mapping[str, Measure]
    num_queries: int
    num_documents: int
    notes: tuple[str, ...]


def choose_queries(query_ids: Iterable[str], *, most: int) -> list[str]:
    """At most so many queries, by the hash of the id: the same in every report of a run."""
    return sorted(query_ids, key=lambda id_: (stable_hash("triviality", id_), id_))[:most]


def triviality(
    samples: pa.Table,
    corpus: CorpusStore,
    *,
    vectors: Callable[[Collection[str]], Vectors] | None = None,
    candidates: pa.Table | None = None,
    max_queries: int = 1_000,
    max_documents: int = 50_000,
) -> Triviality:
    """Measures positives and source documents against the same queries.

    Args:
        samples: Rows of `schemas.SAMPLES`.
        corpus: Where sources stand and ranks are counted; equal texts count once.
        vectors: The miner's vectors of some texts, by `schemas.text_id`; those that it has.
        candidates: Rows of `schemas.CANDIDATES`; the miner's ranks of positives are taken from
            them where there are no vectors.
        max_queries: More samples than these are drawn from, by hash.
        max_documents: Ranks in a larger corpus are counted among so many texts of it, by hash,
            and the positives and sources.
    """
    chosen = choose_queries(samples.column("query_id").to_pylist(), most=max_queries)
    rows = samples.filter(pc.field("query_id").isin(pa.array(chosen, pa.string()))).to_pylist()
    pairs = [_Pairs.of(row, corpus) for row in rows if row["positives"]]
    ranked = _ranked_documents(pairs, corpus, max_documents)
    values: dict[str, _Values] = {name: {} for name in KINDS}
    for name, found in _overlaps(pairs, corpus).items():
        values[name] = found
    notes = _notes(pairs, corpus, ranked)
    if ranked:
        values["bm25_rank"] = _bm25_ranks(pairs, corpus, ranked)
        values["dense_rank"] = _dense_ranks(pairs, corpus, ranked, vectors)
    if pairs and not values["dense_rank"]:
        values["dense_rank"] = _mined_ranks(pairs, candidates)
        notes.append(
            "The miner's vectors are not at hand: its ranks of the positives are those of mining, "
            "where the source is shut out; the control has none."
            if values["dense_rank"]
            else "The miner's ranks are left out: neither its vectors nor its candidates are here."
        )
    measures = {name: _measure(KINDS[name], found) for name, found in values.items() if found}
    return Triviality(measures, len(pairs), len(ranked), tuple(notes))


_Values = dict[str, tuple[float, float | None]]
"""By query: of its positives, and of its source."""


@dataclass(frozen=True)
class _Pairs:
    """A query with its positives and its source document."""

    query_id: str
    query: str
    vector_id: str
    positives: Sequence[Mapping[str, Any]]
    source: str | None

    @classmethod
    def of(cls, sample: Mapping[str, Any], corpus: CorpusStore) -> _Pairs:
        source = sample["source_doc_id"]
        return cls(
            sample["query_id"],
            sample["query"],
            text_id(sample["query"], instruction=sample["instruction"]),
            sample["positives"],
            source if source in corpus else None,
        )


def _notes(pairs: Sequence[_Pairs], corpus: CorpusStore, ranked: Mapping[str, int]) -> list[str]:
    notes = []
    without = sum(one.source is None for one in pairs)
    if without:
        notes.append(f"{without:,} samples name no source of this corpus and have no control.")
    groups = {corpus.group(doc_id) for doc_id in corpus.doc_ids}
    if len(ranked) < len(groups):
        notes.append(
            f"Ranks are counted among {len(ranked):,} of {len(groups):,} distinct texts, drawn by "
            "hash, the positives and sources with them."
        )
    return notes


def _ranked_documents(pairs: Sequence[_Pairs], corpus: CorpusStore, most: int) -> dict[str, int]:
    """Position by duplicate group, in the order of the corpus."""
    groups = dict.fromkeys(corpus.group(doc_id) for doc_id in corpus.doc_ids)
    if len(groups) <= most:
        return {group: position for position, group in enumerate(groups)}
    needed = {
        corpus.group(doc_id)
        for one in pairs
        for doc_id in (*(positive["doc_id"] for positive in one.positives), one.source)
        if doc_id in corpus
    }
    others = sorted(groups.keys() - needed, key=lambda group: stable_hash("triviality", group))
    kept = needed.union(others[: max(0, most - len(needed))])
    return {group: position for position, group in enumerate(g for g in groups if g in kept)}


def _ranked_texts(corpus: CorpusStore, ranked: Mapping[str, int]) -> list[str]:
    return [corpus.text(corpus.group_members(group)[0]) for group in ranked]


# ---- words --------------------------------------------------------------------------------------


def _overlaps(pairs: Sequence[_Pairs], corpus: CorpusStore) -> dict[str, _Values]:
    found: dict[str, _Values] = {"shared_words": {}, "jaccard": {}, "copied_words": {}}
    for one in pairs:
        texts = [positive["text"] for positive in one.positives]
        if one.source is not None:
            texts.append(corpus.text(one.source))
        figures = _overlap(one.query, texts)
        for name, values in figures.items():
            found[name][one.query_id] = _split(values, one)
    return found


def _split(values: Sequence[float], one: _Pairs) -> tuple[float, float | None]:
    """The mean over the positives, and the value of the source, which stands last."""
    number = len(one.positives)
    return sum(values[:number]) / number, values[number] if one.source is not None else None


def _overlap(query: str, documents: Sequence[str]) -> dict[str, list[float]]:
    """The three figures of a query with each of some documents."""
    # The words of `index.bm25`, so that overlap and BM25 speak of the same thing.
    asked, *told = distinct_terms([query, *documents])
    words = _words(query)
    return {
        "shared_words": [len(asked & one) / max(1, len(asked)) for one in told],
        "jaccard": [len(asked & one) / max(1, len(asked | one)) for one in told],
        "copied_words": [float(longest_copied_run(words, _words(one))) for one in documents],
    }


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def longest_copied_run(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest run of words that stands in both; 0 where they share no word."""
    # A run of n words holds one of n - 1: doubling finds the range, halving the length.
    low, high = 0, 1
    while high <= min(len(a), len(b)) and _share_a_run(a, b, high):
        low, high = high, 2 * high
    high = min(high, min(len(a), len(b)) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _share_a_run(a, b, middle) else (low, middle)
    return low


def _share_a_run(a: Sequence[str], b: Sequence[str], length: int) -> bool:
    runs = {tuple(a[i : i + length]) for i in range(len(a) - length + 1)}
    return any(tuple(b[i : i + length]) in runs for i in range(len(b) - length + 1))


# ---- ranks --------------------------------------------------------------------------------------


def _bm25_ranks(pairs: Sequence[_Pairs], corpus: CorpusStore, ranked: Mapping[str, int]) -> _Values:
    texts = _ranked_texts(corpus, ranked)
    index = BM25Index(texts)
    found: _Values = {}
    for one in pairs:
        _, positions_1N = index.search([one.query], k=len(texts))
        order = positions_1N[0][positions_1N[0] >= 0]
        rank_N = np.full(len(texts), len(order) + 1)  # whoever shares no word comes next
        rank_N[order] = np.arange(1, len(order) + 1)
        _add_ranks(found, one, rank_N, corpus, ranked)
    return found


def _dense_ranks(
    pairs: Sequence[_Pairs],
    corpus: CorpusStore,
    ranked: Mapping[str, int],
    vectors: Callable[[Collection[str]], Vectors] | None,
) -> _Values:
    """Ranks by the miner's vectors; nothing where one of the vectors is missing."""
    if vectors is None:
        return {}
    ids_N = [_member_ids(corpus, group) for group in ranked]
    asked = {one.vector_id for one in pairs}
    have = vectors(asked.union(*ids_N))
    docs_N = [next((have[id_] for id_ in ids if id_ in have), None) for ids in ids_N]
    docs = [vector for vector in docs_N if vector is not None]
    if len(docs) < len(docs_N) or not asked <= have.keys():
        return {}
    docs_ND = np.stack(docs)
    found: _Values = {}
    for one in pairs:
        scores_N = docs_ND @ have[one.vector_id]
        rank_N = np.empty(len(docs), dtype=np.int64)
        rank_N[np.argsort(-scores_N, kind="stable")] = np.arange(1, len(docs) + 1)
        _add_ranks(found, one, rank_N, corpus, ranked)
    return found


def _member_ids(corpus: CorpusStore, group: str) -> list[str]:
    """Keys of the vectors that may stand for a group: mining embeds the text committed first."""
    texts = corpus.texts(corpus.group_members(group))
    return [text_id(text, instruction=None) for text in dict.fromkeys(texts)]


def _add_ranks(
    found: _Values,
    one: _Pairs,
    rank_N: NDArray[np.int64],
    corpus: CorpusStore,
    ranked: Mapping[str, int],
) -> None:
    """The ranks of a query's documents; positives of another corpus have none."""
    ids = [positive["doc_id"] for positive in one.positives if positive["doc_id"] in corpus]
    ranks = [float(rank_N[ranked[corpus.group(doc_id)]]) for doc_id in ids]
    if ranks:
        source = one.source and float(rank_N[ranked[corpus.group(one.source)]])
        found[one.query_id] = (sum(ranks) / len(ranks), source or None)


def _mined_ranks(pairs: Sequence[_Pairs], candidates: pa.Table | None) -> _Values:
    """The miner's ranks as the candidates keep them: of positives alone, the source shut out."""
    if candidates is None:
        return {}
    wanted = {one.query_id: {p["doc_id"] for p in one.positives} for one in pairs}
    found: _Values = {}
    for row in candidates.select(["query_id", "doc_ids", "origins"]).to_pylist():
        positives = wanted.get(row["query_id"], set())
        ranks = [
            origin["rank"]
            for doc_id, origins in zip(row["doc_ids"], row["origins"], strict=True)
            if doc_id in positives
            for origin in origins
            if origin["retriever"] == MINER
        ]
        if ranks:
            found[row["query_id"]] = (sum(ranks) / len(ranks), None)
    return found


def _measure(kind: Kind, values: _Values) -> Measure:
    paired = {id_: (a, b) for id_, (a, b) in values.items() if b is not None}
    if not paired:
        positives = _spread([a for a, _ in values.values()])
        return Measure(kind, len(values), positives, None, None)
    a, b = ({id_: pair[side] for id_, pair in paired.items()} for side in (0, 1))
    return Measure(kind, len(paired), _spread(a.values()), _spread(b.values()), compare(a, b))


def _spread(values: Iterable[float]) -> Spread:
    array = np.array(list(values))
    return Spread(float(array.mean()), float(np.median(array)))
