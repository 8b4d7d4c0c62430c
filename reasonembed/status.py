"""How far a run is, told from its storage alone, from anywhere and with few requests.

What is committed is counted from commit records; the rows themselves are read only where they lie
on this machine's disk, where a row that was computed again can be told from its first attempt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reasonembed.artifacts import Artifact
from reasonembed.lease import Seen, drivers_of
from reasonembed.progress import Progress
from reasonembed.run import STAGES, Run
from reasonembed.schemas import Status
from reasonembed.storage import Place

_PROGRESS = re.compile(r"progress(-\d+-of-\d+)?\.json")
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
        drivers: Who drives it now, several where it is driven in shards; nobody also if the run
            lies on a disk, where a lock tells nothing of its holder.
        progress: What each of the drivers of the last stage said last, by shard.
    """

    stages: tuple[StageStatus, ...]
    drivers: tuple[Seen, ...]
    progress: tuple[Progress, ...]


def look(run: Run) -> RunStatus:
    """How far a run is.

    Raises:
        StorageError: Its storage cannot be read.
    """
    with ThreadPoolExecutor(1 if run.place.is_local else _AT_ONCE) as pool:
        drivers = pool.submit(drivers_of, run.place)
        progress = pool.submit(last_progress, run.place)
        there = pool.submit(lambda: {child.name for child in run.place.children()})
        attempts: dict[str, list[dict[str, Any]]] = {}
        for note in run.timeline():
            attempts.setdefault(note["stage"], []).append(note)
        said, folders = progress.result(), there.result()

        def one(stage: str) -> StageStatus:
            return _stage(run, stage, attempts.get(stage, []), folders, said)

        return RunStatus(tuple(pool.map(one, STAGES)), tuple(drivers.result()), said)


def _stage(
    run: Run,
    stage: str,
    attempts: list[dict[str, Any]],
    folders: set[str],
    said: Sequence[Progress],
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
        next((one.planned for one in said if _is_of_whole(one, stage)), None),
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


def last_progress(run: Place) -> tuple[Progress, ...]:
    """What each driver of the stage that was last at work said last, by shard.

    Raises:
        StorageError: It cannot be read.
    """
    found = []
    for child in run.children():
        said = Progress.parse(child.read() or b"") if _PROGRESS.fullmatch(child.name) else None
        if said is not None:
            found.append(said)
    if not found:
        return ()
    last = max(found, key=lambda one: one.time)
    return tuple(
        sorted(
            (
                one
                for one in found
                if one.stage == last.stage and bool(one.shard) == bool(last.shard)
            ),
            key=lambda one: [int(part) for part in one.shard.split("/") if part],
        )
    )


def say_progress(run: Place, progress: Progress) -> None:
    """Lets whoever looks at a run's storage know how far it is; a shard has a file of its own.

    Raises:
        StorageError: It cannot be written.
    """
    part = f"-{progress.shard.replace('/', '-of-')}" if progress.shard else ""
    (run / f"progress{part}.json").write(progress.json().encode())
