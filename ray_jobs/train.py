"""Fine-tunes the backbone with Ray Train; a new driver goes on from the last checkpoint."""

import os
import shutil
from collections.abc import Callable
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
from ray.train.torch import TorchConfig, TorchTrainer

from ray_jobs.job import Job, main
from reasonembed.artifacts import Artifact, digest
from reasonembed.config import TrainConfig, TrainRuntime, flatten
from reasonembed.models import resolve
from reasonembed.redapter.batches import BatchPlan, read_samples
from reasonembed.redapter.best import best_record
from reasonembed.redapter.checkpoints import Saved
from reasonembed.redapter.log import SampleLog, TrainLog
from reasonembed.redapter.loop import train as train_loop
from reasonembed.redapter.stepping import Metrics
from reasonembed.redapter.trackers import Trackers, require
from reasonembed.redapter.validate import read_held_out
from reasonembed.remixer.formats import finished_samples
from reasonembed.run import Run
from reasonembed.schemas import stable_hash

KEPT_CHECKPOINTS = 2
_CHECKPOINTS = "checkpoints"
_MAX_FAILURES = 3
_MAX_FAILURES_ELASTIC = 10  # a machine that goes without announcement is one, too


@dataclass(frozen=True)
class _Payload:
    """What a training worker gets; small, the samples are read where they are needed."""

    config: TrainConfig
    runtime: TrainRuntime
    run: Run


def _worker(payload: dict[str, _Payload]) -> None:
    work = payload["payload"]
    weights = resolve(work.config.encoder.model, cache_dir=work.run.config.runtime.cache_dir)
    samples, storage = work.run.artifact("samples"), work.run.dir / "train"
    is_first = ray.train.get_context().get_world_rank() == 0
    in_worker(
        partial(
            train_loop,
            work.config,
            read_samples(samples.parts()),
            weights=weights,
            runtime=work.runtime,
            held_out=read_held_out(samples.parts(), work.config),
            observe=SampleLog(storage / "samples.jsonl").append if is_first else None,
        ),
        storage=storage,
        trackers=Trackers(
            work.runtime.trackers,
            directory=storage,
            settings=flatten(work.config, prefix="train"),
        ),
    )


def in_worker(loop: Callable[..., object], *, storage: Path, trackers: Trackers) -> None:
    """Runs a training loop in a worker of Ray Train: its log, its checkpoints, where it goes on.

    Args:
        loop: Called with `output_dir`, `report`, `resume_from`, `is_leaving`, `rank` and
            `world_size`, as `redapter.loop.train` takes them.
        storage: The stage's directory, as given to `trainer`; receives `log.jsonl`.
        trackers: Get each step as the log does.
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    lines = TrainLog(storage / "log.jsonl") if rank == 0 else None

    def report(metrics: Metrics, saved: Saved | None) -> None:
        if lines:
            lines.append(metrics)
        if saved is not None:
            _register(metrics, saved)
        # Last, for a tracker may wait for its server, and a machine that leaves does not.
        if lines:
            trackers.write(metrics)

    def start(resume_from: Path | None) -> None:
        loop(
            output_dir=storage / _CHECKPOINTS,
            report=report,
            resume_from=resume_from,
            is_leaving=Announcements(),
            rank=rank,
            world_size=context.get_world_size(),
        )

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        start(None)
    else:
        with checkpoint.as_directory() as folder:
            start(Path(folder))
    trackers.close()


def _register(metrics: Metrics, saved: Saved) -> None:
    """Tells Ray Train of a checkpoint, which counts from when all workers have written it.

    They write into its place at once, so nothing is uploaded: the "upload" is the waiting.
    """

    def when_whole(given: ray.train.Checkpoint, _: str) -> ray.train.Checkpoint:
        saved.wait()
        return given

    ray.train.report(
        metrics,
        checkpoint=ray.train.Checkpoint.from_directory(saved.path),
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=when_whole,
        delete_local_checkpoint_after_upload=False,
    )


class Announcements:
    """Says of each announcement once that machines are about to go; the same on all workers."""

    def __init__(self) -> None:
        self._heard: PreemptionInfo | None = None

    def __call__(self) -> bool:
        """To be asked equally often by all workers; they wait for each other in it."""
        announced = ray.train.get_preemption_info()
        is_new = announced is not None and announced != self._heard
        self._heard = announced
        return is_new


def run(job: Job) -> dict[str, Any]:
    """Writes `train/weights`."""
    directory, samples = job.run.directory("train"), finished_samples(job.run.dir)
    config, runtime = job.run.config.train, job.run.config.runtime.train
    made, finished = directory.stage(), directory.finished()
    if made and made.identity == job.run.identity("train") and finished is not None:
        return finished
    num_samples, steps = _planned(job, samples)
    job.run.begin("train", directory)  # not before: what is refused discards nothing
    log = TrainLog(job.run.dir / "train" / "log.jsonl")
    payload = _Payload(config, runtime, job.run)
    with job.reporter.watching(
        "train", total=steps, done=lambda: len(log.steps()), unit="steps", note=log.summary
    ):
        trainer(_worker, payload, runtime=runtime, storage=job.run.dir / "train").fit()
    weights = job.run.dir / "train" / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    (job.run.dir / "train" / _CHECKPOINTS / "weights").rename(weights)
    last = log.steps()[-1]
    best = best_record(job.run.dir / "train" / _CHECKPOINTS)
    summary = {
        "samples": num_samples,
        "steps": steps,
        "step kept": best.step if best else steps,
        "loss": round(last["loss"], 4),
        "weights": stable_hash(*map(digest, sorted(weights.glob("*.safetensors")))),
    }
    directory.finish(summary)
    return summary


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
    storage: Path,
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
    least, most = runtime.min_workers, runtime.num_workers
    per_worker = {"CPU": runtime.num_cpus} | ({"GPU": 1.0} if runtime.use_gpu else {})
    return TorchTrainer(
        worker,
        train_loop_config={"payload": payload},
        torch_config=TorchConfig(backend="nccl" if runtime.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=most if least is None else (least, most),
            use_gpu=runtime.use_gpu,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            # The same name in the same place is what lets a new driver go on from the old one's
            # checkpoints.
            name=_CHECKPOINTS,
            storage_path=str(storage.absolute()),
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
