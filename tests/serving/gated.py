"""A model whose forward passes end when a test says so."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import numpy as np

from reasonembed.serving.protocol import Prepared, Vectors

POISON, NAN = 666, 667
DIMENSION = 3
PATIENCE_S = 20.0  # only a test that fails waits so long


def prepared(first: int, tokens: int = 1) -> Prepared:
    """An input that its first id tells from others."""
    return Prepared((first, *range(1, tokens)))


def vector(one: Prepared) -> list[float]:
    """What `GatedModel` makes of it."""
    return [float(one.ids[0]), float(len(one.ids)), float(one.skip)]


class GatedModel:
    """The vector of an input says which one it is; poison breaks its batch.

    Args:
        is_open: Whether passes end at once; else each waits for `let`.
    """

    def __init__(self, *, is_open: bool = True) -> None:
        self.batches: list[list[Prepared]] = []
        self._is_open, self._lock = is_open, threading.Lock()
        self._began, self._gate = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, inputs: Sequence[Prepared]) -> Vectors:
        with self._lock:
            self.batches.append(list(inputs))
        self._began.release()
        if not self._is_open:
            assert self._gate.acquire(timeout=PATIENCE_S), "the test never let this pass end"
        if any(one.ids[0] == POISON for one in inputs):
            raise RuntimeError("the model broke")
        vectors = np.array([vector(one) for one in inputs], np.float32)
        vectors[vectors[:, 0] == NAN, 1] = np.nan
        return vectors

    async def began(self, passes: int = 1) -> None:
        """Waits until so many more passes have begun."""
        for _ in range(passes):
            assert await asyncio.to_thread(self._began.acquire, timeout=PATIENCE_S)

    def let(self, passes: int = 1) -> None:
        """Lets so many passes end."""
        for _ in range(passes):
            self._gate.release()

    def open(self) -> None:
        """Lets all passes end from now on."""
        self._is_open = True
        self._gate.release(1_000)
