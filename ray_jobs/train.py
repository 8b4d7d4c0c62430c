"""Fine-tunes the backbone with Ray Train; a new driver goes on from the last checkpoint."""

import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import (
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    PreemptionInfo,
    RunConfig,
    ScalingConfig,
)
from ray.train.collective import broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer

from ray_jobs.job import Job, main
from ray_jobs.pools import training_options
from reasonembed.artifacts import Artifact
from reasonembed.config import TrainConfig, TrainRuntime, flatten
from reasonembed.logs import WorkerLog
from reasonembed.models import resolve
from reasonembed.redapter.batches import BatchPlan, read_samples
from reasonembed.redapter.best import best_record, link_best
from reasonembed.redapter.checkpoints import Saved
from reasonembed.redapter.log import SampleLog, TrainLog
from reasonembed.redapter.loop import train as train_loop
from reasonembed.redapter.stepping import Metrics
from reasonembed.redapter.trackers import Trackers, require
from reasonembed.redapter.validate import read_held_out
from reasonembed.remixer.formats import finished_samples
from reasonembed.run import Run
from reasonembed.schemas import stable_hash
from reasonembed.storage import Place

KEPT_CHECKPOINTS = 2
_CHECKPOINTS = "checkpoints"
_WEIGHTS, _BEST = "weights", "best"
_CONTINUED = ("log.jsonl", "samples.jsonl", "mlflow_run.txt")
_LOG_S = 30.0  # how often the log reaches an object store, for whoever watches
_MAX_FAILURES = 3
_MAX_FAILURES_ELASTIC = 10  # a machine that goes without announcement is one, too


@dataclass(frozen=True)
class _Payload:
    """What a training worker gets; small, the samples are read where they are needed."""

    config: TrainConfig
    runtime: TrainRuntime
    run: Run
    until: float


def _worker(payload: dict[str, _Payload]) -> None:
    work = payload["payload"]
    WorkerLog(work.run.name, "train").start()
    weights = resolve(work.config.encoder.model, cache_dir=work.run.config.runtime.cache_dir)
    samples, storage = work.run.artifact("samples"), work.run.place / "train"
    folder = working_folder(work.run, "train")
    is_first = ray.train.get_context().get_world_rank() == 0
    in_worker(
        partial(
            train_loop,
            work.config,
            read_samples(samples.parts()),
            weights=weights,
            runtime=work.runtime,
            held_out=read_held_out(samples.parts(), work.config),
            observe=SampleLog(folder / "samples.jsonl").append if is_first else None,
        ),
        storage=storage,
        folder=folder,
        trackers=Trackers(
            work.runtime.trackers,
            directory=folder,
            settings=flatten(work.config, prefix="train"),
        ),
        until=work.until,
    )


def working_folder(run: Run, name: str) -> Path:
    """Where a worker of Ray Train writes what is kept in the folder `name` of the run.

    That folder itself where it lies on a disk. Of a run in an object store one of the worker's own,
    in which the first worker finds the logs as they were kept last.
    """
    place = run.place / name
    if place.is_local:
        return place.local
    rank = ray.train.get_context().get_world_rank()
    folder = run.scratch / f"{name}-{rank}"
    shutil.rmtree(folder, ignore_errors=True)
    (folder / _CHECKPOINTS).mkdir(parents=True)
    if rank == 0:
        for name in _CONTINUED:
            (place / name).fetch(folder / name)
    return folder


def in_worker(
    loop: Callable[..., object],
    *,
    storage: Place,
    folder: Path,
    trackers: Trackers,
    until: float = math.inf,
) -> None:
    """Runs a training loop in a worker of Ray Train: its log, its checkpoints, where it goes on.

    Args:
        loop: Called with `output_dir`, `report`, `resume_from`, `is_leaving`, `rank`, `world_size`
            and `is_shared`, as `redapter.loop.train` takes them.
        storage: The stage's directory, as given to `trainer`.
        folder: Of `working_folder`; receives `log.jsonl`.
        trackers: Get each step as the log does.
        until: Seconds since 1970 after which the loop ends by a checkpoint; the driver finds fewer
            steps in the log than were planned.
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    lines = TrainLog(folder / "log.jsonl") if rank == 0 else None
    kept = None if storage.is_local else _Kept(folder, storage, is_first=rank == 0)
    announcements = Announcements(until)

    def report(metrics: Metrics, saved: Saved | None) -> None:
        if lines:
            lines.append(metrics)
        if saved is not None:
            _register(metrics, saved, kept)
        elif kept is not None:
            kept.log_now_and_then()
        # Last, for a tracker may wait for its server, and a machine that leaves does not.
        if lines:
            trackers.write(metrics)
        if announcements.is_over:
            raise _Over

    def start(resume_from: Path | None) -> None:
        loop(
            output_dir=folder / _CHECKPOINTS,
            report=report,
            resume_from=resume_from,
            is_leaving=announcements,
            rank=rank,
            world_size=context.get_world_size(),
            is_shared=kept is None,
        )

    with suppress(_Over), _last_checkpoint() as found:
        if found is not None and kept is not None and (found / _BEST).is_dir():
            shutil.copytree(found / _BEST, folder / _CHECKPOINTS, dirs_exist_ok=True)
        start(found)
    trackers.close()
    if kept is not None:
        kept.result()


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
    else:
        with checkpoint.as_directory() as found:
            yield Path(found)


class _Kept:
    """Brings what a worker writes in its own folder to the stage's place in an object store.

    A checkpoint takes with it whatever a run that goes on from it needs: the best weights so far.
    """

    def __init__(self, folder: Path, storage: Place, *, is_first: bool) -> None:
        self._folder, self._storage, self._is_first = folder, storage, is_first
        self._uploader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="log")
        self._uploading: Future[None] | None = None
        self._uploaded = time.monotonic()
        self._one_at_a_time = threading.Lock()

    def best(self, saved: Saved) -> Path:
        """Holds on to the best weights as they are when a checkpoint begins."""
        held = self._folder / _CHECKPOINTS / f".{saved.path.name}-{_BEST}"
        if self._is_first:
            shutil.rmtree(held, ignore_errors=True)
            link_best(self._folder / _CHECKPOINTS, held)
        return held

    def checkpoint(self, saved: Saved, best: Path) -> ray.train.Checkpoint:
        """Puts this worker's part of a checkpoint there, and what the logs say until now."""
        saved.wait()
        if best.is_dir():
            best.rename(saved.path / _BEST)
        target = self._storage / _CHECKPOINTS / saved.path.name
        target.put(saved.path)
        self.logs()
        return ray.train.Checkpoint(target.path, filesystem=target.fs)

    def log_now_and_then(self) -> None:
        """The log alone, so that a long way between checkpoints can be watched."""
        is_busy = self._uploading is not None and not self._uploading.done()
        if self._is_first and not is_busy and time.monotonic() - self._uploaded > _LOG_S:
            self._uploaded = time.monotonic()
            self._uploading = self._uploader.submit(self._put, "log.jsonl")

    def logs(self) -> None:
        """Everything but checkpoints and weights."""
        if self._is_first:
            for child in self._folder.iterdir():
                if child.name != _CHECKPOINTS:
                    self._put(child.name)

    def result(self) -> None:
        """The trained weights, and the logs to their end.

        The folder stays, for the last checkpoint may still be on its way from there; the worker
        that comes next clears it.
        """
        self._uploader.shutdown()
        checkpoints, weights = self._folder / _CHECKPOINTS, self._folder / _CHECKPOINTS / _WEIGHTS
        if self._is_first:
            self.logs()
            if (checkpoints / "best.json").is_file():
                (self._storage / _CHECKPOINTS / "best.json").put(checkpoints / "best.json")
            if weights.is_dir():
                (self._storage / _WEIGHTS).delete()
                (self._storage / _WEIGHTS).put(weights)

    def _put(self, name: str) -> None:
        with self._one_at_a_time:
            (self._storage / name).put(self._folder / name)


def _register(metrics: Metrics, saved: Saved, kept: _Kept | None) -> None:
    """Tells Ray Train of a checkpoint, which counts from when all workers have written it.

    On a disk that all see, they write into its place at once, so nothing is uploaded: the "upload"
    is the waiting.
    """
    best = kept.best(saved) if kept is not None else None

    def when_whole(given: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
        if kept is not None and best is not None:
            return kept.checkpoint(saved, best)
        saved.wait()
        return given

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(saved.path),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=when_whole,
        delete_local_checkpoint_after_upload=kept is not None,
    )


class _Over(Exception):
    """The time is over, and the checkpoint is there; Ray must not take it for a failure."""


class Announcements:
    """Says of each announcement once that machines are about to go; the same on all workers.

    Args:
        until: Seconds since 1970 after which they are to go, whatever the cloud says.
    """

    def __init__(self, until: float = math.inf) -> None:
        self._until = until
        self._heard: PreemptionInfo | None = None
        self.is_over = False

    def __call__(self) -> bool:
        """To be asked equally often by all workers; they wait for each other in it."""
        announced = ray.train.get_preemption_info()
        is_new = announced is not None and announced != self._heard
        self._heard = announced
        if not math.isinf(self._until):  # one clock for all, or some would go on alone
            self.is_over = broadcast_from_rank_zero(time.time() >= self._until)
        return is_new or self.is_over


def run(job: Job) -> dict[str, Any]:
    """Writes `train/weights`."""
    directory, samples = job.run.directory("train"), finished_samples(job.run.place)
    config, runtime = job.run.config.train, job.run.config.runtime.train
    made, finished = directory.stage(), directory.finished()
    if made and made.identity == job.run.identity("train") and finished is not None:
        return finished
    num_samples, steps = _planned(job, samples)
    job.run.begin("train", directory)  # not before: what is refused discards nothing
    storage, log = job.run.place / "train", watched_log(job.run, "train")
    payload = _Payload(config, runtime, job.run, until=until(job))
    with job.reporter.watching(
        "train", total=steps, done=lambda: len(log.steps()), unit="steps", note=log.summary
    ):
        result = trainer(_worker, payload, runtime=runtime, storage=storage).fit()
    check_finished(job, result, steps=steps)
    weights = storage / _WEIGHTS
    if storage.is_local:  # else the first worker has put them there
        shutil.rmtree(weights.local, ignore_errors=True)
        (storage / _CHECKPOINTS / _WEIGHTS).local.rename(weights.local)
    last = log.steps()[-1]
    best = best_record(storage / _CHECKPOINTS)
    files = [child for child in weights.children() if child.name.endswith(".safetensors")]
    summary = {
        "samples": num_samples,
        "steps": steps,
        "step kept": best.step if best else steps,
        "loss": round(last["loss"], 4),
        "weights": stable_hash(*map(Place.digest, files)),
    }
    directory.finish(summary)
    return summary


def until(job: Job) -> float:
    """When the money of a job is spent, in seconds since 1970."""
    return math.inf if job.budget is None else job.budget.lasts_until()


def check_finished(job: Job, result: ray.train.Result, *, steps: int) -> None:
    """Ends a stage whose training had to end before its last step.

    Raises:
        BudgetError: It had.
    """
    # The last checkpoint's, for an earlier attempt may have logged more steps than it has saved.
    last = (result.metrics or {}).get("step", steps)
    if job.budget is not None and last + 1 < steps:
        raise job.budget.reached()


def watched_log(run: Run, name: str) -> TrainLog:
    """The log of a training in the folder `name` of the run, for the driver."""
    place = run.place / name / "log.jsonl"
    if place.is_local:
        return TrainLog(place.local)
    return TrainLog(run.scratch / "watched" / name / "log.jsonl", source=place)


def _planned(job: Job, artifact: Artifact) -> tuple[int, int]:
    """How many samples and steps there are; what cannot be trained is refused here, not there.

    Numbers alone, for all samples are gigabytes, and the driver waits for as long as they train.
    """
    config, runtime = job.run.config.train, job.run.config.runtime.train
    require(runtime.trackers)
    read_held_out(artifact.parts(), config)
    samples = read_samples(artifact.parts())
    plan = BatchPlan(samples, config, num_workers=runtime.num_workers)
    for note in plan.notes():
        job.reporter.say(f"      {note}")
    return len(samples), plan.total_steps


def trainer(
    worker: Callable[[dict[str, Any]], None],
    payload: object,
    *,
    runtime: TrainRuntime,
    storage: Place,
) -> TorchTrainer:
    """Workers that train together and go on from the last checkpoint in `storage`.

    Args:
        worker: Runs in each of them; gets `{"payload": payload}`.
        payload: Small and picklable.
        runtime: How many workers, and what each holds.
        storage: The stage's directory.
    """
    for name, value in _environment(runtime).items():
        os.environ.setdefault(name, value)
    return TorchTrainer(
        worker,
        train_loop_config={"payload": payload},
        torch_config=TorchConfig(backend="nccl" if runtime.use_gpu else "gloo"),
        scaling_config=ScalingConfig(**training_options(runtime)),
        run_config=RunConfig(
            # The same name in the same place is what lets a new driver go on from the old one's
            # checkpoints.
            name=_CHECKPOINTS,
            storage_path=storage.path,
            storage_filesystem=None if storage.is_local else storage.fs,
            # Machines that announce it may go as often as they like. Others look like errors to
            # Ray, and errors may not come for ever.
            failure_config=FailureConfig(
                max_failures=_max_failures(runtime), max_preemption_failures=-1
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )


def _max_failures(runtime: TrainRuntime) -> int:
    if runtime.max_failures is not None:
        return runtime.max_failures
    return _MAX_FAILURES if runtime.min_workers is None else _MAX_FAILURES_ELASTIC


def _environment(runtime: TrainRuntime) -> dict[str, str]:
    """Where Ray Train's defaults hurt; what is set already counts."""
    is_elastic = runtime.min_workers is not None
    return {
        # So many workers or none: machines that are asked for take minutes to come, and after one
        # Ray would begin anew. Elastic: Ray counts a machine that has just gone for a while, waits
        # for it, and looks how many there are when this time is over.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30" if is_elastic else "900",
        # Some clouds announce half a minute ahead, and the checkpoint needs its part of that.
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "2",
    }


if __name__ == "__main__":
    main(run, stage="train", description=__doc__)
