"""What each process of the validation test runs; a module, so that it can be spawned."""

import torch
import torch.distributed as dist

from reasonembed.config import TrainConfig, TrainRuntime
from reasonembed.redapter.batches import samples_from_rows
from reasonembed.redapter.loop import train
from reasonembed.redapter.validate import HeldOut
from tests.embedder.tiny import encoder_config
from tests.redapter.samples import sample_rows


def run(checkpoint, folder, *, sharding="none", rank=0, world_size=1):
    """Metrics of each step of a run whose weights are cut over its workers, or not."""
    rows = sample_rows(count=13)
    config = TrainConfig.model_validate(
        {
            "encoder": encoder_config(checkpoint),
            "batch_queries": 4,
            "group_size": 3,
            "max_steps": 3,
            "learning_rate": 0.03,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
            "validate_every": 2,
            "keep": "best",
        }
    )
    metrics = []
    train(
        config,
        samples_from_rows(rows[:8]),
        weights=checkpoint,
        # Held-out texts fall into several batches, of which the workers get unequally many.
        runtime=TrainRuntime(threads=1, sharding=sharding, chunk_tokens=200),
        output_dir=folder,
        report=lambda found, _: metrics.append(found),
        held_out=[HeldOut(sample, None) for sample in samples_from_rows(rows[8:])],
        rank=rank,
        world_size=world_size,
    )
    return metrics


def in_group(rank, world_size, checkpoint, folder):
    """The same in one of several processes; its metrics are saved."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    found = run(checkpoint, folder, sharding="fsdp", rank=rank, world_size=world_size)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
