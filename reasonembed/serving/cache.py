"""Vectors that were asked for before, in bounded memory."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from reasonembed.serving.protocol import Prepared, Vectors

_KEY_BYTES = 20
_OVERHEAD = 256
"""Bytes of an entry beside its vector: two bytes objects and a place in an ordered dictionary,
which has twice the places it needs just after it grew; `test_cache` weighs it."""


class Keys:
    """Names inputs by all that decides their vectors: model, token ids, first pooled token.

    The ids hold template and instruction already, and shorter vectors are cut from the full one,
    so neither is named apart.

    Args:
        fingerprint: Of the model.
    """

    def __init__(self, fingerprint: str) -> None:
        self._model = blake2b(fingerprint.encode(), digest_size=_KEY_BYTES)

    def of(self, inputs: Sequence[Prepared]) -> list[bytes]:
        """One key an input."""
        return [self._of(one) for one in inputs]

    def _of(self, one: Prepared) -> bytes:
        digest = self._model.copy()
        digest.update(array("q", (one.skip, *one.ids)).tobytes())
        return digest.digest()


class VectorCache:
    """Keeps the vectors that were used last.

    Args:
        max_bytes: Of all entries, what Python needs around them included; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, bytes] = OrderedDict()
        self._num_bytes = 0

    @property
    def num_bytes(self) -> int:
        """In use."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> Vectors | None:
        """The float32 vector of a key, read-only; None where there is none."""
        row = self._rows.get(key)
        if row is None:
            return None
        self._rows.move_to_end(key)
        return np.frombuffer(row, dtype=np.float32)

    def put(self, key: bytes, vector_D: Vectors) -> None:
        """Keeps a copy of a float32 vector; those unused for longest give way."""
        size = vector_D.nbytes + _OVERHEAD
        if size > self._max_bytes:
            return
        known = self._rows.pop(key, None)
        if known is not None:
            self._num_bytes -= len(known) + _OVERHEAD
        self._rows[key] = vector_D.tobytes()
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, row = self._rows.popitem(last=False)
            self._num_bytes -= len(row) + _OVERHEAD
