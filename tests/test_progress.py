import io
import threading
import time

import pytest
from rich.console import Console

from reasonembed.progress import Reporter, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3_599.6, "1 h 00 min"),
        (7_380, "2 h 03 min"),
        (360_000, "100 h 00 min"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def reporter(*, interval_s=0.01):
    stream = io.StringIO()
    return Reporter(Console(file=stream, width=40), interval_s=interval_s), stream


def wait_for(stream, text):
    deadline = time.monotonic() + 10
    while text not in stream.getvalue():
        assert time.monotonic() < deadline, stream.getvalue()
        time.sleep(0.005)


def test_what_is_said_stays_as_it_is():
    speaker, stream = reporter()
    speaker.say("[1/3] plan: [red]no markup[/red], and no line break however long it is")
    assert stream.getvalue() == (
        "[1/3] plan: [red]no markup[/red], and no line break however long it is\n"
    )


def test_a_log_gets_a_line_for_each_change_with_rate_and_time_left():
    speaker, stream = reporter()
    done = [500]  # of an earlier attempt: it counts as done, not towards the rate
    with speaker.watching("annotate", total=2_000, done=lambda: done[0]):
        wait_for(stream, "annotate: 500 of 2,000 rows, 0.0/s\n")
        done[0] = 1_500
        wait_for(stream, "annotate: 1,500 of 2,000 rows, ")
        wait_for(stream, " left\n")
        time.sleep(0.05)
    assert stream.getvalue().count("\n") == 2  # nothing is said where nothing has changed


def test_a_short_stage_says_nothing_and_is_not_held_up():
    speaker, stream = reporter(interval_s=60)
    start = time.monotonic()
    with speaker.watching("plan", total=1, done=lambda: 0):
        pass
    assert time.monotonic() - start < 5
    assert stream.getvalue() == ""


def test_a_stage_that_fails_is_no_longer_watched():
    speaker, _ = reporter()
    before = threading.active_count()
    with pytest.raises(RuntimeError), speaker.watching("plan", total=1, done=lambda: 0):
        raise RuntimeError
    assert threading.active_count() == before
