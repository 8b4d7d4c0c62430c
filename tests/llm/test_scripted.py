import json
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.config import EngineRuntime, LLMConfig, SamplingConfig
from reasonembed.llm.protocol import Request, make_engine
from reasonembed.llm.scripted import FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED, ScriptedEngine

SAMPLING = SamplingConfig()


def engine(model="scripted", **runtime):
    return ScriptedEngine(LLMConfig(model=model, engine="scripted"), EngineRuntime(**runtime))


def request(prompt="Why do asyncio tasks starve?", *, seed=1, choices=(), id_="r"):
    return Request(id_, prompt, SAMPLING, seed, choices=choices)


def test_the_configuration_names_it():
    made = make_engine(
        LLMConfig(model="scripted", engine="scripted"), EngineRuntime(), cache_dir=None
    )
    assert isinstance(made, ScriptedEngine)
    made.close()
    made.close()


@given(st.text(), st.integers(0, 2**31 - 1), st.sampled_from([(), ("1", "2", "3", "4", "5")]))
def test_an_answer_follows_from_the_request_alone(prompt, seed, choices):
    prompt = prompt.encode(errors="replace").decode()
    asked = request(prompt, seed=seed, choices=choices)
    (alone,) = engine().complete([asked])
    among_others = engine().complete([request("other"), asked, request("third", seed=9)])
    assert among_others[1] == alone


def test_another_seed_or_prompt_gives_another_answer():
    answers = engine().complete([request(seed=seed) for seed in range(8)])
    assert len({answer.text for answer in answers}) > 1
    one, two = engine().complete([request("asyncio tasks"), request("decimal context")])
    assert one.text != two.text


@given(st.integers(0, 2**31 - 1), st.integers(1, 6))
def test_probabilities_sum_to_one_and_the_answer_is_the_likeliest(seed, count):
    choices = tuple(str(i) for i in range(count))
    (answer,) = engine().complete([request(seed=seed, choices=choices)])
    assert tuple(answer.choice_probabilities) == choices
    assert sum(answer.choice_probabilities.values()) == pytest.approx(1.0)
    likeliest = max(answer.choice_probabilities.values())
    assert answer.choice_probabilities[answer.text] == likeliest
    assert answer.completion_tokens == 1


def test_marks_make_a_request_fail_in_that_way_and_leave_the_others_alone():
    prompts = ["fine", FAIL_ERROR, f"x {FAIL_TRUNCATED}", f"{FAIL_INVALID} y", "fine"]
    answers = engine().complete([request(prompt) for prompt in prompts])
    assert [answer.finish_reason for answer in answers] == [
        "stop",
        "error",
        "length",
        "stop",
        "stop",
    ]
    assert answers[1].error
    assert answers[1].text == ""
    assert answers[3].text.strip() == ""
    assert answers[0] == answers[4]
    assert answers[0].text


def test_every_request_is_noted_once(tmp_path):
    log = tmp_path / "log.jsonl"
    noted = engine(log_path=str(log))
    noted.complete([request(id_="a"), request(FAIL_ERROR, id_="b")])
    engine(log_path=str(log)).complete([request(id_="c")])  # another actor, the same file
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    assert all(line["at_ns"] > 0 for line in lines)


def test_lines_of_actors_that_write_at_once_stay_whole(tmp_path):
    log = tmp_path / "log.jsonl"

    def work(name):
        for i in range(20):
            engine(log_path=str(log)).complete([request(id_=f"{name}-{i}-{j}") for j in range(5)])

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    noted = [json.loads(line)["id"] for line in log.read_text().splitlines()]
    assert len(noted) == len(set(noted)) == 4 * 20 * 5


def test_the_delay_in_its_name_is_for_each_batch():
    slow = engine("scripted:0.1")
    start = time.monotonic()
    slow.complete([request()] * 50)
    passed = time.monotonic() - start
    assert 0.1 <= passed < 2.5  # a delay for each request would take five seconds
