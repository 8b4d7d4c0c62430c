from __future__ import annotations

import asyncio
import base64
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from reasonembed.serving import writing
from reasonembed.serving.metrics import Metrics
from reasonembed.serving.vectors import cut, signs

floats = st.floats(allow_nan=False, allow_infinity=False, width=32)
shapes = st.tuples(st.integers(1, 4), st.integers(1, 9))


@given(vectors=arrays.arrays(np.float32, shapes, elements=floats))
@settings(deadline=None)
def test_both_encodings_hold_the_same_bits(vectors):
    numbers = [json.loads(row) for row in writing.rows(vectors, "float")]
    assert np.array(numbers, dtype=np.float64).astype("<f4").tobytes() == vectors.tobytes()
    texts = [json.loads(row) for row in writing.rows(vectors, "base64")]
    assert b"".join(map(base64.b64decode, texts)) == vectors.tobytes()


@pytest.mark.parametrize("value", [-0.0, 0.0, 1e-45, 3.4028235e38, 1.0, 16777216.0, 1e-7])
def test_numbers_at_the_edges(value):
    [row] = writing.rows(np.array([[value, 0.1]], np.float32), "float")
    back = np.array(json.loads(row), np.float32)
    assert back.tobytes() == np.array([value, 0.1], np.float32).tobytes()


def test_many_numbers_are_written_in_parts(monkeypatch):
    monkeypatch.setattr(writing, "_CHUNK_VALUES", 7)
    vectors = np.arange(20, dtype=np.float32).reshape(5, 4) / 3
    rows = writing.rows(vectors, "float")
    np.testing.assert_array_equal([np.float32(json.loads(row)) for row in rows], vectors)


def test_vectors_that_are_not_contiguous():
    vectors = np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2]
    [first, *_] = writing.rows(vectors, "base64")
    assert base64.b64decode(json.loads(first)) == vectors[0].tobytes()


@pytest.mark.parametrize(("num_values", "is_inline"), [(1, True), (1_000_000, False)])
def test_large_answers_are_written_beside_the_loop(num_values, is_inline):
    threads = []

    def write() -> bytes:
        threads.append(threading.current_thread())
        return b"{}"

    metrics = Metrics()
    answer = asyncio.run(writing.respond(write, num_values=num_values, metrics=metrics))
    assert answer.body == b"{}"
    assert (threads[0] is threading.current_thread()) == is_inline
    assert b"reasonembed_serialize_seconds_count 1.0" in metrics.exposition()[0]


def test_objects():
    body = writing.object_of([("a", b"1"), ("b", writing.array([b"2", b'"x"']))])
    assert json.loads(body) == {"a": 1, "b": [2, "x"]}


@given(vectors=arrays.arrays(np.float32, (3, 8), elements=st.floats(-1, 1, width=32)))
def test_cut_vectors_have_norm_one_or_are_zero(vectors):
    short = cut(vectors, 3)
    assert short.dtype == np.float32
    for row, whole in zip(short, vectors, strict=True):
        if not whole[:3].any():
            assert not row.any()
        elif np.linalg.norm(whole[:3].astype(np.float64)) > 1e-30:  # below, float32 has few bits
            assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)
    assert cut(vectors, 8) is vectors


def test_signs():
    vector = np.array([[1, -1, 0, 2, -3, 4, 5, -6]], np.float32)
    assert signs(vector, signed=False).tolist() == [[0b10010110]]
    assert signs(vector, signed=True).tolist() == [[0b10010110 - 128]]


def test_answers_wait_for_nothing_but_answers():
    """Other work beside the loop may take all of its threads."""
    go = threading.Event()

    async def scenario():
        loop = asyncio.get_running_loop()
        for _ in range(64):
            loop.run_in_executor(None, go.wait)
        answer = writing.respond(lambda: b"{}", num_values=1_000_000, metrics=Metrics())
        try:
            return await asyncio.wait_for(answer, 10)
        finally:
            go.set()

    assert asyncio.run(scenario()).body == b"{}"


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_the_size_of_an_answer_is_known_before(encoding):
    vectors = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32) / 16
    written = sum(len(row) for row in writing.rows(vectors, encoding))
    estimate = writing.size_of(64, 256, encoding, of=256)
    assert estimate == pytest.approx(written + vectors.nbytes, rel=0.1)
