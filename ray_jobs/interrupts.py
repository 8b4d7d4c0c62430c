"""A signal becomes a clean end: SIGTERM of a stopped job or a leaving machine, SIGINT of a person.

The signal is raised in the main thread as `Interrupted`, so stages end as after any error: the
timeline notes it, the lock is let go, the exit code says that the run can be started again. Ray
kills a stopped job's driver three seconds later, and what unwinds may wait for longer (a dataset
for its actors, a client for its server), so a second thread ends the process before that.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from reasonembed.errors import EXIT_RESUME, Interrupted

GRACE_S = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupts:
    """Turns signals into `Interrupted`.

    Args:
        late: Called with the message where the main thread does not end in time.
        stderr: A file descriptor that a person reads.
    """

    def __init__(self, late: Callable[[str], None], *, stderr: int) -> None:
        self._late, self._stderr = late, stderr
        self._ended = threading.Event()
        self._message: str | None = None

    def install(self) -> None:
        """Takes the signals over; again where something (Ray, when it starts) has taken them."""
        for one in _SIGNALS:
            signal.signal(one, self._handle)

    def end(self) -> None:
        """Nothing needs to be ended any more."""
        self._ended.set()

    def check(self, error: BaseException) -> None:
        """Names the signal as the cause of an error that came of it, whoever has wrapped it.

        Raises:
            Interrupted: There was a signal.
        """
        if self._message is not None and not isinstance(error, Interrupted):
            raise Interrupted(self._message) from error

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._message is not None:
            if number == signal.SIGINT:  # a person who asks twice wants it now
                os._exit(EXIT_RESUME)
            return
        name = signal.Signals(number).name
        self._message = f"Ended by {name}; what is committed stays: start again, it goes on."
        threading.Thread(target=self._end_late, args=(self._message,), daemon=True).start()
        raise Interrupted(self._message)

    def _end_late(self, message: str) -> None:
        if self._ended.wait(GRACE_S):
            return
        try:
            self._late(message)
        finally:
            os.write(self._stderr, f"{message}\n".encode())
            os._exit(EXIT_RESUME)


@contextmanager
def interruptible(late: Callable[[str], None], *, stderr: int) -> Iterator[Interrupts]:
    """Signals end the body by `Interrupted`; off the main thread, which gets no signals, nothing.

    Args:
        late: See `Interrupts`.
        stderr: See `Interrupts`.
    """
    interrupts = Interrupts(late, stderr=stderr)
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    before = {one: signal.getsignal(one) for one in _SIGNALS}
    interrupts.install()
    try:
        yield interrupts
    except BaseException as error:
        interrupts.check(error)
        raise
    finally:
        interrupts.end()
        for one, handler in before.items():
            signal.signal(one, signal.SIG_DFL if handler is None else handler)
