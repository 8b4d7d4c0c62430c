"""What is said while a stage runs: a live line on a terminal, plain or JSON lines in a log.

Progress is read from the commits of the artifact that grows, so that it is true on one machine and
on a hundred, and after a restart.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace

from rich.console import Console

from reasonembed.errors import ReasonEmbedError
from reasonembed.logs import moment, timestamp

_LOG = logging.getLogger(__name__)
_LIVE_S = 1.0  # between two looks of a person at a terminal


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@dataclass(frozen=True)
class Counted:
    """What else is known of the work: numbers by name, empty where nobody counts them.

    Attributes:
        tokens: Of this attempt: `prompt`, of these `cached`, and `completion`.
        failed: Rows of this attempt that failed, by status.
        actors: Of the stage's pool, by state.
        cost: Dollars of the run: `spent`, `planned`.
    """

    tokens: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, int] = field(default_factory=dict)
    actors: Mapping[str, int] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress(Counted):
    """How far a driver is, as it says it.

    Attributes:
        time: When, seconds since 1970 by the driver's clock.
        run: Name of the run.
        stage: Which runs.
        shard: Which part of the stage's rows is this driver's, such as `1/4`; empty for all.
        label: Of the work in it; a stage may have several pieces.
        done: So much of `planned` is done, in `unit`, earlier attempts included.
        planned: What there is to do.
        unit: Of both.
        rate_per_s: Of this attempt, on average.
        left_s: Seconds that the rest takes at that rate; None while that is unknown.
        is_last: Whether the piece of work has ended, done or not.
        note: What else there is to say, such as a loss.
    """

    time: float = 0.0
    run: str = ""
    stage: str = ""
    shard: str = ""
    label: str = ""
    done: int = 0
    planned: int = 0
    unit: str = "rows"
    rate_per_s: float = 0.0
    left_s: float | None = None
    is_last: bool = False
    note: str = ""

    @classmethod
    def parse(cls, text: bytes | str) -> Progress | None:
        """What `json` made; None where it was made by another version of this software."""
        try:
            said = json.loads(text)
            known = {one.name: said[one.name] for one in fields(cls) if one.name in said}
            return cls(**known | {"time": float(said["at"])})
        except (ValueError, TypeError, KeyError):
            return None

    def json(self) -> str:
        """One line; `time` for people and other programs, `at` in seconds since 1970."""
        values = asdict(self)
        first = {"time": timestamp(values.pop("time")), "at": round(self.time, 3)}
        order = [one.name for one in fields(self) if one.name in values]
        counted = [one.name for one in fields(Counted)]
        order = [name for name in order if name not in counted] + counted
        return json.dumps(first | {name: values[name] for name in order}, ensure_ascii=False)

    def __str__(self) -> str:
        """For people who ask later: all there is, and when it was said."""
        parts = [self.line]
        if running := self.actors.get("running"):
            parts.append(f"{running} actors")
        parts += [f"{rows:,} {status}" for status, rows in self.failed.items()]
        if self.tokens.get("cached"):
            parts.append(f"{self.tokens['cached'] / self.tokens['prompt']:.0%} of prompts cached")
        if "spent" in self.cost:
            planned = f" of {self.cost['planned']:.2f}" if "planned" in self.cost else ""
            parts.append(f"{self.cost['spent']:.2f}{planned} dollars")
        return f"{'; '.join(parts)} at {moment(self.time)}"

    @property
    def line(self) -> str:
        """For people who watch: `annotate: 1,500 of 2,000 rows, 3.2/s, 2 min 36 s left`."""
        left = f", {duration(self.left_s)} left" if self.left_s is not None else ""
        label = f"{self.label} {self.shard}".rstrip()
        said = (
            f"{label}: {self.done:,} of {self.planned:,} {self.unit}, {self.rate_per_s:.1f}/s{left}"
        )
        return f"{said}; {self.note}" if self.note else said


class Reporter:
    """Says how far a stage is: a line that renews itself on a terminal, else one now and then.

    Args:
        console: Where.
        interval_s: Between two lines of a log, and between two calls of `listeners`.
        as_json: Whether every line is a JSON object, one each interval and one at the end.
        run: Name of the run, for those.
        shard: Which part of a stage's rows is this driver's.
        counted: Asked each interval for what is known besides.
        listeners: Called each interval and at the end, from a thread; what they raise of this
            package's errors is logged and ends nothing.
    """

    def __init__(
        self,
        console: Console,
        *,
        interval_s: float = 15.0,
        as_json: bool = False,
        run: str = "",
        shard: str = "",
        counted: Callable[[], Counted] | None = None,
        listeners: Sequence[Callable[[Progress], None]] = (),
    ) -> None:
        self.console, self.run, self.shard, self.stage = console, run, shard, ""
        self._is_live = console.is_terminal and not as_json
        self._as_json, self._interval_s = as_json, interval_s
        self._counted, self._listeners = counted, listeners

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """Names the stage that the body runs."""
        before, self.stage = self.stage, stage
        try:
            yield
        finally:
            self.stage = before

    def say(self, text: str) -> None:
        """One line that stays."""
        if self._as_json:
            ids = {"time": timestamp(time.time()), "run": self.run, "stage": self.stage}
            text = json.dumps(ids | {"message": text.strip()}, ensure_ascii=False)
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    @contextmanager
    def watching(
        self,
        label: str,
        *,
        total: int,
        done: Callable[[], int],
        unit: str = "rows",
        note: Callable[[], str] = str,
        counted: Callable[[], Counted] = Counted,
    ) -> Iterator[None]:
        """Reports `done()` of `total` with rate and remaining time while the body runs.

        Args:
            label: Of the work.
            total: What there is to do.
            done: How much of it is done.
            unit: Of both.
            note: What else there is to say, such as a loss.
            counted: Tokens and failures so far.
        """
        stop = threading.Event()
        watch = _Watch(label, total, done, unit, note, counted)
        thread = threading.Thread(target=self._loop, args=(watch, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _loop(self, watch: _Watch, stop: threading.Event) -> None:
        if not self._is_live:
            while not stop.wait(self._interval_s):
                with _untold():
                    if (line := watch.line()) and not self._as_json:
                        self._print(f"  {line}")
                    self._tell(watch)
        else:
            self._live(watch, stop)
        with _untold():
            self._tell(watch, is_last=True)

    def _live(self, watch: _Watch, stop: threading.Event) -> None:
        told = time.monotonic()
        with self.console.status(f"  {watch.label} starting …") as status:
            while not stop.wait(_LIVE_S):
                with _untold():
                    if line := watch.line():
                        status.update(f"  {line}")
                    if time.monotonic() - told >= self._interval_s:
                        told = time.monotonic()
                        self._tell(watch)

    def _tell(self, watch: _Watch, *, is_last: bool = False) -> None:
        if not (self._as_json or self._listeners):
            return
        counted = self._counted() if self._counted else Counted()
        found = watch.progress(counted)
        progress = replace(
            found,
            run=self.run,
            stage=self.stage or watch.label,
            shard=self.shard,
            is_last=is_last,
            actors={} if is_last else found.actors,
        )
        if self._as_json:
            self._print(progress.json())
        for listener in self._listeners:
            with _untold():
                listener(progress)


@contextmanager
def _untold() -> Iterator[None]:
    """What cannot be read or told now ends neither the work nor the telling."""
    try:
        yield
    except ReasonEmbedError as error:
        _LOG.warning("progress cannot be told: %s", error)


class _Watch:
    """Counts, and turns counts into what is said."""

    def __init__(
        self,
        label: str,
        total: int,
        done: Callable[[], int],
        unit: str,
        note: Callable[[], str],
        counted: Callable[[], Counted],
    ) -> None:
        self.label, self._total, self._done, self._unit = label, total, done, unit
        self._note, self._counted = note, counted
        self._start, self._first = time.monotonic(), done()
        self._last = -1

    def line(self) -> str | None:
        """What is said to people; None where nothing has changed."""
        now = self.progress(Counted())
        if now.done == self._last:
            return None
        self._last = now.done
        return now.line

    def progress(self, besides: Counted) -> Progress:
        """As it is now; `besides` knows the actors and the cost."""
        done, passed = self._done(), time.monotonic() - self._start
        rate = (done - self._first) / passed if passed > 0 else 0.0
        own = self._counted()
        return Progress(
            tokens=dict(own.tokens),
            failed=dict(own.failed),
            actors=dict(besides.actors),
            cost=dict(besides.cost),
            time=round(time.time(), 3),
            label=self.label,
            done=done,
            planned=self._total,
            unit=self._unit,
            rate_per_s=round(rate, 3),
            left_s=round((self._total - done) / rate, 1) if rate > 0 else None,
            note=self._note(),
        )
