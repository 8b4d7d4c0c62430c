"""What a model costs follows from its shape: read from config.json, or known by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reasonembed.errors import ConfigError
from reasonembed.models import is_at_hand, resolve


@dataclass(frozen=True)
class ModelShape:
    """The numbers of a transformer that decide its work.

    Attributes:
        name: As the configuration calls it.
        layers: Of the stack.
        hidden: Width of the residual stream.
        heads: Of attention.
        kv_heads: Heads of keys and values.
        head_dim: Of each head.
        intermediate: Width of the feed-forward layer, or of one expert.
        vocab: Tokens known.
        is_gated: Three matrices in the feed-forward layer, not two.
        is_tied: One table for input and output embeddings.
        is_causal: Tokens see those before them alone.
        experts: Feed-forward layers to choose from; 1 for a dense model.
        active_experts: Chosen for a token.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    is_gated: bool = True
    is_tied: bool = False
    is_causal: bool = True
    experts: int = 1
    active_experts: int = 1

    @property
    def attention_width(self) -> int:
        """Heads times their size."""
        return self.heads * self.head_dim

    def _layer(self, experts: int) -> int:
        attention = 2 * self.hidden * (self.attention_width + self.kv_heads * self.head_dim)
        matrices = 3 if self.is_gated else 2
        return attention + matrices * self.hidden * self.intermediate * experts

    @cached_property
    def inner_weights(self) -> int:
        """All matrices but the embeddings; norms and biases are under 0.1 % and left out."""
        return self.layers * self._layer(self.experts)

    @cached_property
    def active_weights(self) -> int:
        """Of these, what a token goes through."""
        return self.layers * self._layer(self.active_experts)

    @property
    def embedding(self) -> int:
        """Weights of one table of embeddings."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All of them."""
        has_head = self.is_causal and not self.is_tied
        return self.inner_weights + self.embedding * (2 if has_head else 1)

    def kv_bytes(self, *, bits: int = 16) -> float:
        """Bytes of keys and values that a token leaves behind."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bits / 8

    def cut(self, layers: int | None) -> ModelShape:
        """The same with the first layers only."""
        return self if layers is None else replace(self, layers=min(layers, self.layers))


def _decoder(name: str, *sizes: int, tied: bool = False, causal: bool = True) -> ModelShape:
    layers, hidden, heads, kv_heads, head_dim, intermediate, vocab = sizes
    return ModelShape(
        name, layers, hidden, heads, kv_heads, head_dim, intermediate, vocab,
        is_tied=tied, is_causal=causal,
    )  # fmt: skip


def _bert(name: str, layers: int, hidden: int, heads: int, vocab: int) -> ModelShape:
    return ModelShape(
        name, layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab,
        is_gated=False, is_causal=False,
    )  # fmt: skip


KNOWN: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _decoder("Qwen3-0.6B", 28, 1024, 16, 8, 128, 3072, 151_936, tied=True),
        _decoder("Qwen3-1.7B", 28, 2048, 16, 8, 128, 6144, 151_936, tied=True),
        _decoder("Qwen3-4B", 36, 2560, 32, 8, 128, 9728, 151_936, tied=True),
        _decoder("Qwen3-8B", 36, 4096, 32, 8, 128, 12_288, 151_936),
        _decoder("Qwen3-14B", 40, 5120, 40, 8, 128, 17_408, 151_936),
        _decoder("Qwen3-32B", 64, 5120, 64, 8, 128, 25_600, 151_936),
        ModelShape(
            "Qwen3-235B-A22B", 94, 4096, 64, 4, 128, 1536, 151_936, experts=128, active_experts=8
        ),
        _decoder("Qwen2.5-7B-Instruct", 28, 3584, 28, 4, 128, 18_944, 152_064),
        _decoder("Qwen2.5-14B-Instruct", 48, 5120, 40, 8, 128, 13_824, 152_064),
        _decoder("Qwen2.5-32B-Instruct", 64, 5120, 40, 8, 128, 27_648, 152_064),
        _decoder("Qwen2.5-72B-Instruct", 80, 8192, 64, 8, 128, 29_568, 152_064),
        _decoder("Llama-3.1-8B", 32, 4096, 32, 8, 128, 14_336, 128_256),
        _decoder("Llama-3.1-8B-Instruct", 32, 4096, 32, 8, 128, 14_336, 128_256),
        _decoder("Llama-3.1-70B-Instruct", 80, 8192, 64, 8, 128, 28_672, 128_256),
        _decoder("gte-Qwen2-7B-instruct", 28, 3584, 28, 4, 128, 18_944, 151_646, causal=False),
        _decoder("gte-Qwen2-1.5B-instruct", 28, 1536, 12, 2, 128, 8960, 151_646, causal=False),
        _decoder("smollm2-135m-instruct", 30, 576, 9, 3, 64, 1536, 49_152, tied=True),
        _decoder("SmolLM2-360M-Instruct", 32, 960, 15, 5, 64, 2560, 49_152, tied=True),
        _decoder("SmolLM2-1.7B-Instruct", 24, 2048, 32, 32, 64, 8192, 49_152, tied=True),
        _bert("all-minilm-l6-v2", 6, 384, 12, 30_522),
        _bert("all-mpnet-base-v2", 12, 768, 12, 30_527),
        _bert("bge-large-en-v1.5", 24, 1024, 16, 30_522),
    )
}
_SAME_AS = {
    "reason-embed-annotator-qwen3-8b-0928": "Qwen3-8B",
    "Qwen3-Embedding-0.6B": "Qwen3-0.6B",
    "Qwen3-Embedding-4B": "Qwen3-4B",
    "Qwen3-Embedding-8B": "Qwen3-8B",
    "reason-embed-qwen3-4b-0928": "Qwen3-4B",
    "reason-embed-qwen3-8b-0928": "Qwen3-8B",
    "reason-embed-llama-3.1-8b-0928": "Llama-3.1-8B",
    "all-MiniLM-L6-v2": "all-minilm-l6-v2",
    "SmolLM2-135M-Instruct": "smollm2-135m-instruct",
    "Qwen2-7B-instruct": "Qwen2.5-7B-Instruct",
}


def shape_of(model: str, *, cache_dir: str | None = None) -> ModelShape:
    """The shape of a model; nothing is fetched for it.

    Args:
        model: A folder, a packaged name or a hub id.
        cache_dir: Of packaged weights.

    Raises:
        ConfigError: Its weights are not at hand and its name is not known.
    """
    folder = folder_of(model, cache_dir=cache_dir)
    if folder is not None:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return shape_from(settings, name=model)
    last = model.rstrip("/").rsplit("/", 1)[-1]
    by_name = {name.lower(): shape for name, shape in KNOWN.items()}
    alias = {name.lower(): other for name, other in _SAME_AS.items()}
    known = by_name.get(alias.get(last.lower(), last).lower())
    if known is not None:
        return replace(known, name=model)
    if (begun := _model_of_run(model)) is not None:
        return replace(shape_of(begun, cache_dir=cache_dir), name=model)
    raise ConfigError(
        f"the shape of model {model!r} is not known: its weights are not on this machine. Put its "
        f"config.json into a folder of that name, or plan with one of {', '.join(sorted(KNOWN))}"
    )


def folder_of(model: str, *, cache_dir: str | None = None) -> Path | None:
    """Where a model's files lie on this machine; None where they would have to be fetched."""
    if (Path(model).expanduser() / "config.json").is_file():
        return Path(model).expanduser()
    return resolve(model, cache_dir=cache_dir) if is_at_hand(model, cache_dir=cache_dir) else None


def _model_of_run(model: str) -> str | None:
    """What another run, not finished yet, trains: `runs/x/export/model` has x's backbone."""
    if not model.endswith("/export/model"):
        return None
    run = Path(model).parent.parent
    for place in (run / "config.resolved.yaml", Path("configs") / f"{run.name}.yaml"):
        if place.is_file():
            from reasonembed.config import load

            return load(place).train.encoder.model
    return None


def shape_from(settings: Mapping[str, Any], *, name: str) -> ModelShape:
    """Reads a transformers config.json.

    Raises:
        ConfigError: It lacks the sizes of a transformer.
    """
    settings = settings.get("text_config") or settings
    try:
        hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
        layers, vocab = settings["num_hidden_layers"], settings["vocab_size"]
    except KeyError as error:
        raise ConfigError(f"{name}: config.json has no {error.args[0]}") from None
    experts = settings.get("num_experts") or settings.get("num_local_experts") or 1
    is_encoder = settings.get("model_type") in _ENCODERS
    intermediate = settings.get("intermediate_size") or 4 * hidden
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or hidden // heads,
        intermediate=settings.get("moe_intermediate_size") or intermediate,
        vocab=vocab,
        is_gated=not is_encoder or settings.get("model_type") == "modernbert",
        is_tied=bool(settings.get("tie_word_embeddings", is_encoder)),
        is_causal=not is_encoder,
        experts=experts,
        active_experts=settings.get("num_experts_per_tok") or 1,
    )


_ENCODERS = {"bert", "mpnet", "roberta", "xlm-roberta", "distilbert", "modernbert", "deberta-v2"}
