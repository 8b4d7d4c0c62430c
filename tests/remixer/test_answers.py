import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed import tasks
from reasonembed.config import SamplingConfig
from reasonembed.llm.protocol import Completion, Request, failure
from reasonembed.remixer import answers
from reasonembed.remixer.answers import (
    ask,
    clean,
    cut_words,
    last_sentence_end,
    llm_fields,
    prompt_fingerprint,
    prompt_template,
    verdict,
)
from reasonembed.schemas import Status, row_seed
from tests.remixer.fakes import FakeEngine


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
    completion = Completion("x", "length", 3, 7, cached_tokens=2)
    assert llm_fields(verdict(completion), completion, seed=5, model="m") == {
        "status": "truncated",
        "detail": "cut off after 7 tokens",
        "finish_reason": "length",
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "completion_tokens": 7,
        "tries": 1,
        "seed": 5,
        "model": "m",
    }


PROMPTS = ("filter", "generate", "generate-short", "annotate", "rewrite")


@pytest.mark.parametrize("name", PROMPTS)
def test_each_prompt_ships_and_has_its_own_fingerprint(name):
    assert prompt_template(name).get_identifiers()
    assert prompt_fingerprint(name) not in {
        prompt_fingerprint(other) for other in {*PROMPTS} - {name}
    }


def test_other_words_for_a_relation_are_another_prompt(monkeypatch):
    before = {name: prompt_fingerprint(name) for name in PROMPTS}
    monkeypatch.setattr(answers, "RELATIONS", {**tasks.RELATIONS, "helps": "other words."})
    changed = {name for name in PROMPTS if prompt_fingerprint(name) != before[name]}
    assert changed == {"generate"}  # the only one that tells the relation


WARM, GREEDY = SamplingConfig(temperature=1.0), SamplingConfig(temperature=0.0)


def asked(script, *, tries=3, sampling=WARM):
    """Answers to one request each of `a`, `b`, ..., and the engine; `script[id]` are its texts."""
    left = {request_id: list(texts) for request_id, texts in script.items()}

    def answer(request):
        text = left[request.request_id].pop(0)
        return (
            failure("boom") if text == "error" else Completion(text, "stop", 10, 1, cached_tokens=4)
        )

    def judge(i, completion):
        if completion.finish_reason == "error":
            return "", verdict(completion)
        status = Status.OK if completion.text.startswith("good") else Status.INVALID
        return f"{completion.text} {i}", answers.Verdict(status, None)

    engine = FakeEngine(answer)
    requests = [Request(id_, "p", sampling, seed) for seed, id_ in enumerate(script)]
    return ask(engine, requests, judge, tries=tries), engine


def test_only_what_cannot_be_used_is_asked_again_each_time_with_another_seed():
    done, engine = asked({"a": ["good"], "b": ["bad", "good"], "c": ["bad", "bad", "bad"]})
    assert [one.text for one in done] == ["good 0", "good 1", None]
    assert [one.tries for one in done] == [1, 2, 3]
    assert [one.outcome.status for one in done] == [Status.OK, Status.OK, Status.INVALID]
    assert [(one.request_id, one.seed) for one in engine.requests] == [
        ("a", 0),
        ("b", 1),
        ("c", 2),
        ("b", row_seed(1, "again", 1)),
        ("c", row_seed(2, "again", 1)),
        ("c", row_seed(2, "again", 2)),
    ]
    assert [one.seed for one in done] == [0, row_seed(1, "again", 1), row_seed(2, "again", 2)]
    assert [one.seed for one in done] == [one.fields(model="m")["seed"] for one in done]


def test_tokens_are_those_of_all_tries():
    done, _ = asked({"a": ["good"], "b": ["bad", "bad", "good"]})
    fields = [one.fields(model="m") for one in done]
    assert [(f["prompt_tokens"], f["cached_tokens"]) for f in fields] == [(10, 4), (30, 12)]
    assert [(f["completion_tokens"], f["tries"]) for f in fields] == [(1, 1), (3, 3)]


@pytest.mark.parametrize(
    ("script", "options"),
    [
        (["error"], {}),  # the engine tries such things again by itself
        (["bad"], {"tries": 1}),
        (["bad"], {"sampling": GREEDY}),  # would say the same again
    ],
)
def test_what_is_not_asked_again(script, options):
    (done,), engine = asked({"a": script}, **options)
    assert len(engine.requests) == done.tries == 1
    assert done.text is None


def test_a_second_try_that_fails_in_the_engine_is_an_error_that_a_retry_can_mend():
    (done,), _ = asked({"a": ["bad", "error"]})
    assert (done.outcome.status, done.outcome.detail, done.tries) == (Status.ERROR, "boom", 2)
    assert done.completion.prompt_tokens == 10


def test_nothing_is_asked_where_there_are_no_rows():
    done, engine = asked({})
    assert (done, engine.requests) == ([], [])
