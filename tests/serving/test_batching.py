from __future__ import annotations

import asyncio

import numpy as np
import pytest

from reasonembed.serving.batching import MicroBatcher
from reasonembed.serving.protocol import EmbedItem, EmbedResult, ItemError


def items(*texts: str) -> list[EmbedItem]:
    return [EmbedItem(text) for text in texts]


def test_requests_share_a_batch_and_get_their_own_vectors(embedder):
    async def scenario():
        batcher = MicroBatcher(embedder.embed, max_texts=8, wait_s=0.01)
        return await asyncio.gather(*(batcher.embed(items(f"a{n}", f"b{n}")) for n in range(3)))

    answers = asyncio.run(scenario())
    assert [len(batch) for batch in embedder.batches] == [6]
    for number, answer in enumerate(answers):
        for text, outcome in zip((f"a{number}", f"b{number}"), answer, strict=True):
            np.testing.assert_array_equal(outcome.vector, embedder.outcome(EmbedItem(text)).vector)


def test_large_requests_are_split_and_keep_their_order(embedder):
    texts = [f"text {number}" for number in range(11)]
    batcher = MicroBatcher(embedder.embed, max_texts=4, wait_s=0)
    asyncio.run(batcher.embed(items(*texts)))
    assert [item.content for batch in embedder.batches for item in batch] == texts
    assert [len(batch) for batch in embedder.batches] == [4, 4, 3]


def test_a_poison_item_fails_alone(embedder):
    async def scenario():
        batcher = MicroBatcher(embedder.embed, max_texts=64, wait_s=0.01)
        mine = batcher.embed(items(*(f"good {number}" for number in range(40)), "poison"))
        theirs = batcher.embed(items("good too"))
        after = [await asyncio.gather(mine, theirs), await batcher.embed(items("later"))]
        return after

    (mine, theirs), later = asyncio.run(scenario())
    assert all(isinstance(outcome, EmbedResult) for outcome in [*mine[:40], *theirs, *later])
    assert isinstance(mine[40], ItemError)
    assert not mine[40].is_callers_fault
    # Halving: two calls a level on the way down, not one an item.
    assert len(embedder.batches) <= 2 * 7 + 2


def test_a_wrong_number_of_outcomes_is_a_failure():
    async def forgetful(batch):
        return []

    outcomes = asyncio.run(MicroBatcher(forgetful, max_texts=4, wait_s=0).embed(items("a", "b")))
    assert [outcome.is_callers_fault for outcome in outcomes] == [False, False]


def test_a_cancelled_request_is_not_computed(embedder):
    async def scenario():
        batcher = MicroBatcher(embedder.embed, max_texts=8, wait_s=0.02)
        gone = asyncio.create_task(batcher.embed(items("gone")))
        stays = asyncio.create_task(batcher.embed(items("stays")))
        await asyncio.sleep(0)
        gone.cancel()
        return await stays

    assert isinstance(asyncio.run(scenario())[0], EmbedResult)
    assert embedder.batches == [items("stays")]


def test_batches_run_one_at_a_time():
    running, most = 0, 0

    async def slow(batch):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.001)
        running -= 1
        return [EmbedResult(np.zeros(1, np.float32), 1) for _ in batch]

    async def scenario():
        batcher = MicroBatcher(slow, max_texts=2, wait_s=0)
        await asyncio.gather(*(batcher.embed(items("a", "b", "c")) for _ in range(5)))

    asyncio.run(scenario())
    assert most == 1


def test_the_wait_is_that_of_the_oldest_item(embedder):
    async def scenario():
        loop = asyncio.get_running_loop()
        batcher = MicroBatcher(embedder.embed, max_texts=1_000, wait_s=0.05)
        start = loop.time()
        await batcher.embed(items("a"))
        return loop.time() - start

    assert asyncio.run(scenario()) >= 0.05


def test_no_items(embedder):
    assert asyncio.run(MicroBatcher(embedder.embed, max_texts=4, wait_s=0).embed([])) == []


@pytest.mark.parametrize(("max_texts", "wait_s"), [(0, 0.1), (1, -1)])
def test_limits_are_checked(embedder, max_texts, wait_s):
    with pytest.raises(ValueError, match="need max_texts >= 1"):
        MicroBatcher(embedder.embed, max_texts=max_texts, wait_s=wait_s)
