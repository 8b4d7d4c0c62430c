"""Texts to vectors: the one encoder that mining, evaluation and the service share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reasonembed.config import EncoderConfig
from reasonembed.embedder.contract import (
    SWITCHABLE,
    Attention,
    TokenisationContract,
    load_tokenizer,
    read_contract,
    resolve_contract,
)
from reasonembed.embedder.golden import verify_golden
from reasonembed.embedder.packing import Packing, use_packing
from reasonembed.embedder.pooling import forward
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, TokenIds
from reasonembed.errors import ModelError
from reasonembed.models import quiet_transformers, resolve

Vectors = NDArray[np.float32]

CACHED_TOKENS = 2_048
"""On CPUs larger batches are slower: what layers hand on leaves the cache."""


@dataclass(frozen=True)
class Backbone:
    """A loaded checkpoint: a transformers model without head, and its tokenizer."""

    model: Any
    tokenizer: Any


@dataclass(frozen=True)
class EncodeStats:
    """Work done since the encoder was made.

    Attributes:
        texts: Texts asked for, duplicates included.
        computed: Token sequences that went through the model.
        tokens: Tokens of those, padding not counted.
        padded_tokens: The same with padding; equal where batches are packed.
    """

    texts: int = 0
    computed: int = 0
    tokens: int = 0
    padded_tokens: int = 0


def load_backbone(
    path: Path, *, dtype: str, layers: int | None = None, attention: Attention | None = None
) -> Backbone:
    """Loads model (evaluation mode, given dtype) and tokenizer from a checkpoint folder.

    Args:
        path: The folder.
        dtype: Of the weights.
        layers: Only the first layers of a decoder are loaded; default all.
        attention: Which tokens a token sees; default as the weights' configuration says.

    Raises:
        ModelError: transformers cannot load the folder.
    """
    from transformers import AutoConfig, AutoModel

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path)
            if layers is not None:
                config.num_hidden_layers = layers
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[:layers]
            _set_attention(config, attention)
            model = AutoModel.from_pretrained(path, config=config, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be loaded: {error}") from error
    model.config.use_cache = False  # a key-value cache serves generation only
    return Backbone(model.eval(), load_tokenizer(path))


def _set_attention(config: Any, attention: Attention | None) -> None:
    """Makes a decoder causal or not; other models are what they are.

    transformers reads this key in every pass, for masks and for attention without a mask.
    """
    if attention is None or config.model_type not in SWITCHABLE:
        return
    wanted = attention is Attention.CAUSAL
    if getattr(config, "is_causal", True) != wanted:
        config.is_causal = wanted


def budget_batches(
    lengths: Sequence[int], *, batch_tokens: int, packed: bool = False
) -> Iterator[list[int]]:
    """Cuts indices into batches of similar length, longest first.

    Longest first, so that a batch that does not fit into memory fails at once. A text longer than
    the budget is a batch of its own.

    Args:
        lengths: Tokens of each text.
        batch_tokens: Largest size of a batch: its tokens where it is packed, else its texts x the
            longest text.
        packed: Whether batches are packed.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    batch: list[int] = []
    size = 0
    for index in order:
        # A padded text takes as many places as the longest one, which stands first.
        places = lengths[index] if packed or not batch else lengths[batch[0]]
        if batch and size + places > batch_tokens:
            yield batch
            batch, size, places = [], 0, lengths[index]
        batch.append(index)
        size += places
    if batch:
        yield batch


class Embedder:
    """Embeds queries and documents under a contract.

    Args:
        source: A checkpoint folder, or what `load_backbone` gave.
        contract: How texts become vectors.
        device: Of the model; default CUDA where there is one, else CPU.
        batch_tokens: Tokens a forward pass, padding included, at most; CPUs take fewer.
        threads: Threads of the maths library in this process; default as it is.
        packing: Whether forward passes are free of padding; see `packing.use_packing`.
    """

    def __init__(
        self,
        source: Path | Backbone,
        contract: TokenisationContract,
        *,
        device: str | None = None,
        batch_tokens: int = 8_192,
        threads: int | None = None,
        packing: Packing = "auto",
    ) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        loaded = source
        if isinstance(loaded, Path):
            loaded = load_backbone(
                loaded, dtype=contract.dtype, layers=contract.layers, attention=contract.attention
            )
        self.contract = contract
        self.stats = EncodeStats()
        self._model = loaded.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer = ContractTokenizer(loaded.tokenizer, contract)
        self._batch_tokens = batch_tokens
        self._packed = use_packing(self._model, packing)

    @classmethod
    def load(
        cls,
        config: EncoderConfig,
        *,
        cache_dir: str | None = None,
        device: str | None = None,
        batch_tokens: int = 8_192,
        threads: int | None = None,
    ) -> Embedder:
        """Finds the weights, resolves the contract and loads both.

        Raises:
            ModelError: The weights cannot be found or loaded.
            ConfigError: The configuration does not fit the weights.
        """
        path = resolve(config.model, cache_dir=cache_dir)
        contract = resolve_contract(path, config)
        return cls(path, contract, device=device, batch_tokens=batch_tokens, threads=threads)

    @classmethod
    def load_export(
        cls,
        directory: Path,
        *,
        device: str | None = None,
        batch_tokens: int = 8_192,
        threads: int | None = None,
    ) -> Embedder:
        """Loads an exported model with the contract that lies beside it, and checks it.

        Raises:
            ModelError: There is no contract, the folder cannot be loaded, or it does not give the
                golden token ids and vectors that it was exported with.
        """
        contract = read_contract(directory)
        made = cls(directory, contract, device=device, batch_tokens=batch_tokens, threads=threads)
        verify_golden(made, directory)
        return made

    def tokenise(
        self, texts: Sequence[str], *, role: Role, instruction: str = ""
    ) -> list[TokenIds]:
        """Token ids as the model gets them; see `ContractTokenizer.tokenise`."""
        return self._tokenizer.tokenise(texts, role=role, instruction=instruction)

    def encode_queries(self, texts: Sequence[str], *, instruction: str = "") -> Vectors:
        """Vectors of queries, float32 [N, D]; the template is applied here."""
        return self._encode(texts, role=Role.QUERY, instruction=instruction)

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        """Vectors of documents, float32 [N, D]; the template is applied here."""
        return self._encode(texts, role=Role.DOCUMENT)

    def _encode(self, texts: Sequence[str], *, role: Role, instruction: str = "") -> Vectors:
        skip = 0
        if not self.contract.pool_template:
            skip = self._tokenizer.tokens_before_text(role=role, instruction=instruction)
        ids = self.tokenise(texts, role=role, instruction=instruction)
        return self.encode_ids(ids, skip=skip)

    def encode_ids(self, sequences: Sequence[TokenIds], *, skip: int = 0) -> Vectors:
        """Vectors of token sequences in the given order, float32 [N, D].

        Equal sequences are computed once, so that they get the identical vector.

        Args:
            sequences: Token ids.
            skip: First tokens of each that do not enter a mean; see `pooling.pool`.
        """
        unique = list(dict.fromkeys(sequences))
        lengths = [len(ids) for ids in unique]
        vectors = np.empty((len(unique), self.contract.dimension), dtype=np.float32)

        def one_batch(batch: list[int]) -> int:
            texts = [unique[i] for i in batch]
            vectors[batch] = self.one_pass(texts, skip=skip)
            return sum(map(len, texts)) if self._packed else len(texts) * len(texts[0])

        budget = self._batch_tokens
        if self.is_on_cpu:
            budget = min(budget, CACHED_TOKENS)
        batches = budget_batches(lengths, batch_tokens=budget, packed=self._packed)
        places = sum(self._map(one_batch, list(batches)))
        self.stats = EncodeStats(
            texts=self.stats.texts + len(sequences),
            computed=self.stats.computed + len(unique),
            tokens=self.stats.tokens + sum(lengths),
            padded_tokens=self.stats.padded_tokens + places,
        )
        where = {ids: row for row, ids in enumerate(unique)}
        return vectors[[where[ids] for ids in sequences]]

    def one_pass(self, batch: Sequence[TokenIds], *, skip: int = 0) -> Vectors:
        """Vectors of one forward pass on the calling thread, float32 [B, D].

        Args:
            batch: Token ids, at least one text, none empty.
            skip: First tokens of each that do not enter a mean; see `pooling.pool`.
        """
        with torch.inference_mode():  # holds for this thread alone
            found = forward(self._model, self.contract, batch, packed=self._packed, skip=skip)
            return np.asarray(found.cpu())

    @property
    def is_on_cpu(self) -> bool:
        """Whether forward passes take cores rather than a device of their own."""
        return str(self._model.device.type) == "cpu"

    def _map(self, work: Callable[[list[int]], int], batches: list[list[int]]) -> list[int]:
        """On CPUs a batch has a core to itself: cores that share one wait after each operation."""
        cores = torch.get_num_threads()
        if not self.is_on_cpu or cores == 1 or len(batches) < cores:
            return [work(batch) for batch in batches]
        try:
            with ThreadPoolExecutor(
                cores, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                return list(pool.map(work, batches))
        finally:
            torch.set_num_threads(cores)  # what a thread says counts for those started after it
