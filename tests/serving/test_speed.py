from __future__ import annotations

import pytest

from reasonembed.serving.speed import Load, PassSpeed, Speed


class Worker:
    """Moves time and notes work."""

    def __init__(self) -> None:
        self.now = 0.0
        self.speed = Speed(clock=lambda: self.now)

    def work(self, load: Load, tokens: int, seconds: float) -> None:
        self.speed.set_load(load)
        self.now += seconds
        self.speed.answered(tokens)
        self.speed.set_load(Load.IDLE)


def test_a_modest_speed_before_anything_is_known():
    assert Speed().tokens_per_s == 1_000


def test_only_full_seconds_are_a_measure_once_there_was_one():
    worker = Worker()
    worker.work(Load.BUSY, tokens=10, seconds=1)
    assert worker.speed.tokens_per_s == 1_000  # a lone query says little
    worker.work(Load.BUSY, tokens=90_000, seconds=9)
    assert worker.speed.tokens_per_s > 5_000  # it does so much at least
    worker.work(Load.FULL, tokens=400, seconds=0.8)
    assert worker.speed.tokens_per_s > 5_000  # too short a time
    worker.work(Load.FULL, tokens=200, seconds=0.4)
    assert worker.speed.tokens_per_s == pytest.approx(500)
    worker.work(Load.BUSY, tokens=10, seconds=100)
    worker.now += 3_600
    assert worker.speed.tokens_per_s == pytest.approx(500)


def test_large_and_small_answers_weigh_as_the_seconds_they_took():
    worker = Worker()
    for tokens in (1, 50_000, 200, 16_384, 3):
        worker.work(Load.FULL, tokens=tokens, seconds=tokens / 250)
        worker.work(Load.FULL, tokens=250, seconds=1)
    assert worker.speed.tokens_per_s == pytest.approx(250)


def test_answers_that_come_in_a_clump_do_not_pass_for_speed():
    """Ten calls that share a replica fairly end at about the same time."""
    worker = Worker()
    for _ in range(5):
        worker.work(Load.FULL, tokens=16_384, seconds=160)
        for _ in range(9):
            worker.work(Load.FULL, tokens=16_384, seconds=0.5)
    true = 10 * 16_384 / (160 + 9 * 0.5)
    assert true / 2.5 < worker.speed.tokens_per_s < true * 2.5


def test_another_speed_is_followed():
    worker = Worker()
    for tokens_per_s in (1_000, 10_000, 100):
        for _ in range(500):
            worker.work(Load.FULL, tokens=1_000, seconds=1_000 / tokens_per_s)
        assert worker.speed.tokens_per_s == pytest.approx(tokens_per_s, rel=0.1)


def test_passes_count_with_their_own_seconds_where_all_lanes_are_busy():
    speed = PassSpeed(lanes=4)
    assert speed.tokens_per_s == 1_000
    speed.took(90_000, 9, is_full=False)
    assert speed.tokens_per_s == 10_000  # of one lane at least
    speed.took(100, 0.5, is_full=True)
    assert speed.tokens_per_s > 9_000  # too short a time
    speed.took(300, 1.5, is_full=True)
    assert speed.tokens_per_s == pytest.approx(4 * 200)
    speed.took(10_000, 0.1, is_full=False)
    assert speed.tokens_per_s == pytest.approx(4 * 200)
