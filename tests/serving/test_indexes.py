from __future__ import annotations

import asyncio
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.index.exact import merge_topk
from reasonembed.serving.indexes import LocalPart, ServedIndex
from reasonembed.serving.protocol import IndexInfo, StoredDocument
from tests.index.stored import example


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return example(tmp_path_factory.mktemp("served") / "tiny")


def queries(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(np.float32)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


class Watched:
    """An index that notes the products asked of it, and stops in each until it is let go."""

    def __init__(self, stored, *, held=False):
        self.stored, self.about, self.digest = stored, stored.about, stored.digest
        self.rows, self.entered, self.free = [], threading.Semaphore(0), threading.Semaphore(0)
        self.held = held

    def dense(self, queries_QD, *, k, excluded=None):
        self.rows.append(len(queries_QD))
        if self.held:
            self.entered.release()
            assert self.free.acquire(timeout=10)
        return self.stored.dense(queries_QD, k=k, excluded=excluded)

    async def until_entered(self):
        assert await asyncio.to_thread(self.entered.acquire, timeout=10)


class Broken(Watched):
    def dense(self, queries_QD, *, k, excluded=None):
        raise OSError("the disk is gone")


@settings(max_examples=30, deadline=None)
@given(
    asked=st.lists(
        st.tuples(
            st.integers(0, 5),
            st.integers(1, 14),
            st.lists(st.sampled_from(["d001", "d003", "nothing"])),
        ),
        min_size=1,
        max_size=6,
    ),
    rows=st.integers(1, 8),
    num_parts=st.integers(1, 3),
)
def test_searches_together_give_what_each_gives_alone(stored, asked, rows, num_parts):
    loaded = [
        LocalPart.load(stored.folder, part=(number, num_parts)) for number in range(num_parts)
    ]
    parts = [LocalPart(one.stored, rows=rows) for one in loaded]

    async def one(number, size, k, ids):
        found = await asyncio.gather(
            *(part.dense(queries(size, number), k=k, excluded=[ids] * size) for part in parts)
        )
        return merge_topk(found, k=k)

    async def everything():
        return await asyncio.gather(*(one(number, *each) for number, each in enumerate(asked)))

    for number, (found, (size, k, ids)) in enumerate(
        zip(asyncio.run(everything()), asked, strict=True)
    ):
        alone = stored.dense(queries(size, number), k=k, excluded=stored.shut_out([ids] * size))
        assert_equal(found, alone)
    for part in (*parts, *loaded):
        part.close()


def test_what_waits_is_searched_in_one_product(stored):
    watched = Watched(stored, held=True)
    part = LocalPart(watched)

    async def scenario():
        first = asyncio.create_task(part.dense(queries(1), k=3, excluded=[]))
        await watched.until_entered()  # nothing was waited for
        others = [
            asyncio.create_task(part.dense(queries(2, seed), k=seed, excluded=[]))
            for seed in range(1, 6)
        ]
        await asyncio.sleep(0)
        watched.free.release(10)
        return await first, await asyncio.gather(*others)

    _, others = asyncio.run(scenario())
    assert watched.rows == [1, 10]
    for seed, found in enumerate(others, start=1):
        assert_equal(found, stored.dense(queries(2, seed), k=seed))


def test_a_large_search_does_not_hold_up_a_small_one(stored):
    watched = Watched(stored, held=True)
    part = LocalPart(watched, rows=8)
    order = []

    async def noted(name, coroutine):
        found = await coroutine
        order.append(name)
        return found

    async def scenario():
        bulk = noted("bulk", part.dense(queries(40), k=3, excluded=[]))
        bulk = asyncio.create_task(bulk)
        await watched.until_entered()
        single = noted("single", part.dense(queries(1, 7), k=3, excluded=[]))
        single = asyncio.create_task(single)
        await asyncio.sleep(0)
        watched.free.release(100)
        return await bulk, await single

    bulk, single = asyncio.run(scenario())
    assert order == ["single", "bulk"]
    assert watched.rows[:2] == [8, 5]  # then an equal share: four of it, and the single one
    assert sum(watched.rows) == 41
    assert_equal(bulk, stored.dense(queries(40), k=3))
    assert_equal(single, stored.dense(queries(1, 7), k=3))


def test_a_small_search_waits_for_no_large_one_however_many_there_are(stored):
    watched = Watched(stored, held=True)
    part = LocalPart(watched, rows=2)
    order = []

    async def noted(name, rows):
        await part.dense(queries(rows, name), k=3, excluded=[])
        order.append(name)

    async def scenario():
        first = asyncio.create_task(noted(0, 4))
        await watched.until_entered()
        others = [asyncio.create_task(noted(name, 4)) for name in (1, 2, 3)]
        others.append(asyncio.create_task(noted(9, 1)))
        await asyncio.sleep(0)
        watched.free.release(100)
        await asyncio.gather(first, *others)

    asyncio.run(scenario())
    assert order[0] == 9
    assert sum(watched.rows) == 17


def test_a_cancelled_search_is_never_made_and_others_go_on(stored):
    watched = Watched(stored, held=True)
    part = LocalPart(watched)

    async def scenario():
        running = asyncio.create_task(part.dense(queries(1), k=3, excluded=[]))
        await watched.until_entered()
        waiting = asyncio.create_task(part.dense(queries(30), k=3, excluded=[]))
        kept = asyncio.create_task(part.dense(queries(2), k=3, excluded=[]))
        await asyncio.sleep(0)
        running.cancel()
        waiting.cancel()
        await asyncio.sleep(0)
        watched.free.release(100)
        found = await kept
        gone = await asyncio.gather(running, waiting, return_exceptions=True)
        assert [type(one) for one in gone] == [asyncio.CancelledError] * 2
        watched.held = False
        later = await part.dense(queries(3), k=3, excluded=[])  # it still works
        return found, later

    found, later = asyncio.run(scenario())
    assert watched.rows == [1, 2, 3]
    assert_equal(found, stored.dense(queries(2), k=3))
    assert_equal(later, stored.dense(queries(3), k=3))


@pytest.mark.parametrize(
    ("asked", "k", "excluded", "said"),
    [
        (np.ones((1, 3), np.float32), 1, [], r"shape \(1, 3\) .* dimension 4"),
        (np.ones((1, 4), np.float32), 0, [], "k 0"),
        (np.full((1, 4), np.nan, np.float32), 1, [], "not finite"),
        (np.ones((2, 4), np.float32), 1, [[]], "1 entries for 2 queries"),
    ],
)
def test_a_search_that_does_not_fit_fails_alone(stored, asked, k, excluded, said):
    part = LocalPart(stored)

    async def scenario():
        return await asyncio.gather(
            part.dense(queries(1), k=2, excluded=[]),
            part.dense(asked, k=k, excluded=excluded),
            return_exceptions=True,
        )

    good, bad = asyncio.run(scenario())
    assert_equal(good, stored.dense(queries(1), k=2))
    with pytest.raises(ValueError, match=said):
        raise bad


def test_a_failure_reaches_those_who_asked_and_nobody_after_them(stored):
    part = LocalPart(stored)

    async def scenario():
        part.stored = Broken(stored)
        with pytest.raises(OSError, match="the disk is gone"):
            await part.dense(queries(1), k=2, excluded=[])
        part.stored = stored
        return await part.dense(queries(1), k=2, excluded=[])

    assert_equal(asyncio.run(scenario()), stored.dense(queries(1), k=2))


def test_the_rest_of_the_protocol(stored):
    part = LocalPart(stored)

    async def scenario():
        words = await part.bm25(["dict order"], k=3, excluded=[["d001"]])
        return (
            words,
            await part.doc_ids([3, 0]),
            await part.documents([1]),
            await part.find(["d002", "nothing"]),
        )

    words, doc_ids, [document], found = asyncio.run(scenario())
    assert_equal(words, stored.bm25(["dict order"], k=3, excluded=stored.shut_out([["d001"]])))
    assert doc_ids == ["d003", "d000"] and found == [2, None]
    text = stored.documents([1])[0].text
    assert document == StoredDocument("d001", text, "A title")
    assert part.info == IndexInfo(
        name="tiny",
        num_documents=12,
        dimension=4,
        model="m",
        fingerprint="f00d",
        task="generic",
        instruction=None,
        kinds=("dense", "bm25", "hybrid"),
        digest=stored.digest,
    )


class Slow(Watched):
    """Searches by words and look-ups of excluded ids stop until they are let go."""

    def _held(self):
        self.entered.release()
        assert self.free.acquire(timeout=10)

    def bm25(self, texts, *, k, excluded=None):
        self._held()
        return self.stored.bm25(texts, k=k, excluded=excluded)

    def shut_out(self, excluded_ids):
        self._held()
        return self.stored.shut_out(excluded_ids)

    def find(self, doc_ids):
        return self.stored.find(doc_ids)


def test_searches_by_words_hold_up_nothing_else(stored):
    slow = Slow(stored)
    part = LocalPart(slow)

    async def scenario():
        words = [asyncio.create_task(part.bm25(["dict order"], k=3, excluded=[])) for _ in range(5)]
        await slow.until_entered()
        dense = await asyncio.wait_for(part.dense(queries(1), k=3, excluded=[]), 5)
        found = await asyncio.wait_for(part.find(["d002"]), 5)
        slow.free.release(5)
        await asyncio.gather(*words)
        return dense, found

    dense, found = asyncio.run(scenario())
    assert_equal(dense, stored.dense(queries(1), k=3))
    assert found == [2]


def test_nobody_waits_for_what_another_excludes(stored):
    slow = Slow(stored)
    part = LocalPart(slow)

    async def scenario():
        excluding = asyncio.create_task(part.dense(queries(1), k=3, excluded=[["d001"]]))
        await slow.until_entered()
        plain = await asyncio.wait_for(part.dense(queries(1), k=3, excluded=[]), 5)
        slow.free.release()
        return plain, await excluding

    plain, excluding = asyncio.run(scenario())
    assert_equal(plain, stored.dense(queries(1), k=3))
    expected = stored.dense(queries(1), k=3, excluded=stored.shut_out([["d001"]]))
    assert_equal(excluding, expected)


class Sliced(LocalPart):
    """Notes the calls."""

    def __init__(self, stored):
        super().__init__(stored)
        self.calls = []

    async def dense(self, queries_QD, *, k, excluded):
        self.calls.append(len(queries_QD))
        return await super().dense(queries_QD, k=k, excluded=excluded)

    async def bm25(self, texts, *, k, excluded):
        self.calls.append([len(one) for one in texts])
        return await super().bm25(texts, k=k, excluded=excluded)


def test_a_large_search_is_several_calls(stored):
    part = Sliced(stored)
    index = ServedIndex(part.info, [part])
    excluded = [["d001"] if row % 3 else [] for row in range(150)]
    found = asyncio.run(index.dense(queries(150), k=4, excluded=excluded))
    assert_equal(found, stored.dense(queries(150), k=4, excluded=stored.shut_out(excluded)))
    assert part.calls == [64, 64, 22]
    part.calls = []
    texts = ["dict order"] * 10 + ["loop " * 1_000, "keys", "keys " * 800, "keys"]
    found = asyncio.run(index.bm25(texts, k=4, excluded=excluded[:14]))
    assert_equal(found, stored.bm25(texts, k=4, excluded=stored.shut_out(excluded[:14])))
    assert part.calls == [[10] * 8, [10, 10], [5_000], [4, 4_000, 4]]


def test_a_cancelled_search_by_words_ends_with_its_slice(stored):
    slow = Slow(stored)
    part = Sliced(slow)
    index = ServedIndex(part.info, [part])

    async def scenario():
        work = asyncio.create_task(index.bm25(["dict"] * 80, k=1, excluded=[()] * 80))
        await slow.until_entered()
        work.cancel()
        slow.free.release(100)
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(scenario())
    assert len(part.calls) == 1


def test_parts_are_merged_beside_the_event_loop(stored, monkeypatch):
    threads = []

    def merged(parts, *, k):
        threads.append(threading.current_thread())
        return merge_topk(parts, k=k)

    monkeypatch.setattr("reasonembed.serving.indexes.merge_topk", merged)
    parts = [LocalPart.load(stored.folder, part=(number, 3)) for number in range(3)]
    index = ServedIndex(parts[0].info, parts)
    monkeypatch.setattr("reasonembed.serving.concurrency._INLINE", 100)
    found = asyncio.run(index.dense(queries(60), k=3, excluded=[()] * 60))
    assert_equal(found, stored.dense(queries(60), k=3))
    assert threading.main_thread() not in threads and len(threads) == 1
    alone = ServedIndex(parts[0].info, parts[:1])
    asyncio.run(alone.dense(queries(60), k=3, excluded=[()] * 60))
    assert len(threads) == 1  # there is nothing to merge
