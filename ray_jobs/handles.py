"""Deployments of Ray Serve behind the protocols of `reasonembed.serving.protocol`.

What a call from one deployment to another adds to a plain `await` is here and nowhere else: a
replica may die, none may answer, and a caller that went away must not leave work behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from reasonembed.index.store import BenchmarkQuery
from reasonembed.serving.protocol import (
    Forwarded,
    IndexInfo,
    Positions,
    Prepared,
    Scores,
    ServedModel,
    StoredDocument,
    Unavailable,
    Vectors,
)

logger = logging.getLogger(__name__)

# The replica, or the machine that held its answer, is gone.
_DIED = (RayActorError, ObjectLostError, ReplicaUnavailableError)
_REFUSED = (BackPressureError, DeploymentUnavailableError)


class _Declined(Unavailable):
    """A replica's own word that it cannot answer; another one may."""


@dataclass(frozen=True)
class Packed:
    """Inputs of one call as three arrays: a pickle of Python's own integers is ten times dearer.

    Attributes:
        ids: int32, the token ids of all inputs one after another.
        lengths: int32, of each input.
        skips: int32, `Prepared.skip` of each input.
    """

    ids: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]
    skips: npt.NDArray[np.int32]


def pack(inputs: Sequence[Prepared]) -> Packed:
    """Inputs as arrays; whether a text was cut is not the embedder's business and is left out."""
    lengths = np.fromiter((len(one.ids) for one in inputs), np.int32, len(inputs))
    ids = np.fromiter((i for one in inputs for i in one.ids), np.int32, int(lengths.sum()))
    return Packed(ids, lengths, np.fromiter((one.skip for one in inputs), np.int32, len(inputs)))


def unpack(packed: Packed) -> list[Prepared]:
    """The inputs again."""
    ids, end = packed.ids.tolist(), 0
    inputs = []
    for length, skip in zip(packed.lengths.tolist(), packed.skips.tolist(), strict=True):
        start, end = end, end + length
        inputs.append(Prepared(tuple(ids[start:end]), skip))
    return inputs


class Remote:
    """Calls to the replicas of one deployment.

    A call whose replica died, or cannot answer, is made once more: embedding and searching change
    nothing, so that twice is as good as once. Where no replica has answered anything for `stall_s`
    while calls waited, the call ends as `Unavailable`: better an answer that says so than none.

    Args:
        handle: `ray.serve.handle.DeploymentHandle`.
        name: For messages: "the embedder".
        stall_s: How long nothing may answer; None to wait without end.
        pulse: Method without arguments that a replica answers also while it computes. It is asked
            before a call is given up, whose work may just take long.
    """

    def __init__(
        self, handle: Any, *, name: str, stall_s: float | None, pulse: str | None = None
    ) -> None:
        self._handle, self._name, self._stall_s, self._pulse = handle, name, stall_s, pulse
        self._answered = float("-inf")  # when any call of this kind came back, on the loop's clock

    async def call(self, method: str, *args: Any) -> Any:
        """Calls a method of some replica.

        Raises:
            Unavailable: Two replicas died over it or declined, or none answers.
        """
        try:
            return await self._once(method, *args)
        except (*_DIED, _Declined) as error:
            logger.warning("A replica of %s gave no answer; trying another: %s", self._name, error)
        try:
            return await self._once(method, *args)
        except _DIED as error:
            raise Unavailable(f"{self._name} died twice over this request") from error

    async def _once(self, method: str, *args: Any) -> Any:
        response = getattr(self._handle, method).remote(*args)
        answer = asyncio.ensure_future(_result(response))
        try:
            await self._watch(answer)
            result = _outcome(answer)
        except _REFUSED as error:
            raise Unavailable(f"{self._name} takes no requests now") from error
        finally:
            if not answer.done():  # the caller is gone, or gives up: so does the replica
                response.cancel()
                answer.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await answer
        self._answered = asyncio.get_running_loop().time()
        return result

    async def _watch(self, answer: asyncio.Future[Any]) -> None:
        """Returns when the answer is there; raises when nothing has answered for too long."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        while not answer.done():
            left = None
            if self._stall_s is not None:
                left = max(begun, self._answered) + self._stall_s - loop.time()
                if left <= 0:
                    if not await self._has_pulse(answer):
                        raise Unavailable(f"{self._name} has not answered for {self._stall_s:g} s")
                    left = None if answer.done() else self._stall_s
            await asyncio.wait({answer}, timeout=left)

    async def _has_pulse(self, answer: asyncio.Future[Any]) -> bool:
        """Whether a replica answers, be it only that it is there; the awaited answer counts."""
        if self._pulse is None:
            return False
        response = getattr(self._handle, self._pulse).remote()
        pulse = asyncio.ensure_future(_result(response))
        try:
            await asyncio.wait(
                {answer, pulse}, timeout=self._stall_s, return_when=asyncio.FIRST_COMPLETED
            )
            return answer.done() or (pulse.done() and pulse.exception() is None)
        finally:
            if not pulse.done():
                response.cancel()
                pulse.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await pulse


async def _result(response: Any) -> Any:
    return await response


def _outcome(answer: asyncio.Future[Any]) -> Any:
    """A finished call's result, or what it raised.

    Raises:
        _Declined: The replica raised `Unavailable`; without the traceback that Ray says it with.
    """
    try:
        return answer.result()
    except Unavailable as error:
        raise _Declined(str(getattr(error, "cause", error))) from error


class RemoteEmbedder:
    """The embedder's replicas as one `TextEmbedder`.

    Args:
        handle: Of the deployment `Embedder`.
        fingerprint: Of the model whose tokens are sent; a replica that holds another model, as
            there is for a moment while a model is being exchanged, does not answer with its own.
        stall_s: See `Remote`.
    """

    def __init__(self, handle: Any, *, fingerprint: str, stall_s: float) -> None:
        self._remote = Remote(handle, name="the embedder", stall_s=stall_s)
        self._fingerprint = fingerprint

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        """See `TextEmbedder.embed`."""
        forwarded = await self._remote.call("embed", pack(inputs), flow, self._fingerprint)
        if forwarded is None:
            raise Unavailable("the model is being exchanged for another")
        assert isinstance(forwarded, Forwarded)
        return forwarded


async def served_model(handle: Any) -> ServedModel:
    """What the embedder serves; waits until a replica has loaded it."""
    model = await Remote(handle, name="the embedder", stall_s=None).call("describe")
    assert isinstance(model, ServedModel)
    return model


async def index_info(handle: Any) -> IndexInfo:
    """What a shard says of its whole index; waits until a replica has opened it."""
    info = await Remote(handle, name="the index", stall_s=None).call("info")
    assert isinstance(info, IndexInfo)
    return info


class RemotePart:
    """The replicas of one shard of an index as an `IndexPart`; see there.

    A large search may compute for longer than `stall_s`; it is given up only where the replica does
    not even say that it is there.

    Args:
        handle: Of the shard's deployment.
        info: Of the index whose positions are spoken of. A replica that has opened another build,
            as there is while an index is being exchanged, does not answer with its own.
        stall_s: See `Remote`.
    """

    def __init__(self, handle: Any, *, info: IndexInfo, stall_s: float) -> None:
        self._remote = Remote(handle, name="the index", stall_s=stall_s, pulse="info")
        self._info = info

    async def queries(self) -> Sequence[BenchmarkQuery]:
        """Benchmark queries that came along with the index."""
        return await self._call("queries")

    async def dense(
        self, queries_QD: Vectors, *, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Scores, Positions]:
        """As the protocol says."""
        return await self._call("dense", queries_QD, k, excluded)

    async def bm25(
        self, texts: Sequence[str], *, k: int, excluded: Sequence[Sequence[str]]
    ) -> tuple[Scores, Positions]:
        """As the protocol says."""
        return await self._call("bm25", texts, k, excluded)

    async def doc_ids(self, positions: Sequence[int]) -> list[str]:
        """As the protocol says."""
        return await self._call("doc_ids", positions)

    async def documents(self, positions: Sequence[int]) -> list[StoredDocument]:
        """As the protocol says."""
        return await self._call("documents", positions)

    async def find(self, doc_ids: Sequence[str]) -> list[int | None]:
        """As the protocol says."""
        return await self._call("find", doc_ids)

    async def _call(self, method: str, *args: Any) -> Any:
        answer = await self._remote.call(method, self._info.digest, *args)
        if answer is None:
            raise Unavailable(f"the index {self._info.name!r} is being exchanged for another")
        return answer


class RemoteRewriting:
    """The LLM replica as `Rewriting`; an LLM may think for long, so only its death is watched."""

    def __init__(self, handle: Any) -> None:
        self._remote = Remote(handle, name="the LLM", stall_s=None)

    async def rewrite(self, queries: Sequence[str], *, task: str) -> list[str | None]:
        """As the protocol says."""
        return await self._remote.call("rewrite", queries, task)


class RemoteGrading:
    """The LLM replica as `Grading`."""

    def __init__(self, handle: Any) -> None:
        self._remote = Remote(handle, name="the LLM", stall_s=None)

    async def grade(self, query: str, documents: Sequence[str], *, task: str) -> list[float | None]:
        """As the protocol says."""
        return await self._remote.call("grade", query, documents, task)
