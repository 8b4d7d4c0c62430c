import math
import re
import socket
import threading
import time
from contextlib import contextmanager

import openai._base_client
import pytest

from reasonembed.config import EngineRuntime, LLMConfig, SamplingConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.llm.http import HTTPEngine
from reasonembed.llm.protocol import Request, make_engine
from tests.llm.chat_server import Reply, completion, serving

SAMPLING = SamplingConfig(temperature=0.7, top_p=0.9, max_tokens=33)
GRADES = ("1", "2", "3")
LLM = LLMConfig(model="some-model", engine="openai")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.001)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def engine(server, *, config=None, **runtime):
    return HTTPEngine(
        config or LLM,
        EngineRuntime(base_url=server.url, **runtime),
    )


def ask(reply, *requests, **runtime):
    """Completions and what the server was sent; `reply` is a Reply or a function to one."""
    answer = reply if callable(reply) else lambda _: reply
    with serving(answer) as server:
        client = engine(server, **runtime)
        try:
            return client.complete(requests or [request()]), server
        finally:
            client.close()


def request(prompt="Why?", *, prefill="", choices=(), sampling=SAMPLING):
    return Request("r1", prompt, sampling, 1234, prefill=prefill, choices=choices)


def prompt_of(body):
    return body["messages"][0]["content"]


def test_text_finish_reason_and_usage_come_back():
    ((done,), _) = ask(completion("héllo", finish_reason="length", usage=(5, 3)))
    assert (done.text, done.finish_reason) == ("héllo", "length")
    assert (done.prompt_tokens, done.completion_tokens) == (5, 3)
    assert (done.choice_probabilities, done.cached_tokens) == ({}, 0)
    assert done.error is None


def test_cached_tokens_come_back_where_the_server_tells_them():
    ((done,), _) = ask(completion(usage=(50, 3), cached_tokens=48))
    assert (done.prompt_tokens, done.cached_tokens) == (50, 48)


def test_an_answer_without_content_or_usage_is_empty_not_a_crash():
    ((done,), _) = ask(completion(None, usage=None))
    assert (done.text, done.finish_reason, done.prompt_tokens) == ("", "stop", 0)


def test_half_of_a_character_does_not_reach_the_rows():
    ((done,), _) = ask(completion("so \ud83d"))
    assert done.text == "so ?"


def test_seed_and_sampling_are_sent():
    _, server = ask(completion())
    assert server.requests == [
        {
            "model": "some-model",
            "messages": [{"role": "user", "content": "Why?"}],
            "seed": 1234,
            "max_tokens": 33,
            "temperature": 0.7,
            "top_p": 0.9,
        }
    ]


def test_fields_beyond_the_protocol_are_sent_only_where_set():
    sampling = SamplingConfig(top_k=40, repetition_penalty=1.1)
    config = LLMConfig(model="m", engine="openai", chat_template_kwargs={"enable_thinking": False})
    _, server = ask(completion(), request(sampling=sampling), config=config)
    (sent,) = server.requests
    assert sent["top_k"] == 40
    assert sent["repetition_penalty"] == 1.1
    assert sent["chat_template_kwargs"] == {"enable_thinking": False}
    assert "continue_final_message" not in sent


def test_a_prefill_is_a_message_that_the_server_goes_on_with():
    _, server = ask(completion(), request(prefill="Step 1."))
    (sent,) = server.requests
    assert sent["messages"][1] == {"role": "assistant", "content": "Step 1."}
    assert sent["continue_final_message"] is True
    assert sent["add_generation_prompt"] is False


def test_choices_are_read_from_the_first_tokens_log_probabilities():
    logprobs = {"3": math.log(0.6), "1": math.log(0.2), "x": math.log(0.2)}
    ((done,), server) = ask(
        completion("3", top_logprobs=logprobs), request(choices=GRADES, prefill="<score>")
    )
    assert done.choice_probabilities == pytest.approx({"1": 0.25, "2": 0.0, "3": 0.75})
    (sent,) = server.requests
    assert (sent["max_tokens"], sent["temperature"]) == (1, 0.0)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 20)
    assert "top_p" not in sent


def test_spellings_of_one_choice_add_up():
    logprobs = {"3": math.log(0.6), " 3": math.log(0.1), "1": math.log(0.3)}
    ((done,), _) = ask(completion("3", top_logprobs=logprobs), request(choices=GRADES))
    assert done.choice_probabilities == pytest.approx({"1": 0.3, "2": 0.0, "3": 0.7})


@pytest.mark.parametrize("logprobs", [None, {"x": -0.1, "y": -3.0}])
def test_choices_without_log_probabilities_fail_the_row(logprobs):
    ((done,), _) = ask(completion("x", top_logprobs=logprobs), request(choices=GRADES))
    assert done.finish_reason == "error"
    assert "some-model: none of ['1', '2', '3']" in done.error


@pytest.mark.parametrize(
    ("reply", "message", "attempts"),
    [
        (Reply({"error": {"message": "too long"}}, status=400), "BadRequestError.*too long", 1),
        (Reply({"error": {"message": "who?"}}, status=401), "AuthenticationError.*who", 1),
        (Reply({"error": {"message": "broken"}}, status=500), "InternalServerError.*broken", 6),
        (Reply({"error": {"message": "slow down"}}, status=429), "RateLimitError.*slow", 6),
        (Reply({"error": "overloaded"}), "no answer.*overloaded", 1),
        (Reply({"choices": []}), "no answer", 1),
        (Reply("<html>a proxy</html>", content_type="text/html"), "no answer.*a proxy", 1),
        (Reply("{not json"), "JSONDecodeError", 1),
        (Reply({"choices": [{"index": 0}]}), "no answer", 1),
        (Reply(""), "no answer|JSONDecodeError", 1),
        (Reply("null"), "no answer", 1),
        (Reply([1, 2]), "no answer", 1),
        (Reply({"choices": "none"}), "no answer", 1),
        (Reply({"choices": [{"message": "hi"}]}), "no answer", 1),
        (Reply({"choices": [{"message": {"content": [1]}}]}), "no answer", 1),
        (Reply({**completion().body, "usage": {"prompt_tokens": "many"}}), "no answer", 1),
    ],
)
def test_whatever_a_server_does_becomes_an_error_row(reply, message, attempts):
    ((done,), server) = ask(reply)
    assert (done.text, done.finish_reason) == ("", "error")
    assert len(server.requests) == attempts
    assert re.search(message, done.error), done.error


def test_a_connection_that_breaks_off_becomes_an_error_row():
    """A server that takes the connection and says nothing, or half of an answer."""
    for said in (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{", b"what?\r\n\r\n"):
        with breaking_off(said) as url:
            client = HTTPEngine(LLM, EngineRuntime(base_url=url))
            (done,) = client.complete([request()])
            client.close()
        assert (done.finish_reason, done.text) == ("error", "")
        assert "APIConnectionError" in done.error


@contextmanager
def breaking_off(said):
    """Answers each connection with `said` and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def run():
        while True:
            connection, _ = listener.accept()
            with connection:
                if done.is_set():
                    return
                connection.recv(65_536)
                connection.sendall(said)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        done.set()
        socket.create_connection(("127.0.0.1", port)).close()
        thread.join()
        listener.close()


@pytest.mark.parametrize("status", [429, 503])
def test_the_pause_that_a_server_asks_for_is_kept(status):
    seen = []

    def busy(body):
        seen.append(time.monotonic())
        if len(seen) > 1:
            return completion("fine")
        return Reply({"error": "later"}, status=status, retry_after_ms=150)

    ((done,), _) = ask(busy)
    assert done.text == "fine"
    assert seen[1] - seen[0] >= 0.15


def test_a_timeout_becomes_an_error_row():
    ((done,), server) = ask(
        lambda body: Reply(completion().body, delay_s=0.3), request(), timeout_s=0.05
    )
    assert done.finish_reason == "error"
    assert "APITimeoutError" in done.error
    assert len(server.requests) == 6  # five retries


def test_a_server_that_is_not_there_becomes_an_error_row():
    with serving(lambda _: completion()) as server:
        client = engine(server)
    (done,) = client.complete([request()])
    assert done.finish_reason == "error"
    assert "APIConnectionError" in done.error


def test_a_hiccup_is_retried():
    seen = []

    def flaky(body):
        seen.append(body)
        return completion("fine") if len(seen) > 2 else Reply({"error": "hiccup"}, status=503)

    ((done,), _) = ask(flaky)
    assert (done.text, len(seen)) == ("fine", 3)


def test_one_bad_row_leaves_the_others_alone_and_in_order():
    def answer(body):
        prompt = prompt_of(body)
        if prompt == "p3":
            return Reply({"error": {"message": "no"}}, status=400)
        return completion(f"to {prompt}")

    done, _ = ask(answer, *[request(f"p{i}") for i in range(8)], concurrency=3)
    assert [one.text for one in done] == [f"to p{i}" if i != 3 else "" for i in range(8)]
    assert [one.finish_reason == "error" for one in done] == [i == 3 for i in range(8)]


def test_as_many_requests_run_at_once_as_the_runtime_says():
    together = threading.Barrier(4, timeout=20)

    def answer(_):
        together.wait()  # only four requests at the same time get past
        return completion()

    done, _ = ask(answer, *[request(f"p{i}") for i in range(4)], concurrency=4)
    assert [one.finish_reason for one in done] == ["stop"] * 4


def test_the_key_is_read_from_the_variable_that_is_named(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    _, server = ask(completion(), request(), api_key_env="MY_KEY")
    assert server.headers[0]["authorization"] == "Bearer secret"


def test_no_key_and_no_server_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"set MY_KEY, or runtime\.engine\.base_url"):
        HTTPEngine(LLMConfig(model="m", engine="openai"), EngineRuntime(api_key_env="MY_KEY"))


def test_the_configuration_names_it_and_closing_twice_is_fine():
    runtime = EngineRuntime(base_url="http://127.0.0.1:9/v1")
    made = make_engine(LLMConfig(model="m", engine="openai"), runtime, cache_dir=None)
    assert isinstance(made, HTTPEngine)
    made.close()
    made.close()


# ---- a server that is dead --------------------------------------------------------------------

PATIENCE = {"timeout_s": 0.2, "dead_after_s": 0.3}


def blocks_until_dead(client, *, num_blocks=200):
    """Asks one block of two rows after the other; what came back before the engine gave up."""
    done = []
    with pytest.raises(ModelError) as raised:
        for _ in range(num_blocks):
            done += client.complete([request("a"), request("b")])
    return done, str(raised.value)


@pytest.mark.parametrize("status", [500, 429, 401])
def test_a_server_that_only_fails_ends_the_stage_after_the_stated_time(status):
    with serving(lambda _: Reply({"error": {"message": "gone"}}, status=status)) as server:
        client = engine(server, **PATIENCE)
        began = time.monotonic()
        done, message = blocks_until_dead(client)
        took = time.monotonic() - began
        client.close()
    assert took >= 0.3
    assert done  # before that, rows
    assert {one.finish_reason for one in done} == {"error"}
    assert f"{server.url}/ has answered nothing for " in message
    assert "runtime.engine.dead_after_s: 0.3" in message
    assert "gone" in message
    assert "--retry error" in message


def test_a_server_that_is_not_there_ends_the_stage():
    with serving(lambda _: completion()) as server:
        client = engine(server, **PATIENCE)
    _, message = blocks_until_dead(client)
    assert "APIConnectionError" in message
    with pytest.raises(ModelError):  # and it stays dead for the next block
        client.complete([request()])


def test_a_server_that_hangs_ends_the_stage_although_no_request_has_failed_yet():
    with serving(lambda _: Reply(completion().body, delay_s=3.0)) as server:
        client = engine(server, timeout_s=0.4, dead_after_s=0.4)
        began = time.monotonic()
        with pytest.raises(ModelError, match="APITimeoutError"):
            client.complete([request("a")])
        assert time.monotonic() - began < 2.0  # six tries would have taken 2.4 s
        client.close()


def test_a_row_that_a_living_server_chokes_on_is_a_row_however_long_it_takes():
    def answer(body):
        if prompt_of(body) == "poison":
            return Reply({"error": {"message": "choked"}}, status=500, delay_s=0.1)
        return completion("fine")

    done, server = ask(answer, request("poison"), **PATIENCE)
    assert [one.finish_reason for one in done] == ["error"]  # after 0.6 s of nothing else
    assert "Say yes." in [prompt_of(body) for body in server.requests]


def test_bad_requests_are_a_sign_of_life():
    reply = Reply({"error": {"message": "too long"}}, status=400, delay_s=0.02)
    with serving(lambda _: reply) as server:
        client = engine(server, **PATIENCE)
        done = [client.complete([request()])[0] for _ in range(25)]  # 0.5 s
        client.close()
    assert {one.finish_reason for one in done} == {"error"}


def test_time_in_which_nobody_asks_is_no_silence():
    replies = [completion("fine"), Reply({"error": {"message": "no"}}, status=401)]
    with serving(lambda _: replies.pop(0)) as server:
        client = engine(server, timeout_s=1.5, dead_after_s=1.5)
        (first,) = client.complete([request()])
        time.sleep(1.6)
        (second,) = client.complete([request()])
        client.close()
    assert (first.finish_reason, second.finish_reason) == ("stop", "error")


def test_a_server_that_comes_back_is_used_again():
    down = threading.Event()
    down.set()

    def answer(_):
        if down.is_set():
            return Reply({"error": {"message": "starting"}}, status=503)
        return completion("fine")

    with serving(answer) as server:
        client = engine(server, **PATIENCE)
        blocks_until_dead(client)
        down.clear()
        (done,) = client.complete([request()])
        client.close()
    assert done.text == "fine"


def test_patience_must_outlast_one_request():
    with pytest.raises(ValueError, match="dead_after_s 60 < timeout_s 120"):
        EngineRuntime(dead_after_s=60)
