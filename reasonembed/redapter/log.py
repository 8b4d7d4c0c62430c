"""What training leaves behind of each step; written by the first worker, read by everyone.

`log.jsonl` has one line a step, `samples.jsonl` one line a step with what each sample of the batch
gave. A line is on its way to the disk before the next step begins, and a step that is taken again
after a restart counts once: the later line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonembed.storage import Place, append_json_line, objects

if TYPE_CHECKING:  # reading a log needs no deep learning
    from reasonembed.redapter.batches import Group
    from reasonembed.redapter.loss import LossOutput

    Observe = Callable[[int, Sequence[Group], LossOutput], object]
    """Gets the number of a step, its global batch, and what it gave."""

HELD_OUT_SCORE = "held_out_ndcg@10"
"""The metric by which the best checkpoint is chosen."""

START_SCORE = "held_out_start_ndcg@10"
"""The same before the first step; noted with step 0."""

_DIGITS = 5


class TrainLog:
    """One JSON line a step; reading it again reads only what has been added.

    Args:
        path: The log.
        source: Where it is fetched from whenever it has changed there, if it is kept in a store.
    """

    def __init__(self, path: Path, *, source: Place | None = None) -> None:
        self._path, self._source, self._seen = path, source, (-1, -1)
        self._forget()

    def _forget(self) -> None:
        self._offset = 0
        self._by_step: dict[float, dict[str, Any]] = {}

    def append(self, row: Mapping[str, object]) -> None:
        """Adds a step, named by `row["step"]`."""
        append_json_line(self._path, dict(row))

    def steps(self) -> list[dict[str, Any]]:
        """The log in order of steps; lines that a kill cut short are left out."""
        self._refresh()
        size = self._path.stat().st_size if self._path.is_file() else 0
        if size < self._offset:  # another run has begun in its place
            self._forget()
        if size > self._offset:
            with self._path.open("rb") as stream:
                stream.seek(self._offset)
                whole, end, _ = stream.read().rpartition(b"\n")
            self._offset += len(whole) + len(end)
            for row in objects(whole.decode("utf-8", errors="replace")):
                if _is_finite(row.get("step")):
                    self._by_step[row["step"]] = row
        return [self._by_step[step] for step in sorted(self._by_step)]

    def _refresh(self) -> None:
        if self._source is None:
            return
        info = self._source.info()
        if (info.size or 0, info.mtime_ns or 0) != self._seen:
            self._source.fetch(self._path)
            self._seen = (info.size or 0, info.mtime_ns or 0)
            self._forget()  # a run that was resumed may have taken lines back

    def summary(self) -> str:
        """The last step in words; see `summary`."""
        steps = self.steps()
        return summary(steps[-1]) if steps else ""


class SampleLog:
    """One JSON line a step with the losses and the intensity of each sample."""

    def __init__(self, path: Path) -> None:
        self._log = TrainLog(path)

    def append(self, step: int, groups: Sequence[Group], output: LossOutput) -> None:
        """Adds a step.

        Args:
            step: Counted from 0.
            groups: The global batch; the label noted is that of the first passage.
            output: What it gave, in the order of `groups`.
        """
        self._log.append(
            {
                "step": step,
                "query_ids": [group.sample.query_id for group in groups],
                "labels": [group.labels[0] for group in groups],
                "query_loss": _rounded(output.losses_B.tolist()),
                "rewritten_loss": _rounded(output.rewritten_losses_B.tolist()),
                "intensity": _rounded(output.intensity_B.tolist()),
            }
        )

    def steps(self) -> list[dict[str, Any]]:
        """The log in order of steps; of each, lists of equal length."""
        return self._log.steps()


def summary(row: Mapping[str, Any]) -> str:
    """What a person watches of a step, in one line; what the step did not note is left out."""
    shown = {
        "loss {:.3f}": "loss",
        "intensity {:.2f}": "intensity_median",
        "{:.0%} at the cap": "intensity_capped_share",
        "positive rank {:.1f}": "positive_rank",
        "{:,.0f} tokens/s": "tokens_per_s",
        "{:.0%} of peak": "peak_share",
    }
    return ", ".join(
        text.format(row[name]) for text, name in shown.items() if _is_finite(row.get(name))
    )


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [round(value, _DIGITS) if math.isfinite(value) else None for value in values]


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
