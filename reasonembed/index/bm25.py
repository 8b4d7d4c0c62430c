"""BM25 over the words of `index.analysis`, with exclusion before the cut.

Letters in names: Q queries, N documents, K results a query, P pairs of a term and a document that
holds it, by term; V terms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt

from reasonembed.index.analysis import Analyzer, split
from reasonembed.index.exact import NO_DOCUMENT, Positions, Scores

Variant = Literal["standard", "query-side"]
Weights = npt.NDArray[np.float64]
_Numbers = npt.NDArray[np.int32]

ANALYSIS_VERSION = 1
"""Of words and scores; raised when the same texts and settings give others."""
_BLOCK = 4_096  # texts that are counted together
_EXACT_LENGTHS = 24  # Lucene keeps lengths up to here as they are, the rest to four binary digits


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
        self._numbers, counts, lengths_N = _count(texts)
        if not self._numbers:
            raise ValueError(f"none of the {len(texts)} documents holds a word to search for")
        num_counted = len(texts) if variant == "query-side" else np.count_nonzero(lengths_N)
        self._mean_length = float(lengths_N.sum()) / num_counted
        matching_V = sum(np.bincount(one.terms, minlength=len(self._numbers)) for one in counts)
        self._idf_V = np.log1p((num_counted - matching_V + 0.5) / (matching_V + 0.5))
        self._starts_V = np.concatenate([[0], np.cumsum(matching_V)])
        self._analyzer = Analyzer()
        kept_N = lengths_N if variant == "query-side" else in_one_byte(lengths_N)
        self._documents_P, self._weights_P = self._by_term(counts, self._saturation(kept_N))

    def search(
        self,
        queries: Sequence[str],
        *,
        k: int,
        excluded: Sequence[Collection[int]] | None = None,
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
        for row, query in enumerate(queries):
            scores_N = self._scores(query)
            if excluded is not None and excluded[row]:
                scores_N[np.fromiter(excluded[row], dtype=np.int64)] = 0
            top = _top(scores_N, k)
            scores_QK[row, : len(top)] = scores_N[top]
            positions_QK[row, : len(top)] = top
        return scores_QK, positions_QK

    def _scores(self, query: str) -> Scores:
        """float32 [N], summed in float64 as Lucene does."""
        scores_N = np.zeros(self._num_documents)
        for term, weight in self._query_weights(query):
            held = slice(self._starts_V[term], self._starts_V[term + 1])
            weights = np.multiply(self._weights_P[held], weight, dtype=np.float64)
            # Faster than `+=` where no dtype changes on the way, else twenty times slower.
            np.add.at(scores_N, self._documents_P[held], weights)
        return scores_N.astype(np.float32)

    def _query_weights(self, query: str) -> Iterator[tuple[int, float]]:
        """What each known term of a query counts."""
        terms = self._analyzer.terms(query)
        counts = Counter(self._numbers[term] for term in terms if term in self._numbers)
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
    ) -> tuple[_Numbers, npt.NDArray[np.float32]]:
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


@dataclass(frozen=True)
class _Counts:
    """How often documents of a block hold terms, by term, then document."""

    terms: _Numbers
    documents: _Numbers
    counts: _Numbers


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
