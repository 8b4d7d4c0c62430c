from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.serving.queueing import HEAD_START, LOOK_AHEAD, FairQueue, Waiting

BUDGET, SHORT = 64, 16
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=30)


def queue() -> FairQueue[Waiting]:
    return FairQueue(batch_tokens=BUDGET, short_tokens=SHORT)


def texts(lengths) -> list[Waiting]:
    return [Waiting(length) for length in lengths]


def drain(waiting: FairQueue[Waiting]) -> list[list[Waiting]]:
    batches = []
    while batch := waiting.pick():
        batches.append(batch)
    return batches


def assert_allowed(batch: list[Waiting]) -> None:
    lengths = [text.tokens for text in batch]
    padded = len(batch) * max(lengths)
    assert len(batch) == 1 or padded <= BUDGET
    assert len({length <= SHORT for length in lengths}) == 1
    if max(lengths) > SHORT:
        assert max(lengths) <= 1.5 * min(lengths)
    assert padded <= 2 * sum(lengths)


@given(st.lists(LENGTHS, max_size=6))
def test_every_text_is_picked_once_in_allowed_batches(flows):
    waiting, given_texts = queue(), [texts(lengths) for lengths in flows]
    for number, flow in enumerate(given_texts):
        waiting.put(flow, flow=str(number))
    assert waiting.tokens == sum(map(sum, flows))
    batches = drain(waiting)
    for batch in batches:
        assert_allowed(batch)
    picked = [id(text) for batch in batches for text in batch]
    assert sorted(picked) == sorted(id(text) for flow in given_texts for text in flow)
    assert waiting.tokens == 0


@settings(max_examples=60)
@given(st.data())
def test_any_mix_of_arrivals_picks_failures_and_drops_loses_nothing(data):
    waiting, outside, running, done, gone = queue(), [], [], set(), set()
    for step in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(["put", "pick", "end", "fail", "drop"]))
        if action == "put":
            added = texts(data.draw(LENGTHS))
            waiting.put(added, flow=str(step % 3))
            outside += added
        elif action == "pick" and (batch := waiting.pick()):
            assert not {id(text) for text in batch} & (done | gone)
            running.append(batch)
        elif action == "end" and running:
            done |= {id(text) for text in running.pop()}
        elif action == "fail" and running:
            waiting.put_back(running.pop())
        elif action == "drop" and outside:
            chosen = data.draw(st.lists(st.sampled_from(outside), unique_by=id))
            are_waiting = {id(text) for text in chosen if text.is_waiting}
            assert waiting.drop(chosen) == len(are_waiting)
            gone |= are_waiting
    rest = {id(text) for batch in [*running, *drain(waiting)] for text in batch}
    assert waiting.tokens == 0
    assert rest | done | gone == {id(text) for text in outside}
    assert len(rest) + len(done) + len(gone) == len(outside)


MIXED = st.one_of(st.integers(1, SHORT), st.integers(1, 80))
ORDERS = st.sampled_from([sorted, lambda lengths: sorted(lengths, reverse=True), list])


@given(st.lists(MIXED, min_size=20, max_size=200), st.lists(ORDERS, min_size=2, max_size=4))
def test_no_request_gets_further_ahead_than_the_look_ahead(lengths, orders):
    """Of requests that wait all the time, each has its share, in whatever order its texts come."""
    waiting, served, owner = queue(), [0] * len(orders), {}
    for flow, order in enumerate(orders):
        added = texts(order(lengths))
        owner |= {id(text): flow for text in added}
        waiting.put(added, flow=str(flow))
    while max(served) < sum(lengths):
        assert max(served) - min(served) <= LOOK_AHEAD * BUDGET + 2 * max(lengths)
        for text in waiting.pick():
            served[owner[id(text)]] += text.tokens


def test_texts_far_behind_in_line_are_no_company():
    """The short ones of a request whose long ones come first do not overtake these."""
    waiting = queue()
    late = texts([8] * 100)
    waiting.put([*texts([100] * 20), *late], flow="a")
    waiting.put(texts([8]), flow="b")
    waiting.pick()
    assert len(waiting.pick()) == 1  # the short text of b, alone
    assert all(text.is_waiting for text in late)


@given(st.lists(st.integers(1, 100), min_size=50, max_size=400), st.integers(0, 40), st.booleans())
def test_a_new_short_text_is_in_the_next_batch_beside_a_bulk_request(bulk, picks, is_mixed):
    lengths = bulk if is_mixed else [min(length, SHORT) for length in bulk]
    waiting, [short] = queue(), texts([3])
    waiting.put(texts(lengths), flow="bulk")
    began = [waiting.pick() for _ in range(picks)]
    waiting.put([short], flow="query")
    if all(began) and began:
        assert waiting.pick()[0] is short
    else:  # nothing of the bulk request was taken yet, or nothing is left of it
        assert any(short in waiting.pick() for _ in range(2))


BULK = st.sampled_from([(1, SHORT), (SHORT + 1, 100), (1, 100), (13, 13)])


def picks_until(waiting: FairQueue[Waiting], text: Waiting) -> int:
    picks = 0
    while text.is_waiting:
        assert waiting.pick()
        picks += 1
    return picks


def in_progress(kinds, rounds, rng, *, queries=False) -> FairQueue[Waiting]:
    """Bulk requests of these lengths, some of them served, perhaps with queries between."""
    waiting = queue()
    for flow, (least, most) in enumerate(kinds):
        waiting.put(texts(rng.randint(least, most) for _ in range(600)), flow=str(flow))
    for number in range(rounds):
        assert waiting.pick()
        if queries and rng.random() < 0.3:
            waiting.put(texts([5]), flow=f"query {number}")
    return waiting


@given(st.lists(BULK, min_size=1, max_size=12), st.integers(1, 20), st.randoms())
def test_a_new_short_text_is_in_the_next_batch_beside_any_bulk_requests(kinds, rounds, rng):
    waiting, [short] = in_progress(kinds, rounds, rng), texts([3])
    waiting.put([short], flow="query")
    assert picks_until(waiting, short) == 1


@given(st.lists(BULK, min_size=1, max_size=12), st.integers(1, 20), st.randoms())
def test_after_other_queries_bulk_requests_may_catch_up_first(kinds, rounds, rng):
    """Those that had less than their share, by no more than the head start in padded tokens."""
    waiting, [short] = in_progress(kinds, rounds, rng, queries=True), texts([3])
    waiting.put([short], flow="query")
    assert picks_until(waiting, short) <= 2 * HEAD_START * len(kinds) + 1


def test_queries_beside_a_bulk_request_come_in_order_of_arrival():
    waiting = queue()
    waiting.put(texts([100] * 50), flow="bulk")
    waiting.pick()
    queries = texts([SHORT] * 12)
    for number, text in enumerate(queries):
        waiting.put([text], flow=f"query {number}")
    order = [text for batch in drain(waiting) for text in batch if text.tokens == SHORT]
    assert order == queries


@pytest.mark.parametrize("num_texts", [1, 2, 16])
def test_a_long_text_comes_to_its_turn_while_new_requests_keep_the_queue_full(num_texts):
    """The older request has its fair share, however many newer ones arrive."""
    waiting, rng = queue(), random.Random(0)
    long = texts([100] * 3)
    waiting.put(long, flow="long")
    served = most = 0
    for arrival in range(10_000):
        waiting.put(texts(rng.choices(range(1, SHORT + 1), k=num_texts)), flow=str(arrival))
        most = max(most, waiting._num_active)
        while waiting.tokens > 10 * BUDGET:
            served += sum(text.tokens for text in waiting.pick())
        if not any(text.is_waiting for text in long):
            break
    # Each waiting request had about as much as this one.
    assert 100 * most <= served <= 600 * most


def test_texts_that_do_not_fit_the_budget_go_alone():
    waiting, big = queue(), texts([BUDGET + 1, BUDGET + 2, 500])
    waiting.put(big, flow="a")
    assert [len(batch) for batch in drain(waiting)] == [1, 1, 1]


def test_a_smaller_share_is_kept_to():
    waiting = queue()
    waiting.put(texts([8] * 8), flow="a")
    assert len(waiting.pick(at_most=32)) == 4
    assert len(waiting.pick(at_most=4)) == 1
    assert len(waiting.pick()) == 3


def test_padding_is_kept_small_where_there_is_choice():
    rng = random.Random(1)
    waiting = FairQueue[Waiting](batch_tokens=2_048, short_tokens=256)
    lengths = [min(256, max(4, int(rng.lognormvariate(3.8, 0.8)))) for _ in range(2_000)]
    waiting.put(texts(lengths), flow="bulk")
    batches = drain(waiting)
    padded = sum(len(batch) * max(text.tokens for text in batch) for batch in batches)
    assert padded <= 1.25 * sum(lengths)  # in order of arrival it would be over 3
    assert len(batches) <= 1.5 * sum(lengths) / 2_048


def test_halves_of_a_failed_batch_stay_together_and_keep_their_turn():
    waiting = queue()
    waiting.put(texts([8] * 40), flow="bulk")
    batch = waiting.pick()
    waiting.put_back(batch[:4])
    waiting.put_back(batch[4:])
    assert waiting.pick() == batch[:4]
    assert waiting.drop(batch[4:6]) == 2
    assert waiting.pick() == batch[6:]


def test_a_request_that_goes_on_asking_is_no_new_one():
    waiting = queue()
    waiting.put(texts([8] * 80), flow="other")
    first, second = texts([8] * 16), texts([8])
    waiting.put(first, flow="asks on")
    while any(text.is_waiting for text in first):
        waiting.pick()
    waiting.put(second, flow="asks on")
    [new] = texts([8])
    waiting.put([new], flow="new")
    assert new.start < second[0].start


def test_what_was_dropped_leaves_no_memory_behind():
    waiting = queue()
    waiting.put(texts([500]), flow="first")
    for number in range(50):
        gone = texts([8] * 200)
        waiting.put(gone, flow=str(number))
        assert waiting.drop(gone) == 200
    assert sum(map(len, waiting._classes)) < 1_000
    assert waiting.tokens == 500
    for number in range(500):
        waiting.put(texts([1]), flow=f"later {number}")
        waiting.pick()
    assert len(waiting._flows) < 200


@pytest.mark.parametrize("sizes", [(0, 1), (1, 0)])
def test_sizes_that_no_batch_can_have_are_refused(sizes):
    with pytest.raises(ValueError, match=">= 1"):
        FairQueue[Waiting](batch_tokens=sizes[0], short_tokens=sizes[1])


@pytest.mark.parametrize("seed", range(5))
def test_what_comes_later_goes_before_a_request_for_so_long_and_no_longer(seed):
    """Of equal requests that keep the queue full, each has its turn after a queue and little more.

    Later texts are longer and fill a batch better, so that they are the better company.
    """
    rng, waiting, work, waited = random.Random(seed), queue(), 0, []
    left, owner, most = {}, {}, 0
    for number in range(2_000):
        length = 1 + min(SHORT - 1, number // 100 + rng.randrange(2))
        added = texts([length] * (3 * SHORT // length))
        owner |= {id(text): (number, text) for text in added}
        waiting.put(added, flow=str(number))
        left[number], most = [len(added), work], max(most, waiting.tokens)
        while len(left) == 100:
            for text in waiting.pick():
                work += text.tokens
                one, _ = owner[id(text)]
                left[one][0] -= 1
                if not left[one][0]:
                    waited.append(work - left.pop(one)[1])
    assert max(waited) <= most + (LOOK_AHEAD + HEAD_START + 1) * BUDGET
