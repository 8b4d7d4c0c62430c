from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.index.bm25 import BM25Index, in_one_byte

TEXTS = [
    "Cats chase mice across the garden",
    "A cat chased a mouse",
    "Dogs sleep",
    "",
    "A cat chased a mouse",
    "Gardens need water, and gardens need gardeners",
]
# Weights of a term in a document are float32, and so are scores.
RELATIVE_TOLERANCE = 1e-6
VARIANTS = ("standard", "query-side")
WORDS = ("cat", "dog", "mice", "bird")


def test_scores_are_lucenes_formula_over_stems():
    scores, positions = BM25Index(TEXTS, k1=0.9, b=0.4).search(["chasing"], k=10)
    # Stemmed, without stop words: 5, 3, 2, 3 and 6 words; the text without a word does not count.
    mean_words = (5 + 3 + 2 + 3 + 6) / 5
    idf = math.log(1 + (5 - 3 + 0.5) / (3 + 0.5))
    expected = []
    for words in (3, 3, 5):
        saturation = 0.9 * (1 - 0.4 + 0.4 * words / mean_words)
        expected.append(idf / (1 + saturation))
    np.testing.assert_array_equal(positions[0, :3], [1, 4, 0])
    np.testing.assert_allclose(scores[0, :3], expected, rtol=RELATIVE_TOLERANCE)
    assert (positions[0, 3:] == -1).all()
    assert np.isneginf(scores[0, 3:]).all()


def slowly(texts, query, *, variant, k1, b):
    """Scores of every document, by words that are their own terms."""
    split = [text.split() for text in texts]
    query_side = variant == "query-side"
    counted = [words for words in split if words or query_side]
    mean_words = sum(map(len, counted)) / len(counted)

    def idf(word):
        holding = sum(word in words for words in counted)
        if query_side:  # as gensim writes it
            return math.log(len(counted) + 1.0) - math.log(holding + 0.5)
        return math.log(1 + (len(counted) - holding + 0.5) / (holding + 0.5))

    def weight(word, words, length):
        if not (count := words.count(word)):
            return 0.0
        return idf(word) * count / (count + k1 * (1 - b + b * length / mean_words))

    known = [word for word in query.split() if any(word in words for words in split)]
    scores = []
    for words in split:
        length = len(words) if query_side else int(in_one_byte(np.array([len(words)]))[0])
        score = 0.0
        for word, count in Counter(known).items():
            asked = weight(word, known, len(known)) if query_side else count
            score += asked * weight(word, words, length)
        scores.append(score)
    return scores


TEXT = st.lists(st.sampled_from(WORDS), max_size=60).map(" ".join)


@settings(max_examples=50)
@given(
    st.lists(TEXT, min_size=1, max_size=6).filter(any),
    st.lists(st.sampled_from((*WORDS, "unknown")), max_size=8).map(" ".join),
    st.sampled_from(VARIANTS),
    st.floats(0, 2),
    st.floats(0, 1),
)
def test_both_variants_against_a_slow_reference(texts, query, variant, k1, b):
    # The reference's words are terms as they are: neither stemmed nor stop words.
    scores, positions = BM25Index(texts, variant=variant, k1=k1, b=b).search([query], k=len(texts))
    expected = np.array(slowly(texts, query, variant=variant, k1=k1, b=b))
    found = positions[0] >= 0
    assert set(positions[0, found].tolist()) == set(np.flatnonzero(expected > 0).tolist())
    np.testing.assert_allclose(
        scores[0, found], expected[positions[0, found]], rtol=RELATIVE_TOLERANCE
    )


def test_blocks_of_texts_change_nothing(monkeypatch):
    texts = [f"{WORDS[i % 4]} {WORDS[i % 3]} {WORDS[i % 2]}" for i in range(50)]
    whole = BM25Index(texts).search(["cat mice", "dog"], k=50)
    monkeypatch.setattr("reasonembed.index.bm25._BLOCK", 7)
    for one, other in zip(whole, BM25Index(texts).search(["cat mice", "dog"], k=50), strict=True):
        np.testing.assert_array_equal(one, other)


def test_lucenes_lengths():
    lengths = np.array([0, 23, 24, 39, 40, 41, 42, 55, 56, 57, 59, 60, 88, 92, 210, 100_000])
    kept = [0, 23, 24, 39, 40, 40, 42, 54, 56, 56, 56, 60, 88, 88, 200, 98_328]
    assert in_one_byte(lengths).tolist() == kept


def test_equal_documents_tie_and_stand_in_order_at_the_cut():
    index = BM25Index(["filler words here", *["same text"] * 20])
    scores, positions = index.search(["text"], k=5)
    np.testing.assert_array_equal(positions, [[1, 2, 3, 4, 5]])
    assert len(np.unique(scores)) == 1


def test_exclusion_comes_before_the_cut():
    index = BM25Index(TEXTS)
    _, positions = index.search(["cat", "cat"], k=2, excluded=[{1}, frozenset()])
    np.testing.assert_array_equal(positions, [[4, 0], [1, 4]])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("query", ["", "   ", "the", "zzzunknown", "?!"])
def test_a_query_without_a_known_word_finds_nothing(query, variant):
    scores, positions = BM25Index(TEXTS, variant=variant).search([query, "cat"], k=3)
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
