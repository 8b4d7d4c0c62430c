import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.llm.protocol import Completion, failure
from reasonembed.remixer.answers import (
    clean,
    cut_words,
    last_sentence_end,
    llm_fields,
    prompt_fingerprint,
    prompt_template,
    verdict,
)
from reasonembed.schemas import Status


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("  plain \n", "plain"),
        ("<think>hm</think>\nthe answer", "the answer"),
        ("a</think>b</think> last", "last"),
        ("<think>never ends", ""),
        ('"in quotes"', "in quotes"),
        ("“in curly quotes”", "in curly quotes"),
        ("```\nfenced\n```", "fenced"),
        ("```text\nfenced\n```", "fenced"),
        ("```one line```", "one line"),
        ('"a" or "b"', '"a" or "b"'),
        ("```a``` and ```b```", "```a``` and ```b```"),
        ('""twice""', '""twice""'),
        ('"', '"'),
        ("", ""),
    ],
)
def test_clean_takes_off_thinking_and_one_pair(given_text, expected):
    assert clean(given_text) == expected


@given(st.text())
def test_clean_never_leaves_thinking_or_outer_blanks(text):
    cleaned = clean(f"<think>{text}</think> {text} ")
    assert cleaned == cleaned.strip()
    assert "<think>" not in cleaned


@given(st.text(st.sampled_from("ab \n\t"), max_size=60), st.integers(1, 12))
def test_cut_words_keeps_the_first_words_and_their_spacing(text, limit):
    cut = cut_words(text, limit)
    assert cut.split() == text.split()[:limit]
    assert text.startswith(cut)
    if len(text.split()) <= limit:
        assert cut == text


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("One. Two is cut", "One."),
        ("One? Two! Three is", "One? Two!"),
        ("Whole.", "Whole."),
        ("Whole! \n", "Whole!"),
        ("One.\nTwo", "One."),
        ("no end", ""),
        ("version 1.5 is not an end", ""),
        ("", ""),
    ],
)
def test_last_sentence_end(given_text, expected):
    assert last_sentence_end(given_text) == expected


def test_verdict_follows_the_engine():
    assert verdict(Completion("x", "stop")).status == Status.OK
    cut = verdict(Completion("x", "length", 3, 7))
    assert (cut.status, cut.detail) == (Status.TRUNCATED, "cut off after 7 tokens")
    broken = verdict(failure("no route"))
    assert (broken.status, broken.detail) == (Status.ERROR, "no route")
    assert verdict(Completion("", "error")).detail == "the engine gave no reason"


def test_llm_fields_hold_the_engines_figures():
    completion = Completion("x", "length", 3, 7)
    assert llm_fields(verdict(completion), completion, seed=5, model="m") == {
        "status": "truncated",
        "detail": "cut off after 7 tokens",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "completion_tokens": 7,
        "seed": 5,
        "model": "m",
    }


@pytest.mark.parametrize("name", ["generate", "generate-short", "annotate", "rewrite"])
def test_each_prompt_ships_and_has_its_own_fingerprint(name):
    assert prompt_template(name).get_identifiers()
    others = {"generate", "generate-short", "annotate", "rewrite"} - {name}
    assert prompt_fingerprint(name) not in {prompt_fingerprint(other) for other in others}
