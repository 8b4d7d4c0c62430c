from __future__ import annotations

import math

import numpy as np
import pytest

from reasonembed.index.bm25 import BM25Index

TEXTS = [
    "Cats chase mice across the garden",
    "A cat chased a mouse",
    "Dogs sleep",
    "",
    "A cat chased a mouse",
    "Gardens need water, and gardens need gardeners",
]
# bm25s stores float32; six digits are what such a sum of a few terms keeps.
RELATIVE_TOLERANCE = 1e-6


def idf(matching: int) -> float:
    return math.log(1 + (len(TEXTS) - matching + 0.5) / (matching + 0.5))


def test_scores_are_lucenes_formula_over_stems():
    scores, positions = BM25Index(TEXTS, k1=0.9, b=0.4).search(["chasing"], k=10)
    # Stemmed, without stop words: 5, 3, 2, 0, 3 and 6 words.
    mean_words = (5 + 3 + 2 + 0 + 3 + 6) / 6
    expected = []
    for words in (3, 3, 5):
        saturation = 0.9 * (1 - 0.4 + 0.4 * words / mean_words)
        expected.append(idf(3) / (1 + saturation))
    np.testing.assert_array_equal(positions[0, :3], [1, 4, 0])
    np.testing.assert_allclose(scores[0, :3], expected, rtol=RELATIVE_TOLERANCE)
    assert (positions[0, 3:] == -1).all()
    assert np.isneginf(scores[0, 3:]).all()


def test_equal_documents_tie_and_stand_in_order_at_the_cut():
    index = BM25Index(["filler words here", *["same text"] * 20])
    scores, positions = index.search(["text"], k=5)
    np.testing.assert_array_equal(positions, [[1, 2, 3, 4, 5]])
    assert len(np.unique(scores)) == 1


def test_exclusion_comes_before_the_cut():
    index = BM25Index(TEXTS)
    _, positions = index.search(["cat", "cat"], k=2, excluded=[{1}, frozenset()])
    np.testing.assert_array_equal(positions, [[4, 0], [1, 4]])


@pytest.mark.parametrize("query", ["", "   ", "the", "zzzunknown", "?!"])
def test_a_query_without_a_known_word_finds_nothing(query):
    scores, positions = BM25Index(TEXTS).search([query, "cat"], k=3)
    assert (positions[0] == -1).all()
    assert np.isneginf(scores[0]).all()
    assert (positions[1] >= 0).all()


def test_no_queries():
    scores, positions = BM25Index(TEXTS).search([], k=3)
    assert scores.shape == positions.shape == (0, 3)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="none of the 2 documents holds a word"):
        BM25Index(["", "the"])
    with pytest.raises(ValueError, match="k must be at least 1"):
        BM25Index(TEXTS).search(["cat"], k=0)
    with pytest.raises(ValueError, match="1 entries for 2 queries"):
        BM25Index(TEXTS).search(["cat", "dog"], k=1, excluded=[[]])
