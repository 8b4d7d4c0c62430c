"""One exact step over a global batch that need not fit into memory (GradCache, arXiv:2101.06983).

The steps: embed local texts chunk by chunk without a graph; gather every worker's vectors; compute
the identical global loss on each worker; take its gradient with respect to the own vectors; embed
each chunk again with a graph and hand it its share of that gradient; sum over workers. The chunk
that is embedded last keeps its graph, so that K chunks cost 2K - 1 forward passes, and one chunk
costs one.

Rewritten queries q′ need no gradient: they join the pass without a graph, in chunks of their own,
so that both passes of a trained chunk draw the same dropout masks.

Scale: each worker holds ∂L/∂(own vectors) of the one global L, so the parameter gradients must be
SUMMED, which gives exactly ∇L for any number of workers. Averaging them, as DDP does and the
released code inherits, gives ∇L / workers; Adam hides that, clipping at norm 1 does not. See
`docs/training.md`.

Shape legend: N local texts, B global queries, M global passages, D dimension, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from reasonembed.embedder.tokenisation import TokenIds
from reasonembed.redapter.loss import LossOutput
from reasonembed.redapter.shares import share_sizes
from reasonembed.redapter.workers import is_distributed
from reasonembed.schemas import row_seed

Encode = Callable[[Sequence[TokenIds]], Tensor]
GlobalLoss = Callable[[Tensor, Tensor, Tensor], LossOutput]
Cut = Callable[[Sequence[int]], Iterable[list[int]]]

_BUCKET = 2**26  # gradients summed in one message: 256 MB; all adapters of an 8B model fit into one


@dataclass(frozen=True)
class LocalBatch:
    """Token ids of a worker's share; every group's passages lie together, positive first.

    Attributes:
        queries: One a group, at least one.
        rewritten_queries: One a group; or none, on all workers alike, where nothing was rewritten:
            the queries' own vectors then stand for them.
        passages: Of all groups, equally many each.
        num_at_limit: Queries as long as a query may be, those that were cut among them.
    """

    queries: list[TokenIds]
    rewritten_queries: list[TokenIds]
    passages: list[TokenIds]
    num_at_limit: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(map(len, [*self.queries, *self.rewritten_queries, *self.passages]))


@dataclass(frozen=True)
class StepOutput:
    """What a global batch gave, equal on all workers.

    Attributes:
        loss: All fields detached.
        num_tokens: Of all workers, without padding; those of rewritten queries are among them.
        num_at_limit: Of all workers, see `LocalBatch`.
    """

    loss: LossOutput
    num_tokens: int
    num_at_limit: int


class Reduction(Protocol):
    """How the workers' gradients become the gradient of the global loss, once a step.

    Attributes:
        needs_equal_passes: Whether forward and backward passes are collectives, as where weights
            are sharded; workers with fewer chunks then pass a text whose gradient is zero.
    """

    needs_equal_passes: bool

    def before_backward(self, *, is_last: bool) -> None:
        """Called before each backward pass; only the last of a step may reduce gradients."""

    def finish(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Called after the last backward pass; every gradient is the sum of all workers' then."""


class SumAtEnd:
    """Every worker holds all weights: gradients are summed when they are complete."""

    needs_equal_passes = False

    def before_backward(self, *, is_last: bool) -> None:
        """Nothing to hold back: a backward pass of plain modules sends nothing."""

    def finish(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """See `sum_gradients`."""
        sum_gradients(parameters)


def contrastive_step(
    encode: Encode,
    batch: LocalBatch,
    *,
    num_queries: int,
    global_loss: GlobalLoss,
    parameters: Sequence[torch.nn.Parameter],
    cut: Cut,
    seed: int,
    reduction: Reduction | None = None,
    gradient_scale: Literal["exact", "paper"] = "exact",
) -> StepOutput:
    """Adds the gradient of the global loss to `parameters` on every worker.

    Args:
        encode: Token ids to vectors [n, D] of norm 1; differentiable, may draw random numbers
            (dropout).
        batch: This worker's share: `share_sizes(num_queries, ...)[rank]` groups, in rank order.
        num_queries: B.
        global_loss: From query_BD, rewritten_BD, doc_MD of all workers in rank order. Must be
            deterministic, so that all workers agree.
        parameters: What is trained; others may have no gradient.
        cut: From lengths of texts to chunks of indices, one forward pass each, largest first;
            `embedder.encode.budget_batches` under a budget of tokens.
        seed: Of this step and worker; seeds each chunk, so that both forward passes of a chunk
            draw the same dropout masks.
        reduction: How gradients are summed; default `SumAtEnd`.
        gradient_scale: `exact` gives ∇L; `paper` ∇L / W, as the released code.
    """
    reduction = reduction or SumAtEnd()
    texts = [*batch.queries, *batch.passages]
    chunks, rewritten_chunks = _agreed(
        [list(cut(list(map(len, part)))) for part in (texts, batch.rewritten_queries)],
        is_equal=reduction.needs_equal_passes,
        device=parameters[0].device,
    )
    passes = _Passes(encode, texts, chunks, seed=seed)
    with torch.no_grad():
        rewritten_ND = _Passes(
            encode,
            batch.rewritten_queries or batch.queries,
            rewritten_chunks,
            seed=row_seed(seed, "rewritten"),
        ).without_graph()
    local_ND = passes.first()
    layout = _Layout.of(batch, num_queries=num_queries)
    output, gradient_ND = _global_gradient(
        local_ND, rewritten_ND, batch, layout=layout, global_loss=global_loss
    )
    if gradient_scale == "paper":
        gradient_ND /= len(layout.shares)
    passes.backward(gradient_ND, reduction)
    reduction.finish(parameters)
    return output


# ---- passes of this worker --------------------------------------------------------------------


class _Passes:
    """Forward and backward passes over chunks; an empty chunk is a pass for its own sake."""

    def __init__(
        self, encode: Encode, texts: Sequence[TokenIds], chunks: list[list[int]], *, seed: int
    ) -> None:
        self._encode = encode
        self._texts = texts
        self._chunks = chunks
        self._seed = seed
        self._kept: Tensor | None = None  # vectors of chunk 0 with their graph

    def _forward(self, number: int) -> Tensor:
        torch.manual_seed(row_seed(self._seed, number))
        chunk = self._chunks[number]
        return self._encode([self._texts[i] for i in chunk] or [min(self._texts, key=len)])

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        real = [part for part, chunk in zip(parts, self._chunks, strict=True) if chunk]
        order = torch.tensor([index for chunk in self._chunks for index in chunk])
        return torch.cat(real)[order.argsort().to(real[0].device)]

    def without_graph(self) -> Tensor | None:
        """Vectors [N, D]; None where there is no text."""
        parts = [self._forward(number) for number in range(len(self._chunks))]
        return self._in_order(parts) if any(self._chunks) else None

    def first(self) -> Tensor:
        """Vectors [N, D], detached; the largest chunk comes last and its graph is kept."""
        with torch.no_grad():
            rest = [self._forward(number) for number in range(1, len(self._chunks))]
        with torch.enable_grad():
            self._kept = self._forward(0)
        return self._in_order([self._kept.detach(), *rest])

    def backward(self, gradient_ND: Tensor, reduction: Reduction) -> None:
        """Adds this worker's part of the parameters' gradient."""
        for number, chunk in enumerate(self._chunks):
            vectors = self._kept if number == 0 else self._forward(number)
            self._kept = None  # its activations go before the next chunk's come
            assert vectors is not None, "first() comes first"
            own = gradient_ND[chunk] if chunk else torch.zeros_like(vectors)
            reduction.before_backward(is_last=number == len(self._chunks) - 1)
            vectors.backward(own)  # type: ignore[no-untyped-call]


def _agreed(
    parts: list[list[list[int]]], *, is_equal: bool, device: torch.device
) -> list[list[list[int]]]:
    """The same number of chunks on every worker, if that is needed; empty ones fill up."""
    if not (is_equal and is_distributed()):
        return parts
    counts = torch.tensor([len(chunks) for chunks in parts], device=device)
    dist.all_reduce(counts, op=dist.ReduceOp.MAX)
    return [
        [*chunks, *([] for _ in range(count - len(chunks)))]
        for chunks, count in zip(parts, counts.tolist(), strict=True)
    ]


# ---- all workers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Where each worker's rows lie; computed alike by all of them, so that no sizes are sent.

    A worker's message has a row of counts, then its q, q′ (if there are any) and passages.
    """

    shares: list[int]
    rank: int
    group_size: int
    has_rewritten: bool

    @classmethod
    def of(cls, batch: LocalBatch, *, num_queries: int) -> _Layout:
        world_size = dist.get_world_size() if is_distributed() else 1
        rank = dist.get_rank() if is_distributed() else 0
        shares = share_sizes(num_queries, world_size=world_size)
        assert len(batch.queries) == shares[rank] > 0, "a share of another size than is agreed"
        group_size = len(batch.passages) // len(batch.queries)
        return cls(shares, rank, group_size, bool(batch.rewritten_queries))

    @property
    def num_rows(self) -> int:
        """Of the longest message; shorter ones are filled up."""
        return 1 + max(self.shares) * (1 + self.has_rewritten + self.group_size)

    def sizes(self, rank: int) -> list[int]:
        """Rows of counts, q, q′, passages and filling."""
        n = self.shares[rank]
        sizes = [1, n, n * self.has_rewritten, n * self.group_size]
        return [*sizes, self.num_rows - sum(sizes)]

    def own(self, rows: Tensor, *, per_query: int) -> Tensor:
        """This worker's rows of a global matrix."""
        start = list(accumulate(self.shares, initial=0))[self.rank]
        return rows[start * per_query :][: self.shares[self.rank] * per_query]


def _global_gradient(
    local_ND: Tensor,
    rewritten_ND: Tensor | None,
    batch: LocalBatch,
    *,
    layout: _Layout,
    global_loss: GlobalLoss,
) -> tuple[StepOutput, Tensor]:
    counts_D = local_ND.new_zeros(local_ND.shape[1])
    counts_D[:2] = local_ND.new_tensor([batch.num_tokens, batch.num_at_limit])
    num_queries = len(batch.queries)
    parts = [counts_D[None], local_ND[:num_queries], local_ND[num_queries:]]
    if rewritten_ND is not None:
        parts.insert(2, rewritten_ND)
    counts_WD, query_BD, rewritten_BD, doc_MD = _gather(torch.cat(parts), layout)
    query_BD.requires_grad_()
    doc_MD.requires_grad_()
    with torch.enable_grad():
        loss = global_loss(
            query_BD, rewritten_BD if layout.has_rewritten else query_BD.detach(), doc_MD
        )
    query_gradient_BD, doc_gradient_MD = torch.autograd.grad(loss.loss, (query_BD, doc_MD))
    own = [
        layout.own(query_gradient_BD, per_query=1),
        layout.own(doc_gradient_MD, per_query=layout.group_size),
    ]
    num_tokens, num_at_limit = (round(n) for n in counts_WD[:, :2].sum(dim=0).tolist())
    detached = LossOutput(**{name: value.detach() for name, value in vars(loss).items()})
    return StepOutput(detached, num_tokens, num_at_limit), torch.cat(own)


def _gather(message_ND: Tensor, layout: _Layout) -> list[Tensor]:
    """Counts, q, q′ and passages of all workers in rank order, without a graph; one collective."""
    if len(layout.shares) == 1:
        blocks = [message_ND]
    else:
        filling = (0, 0, 0, layout.num_rows - len(message_ND))
        padded = torch.nn.functional.pad(message_ND, filling).contiguous()
        gathered = padded.new_empty(len(layout.shares) * layout.num_rows, padded.shape[1])
        dist.all_gather_into_tensor(gathered, padded)
        blocks = list(torch.split(gathered, layout.num_rows))
    by_worker = [torch.split(block, layout.sizes(rank)) for rank, block in enumerate(blocks)]
    return [torch.cat(parts).detach() for parts in list(zip(*by_worker, strict=True))[:4]]


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Adds up every worker's gradients, in place; a parameter without one counts as zero.

    Sums are taken in float32, or float64 where gradients have it.
    """
    if not is_distributed() or dist.get_world_size() == 1:
        return
    for bucket in _buckets(parameters):
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in bucket]
        kind = torch.promote_types(torch.float32, gradients[0].dtype)
        flat = torch.cat([gradient.reshape(-1).to(kind) for gradient in gradients])
        dist.all_reduce(flat)  # one message: adapters are many small tensors
        sizes = [p.numel() for p in bucket]
        for parameter, part in zip(bucket, torch.split(flat, sizes), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)


def _buckets(
    parameters: Sequence[torch.nn.Parameter],
) -> Iterable[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    for parameter in parameters:
        size = sum(p.numel() for p in bucket) + parameter.numel()
        if bucket and (size > _BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
