"""How fast are texts embedded, against the products alone and against sentence-transformers?

    OMP_NUM_THREADS=2 python benchmarks/encode.py [--texts 64] [--rounds 5] [--device cuda]

The embedder of each of `--models` (all-MiniLM-L6-v2, a decoder of random weights) over texts of
skewed lengths as BRIGHT's passages have them (lognormal), tokenisation included:

- own: `Embedder.encode_documents`
- peer: `SentenceTransformer.encode` as it comes, 32 texts a batch, sorted by length
- peer_best: the same at the fastest of several batch sizes
- limit: the matrix products of the same tokens and nothing else, packed, at their own shapes, in
  the fastest of several ways to batch them and to share the cores

once with distinct texts, and once where 23 % are exact copies, BRIGHT's share. The limit computes
each distinct text once in both. Vectors of all sides must agree before anything is timed.

Rounds run the sides in turns, in one order and then in the other; ratios are taken within a round:
median and 95 % bootstrap interval of it. Prints a table and writes `benchmarks/results/encode.json`
(on a GPU `encode-<device>.json`).
"""

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from reasonembed.config import EncoderConfig
from reasonembed.corpus import read_corpus
from reasonembed.embedder.contract import load_tokenizer, resolve_contract
from reasonembed.embedder.encode import Embedder, budget_batches
from reasonembed.embedder.tokenisation import Role
from reasonembed.models import resolve

RESULTS = Path(__file__).parent / "results"
MINILM = "all-minilm-l6-v2"
MAX_TOKENS = 512
MEDIAN_WORDS, SPREAD = 130, 0.9  # mean about 200 words; BRIGHT's passages have 315 tokens
COPIES = 0.23
BATCH_SIZES = (4, 8, 16, 64)  # 32 is the peer's default
GOALS = {
    "distinct": {"peer / own": 1.1, "limit / own": 0.7},
    "copies": {"peer / own": 1.35},
}
DECODER = {
    "hidden_size": 768, "intermediate_size": 2_048, "num_hidden_layers": 6,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip


def make_texts(number: int, *, share_of_copies: float) -> list[str]:
    """Texts of real words; the copies stand anywhere."""
    rng = random.Random(0)
    words = " ".join(read_corpus("python-stdlib", limit=400)["text"].to_pylist()).split()
    num_distinct = round(number * (1 - share_of_copies))
    texts = []
    for _ in range(num_distinct):
        length = max(5, round(rng.lognormvariate(np.log(MEDIAN_WORDS), SPREAD)))
        start = rng.randrange(len(words) - min(length, len(words) // 2))
        texts.append(" ".join(words[start : start + length]))
    texts += rng.choices(texts, k=number - num_distinct)
    rng.shuffle(texts)
    return texts


def encoder_config(model: str, folder: Path, *, dtype: str) -> EncoderConfig:
    """The packaged model, or a Qwen3 of random weights under its tokenizer."""
    if model == "decoder":
        path = resolve(MINILM)
        tokenizer = load_tokenizer(path)
        torch.manual_seed(0)
        config = transformers.Qwen3Config(
            vocab_size=len(tokenizer), max_position_embeddings=MAX_TOKENS, **DECODER
        )
        transformers.Qwen3Model(config).to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model = str(folder)
    return EncoderConfig(
        model=model, query_template="{query}", max_query_tokens=MAX_TOKENS,
        max_document_tokens=MAX_TOKENS, dtype=dtype,
    )  # fmt: skip


def make_peer(config: EncoderConfig, *, device: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    path = resolve(config.model)
    transformer = modules.Transformer(
        str(path), max_seq_length=MAX_TOKENS, model_kwargs={"dtype": getattr(torch, config.dtype)}
    )
    transformer.tokenizer.padding_side = "right"
    pooling = resolve_contract(path, config).pooling.value
    mode = {"last": "lasttoken"}.get(pooling, pooling)
    pool = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode=mode)
    return SentenceTransformer(modules=[transformer, pool, modules.Normalize()], device=device)


def products(
    own: Embedder, texts: list[str], *, budget: int, workers: int, device: str
) -> Callable[[], None]:
    """The products of one pass over the distinct texts; with workers, one core each."""
    lengths = [len(ids) for ids in own.tokenise(list(dict.fromkeys(texts)), role=Role.DOCUMENT)]
    batches = [
        [lengths[i] for i in batch]
        for batch in budget_batches(lengths, batch_tokens=budget, packed=True)
    ]
    model = own._model
    weights = [
        one.weight
        for name, one in model.named_modules()
        if isinstance(one, torch.nn.Linear) and "pooler" not in name  # no vector needs that one
    ]
    config, like = model.config, {"dtype": next(model.parameters()).dtype, "device": device}
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    inputs = {
        total: {width: torch.randn(total, width, **like) for width in {w.shape[1] for w in weights}}
        for total in {sum(batch) for batch in batches}
    }
    attended = {length: torch.randn(heads, length, size, **like) for length in set(lengths)}

    @torch.inference_mode()
    def one_batch(batch: list[int]) -> None:
        for weight in weights:
            torch.mm(inputs[sum(batch)][weight.shape[1]], weight.T)
        for _ in range(config.num_hidden_layers):
            for length in batch:
                query = attended[length]
                torch.bmm(torch.bmm(query, query.transpose(1, 2)), query)

    def run() -> None:
        cores = torch.get_num_threads()
        if workers == 1:
            for batch in batches:
                one_batch(batch)
        else:
            with ThreadPoolExecutor(workers, torch.set_num_threads, initargs=(1,)) as pool:
                list(pool.map(one_batch, batches))
            torch.set_num_threads(cores)
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def fastest_products(own: Embedder, texts: list[str], *, device: str) -> Callable[[], None]:
    ways = [
        products(own, texts, budget=budget, workers=workers, device=device)
        for budget in (2_048, 8_192)
        for workers in {1, 1 if device == "cuda" else torch.get_num_threads()}
    ]
    for one in ways:
        one()
    return min(ways, key=timed)


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def make_sides(own: Embedder, peer: Any, texts: list[str], *, device: str) -> tuple[dict, dict]:
    """Sides by name, and what was tried to find the best; all vectors equal."""

    def ask(batch_size: int) -> Any:
        return peer.encode(texts, batch_size=batch_size, show_progress_bar=False)

    ours = own.encode_documents(texts)
    tolerance = 1e-5 if ours.dtype == np.float32 and device == "cpu" else 2e-2
    cosines = (ours * np.asarray(ask(32), dtype=np.float32)).sum(axis=1)
    assert abs(cosines - 1).max() < tolerance, f"vectors differ: cosine {cosines.min()}"
    tried = {size: timed(lambda size=size: ask(size)) for size in (*BATCH_SIZES, 32)}
    best = min(tried, key=lambda size: tried[size])
    sides = {
        "own": lambda: own.encode_documents(texts),
        "peer": lambda: ask(32),
        "peer_best": lambda: ask(best),
        "limit": fastest_products(own, texts, device=device),
    }
    return sides, {"batch_size": best, "seconds": tried}


def take_rounds(sides: dict[str, Callable[[], Any]], *, rounds: int) -> list[dict[str, float]]:
    found = []
    for number in range(rounds + 1):
        names = list(sides) if number % 2 == 0 else list(reversed(sides))
        found.append({name: timed(sides[name]) for name in names})
    return found[1:]  # the first warms up


def ratios(rounds: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """How many times as long the first side takes as the second, within a round."""
    found = {}
    for over, under in (("peer", "own"), ("peer_best", "own"), ("limit", "own")):
        values = [one[over] / one[under] for one in rounds]
        drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
        low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975]).tolist()
        found[f"{over} / {under}"] = {
            "median": statistics.median(values), "low": low, "high": high
        }  # fmt: skip
    return found


def measure(model: str, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    dtype = "float32" if arguments.device == "cpu" else "bfloat16"
    config = encoder_config(model, folder, dtype=dtype)
    own = Embedder.load(config, device=arguments.device)
    peer = make_peer(config, device=arguments.device)
    found = {}
    for name, share in (("distinct", 0.0), ("copies", COPIES)):
        texts = make_texts(arguments.texts, share_of_copies=share)
        before = own.stats
        own.encode_documents(texts)
        tokens = own.stats.tokens - before.tokens
        sides, tried = make_sides(own, peer, texts, device=arguments.device)
        rounds = take_rounds(sides, rounds=arguments.rounds)
        found[name] = {
            "distinct_tokens": tokens,
            "peer_best": tried,
            "seconds": {side: statistics.median(one[side] for one in rounds) for side in sides},
            "ratios": ratios(rounds),
        }
        say(model, name, found[name])
    return found


def say(model: str, name: str, row: dict[str, Any]) -> None:
    seconds = ", ".join(f"{side} {took:.2f} s" for side, took in row["seconds"].items())
    print(f"{model}, {name}: {seconds}; {row['distinct_tokens'] / row['seconds']['own']:.0f} "
          "distinct tokens a second")  # fmt: skip
    for ratio, of in row["ratios"].items():
        goal = GOALS[name].get(ratio)
        verdict = "" if goal is None else f">= {goal} {'met' if of['median'] >= goal else 'MISSED'}"
        print(f"{ratio:>20} {of['median']:6.2f} {of['low']:6.2f} to {of['high']:.2f}  {verdict}",
              flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default=MINILM, help=f"{MINILM},decoder")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    name = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, no accelerator"
    if arguments.device == "cuda":
        name = torch.cuda.get_device_name()
    models = {}
    for model in arguments.models.split(","):
        with tempfile.TemporaryDirectory(prefix="reasonembed-encode-") as folder:
            models[model] = measure(model, arguments, Path(folder))
    place = "encode" if arguments.device == "cpu" else f"encode-{name}".replace(" ", "-").lower()
    out = arguments.out or RESULTS / f"{place}.json"
    packages = ("reasonembed", "torch", "transformers", "sentence-transformers")
    written = {
        "device": name,
        "versions": {one: version(one) for one in packages},
        "texts": arguments.texts,
        "rounds": arguments.rounds,
        "threads": torch.get_num_threads(),
        "goals": GOALS,
        "models": models,
    }
    out.parent.mkdir(exist_ok=True)
    out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
