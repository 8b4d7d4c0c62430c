"""Fine-tunes the backbone with Ray Train; a new driver goes on from the last checkpoint."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from ray_jobs.job import Job, main
from reasonembed.artifacts import append_json_line, digest, json_lines
from reasonembed.config import TrainConfig, TrainRuntime
from reasonembed.models import resolve
from reasonembed.redapter.batches import BatchPlan, read_samples
from reasonembed.redapter.loop import train as train_loop
from reasonembed.redapter.stepping import Metrics
from reasonembed.remixer.formats import finished_samples
from reasonembed.run import Run

KEPT_CHECKPOINTS = 2


@dataclass(frozen=True)
class _Payload:
    """What a training worker gets; small, the samples are read where they are needed."""

    config: TrainConfig
    runtime: TrainRuntime
    run: Run
    steps: int


def _worker(payload: dict[str, _Payload]) -> None:
    work = payload["payload"]
    weights = resolve(work.config.encoder.model, cache_dir=work.run.config.runtime.cache_dir)
    samples = read_samples(work.run.artifact("samples").parts())
    in_worker(
        partial(train_loop, work.config, samples, weights=weights, runtime=work.runtime),
        log=work.run.dir / "train" / "log.jsonl",
        steps=work.steps,
        runtime=work.runtime,
    )


def in_worker(loop: Callable[..., object], *, log: Path, steps: int, runtime: TrainRuntime) -> None:
    """Runs a training loop in a worker of Ray Train: its log, its checkpoints, where it goes on.

    Args:
        loop: Called with `output_dir`, `report`, `resume_from`, `rank` and `world_size`, as
            `redapter.loop.train` takes them.
        log: Written by the first worker.
        steps: How many the loop does in all.
        runtime: How often it saves.
    """
    context = ray.train.get_context()
    rank = context.get_world_rank()
    lines = TrainLog(log) if rank == 0 else None

    def report(metrics: Metrics, checkpoint: Path | None) -> None:
        if lines:
            lines.append(metrics)
        done = int(metrics["step"]) + 1
        # A report is a barrier of all workers, so it is made where a checkpoint is, not each step.
        if done % runtime.checkpoint_every == 0 or done == steps:
            saved = ray.train.Checkpoint.from_directory(checkpoint) if checkpoint else None
            ray.train.report(metrics, checkpoint=saved, delete_local_checkpoint_after_upload=True)

    def start(resume_from: Path | None) -> None:
        loop(
            output_dir=Path(tempfile.mkdtemp(prefix="redapter-")),
            report=report,
            resume_from=resume_from,
            rank=rank,
            world_size=context.get_world_size(),
        )

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        start(None)
    else:
        with checkpoint.as_directory() as folder:
            start(Path(folder))


class TrainLog:
    """One JSON line a step; after a restart a step may stand twice, and the later line counts."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, metrics: Metrics) -> None:
        """Adds a step."""
        append_json_line(self._path, dict(metrics))

    def steps(self) -> list[dict[str, Any]]:
        """The log in order of steps."""
        by_step = {row["step"]: row for row in json_lines(self._path)}
        return [by_step[step] for step in sorted(by_step)]


def run(job: Job) -> dict[str, Any]:
    """Writes `train/adapter`."""
    directory = job.run.directory("train")
    config, runtime = job.run.config.train, job.run.config.runtime.train
    samples = read_samples(finished_samples(job.run.dir).parts())
    plan = BatchPlan(samples, config, num_workers=runtime.num_workers)
    steps = plan.total_steps
    job.run.begin("train", directory)
    if (finished := directory.finished()) is not None:
        return finished
    log = TrainLog(job.run.dir / "train" / "log.jsonl")
    payload = _Payload(config, runtime, job.run, steps)
    with job.reporter.watching("train", total=steps, done=lambda: len(log.steps()), unit="steps"):
        result = trainer(_worker, payload, runtime=runtime, storage=job.run.dir / "train").fit()
    assert result.checkpoint is not None, "training ended without a checkpoint"
    adapter = job.run.dir / "train" / "adapter"
    result.checkpoint.to_directory(str(adapter))
    last = log.steps()[-1]
    summary = {
        "samples": len(samples),
        "steps": steps,
        "loss": round(last["loss"], 4),
        "adapter": digest(adapter / "adapter_model.safetensors"),
    }
    directory.finish(summary)
    return summary


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
    per_worker = {"CPU": runtime.num_cpus} | ({"GPU": 1.0} if runtime.use_gpu else {})
    return TorchTrainer(
        worker,
        train_loop_config={"payload": payload},
        torch_config=TorchConfig(backend="nccl" if runtime.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=runtime.num_workers,
            use_gpu=runtime.use_gpu,
            resources_per_worker=per_worker,
        ),
        run_config=RunConfig(
            # The same name in the same place is what lets a new driver go on from the old one's
            # checkpoints.
            name="checkpoints",
            storage_path=str(storage.absolute()),
            failure_config=FailureConfig(max_failures=runtime.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=KEPT_CHECKPOINTS),
        ),
    )


if __name__ == "__main__":
    main(run, stage="train", description=__doc__)
