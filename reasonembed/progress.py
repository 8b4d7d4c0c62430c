"""What a person sees while a stage runs: a live line on a terminal, plain lines in a log.

Progress is read from the commits of the artifact that grows, so that it is true on one machine and
on a hundred, and after a restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def duration(seconds: float) -> str:
    """`75` → `1 min 15 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Reporter:
    """Says how far a stage is: a line that renews itself on a terminal, else one now and then."""

    def __init__(self, console: Console, *, interval_s: float = 15.0) -> None:
        self.console = console
        self._interval_s = 1.0 if console.is_terminal else interval_s

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def watching(
        self,
        label: str,
        *,
        total: int,
        done: Callable[[], int],
        unit: str = "rows",
        note: Callable[[], str] = str,
    ) -> Iterator[None]:
        """Reports `done()` of `total` with rate and remaining time while the body runs.

        Args:
            label: Of the stage.
            total: What there is to do.
            done: How much of it is done.
            unit: Of both.
            note: What else there is to say, such as a loss.
        """
        stop = threading.Event()
        watch = _Watch(label, total, done, unit, note)
        thread = threading.Thread(target=self._loop, args=(watch, stop), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def _loop(self, watch: _Watch, stop: threading.Event) -> None:
        if not self.console.is_terminal:
            while not stop.wait(self._interval_s):
                if line := watch.line():
                    self.say(line)
            return
        with self.console.status(f"  {watch.label} starting …") as status:
            while not stop.wait(self._interval_s):
                if line := watch.line():
                    status.update(line)


class _Watch:
    """Counts, and turns counts into a line."""

    def __init__(
        self, label: str, total: int, done: Callable[[], int], unit: str, note: Callable[[], str]
    ) -> None:
        self.label, self._total, self._done, self._unit = label, total, done, unit
        self._note = note
        self._start, self._first = time.monotonic(), done()
        self._last = -1

    def line(self) -> str | None:
        done = self._done()
        if done == self._last:
            return None
        self._last = done
        passed = time.monotonic() - self._start
        rate = (done - self._first) / passed if passed > 0 else 0.0
        left = f", {duration((self._total - done) / rate)} left" if rate > 0 else ""
        said = f"  {self.label}: {done:,} of {self._total:,} {self._unit}, {rate:.1f}/s{left}"
        return f"{said}; {note}" if (note := self._note()) else said
