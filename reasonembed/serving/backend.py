"""From what a configuration calls its model to the two things that the service needs of it.

`model` may name a run, an exported model, a system of the catalogue, a packaged name, a local
folder, a hub id, or `echo`. Nothing heavy is imported before one of them is opened.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reasonembed.config import ServeConfig
from reasonembed.embedder.contract import TokenisationContract, load_tokenizer
from reasonembed.embedder.golden import verify_golden, verify_golden_ids
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, TokenIds
from reasonembed.errors import ConfigError, ModelError
from reasonembed.serving.bare import bare_tokenizer
from reasonembed.serving.echo import VOCABULARY_SIZE, EchoModel
from reasonembed.serving.preparation import ContractPreparer
from reasonembed.serving.protocol import (
    EmbedItem,
    InputType,
    Prepared,
    Preparer,
    ServedModel,
    Vectors,
)
from reasonembed.serving.target import GENERIC, Target, find_target

if TYPE_CHECKING:  # torch and vLLM, seconds to load
    from reasonembed.embedder.encode import Embedder
    from reasonembed.llm.vllm import PoolingEngine

ECHO = "echo"
Forward = Callable[[list[Prepared]], Vectors]
_CPU_BATCH_TOKENS, _GPU_BATCH_TOKENS = 2_048, 16_384


@dataclass(frozen=True)
class OpenModel:
    """A model that was opened.

    Attributes:
        served: What the service says of it.
        preparer: Its tokenisation.
        forward: One batch on the calling thread, several threads at once; float32 [B, D] in the
            order given. None where the model was opened to tokenise alone.
        lanes: How many threads may call `forward` at once.
        batch_tokens: Padded tokens that a batch should not pass.
        warm_tokens: Length of the text that warms it up.
    """

    served: ServedModel
    preparer: Preparer
    forward: Forward | None
    lanes: int
    batch_tokens: int
    warm_tokens: int

    def warm_up(self) -> float:
        """Embeds a short text and a longest one.

        Returns:
            Seconds of the longest: what a short query waits at most for a text that runs.

        Raises:
            ModelError: A vector is not finite, or of another length than the contract says.
        """
        assert self.forward is not None, "opened to tokenise alone"
        is_query = self.served.max_query_tokens > self.served.max_document_tokens
        role: InputType = "query" if is_query else "document"
        seconds = 0.0
        for words in (1, self.warm_tokens):
            text = "warm " * words
            [prepared] = self.preparer.prepare([EmbedItem(text, role=role, truncate="end")])
            assert isinstance(prepared, Prepared), prepared
            started = time.perf_counter()
            [vector] = self.forward([prepared])
            seconds = time.perf_counter() - started
            if vector.shape != (self.served.dimension,) or not np.isfinite(vector).all():
                raise ModelError(
                    f"{self.served.name}: a text of {len(prepared.ids)} tokens gets a vector of "
                    f"{len(vector)} numbers, {int(np.isfinite(vector).sum())} of them finite; "
                    f"expected {self.served.dimension}. Does the model work in this dtype?"
                )
        return seconds


def open_model(config: ServeConfig, *, forwards: bool = True) -> OpenModel:
    """Loads a model and checks it, or only what tokenises for it.

    Args:
        config: Names it and says how it is run.
        forwards: Whether it will embed. Without, no weights are loaded; golden token ids are
            checked in any case, golden vectors by whoever embeds.

    Raises:
        ModelError: There is no such model, it cannot be loaded, or it does not give its golden
            token ids and vectors.
        ConfigError: The configuration does not fit the model.
    """
    if config.model == ECHO:
        return _open_echo(config, forwards=forwards)
    target = find_target(config)
    preparer = ContractPreparer(
        _tokenizer(target, forwards=forwards),
        target.contract,
        default_instruction=_default_instruction(target, config),
    )
    served = _served(target, config, preparer=preparer)
    on_gpu = config.embedder.num_gpus > 0
    lanes = config.batching.lanes or (1 if on_gpu else config.embedder.threads or 1)
    forward: Forward | None = None
    if forwards and config.embedder.backend == "vllm":
        forward, lanes, on_gpu = _vllm(target, config), 1, True
    elif forwards:
        forward, lanes, on_gpu = _torch(target, config)
    return OpenModel(
        served,
        preparer,
        forward,
        lanes=lanes,
        batch_tokens=_batch_tokens(config, on_gpu=on_gpu),
        warm_tokens=max(served.max_query_tokens, served.max_document_tokens),
    )


def _tokenizer(target: Target, *, forwards: bool) -> Any:
    """A tokenizer for the preparer alone; that of an export gives the golden token ids."""
    if not target.is_export:
        return load_tokenizer(target.path)
    if not forwards and (bare := bare_tokenizer(target.path, target.contract)) is not None:
        return bare
    tokenizer = load_tokenizer(target.path)
    verify_golden_ids(ContractTokenizer(tokenizer, target.contract), target.path)
    return tokenizer


def _batch_tokens(config: ServeConfig, *, on_gpu: bool) -> int:
    return config.batching.batch_tokens or (_GPU_BATCH_TOKENS if on_gpu else _CPU_BATCH_TOKENS)


def _open_echo(config: ServeConfig, *, forwards: bool) -> OpenModel:
    instruction = GENERIC if config.instruction is None else config.instruction
    model, limit = EchoModel(config.echo, default_instruction=instruction), config.echo.max_tokens
    served = ServedModel(
        name=config.name or ECHO,
        fingerprint=f"echo-{config.echo.dimension}-{limit}",
        dimension=config.echo.dimension,
        dimensions=_lengths(config, (), dimension=config.echo.dimension),
        max_query_tokens=limit,
        max_document_tokens=limit,
        vocabulary_size=VOCABULARY_SIZE,
        created=0,
        default_instruction=instruction,
        aliases=config.aliases,
        longest_s=limit / config.echo.tokens_per_s if config.echo.tokens_per_s else 0.0,
    )
    return OpenModel(
        served,
        model,
        model.forward if forwards else None,
        lanes=config.batching.lanes or 1,
        batch_tokens=_batch_tokens(config, on_gpu=False),
        warm_tokens=1,  # at a stated speed a longest text would take long and warm nothing
    )


def _default_instruction(target: Target, config: ServeConfig) -> str:
    """Of queries that name none; "" where the model takes none.

    Raises:
        ConfigError: One is configured for such a model.
    """
    contract = target.contract
    takes_one = _takes_instruction(contract)
    if config.instruction and not takes_one:
        raise ConfigError(
            f"instruction: the query template of {config.model} is "
            f"{contract.query_template!r}, which takes none; leave it out"
        )
    if not takes_one:
        return ""
    return target.instruction if config.instruction is None else config.instruction


def _takes_instruction(contract: TokenisationContract) -> bool:
    return "{instruction}" in contract.query_template


def _served(target: Target, config: ServeConfig, *, preparer: ContractPreparer) -> ServedModel:
    contract = target.contract
    return ServedModel(
        name=config.name or target.name,
        fingerprint=contract.fingerprint(),
        dimension=contract.dimension,
        dimensions=_lengths(config, contract.matryoshka_dimensions, dimension=contract.dimension),
        max_query_tokens=contract.max_query_tokens,
        max_document_tokens=contract.max_document_tokens,
        vocabulary_size=preparer.vocabulary_size,
        created=int((target.path / "config.json").stat().st_mtime),
        default_instruction=preparer.default_instruction,
        takes_instruction=_takes_instruction(contract),
        aliases=config.aliases,
        is_checked=target.is_export,
    )


def _lengths(config: ServeConfig, trained: Sequence[int], *, dimension: int) -> tuple[int, ...]:
    """Shorter lengths that vectors may be cut to, ascending."""
    if wrong := [one for one in config.dimensions if one >= dimension]:
        raise ConfigError(
            f"dimensions {wrong}: vectors of {config.model} have {dimension} numbers, and shorter "
            "ones are cut from them"
        )
    return tuple(sorted({*trained, *config.dimensions}))


# ---- forward passes -------------------------------------------------------------------------


def _torch(target: Target, config: ServeConfig) -> tuple[Forward, int, bool]:
    """The forward pass, how many at once, and whether they run on a GPU."""
    import torch

    from reasonembed.embedder.encode import Embedder

    embedder = Embedder(target.path, target.contract)
    if target.is_export:
        verify_golden(embedder, target.path)
    if not embedder.is_on_cpu:
        return _TorchForward(embedder, threads=None), config.batching.lanes or 1, True
    cores = config.embedder.threads or torch.get_num_threads()
    lanes = config.batching.lanes or cores
    return _TorchForward(embedder, threads=max(1, cores // lanes)), lanes, False


class _TorchForward:
    """Runs batches on whatever thread calls.

    Args:
        embedder: The model.
        threads: Of the maths library for one batch; None leaves it as it is. A batch that has a
            core to itself never waits for another core after an operation, as `Embedder` has it.
    """

    def __init__(self, embedder: Embedder, *, threads: int | None) -> None:
        self._embedder, self._threads = embedder, threads
        self._lane = threading.local()

    def __call__(self, batch: list[Prepared]) -> Vectors:
        if self._threads is not None and not hasattr(self._lane, "is_set"):
            import torch

            torch.set_num_threads(self._threads)  # of this thread, and of those started later
            self._lane.is_set = True
        return _by_skip(batch, self._embedder.one_pass, dimension=self._embedder.contract.dimension)


def _by_skip(batch: list[Prepared], one_pass: Callable[..., Vectors], *, dimension: int) -> Vectors:
    """Vectors in the order given; a pass for each number of tokens that stay out of the mean."""
    vectors_BD = np.empty((len(batch), dimension), dtype=np.float32)
    for skip in {one.skip for one in batch}:
        rows = [row for row, one in enumerate(batch) if one.skip == skip]
        vectors_BD[rows] = one_pass([batch[row].ids for row in rows], skip=skip)
    return vectors_BD


def _vllm(target: Target, config: ServeConfig) -> Forward:
    """The forward pass of vLLM, if it gives the export's golden vectors.

    Raises:
        ModelError: It does not, or it cannot serve such a contract.
    """
    check_vllm_serves(target.contract, where=config.model, is_export=target.is_export)
    from reasonembed.llm.vllm import PoolingEngine

    contract = target.contract
    rules = ContractTokenizer(load_tokenizer(target.path), contract)
    try:
        engine = PoolingEngine(
            target.path,
            dtype=contract.dtype,
            max_tokens=max(contract.max_query_tokens, contract.max_document_tokens),
            batch_tokens=_batch_tokens(config, on_gpu=True),
            runtime=config.engine,
        )
        verify_golden(_VLLMEncoder(contract, rules, engine), target.path)
    except (RuntimeError, ValueError) as error:  # its words for what it does not support
        raise ModelError(
            f"vLLM does not run {config.model}: {error}. Set embedder.backend to torch"
        ) from error
    return lambda batch: engine.embed([one.ids for one in batch])


def check_vllm_serves(contract: TokenisationContract, *, where: str, is_export: bool) -> None:
    """Whether vLLM's pooling does what a contract says.

    Raises:
        ModelError: It does not; each reason is named.
    """
    reasons = {
        "it brings no golden vectors to check vLLM by": not is_export,
        f"its pooling is {contract.pooling}, not last": contract.pooling != "last",
        f"its attention is {contract.attention}, not causal": contract.attention != "causal",
        f"it uses its first {contract.layers} layers only": contract.layers is not None,
        "its vectors are not normalised": not contract.normalise,
    }
    if found := [reason for reason, holds in reasons.items() if holds]:
        raise ModelError(
            f"{where} cannot be served by vLLM: {'; '.join(found)}. Set embedder.backend to torch"
        )


@dataclass(frozen=True)
class _VLLMEncoder:
    """What `verify_golden` asks."""

    contract: TokenisationContract
    rules: ContractTokenizer
    engine: PoolingEngine

    def tokenise(
        self, texts: Sequence[str], *, role: Role, instruction: str = ""
    ) -> list[TokenIds]:
        return self.rules.tokenise(texts, role=role, instruction=instruction)

    def encode_ids(self, sequences: Sequence[TokenIds]) -> Vectors:
        return self.engine.embed(sequences)
