"""How fast is a training step, against the limit and against what others use?

    OMP_NUM_THREADS=2 python benchmarks/train.py [--rounds 5] [--ray]
    python benchmarks/train.py --device cuda --shape 4b --lora 32 --chunk-tokens 65536

One decoder with random weights, one batch of queries, each with a positive and hard negatives, of
skewed (lognormal) lengths; no dropout. Sides, all with tokenisation, clipping and AdamW except raw:

- default: sentence-transformers' `MultipleNegativesRankingLoss`
- cached: its `CachedMultipleNegativesRankingLoss` at the fastest of several mini-batch settings
- own: `redapter.loop.train`, all texts in one forward, and no rewritten queries
- own_cached: the same through the gradient cache, in chunks of `--chunk-tokens`
- own_ri, own_ri_cached: with rewritten queries, three times as long as the queries
- raw: forward and backward of the same tokens with a given gradient, and nothing else, at the
  fastest of several ways to batch them: the limit

The peer's step is written out as its trainer takes it: data collator, loss, backward, clipping,
update. What else the trainer does is left out, in its favour. Before anything is timed, loss and
gradient norm of all sides must be equal.

Rounds run the sides in turns, in one order and then in the other; each side loads the weights anew,
takes one step to warm up and `--steps` that count. Ratios are taken within a round: median and
range. Prints a table and writes `benchmarks/results/train.json`, on a GPU `train-<device>.json`.
With `--ray`, the same training also goes through Ray Train with one worker.
"""

import argparse
import gc
import json
import math
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from reasonembed.config import EncoderConfig, LoRAConfig, TrainConfig, TrainRuntime
from reasonembed.embedder.contract import load_tokenizer, resolve_contract
from reasonembed.embedder.encode import budget_batches, load_backbone
from reasonembed.embedder.packing import use_packing
from reasonembed.embedder.pooling import forward
from reasonembed.embedder.tokenisation import ContractTokenizer, Role
from reasonembed.redapter.batches import BatchPlan, Sample, samples_from_rows
from reasonembed.redapter.devices import peak_flops
from reasonembed.redapter.flops import Work
from reasonembed.redapter.log import TrainLog
from reasonembed.redapter.loop import train
from reasonembed.redapter.step import LocalBatch
from reasonembed.redapter.trackers import Trackers

RESULTS = Path(__file__).parent / "results"
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TEMPERATURE = 0.05
RATE = 1e-5
MAX_TOKENS = 512
ONE_FORWARD = 2**31 - 1  # tokens: more than any batch has
VOCABULARY = 2_048  # an embedding table takes no part in the work
SHAPES = {
    # GEMMs large enough that what stands around them does not decide
    "small": {"hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 3,
              "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64},
    "4b": {"hidden_size": 2_560, "intermediate_size": 9_728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
ROWS = (4, 8, 16, 32, 64)  # settings of the cached loss that are tried
TOKENS = (512, 1_024, 2_048, 4_096, 16_384)
GOALS = {
    "default / own": (">=", 1.2),
    "cached / own": (">=", 1.0),
    "raw / own": (">=", 0.8),
    "own_cached / own": ("<=", 1.38),
    "plain / ray": (">=", 0.95),
}


# ---- the model and the data -------------------------------------------------------------------


def save_model(folder: Path, shape: str, *, device: str, dtype: str) -> None:
    """Random weights of Qwen3's architecture and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCABULARY, max_position_embeddings=4_096, tie_word_embeddings=True,
        **SHAPES[shape],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        Qwen3ForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    end = "<|endoftext|>"
    words = {end: 0} | {f"w{i}": i for i in range(1, VOCABULARY)}
    backend = Tokenizer(models.WordLevel(words, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, 0)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=end, pad_token=end, padding_side="right"
    ).save_pretrained(folder)


def make_samples(*, queries: int, group: int, median: int, spread: float) -> list[Sample]:
    rng = random.Random(0)

    def text(around: int) -> str:
        wanted = round(rng.lognormvariate(math.log(around), spread))
        return " ".join(f"w{rng.randrange(1, VOCABULARY)}" for _ in range(max(4, wanted)))

    def passage(name: str) -> dict[str, object]:
        return {"doc_id": name, "text": text(median), "label": None, "text_hash": name}

    rows = []
    for row in range(queries):
        query = text(median // 2)
        rows.append(
            {
                "query_id": f"q{row}",
                "task": "generic",
                "instruction": "",
                "query": query,
                "rewritten_query": f"{query} {text(median)}",
                "positives": [passage(f"p{row}")],
                "negatives": [passage(f"n{row}-{i}") for i in range(group - 1)],
                "split": "train",
            }
        )
    return samples_from_rows(rows)


@dataclass(frozen=True)
class Setting:
    """What every side works on."""

    weights: Path
    samples: list[Sample]
    config: TrainConfig
    runtime: TrainRuntime
    steps: int

    @property
    def device(self) -> str:
        return "cuda" if self.runtime.use_gpu else "cpu"

    def without_rewrites(self) -> list[Sample]:
        return [replace(sample, rewritten_query=sample.query) for sample in self.samples]

    def tokens(self) -> LocalBatch:
        contract = resolve_contract(self.weights, self.config.encoder)
        tokenizer = ContractTokenizer(load_tokenizer(self.weights), contract)
        groups = BatchPlan(self.samples, self.config).batch(0)
        passages = [passage.text for group in groups for passage in group.passages]
        return LocalBatch(
            queries=tokenizer.tokenise([g.sample.query for g in groups], role=Role.QUERY),
            rewritten_queries=tokenizer.tokenise(
                [g.sample.rewritten_query for g in groups], role=Role.QUERY
            ),
            passages=tokenizer.tokenise(passages, role=Role.DOCUMENT),
        )


@dataclass(frozen=True)
class Timing:
    """Seconds of the steps that count; loss and gradient norm of the first step of all."""

    seconds: list[float]
    loss: float | None = None
    norm: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


# ---- own --------------------------------------------------------------------------------------


def own(setting: Setting, samples: list[Sample], *, chunk_tokens: int) -> Timing:
    found: list[dict[str, float]] = []
    runtime = setting.runtime.model_copy(update={"chunk_tokens": chunk_tokens})
    with tempfile.TemporaryDirectory(prefix="own-") as name:
        train(
            setting.config.model_copy(update={"max_steps": setting.steps + 1}),
            samples,
            weights=setting.weights,
            runtime=runtime,
            output_dir=Path(name),
            report=lambda metrics, _: found.append(dict(metrics)),
        )
    seconds = [metrics["step_s"] for metrics in found[1:]]
    return Timing(seconds, found[0]["query_loss"], found[0]["grad_norm"])


# ---- sentence-transformers --------------------------------------------------------------------


def peer_model(setting: Setting) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(
        str(setting.weights), max_seq_length=MAX_TOKENS,
        model_kwargs={"dtype": torch.bfloat16 if is_half_frozen(setting) else torch.float32},
    )  # fmt: skip
    transformer.tokenizer.padding_side = "right"
    pooling = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode="lasttoken")
    model = SentenceTransformer(modules=[transformer, pooling], device=setting.device)
    if (lora := setting.config.lora) is not None:
        from peft import LoraConfig, TaskType

        model.add_adapter(
            LoraConfig(
                task_type=TaskType.FEATURE_EXTRACTION, r=lora.rank, lora_alpha=lora.alpha,
                lora_dropout=lora.dropout, target_modules=list(LORA_TARGETS),
            )
        )  # fmt: skip
    if setting.runtime.activation_checkpointing:
        transformer.auto_model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def is_half_frozen(setting: Setting) -> bool:
    return setting.config.lora is not None and setting.config.encoder.dtype == "bfloat16"


def peer(setting: Setting, make_loss: Callable[[Any], Any], *, steps: int | None = None) -> Timing:
    from sentence_transformers.sentence_transformer.data_collator import (
        SentenceTransformerDataCollator,
    )

    model = peer_model(setting)
    loss_of, collate = make_loss(model), SentenceTransformerDataCollator(model.preprocess)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    groups = BatchPlan(setting.samples, setting.config).batch(0)
    rows = [
        {"anchor": group.sample.query}
        | {f"document {i}": passage.text for i, passage in enumerate(group.passages)}
        for group in groups
    ]
    is_half = setting.config.encoder.dtype == "bfloat16"
    taken = []
    for _ in range(1 + (steps or setting.steps)):
        began = time.perf_counter()
        features = columns(collate(rows), setting.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(setting.device, torch.bfloat16, enabled=is_half):
            loss = loss_of(features, None)
            loss.backward()  # within: the cached loss embeds again here
        norm = torch.nn.utils.clip_grad_norm_(parameters, setting.config.max_grad_norm)
        optimizer.step()
        figures = float(loss.detach()), float(norm)  # waits for the device
        taken.append((time.perf_counter() - began, *figures))
    return Timing([one[0] for one in taken[1:]], taken[0][1], taken[0][2])


def columns(batch: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """One mapping of features a column, as the trainer's `collect_features` makes them."""
    names = [key.removesuffix("_input_ids") for key in batch if key.endswith("_input_ids")]
    return [
        {
            key.removeprefix(f"{name}_"): value.to(device) if torch.is_tensor(value) else value
            for key, value in batch.items()
            if key.startswith(f"{name}_")
        }
        for name in names
    ]


def default_loss(model: Any) -> Any:
    from sentence_transformers.sentence_transformer import losses

    return losses.MultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE)


def cached_loss(**setting: int) -> Callable[[Any], Any]:
    from sentence_transformers.sentence_transformer import losses

    def make(model: Any) -> Any:
        return losses.CachedMultipleNegativesRankingLoss(model, scale=1 / TEMPERATURE, **setting)

    return make


def best_cached(setting: Setting) -> tuple[dict[str, int], dict[str, float]]:
    tried = [{"mini_batch_size": n} for n in ROWS] + [{"mini_batch_num_tokens": n} for n in TOKENS]
    seconds = {}
    for one in tried:
        try:
            seconds[called(one)] = peer(setting, cached_loss(**one), steps=2).median
        except torch.cuda.OutOfMemoryError:
            free()
    return min(tried, key=lambda one: seconds.get(called(one), math.inf)), seconds


def called(one: dict[str, int]) -> str:
    return " ".join(f"{key} {value}" for key, value in one.items())


# ---- the limit --------------------------------------------------------------------------------


def raw(setting: Setting, *, budget: int | None, steps: int | None = None) -> Timing:
    """Forward and backward in padded buckets of a budget of tokens; None packs them in one row."""
    batch = setting.tokens()
    texts = [*batch.queries, *batch.passages]
    contract = resolve_contract(setting.weights, setting.config.encoder)
    dtype = setting.config.encoder.dtype
    is_frozen = is_half_frozen(setting)
    model = load_backbone(
        setting.weights, dtype="bfloat16" if is_frozen else "float32"
    ).model.to(setting.device).train()  # fmt: skip
    if budget is None:
        use_packing(model, "on", dtype=getattr(torch, dtype))
    if setting.config.lora is not None:
        from peft import LoraConfig, get_peft_model

        rank = setting.config.lora.rank
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=list(LORA_TARGETS)))
    whole = [list(range(len(texts)))]
    buckets = whole if budget is None else list(
        budget_batches([len(ids) for ids in texts], batch_tokens=budget)
    )  # fmt: skip
    gradient_ND = torch.randn(len(texts), contract.dimension, device=setting.device)
    seconds = []
    for _ in range(1 + (steps or setting.steps)):
        model.zero_grad(set_to_none=True)
        began = time.perf_counter()
        for bucket in buckets:
            with torch.autocast(setting.device, torch.bfloat16, enabled=dtype == "bfloat16"):
                vectors = forward(
                    model, contract, [texts[i] for i in bucket], packed=budget is None
                )
            vectors.backward(gradient_ND[bucket])
        if setting.runtime.use_gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return Timing(seconds[1:])


def best_raw(setting: Setting) -> tuple[int | None, dict[str, float]]:
    seconds: dict[int | None, float] = {}
    for budget in (*TOKENS[1:], None):
        try:
            seconds[budget] = raw(setting, budget=budget, steps=2).median
        except torch.cuda.OutOfMemoryError:
            free()
    return min(seconds, key=lambda one: seconds[one]), {
        "packed in one row" if one is None else f"padded to {one} tokens": value
        for one, value in seconds.items()
    }


# ---- Ray --------------------------------------------------------------------------------------


def on_ray(setting: Setting) -> Timing:
    """The same training as `own`, in a worker of Ray Train."""
    from ray_jobs.train import trainer

    with tempfile.TemporaryDirectory(prefix="ray-") as name:
        folder = Path(name)
        trainer(ray_worker, (setting, folder), runtime=setting.runtime, storage=folder).fit()
        found = TrainLog(folder / "log.jsonl").steps()
    return Timing([one["step_s"] for one in found[1:]], found[0]["query_loss"])


def ray_worker(payload: dict[str, Any]) -> None:
    from ray_jobs.train import in_worker

    setting, folder = payload["payload"]
    config = setting.config.model_copy(update={"max_steps": setting.steps + 1})
    loop = partial(
        train, config, setting.without_rewrites(), weights=setting.weights, runtime=setting.runtime
    )
    none = Trackers((), directory=folder, settings={})
    in_worker(loop, storage=folder, trackers=none)


# ---- rounds and table -------------------------------------------------------------------------


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def take_rounds(
    sides: dict[str, Callable[[], Timing]], *, rounds: int
) -> Iterator[dict[str, Timing]]:
    for number in range(rounds):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        found = {}
        for name in names:
            free()
            found[name] = sides[name]()
            print(f"  round {number + 1} {name:>14} {found[name].median:9.3f} s", flush=True)
        yield found


def ratios(rounds: list[dict[str, Timing]]) -> dict[str, dict[str, float]]:
    """Of median step times, by round: how many times as long the first takes as the second."""
    wanted = [
        ("default", "own"), ("cached", "own"), ("default", "own_cached"), ("cached", "own_cached"),
        ("raw", "own"), ("raw", "own_cached"), ("own_cached", "own"), ("own_ri", "own"),
        ("own_ri_cached", "own_cached"), ("plain", "ray"),
    ]  # fmt: skip
    found = {}
    for over, under in wanted:
        if over in rounds[0] and under in rounds[0]:
            values = [one[over].median / one[under].median for one in rounds]
            found[f"{over} / {under}"] = {
                "median": statistics.median(values), "low": min(values), "high": max(values)
            }  # fmt: skip
    return found


def check_equal(timings: dict[str, Timing], *, with_norms: bool, tolerance: float) -> None:
    """Losses and gradient norms of the first step; adapters start at random, so not their norms."""
    reference = timings["own"] if "own" in timings else timings["own_cached"]
    for name, one in timings.items():
        for what in ("loss", "norm") if with_norms else ("loss",):
            a, b = getattr(one, what), getattr(reference, what)
            if a is None or (what == "norm" and "ri" in name):  # other weights, another gradient
                continue
            assert abs(a - b) <= tolerance * abs(b), f"{what} of {name} is {a}, our own {b}"


def analytic(setting: Setting) -> dict[str, float]:
    """What rewritten queries and the gradient cache cost if operations were all that costs."""
    batch = setting.tokens()
    model = load_backbone(setting.weights, dtype=setting.config.encoder.dtype).model
    work = Work.of(model, trains_all=setting.config.lora is None)
    trained = [len(ids) for ids in (*batch.queries, *batch.passages)]
    rewritten = work.forward([len(ids) for ids in batch.rewritten_queries])
    plain = work.forward(trained) + work.backward(trained)
    return {
        "operations": plain,
        "tokens": sum(trained),
        "rewritten_tokens": sum(map(len, batch.rewritten_queries)),
        "own_ri / own": 1 + rewritten / plain,
        "own_ri_cached / own_cached": 1 + rewritten / (plain + work.forward(trained)),
        "own_cached / own": 1 + work.forward(trained) / plain,
    }


def goals(costs: dict[str, float]) -> dict[str, tuple[str, float]]:
    return GOALS | {
        name: ("<=", costs[name] + 0.03) for name in ("own_ri / own", "own_ri_cached / own_cached")
    }


def say(found: dict[str, dict[str, float]], wanted: dict[str, tuple[str, float]]) -> None:
    print(f"{'ratio of step times':>28} {'median':>8} {'range':>17}   goal")
    for name, one in found.items():
        sign, limit = wanted.get(name, ("", 0.0))
        is_met = one["median"] >= limit if sign == ">=" else one["median"] <= limit
        goal = f"{sign} {limit:.3f} {'met' if is_met else 'MISSED'}" if sign else ""
        print(f"{name:>28} {one['median']:8.3f} {one['low']:8.3f} {one['high']:8.3f}   {goal}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--group", type=int, default=8, help="passages a query")
    parser.add_argument("--median", type=int, default=64, help="words a passage")
    parser.add_argument("--spread", type=float, default=0.8, help="sigma of the logarithm")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="that count, a side and round")
    parser.add_argument("--chunk-tokens", type=int, default=1_024, help="of the gradient cache")
    parser.add_argument("--lora", type=int, default=0, help="rank; 0 trains all weights")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="our own side only")
    parser.add_argument("--kernels", choices=["none", "liger"], default="none", help="likewise")
    parser.add_argument("--sides", default="default,cached,own,own_cached,own_ri,own_ri_cached,raw")
    parser.add_argument("--ray", action="store_true", help="compare with Ray Train, at the end")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def make_setting(arguments: argparse.Namespace, folder: Path) -> Setting:
    is_gpu = arguments.device == "cuda"
    dtype = "bfloat16" if is_gpu else "float32"
    saved = dtype if arguments.lora else "float32"
    save_model(folder / "model", arguments.shape, device=arguments.device, dtype=saved)
    rank = arguments.lora
    lora = LoRAConfig(rank=rank, alpha=2 * rank, dropout=0.0) if rank else None
    encoder = EncoderConfig(
        model=str(folder / "model"), query_template="{query}", dtype=dtype,
        max_query_tokens=MAX_TOKENS, max_document_tokens=MAX_TOKENS,
    )  # fmt: skip
    config = TrainConfig(
        encoder=encoder,
        lora=lora,
        batch_queries=arguments.queries,
        group_size=arguments.group,
        max_steps=1,
        learning_rate=RATE,
        temperature=TEMPERATURE,
        intensity_start_step=0,
    )
    runtime = TrainRuntime(
        use_gpu=is_gpu,
        threads=int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        chunk_tokens=ONE_FORWARD,
        checkpoint_every=1_000_000,
        activation_checkpointing=arguments.activation_checkpointing,
        compile=arguments.compile,
        kernels=arguments.kernels,
    )
    samples = make_samples(
        queries=arguments.queries, group=arguments.group, median=arguments.median,
        spread=arguments.spread,
    )  # fmt: skip
    return Setting(folder / "model", samples, config, runtime, arguments.steps)


def make_sides(
    setting: Setting, wanted: list[str], *, chunk_tokens: int
) -> tuple[dict[str, Callable[[], Timing]], dict[str, Any]]:
    plain = setting.without_rewrites()
    tuned: dict[str, Any] = {}
    sides: dict[str, Callable[[], Timing]] = {
        "default": lambda: peer(setting, default_loss),
        "own": lambda: own(setting, plain, chunk_tokens=ONE_FORWARD),
        "own_cached": lambda: own(setting, plain, chunk_tokens=chunk_tokens),
        "own_ri": lambda: own(setting, setting.samples, chunk_tokens=ONE_FORWARD),
        "own_ri_cached": lambda: own(setting, setting.samples, chunk_tokens=chunk_tokens),
    }
    if "cached" in wanted:
        best, tuned["cached"] = best_cached(setting)
        sides["cached"] = lambda: peer(setting, cached_loss(**best))
    if "raw" in wanted:
        budget, tuned["raw"] = best_raw(setting)
        sides["raw"] = lambda: raw(setting, budget=budget)
    return {name: sides[name] for name in wanted}, tuned


def device_name(setting: Setting) -> str:
    if setting.runtime.use_gpu:
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, no accelerator"


def peaks(setting: Setting, rounds: list[dict[str, Timing]], operations: float) -> dict[str, float]:
    """Share of the data sheet's peak, on operations that the method needs, by side."""
    peak = peak_flops(device_name(setting)) if setting.runtime.use_gpu else None
    if peak is None:
        return {}
    return {
        name: operations / statistics.median(one[name].median for one in rounds) / peak
        for name in rounds[0]
        if "ri" not in name
    }


def main() -> None:
    arguments = parse()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="reasonembed-train-") as name:
        setting = make_setting(arguments, Path(name))
        torch.set_num_threads(setting.runtime.threads or 1)
        costs = analytic(setting)
        print(f"{device_name(setting)}: {arguments}\n{costs}", flush=True)
        wanted = arguments.sides.split(",")
        sides, tuned = make_sides(setting, wanted, chunk_tokens=arguments.chunk_tokens)
        print(f"tuned: {tuned}", flush=True)
        rounds = []
        tolerance = 2e-2 if setting.runtime.use_gpu else 1e-4  # bfloat16 has 8 bits
        for found in take_rounds(sides, rounds=arguments.rounds):
            check_equal(found, with_norms=not arguments.lora, tolerance=tolerance)
            rounds.append(found)
        shares = peaks(setting, rounds, costs["operations"])
        if arguments.ray:
            rounds = with_ray(setting, rounds, arguments.rounds)
        write(arguments, setting, rounds, costs=costs, tuned=tuned, shares=shares)


def with_ray(
    setting: Setting, rounds: list[dict[str, Timing]], number: int
) -> list[dict[str, Timing]]:
    from ray_jobs.job import join_or_start
    from reasonembed.config import RuntimeConfig

    join_or_start(RuntimeConfig(train=setting.runtime, object_store_bytes=200_000_000))
    plain = setting.without_rewrites()
    sides = {
        "plain": lambda: own(setting, plain, chunk_tokens=ONE_FORWARD),
        "ray": lambda: on_ray(setting),
    }
    more = take_rounds(sides, rounds=number)
    return [{**one, **other} for one, other in zip(rounds, more, strict=True)]


def write(
    arguments: argparse.Namespace,
    setting: Setting,
    rounds: list[dict[str, Timing]],
    *,
    costs: dict[str, float],
    tuned: dict[str, Any],
    shares: dict[str, float],
) -> None:
    found, wanted = ratios(rounds), goals(costs)
    say(found, wanted)
    for name, share in shares.items():
        print(f"{name:>28} {share:8.1%} of the data sheet's peak")
    place = "train" if arguments.device == "cpu" else f"train-{device_name(setting)}"
    out = arguments.out or RESULTS / f"{place.replace(' ', '-').lower()}.json"
    packages = ("reasonembed", "torch", "transformers", "sentence-transformers", "peft")
    written = {
        "device": device_name(setting),
        "versions": {name: version(name) for name in packages},
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "threads": setting.runtime.threads,
        "analytic": costs,
        "tuned": tuned,
        "seconds": {
            name: statistics.median(one[name].median for one in rounds) for name in rounds[0]
        },
        "ratios": found,
        "goals": {name: f"{sign} {limit:.4f}" for name, (sign, limit) in wanted.items()},
        "share_of_peak": shares,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
