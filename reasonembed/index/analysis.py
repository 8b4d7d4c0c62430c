"""The words of a text as Lucene's EnglishAnalyzer gives them, on which Anserini's BM25 stands.

In this order: words at the boundaries of Unicode's annex 29 (Lucene's StandardTokenizer: one `.`,
`:` or `'` holds letters together, one `.`, `,`, `;` or `'` digits, an underscore anything; words of
one character count), a possessive 's taken off, lower case, Lucene's 33 stop words taken out,
Porter's stemmer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import cast

import regex
import Stemmer

STOP_WORDS = frozenset(
    {"a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it"}
    | {"no", "not", "of", "on", "or", "such", "that", "the", "their", "then", "there", "these"}
    | {"they", "this", "to", "was", "will", "with"}
)
"""Lucene's EnglishAnalyzer.ENGLISH_STOP_WORDS_SET."""

_LONGEST = 255  # characters; Lucene cuts a longer word there

# Texts in ASCII, which most are, go through `re`, some three times faster than `regex`.
_ASCII = re.compile(
    rf"\w{{1,{_LONGEST}}}"
    r"(?:[.:',;](?:(?<=[a-z][.:'])(?=[a-z])|(?<=[0-9][.,;'])(?=[0-9]))"
    rf"\w{{1,{_LONGEST}}})*",
    re.ASCII,
)

_LETTER = r"\p{WB=ALetter}\p{WB=Hebrew_Letter}"
_DIGIT = r"\p{WB=Numeric}"
_JOINER = r"\p{WB=ExtendNumLet}"
_MARK = r"\p{WB=Extend}\p{WB=Format}\p{WB=ZWJ}"  # belongs to whatever it follows
# The colon left the newest Unicode's MidLetter; Lucene's has it.
_MID_LETTER = r"\p{WB=MidLetter}\p{WB=MidNumLet}':"
_MID_DIGIT = r"\p{WB=MidNum}\p{WB=MidNumLet}'"
_UNICODE = regex.compile(
    rf"[{_LETTER}{_DIGIT}{_JOINER}][{_LETTER}{_DIGIT}{_JOINER}{_MARK}]{{0,{_LONGEST - 1}}}"
    rf"(?:[{_MID_LETTER}{_MID_DIGIT}]"
    rf"(?:(?<=[{_LETTER}{_MARK}][{_MID_LETTER}])(?=[{_MARK}]*[{_LETTER}])"
    rf"|(?<=[{_DIGIT}{_MARK}][{_MID_DIGIT}])(?=[{_MARK}]*[{_DIGIT}]))"
    rf"[{_LETTER}{_DIGIT}{_JOINER}{_MARK}]{{1,{_LONGEST}}})*"
    # Scripts without blanks between words: runs of some, single characters of others.
    rf"|\p{{WB=Katakana}}[\p{{WB=Katakana}}{_MARK}]*"
    rf"|\p{{LB=SA}}[\p{{LB=SA}}{_MARK}]*"
    rf"|[\p{{Script=Han}}\p{{Script=Hiragana}}][{_MARK}]*"
    rf"|\p{{WB=Regional_Indicator}}{{2}}"
    rf"|\p{{Extended_Pictographic}}(?:[{_MARK}]|(?<=\u200d)\p{{Extended_Pictographic}})*"
)

_JOINERS = "_\u203f\u2040\u2054\ufe33\ufe34\ufe4d\ufe4e\ufe4f\uff3f\u202f"
_POSSESSIVES = ("'s", "\u2019s", "\uff07s")
# Where Lucene's Porter goes on after the published algorithm stops: -bli and -logi, whatever the
# ending came from.
_LATER = re.compile(r"(.+)(bl|log)(?:i|is|ies|y|ys)")
# A vowel and a consonant after it; y is a vowel after a consonant.
_MEASURE = re.compile(r"[aeiou][^aeiou]|(?<=[^aeiou])y[^aeiou]")


class Analyzer:
    """Words to terms; remembers the term of every word it met, so use one for one corpus."""

    def __init__(self) -> None:
        self._stemmer = Stemmer.Stemmer("porter")
        self._known: dict[str, str] = {}

    def terms(self, text: str) -> list[str]:
        """The terms of a text in its order, stop words left out."""
        return [term for word in split(text) if (term := self._term(word))]

    def term(self, word: str) -> str:
        """The term of one word of `split`; "" for a stop word and for bare underscores."""
        if word.endswith(_POSSESSIVES):
            word = word[:-2]
        if word in STOP_WORDS or not word.strip(_JOINERS):
            return ""
        return self._stem(word)

    def _term(self, word: str) -> str:
        if (term := self._known.get(word)) is None:
            term = self._known[word] = self.term(word)
        return term

    def _stem(self, word: str) -> str:
        if len(word) <= 2:  # the published algorithm would make "u" of "us"
            return word
        later = _LATER.fullmatch(word)
        if later and _MEASURE.search(later[1]):
            word = later[1] + ("ble" if later[2] == "bl" else "log")
        return cast("str", self._stemmer.stemWord(word))


def split(text: str) -> list[str]:
    """The lower-cased words of a text in its order, stop words and possessives included."""
    text = text.lower()
    pattern = _ASCII if text.isascii() else _UNICODE
    return cast("list[str]", pattern.findall(text))


def distinct_terms(texts: Iterable[str]) -> list[set[str]]:
    """The terms of each text, each once."""
    analyzer = Analyzer()
    return [set(analyzer.terms(text)) for text in texts]
