from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.serving.protocol import Prepared, Unavailable
from reasonembed.serving.scheduling import BROKEN_AT, FAILED, NOT_FINITE, TokenBatcher
from tests.serving.gated import DIMENSION, NAN, POISON, GatedModel, prepared, vector

BUDGET, SHORT = 64, 16


def batcher(forward, *, lanes: int = 1, **options) -> TokenBatcher:
    options = {"batch_tokens": BUDGET, "short_tokens": SHORT} | options
    return TokenBatcher(forward, lanes=lanes, **options)


def run(scenario, *args):
    """Runs a test's coroutine; one that hangs fails."""
    return asyncio.run(asyncio.wait_for(scenario(*args), 60))


def bulk(number: int, tokens: int = 8) -> list[Prepared]:
    return [prepared(1_000 + index, tokens) for index in range(number)]


def assert_allowed(batch: list[Prepared]) -> None:
    lengths = [len(one.ids) for one in batch]
    assert len(batch) == 1 or len(batch) * max(lengths) <= BUDGET
    assert len({length <= SHORT for length in lengths}) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 90), min_size=1, max_size=25), min_size=1, max_size=8),
    st.integers(1, 3),
)
def test_every_input_is_answered_once_in_order(calls, lanes):
    async def scenario():
        model = GatedModel()
        replica = batcher(model, lanes=lanes)
        inputs = [
            [prepared(1_000 * call + index, tokens) for index, tokens in enumerate(lengths)]
            for call, lengths in enumerate(calls)
        ]
        answers = await asyncio.gather(
            *(replica.embed(ours, flow=str(call % 3)) for call, ours in enumerate(inputs))
        )
        for ours, answer in zip(inputs, answers, strict=True):
            np.testing.assert_array_equal(answer.vectors_ND, [vector(one) for one in ours])
            assert answer.vectors_ND.dtype == np.float32
            assert not answer.failed
        for batch in model.batches:
            assert_allowed(batch)
        computed = Counter(one for batch in model.batches for one in batch)
        assert computed == Counter(one for ours in inputs for one in ours)
        reported = [stats for answer in answers for stats in answer.batches]
        assert len(reported) == len(model.batches)
        assert sum(stats.tokens for stats in reported) == sum(map(sum, calls))
        assert replica.status().queued_tokens == replica.status().busy_lanes == 0
        await replica.close()

    run(scenario)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_nothing_is_left_behind_by_any_mix_of_ends(data):
    """Calls that succeed, fail or are cancelled, before or while a pass of theirs runs."""
    kinds = st.sampled_from([prepared(7, 5), prepared(8, 30), prepared(POISON, 5), prepared(NAN)])
    calls = data.draw(st.lists(st.lists(kinds, min_size=1, max_size=12), min_size=1, max_size=6))
    cancelled = data.draw(st.sets(st.integers(0, len(calls) - 1)))
    passes = data.draw(st.integers(0, 4))
    calls_of_all = [one for ours in calls for one in ours]

    def is_poison(one: Prepared) -> bool:
        return one.ids[0] == POISON

    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model, lanes=2)
        tasks = [
            asyncio.create_task(replica.embed(ours, flow=str(call)))
            for call, ours in enumerate(calls)
        ]
        await model.began()
        model.let(passes)
        for call in cancelled:
            tasks[call].cancel()
        model.open()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        for call, (ours, answer) in enumerate(zip(calls, answers, strict=True)):
            if isinstance(answer, asyncio.CancelledError):
                assert call in cancelled
                continue
            if isinstance(answer, Unavailable):  # so many in a row that the model is blamed
                assert sum(map(is_poison, calls_of_all)) >= BROKEN_AT
                continue
            bad = {i: one.ids[0] for i, one in enumerate(ours) if one.ids[0] in (POISON, NAN)}
            reasons = {POISON: FAILED, NAN: NOT_FINITE}
            assert answer.failed == {i: reasons[first] for i, first in bad.items()}
            for index, one in enumerate(ours):
                if index not in bad:
                    np.testing.assert_array_equal(answer.vectors_ND[index], vector(one))
        await replica.close()  # ends when the passes of cancelled calls have
        status = replica.status()
        assert (status.queued_tokens, status.busy_lanes, status.running_s) == (0, 0, 0.0)

    logging.disable(logging.ERROR)  # of the poison
    try:
        run(scenario)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_a_short_query_waits_for_running_passes_only(lanes):
    """Beside a request of 2,000 texts it is in one of the next `lanes` passes."""

    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model, lanes=lanes)
        large = asyncio.create_task(replica.embed(bulk(2_000), flow="bulk"))
        await model.began(lanes)
        model.let(lanes)
        await model.began(lanes)
        begun = len(model.batches)
        query = asyncio.create_task(replica.embed([prepared(5, 3)], flow="query"))
        await asyncio.sleep(0)
        model.let(lanes)
        await model.began(lanes)
        assert any(prepared(5, 3) in batch for batch in model.batches[begun : begun + lanes])
        model.open()
        await query
        assert not large.done()
        assert len((await large).vectors_ND) == 2_000
        await replica.close()

    run(scenario)


def test_a_long_document_holds_one_lane_and_comes_to_its_turn():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model, lanes=1)
        large = asyncio.create_task(replica.embed(bulk(400), flow="bulk"))
        await model.began()
        document = asyncio.create_task(replica.embed([prepared(9, 500)], flow="document"))
        await asyncio.sleep(0)
        model.let()
        await model.began()
        assert model.batches[1] == [prepared(9, 500)]
        model.open()
        await asyncio.gather(large, document)
        await replica.close()

    run(scenario)


def test_a_free_lane_waits_for_nobody():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model, lanes=2)
        calls = []
        for number in range(2):
            call = replica.embed([prepared(number)], flow=str(number))
            calls.append(asyncio.create_task(call))
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # one turn of the loop to line up, one to begin
            assert replica.status().busy_lanes == number + 1
        await model.began(2)
        assert [len(batch) for batch in model.batches] == [1, 1]
        model.open()
        await replica.close()

    run(scenario)


def test_calls_of_one_moment_share_a_pass():
    async def scenario():
        model = GatedModel()
        replica = batcher(model)
        await asyncio.gather(*(replica.embed([prepared(n, 4)], flow=str(n)) for n in range(8)))
        assert len(model.batches) == 1
        await replica.close()

    run(scenario)


def test_a_request_is_spread_over_the_free_lanes():
    async def scenario(texts):
        model = GatedModel(is_open=False)
        replica = batcher(model, lanes=2, batch_tokens=1_000)
        call = asyncio.create_task(replica.embed(texts, flow="a"))
        await model.began(1 if len(texts) < 3 else 2)
        sizes = [len(batch) for batch in model.batches]
        model.open()
        await call
        await replica.close()
        return sizes

    assert run(scenario, bulk(16)) == [8, 8]
    assert run(scenario, bulk(2)) == [2]  # not worth two passes


def test_equal_inputs_of_a_pass_are_computed_once():
    async def scenario():
        model = GatedModel()
        replica = batcher(model)
        same, other = prepared(1, 4), Prepared(prepared(1, 4).ids, skip=2)
        first, second = await asyncio.gather(
            replica.embed([same, other, same], flow="a"), replica.embed([same], flow="b")
        )
        assert sorted(map(len, model.batches)) == [2]
        np.testing.assert_array_equal(first.vectors_ND, [vector(same), vector(other), vector(same)])
        np.testing.assert_array_equal(second.vectors_ND, [vector(same)])
        await replica.close()

    run(scenario)


@pytest.mark.parametrize("position", [0, 3, 7])
def test_poison_fails_alone(position, caplog):
    async def scenario():
        model = GatedModel()
        replica = batcher(model)
        inputs = bulk(8)
        inputs[position] = prepared(POISON, 8)
        mixed, pure = await asyncio.gather(
            replica.embed(inputs[:4], flow="a"), replica.embed(inputs[4:], flow="b")
        )
        failed = {**mixed.failed, **{index + 4: why for index, why in pure.failed.items()}}
        assert failed == {position: FAILED}
        rows = np.concatenate([mixed.vectors_ND, pure.vectors_ND])
        expected = [vector(one) for one in inputs]
        expected[position] = [0.0] * DIMENSION
        np.testing.assert_array_equal(rows, expected)
        assert len(model.batches) <= 7  # 1 + 2 + 2 + 2
        await replica.close()

    run(scenario)
    [record] = caplog.records
    assert record.exc_info is not None
    assert "broke" in str(record.exc_info[1])


def test_halving_holds_nobody_up():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model)
        bad = asyncio.create_task(replica.embed([prepared(POISON, 8), *bulk(15)], flow="bad"))
        await model.began()
        query = asyncio.create_task(replica.embed([prepared(5, 3)], flow="query"))
        await asyncio.sleep(0)
        model.let()
        await model.began()
        assert prepared(5, 3) in model.batches[1]
        model.open()
        assert (await bad).failed == {0: FAILED}
        await query
        await replica.close()

    run(scenario)


def test_values_that_are_not_finite_fail_their_own_input():
    async def scenario():
        model = GatedModel()
        replica = batcher(model)
        answer = await replica.embed([prepared(1), prepared(NAN), prepared(2)], flow="a")
        assert answer.failed == {1: NOT_FINITE}
        np.testing.assert_array_equal(answer.vectors_ND[:, 0], [1, 0, 2])
        assert len(model.batches) == 1
        await replica.close()

    run(scenario)


@pytest.mark.parametrize(
    "forward",
    [
        lambda inputs: np.zeros((len(inputs) + 1, 2)),
        lambda inputs: np.zeros(len(inputs)),
        lambda inputs: "no vectors",
        lambda inputs: next(iter(())),
    ],
    ids=["rows", "shape", "type", "StopIteration"],
)
def test_a_model_that_answers_nonsense_fails_every_input_and_keeps_its_lane(forward):
    async def scenario():
        replica = batcher(forward)
        for _ in range(2):
            answer = await replica.embed(bulk(3), flow="a")
            assert answer.failed == dict.fromkeys(range(3), FAILED)
            assert answer.vectors_ND.shape == (3, 0)
        assert replica.status().since_success_s is None
        await replica.close()

    run(scenario)


def test_what_a_cancelled_call_left_waiting_is_never_computed():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model)
        gone = asyncio.create_task(replica.embed(bulk(1_000), flow="gone"))
        await model.began()
        stays = asyncio.create_task(replica.embed([prepared(5)], flow="stays"))
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert replica.status().queued_tokens == 1
        model.open()
        await stays
        running = len(model.batches[0])
        assert model.batches[1:] == [[prepared(5)]]
        assert replica.status().dropped_inputs == 1_000 - running
        await replica.close()

    run(scenario)


def test_closing_refuses_what_waits_and_ends_the_threads():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model, lanes=2)
        call = asyncio.create_task(replica.embed(bulk(100), flow="a"))
        await model.began(2)
        closing = asyncio.create_task(replica.close())
        with pytest.raises(Unavailable):
            await call
        assert not closing.done()
        model.open()
        await closing
        assert len(model.batches) == 2
        with pytest.raises(Unavailable):
            await replica.embed(bulk(1), flow="a")

    before = set(threading.enumerate())
    run(scenario)
    ours = set(threading.enumerate()) - before
    assert not [thread for thread in ours if thread.name.startswith("forward")]


def test_status_tells_a_stalled_pass_from_a_finished_one():
    now = 100.0

    async def scenario():
        nonlocal now
        model = GatedModel(is_open=False)
        replica = batcher(model, clock=lambda: now)
        assert replica.status().since_success_s is None
        call = asyncio.create_task(replica.embed(bulk(9), flow="a"))
        await model.began()
        now += 4
        status = replica.status()
        assert (status.running_s, status.busy_lanes, status.queued_tokens) == (4, 1, 8)
        model.let()
        await model.began()
        now += 1
        model.let()
        answer = await call
        assert (answer.queue_s, answer.forward_s) == (4, 5)
        now += 2
        status = replica.status()
        assert (status.running_s, status.since_success_s, status.lanes) == (0, 2, 1)
        assert status.tokens_per_s == pytest.approx(64 / 4)  # while something waited
        await replica.close()

    run(scenario)


@pytest.mark.parametrize("inputs", [[], [Prepared(())]])
def test_calls_without_tokens_are_refused(inputs):
    async def scenario():
        replica = batcher(GatedModel())
        with pytest.raises(ValueError, match="at least one"):
            await replica.embed(inputs, flow="a")
        await replica.close()

    run(scenario)


def test_no_lanes_are_refused():
    with pytest.raises(ValueError, match="lanes >= 1"):
        batcher(GatedModel(), lanes=0)


def test_one_free_lane_takes_all_that_fits_a_pass():
    """Padding counts in a pass, so a share in bare tokens would cut it in two."""

    async def scenario():
        model = GatedModel()
        replica = batcher(model, lanes=1)
        inputs = [prepared(number, 10 + number) for number in range(4)]  # 4 x 13 = 52 <= 64
        await replica.embed(inputs, flow="a")
        await replica.close()
        return [len(batch) for batch in model.batches]

    assert run(scenario) == [4]


def test_a_model_that_fails_on_every_input_is_told_from_inputs_at_fault(caplog):
    async def scenario():
        model = GatedModel()
        replica = batcher(model)
        for number in range(BROKEN_AT - 1):
            answer = await replica.embed([prepared(POISON, 2 + number)], flow="a")
            assert answer.failed == {0: FAILED}
        assert replica.status().failed_inputs == BROKEN_AT - 1
        assert not replica.status().is_broken
        for _ in range(2):
            with pytest.raises(Unavailable, match="every input"):
                await replica.embed([prepared(POISON, 9)], flow="a")
            assert replica.status().is_broken
        await replica.embed([prepared(2)], flow="a")
        assert (replica.status().failed_inputs, replica.status().is_broken) == (0, False)
        assert (await replica.embed([prepared(POISON)], flow="a")).failed == {0: FAILED}
        assert replica.status().queued_tokens == 0
        await replica.close()

    run(scenario)


def test_closing_need_not_wait_for_a_pass():
    async def scenario():
        model = GatedModel(is_open=False)
        replica = batcher(model)
        call = asyncio.create_task(replica.embed(bulk(1), flow="a"))
        await model.began()
        await replica.close(waits=False)
        with pytest.raises(Unavailable):
            await call
        model.open()

    run(scenario)


def test_speed_is_not_flattered_by_work_from_before_a_rush():
    """A pass that began alone and ends in a rush says nothing of full lanes."""
    now = 0.0

    async def scenario():
        nonlocal now
        model = GatedModel(is_open=False)
        replica = batcher(model, clock=lambda: now)
        for _ in range(20):
            call = asyncio.create_task(replica.embed(bulk(8), flow="a"))  # a whole pass, 2 s
            await model.began()
            now += 1.9
            rush = asyncio.create_task(replica.embed(bulk(1), flow="b"))
            await asyncio.sleep(0)
            now += 0.1
            model.let()
            await model.began()
            now += 0.25
            model.let()
            await asyncio.gather(call, rush)
        assert replica.status().tokens_per_s == 1_000  # nothing was ever full
        call = asyncio.create_task(replica.embed(bulk(80), flow="a"))
        for _ in range(10):
            await model.began()
            now += 2
            model.let()
        await call
        await replica.close()
        return replica.status().tokens_per_s

    assert run(scenario) == pytest.approx(64 / 2)
