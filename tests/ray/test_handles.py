"""Handles behind the service's protocols; a scripted handle stands for Serve's."""

import asyncio

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.serve.exceptions import BackPressureError
from ray_jobs.handles import Remote, RemoteEmbedder, RemotePart, pack, unpack
from reasonembed.serving.protocol import Forwarded, IndexInfo, Prepared, Unavailable

NEVER = object()


class Late:
    """An answer that takes its time."""

    def __init__(self, seconds):
        self.seconds = seconds


class Response:
    """What a call of a handle gives: awaitable, and to be cancelled."""

    def __init__(self, outcome):
        self._outcome = outcome
        self.is_cancelled = False

    def __await__(self):
        return self._answer().__await__()

    async def _answer(self):
        if self._outcome is NEVER:
            await asyncio.Event().wait()
        if isinstance(self._outcome, Late):
            await asyncio.sleep(self._outcome.seconds)
            return "late"
        await asyncio.sleep(0)
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def cancel(self):
        self.is_cancelled = True


class Handle:
    """Gives the scripted outcomes one after another, to whatever method is called."""

    def __init__(self, *outcomes):
        self._outcomes = list(outcomes)
        self.calls, self.responses = [], []

    def __getattr__(self, method):
        if method.startswith("_"):
            raise AttributeError(method)
        return _Method(self, method)

    def remote_call(self, method):
        return Response(self._outcomes.pop(0))


class _Method:
    def __init__(self, handle, name):
        self._handle, self._name = handle, name

    def remote(self, *args):
        self._handle.calls.append((self._name, args))
        response = self._handle.remote_call(self._name)
        self._handle.responses.append(response)
        return response


def remote(handle, stall_s=5.0):
    return Remote(handle, name="the embedder", stall_s=stall_s)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2**31 - 1), max_size=20), st.integers(0, 5)), max_size=9
    )
)
def test_inputs_survive_the_way(inputs):
    prepared = [Prepared(tuple(ids), skip) for ids, skip in inputs]
    assert unpack(pack(prepared)) == prepared


def test_a_call_reaches_a_replica():
    handle = Handle("vectors")
    assert asyncio.run(remote(handle).call("embed", 1, 2)) == "vectors"
    assert handle.calls == [("embed", (1, 2))]


@pytest.mark.parametrize("death", [ActorDiedError(), ActorUnavailableError("gone", b"1" * 16)])
def test_where_a_replica_dies_another_is_asked(death):
    handle = Handle(death, "vectors")
    assert asyncio.run(remote(handle).call("embed")) == "vectors"
    assert len(handle.calls) == 2


def test_two_deaths_are_the_end():
    handle = Handle(ActorDiedError(), ActorDiedError(), "too late")
    with pytest.raises(Unavailable, match="died twice"):
        asyncio.run(remote(handle).call("embed"))
    assert len(handle.calls) == 2


def test_a_full_deployment_is_unavailable():
    refused = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    with pytest.raises(Unavailable, match="takes no requests"):
        asyncio.run(remote(Handle(refused)).call("embed"))


def test_an_error_of_the_model_is_not_tried_again():
    handle = Handle(ZeroDivisionError(), "never")
    with pytest.raises(ZeroDivisionError):
        asyncio.run(remote(handle).call("embed"))
    assert len(handle.calls) == 1


def test_a_caller_that_is_gone_takes_its_work_along():
    async def leave(handle):
        call = asyncio.create_task(remote(handle).call("embed"))
        await asyncio.sleep(0.01)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    handle = Handle(NEVER)
    asyncio.run(leave(handle))
    assert [one.is_cancelled for one in handle.responses] == [True]


def test_nothing_answers_for_too_long():
    handle = Handle(NEVER)
    with pytest.raises(Unavailable, match=r"not answered for 0\.05 s"):
        asyncio.run(remote(handle, stall_s=0.05).call("embed"))
    assert handle.responses[0].is_cancelled


def test_a_long_queue_is_no_stall_while_others_are_answered():
    async def busy():
        handle = Handle(NEVER, *["short"] * 30)
        one = remote(handle, stall_s=0.1)
        waiting = asyncio.create_task(one.call("embed"))
        for _ in range(30):
            await asyncio.sleep(0.01)
            await one.call("embed")
        assert not waiting.done()
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(busy())


def test_the_embedder_is_asked_for_the_model_of_the_tokens():
    forwarded = Forwarded(np.ones((1, 2), np.float32))
    handle = Handle(forwarded, None)
    embedder = RemoteEmbedder(handle, fingerprint="f1", stall_s=5)

    async def twice():
        assert await embedder.embed([Prepared((1, 2))], flow="r1") is forwarded
        with pytest.raises(Unavailable, match="exchanged"):
            await embedder.embed([Prepared((1, 2))], flow="r1")

    asyncio.run(twice())
    method, (packed, flow, fingerprint) = handle.calls[0]
    assert (method, flow, fingerprint) == ("embed", "r1", "f1")
    assert unpack(packed) == [Prepared((1, 2))]


def test_a_replica_that_cannot_answer_is_asked_elsewhere_once():
    # As Ray passes on what a replica raised.
    declined = RayTaskError("embed", "a long traceback", Unavailable("the model fails"))
    handle = Handle(declined.as_instanceof_cause(), "vectors")
    assert asyncio.run(remote(handle).call("embed")) == "vectors"
    handle = Handle(*[declined.as_instanceof_cause()] * 2, "too late")
    with pytest.raises(Unavailable) as caught:
        asyncio.run(remote(handle).call("embed"))
    assert str(caught.value) == "the model fails"


INFO = IndexInfo("a", 1, 2, "m", "f", "generic", None, ("dense",), digest="d0")


class Busy(Handle):
    """Computes for long; says that it is there for as long as told so."""

    def __init__(self, *, seconds, pulses):
        super().__init__()
        self._seconds, self._pulses = seconds, pulses

    def remote_call(self, method):
        if method == "info" and self._pulses:
            self._pulses -= 1
            return Response(INFO)
        return Response(NEVER if method == "info" else Late(self._seconds))


@pytest.mark.parametrize(("pulses", "is_found"), [(100, True), (1, False)])
def test_a_large_search_is_waited_for_while_the_replica_is_there(pulses, is_found):
    async def ask():
        part = RemotePart(Busy(seconds=0.5, pulses=pulses), info=INFO, stall_s=0.1)
        return await part.dense(np.ones((1, 2), np.float32), k=3, excluded=[])

    if is_found:
        assert asyncio.run(ask()) == "late"
    else:
        with pytest.raises(Unavailable, match="the index has not answered"):
            asyncio.run(ask())


def test_positions_of_another_build_are_not_taken():
    part = RemotePart(Handle(None), info=INFO, stall_s=5)
    with pytest.raises(Unavailable, match="'a' is being exchanged"):
        asyncio.run(part.doc_ids([7]))


def test_a_part_passes_on_what_it_is_asked():
    handle = Handle("found", ["d1"])
    part = RemotePart(handle, info=INFO, stall_s=5)
    queries_QD = np.ones((1, 2), np.float32)

    async def ask():
        assert await part.dense(queries_QD, k=3, excluded=[["a"]]) == "found"
        assert await part.doc_ids([7]) == ["d1"]

    asyncio.run(ask())
    assert [method for method, _ in handle.calls] == ["dense", "doc_ids"]
    assert [arguments[0] for _, arguments in handle.calls] == ["d0", "d0"]
    assert handle.calls[0][1][2:] == (3, [["a"]])
