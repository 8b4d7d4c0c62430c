"""How far a run is, told from its storage alone, from anywhere and with few requests.

What is committed is counted from commit records; the rows themselves are read only where they lie
on this machine's disk, where a row that was computed again can be told from its first attempt.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reasonembed.artifacts import Artifact
from reasonembed.lease import Seen, driver_of
from reasonembed.progress import Progress
from reasonembed.run import STAGES, Run
from reasonembed.schemas import Status
from reasonembed.storage import Place

_PROGRESS = "progress.json"
_AT_ONCE = 8


@dataclass(frozen=True)
class StageStatus:
    """One stage.

    Attributes:
        stage: Its name.
        state: `done`, `failed`, `interrupted`, `begun` or `not run`.
        rows: Committed rows; None for a stage without rows.
        failed: How many of them failed.
        planned: How many there are to be; None where nobody said.
        seconds: Of all attempts; None before the first.
    """

    stage: str
    state: str
    rows: int | None = None
    failed: int = 0
    planned: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run.

    Attributes:
        stages: All, in order.
        driver: Who drives it now; None if nobody does, or if the run lies on a disk, where a lock
            tells nothing of its holder.
        progress: The last that was said; None if nothing ever was.
    """

    stages: tuple[StageStatus, ...]
    driver: Seen | None
    progress: Progress | None


def look(run: Run) -> RunStatus:
    """How far a run is.

    Raises:
        StorageError: Its storage cannot be read.
    """
    with ThreadPoolExecutor(1 if run.place.is_local else _AT_ONCE) as pool:
        driver = pool.submit(driver_of, run.place)
        progress = pool.submit(last_progress, run.place)
        there = pool.submit(lambda: {child.name for child in run.place.children()})
        attempts: dict[str, list[dict[str, Any]]] = {}
        for note in run.timeline():
            attempts.setdefault(note["stage"], []).append(note)
        said, folders = progress.result(), there.result()

        def one(stage: str) -> StageStatus:
            return _stage(run, stage, attempts.get(stage, []), folders, said)

        return RunStatus(tuple(pool.map(one, STAGES)), driver.result(), said)


def _stage(
    run: Run,
    stage: str,
    attempts: list[dict[str, Any]],
    folders: set[str],
    said: Progress | None,
) -> StageStatus:
    outputs = [output for output in run.outputs(stage) if output.place.name in folders]
    if not any(output.stage() for output in outputs):
        # Vectors are no stage's own, so only the timeline tells that they were made.
        made = bool(attempts) and not run.outputs(stage)
        return StageStatus(stage, attempts[-1]["outcome"] if made else "not run")
    rows, failed = None, 0
    if outputs and isinstance(outputs[0], Artifact):
        counts = _counts(outputs[0])
        rows = sum(counts.values())
        failed = rows - counts[Status.OK] - counts[Status.FILTERED]
    return StageStatus(
        stage,
        attempts[-1]["outcome"] if attempts else "begun",
        rows,
        failed,
        said.planned if said and _is_of_whole(said, stage) else None,
        sum(note["seconds"] for note in attempts) if attempts else None,
    )


def _is_of_whole(said: Progress, stage: str) -> bool:
    # A stage of several pieces plans more than the last of them.
    whole = said.label == stage and not said.shard
    return said.stage == stage and said.unit == "rows" and whole


def _counts(artifact: Artifact) -> Counter[str]:
    if artifact.place.is_local:
        return artifact.statuses()
    counts = Counter[str]()
    for commit in artifact.commits():
        counts.update(commit.statuses or {Status.OK: commit.rows})
    return counts


def last_progress(run: Place) -> Progress | None:
    """What was last said of a run; None if nothing ever was.

    Raises:
        StorageError: It cannot be read.
    """
    raw = (run / _PROGRESS).read()
    return None if raw is None else Progress.parse(raw)


def say_progress(run: Place, progress: Progress) -> None:
    """Lets whoever looks at a run's storage know how far it is.

    Raises:
        StorageError: It cannot be written.
    """
    (run / _PROGRESS).write(progress.json().encode())
