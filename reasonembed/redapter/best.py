"""The weights that did best on held-out samples, kept beside the checkpoints.

Writes `weights-<step>`, a folder as `checkpoints.write_weights` makes it, and `best.json`, which
names it. Killed at any moment, `best.json` names a folder that is whole: one that it names is never
written to. Better weights of the same step, as a resumed run may find, go beside it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from reasonembed.storage import Place

_RECORD = "best.json"


@dataclass(frozen=True)
class Record:
    """Which weights are best so far.

    Attributes:
        step: Steps that they have seen.
        score: What they scored; higher is better.
        folder: Name of theirs.
    """

    step: int
    score: float
    folder: str


class Best:
    """Keeps the best weights of a run; made and asked by all workers alike.

    Args:
        output_dir: Seen by all workers.
        write: Writes the weights as they are into a folder; called by all workers.
        is_fresh: Whether the run begins at its first step; what an earlier run kept is forgotten.
        rank: Of this worker.
    """

    def __init__(
        self, output_dir: Path, write: Callable[[Path], object], *, is_fresh: bool, rank: int
    ) -> None:
        self._output_dir, self._write, self._rank = output_dir, write, rank
        if is_fresh and rank == 0:
            (output_dir / _RECORD).unlink(missing_ok=True)
        self.record = None if is_fresh else best_record(output_dir)

    def offer(self, step: int, score: float) -> None:
        """Keeps the weights if they score higher than all before; of equal ones the first stay.

        Args:
            step: Steps that they have seen.
            score: The same on all workers.
        """
        if self.record is not None and score <= self.record.score:
            return
        name = f"weights-{step}"
        if self.record is not None and self.record.folder == name:
            name += "-again"
        self.record = Record(step, score, name)
        target = self._output_dir / name
        self._write(target)
        if self._rank == 0:
            scratch = self._output_dir / f".{_RECORD}"
            scratch.write_text(json.dumps(asdict(self.record)), encoding="utf-8")
            scratch.replace(self._output_dir / _RECORD)
            for pattern in ("weights-*", ".weights-*"):  # with a dot if killed while it was written
                for other in self._output_dir.glob(pattern):
                    if other != target:
                        shutil.rmtree(other)

    def place(self, target: Path) -> None:
        """Puts the best weights at `target`, in place of what is there; on rank 0 alone."""
        assert self.record is not None, "the last step is always measured"
        if self._rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            scratch = target.with_name(f".{target.name}.partial")
            shutil.rmtree(scratch, ignore_errors=True)
            source = self._output_dir / self.record.folder
            shutil.copytree(source, scratch, copy_function=_link_or_copy)
            scratch.rename(target)


def best_record(output_dir: Path | Place) -> Record | None:
    """What `Best` keeps in a folder; None if nothing was measured there."""
    raw = (Place(output_dir) / _RECORD).read()
    return None if raw is None else Record(**json.loads(raw))


def link_best(output_dir: Path, target: Path) -> None:
    """A second name in `target` for everything that `Best` keeps; nothing where it keeps nothing.

    What it keeps is replaced and never changed, so `target` stays as it is now.
    """
    record = best_record(output_dir)
    if record is None:
        return
    target.mkdir(parents=True, exist_ok=True)
    source = output_dir / record.folder
    shutil.copytree(source, target / record.folder, copy_function=_link_or_copy, dirs_exist_ok=True)
    shutil.copy2(output_dir / _RECORD, target / _RECORD)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)  # weights may be many gigabytes
    except OSError:  # storage without links
        shutil.copy2(source, target)
