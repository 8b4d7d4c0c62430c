"""BM25 over the words of `index.analysis`, with exclusion before the cut.

An index can be saved as a folder and loaded from it without being read:

    <folder>/bm25.json                 settings, number of documents, mean length
    <folder>/terms.arrow               terms, sorted, with their numbers
    <folder>/{idf,starts}.npy          by term
    <folder>/{documents,weights}.npy   by pair, see below

Letters in names: Q queries, N documents, K results a query, P pairs of a term and a document that
holds it, by term; V terms.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from reasonembed.errors import StorageError
from reasonembed.index.analysis import Analyzer, split
from reasonembed.index.exact import NO_DOCUMENT, Positions, Scores, as_positions

Variant = Literal["standard", "query-side"]
Weights = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int32]

ANALYSIS_VERSION = 1
"""Of words and scores; raised when the same texts and settings give others."""
_BLOCK = 4_096  # texts that are counted together
_EXACT_LENGTHS = 24  # Lucene keeps lengths up to here as they are, the rest to four binary digits
_SETTINGS, _TERMS = "bm25.json", "terms.arrow"
FILES = (_SETTINGS, _TERMS, *(f"{name}.npy" for name in ("idf", "starts", "documents", "weights")))
"""What `BM25Index.save` writes."""


class _Numbers(Protocol):
    """The number of each term."""

    def get(self, term: str, /) -> int | None:
        """None for a term that no document holds."""

    def items(self) -> Iterable[tuple[str, int]]:
        """Terms and their numbers."""


class BM25Index:
    """BM25 with the idf of Lucene, ln(1 + (N - n + 0.5) / (n + 0.5)).

    Two variants:

    - `standard`: Lucene's, as Anserini runs it. A document's length has four binary digits, since
      Lucene keeps it in one byte; documents without a word count neither for N nor for the mean
      length. Every occurrence of a word in the query counts alike.
    - `query-side`: the row "BM25" of BRIGHT's table (arXiv:2407.12883; gensim's LuceneBM25Model,
      arXiv:2509.02558). Lengths are exact, all documents count, and the query's words are weighted
      as a document's are: saturated, normalised by the number of its known words, and once more
      times idf.

    One process holds the whole index, 8 bytes for each distinct word of each document and twice
    that while it is made.

    Args:
        texts: The documents; their position is their identity.
        variant: See above.
        k1: Saturation of term frequency (Anserini's 0.9).
        b: Strength of length normalisation (Anserini's 0.4).

    Raises:
        ValueError: No text holds a word.
    """

    def __init__(
        self,
        texts: Sequence[str],
        *,
        variant: Variant = "standard",
        k1: float = 0.9,
        b: float = 0.4,
    ) -> None:
        self._variant, self._k1, self._b = variant, k1, b
        self._num_documents = len(texts)
        numbers, counts, lengths_N = _count(texts)
        if not numbers:
            raise ValueError(f"none of the {len(texts)} documents holds a word to search for")
        self._numbers: _Numbers = numbers
        num_counted = len(texts) if variant == "query-side" else np.count_nonzero(lengths_N)
        self._mean_length = float(lengths_N.sum()) / num_counted
        matching_V = sum(np.bincount(one.terms, minlength=len(numbers)) for one in counts)
        self._idf_V = np.log1p((num_counted - matching_V + 0.5) / (matching_V + 0.5))
        self._starts_V = np.concatenate([[0], np.cumsum(matching_V)])
        kept_N = lengths_N if variant == "query-side" else in_one_byte(lengths_N)
        self._documents_P, self._weights_P = self._by_term(counts, self._saturation(kept_N))

    def save(self, folder: Path) -> None:
        """Writes the index into a folder, which is made; `load` gives one of equal scores."""
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"idf": self._idf_V, "starts": self._starts_V}
        arrays |= {"documents": self._documents_P, "weights": self._weights_P}
        for name, array in arrays.items():
            np.save(folder / f"{name}.npy", array)
        _write_terms(folder / _TERMS, self._numbers)
        settings = {
            "analysis": ANALYSIS_VERSION,
            "variant": self._variant,
            "k1": self._k1,
            "b": self._b,
            "num_documents": self._num_documents,
            "mean_length": self._mean_length,
        }
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> BM25Index:
        """Opens what `save` wrote; arrays and terms are mapped into memory, not read.

        Raises:
            StorageError: A file is missing or damaged, or another version of the words and scores
                made it.
        """
        index = cls.__new__(cls)
        settings = _read_settings(folder / _SETTINGS)
        try:
            index._variant, index._k1, index._b = (settings[key] for key in ("variant", "k1", "b"))
            index._num_documents = settings["num_documents"]
            index._mean_length = settings["mean_length"]
            index._numbers = _SavedTerms(folder / _TERMS)
            index._idf_V, index._starts_V = (_mapped(folder, name) for name in ("idf", "starts"))
            index._documents_P = _mapped(folder, "documents")
            index._weights_P = _mapped(folder, "weights")
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            raise StorageError(f"{folder} holds no whole BM25 index ({error}); {_CURE}") from error
        return index

    def search(
        self,
        queries: Sequence[str],
        *,
        k: int,
        excluded: Sequence[Collection[int] | Positions] | None = None,
    ) -> tuple[Scores, Positions]:
        """The k best documents for every query, of those that share a word with it.

        Args:
            queries: Texts; one without a known word has no results.
            k: Results a query, at least 1.
            excluded: For each query the positions that it must not return; None for none.

        Returns:
            scores_QK float32 and positions_QK int64, K = min(k, number of documents); score
            descending, then position ascending; rows filled with score -inf and position -1.

        Raises:
            ValueError: k is below 1, or `excluded` has another length than `queries`.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if excluded is not None and len(excluded) != len(queries):
            raise ValueError(f"excluded has {len(excluded)} entries for {len(queries)} queries")
        shape = (len(queries), min(k, self._num_documents))
        scores_QK = np.full(shape, -np.inf, dtype=np.float32)
        positions_QK = np.full(shape, NO_DOCUMENT, dtype=np.int64)
        # Its own, because it remembers all words it meets, and a service meets words without end.
        analyzer = Analyzer()
        for row, query in enumerate(queries):
            scores_N = self._scores(analyzer.terms(query))
            if excluded is not None:
                scores_N[as_positions(excluded[row])] = 0
            top = _top(scores_N, k)
            scores_QK[row, : len(top)] = scores_N[top]
            positions_QK[row, : len(top)] = top
        return scores_QK, positions_QK

    def _scores(self, query: Sequence[str]) -> Scores:
        """float32 [N], summed in float64 as Lucene does."""
        scores_N = np.zeros(self._num_documents)
        for term, weight in self._query_weights(query):
            held = slice(self._starts_V[term], self._starts_V[term + 1])
            weights = np.multiply(self._weights_P[held], weight, dtype=np.float64)
            # Faster than `+=` where no dtype changes on the way, else twenty times slower.
            np.add.at(scores_N, self._documents_P[held], weights)
        return scores_N.astype(np.float32)

    def _query_weights(self, query: Sequence[str]) -> Iterator[tuple[int, float]]:
        """What each known term of a query counts."""
        found = ((self._numbers.get(term), count) for term, count in Counter(query).items())
        counts = Counter({number: count for number, count in found if number is not None})
        saturation = self._saturation(np.array([counts.total()]))[0]
        for term, count in counts.items():
            if self._variant == "query-side":
                yield term, float(self._idf_V[term] * count / (count + saturation))
            else:
                yield term, count

    def _saturation(self, lengths: npt.NDArray[np.int64]) -> Weights:
        """The count at which a term reaches half its weight in a text of that length."""
        relative = lengths / np.float64(self._mean_length)
        return np.float64(self._k1) * (1 - self._b + self._b * relative)

    def _by_term(
        self, counts: Sequence[_Counts], saturation_N: Weights
    ) -> tuple[_Integers, npt.NDArray[np.float32]]:
        """Documents and weights by term, then document: a counting sort of sorted blocks."""
        documents_P = np.empty(self._starts_V[-1], dtype=np.int32)
        weights_P = np.empty(self._starts_V[-1], dtype=np.float32)
        free_V = self._starts_V[:-1].copy()
        for one in counts:
            in_block_V = np.bincount(one.terms, minlength=len(free_V))
            first_V = np.cumsum(in_block_V) - in_block_V
            places = (free_V - first_V)[one.terms] + np.arange(len(one.terms))
            documents_P[places] = one.documents
            saturated = one.counts / (one.counts + saturation_N[one.documents])
            weights_P[places] = self._idf_V[one.terms] * saturated
            free_V += in_block_V
        return documents_P, weights_P


_CURE = "build the index again"


def _mapped(folder: Path, name: str) -> Any:
    """An array on disk as a plain array: slices of numpy's own class are slow to make."""
    return np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False))


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{file} cannot be read ({error}); {_CURE}") from error
    if settings.get("analysis") != ANALYSIS_VERSION:
        raise StorageError(
            f"{file.parent} holds words of version {settings.get('analysis')}, this software cuts "
            f"texts into those of version {ANALYSIS_VERSION}; {_CURE}"
        )
    return settings


def _write_terms(file: Path, numbers: _Numbers) -> None:
    terms, values = zip(*sorted(numbers.items()), strict=True)
    columns = [pa.array(terms, pa.large_string()), pa.array(values, pa.int32())]
    table = pa.table(columns, names=["term", "number"])
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


class _SavedTerms:
    """Numbers of sorted terms on disk: halving finds one in microseconds and holds nothing."""

    def __init__(self, file: Path) -> None:
        batch = pa.ipc.open_file(pa.memory_map(str(file))).get_batch(0)
        self._terms, self._numbers = batch.column("term"), batch.column("number")

    def get(self, term: str, /) -> int | None:
        place = bisect_left(range(len(self._terms)), term, key=lambda row: self._terms[row].as_py())
        if place == len(self._terms) or self._terms[place].as_py() != term:
            return None
        number: int = self._numbers[place].as_py()
        return number

    def items(self) -> Iterable[tuple[str, int]]:
        return zip(self._terms.to_pylist(), self._numbers.to_pylist(), strict=True)


@dataclass(frozen=True)
class _Counts:
    """How often documents of a block hold terms, by term, then document."""

    terms: _Integers
    documents: _Integers
    counts: _Integers


class _NumberOf(dict[str, int]):
    """The number of each word's term, -1 where it has none; numbers are given as words come."""

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, int] = {}
        self._analyzer = Analyzer()

    def __missing__(self, word: str) -> int:
        term = self._analyzer.term(word)
        self[word] = number = self.terms.setdefault(term, len(self.terms)) if term else -1
        return number


def _count(
    texts: Sequence[str],
) -> tuple[dict[str, int], list[_Counts], npt.NDArray[np.int64]]:
    """Numbers of terms, counts by block of texts, and the number of terms of each text."""
    number_of = _NumberOf()
    blocks, lengths_N = [], np.zeros(len(texts), dtype=np.int64)
    for start in range(0, len(texts), _BLOCK):
        words = [split(text) for text in texts[start : start + _BLOCK]]
        rows = np.repeat(np.arange(len(words)), [len(one) for one in words])
        numbers = np.fromiter(map(number_of.__getitem__, chain.from_iterable(words)), np.int64)
        is_term = numbers >= 0
        pairs, counts = np.unique(numbers[is_term] * _BLOCK + rows[is_term], return_counts=True)
        terms, rows = np.divmod(pairs, _BLOCK)
        lengths_N[start : start + len(words)] = np.bincount(
            rows, weights=counts, minlength=len(words)
        )
        blocks.append(_Counts(*(one.astype(np.int32) for one in (terms, rows + start, counts))))
    return number_of.terms, blocks, lengths_N


def in_one_byte(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Lengths as Lucene keeps them (SmallFloat.intToByte4): exact below 40, then rounded down."""
    above = np.maximum(lengths - _EXACT_LENGTHS, 0)
    _, num_bits = np.frexp(above)
    dropped = np.maximum(num_bits - 4, 0)
    kept: npt.NDArray[np.int64] = np.minimum(lengths, _EXACT_LENGTHS) + (
        above >> dropped << dropped
    )
    return kept


def _top(scores_N: Scores, k: int) -> Positions:
    """Positions of the k largest positive scores, ties by position."""
    if k < len(scores_N):
        kth = np.partition(scores_N, -k)[-k]
        matching = np.flatnonzero((scores_N >= kth) & (scores_N > 0))
    else:
        matching = np.flatnonzero(scores_N > 0)
    order: Positions = matching[np.argsort(-scores_N[matching], kind="stable")]
    return order[:k]
