"""Calls to several parts at once, and beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")
VECTOR = 64
"""Results that are gone through in the time in which a vector is compared."""
_INLINE = 4_096  # results that are gone through in some milliseconds


async def together(*calls: Coroutine[Any, Any, _T]) -> list[_T]:
    """Results of calls that run at once; the first failure ends the others and is raised itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(call) for call in calls]
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None
    return [task.result() for task in tasks]


async def aside(size: int, call: Callable[[], _T]) -> _T:
    """Result of a call; one over many results runs in a thread, so that others go on.

    Args:
        size: How many: search results, or vectors, of which each counts for `VECTOR`.
        call: Computes without waiting.
    """
    return call() if size <= _INLINE else await asyncio.to_thread(call)
