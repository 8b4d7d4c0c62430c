"""What each process of the sharding tests runs; a module, so that it can be spawned."""

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from reasonembed.config import TrainConfig, TrainRuntime
from reasonembed.redapter import loop
from reasonembed.redapter.batches import BatchPlan
from reasonembed.redapter.workers import all_true
from tests.embedder.tiny import encoder_config
from tests.redapter.chat_student import whole
from tests.redapter.samples import samples

LORA = {"rank": 4, "alpha": 8, "dropout": 0.0}
# Five queries: shares differ between workers, and so does the number of their chunks.
CASES = {
    "lora": {"lora": LORA},
    "lora in chunks": {"lora": LORA, "chunk_tokens": 40},
    "all weights": {"lora": None},
    "all weights in chunks": {"lora": None, "chunk_tokens": 40},
    "activations computed again": {
        "lora": None,
        "chunk_tokens": 40,
        "activation_checkpointing": True,
    },
    "bfloat16": {"lora": LORA, "chunk_tokens": 40, "dtype": "bfloat16"},
}
RUN = {"lora": LORA, "chunk_tokens": 40}
# A smaller rate, so that rounding stays small when every weight moves.
ALL = {"lora": None, "learning_rate": 1e-3}
STEPS = 3


def cases(world_size):
    """All for two workers, and for more those in which shares and chunks differ most."""
    return [name for name in CASES if world_size == 2 or name.endswith("in chunks")]


def settings(checkpoint, changes, *, sharding="none"):
    values = dict(changes)
    runtime = {
        name: values.pop(name)
        for name in ("chunk_tokens", "activation_checkpointing", "compile")
        if name in values
    }
    config = {
        "encoder": encoder_config(checkpoint, dtype=values.pop("dtype", "float32")),
        "batch_queries": 5,
        "group_size": 3,
        "max_steps": 6,
        "intensity_start_step": 1,
        "temperature": 0.1,
        "learning_rate": 1e-2,
    }
    return (
        TrainConfig.model_validate(config | values),
        TrainRuntime.model_validate(
            {"threads": 1, "checkpoint_every": 2, "sharding": sharding} | runtime
        ),
    )


def steps(checkpoint, changes, *, sharding="none", rank=0, world_size=1):
    """Metrics of some steps, the gradient of the last one, and the weights after it."""
    config, runtime = settings(checkpoint, changes, sharding=sharding)
    plan = BatchPlan(samples(), config, num_workers=world_size)
    state = loop._prepare(config, checkpoint, runtime)
    metrics = [
        loop._one_step(
            config,
            plan,
            state,
            step,
            runtime=runtime,
            rank=rank,
            world_size=world_size,
            observe=None,
        )
        for step in range(STEPS)
    ]
    return {
        "metrics": metrics,
        "gradients": {name: whole(p.grad) for name, p in state.placed.learnt.items()},
        "weights": {name: whole(p.detach()) for name, p in state.placed.learnt.items()},
    }


def train(
    checkpoint,
    folder,
    *,
    changes=RUN,
    sharding="none",
    rank=0,
    world_size=1,
    resume_from=None,
    **more,
):
    """Metrics of all steps of a run, with the ids of each step's batch."""
    config, runtime = settings(checkpoint, changes, sharding=sharding)
    rows, ids = [], {}

    def observe(step, groups, output):
        ids[step] = [group.sample.query_id for group in groups]

    def report(metrics, saved):
        rows.append(metrics | {"ids": ids[metrics["step"]]})

    result = loop.train(
        config,
        samples(),
        weights=checkpoint,
        runtime=runtime,
        output_dir=folder,
        report=report,
        observe=observe,
        resume_from=resume_from,
        rank=rank,
        world_size=world_size,
        **more,
    )
    return result, rows


def run(rank, world_size, checkpoint, folder, resume_from, bert, bert_resume_from):
    """Everything that is looked at, in one group of processes: starting one takes seconds."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world_size}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    place = {"rank": rank, "world_size": world_size, "sharding": "fsdp"}
    found = {name: steps(checkpoint, CASES[name], **place) for name in cases(world_size)}
    _, found["resumed"] = train(
        checkpoint, folder / f"resumed-by-{world_size}", resume_from=resume_from, **place
    )
    cpu = torch.device("cpu")
    found["agreed"] = [all_true(rank != 1, device=cpu), all_true(True, device=cpu)]
    if world_size == 2:
        _, found["pooled"] = train(
            bert, folder / "pooled-by-2", resume_from=bert_resume_from, changes=ALL, **place
        )
    torch.save(found, folder / f"{world_size}-{rank}.pt")
    dist.destroy_process_group()


def die_while_saving(checkpoint, folder):
    """Trains until the second checkpoint, and dies when its data are written but not its index."""
    finish, calls = FileSystemWriter.finish, []

    def finish_or_die(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self, *arguments, **named)

    FileSystemWriter.finish = finish_or_die
    train(checkpoint, Path(folder))
