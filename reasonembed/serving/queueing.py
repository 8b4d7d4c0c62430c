"""Which texts go through the model next: fair between requests, alike in length within a batch.

Start-time fair queueing (Goyal, Vin and Cheng, 1996) in tokens. A text's start tag is the virtual
time at which its request would get to it if all waiting requests were served at the same rate; the
text of the smallest tag leads the next batch. A new request begins at the present virtual time,
or before what is left of older bulk requests; and virtual time goes on with the work, so whatever
waits comes to its turn however many new requests arrive.

The leader is always taken. Its company is chosen for little padding among those whose tags are
near its own, so no request gets further ahead of another than that look-ahead.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from typing import Generic, TypeVar

LOOK_AHEAD = 8
"""Batches' worth of tokens among which a leader's company is chosen, and by which a request may
get ahead of another: enough choice that padding stays small."""
HEAD_START = LOOK_AHEAD + 2
"""Batches' worth of waiting work that a new request may go before: what is left of a bulk request
may be as far behind as its company was chosen ahead, and a batch or so more."""
_MAX_NEAR = 2_048
"""Texts among which company is chosen at most: they are sorted anew for every batch."""
_MAX_RATIO = 1.5
"""Longest over shortest text of a batch of long ones."""
_MAX_PADDED = 2.0
"""Padded tokens over tokens of a batch of short texts. More would cost a CPU as much as the rest
of the batch; on a GPU a second small pass is cheap."""
_FEW = 64
"""Below so many left-overs there is nothing worth clearing away."""


@dataclass(slots=True)
class _Flow:
    """A request's place: `finish` is the tag after its last text."""

    finish: float
    num_waiting: int = 0
    is_served: bool = False


@dataclass(slots=True, eq=False)
class Waiting:
    """A text in the queue; the queue's users add what they need by inheriting.

    Attributes:
        tokens: Its length; at least 1.
        start: Its tag.
        is_waiting: Whether it is in the queue.
        flow: The request that it belongs to.
    """

    tokens: int
    start: float = field(default=0.0, init=False)
    is_waiting: bool = field(default=False, init=False)
    flow: _Flow = field(init=False, repr=False)


_Text = TypeVar("_Text", bound=Waiting)
_Heap = list[tuple[float, int, _Text]]


class FairQueue(Generic[_Text]):
    """See the module.

    Args:
        batch_tokens: Padded tokens of a batch at most: its texts x the longest one. A longer text
            is a batch of its own.
        short_tokens: Texts up to this length never share a batch with longer ones.
    """

    def __init__(self, *, batch_tokens: int, short_tokens: int) -> None:
        if batch_tokens < 1 or short_tokens < 1:
            raise ValueError(
                "need batch_tokens >= 1 and short_tokens >= 1, got "
                f"{batch_tokens} and {short_tokens}"
            )
        self._batch_tokens, self._short_tokens = batch_tokens, short_tokens
        self._look_ahead = LOOK_AHEAD * batch_tokens
        self._classes: tuple[_Heap[_Text], _Heap[_Text]] = ([], [])  # short texts, long ones
        self._groups: list[tuple[float, int, list[_Text]]] = []
        self._order = count()
        self._flows: dict[str, _Flow] = {}
        self._prune_at = _FEW
        self._now = self._entry = 0.0  # virtual time, and where new requests begin
        self._tokens = self._num_active = self._num_left_over = 0

    @property
    def tokens(self) -> int:
        """That wait."""
        return self._tokens

    def put(self, texts: Sequence[_Text], *, flow: str) -> None:
        """Adds texts behind those of the same flow."""
        place = self._place(flow)
        for text in texts:
            text.start = max(self._entry, place.finish)
            text.flow = place
            place.finish = text.start + text.tokens
            self._enter(text)
            heap = self._classes[text.tokens > self._short_tokens]
            heapq.heappush(heap, (text.start, next(self._order), text))

    def put_back(self, group: Sequence[_Text]) -> None:
        """Adds texts that were picked together once more, to be picked together again.

        They stand where a new request would, not where they stood: else all the passes that it
        takes to find a text that fails would go before whoever came in the meantime.
        """
        for text in group:
            self._enter(text)
        heapq.heappush(self._groups, (self._entry, next(self._order), list(group)))

    def drop(self, texts: Sequence[_Text]) -> int:
        """Takes out those of the texts that wait, in time that does not depend on the others.

        Returns:
            How many they were.
        """
        dropped = [text for text in texts if text.is_waiting]
        for text in dropped:
            self._leave(text)
        self._num_left_over += len(dropped)
        if self._num_left_over > max(_FEW, sum(map(len, self._classes)) // 2):
            self._clear_away()
        return len(dropped)

    def pick(self, *, at_most: int | None = None) -> list[_Text]:
        """Takes out the next batch, leader first; empty where nothing waits.

        Args:
            at_most: Padded tokens, where they should be fewer than `batch_tokens`; a leader that
                is longer goes alone.
        """
        if not self._tokens:
            return []
        batch = self._group() or self._batch(min(self._batch_tokens, at_most or self._batch_tokens))
        num_active = self._num_active
        for text in batch:
            self._leave(text)
        self._go_on(batch, num_active)
        return batch

    def _place(self, flow: str) -> _Flow:
        if not self._tokens:
            self._flows.clear()  # nobody is waiting whom an earlier call could have held up
        if len(self._flows) >= self._prune_at:
            self._flows = {
                name: place
                for name, place in self._flows.items()
                if place.num_waiting or place.finish > self._entry
            }
            self._prune_at = max(_FEW, 2 * len(self._flows))
        return self._flows.setdefault(flow, _Flow(self._entry))

    def _enter(self, text: _Text) -> None:
        text.is_waiting = True
        self._tokens += text.tokens
        self._num_active += text.flow.num_waiting == 0
        text.flow.num_waiting += 1

    def _leave(self, text: _Text) -> None:
        text.is_waiting = False
        self._tokens -= text.tokens
        text.flow.num_waiting -= 1
        self._num_active -= text.flow.num_waiting == 0

    def _group(self) -> list[_Text]:
        """What was put back together, where it is its turn; empty where it is not."""
        while self._groups:
            start, order, texts = self._groups[0]
            heads = [heap[0][:2] for heap in self._classes if self._settle(heap)]
            group = [text for text in texts if text.is_waiting]
            if group and heads and min(heads) < (start, order):
                return []
            heapq.heappop(self._groups)
            if group:
                return group
        return []

    def _batch(self, budget: int) -> list[_Text]:
        """The leader and its company; the others go back."""
        heap = min((heap for heap in self._classes if self._settle(heap)), key=lambda h: h[0][:2])
        near = self._near(heap)
        order = sorted(range(len(near)), key=lambda index: near[index][2].tokens)
        first, last = _alike(
            [near[index][2].tokens for index in order],
            order.index(0),
            budget=budget,
            is_short=heap is self._classes[0],
        )
        chosen = set(order[first:last])
        for index, entry in enumerate(near):
            if index not in chosen:
                heapq.heappush(heap, entry)
        return [near[index][2] for index in sorted(chosen)]

    def _near(self, heap: _Heap[_Text]) -> _Heap[_Text]:
        """Takes the texts of the smallest tags out of a class, leader first."""
        near: _Heap[_Text] = []
        # In virtual time, which passes the slower the more requests wait: what came later may go
        # before a text until so much work is done beyond its turn, and no longer.
        horizon, tokens = heap[0][0] + self._look_ahead / self._num_active, 0
        while (
            self._settle(heap)
            and heap[0][0] <= horizon
            and tokens < self._look_ahead
            and len(near) < _MAX_NEAR
        ):
            near.append(heapq.heappop(heap))
            tokens += near[-1][2].tokens
        return near

    def _settle(self, heap: _Heap[_Text]) -> bool:
        """Whether a class holds texts; brings one that waits to its top."""
        while heap and not heap[0][2].is_waiting:
            heapq.heappop(heap)
            self._num_left_over -= 1
        return bool(heap)

    def _go_on(self, batch: Sequence[_Text], num_active: int) -> None:
        """Moves virtual time to the leader's tag, and further by each waiting request's share.

        While a request that was just served waits on, a new one begins before all that waits,
        though by no more than `HEAD_START`: a short query beside bulk requests is in the next
        batch, and however many requests come and go, what waits comes to its turn.
        """
        self._now = max(self._now, batch[0].start)
        share = sum(text.tokens for text in batch) / num_active
        self._now += share
        for text in batch:
            text.flow.is_served = True
        self._entry = self._now
        if any(text.flow.num_waiting for text in batch):
            heads = [heap[0] for heap in self._classes if self._settle(heap)]
            first = min(heads, key=lambda head: head[:2])[2] if heads else batch[0]
            # Beside a single new text: those come in order of arrival.
            begin = first.start - (first.flow.is_served or first.flow.num_waiting > 1)
            most = HEAD_START * self._batch_tokens / max(1, self._num_active)
            self._entry = max(min(self._now, begin), self._now - most)

    def _clear_away(self) -> None:
        """Rids the heaps of texts that were dropped."""
        for heap in self._classes:
            heap[:] = [entry for entry in heap if entry[2].is_waiting]
            heapq.heapify(heap)
        self._num_left_over = 0


def _alike(lengths: Sequence[int], leader: int, *, budget: int, is_short: bool) -> tuple[int, int]:
    """The run of texts around a leader that holds most tokens and little padding.

    Args:
        lengths: Of all texts, ascending.
        leader: Which one must be in it.
        budget: Texts x the longest one at most, unless the leader is alone.
        is_short: Whether the texts are short ones; long ones are held to a narrower range.

    Returns:
        Its first index and the one after its last.
    """
    sums = [0, *accumulate(lengths)]
    best, most, left = (leader, leader + 1), lengths[leader], 0
    for right in range(leader, len(lengths)):
        longest = lengths[right]
        left = max(left, right + 1 - budget // longest)
        while left <= leader:
            tokens = sums[right + 1] - sums[left]
            padded = (right + 1 - left) * longest
            if padded <= _MAX_PADDED * tokens and (
                is_short or longest <= _MAX_RATIO * lengths[left]
            ):
                break
            left += 1
        else:
            break
        if tokens > most:
            best, most = (left, right + 1), tokens
    return best
