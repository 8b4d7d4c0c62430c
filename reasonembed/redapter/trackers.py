"""Where else the figures of each step go: TensorBoard, Weights & Biases, MLflow.

They are for watching. What counts is `train/log.jsonl`, which is written first and always: a
tracker that fails, such as one whose server cannot be reached, is left out from then on.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from reasonembed.errors import ConfigError
from reasonembed.schemas import stable_hash

_LOG = logging.getLogger(__name__)
_PROJECT = "reasonembed"
_FLUSH_S = 5  # how long after a step its figures can be seen; two minutes by default
# The first package that is there is used. Ray Train and Ray Tune bring tensorboardX.
_PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboard"),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
_WRITERS = {"tensorboardX": "tensorboardX", "tensorboard": "torch.utils.tensorboard"}


class Tracker(Protocol):
    """Takes the figures of each step."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Notes a step."""

    def close(self) -> None:
        """Makes sure that all is written."""


class Trackers:
    """Several trackers as one; they are opened with the first step that there is to note.

    Args:
        names: Of `runtime.train.trackers`.
        directory: Of the stage; what is written to files is written there.
        settings: What decides the result, flat; shown by trackers that show settings.
    """

    def __init__(
        self, names: Sequence[str], *, directory: Path, settings: Mapping[str, object]
    ) -> None:
        self._unopened, self._directory, self._settings = tuple(names), directory, dict(settings)
        self._open: dict[str, Tracker] = {}

    def write(self, metrics: Mapping[str, float]) -> None:
        """Notes the step that `metrics["step"]` names; figures that are not finite are left out."""
        step = int(metrics["step"])
        opening, self._unopened = self._unopened, ()
        for name in opening:
            with self._going_on_without(name):
                self._open[name] = _OPENERS[name](self._directory, self._settings, step)
        figures = {
            tag(name): value
            for name, value in metrics.items()
            if name not in _NOT_SHOWN and math.isfinite(value)
        }
        for name, tracker in list(self._open.items()):
            with self._going_on_without(name):
                tracker.write(step, figures)

    def close(self) -> None:
        """Closes all."""
        for name, tracker in list(self._open.items()):
            with self._going_on_without(name):
                tracker.close()

    @contextmanager
    def _going_on_without(self, name: str) -> Iterator[None]:
        # Whatever another's program or server raises: it is not worth a training.
        try:
            yield
        except Exception:
            self._open.pop(name, None)
            _LOG.warning("%s failed and is left out; log.jsonl has every step", name, exc_info=True)


_NOT_SHOWN = ("step", "batch")


def require(names: Sequence[str]) -> None:
    """Checks that what the trackers need is installed.

    Raises:
        ConfigError: A package is missing.
    """
    for name in names:
        if not any(map(find_spec, _PACKAGES[name])):
            raise ConfigError(
                f"runtime.train.trackers asks for {name}, but {' or '.join(_PACKAGES[name])} is "
                f"not installed; install it or leave {name} out"
            )


def tag(metric: str) -> str:
    """The name of a metric in a tracker, grouped: `held_out_ndcg@10` → `held_out/ndcg_at_10`."""
    groups = ("held_out", "intensity")
    group = next((group for group in groups if metric.startswith(f"{group}_")), "train")
    return f"{group}/{metric.removeprefix(f'{group}_').replace('@', '_at_')}"


class _TensorBoard:
    def __init__(self, directory: Path, settings: Mapping[str, object], step: int) -> None:
        package = next(name for name in _PACKAGES["tensorboard"] if find_spec(name))
        module: Any = importlib.import_module(_WRITERS[package])
        # What a run that was killed wrote of later steps is hidden, for they are taken again.
        self._writer = module.SummaryWriter(
            str(directory / "tensorboard"), purge_step=step, flush_secs=_FLUSH_S
        )
        if step == 0:
            lines = [f"    {name}: {value}" for name, value in settings.items()]
            self._writer.add_text("settings", "\n".join(lines), 0)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, directory: Path, settings: Mapping[str, object], step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        self._run = wandb.init(
            project=_PROJECT,
            name=_run_name(directory),
            # The same after a restart, so that the curves go on.
            id=stable_hash(directory.absolute()),
            resume="allow",
            dir=str(directory),
            config=dict(settings),
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, directory: Path, settings: Mapping[str, object], step: int) -> None:
        self._mlflow: Any = importlib.import_module("mlflow")
        self._mlflow.set_experiment(_PROJECT)
        known = directory / "mlflow_run.txt"  # the server gives the id; a restart goes on under it
        if known.is_file():
            self._mlflow.start_run(run_id=known.read_text(encoding="utf-8"))
        else:
            run = self._mlflow.start_run(run_name=_run_name(directory))
            known.write_text(run.info.run_id, encoding="utf-8")
            self._mlflow.log_params(dict(settings))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


def _run_name(directory: Path) -> str:
    return directory.absolute().parent.name


_OPENERS: dict[str, Callable[[Path, Mapping[str, object], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}
