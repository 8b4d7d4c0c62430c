import io
import json
import logging
import re
import threading
import time

import pytest
from rich.console import Console

from reasonembed.errors import StorageError
from reasonembed.progress import Counted, Progress, Reporter, duration


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


def reporter(*, interval_s=0.01, **options):
    stream = io.StringIO()
    return Reporter(Console(file=stream, width=40), interval_s=interval_s, **options), stream


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


# What programs read.

FIELDS = [
    *("time", "at", "run", "stage", "shard", "label", "done", "planned", "unit"),
    *("rate_per_s", "left_s", "is_last", "note", "tokens", "failed", "actors", "cost"),
]


def said(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_is_one_object_an_interval_even_where_nothing_changes_and_one_at_the_end():
    speaker, stream = reporter(as_json=True, run="bright", shard="1/4")
    with speaker.during("mine"), speaker.watching("search (bm25)", total=8, done=lambda: 2):
        wait_for(stream, "\n{")
    lines = said(stream)
    assert len(lines) >= 3
    assert [line["is_last"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert all(list(line) == FIELDS for line in lines)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}Z", lines[0]["time"])
    wanted = {"run": "bright", "stage": "mine", "shard": "1/4", "label": "search (bm25)"}
    assert lines[0].items() >= wanted.items()
    assert (lines[0]["done"], lines[0]["planned"], lines[0]["left_s"]) == (2, 8, None)


def test_a_short_stage_says_its_end_and_what_was_counted():
    besides = Counted(actors={"running": 3}, cost={"spent": 1.25})
    heard = []
    speaker, stream = reporter(
        interval_s=60, as_json=True, counted=lambda: besides, listeners=(heard.append,)
    )
    own = Counted(tokens={"prompt": 10, "cached": 4}, failed={"error": 1})
    with speaker.watching("filter", total=5, done=lambda: 5, counted=lambda: own):
        pass
    (line,) = said(stream)
    assert line["stage"] == "filter"  # a piece of work of no stage is one of its own
    assert line["tokens"] == {"prompt": 10, "cached": 4} and line["failed"] == {"error": 1}
    assert line["cost"] == {"spent": 1.25} and line["actors"] == {}  # there are none any more
    assert Progress.parse(stream.getvalue()) == heard[0]


def test_what_stays_is_an_object_too():
    speaker, stream = reporter(as_json=True, run="bright")
    with speaker.during("plan"):
        speaker.say('  "ok": 3 :warning: é')
    (line,) = said(stream)
    assert (line["run"], line["stage"], line["message"]) == (
        "bright", "plan", '"ok": 3 :warning: é'
    )  # fmt: skip


def test_listeners_hear_without_json_and_do_not_end_what_they_watch(caplog):
    def full(_):
        raise StorageError("the disk is full")

    heard = []
    speaker, stream = reporter(listeners=(full, heard.append))
    with caplog.at_level(logging.WARNING), speaker.watching("plan", total=1, done=lambda: 0):
        wait_for(stream, "plan: 0 of 1 rows")
    assert heard[-1].is_last and heard[-1].label == "plan"
    assert "the disk is full" in caplog.text


def test_progress_outlives_its_driver_as_one_line():
    whole = Progress(
        tokens={"prompt": 200, "cached": 50, "completion": 9},
        failed={"error": 2, "truncated": 1},
        actors={"running": 4, "pending": 1},
        cost={"spent": 3.5, "planned": 10.0},
        time=1_800_000_000.25,
        run="bright",
        stage="annotate",
        shard="2/4",
        label="annotate",
        done=1_500,
        planned=2_000,
        rate_per_s=3.2,
        left_s=156.0,
    )
    assert Progress.parse(whole.json().encode()) == whole
    assert "\n" not in whole.json()
    assert str(whole) == (
        "annotate 2/4: 1,500 of 2,000 rows, 3.2/s, 2 min 36 s left; 4 actors; 2 error; "
        "1 truncated; 25% of prompts cached; 3.50 of 10.00 dollars at 2027-01-15 08:00:00 UTC"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", "nonsense", '{"at": "soon"}', b"\xff"])
def test_what_is_no_progress_is_none(text):
    assert Progress.parse(text) is None


def test_fields_of_a_later_version_are_left_out():
    text = json.dumps({"at": 1.0, "label": "mine", "colour": "red"})
    assert Progress.parse(text) == Progress(time=1.0, label="mine")


def test_a_store_that_does_not_answer_for_a_while_is_no_end_of_progress(caplog):
    speaker, stream = reporter()
    asked = []

    def done():
        asked.append(1)
        if 1 < len(asked) < 4:
            raise StorageError("slow down")
        return len(asked)

    with speaker.watching("train", total=99, done=done, unit="steps"):
        wait_for(stream, "train: 5 of 99 steps")
    assert "progress cannot be told: slow down" in caplog.text
