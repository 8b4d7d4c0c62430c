"""Measuring a model on held-out samples while it trains.

Reads the rows of the `samples` artifact that are never trained on. Everything that is measured is
fixed before the first step (which queries, which passages, which of them share a batch), so that
figures of different steps and of different numbers of workers can be compared.

Shape legend: N texts, D dimension; of one task, Q held-out queries and P passages.
"""

from __future__ import annotations

import heapq
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from reasonembed.config import TaskBatch, TrainConfig
from reasonembed.embedder.encode import budget_batches
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, TokenIds
from reasonembed.errors import ConfigError
from reasonembed.redapter.batches import Passage, Sample, samples_from_rows
from reasonembed.redapter.best import Best
from reasonembed.redapter.log import HELD_OUT_SCORE, START_SCORE
from reasonembed.redapter.loss import info_nce, scores
from reasonembed.redapter.stepping import Metrics
from reasonembed.schemas import row_seed, stable_hash

_HELD_OUT = "held_out"
_CUTOFF = 10
_ROWS_AT_ONCE = 500


@dataclass(frozen=True)
class HeldOut:
    """A held-out sample, with the document that must not be found for it."""

    sample: Sample
    source_doc_id: str | None


def read_held_out(tables: Iterable[pa.Table], config: TrainConfig) -> list[HeldOut]:
    """Held-out samples from tables of `schemas.SAMPLES`: `validate_queries` of them, by hash.

    Empty if nothing is to be validated.

    Raises:
        ConfigError: `validate_every` is set and no sample is held out.
    """
    if config.validate_every is None:
        return []
    rows = (
        row
        for table in tables
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE)
        for row in batch.to_pylist()
        if row["split"] == _HELD_OUT
    )
    chosen = heapq.nsmallest(
        config.validate_queries, rows, key=lambda row: stable_hash(row["query_id"])
    )
    samples = samples_from_rows(chosen, split=_HELD_OUT)
    if not samples:
        raise ConfigError(
            f"train.validate_every is {config.validate_every}, but no sample is held out; set "
            "assemble.held_out_share above 0, or leave train.validate_every out"
        )
    return [
        HeldOut(sample, row["source_doc_id"]) for sample, row in zip(samples, chosen, strict=True)
    ]


class Validation:
    """When held-out samples are measured while steps are taken, and what becomes of the result.

    Args:
        config: `validate_every`.
        total: Steps of the whole run; after the last one is always measured.
        measure: Measures the weights as they are; called by all workers.
        best: Keeps the best weights, if they are to be kept.
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        total: int,
        measure: Callable[[], Metrics],
        best: Best | None = None,
    ) -> None:
        assert config.validate_every is not None, "there is nothing to be measured"
        self._every, self._total = config.validate_every, total
        self._measure, self._best = measure, best

    def around(self, one_step: Callable[[int], Metrics]) -> Callable[[int], Metrics]:
        """The same step, with what was measured before the first or after it among its metrics."""

        def measured(step: int) -> Metrics:
            start = {START_SCORE: self._measure()[HELD_OUT_SCORE]} if step == 0 else {}
            metrics = one_step(step) | start
            done = step + 1
            if done % self._every and done != self._total:
                return metrics
            found = self._measure()
            if self._best is not None:
                self._best.offer(done, found[HELD_OUT_SCORE])
            return metrics | found

        return measured


class Validator:
    """Measures held-out samples; deterministic, and the same on any number of workers.

    Of each sample there are all positives and up to `group_size` − 1 negatives, chosen once. The
    passages of a task's samples are the corpus that its queries are searched in; a query's own
    source document, where it is no positive, is hidden from it as mining hides it.

    Args:
        held_out: At least one sample.
        config: `group_size` and the like, `temperature`, `seed`.
        shape: Size of a task's batches, which the loss is computed in; see `BatchPlan.shape`.
        tokenizer: Of the model.
    """

    def __init__(
        self,
        held_out: Sequence[HeldOut],
        config: TrainConfig,
        *,
        shape: Callable[[str], TaskBatch],
        tokenizer: ContractTokenizer,
    ) -> None:
        assert held_out, "read_held_out gives at least one"
        by_task: dict[str, list[HeldOut]] = {}
        for one in sorted(held_out, key=lambda one: stable_hash(one.sample.query_id)):
            by_task.setdefault(one.sample.task, []).append(one)
        self._temperature = config.temperature
        self._tasks = [
            _Task.of(rows, shape(task), seed=config.seed) for task, rows in sorted(by_task.items())
        ]
        texts = [
            ids
            for task in self._tasks
            for ids in (
                *task.query_ids(tokenizer),
                *tokenizer.tokenise([p.text for p in task.passages], role=Role.DOCUMENT),
            )
        ]
        self._texts = list(dict.fromkeys(texts))
        rows_of = {ids: row for row, ids in enumerate(self._texts)}
        self._rows = torch.tensor([rows_of[ids] for ids in texts])

    def measure(
        self,
        encode: Callable[[Sequence[TokenIds]], Tensor],
        *,
        batch_tokens: int,
        is_packed: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> Metrics:
        """Measures the model as it is; called on every worker, each gets the same figures.

        Each worker embeds every `world_size`-th batch of texts, and one sum shares the vectors.

        Args:
            encode: Token ids to vectors [n, D], without dropout.
            batch_tokens: Tokens a forward.
            is_packed: Whether `encode` packs, so that padding takes none of them.
            rank: Of this worker.
            world_size: Number of workers.

        Returns:
            `held_out_loss` (InfoNCE on fixed batches, known positives and equal texts not counted
            as negatives), `held_out_ndcg@10`, `held_out_positive_rank` (mean rank of a sample's
            positive among the passages that are none), all means over queries; `held_out_s`.
        """
        began = time.perf_counter()
        with torch.no_grad():
            lengths = [len(ids) for ids in self._texts]
            batches = list(budget_batches(lengths, batch_tokens=batch_tokens, packed=is_packed))
            vectors_ND = self._encode(encode, batches, rank=rank, world_size=world_size)
            found = self._figures(vectors_ND[self._rows.to(vectors_ND.device)])
            if world_size > 1:
                found = _of_first_worker(found, device=vectors_ND.device)
        return found | {"held_out_s": time.perf_counter() - began}

    def _encode(
        self,
        encode: Callable[[Sequence[TokenIds]], Tensor],
        batches: Sequence[list[int]],
        *,
        rank: int,
        world_size: int,
    ) -> Tensor:
        vectors_ND: Tensor | None = None
        # Sharded weights are gathered in every forward, so all workers take equally many; who has
        # no batch left embeds the last one again and leaves the result.
        for first in range(0, len(batches), world_size):
            own = min(first + rank, len(batches) - 1)
            part = encode([self._texts[i] for i in batches[own]]).float()
            if vectors_ND is None:
                vectors_ND = part.new_zeros(len(self._texts), part.shape[1])
            if own == first + rank:
                vectors_ND[torch.tensor(batches[own], device=part.device)] = part
        assert vectors_ND is not None, "there is at least one text"
        if world_size > 1:
            dist.all_reduce(vectors_ND)
        return vectors_ND

    def _figures(self, vectors_ND: Tensor) -> Metrics:
        sums, start, num_queries = torch.zeros(3, dtype=torch.float64), 0, 0
        for task in self._tasks:
            middle = start + len(task.samples)
            end = middle + len(task.passages)
            cosine_QP = scores(vectors_ND[start:middle], vectors_ND[middle:end], temperature=1.0)
            sums += task.sums(cosine_QP, temperature=self._temperature).cpu()
            num_queries += len(task.samples)
            start = end
        loss, ndcg, rank = (sums / num_queries).tolist()
        return {"held_out_loss": loss, HELD_OUT_SCORE: ndcg, "held_out_positive_rank": rank}


@dataclass(frozen=True)
class _Task:
    """What is fixed about one task.

    Attributes:
        samples: Of the queries.
        passages: Distinct texts, in the order of their hashes.
        positive_Q: int64, column of the passage that is contrasted.
        relevant_QP: Known positives.
        hidden_QP: Passages that must not be found.
        batch_QP: Passages of the batch that the query's loss is computed in.
    """

    samples: list[Sample]
    passages: list[Passage]
    positive_Q: Tensor
    relevant_QP: Tensor
    hidden_QP: Tensor
    batch_QP: Tensor

    @classmethod
    def of(cls, held_out: Sequence[HeldOut], shape: TaskBatch, *, seed: int) -> _Task:
        samples = [one.sample for one in held_out]
        groups = [_group(sample, shape.group_size, seed=seed) for sample in samples]
        every = [p for sample in samples for p in sample.positives]
        every += [p for group in groups for p in group]
        passages = sorted({p.text_hash: p for p in every}.values(), key=lambda p: p.text_hash)
        column = {p.text_hash: place for place, p in enumerate(passages)}
        known = [{p.text_hash for p in sample.positives} for sample in samples]
        texts_of: dict[str | None, set[str]] = {}
        for p in every:
            texts_of.setdefault(p.doc_id, set()).add(p.text_hash)
        hidden = [
            texts_of.get(one.source_doc_id, set()) - own
            for one, own in zip(held_out, known, strict=True)
        ]
        size = shape.batch_queries
        batches = [
            {p.text_hash for group in groups[first : first + size] for p in group}
            for first in range(0, len(groups), size)
        ]
        return cls(
            samples=samples,
            passages=passages,
            positive_Q=torch.tensor([column[group[0].text_hash] for group in groups]),
            relevant_QP=_marked(known, passages),
            hidden_QP=_marked(hidden, passages),
            batch_QP=_marked([batches[row // size] for row in range(len(groups))], passages),
        )

    def query_ids(self, tokenizer: ContractTokenizer) -> list[TokenIds]:
        return [
            tokenizer.tokenise([s.query], role=Role.QUERY, instruction=s.instruction)[0]
            for s in self.samples
        ]

    def sums(self, cosine_QP: Tensor, *, temperature: float) -> Tensor:
        """Loss, nDCG@10 and rank, each summed over the queries, float64 [3]."""
        device = cosine_QP.device
        positive_Q, relevant_QP = self.positive_Q.to(device), self.relevant_QP.to(device)
        hidden_QP = self.hidden_QP.to(device)
        is_own_QP = torch.zeros_like(relevant_QP).scatter_(1, positive_Q[:, None], True)
        left_out_QP = (~self.batch_QP.to(device) | hidden_QP | relevant_QP) & ~is_own_QP
        logits_QP = (cosine_QP / temperature).masked_fill(left_out_QP, float("-inf"))
        found_QP = cosine_QP.masked_fill(hidden_QP, float("-inf"))
        own_Q1 = cosine_QP.gather(1, positive_Q[:, None])
        rank_Q = 1 + ((found_QP > own_Q1) & ~relevant_QP).sum(dim=1)
        sums = [info_nce(logits_QP, positive_Q), ndcg(found_QP, relevant_QP), rank_Q]
        return torch.stack([one.double().sum() for one in sums])


def ndcg(scores_QP: Tensor, relevant_QP: Tensor, *, cutoff: int = _CUTOFF) -> Tensor:
    """Each query's nDCG with gains 0 and 1, float64 [Q]; of equal scores the first column leads.

    Args:
        scores_QP: Higher is better; -inf is never found.
        relevant_QP: bool; each query has at least one.
        cutoff: Passages that count.
    """
    order_QP = scores_QP.argsort(dim=1, descending=True, stable=True)[:, :cutoff]
    gains_QK = (relevant_QP & scores_QP.isfinite()).gather(1, order_QP).double()
    ranks_K = torch.arange(gains_QK.shape[1], device=gains_QK.device, dtype=torch.float64)
    discounts_K = 1 / torch.log2(ranks_K + 2)
    most_Q = relevant_QP.sum(dim=1).clamp(max=gains_QK.shape[1])
    return (gains_QK * discounts_K).sum(dim=1) / discounts_K.cumsum(dim=0)[most_Q - 1]


def _of_first_worker(found: Metrics, *, device: torch.device) -> Metrics:
    """Its figures on all workers, who decide by them whether they write weights together."""
    values = torch.tensor(list(found.values()), dtype=torch.float64, device=device)
    dist.broadcast(values, src=0)
    return dict(zip(found, values.tolist(), strict=True))


def _group(sample: Sample, size: int, *, seed: int) -> tuple[Passage, ...]:
    rng = random.Random(row_seed(seed, "held out", sample.query_id))
    wanted = min(size - 1, len(sample.negatives))
    return (rng.choice(sample.positives), *rng.sample(sample.negatives, wanted))


def _marked(texts: Sequence[set[str]], passages: Sequence[Passage]) -> Tensor:
    """Which passages are among a query's texts, bool [Q, P]."""
    return torch.tensor([[p.text_hash in own for p in passages] for own in texts])
