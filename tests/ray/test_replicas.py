"""The classes of a service's replicas, in this process; no cluster is started."""

import asyncio
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest

from ray_jobs.handles import pack
from ray_jobs.serve_replicas import EmbedderReplica, IndexReplica
from reasonembed.config import ServeConfig
from reasonembed.serving.backend import open_model
from reasonembed.serving.protocol import EmbedItem, IndexInfo, Unavailable
from reasonembed.serving.scheduling import BROKEN_AT

MODEL = {"model": "echo", "echo": {"max_tokens": 50}, "batching": {"batch_tokens": 50}}


def made(replica, *arguments):
    """A replica as Serve makes one: its constructor is awaited."""

    async def make():
        one = replica.__new__(replica)
        await one.__init__(*arguments)
        return one

    return make()


def test_a_model_that_fails_on_everything_is_replaced_and_its_callers_may_ask_again():
    opened = open_model(ServeConfig.model_validate(MODEL), forwards=False)

    def packed(text):
        return pack(opened.preparer.prepare([EmbedItem(text)]))

    async def life():
        replica = await made(EmbedderReplica, MODEL)
        fingerprint = (await replica.describe()).fingerprint
        await replica.embed(packed("a good one"), "f", fingerprint)
        await replica.check_health()
        for number in range(BROKEN_AT):
            poison = packed(f"poison-echo {number}")
            with contextlib.suppress(Unavailable):
                await replica.embed(poison, "f", fingerprint)
        with pytest.raises(RuntimeError, match=f"last {BROKEN_AT} inputs"):
            await replica.check_health()
        with pytest.raises(Unavailable):
            await replica.embed(packed("poison-echo"), "f", fingerprint)
        # One that succeeds shows that the inputs were at fault, not the model.
        await replica.embed(packed("a good one"), "f", fingerprint)
        await replica.check_health()

    asyncio.run(life())


def test_a_healthy_pass_of_a_longest_text_is_no_stall():
    async def life():
        settings = MODEL | {"echo": {"max_tokens": 50, "tokens_per_s": 100}, "stall_s": 0.1}
        replica = await made(EmbedderReplica, settings)
        assert (await replica.describe()).longest_s == pytest.approx(0.5, rel=0.5)
        running = SimpleNamespace(
            running_s=0.6, is_broken=False
        )  # of 0.5, three times which is 1.5
        replica._batcher = SimpleNamespace(status=lambda: running)
        await replica.check_health()
        running.running_s = 5
        with pytest.raises(RuntimeError, match="running for 5 s"):
            await replica.check_health()

    asyncio.run(life())


def test_a_shard_answers_for_its_own_build_alone(monkeypatch):
    info = IndexInfo("a", 1, 2, "m", "f", "generic", None, ("dense",), digest="old")

    class Part:
        def __init__(self):
            self.info, self.stored = info, SimpleNamespace(queries=[])

        async def _found(self, *_, **__):
            return "found"

        dense = bm25 = doc_ids = documents = find = _found

    monkeypatch.setattr("ray_jobs.serve_replicas.open_part", lambda *_, **__: Part())
    calls = {
        "queries": (),
        "dense": (np.ones((1, 2), np.float32), 1, []),
        "bm25": (["x"], 1, []),
        "doc_ids": ([0],),
        "documents": ([0],),
        "find": (["d"],),
    }

    async def life():
        shard = await made(IndexReplica, "folder", 0, 1)
        for method, arguments in calls.items():
            assert await getattr(shard, method)("old", *arguments) is not None
            assert await getattr(shard, method)("new", *arguments) is None, method

    asyncio.run(life())
