from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.index import analysis
from reasonembed.index.analysis import STOP_WORDS, Analyzer, distinct_terms, split


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("O'Neil's e.g. foo:bar U.S.A.", ["o'neil's", "e.g", "foo:bar", "u.s.a"]),
        ("3.14 1,000;5 3,a a,3 1'2 p53.2", ["3.14", "1,000;5", "3", "a", "a", "3", "1'2", "p53.2"]),
        ("a.b_c.d __x__ _ -- x_.y", ["a.b_c.d", "__x__", "_", "x_", "y"]),
        ("a..b a.'b 1.,2 wi-fi and/or", ["a", "b", "a", "b", "1", "2", "wi", "fi", "and", "or"]),
        ("http://x.org/q?a=1", ["http", "x.org", "q", "a", "1"]),
        ("Müller’s naïve café 2·3", ["müller’s", "naïve", "café", "2", "3"]),  # noqa: RUF001
        ("a:é é:a", ["a:é", "é:a"]),
        ("cm² ½ x\u00ady e\u0301t", ["cm", "x\u00ady", "e\u0301t"]),
        ("漢字かなカナ한국 ไทย", ["漢", "字", "か", "な", "カナ", "한국", "ไทย"]),
        ("good 👍🏽 → x", ["good", "👍🏽", "x"]),
        ("", []),
    ],
)
def test_words_stand_at_unicodes_boundaries(text, words):
    assert split(text) == words


@given(st.text(string.ascii_lowercase[:3] + "12_.,;:'- ", max_size=20))
def test_the_pattern_for_ascii_and_that_for_unicode_agree(text):
    assert analysis._ASCII.findall(text) == analysis._UNICODE.findall(text)


@pytest.mark.parametrize("letter", ["x", "é"])
def test_a_long_word_is_cut(letter):
    assert [len(one) for one in split(letter * 600)] == [255, 255, 90]


# Of Porter's own vocabulary, but for "us" and the endings -bli and -logi, which Lucene's Porter
# treats as his later program does.
STEMS = {
    "caresses": "caress",
    "ponies": "poni",
    "cats": "cat",
    "agreed": "agre",
    "motoring": "motor",
    "conflated": "conflat",
    "hopping": "hop",
    "relational": "relat",
    "vietnamization": "vietnam",
    "electriciti": "electr",
    "adjustment": "adjust",
    "probate": "probat",
    "controll": "control",
    "us": "us",
    "physiology": "physiolog",
    "physiological": "physiolog",
    "pathologies": "patholog",
    "biology": "biologi",
    "possibly": "possibl",
    "visibly": "visibl",
    "probably": "probabl",
    "ably": "abli",
}


@pytest.mark.parametrize(("word", "stem"), STEMS.items())
def test_stems(word, stem):
    assert Analyzer().terms(word) == [stem]


def test_possessives_stop_words_and_bare_underscores():
    assert Analyzer().terms("The dog’s and the CAT's, it's __ a x") == ["dog", "cat", "x"]  # noqa: RUF001
    assert len(STOP_WORDS) == 33
    assert distinct_terms(["the cats, a cat", "of"]) == [{"cat"}, set()]
