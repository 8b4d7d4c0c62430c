"""BM25 over the `bm25s` package, with exclusion before the cut."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import bm25s
import numpy as np
import Stemmer

from reasonembed.index.exact import NO_DOCUMENT, Positions, Scores


class BM25Index:
    """Lucene's form of BM25 over stemmed English words.

    Words have two or more characters, are lower-cased, are no English stop word, and are stemmed
    by Snowball's English stemmer. One process holds the whole index, some tens of bytes for each
    distinct word of each document, and the texts while it is made: it is for corpora of that size.

    Args:
        texts: The documents; their position is their identity.
        k1: Saturation of term frequency (Anserini's 0.9).
        b: Strength of length normalisation (Anserini's 0.4).

    Raises:
        ValueError: No text holds a word.
    """

    def __init__(self, texts: Sequence[str], *, k1: float = 0.9, b: float = 0.4) -> None:
        self._num_documents = len(texts)
        self._stemmer = Stemmer.Stemmer("english")
        words = self._words(texts)
        if not any(words):
            raise ValueError(f"none of the {len(texts)} documents holds a word to search for")
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        self._index.index(words, show_progress=False)

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
        for row, words in enumerate(self._words(queries)):
            scores_N = self._scores(words)
            if excluded is not None and excluded[row]:
                scores_N[np.fromiter(excluded[row], dtype=np.int64)] = 0
            top = _top(scores_N, k)
            scores_QK[row, : len(top)] = scores_N[top]
            positions_QK[row, : len(top)] = top
        return scores_QK, positions_QK

    def _words(self, texts: Sequence[str]) -> list[list[str]]:
        if not texts:
            return []
        words: list[list[str]] = bm25s.tokenize(
            list(texts),
            stopwords="english",
            stemmer=self._stemmer,
            return_ids=False,
            show_progress=False,
        )
        return words

    def _scores(self, words: list[str]) -> Scores:
        known = self._index.get_tokens_ids(words)
        if not known:
            return np.zeros(self._num_documents, dtype=np.float32)
        scores: Scores = self._index.get_scores_from_ids(known)
        return scores


def _top(scores_N: Scores, k: int) -> Positions:
    """Positions of the k largest positive scores, ties by position."""
    if k < len(scores_N):
        kth = np.partition(scores_N, -k)[-k]
        matching = np.flatnonzero((scores_N >= kth) & (scores_N > 0))
    else:
        matching = np.flatnonzero(scores_N > 0)
    order: Positions = matching[np.argsort(-scores_N[matching], kind="stable")]
    return order[:k]
