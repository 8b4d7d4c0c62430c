"""Vectors as JSON, written by hand: one contiguous array, no object a number.

Numbers are the shortest decimals that give the same float32 again, so both encodings hold the same
bits. base64 is of little-endian float32.
"""

from __future__ import annotations

import asyncio
import binascii
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from starlette.responses import Response

from reasonembed.serving.metrics import Metrics
from reasonembed.serving.protocol import Vectors

Encoding = Literal["float", "base64"]
TEXT_VALUES = 64
"""Numbers that take as long to write as a text of some hundred words."""
_INLINE_VALUES = 16_384  # below, a thread costs more than the writing
_POOL = ThreadPoolExecutor(4, thread_name_prefix="write")
"""Of its own: an answer waits for other answers, not for whatever else runs beside the loop."""
_CHUNK_VALUES = 2**22  # of an Arrow string array, whose offsets are 32-bit


def size_of(number: int, dimension: int, encoding: str, *, of: int) -> int:
    """Bytes of an answer and of the vectors that it is made of, roughly.

    Args:
        number: Of vectors.
        dimension: Of each, in the answer.
        encoding: `base64`, or decimals; signs count as decimals of an eighth as many numbers.
        of: Dimension of the vectors as they come from the model.
    """
    a_number = {"base64": 16 / 3, "binary": 5 / 8, "ubinary": 4 / 8}.get(encoding, 13.0)
    return round(number * (4 * of + a_number * dimension))


async def respond(write: Callable[[], bytes], *, num_values: int, metrics: Metrics) -> Response:
    """An answer of JSON; a large one is written in a thread, so that others go on.

    Args:
        write: Makes the body.
        num_values: Numbers that it holds.
        metrics: Where the time is noted.
    """
    start = time.perf_counter()
    if num_values <= _INLINE_VALUES:
        body = write()
    else:
        body = await asyncio.get_running_loop().run_in_executor(_POOL, write)
    metrics.serialize_seconds.observe(time.perf_counter() - start)
    return Response(body, media_type="application/json")


def rows(vectors_ND: Vectors, encoding: Encoding) -> list[bytes]:
    """Each vector as a JSON value: a list of numbers, or a string of base64."""
    return _base64(vectors_ND) if encoding == "base64" else _numbers(vectors_ND)


def integers(values_ND: np.ndarray[Any, np.dtype[Any]]) -> list[bytes]:
    """Each row of integers as a JSON list."""
    return [json.dumps(row, separators=(",", ":")).encode() for row in values_ND.tolist()]


def array(values: Iterable[bytes]) -> bytes:
    """A JSON list of JSON values."""
    return b"[" + b",".join(values) + b"]"


def object_of(fields: Sequence[tuple[str, bytes]]) -> bytes:
    """A JSON object of JSON values, in order."""
    return b"{" + b",".join(b'"%b":%b' % (name.encode(), value) for name, value in fields) + b"}"


def with_list(fields: Mapping[str, Any], name: str, values: Iterable[Any]) -> bytes:
    """A JSON object whose last field is a long list.

    Its values are written one by one: the writer lets no other thread run until it returns.
    """
    pairs = [(field, plain(value)) for field, value in fields.items()]
    return object_of([*pairs, (name, array(map(plain, values)))])


def plain(value: Any) -> bytes:
    """Any small value as JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _base64(vectors_ND: Vectors) -> list[bytes]:
    little = np.ascontiguousarray(vectors_ND, dtype="<f4")
    view, width = little.view(np.uint8).reshape(-1).data, little.shape[1] * little.itemsize
    return [
        b'"%b"' % binascii.b2a_base64(view[start : start + width], newline=False)
        for start in range(0, len(view), width)
    ]


def _numbers(vectors_ND: Vectors) -> list[bytes]:
    step = max(1, _CHUNK_VALUES // vectors_ND.shape[1])
    found: list[bytes] = []
    for start in range(0, len(vectors_ND), step):
        found += _numbers_of(vectors_ND[start : start + step])
    return found


def _numbers_of(vectors_ND: Vectors) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.compute as pc

    flat = np.ascontiguousarray(vectors_ND, dtype=np.float32).reshape(-1)
    texts = pa.array(flat).cast(pa.string())
    is_negative_zero = (flat == 0) & np.signbit(flat)
    if is_negative_zero.any():  # "-0" is read as an integer, which has no sign
        texts = pc.if_else(pa.array(is_negative_zero), "-0.0", texts)
    offsets = np.arange(0, flat.size + 1, vectors_ND.shape[1], dtype=np.int32)
    joined = pc.binary_join(pa.ListArray.from_arrays(pa.array(offsets), texts), ",")
    return [b"[%b]" % row.as_buffer() for row in joined]
