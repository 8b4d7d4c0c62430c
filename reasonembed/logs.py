"""One JSON object a line for what the package logs, with the ids of the run and of its stage.

Messages name ids, files and numbers; the texts that a run works on are never in them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

_LOGGERS = ("reasonembed", "ray_jobs")
FORMAT_VARIABLE = "REASONEMBED_LOG"


def is_json_wanted() -> bool:
    """Whether programs read what a driver says, not people.

    `REASONEMBED_LOG` says `json` or `text`; without it, JSON where the driver is a submitted job.
    """
    wanted = os.environ.get(FORMAT_VARIABLE, "")
    return wanted == "json" or (wanted != "text" and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ)


def timestamp(seconds: float) -> str:
    """`2026-01-31T12:00:00.000Z` from seconds since 1970."""
    when = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return when.replace("+00:00", "Z")


def moment(seconds: float) -> str:
    """`2026-01-31 12:00:00 UTC` from seconds since 1970, for people."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


class JsonLine(logging.Formatter):
    """A record as one line.

    Args:
        ids: Asked for each record, for a driver goes from stage to stage.
    """

    def __init__(self, ids: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self._ids = ids

    def format(self, record: logging.LogRecord) -> str:
        """`time`, `level`, `logger`, the ids, `message`, what `extra={"facts": …}` adds."""
        line = {
            "time": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._ids(),
            "message": record.getMessage(),
            **getattr(record, "facts", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


@contextmanager
def logging_to(file: Path, ids: Callable[[], Mapping[str, str]]) -> Iterator[None]:
    """Adds what is logged while the body runs to a file, one line a record.

    Args:
        file: Of this machine.
        ids: As in `JsonLine`.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(file, encoding="utf-8", delay=True)
    handler.setFormatter(JsonLine(ids))
    before = {name: logging.getLogger(name).level for name in _LOGGERS}
    _add(handler)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).removeHandler(handler)
            logging.getLogger(name).setLevel(level)
        handler.close()


@dataclass(frozen=True)
class WorkerLog:
    """What a worker process needs to log as its driver does; it travels to the worker.

    Attributes:
        run: Name of the run.
        stage: Its stage.
    """

    run: str
    stage: str

    def start(self) -> None:
        """Sends what this process logs to its stderr, which Ray keeps in a file a worker."""
        handler = _Stderr(sys.stderr)
        handler.setFormatter(JsonLine(lambda: {**vars(self), "pid": str(os.getpid())}))
        for name in _LOGGERS:  # a process that had another stage's
            for other in list(logging.getLogger(name).handlers):
                if isinstance(other, _Stderr):
                    logging.getLogger(name).removeHandler(other)
        _add(handler)


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """A worker's handler, told from others'."""


def _add(handler: logging.Handler) -> None:
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
