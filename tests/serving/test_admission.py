from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.serving.admission import MIN_TEXT_TOKENS, Admission, request_cost
from reasonembed.serving.errors import ApiError


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(clock=None, *, request: int = 1_000, queued: int = 2_000) -> Admission:
    return Admission(max_request_tokens=request, max_queued_tokens=queued, clock=clock or Clock())


def retry_after_s(error: ApiError) -> float:
    return int(error.headers["Retry-After-Ms"]) / 1_000


def is_admitted(door: Admission, tokens: int) -> bool:
    try:
        door.reserve(tokens)
    except ApiError as error:
        assert error.status == 429
        return False
    return True


@given(st.lists(st.integers(1, 300), max_size=12), st.lists(st.integers(1, 40), min_size=1))
def test_a_batch_of_n_is_taken_exactly_where_n_singles_are(before, lengths):
    for_batch, for_singles = admission(), admission()
    for door in (for_batch, for_singles):
        for tokens in before:
            is_admitted(door, tokens)
    cost = request_cost(lengths)
    if cost > 1_000:  # it would be a 413
        return
    singles = [is_admitted(for_singles, request_cost([length])) for length in lengths]
    assert is_admitted(for_batch, cost) == all(singles)
    if all(singles):
        assert for_batch.queued_tokens == for_singles.queued_tokens


@given(st.data())
def test_tokens_never_pass_the_bound_and_always_come_back(data):
    door, held = admission(), []
    for _ in range(data.draw(st.integers(0, 25))):
        action = data.draw(st.sampled_from(["reserve", "correct", "answered", "leave", "fail"]))
        tokens = data.draw(st.integers(0, 1_200))
        try:
            if action == "reserve":
                held.append(door.reserve(tokens))
            elif held and action == "correct":
                held[-1].correct(min(tokens, 1_000))
            elif held and action == "answered":
                held[-1].answered(min(tokens, held[-1].tokens))
            elif held and action == "leave":
                with held.pop():
                    pass
            elif held:
                with pytest.raises(ZeroDivisionError), held.pop():
                    _ = 1 / 0
        except ApiError as error:
            assert error.status == 429
        assert door.queued_tokens == sum(one.tokens for one in held) <= 2_000
    for one in held:
        with one:
            pass
    assert door.queued_tokens == 0


def test_a_refused_correction_leaves_the_estimate_held():
    door = admission()
    is_admitted(door, 900)
    is_admitted(door, 900)
    with pytest.raises(ApiError), door.reserve(100) as room:
        room.correct(300)
    assert door.queued_tokens == 1_800


def test_retry_after_is_the_time_until_there_is_room_at_the_measured_speed():
    clock = Clock()
    door = admission(clock)
    first, second = door.reserve(1_000), door.reserve(1_000)
    for _ in range(4):  # 50 tokens a second with enough to do
        clock.now += 2
        first.answered(100)
    assert door.tokens_per_s == pytest.approx(50)
    with pytest.raises(ApiError) as refused:
        door.reserve(680)  # 400 are free
    assert (refused.value.status, refused.value.code) == (429, "overloaded")
    assert retry_after_s(refused.value) == pytest.approx(5.6, abs=0.002)
    assert refused.value.headers["Retry-After"] == "6"
    assert "1600 of at most 2000 tokens" in refused.value.message
    with pytest.raises(ApiError) as refused:
        door.reserve(401)
    assert retry_after_s(refused.value) >= 0.1
    with first, second:  # cancelled work is no measure of speed
        clock.now += 1_000
    assert door.tokens_per_s == pytest.approx(50)


def test_before_anything_was_measured_a_modest_speed_is_taken():
    door = admission()
    door.reserve(1_000), door.reserve(1_000)
    with pytest.raises(ApiError) as refused:
        door.reserve(500)
    assert retry_after_s(refused.value) == pytest.approx(0.5)


def test_quiet_times_do_not_count_as_slowness():
    clock = Clock()
    door = admission(clock)
    for _ in range(100):  # one short query at a time, 20 tokens in a tenth of a second
        room = door.reserve(20)
        clock.now += 0.1
        room.answered(20)
        clock.now += 60
    rooms = [door.reserve(1_000), door.reserve(1_000)]
    assert door.tokens_per_s == 1_000  # the modest speed, not 200
    for _ in range(4):
        clock.now += 0.5
        rooms[0].answered(250)
        rooms.append(door.reserve(250))
    assert door.tokens_per_s == pytest.approx(500)


def test_a_slower_time_is_followed():
    clock = Clock()
    door = admission(clock, request=10_000, queued=20_000)
    for speed in (1_000, 100):
        for _ in range(400):
            with door.reserve(10_000), door.reserve(10_000) as room:
                clock.now += 1_000 / speed
                room.answered(1_000)
        assert door.tokens_per_s == pytest.approx(speed, rel=0.05)


def test_what_a_request_may_hold():
    door = admission()
    door.check_size(1_000)
    with pytest.raises(ApiError, match=r"1001 tokens, over the limit of 1000.*in parts") as refused:
        door.check_size(1_001)
    assert (refused.value.status, refused.value.code) == (413, "request_too_large")
    assert door.reserve(math.inf).tokens == 1_000  # an estimate is no ground for refusing


def test_a_tiny_text_counts_for_its_row():
    assert request_cost([1, 2, 100]) == 2 * MIN_TEXT_TOKENS + 100
    assert request_cost([]) == 0


@pytest.mark.parametrize("sizes", [(0, 10), (11, 10)])
def test_a_queue_that_its_largest_request_does_not_fit_is_refused(sizes):
    with pytest.raises(ValueError, match="max_request_tokens <= max_queued_tokens"):
        Admission(max_request_tokens=sizes[0], max_queued_tokens=sizes[1])
