import json
import logging
import re

import pytest

from reasonembed.logs import WorkerLog, is_json_wanted, logging_to, timestamp

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"


@pytest.fixture
def loggers():
    """The package's loggers, left as they were."""
    found = [logging.getLogger(name) for name in ("reasonembed", "ray_jobs")]
    before = [(one, one.level, list(one.handlers)) for one in found]
    yield found
    for one, level, handlers in before:
        one.setLevel(level)
        one.handlers[:] = handlers


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("said", "is_submitted", "wanted"),
    [
        (None, False, False),
        (None, True, True),
        ("json", False, True),
        ("text", True, False),
        ("", True, True),
    ],
)
def test_json_is_for_submitted_jobs_and_who_asks(monkeypatch, said, is_submitted, wanted):
    for name, value in (("REASONEMBED_LOG", said), (SUBMITTED, "{}" if is_submitted else None)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert is_json_wanted() is wanted


def test_times_are_utc_with_milliseconds():
    assert timestamp(0) == "1970-01-01T00:00:00.000Z"
    assert timestamp(1_800_000_000.25) == "2027-01-15T08:00:00.250Z"


def test_a_driver_logs_one_object_a_line_with_run_and_stage(tmp_path, loggers):
    stage = ["generate"]
    file = tmp_path / "logs" / "driver.jsonl"
    with logging_to(file, lambda: {"run": "r", "stage": stage[0]}):
        logging.getLogger("reasonembed.corpus").info("read %d\nrows", 3)
        stage[0] = "mine"
        logging.getLogger("ray_jobs.job").warning("late", extra={"facts": {"seconds": 1.5}})
    logging.getLogger("reasonembed").warning("after the end")
    first, second = lines(file.read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]{12}Z", first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "reasonembed.corpus",
        "run": "r",
        "stage": "generate",
        "message": "read 3\nrows",
    }
    assert second["stage"] == "mine" and second["seconds"] == 1.5 and second["level"] == "warning"


def test_an_error_brings_its_traceback_on_the_same_line(tmp_path, loggers):
    file = tmp_path / "driver.jsonl"
    with logging_to(file, dict):
        try:
            raise ValueError("bad")
        except ValueError:
            logging.getLogger("reasonembed").exception("it failed")
    (line,) = lines(file.read_text())
    assert line["message"] == "it failed" and line["traceback"].endswith("ValueError: bad")


def test_levels_and_handlers_are_as_before(tmp_path, loggers):
    before = [(one.level, list(one.handlers)) for one in loggers]
    with logging_to(tmp_path / "driver.jsonl", dict):
        assert all(one.isEnabledFor(logging.INFO) for one in loggers)
    assert [(one.level, list(one.handlers)) for one in loggers] == before


def test_a_worker_of_a_second_stage_logs_each_line_once(loggers, capsys):
    WorkerLog("r", "generate").start()
    WorkerLog("r", "annotate").start()
    logging.getLogger("ray_jobs.ledger").info("actor ready")
    (line,) = lines(capsys.readouterr().err)
    assert (line["run"], line["stage"], line["message"]) == ("r", "annotate", "actor ready")
    assert line["pid"].isdecimal()
