"""How many replicas of the embedder there should be: a pure function of what they report.

Serve's controller gets this module by value, so it imports nothing but the standard library.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

QUEUED_S, BUSY = "reasonembed_queued_s", "reasonembed_busy"
"""Names under which a replica reports its seconds of queued work and its busy share."""

_FULL = 0.8
"""Busy share that a replica should have: above, queues grow from chance alone."""


def wanted_replicas(
    queued_s: Sequence[float], busy: Sequence[float], *, target_wait_s: float
) -> int:
    """Replicas that the reported load needs.

    Two needs, the larger counts: queued work is done within `target_wait_s` by all together, and
    no replica computes more than four fifths of the time. The second alone would never catch up
    with a queue; the first alone would take replicas away that are busy without a queue.

    Args:
        queued_s: Seconds that each replica would need for what waits for it at its own speed.
        busy: Share of the time, 0–1, in which each replica computed.
        target_wait_s: Seconds of queued work that a replica should have when all are busy.

    Returns:
        At least 1; bounds are the caller's.
    """
    for_queue = math.ceil(sum(queued_s) / target_wait_s - 1e-9)
    for_speed = math.ceil(sum(busy) / _FULL - 1e-9)
    return max(1, for_queue, for_speed)


class QueuedWork:
    """The policy in the form that Serve calls; its delays and bounds are Serve's own.

    Args:
        target_wait_s: See `wanted_replicas`.
    """

    def __init__(self, target_wait_s: float) -> None:
        self._target_wait_s = target_wait_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Replicas that Serve should aim at, and no state.

        Args:
            context: `ray.serve.config.AutoscalingContext`.
        """
        reported = context.aggregated_metrics or {}
        queued = list(reported.get(QUEUED_S, {}).values())
        busy = list(reported.get(BUSY, {}).values())
        if not busy:  # nothing has reported yet: stay as it is
            return context.target_num_replicas, {}
        wanted = wanted_replicas(queued, busy, target_wait_s=self._target_wait_s)
        low, high = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return min(high, max(low, wanted)), {}
