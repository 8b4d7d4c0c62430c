from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.config import LimitsConfig
from reasonembed.serving.errors import ApiError
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import (
    BatchStats,
    EmbedItem,
    Forwarded,
    ItemError,
    Prepared,
    ServedModel,
    Unavailable,
)
from reasonembed.serving.scheduling import FAILED, TokenBatcher
from reasonembed.serving.service import EmbeddingService
from tests.serving.gated import DIMENSION, POISON, GatedModel, vector

LIMIT = 50
MODEL = ServedModel(
    name="numbers",
    fingerprint="f",
    dimension=DIMENSION,
    max_query_tokens=LIMIT,
    max_document_tokens=LIMIT,
    vocabulary_size=10_000,
    created=0,
)
LIMITS = LimitsConfig(max_request_tokens=60_000, max_queued_tokens=100_000)


class NumberPreparer:
    """Words are numbers and token ids; queries start with a 0 that does not enter the mean."""

    def prepare(self, items: Sequence[EmbedItem]) -> list[Prepared | ItemError]:
        return [self._one(item) for item in items]

    def _one(self, item: EmbedItem) -> Prepared | ItemError:
        words = item.content.split() if isinstance(item.content, str) else item.content
        ids = tuple(int(word) for word in words)
        if item.role == "query":
            return Prepared((0, *ids), skip=1)
        if not ids:
            return ItemError("holds no token", is_callers_fault=True)
        if len(ids) > LIMIT and item.truncate == "none":
            return ItemError("is too long", is_callers_fault=True, is_too_long=True)
        return Prepared(ids[:LIMIT], is_truncated=len(ids) > LIMIT)

    def tokenise(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def detokenise(self, ids: Sequence[int]) -> list[str]:
        return [str(one) for one in ids]


class CountingEmbedder:
    """Answers at once and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Prepared]]] = []

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        self.calls.append((flow, list(inputs)))
        vectors = np.array([vector(one) for one in inputs], np.float32)
        return Forwarded(vectors, queue_s=0.25, forward_s=0.5)


class HeldEmbedder(CountingEmbedder):
    """A call of N inputs waits until `go[N]` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = asyncio.Semaphore(0)
        self.go: dict[int, asyncio.Event] = defaultdict(asyncio.Event)

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        self.arrived.release()
        await self.go[len(inputs)].wait()
        return await super().embed(inputs, flow=flow)


class BrokenEmbedder:
    """Answers whatever a test gives it."""

    def __init__(self, answer: Forwarded | Exception) -> None:
        self._answer = answer

    async def embed(self, inputs: Sequence[Prepared], *, flow: str) -> Forwarded:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def service(embedder, *, limits: LimitsConfig = LIMITS, cache_mib: int = 1) -> EmbeddingService:
    return EmbeddingService(
        MODEL,
        NumberPreparer(),
        embedder,
        limits=limits,
        cache_mib=cache_mib,
        metrics=Metrics(),
    )


def run(scenario, *args):
    return asyncio.run(asyncio.wait_for(scenario(*args), 60))


def embed(given_service: EmbeddingService, *contents: str, **fields):
    """One request in a loop of its own."""
    items = [EmbedItem(content, **fields) for content in contents]
    return run(given_service.embed, items)


def refusal(given_service: EmbeddingService, *contents: str, **fields) -> ApiError:
    with pytest.raises(ApiError) as refused:
        embed(given_service, *contents, **fields)
    assert given_service.queued_tokens == 0
    return refused.value


def sample(given_service: EmbeddingService, name: str, /, **labels: str) -> float | None:
    return given_service._metrics.registry.get_sample_value(f"reasonembed_{name}", labels)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=30), min_size=1, max_size=20),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from([0, 1]),
)
def test_every_input_gets_its_vector_in_order(requests, cache_mib):
    """Of concurrent requests that share inputs, among themselves and with one another."""

    async def scenario():
        replica = TokenBatcher(GatedModel(), lanes=2, batch_tokens=64, short_tokens=16)
        served = service(replica, cache_mib=cache_mib)
        for _ in range(2):  # the second time from the cache
            found = await asyncio.gather(
                *(served.embed([EmbedItem(tuple(ids)) for ids in ours]) for ours in requests)
            )
            for ours, embedded in zip(requests, found, strict=True):
                expected = [vector(Prepared(tuple(ids))) for ids in ours]
                np.testing.assert_array_equal(embedded.vectors_ND, expected)
                assert embedded.vectors_ND.flags.c_contiguous
                assert embedded.num_tokens == tuple(map(len, ours))
        assert served.queued_tokens == 0
        await replica.close()
        await served.close()

    run(scenario)


def test_equal_inputs_are_computed_once_and_then_known():
    embedder = CountingEmbedder()
    served = service(embedder)
    embedded = embed(served, "1 2", "3", "1 2")
    assert [len(inputs) for _, inputs in embedder.calls] == [2]
    assert embedded.num_tokens == (2, 1, 2)
    assert (embedded.timings.queue_s, embedded.timings.forward_s) == (0.25, 0.5)
    again = embed(served, "3", "1 2")
    assert len(embedder.calls) == 1
    np.testing.assert_array_equal(again.vectors_ND, embedded.vectors_ND[[1, 0]])
    assert again.timings.forward_s == 0
    embed(served, "3", role="query")  # another template: other ids
    assert len(embedder.calls) == 2
    assert (sample(served, "cache_hits_total"), sample(served, "cache_misses_total")) == (2, 4)


def test_a_vector_in_the_cache_is_not_the_callers():
    served = service(CountingEmbedder())
    embed(served, "1").vectors_ND[:] = 9
    np.testing.assert_array_equal(embed(served, "1").vectors_ND, [[1, 1, 0]])


def test_a_large_request_is_cut_into_calls_of_one_flow():
    embedder = CountingEmbedder()
    served = service(embedder)
    embed(served, *(" ".join(["1"] * 20 + [str(number)]) for number in range(1_200)))
    embed(served, "7 7 7")
    *large, (other_flow, _) = embedder.calls
    assert len({flow for flow, _ in large}) == 1
    assert other_flow != large[0][0]
    assert [len(inputs) for _, inputs in large] == [512, 512, 176]


def test_calls_are_cut_by_tokens_longest_first():
    embedder = CountingEmbedder()
    served = service(embedder)
    texts = [" ".join(map(str, range(n, n + 50 - n % 3))) for n in range(1_000)]
    embed(served, *texts)
    sizes = [[len(one.ids) for one in inputs] for _, inputs in embedder.calls]
    assert all(sum(call) <= 16_384 for call in sizes)
    assert len(sizes) == 3
    assert [size for call in sizes for size in call] == sorted(
        (50 - n % 3 for n in range(1_000)), reverse=True
    )


def test_what_was_cut_is_named():
    served = service(CountingEmbedder())
    embedded = embed(served, "1", "2 " * 60, "3 " * 50, truncate="end")
    assert embedded.truncated == (1,)
    assert embedded.num_tokens == (1, LIMIT, LIMIT)
    assert sample(served, "truncated_inputs_total") == 1
    assert sample(served, "tokens_total", role="document") == 101


def test_the_first_input_that_cannot_be_embedded_is_named():
    embedder = CountingEmbedder()
    served = service(embedder)
    error = refusal(served, "1", "2 " * 60, "")
    cure = "set truncate to 'end' or 'start'"
    assert (error.status, error.param) == (400, "input")
    assert error.message == f"input[1]: is too long, or {cure}"
    with pytest.raises(ApiError, match=r"texts\[0\]: holds no token$"):
        run(lambda: served.embed([EmbedItem("")], param="texts", cutting="x"))
    with pytest.raises(ApiError, match=r"texts\[0\]: is too long, or x$"):
        run(lambda: served.embed([EmbedItem("2 " * 60)], param="texts", cutting="x"))
    assert not embedder.calls


def test_a_request_over_its_limit_is_a_413_whatever_is_known_of_it():
    served = service(CountingEmbedder(), limits=LimitsConfig(max_request_tokens=80))
    embed(served, "1 " * 40)
    embed(served, *["1 " * 40] * 2)
    error = refusal(served, *["1 " * 40] * 2, "2")
    assert (error.status, error.code) == (413, "request_too_large")


def test_a_full_queue_is_a_429_for_one_batch_as_for_singles():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = TokenBatcher(model, lanes=1, batch_tokens=64, short_tokens=16)
        limits = LimitsConfig(max_request_tokens=400, max_queued_tokens=1_000)
        served = service(replica, limits=limits, cache_mib=0)
        items = [EmbedItem((number, *range(49))) for number in range(40)]  # of 50 tokens
        singles = [asyncio.create_task(served.embed([item])) for item in items[:16]]
        batch = asyncio.create_task(served.embed(items[16:20]))
        await model.began()
        assert sample(served, "queue_tokens") == 1_000
        late = [items[20:24], *([item] for item in items[24:28])]
        refused = await asyncio.gather(*map(served.embed, late), return_exceptions=True)
        assert [error.status for error in refused] == [429] * 5
        assert all(int(error.headers["Retry-After"]) >= 1 for error in refused)
        model.open()
        assert len(await asyncio.gather(*singles, batch)) == 17
        assert served.queued_tokens == 0
        await replica.close()
        await served.close()

    run(scenario)


def test_neither_what_is_known_nor_what_is_there_twice_takes_room():
    async def scenario():
        embedder = HeldEmbedder()
        served = service(embedder)
        items = [EmbedItem((number, *range(9))) for number in range(300)]  # 18 by the estimate
        embedder.go[100].set()
        await served.embed(items[:100])
        await embedder.arrived.acquire()
        request = asyncio.create_task(served.embed([*items, *items]))
        await embedder.arrived.acquire()
        assert served.queued_tokens == 200 * 10
        embedder.go[200].set()
        assert len((await request).vectors_ND) == 600
        assert served.queued_tokens == 0
        await served.close()

    run(scenario)


def test_room_comes_back_call_by_call():
    async def scenario():
        embedder = HeldEmbedder()
        served = service(embedder)
        items = [EmbedItem((number, *range(9))) for number in range(600)]
        request = asyncio.create_task(served.embed(items))
        await embedder.arrived.acquire()
        await embedder.arrived.acquire()
        assert served.queued_tokens == 600 * 10
        embedder.go[88].set()
        while not embedder.calls:
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert served.queued_tokens == 512 * 10
        embedder.go[512].set()
        await request
        assert served.queued_tokens == 0
        await served.close()

    run(scenario)


def test_a_client_that_has_gone_costs_nothing_more():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = TokenBatcher(model, lanes=1, batch_tokens=64, short_tokens=16)
        served = service(replica)
        items = [EmbedItem((number, *range(9))) for number in range(1_000)]
        request = asyncio.create_task(served.embed(items))
        await model.began()
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        assert served.queued_tokens == 0
        model.open()
        await served.embed([EmbedItem("5")])
        assert len(model.batches) == 2
        assert replica.status().dropped_inputs == 1_000 - len(model.batches[0])
        await replica.close()
        await served.close()

    run(scenario)


def test_poison_fails_its_own_request_and_the_others_have_their_vectors(caplog):
    async def scenario():
        model = GatedModel()
        replica = TokenBatcher(model, lanes=1, batch_tokens=64, short_tokens=16)
        served = service(replica)
        good, bad = await asyncio.gather(
            served.embed([EmbedItem("1"), EmbedItem("2")]),
            served.embed([EmbedItem("3"), EmbedItem(str(POISON)), EmbedItem("4")]),
            return_exceptions=True,
        )
        np.testing.assert_array_equal(good.vectors_ND[:, 0], [1, 2])
        assert (bad.status, bad.message) == (500, f"input[1]: {FAILED}")
        passes = len(model.batches)
        await served.embed([EmbedItem("3"), EmbedItem("4")])  # known by now
        assert len(model.batches) == passes
        assert served.queued_tokens == 0
        await replica.close()
        await served.close()

    run(scenario)
    assert "an input of 1 tokens" in caplog.text


def test_no_replica_is_a_503_that_says_when_to_come_again():
    served = service(BrokenEmbedder(Unavailable("two replicas died")))
    error = refusal(served, "1")
    assert (error.status, error.code) == (503, "unavailable")
    assert "two replicas died" in error.message
    assert int(error.headers["Retry-After"]) >= 1
    assert served.last_success is None


def test_vectors_of_another_shape_are_a_bug_and_no_answer():
    served = service(BrokenEmbedder(Forwarded(np.zeros((1, DIMENSION + 1), np.float32))))
    with pytest.raises(RuntimeError, match="shape"):
        embed(served, "1")
    assert served.queued_tokens == 0


def test_success_and_speed_are_known():
    now = 5.0
    served = EmbeddingService(
        MODEL,
        NumberPreparer(),
        CountingEmbedder(),
        limits=LIMITS,
        cache_mib=0,
        metrics=Metrics(),
        clock=lambda: now,
    )
    assert served.last_success is None
    embed(served, "1")
    assert served.last_success == 5.0
    assert served.tokens_per_s > 0


def test_metrics_of_an_answer():
    stats = BatchStats(texts=2, tokens=30, padded_tokens=40, budget_tokens=80, seconds=0.1)
    answer = Forwarded(np.ones((1, DIMENSION), np.float32), {}, 0.2, 0.4, (stats, stats))
    served = service(BrokenEmbedder(answer))
    embed(served, "1 2 3", role="query")
    assert sample(served, "tokens_total", role="query") == 4
    assert sample(served, "tokenize_seconds_count") == 1
    assert sample(served, "queue_seconds_sum") == pytest.approx(0.2)
    assert sample(served, "forward_seconds_sum") == pytest.approx(0.4)
    assert sample(served, "batch_tokens_sum") == 60
    assert sample(served, "batch_fill_ratio_sum") == pytest.approx(1.0)
    assert sample(served, "padding_ratio_sum") == pytest.approx(0.5)
    assert sample(served, "queue_tokens") == 0
    labels = {"name": "numbers", "fingerprint": "f", "dimension": str(DIMENSION)}
    assert sample(served, "model_info", **labels) == 1


def test_tokenising_is_bounded_too():
    """A request is refused by its estimate before a thread takes it up."""

    class StuckPreparer(NumberPreparer):
        def __init__(self) -> None:
            self.go = threading.Event()

        def prepare(self, items):
            assert self.go.wait(20)
            return super().prepare(items)

    async def scenario():
        preparer = StuckPreparer()
        limits = LimitsConfig(max_request_tokens=100, max_queued_tokens=150)
        served = EmbeddingService(
            MODEL, preparer, CountingEmbedder(), limits=limits, cache_mib=0, metrics=Metrics()
        )
        long = [EmbedItem("12345678 " * 45)]  # 101 tokens by the estimate, 50 by the limit
        tasks = [asyncio.create_task(served.embed(long)) for _ in range(4)]
        await asyncio.sleep(0)
        assert served.queued_tokens == 150
        preparer.go.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[3], ApiError)
        assert [len(answer.num_tokens) for answer in answers[:3]] == [1, 1, 1]
        assert served.queued_tokens == 0
        await served.close()

    run(scenario)


def test_other_weights_do_not_share_a_cache_key():
    assert service(CountingEmbedder())._keys.of([Prepared((1,))]) != EmbeddingService(
        replace(MODEL, fingerprint="g"),
        NumberPreparer(),
        CountingEmbedder(),
        limits=LIMITS,
        cache_mib=1,
        metrics=Metrics(),
    )._keys.of([Prepared((1,))])


def test_no_item_is_a_bug():
    with pytest.raises(ValueError, match="at least one"):
        embed(service(CountingEmbedder()))


def test_closing_ends_the_threads():
    async def scenario():
        served = service(CountingEmbedder())
        earlier = set(threading.enumerate())
        await served.embed([EmbedItem("1")])
        ours = [one for one in threading.enumerate() if one not in earlier]
        assert [one.name.split("_")[0] for one in ours] == ["tokenise"]
        await served.close()
        assert not any(one.is_alive() for one in ours)

    run(scenario)


def test_the_parts_need_neither_torch_nor_ray():
    code = (
        "import sys, reasonembed.serving.scheduling, reasonembed.serving.service; "
        "sys.exit(bool({'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class HeldPreparer(NumberPreparer):
    """Tokenises when a test says so."""

    def __init__(self) -> None:
        self.go, self.asked = threading.Event(), 0

    def prepare(self, items: Sequence[EmbedItem]) -> list[Prepared | ItemError]:
        self.asked += 1
        assert self.go.wait(20)
        return super().prepare(items)


def test_texts_of_clients_that_have_gone_keep_their_room_until_a_thread_is_through():
    """They are in memory until then, and so are those that wait for a thread."""

    async def scenario():
        preparer = HeldPreparer()
        limits = LimitsConfig(max_request_tokens=100, max_queued_tokens=1_000)
        served = EmbeddingService(
            MODEL, preparer, CountingEmbedder(), limits=limits, cache_mib=0, metrics=Metrics()
        )
        long = [EmbedItem("12345678 " * 45)]  # 50 tokens by the estimate
        tasks = [asyncio.create_task(served.embed(long)) for _ in range(20)]
        while preparer.asked < 4:  # threads
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert served.queued_tokens == 1_000
        with pytest.raises(ApiError) as refused:
            await served.embed(long)
        assert refused.value.status == 429
        preparer.go.set()
        while served.queued_tokens:
            await asyncio.sleep(0.001)
        assert preparer.asked == 4  # nobody's texts are not tokenised
        await served.close()

    run(scenario)


def test_a_failure_for_a_client_that_has_gone_is_not_logged_with_its_texts(caplog):
    async def scenario():
        served, began, go = service(CountingEmbedder()), threading.Event(), threading.Event()

        def work():
            began.set()
            assert go.wait(20)
            raise ValueError("a text of a user")

        task = asyncio.create_task(served.tokenise(["1"], work))
        while not began.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        go.set()
        while served.queued_tokens:
            await asyncio.sleep(0.001)
        await served.close()

    run(scenario)
    gc.collect()
    assert "a text of a user" not in caplog.text


def test_tokenising_for_no_vectors_has_the_same_bounds_and_threads():
    async def scenario():
        limits = LimitsConfig(max_request_tokens=100, max_queued_tokens=150)
        served = service(CountingEmbedder(), limits=limits)
        go, names = threading.Event(), []

        def work():
            names.append(threading.current_thread().name)
            assert go.wait(20)
            return 7

        texts = ["x" * 4 * 92]  # 100 tokens by the estimate, whatever the model's limit is
        first = asyncio.create_task(served.tokenise(texts, work))
        await asyncio.sleep(0)
        assert served.queued_tokens == 100
        with pytest.raises(ApiError) as refused:
            await served.tokenise(texts, work)
        assert refused.value.status == 429
        go.set()
        assert await first == 7
        assert names[0].startswith("tokenise") and served.queued_tokens == 0
        with pytest.raises(ApiError) as refused:
            await served.tokenise(["x" * 4 * 100], work)
        assert refused.value.status == 413
        await served.close()

    run(scenario)
