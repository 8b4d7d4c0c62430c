"""Puts a service together from its settings: in one process, or over parts in other ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from fastapi import FastAPI

from reasonembed import __version__
from reasonembed.config import ServeConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.index.store import BenchmarkQuery
from reasonembed.llm.protocol import Engine, make_engine
from reasonembed.serving.app import create_app
from reasonembed.serving.backend import OpenModel, open_model
from reasonembed.serving.indexes import LocalPart, ServedIndex
from reasonembed.serving.keys import KeyFile, check_exposure
from reasonembed.serving.llm import EngineGrading, EngineRewriting
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.parts import Service
from reasonembed.serving.protocol import (
    Grading,
    IndexInfo,
    IndexPart,
    Preparer,
    Rewriting,
    ServedModel,
    TextEmbedder,
)
from reasonembed.serving.scheduling import TokenBatcher
from reasonembed.serving.search import SearchService
from reasonembed.serving.service import EmbeddingService

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LLM:
    """What is configured of an LLM's services."""

    rewriting: Rewriting | None = None
    grading: Grading | None = None


@dataclass(frozen=True)
class PartedIndex:
    """An index and who holds its parts, in their order."""

    info: IndexInfo
    parts: Sequence[IndexPart]
    queries: Sequence[BenchmarkQuery] = ()


@dataclass(frozen=True)
class Parts:
    """What a service is put together from, wherever it runs.

    Attributes:
        model: What the embedder serves.
        preparer: Its tokenisation, in this process.
        embedder: Its replicas.
        indexes: To search in.
        llm: Rewrites and grades.
        on_end: Called when the app ends.
    """

    model: ServedModel
    preparer: Preparer
    embedder: TextEmbedder
    indexes: Sequence[PartedIndex] = ()
    llm: LLM = LLM()
    on_end: Sequence[Callable[[], Awaitable[None]]] = ()


def assemble(config: ServeConfig) -> FastAPI:
    """The whole service in this process.

    Raises:
        ConfigError: It would be open to whoever asks, or two indexes share a name.
        ModelError: The model does not load, its golden texts disagree, or an index was made with
            another one.
    """
    check_exposure(config)
    keys = key_file(config)  # before the model: mistakes show at once
    indexes = [open_part(folder) for folder in config.indexes]
    opened = open_warm(config)
    replica = batcher(opened, config)
    parts = Parts(
        model=opened.served,
        preparer=opened.preparer,
        embedder=replica,
        indexes=[PartedIndex(one.info, [one], one.stored.queries) for one in indexes],
        llm=open_llm(config),
        # A pass that still runs is no more than the process, see `server.serve_in_process`.
        on_end=[partial(replica.close, waits=False)],
    )
    return assemble_app(config, parts, keys=keys)


def assemble_app(
    config: ServeConfig,
    parts: Parts,
    *,
    keys: KeyFile | None,
    ingress: str | None = None,
    sends_request_id: bool = True,
) -> FastAPI:
    """The app over parts; `app.state.model` is what its model is called.

    Args:
        config: Settings of the service.
        parts: What it is over.
        keys: Who may ask; see `key_file`.
        ingress: Name of this ingress among several.
        sends_request_id: False behind a proxy that writes `X-Request-ID` into answers itself.

    Raises:
        ConfigError: Two indexes share a name.
        ModelError: An index was made with another model.
    """
    check_indexes(parts.model, [one.info for one in parts.indexes])
    metrics = Metrics(ingress=ingress)
    embeddings = EmbeddingService(
        parts.model,
        parts.preparer,
        parts.embedder,
        limits=config.limits,
        cache_mib=config.cache_mib,
        metrics=metrics,
    )
    indexes = {
        one.info.name: ServedIndex(one.info, one.parts, queries=one.queries)
        for one in parts.indexes
    }
    llm = parts.llm
    search = SearchService(
        embeddings,
        indexes,
        rewriting=llm.rewriting,
        grading=llm.grading,
        limits=config.limits,
    )
    service = Service(
        embeddings=embeddings,
        settings=config,
        metrics=metrics,
        search=search,
        keys=keys,
        version=__version__,
        on_end=[*parts.on_end, embeddings.close],
    )
    app = create_app(service, sends_request_id=sends_request_id)
    app.state.model = parts.model.name
    return app


def open_warm(config: ServeConfig) -> OpenModel:
    """A model that has embedded a text already; see `open_model` for what is refused."""
    opened = open_model(config)
    seconds = opened.warm_up()
    longest_s = opened.served.longest_s or seconds
    log.info("a longest text takes %.2f s", longest_s)
    served = replace(opened.served, batch_tokens=opened.batch_tokens, longest_s=longest_s)
    return replace(opened, served=served)


def batcher(opened: OpenModel, config: ServeConfig) -> TokenBatcher:
    """A model's replica in this process."""
    assert opened.forward is not None, "opened to tokenise alone"
    return TokenBatcher(
        opened.forward,
        lanes=opened.lanes,
        batch_tokens=opened.batch_tokens,
        short_tokens=config.batching.short_tokens,
    )


def key_file(config: ServeConfig) -> KeyFile | None:
    """Who may ask, where keys are asked for."""
    return KeyFile(config.keys_file) if config.keys_file else None


def open_part(folder: str, *, shard: int = 0, shards: int = 1) -> LocalPart:
    """A shard of an index; see `StoredIndex.load` for what is refused."""
    return LocalPart.load(folder, part=(shard, shards))


def open_llm(config: ServeConfig) -> LLM:
    """What rewrites and grades; one engine for both where their models are the same."""
    engines: dict[str, Engine] = {}

    def engine(stage: str) -> Engine:
        llm = getattr(config, stage).llm
        if repr(llm) not in engines:
            engines[repr(llm)] = make_engine(llm, config.engine, cache_dir=config.cache_dir)
        return engines[repr(llm)]

    return LLM(
        EngineRewriting(config.rewrite, engine("rewrite")) if config.rewrite else None,
        EngineGrading(config.rerank, engine("rerank")) if config.rerank else None,
    )


def check_indexes(model: ServedModel, infos: Sequence[IndexInfo]) -> None:
    """Sees that queries of the model can be compared with every index's vectors.

    Raises:
        ConfigError: Two indexes share a name.
        ModelError: An index was made with another model, or another setting of it.
    """
    names = Counter(info.name for info in infos)
    if twice := [name for name, number in names.items() if number > 1]:
        raise ConfigError(
            f"two indexes are called {twice[0]!r}; build one of them under another --name"
        )
    for info in infos:
        if info.dimension and info.fingerprint != model.fingerprint:
            raise ModelError(
                f"the index {info.name!r} was made with {info.model} (fingerprint "
                f"{info.fingerprint[:12]}), but {model.name} is served (fingerprint "
                f"{model.fingerprint[:12]}): their vectors cannot be compared; build the index "
                f"again with this model, or serve that one"
            )
