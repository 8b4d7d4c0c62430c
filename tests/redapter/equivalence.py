"""What the processes of the equivalence test run, and the slow reference they are compared with.

A module, so that processes can be started from it. One group of processes takes all cases.
"""

import math
from dataclasses import dataclass, field, replace
from itertools import product

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3Model

from reasonembed.config import LoRAConfig, TrainConfig, TrainRuntime
from reasonembed.embedder.contract import Attention, Pooling, TokenisationContract
from reasonembed.embedder.encode import budget_batches
from reasonembed.embedder.pooling import forward
from reasonembed.redapter.batches import Group, Passage, Sample, rank_slice
from reasonembed.redapter.objective import batch_loss
from reasonembed.redapter.sharding import place
from reasonembed.redapter.step import LocalBatch, contrastive_step

QUERIES, GROUP, TAU = 6, 4, 0.2  # 6 queries: 3 + 3 on two workers, 2 + 2 + 1 + 1 on four
CAP, EPSILON, SMOOTHING, DIMENSIONS = 1.1, 1e-6, 0.25, (4, 10)
CONTRACT = TokenisationContract(
    model="tiny",
    weights="none",
    query_template="{query}",
    append_token_id=None,
    attention=Attention.CAUSAL,
    pooling=Pooling.LAST,
    max_query_tokens=32,
    max_document_tokens=32,
    dtype="float64",
    dimension=16,
)


@dataclass(frozen=True)
class Case:
    """One way to take the step."""

    chunk_tokens: int = 10_000
    is_weighted: bool = True
    is_lora: bool = False
    masks: tuple[str, ...] = ()
    settings: dict = field(default_factory=dict)
    sharding: str = "none"
    dtype: str = "float64"
    has_rewrites: bool = True
    equal_passes: bool = False

    @property
    def config(self) -> TrainConfig:
        return TrainConfig.model_validate(
            {
                "encoder": {"model": "tiny"},
                "temperature": TAU,
                "intensity_cap": CAP,
                "intensity_epsilon": EPSILON,
                "intensity_start_step": 0 if self.is_weighted else 1,
                "masks": self.masks,
                **self.settings,
            }
        )


ALL_MASKS = ("known_positives", "equal_texts")
CACHE = 60  # tokens: three to ten chunks a worker
CASES = {
    f"{'cache' if cache else 'whole'}-{'ri' if ri else 'mean'}-{'lora' if lora else 'full'}-"
    f"{'masks' if masks else 'nomasks'}": Case(
        chunk_tokens=CACHE if cache else 10_000,
        is_weighted=ri,
        is_lora=lora,
        masks=ALL_MASKS if masks else (),
    )
    for cache, ri, lora, masks in product([False, True], repeat=4)
}
CASES |= {
    "known_positives": Case(masks=("known_positives",)),
    "equal_texts": Case(masks=("equal_texts",)),
    "several": Case(CACHE, masks=ALL_MASKS, settings={"targets": "several"}),
    "graded": Case(CACHE, masks=ALL_MASKS, settings={"targets": "graded"}),
    "matryoshka": Case(CACHE, settings={"matryoshka_dimensions": DIMENSIONS}),
    "smoothing": Case(settings={"intensity_smoothing": SMOOTHING}),
    "no-cap": Case(settings={"intensity_cap": math.inf}),
    "paper-scale": Case(CACHE, settings={"gradient_scale": "paper"}),
    "no-rewrites": Case(CACHE, has_rewrites=False),
    "equal-passes": Case(40, is_lora=True, equal_passes=True),
    "float32": Case(CACHE, dtype="float32", is_lora=True, masks=ALL_MASKS),
}
SHARDED = {
    f"fsdp-{'cache' if cache else 'whole'}-{'lora' if lora else 'full'}": Case(
        chunk_tokens=CACHE if cache else 10_000,
        is_lora=lora,
        masks=ALL_MASKS,
        sharding="fsdp",
    )
    for cache, lora in product([False, True], repeat=2)
}
CASES |= SHARDED


# ---- the batch --------------------------------------------------------------------------------


def passage(name: str) -> Passage:
    return Passage(name, name, name)


def groups(case: Case) -> tuple[Group, ...]:
    """Two samples of one query, a positive that is another's negative, texts that come twice."""
    names = [
        # positives, negatives that are in the batch
        (("a", "b"), ("n1", "n2", "c")),
        (("c", "d"), ("n1", "n3", "n3")),
        (("e", "e2"), ("n4", "a", "n5")),
        (("f", "f2"), ("n6", "n7", "n8")),
        (("a", "g"), ("n9", "n10", "n2")),
        (("h", "h2"), ("n11", "e", "n12")),
    ]
    made = []
    for number, (positives, negatives) in enumerate(names):
        several = case.config.targets != "paper" and number % 2 == 0
        chosen = [*positives[: 2 if several else 1], *negatives][:GROUP]
        labels = [5.0 - position * 0.7 for position in range(len(chosen))]
        query = f"query {number}" if number != 3 else "query 0"  # samples of one query
        sample = Sample(
            query_id=str(number),
            task="t",
            instruction="",
            query=query,
            rewritten_query=f"{query} rewritten so" if case.has_rewrites else query,
            positives=tuple(map(passage, positives)),
            negatives=tuple(map(passage, negatives)),
            positive_labels=(None, None),
            negative_labels=(None,) * len(negatives),
        )
        made.append(Group(sample, tuple(map(passage, chosen)), tuple(labels), 2 if several else 1))
    return tuple(made)


def token_ids(text: str) -> tuple[int, ...]:
    """The same text, the same tokens; 3 to 14 of them."""
    made = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(text, 7)))
    length = int(torch.randint(3, 15, (1,), generator=made))
    return tuple(torch.randint(0, 50, (length,), generator=made).tolist())


def local_batch(case: Case, *, rank: int, world_size: int) -> LocalBatch:
    own = rank_slice(groups(case), rank=rank, world_size=world_size)
    rewritten = [token_ids(g.sample.rewritten_query) for g in own] if case.has_rewrites else []
    return LocalBatch(
        queries=[token_ids(g.sample.query) for g in own],
        rewritten_queries=rewritten,
        passages=[token_ids(p.text) for g in own for p in g.passages],
        num_at_limit=rank + 1,
    )


# ---- the model --------------------------------------------------------------------------------


def make_model(case: Case):
    torch.manual_seed(5)
    config = Qwen3Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=64,
        initializer_range=0.3,
        use_cache=False,
    )
    placed = place(
        Qwen3Model(config).to(getattr(torch, case.dtype)),
        lora=LoRAConfig(rank=2, alpha=4, dropout=0.0) if case.is_lora else None,
        task_type="FEATURE_EXTRACTION",
        name="tiny",
        dtype=case.dtype,
        runtime=TrainRuntime.model_validate({"sharding": case.sharding}),
    )
    _fill_adapters(placed.learnt)
    return placed


@torch.no_grad()
def _fill_adapters(learnt) -> None:
    """One half of an adapter starts at zero, and the gradient of the other half with it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in sorted(learnt.items()):
        if "lora_" not in name:
            continue
        made = torch.Generator().manual_seed(len(name) + parameter.shape[0])
        values = 0.3 * torch.randn(parameter.shape, generator=made, dtype=torch.float64)
        values = values.to(parameter.dtype)
        if isinstance(parameter, DTensor):
            values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
        parameter.copy_(values)


class EqualPasses:
    """Sums at the end, but asks for equal passes; counts them."""

    needs_equal_passes = True

    def __init__(self) -> None:
        self.passes = []

    def before_backward(self, *, is_last: bool) -> None:
        self.passes.append(is_last)

    def finish(self, parameters) -> None:
        from reasonembed.redapter.step import sum_gradients

        sum_gradients(parameters)


def take_step(case: Case, *, rank: int = 0, world_size: int = 1) -> dict:
    placed = make_model(case)
    reduction = EqualPasses() if case.equal_passes else placed.reduction

    output = contrastive_step(
        lambda batch: forward(placed.model, CONTRACT, batch),
        local_batch(case, rank=rank, world_size=world_size),
        num_queries=QUERIES,
        global_loss=batch_loss(case.config, groups(case), step=0, cap=case.config.intensity_cap),
        parameters=placed.parameters,
        cut=lambda lengths: budget_batches(lengths, batch_tokens=case.chunk_tokens),
        seed=3,
        reduction=reduction,
        gradient_scale=case.config.gradient_scale,
    )
    gradients = {}
    for name, parameter in placed.learnt.items():
        gradient = parameter.grad
        gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        gradients[name.replace("_checkpoint_wrapped_module.", "")] = gradient
    return {
        "output": vars(output.loss),
        "num_tokens": output.num_tokens,
        "num_at_limit": output.num_at_limit,
        "gradients": gradients,
        "passes": getattr(reduction, "passes", []),
    }


def run(rank: int, world_size: int, folder: str) -> None:
    """All cases, in one process of a group."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    found = {
        name: take_step(case, rank=rank, world_size=world_size) for name, case in CASES.items()
    }
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ---- the reference ----------------------------------------------------------------------------


def reference(case: Case) -> dict:
    """The equations over all texts at once: plain autograd, float64, text by text, term by term."""
    placed = make_model(replace(case, sharding="none", dtype="float64"))
    batch = groups(case)

    def vector(text):
        hidden = placed.model(input_ids=torch.tensor([token_ids(text)])).last_hidden_state[0, -1]
        return hidden / hidden.norm()

    queries = [vector(g.sample.query) for g in batch]
    with torch.no_grad():
        rewritten = [vector(g.sample.rewritten_query) for g in batch]
    passages = [p for g in batch for p in g.passages]
    docs = [vector(p.text) for p in passages]

    def loss_of(row, query, size=None):
        cut = [one if size is None else one[:size] / one[:size].norm() for one in (query, *docs)]
        scores = [cut[0] @ one / TAU for one in cut[1:]]
        return _loss_of_row(case, batch, row, scores, passages)

    losses = [loss_of(row, query) for row, query in enumerate(queries)]
    with torch.no_grad():
        rewritten_losses = [loss_of(row, query) for row, query in enumerate(rewritten)]
    weights = _weights(case, *([float(x.detach()) for x in y] for y in (losses, rewritten_losses)))
    trained = losses
    if sizes := case.config.matryoshka_dimensions:
        trained = [
            (loss + sum(loss_of(row, queries[row], size) for size in sizes)) / (1 + len(sizes))
            for row, loss in enumerate(losses)
        ]
    total = sum(weight * loss for weight, loss in zip(weights, trained, strict=True))
    gradients = torch.autograd.grad(total, placed.parameters, allow_unused=True)
    return {
        "loss": total.detach(),
        "losses_B": torch.stack(losses).detach(),
        "rewritten_losses_B": torch.stack(rewritten_losses),
        "weight_B": torch.tensor(weights, dtype=torch.float64),
        "gradients": dict(zip(placed.learnt, gradients, strict=True)),
    }


def _loss_of_row(case, batch, row, scores, passages):
    first = row * GROUP
    positives = range(first, first + batch[row].num_positives)
    own = range(first, first + GROUP) if case.config.targets == "graded" else positives
    counted = [column for column in range(len(scores)) if _counts(case, batch, row, column, own)]
    if case.config.targets == "graded":
        raw = [math.exp(label / 0.25) for label in batch[row].labels]
        everything = sum(scores[column].exp() for column in counted)
        return sum(
            (one / sum(raw))
            * (math.log(one / sum(raw)) - (scores[column].exp() / everything).log())
            for one, column in zip(raw, own, strict=True)
        )
    negatives = sum(scores[column].exp() for column in counted if column not in positives)
    terms = [-(scores[p].exp() / (scores[p].exp() + negatives)).log() for p in positives]
    return sum(terms) / len(terms)


def _counts(case, batch, row, column, own):
    """Whether a passage is in the query's denominator."""
    if column in own:
        return True
    texts = [p.text for g in batch for p in g.passages]
    if "equal_texts" in case.masks and (
        texts[column] in texts[:column] or texts[column] in [texts[c] for c in own]
    ):
        return False
    same_query = [g.sample for g in batch if g.sample.query == batch[row].sample.query]
    known = {p.text for sample in same_query for p in sample.positives}
    return not ("known_positives" in case.masks and texts[column] in known)


def _weights(case, losses, rewritten_losses):
    if not case.is_weighted or not case.has_rewrites:
        return [1 / QUERIES] * QUERIES
    cap = case.config.intensity_cap
    ratios = [
        min(max(one / (other + EPSILON), 0), cap)
        for one, other in zip(losses, rewritten_losses, strict=True)
    ]
    share = case.config.intensity_smoothing
    ratios = [(1 - share) * one + share * sum(ratios) / QUERIES for one in ratios]
    return [one / sum(ratios) for one in ratios]
