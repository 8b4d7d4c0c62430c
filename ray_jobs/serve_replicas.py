"""What runs in the processes of a service on Ray Serve: ingress, embedder, index shard, LLM.

Each class is a thin hull: the work is `reasonembed.serving`'s. None is decorated here, so that a
test can make one without a cluster; `ray_jobs.serve` says how many there are and where.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.context import _get_global_client

from ray_jobs.autoscaling import BUSY, QUEUED_S
from ray_jobs.handles import (
    Packed,
    RemoteEmbedder,
    RemoteGrading,
    RemotePart,
    RemoteRewriting,
    index_info,
    served_model,
    unpack,
)
from reasonembed.config import ServeConfig
from reasonembed.index.store import BenchmarkQuery
from reasonembed.serving.assembly import (
    LLM,
    PartedIndex,
    Parts,
    assemble_app,
    batcher,
    key_file,
    open_llm,
    open_part,
    open_warm,
)
from reasonembed.serving.backend import open_model
from reasonembed.serving.exchange import start_access_log
from reasonembed.serving.keys import check_exposure
from reasonembed.serving.protocol import (
    Forwarded,
    IndexInfo,
    Positions,
    Scores,
    ServedModel,
    StoredDocument,
    Vectors,
    stalled_after,
)
from reasonembed.serving.starting import Starting

logger = logging.getLogger(__name__)

# Long enough for the tokenizer where the model is up already, short enough that health is answered
# soon where it is not.
_PATIENCE_S = 20.0
_DESCRIBE_S = 3.0
_STATUS_EVERY_S = 2.0
_OURS = re.compile(r"^reasonembed\.errors\.\w+: (.+)$", re.MULTILINE)


class EmbedderReplica:
    """One copy of the model with its batches.

    Args:
        settings: A `ServeConfig` as JSON has it.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:
        config = ServeConfig.model_validate(settings)
        # In a thread: the loop answers Serve's questions while gigabytes are read.
        opened = await asyncio.to_thread(open_warm, config)
        self._model, self._batcher = opened.served, batcher(opened, config)
        self._stalled_after_s = stalled_after(config.stall_s, self._model)

    async def embed(self, packed: Packed, flow: str, fingerprint: str) -> Forwarded | None:
        """Vectors of one call; None where this replica holds another model than is asked for.

        Raises:
            Unavailable: The model fails on every input; Serve is about to replace the replica.
        """
        if fingerprint != self._model.fingerprint:
            return None
        return await self._batcher.embed(unpack(packed), flow=flow)

    async def describe(self) -> ServedModel:
        """What is served."""
        return self._model

    async def check_health(self) -> None:
        """Asked by Serve every few seconds; a replica that fails thrice is replaced.

        Raises:
            RuntimeError: A forward pass runs for too long (see `stalled_after`), or the model
                fails whatever it is given.
        """
        status = self._batcher.status()
        if status.running_s > self._stalled_after_s:
            raise RuntimeError(f"a forward pass has been running for {status.running_s:.0f} s")
        if status.is_broken:
            raise RuntimeError(f"the model failed on the last {status.failed_inputs} inputs")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `ray_jobs.autoscaling` decides by."""
        status = self._batcher.status()
        return {
            QUEUED_S: status.queued_tokens / status.tokens_per_s,
            BUSY: status.busy_lanes / status.lanes,
        }


class IndexReplica:
    """One shard of an index; see `IndexPart`.

    Every call names the index by its digest. Positions of one build mean other documents in
    another, so a replica that has opened another answers None.

    Args:
        folder: Of the index.
        shard: Which one, from 0.
        shards: Of how many.
    """

    async def __init__(self, folder: str, shard: int, shards: int) -> None:
        self._part = await asyncio.to_thread(open_part, folder, shard=shard, shards=shards)
        self._digest = self._part.info.digest

    async def info(self) -> IndexInfo:
        """Of the whole index."""
        return self._part.info

    async def queries(self, digest: str) -> Sequence[BenchmarkQuery] | None:
        """Benchmark queries that came along with the index."""
        if digest != self._digest:
            return None
        return self._part.stored.queries

    async def dense(
        self, digest: str, queries_QD: Vectors, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Scores, Positions] | None:
        """As the protocol says."""
        if digest != self._digest:
            return None
        return await self._part.dense(queries_QD, k=k, excluded=excluded)

    async def bm25(
        self, digest: str, texts: Sequence[str], k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Scores, Positions] | None:
        """As the protocol says."""
        if digest != self._digest:
            return None
        return await self._part.bm25(texts, k=k, excluded=excluded)

    async def doc_ids(self, digest: str, positions: Sequence[int]) -> list[str] | None:
        """As the protocol says."""
        if digest != self._digest:
            return None
        return await self._part.doc_ids(positions)

    async def documents(self, digest: str, positions: Sequence[int]) -> list[StoredDocument] | None:
        """As the protocol says."""
        if digest != self._digest:
            return None
        return await self._part.documents(positions)

    async def find(self, digest: str, doc_ids: Sequence[str]) -> list[int | None] | None:
        """As the protocol says."""
        if digest != self._digest:
            return None
        return await self._part.find(doc_ids)


class LLMReplica:
    """The engine that rewrites queries and grades documents.

    Args:
        settings: A `ServeConfig` as JSON has it.
    """

    async def __init__(self, settings: dict[str, Any]) -> None:
        config = ServeConfig.model_validate(settings)
        self._llm = await asyncio.to_thread(open_llm, config)

    async def rewrite(self, queries: Sequence[str], task: str) -> list[str | None]:
        """As `Rewriting` says."""
        assert self._llm.rewriting is not None
        return await self._llm.rewriting.rewrite(queries, task=task)

    async def grade(self, query: str, documents: Sequence[str], task: str) -> list[float | None]:
        """As `Grading` says."""
        assert self._llm.grading is not None
        return await self._llm.grading.grade(query, documents, task=task)


class IngressReplica:
    """Tokenises, admits, answers; the model and the indexes are in other processes.

    It answers from the beginning: `/readyz` says 503, and why, until the embedder is up.

    Args:
        settings: A `ServeConfig` as JSON has it.
        embedder: Handle of the embedder.
        parts: Handles of each index's shards, in the order of `ServeConfig.indexes`.
        llm: Handle of the LLM, where one is configured.
    """

    async def __init__(
        self, settings: dict[str, Any], embedder: Any, parts: list[list[Any]], llm: Any = None
    ) -> None:
        self._config = ServeConfig.model_validate(settings)
        self._embedder, self._parts, self._llm = embedder, parts, llm
        self._reason: str | None = None
        self._name = ""
        start_access_log(sys.__stderr__)  # Serve's sys.stderr puts words before each line
        self._starting = Starting(
            self._assemble,
            why=lambda: self._reason,
            sends_request_id=False,  # Serve's proxy writes it
        )
        await self._starting.begin(patience_s=await self._patience_s())

    async def model_name(self) -> str:
        """What requests call the model; to be asked when the service is up."""
        return self._name

    async def drain(self) -> None:
        """Takes no new requests; those under way end. Called of every replica, see `stop`."""
        self._starting.drain()

    def __serve_build_asgi_app__(self) -> Starting:
        """What Serve sends requests to."""
        return self._starting

    async def check_health(self) -> None:
        """Asked by Serve every few seconds.

        Raises:
            Exception: The service cannot be assembled from its parts; as a failure of the
                constructor it reaches whoever deployed it.
        """
        self._starting.check()

    async def _patience_s(self) -> float:
        """Waits for the tokenizer only where the model is up: then requests are coming already."""
        asked = asyncio.ensure_future(served_model(self._embedder))
        done, _ = await asyncio.wait({asked}, timeout=_DESCRIBE_S)
        asked.cancel()
        return _PATIENCE_S if done else 0.0

    async def _assemble(self) -> FastAPI:
        config = self._config
        check_exposure(config.model_copy(update={"host": await asyncio.to_thread(_host, config)}))
        opened = await asyncio.to_thread(open_model, config, forwards=False)
        self._name = opened.served.name
        # How long a forward pass takes is known where they are made.
        model = opened.served.as_measured(await self._until_served(opened.served.fingerprint))
        parts = Parts(
            model=model,
            preparer=opened.preparer,
            embedder=RemoteEmbedder(
                self._embedder,
                fingerprint=model.fingerprint,
                stall_s=stalled_after(config.stall_s, model),
            ),
            indexes=await asyncio.gather(*(self._index(shards) for shards in self._parts)),
            llm=LLM(
                RemoteRewriting(self._llm) if config.rewrite else None,
                RemoteGrading(self._llm) if config.rerank else None,
            ),
        )
        # In a thread: making the routes takes a second, in which health would not be answered.
        return await asyncio.to_thread(
            assemble_app,
            config,
            parts,
            keys=key_file(config),
            ingress=serve.get_replica_context().replica_id.unique_id,
            sends_request_id=False,
        )

    async def _index(self, shards: list[Any]) -> PartedIndex:
        info = await self._until_alike(shards)
        parts = [RemotePart(one, info=info, stall_s=self._config.stall_s) for one in shards]
        return PartedIndex(info, parts, await parts[0].queries())

    async def _until_alike(self, shards: list[Any]) -> IndexInfo:
        """What the shards say of their index, once all have opened the same one."""
        while True:
            infos = await asyncio.gather(*(index_info(handle) for handle in shards))
            if len({info.digest for info in infos}) == 1:
                return infos[0]
            self._reason = f"the index {infos[0].name!r} is being exchanged for another"
            await asyncio.sleep(_STATUS_EVERY_S)

    async def _until_served(self, fingerprint: str) -> ServedModel:
        """What a replica with the same model says of it; until one is up, learns why none is."""
        app_name = serve.get_replica_context().app_name
        while True:
            asked = asyncio.ensure_future(served_model(self._embedder))
            while not (await asyncio.wait({asked}, timeout=_STATUS_EVERY_S))[0]:
                status = await asyncio.to_thread(serve.status)
                self._reason = why_not_running(status, app_name)
            if (served := asked.result()).fingerprint == fingerprint:
                return served
            self._reason = "the model is being exchanged for another"
            await asyncio.sleep(_STATUS_EVERY_S)


def _host(config: ServeConfig) -> str:
    """Where Serve's proxies listen; `serve deploy` is told so beside our own settings."""
    return _get_global_client().http_config.host or config.host


def why_not_running(status: Any, app_name: str) -> str | None:
    """The message of an error of ours in Serve's account of an application.

    Other errors are not shown to clients: they may hold anything.

    Args:
        status: `ray.serve.schema.ServeStatus`.
        app_name: Of the application.
    """
    app = status.applications.get(app_name)
    if app is None:
        return None
    messages = [app.message, *(one.message for one in app.deployments.values())]
    for message in messages:
        if found := _OURS.findall(message):
            return str(found[-1])
    return None
