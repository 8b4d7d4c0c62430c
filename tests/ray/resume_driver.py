"""A driver that trains on Ray and whose workers can be told to die; see `test_train_resume`.

python -m tests.ray.resume_driver SETTINGS.json
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray_jobs.train import in_worker, trainer
from reasonembed.config import TrainConfig, TrainRuntime
from reasonembed.redapter.loop import train
from reasonembed.redapter.stepping import Report
from reasonembed.redapter.trackers import Trackers
from reasonembed.storage import Place, append_json_line
from tests.embedder.tiny import encoder_config
from tests.redapter.samples import samples

QUERIES, BATCH = 40, 5


def settings(checkpoint: Path, **changes: Any) -> tuple[TrainConfig, TrainRuntime]:
    config = {
        "encoder": encoder_config(checkpoint),
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
        "batch_queries": BATCH,
        "group_size": 3,
        "epochs": 2,
        "temperature": 0.1,
        "learning_rate": 1e-2,
        "intensity_start_step": 4,
    }
    runtime = {"num_cpus": 1, "threads": 1, "chunk_tokens": 40, "checkpoint_every": 3}
    return TrainConfig.model_validate(config), TrainRuntime.model_validate(runtime | changes)


def worker(payload: dict[str, dict[str, Any]]) -> None:
    """One worker: notes the ids of each batch, and kills itself where it is told to."""
    told = payload["payload"]
    folder, rank = Path(told["folder"]), ray.train.get_context().get_world_rank()
    config, runtime = settings(Path(told["checkpoint"]), **told["runtime"])

    def loop(*, report: Report, **given: Any) -> None:
        def report_or_die(metrics: dict[str, float], saved: Any) -> None:
            report(metrics, saved)
            time.sleep(float(told["slow_s"]))
            _die(told, step=int(metrics["step"]), rank=rank)

        train(
            config,
            samples(count=QUERIES),
            weights=Path(told["checkpoint"]),
            runtime=runtime,
            report=report_or_die,
            observe=partial(_note, folder) if rank == 0 else None,
            **given,
        )

    storage = Place(folder)
    in_worker(
        loop, storage=storage, folder=folder, trackers=Trackers((), directory=folder, settings={})
    )


def _note(folder: Path, step: int, groups: Any, _: Any) -> None:
    ids = [group.sample.query_id for group in groups]
    world_size = ray.train.get_context().get_world_size()
    append_json_line(folder / "ids.jsonl", {"step": step, "ids": ids, "workers": world_size})


def _die(told: dict[str, Any], *, step: int, rank: int) -> None:
    """Once in all attempts."""
    done = Path(told["folder"]) / f"died-{told['die_at']}"
    if step == told["die_at"] and rank == told["victim"] and not done.exists():
        done.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    told = json.loads(Path(sys.argv[1]).read_text())
    address = os.environ.get("RAY_ADDRESS")
    local = {} if address else {"num_cpus": 3, "object_store_memory": 100_000_000}
    ray.init(address=address, include_dashboard=None if address else False, **local)
    _, runtime = settings(Path(told["checkpoint"]), **told["runtime"])
    trainer(worker, told, runtime=runtime, storage=Place(told["folder"])).fit()


if __name__ == "__main__":
    main()
