"""A chat model in a few kilobytes, conversations for it, and one step that can run in a worker."""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from reasonembed.config import DistillConfig, TrainRuntime
from reasonembed.embedder.contract import load_tokenizer
from reasonembed.redapter import sft
from reasonembed.redapter.sft import ChatTokenizer, Example
from tests.embedder.tiny import save_checkpoint

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}: {{ message['content'] }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SUBJECTS = ("dictionary", "loop", "set", "mapping", "query", "order", "keys", "task", "insertion")


def save_student_checkpoint(folder: Path) -> Path:
    save_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    # Rotary positions need no weights, and an annotation prompt is long for a small vocabulary.
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    return folder


def config(**changes: object) -> DistillConfig:
    values: dict[str, object] = {
        "llm": {"model": "scripted", "engine": "scripted"},
        "student": "tiny",
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
        "epochs": 2,
        "learning_rate": 1e-2,
        "batch_tokens": 200,
        "dtype": "float32",
    }
    return DistillConfig.model_validate(values | changes)


def examples(checkpoint: Path) -> list[Example]:
    tokenizer = ChatTokenizer(checkpoint)
    return [
        tokenizer.example(
            f"why does a {subject} " * (1 + i % 3),
            answer=f"what follows {subject} while " * (1 + i % 4),
        )
        for i, subject in enumerate(SUBJECTS)
    ]


def step(
    checkpoint: Path,
    *,
    rank: int = 0,
    world_size: int = 1,
    chunk_tokens: int = 10_000,
    texts: int = 9,
    runtime: TrainRuntime | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    placed = sft._prepare(config(lora=None), checkpoint, runtime or TrainRuntime()).placed
    loss = sft.sft_step(
        lambda batch: sft.answer_loss(placed.model, batch),
        examples(checkpoint)[:texts],
        parameters=placed.parameters,
        chunk_tokens=chunk_tokens,
        seed=3,
        reduction=placed.reduction,
        rank=rank,
        world_size=world_size,
    )
    return loss, [whole(p.grad) for p in placed.parameters]


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def run(rank: int, world_size: int, checkpoint: Path, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    for sharding in ("none", "fsdp"):
        runtime = TrainRuntime.model_validate({"sharding": sharding})
        for texts in (9, 1):  # with one text, the second worker has nothing to do
            loss, gradients = step(
                checkpoint,
                rank=rank,
                world_size=world_size,
                chunk_tokens=60,
                texts=texts,
                runtime=runtime,
            )
            found = {"loss": loss, "gradients": gradients}
            torch.save(found, f"{folder}/{rank}-{texts}-{sharding}.pt")
    dist.destroy_process_group()
