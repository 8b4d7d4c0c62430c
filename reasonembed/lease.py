"""One driver a run: a lock of the kernel on a disk, a lease that is renewed in an object store.

An object store has no locks, so every driver that wants a run puts a claim of its own into
`_driver/` and then looks who else is there. Of two, at least the one that looks later sees the
other, and whoever sees another claim steps back; so never do two hold a run, whatever their clocks
say. A claim is alive while it is rewritten; how old it is, is told by the store's clock alone: one
listing dates the claim that was just written and the others. Who has not managed to renew its own
for that long has lost it, even if nobody took over, and stops.
"""

from __future__ import annotations

import _thread
import json
import logging
import os
import random
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from reasonembed.artifacts import locked, locked_part
from reasonembed.errors import EXIT_RESUME, Interrupted, StorageError
from reasonembed.logs import moment
from reasonembed.storage import Place

_LOG = logging.getLogger(__name__)

FOLDER = "_driver"
_RENEW_S = 20.0
_STALE_S = 100.0  # several renewals may fail before a driver that lives is taken for dead
_TRIES = 8  # of drivers that start at once; each waits a random while between
_LAST_RESORT_S = 60.0  # what a driver that lost its run has to stop by itself


@dataclass(frozen=True)
class Claim:
    """Who drives a run, or wants to.

    Attributes:
        id: Of this one start.
        owner: User and process.
        host: Name of its machine.
        machine: Where process numbers mean the same; empty if unknown.
        pid: Of the process.
        taken_ns: Store's time at which it took the run; 0 while it only asks.
        part: Of which stage which shard, such as `generate 2/4`; empty for the whole run.
    """

    id: str
    owner: str
    host: str
    machine: str
    pid: int
    taken_ns: int = 0
    part: str = ""

    @property
    def is_held(self) -> bool:
        """Whether it has the run, and does not only ask for it."""
        return self.taken_ns > 0

    def __str__(self) -> str:
        part = f" for {self.part}" if self.part else ""
        return f"{self.owner} on {self.host} (process {self.pid}){part}"

    def excludes(self, other: Claim) -> bool:
        """Whether both cannot hold the run at once; shards can that share no row."""
        if not self.part or not other.part:
            return True
        try:
            (stage, shard), (other_stage, other_shard) = self.part.split(), other.part.split()
            (index, of), (other_index, other_of) = shard.split("/"), other_shard.split("/")
        except ValueError:  # a part of another version's form
            return True
        return stage == other_stage and (of != other_of or index == other_index)


_FIELDS = {field.name for field in fields(Claim)}


@dataclass(frozen=True)
class Seen:
    """A claim in the store.

    Attributes:
        claim: Whose.
        renewed_ns: Store's time at which it was last written.
    """

    claim: Claim
    renewed_ns: int


class Lease:
    """A run in an object store, held by this process until it is released.

    Args:
        run: Where the run lies.
        renew_s: How often it is renewed.
        stale_s: How old a claim is that counts no more.
        on_loss: Called once, from a thread, if the run is lost.
        part: See `Claim`.
    """

    def __init__(
        self,
        run: Place,
        *,
        renew_s: float = _RENEW_S,
        stale_s: float = _STALE_S,
        on_loss: Callable[[], None] = _thread.interrupt_main,
        part: str = "",
    ) -> None:
        self._run, self._folder = run, run / FOLDER
        self._renew_s, self._stale_s, self._on_loss = renew_s, stale_s, on_loss
        self._claim = replace(_myself(), part=part)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._renewed = 0.0
        self.lost = ""

    def take(self) -> None:
        """Takes the run.

        Raises:
            StorageError: Another driver holds it, or the store cannot be used.
        """
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(random.uniform(0.1, 0.4) * 2 ** min(attempt, 4))
            try:
                now_ns, others = self._ask()
            except BaseException:
                self._withdraw()
                raise
            if not others:
                self._begin(now_ns)
                return
            self._withdraw()
            if any(other.claim.is_held for other in others):
                break
        other = max(others, key=lambda one: one.claim.taken_ns)
        raise StorageError(self._refusal(other, now_ns))

    def release(self) -> None:
        """Lets go of the run; another driver can have it at once."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._withdraw()

    def _ask(self) -> tuple[int, list[Seen]]:
        """Puts a claim there; the store's time, and who else has one.

        Claims that count no more are removed.
        """
        self._write()
        found = {one.claim.id: one for one in claims(self._run)}
        mine = found.pop(self._claim.id, None)
        if mine is None:
            raise StorageError(f"{self._folder} does not show what was just written to it")
        alive = []
        for one in found.values():
            if not self._claim.excludes(one.claim):
                continue
            age_s = (mine.renewed_ns - one.renewed_ns) / 1e9
            if age_s > self._stale_s or _is_dead(one.claim):
                self._file(one.claim).delete()
            else:
                alive.append(one)
        return mine.renewed_ns, alive

    def _begin(self, now_ns: int) -> None:
        if _elapsed() - self._renewed > self._stale_s:  # it slept, and is no more in the way
            raise StorageError(f"{self._run} answers too slowly to be held; start again")
        self._claim = replace(self._claim, taken_ns=now_ns)
        self._write()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._stop.wait(self._renew_s):
            # Asked before anything is written: a machine that slept must not revive its claim.
            if _elapsed() - self._renewed > self._stale_s:
                self._lose(f"it could not be renewed for {self._stale_s:.0f} s")
                return
            try:
                self._write()
                rival = self._rival()
            except Exception as error:  # of any kind: nobody else sees that it is not renewed
                _LOG.warning("the lease of %s was not renewed: %r", self._run, error)
                continue  # the next time, or never
            if rival is not None:
                self._lose(f"{rival} has taken it over")
                return

    def _rival(self) -> Claim | None:
        """Who has taken the run since this driver did."""
        for one in claims(self._run):
            if one.claim.taken_ns > self._claim.taken_ns and one.claim.excludes(self._claim):
                return one.claim
        return None

    def _lose(self, why: str) -> None:
        self.lost = why
        self._withdraw()
        self._on_loss()
        if not self._stop.wait(_LAST_RESORT_S):
            os._exit(EXIT_RESUME)  # two drivers at once are worse than no last words

    def _write(self) -> None:
        began = _elapsed()
        record = json.dumps(asdict(self._claim), indent=1, ensure_ascii=False)
        self._file(self._claim).write(record.encode())
        self._renewed = began

    def _file(self, claim: Claim) -> Place:
        return self._folder / f"{claim.id}.json"

    def _withdraw(self) -> None:
        with suppress(StorageError):  # then it becomes stale by itself
            self._file(self._claim).delete()

    def _refusal(self, other: Seen, now_ns: int) -> str:
        age_s = max(0.0, (now_ns - other.renewed_ns) / 1e9)
        since = f" since {moment(other.claim.taken_ns / 1e9)}" if other.claim.is_held else ""
        return (
            f"{self._run} is in use by another driver: {other.claim}{since}, last sign of it "
            f"{age_s:.0f} s ago; wait or stop it. If it was killed, start again in "
            f"{max(1.0, self._stale_s - age_s):.0f} s"
        )


def claims(run: Place) -> list[Seen]:
    """All claims on a run in an object store.

    One that cannot be read is somebody's who asks: some stores show an object before it is filled,
    also while a driver renews its claim.

    Raises:
        StorageError: The store cannot be asked.
    """
    found = []
    for info in (run / FOLDER).files():
        raw = (run / FOLDER / info.base_name).read()
        if raw is not None:  # let go of since it was listed
            found.append(Seen(_claim(raw, info.base_name), info.mtime_ns or 0))
    return found


def _claim(raw: bytes, name: str) -> Claim:
    with suppress(ValueError, TypeError, AttributeError):
        # Another version of this software may say more, and holds the run all the same.
        told = {key: value for key, value in json.loads(raw).items() if key in _FIELDS}
        return Claim(**told)
    return Claim(
        id=name.removesuffix(".json"),
        owner="somebody",
        host="an unknown machine",
        machine="",
        pid=0,
    )


def drivers_of(run: Place) -> list[Seen]:
    """Who drives a run in an object store now: nobody, one, or one for each of several shards.

    By this machine's clock, for nothing is written to ask for the store's.
    """
    return [
        one
        for one in claims(run)
        if one.claim.is_held and time.time_ns() - one.renewed_ns < _STALE_S * 1e9
    ]


@contextmanager
def held(run: Place, *, part: str = "", **options: Any) -> Iterator[None]:
    """Holds a run for one driver, or a stage's shard for one, wherever it lies.

    Args:
        run: Where it lies.
        part: See `Claim`.
        options: Of `Lease`, for an object store.

    Raises:
        StorageError: Another driver holds it, or it cannot be written there.
        Interrupted: It was lost on the way.
    """
    if run.is_local:
        with locked_part(run.local, part) if part else locked(run.local):
            yield
        return
    run.check()
    lease = Lease(run, part=part, **options)
    lease.take()
    try:
        with _interruptible():
            yield
    except BaseException as error:
        if lease.lost:
            raise Interrupted(
                f"the lease of {run} was lost: {lease.lost}. This driver has stopped; what is "
                "committed stays, start again to go on"
            ) from error
        raise
    finally:
        lease.release()


@contextmanager
def _interruptible() -> Iterator[None]:
    """An interrupt is heard in the body, also where a shell had a background job ignore it."""
    before = signal.getsignal(signal.SIGINT)
    is_deaf = before in (signal.SIG_IGN, signal.SIG_DFL)
    if not is_deaf or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def let_go(run: Place) -> None:
    """Withdraws what this process holds, for an end without its last words."""
    if not run.is_local:  # where the kernel does it
        for one in claims(run):
            if (one.claim.machine, one.claim.pid) == (_machine(), os.getpid()):
                (run / FOLDER / f"{one.claim.id}.json").delete()


def _myself() -> Claim:
    return Claim(
        id=uuid.uuid4().hex[:12],
        owner=os.environ.get("USER") or os.environ.get("LOGNAME") or str(os.getuid()),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
    )


def _machine() -> str:
    """This boot of this machine, and whose process numbers are meant: containers have their own."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _is_dead(claim: Claim) -> bool:
    """Whether it is known that the process is no more; on other machines nothing is known."""
    if not claim.machine or claim.machine != _machine():
        return False
    try:
        os.kill(claim.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _is_zombie(claim.pid)


def _is_zombie(pid: int) -> bool:
    with suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return stat.rpartition(")")[2].split()[0] == "Z"
    return False


def _elapsed() -> float:
    """Seconds that go on while the machine sleeps."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))
