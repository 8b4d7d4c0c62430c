"""One exact step over a global batch that need not fit into memory (GradCache, arXiv:2101.06983).

The steps: embed local texts chunk by chunk without a graph; gather every worker's vectors; compute
the identical global loss on each worker; take its gradient with respect to the own vectors; embed
each chunk again with a graph and hand it its share of that gradient; sum over workers.

Scale: each worker holds ∂L/∂(own vectors) of the one global L, so the parameter gradients must be
SUMMED, which gives exactly ∇L for any number of workers. Averaging them, as DDP does and the
released code inherits, gives ∇L / workers; Adam hides that, clipping at norm 1 does not.

Shape legend: N local texts, B global queries, M global passages, D dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from reasonembed.embedder.tokenisation import TokenIds
from reasonembed.redapter.loss import LossOutput
from reasonembed.schemas import row_seed

Encode = Callable[[Sequence[TokenIds]], Tensor]
GlobalLoss = Callable[[Tensor, Tensor, Tensor], LossOutput]


@dataclass(frozen=True)
class LocalBatch:
    """Token ids of a worker's share; every group's passages lie together, positive first."""

    queries: list[TokenIds]
    rewritten_queries: list[TokenIds]
    passages: list[TokenIds]

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(len, [*self.queries, *self.rewritten_queries, *self.passages]))


def contrastive_step(
    encode: Encode,
    batch: LocalBatch,
    *,
    global_loss: GlobalLoss,
    parameters: Sequence[torch.nn.Parameter],
    chunk_texts: int,
    seed: int,
) -> LossOutput:
    """Adds the gradient of the global loss to `parameters` on every worker.

    Args:
        encode: Token ids to vectors [n, D]; differentiable, may draw random numbers (dropout).
        batch: This worker's share, of equal size on all workers.
        global_loss: From query_BD, rewritten_BD, doc_MD of all workers in rank order. Must be
            deterministic, so that all workers agree.
        parameters: What is trained; others may have no gradient.
        chunk_texts: Texts a forward pass. If all fit into one, the second forward is left out.
        seed: Of this step and worker; seeds each chunk, so that both forward passes of a chunk
            draw the same dropout masks.

    Returns:
        The global loss; all fields detached.
    """
    texts = [*batch.queries, *batch.passages]
    chunks = _chunks(texts, chunk_texts=chunk_texts)
    has_graph = len(chunks) == 1
    with torch.set_grad_enabled(has_graph):
        local_ND = _encode_chunks(encode, texts, chunks, seed=seed)
    with torch.no_grad():
        rewritten_ND = _encode_chunks(
            encode,
            batch.rewritten_queries,
            _chunks(batch.rewritten_queries, chunk_texts=chunk_texts),
            seed=row_seed(seed, "rewritten"),
        )
    output, gradient_ND = _global_gradient(
        local_ND.detach(), rewritten_ND, num_queries=len(batch.queries), global_loss=global_loss
    )
    if has_graph:
        local_ND.backward(gradient_ND)  # type: ignore[no-untyped-call]
    else:
        for number, chunk in enumerate(chunks):
            vectors = _encode_chunk(encode, texts, chunk, seed=row_seed(seed, number))
            vectors.backward(gradient_ND[chunk])  # type: ignore[no-untyped-call]
    sum_gradients(parameters)
    return output


def _chunks(texts: Sequence[TokenIds], *, chunk_texts: int) -> list[list[int]]:
    # Of similar length, so that little is padded.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    return [order[start : start + chunk_texts] for start in range(0, len(order), chunk_texts)]


def _encode_chunk(
    encode: Encode, texts: Sequence[TokenIds], chunk: Sequence[int], *, seed: int
) -> Tensor:
    torch.manual_seed(seed)
    return encode([texts[i] for i in chunk])


def _encode_chunks(
    encode: Encode, texts: Sequence[TokenIds], chunks: Sequence[Sequence[int]], *, seed: int
) -> Tensor:
    parts = [
        _encode_chunk(encode, texts, chunk, seed=row_seed(seed, number))
        for number, chunk in enumerate(chunks)
    ]
    order = torch.tensor([index for chunk in chunks for index in chunk], device=parts[0].device)
    return torch.cat(parts)[order.argsort()]


def _global_gradient(
    local_ND: Tensor, rewritten_ND: Tensor, *, num_queries: int, global_loss: GlobalLoss
) -> tuple[LossOutput, Tensor]:
    query_BD = _gather(local_ND[:num_queries]).requires_grad_()
    doc_MD = _gather(local_ND[num_queries:]).requires_grad_()
    output = global_loss(query_BD, _gather(rewritten_ND), doc_MD)
    query_gradient_BD, doc_gradient_MD = torch.autograd.grad(output.loss, (query_BD, doc_MD))
    rank = dist.get_rank() if _is_distributed() else 0
    num_docs = len(local_ND) - num_queries
    own = [
        query_gradient_BD[rank * num_queries : (rank + 1) * num_queries],
        doc_gradient_MD[rank * num_docs : (rank + 1) * num_docs],
    ]
    detached = LossOutput(**{name: value.detach() for name, value in vars(output).items()})
    return detached, torch.cat(own)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _gather(local_ND: Tensor) -> Tensor:
    """Rows of all workers in rank order, without a graph."""
    if not _is_distributed():
        return local_ND.detach().clone()
    parts = [torch.empty_like(local_ND) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, local_ND.contiguous())
    return torch.cat(parts)


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Adds up every worker's gradients, in place; a parameter without one counts as zero."""
    if not _is_distributed():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([gradient.reshape(-1).float() for gradient in gradients])
    dist.all_reduce(flat)  # one message: adapters are many small tensors
    sizes = [p.numel() for p in parameters]
    for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter.dtype)
