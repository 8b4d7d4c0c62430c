"""What each process of the distributed test runs; a module, so that it can be spawned."""

import torch
import torch.distributed as dist

from reasonembed.redapter.loss import LossOutput, ri_info_nce
from reasonembed.redapter.step import LocalBatch, contrastive_step

QUERIES, GROUP, WIDTH, DIM = 8, 3, 5, 12


def make_encoder(*, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(1)
    layers = [
        torch.nn.Embedding(50, DIM),
        torch.nn.Linear(DIM, DIM),
        torch.nn.Tanh(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(DIM, DIM),
    ]
    return torch.nn.Sequential(*layers)


def encode(model: torch.nn.Module, batch: list[tuple[int, ...]]) -> torch.Tensor:
    vectors = torch.stack([model(torch.tensor(ids)).mean(dim=0) for ids in batch])
    return torch.nn.functional.normalize(vectors, dim=-1)


def make_batch() -> LocalBatch:
    made = torch.Generator().manual_seed(2)

    def texts(count: int) -> list[tuple[int, ...]]:
        lengths = torch.randint(1, WIDTH, (count,), generator=made).tolist()
        return [tuple(torch.randint(0, 50, (n,), generator=made).tolist()) for n in lengths]

    return LocalBatch(texts(QUERIES), texts(QUERIES), texts(QUERIES * GROUP))


def share(batch: LocalBatch, rank: int, world_size: int) -> LocalBatch:
    n = QUERIES // world_size
    own = slice(rank * n, (rank + 1) * n)
    docs = slice(rank * n * GROUP, (rank + 1) * n * GROUP)
    return LocalBatch(batch.queries[own], batch.rewritten_queries[own], batch.passages[docs])


def global_loss(
    query_BD: torch.Tensor, rewritten_BD: torch.Tensor, doc_MD: torch.Tensor
) -> LossOutput:
    return ri_info_nce(
        query_BD,
        rewritten_BD,
        doc_MD,
        torch.arange(QUERIES) * GROUP,
        temperature=0.1,
        cap=5.0,
        epsilon=1e-6,
        is_weighted=True,
    )


def step(
    *, rank: int = 0, world_size: int = 1, chunk_texts: int = 1000, dropout: float = 0.0
) -> tuple[LossOutput, list[torch.Tensor]]:
    model = make_encoder(dropout=dropout)
    parameters = list(model.parameters())
    output = contrastive_step(
        lambda ids: encode(model, ids),
        share(make_batch(), rank, world_size),
        global_loss=global_loss,
        parameters=parameters,
        chunk_texts=chunk_texts,
        seed=3,
    )
    return output, [parameter.grad for parameter in parameters]


def run(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    output, gradients = step(rank=rank, world_size=world_size, chunk_texts=4)
    torch.save({"output": vars(output), "gradients": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
