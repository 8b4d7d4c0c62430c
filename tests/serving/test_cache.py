from __future__ import annotations

import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.serving.cache import Keys, VectorCache
from reasonembed.serving.protocol import Prepared

ENTRY = 4 * 4 + 256  # of a vector of four values


def row(value: float, dimension: int = 4) -> np.ndarray:
    return np.full(dimension, value, np.float32)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12)), max_size=80), st.integers(0, 6))
def test_it_is_the_model_of_a_cache_of_the_last_used(steps, size):
    cache, model = VectorCache(size * ENTRY + 100), OrderedDict()
    for number, (is_put, name) in enumerate(steps):
        key = bytes([name])
        if is_put:
            cache.put(key, row(number))
            model[key] = number
            model.move_to_end(key)
            while len(model) > size:
                model.popitem(last=False)
        else:
            found = cache.get(key)
            assert (found is None) == (key not in model)
            if found is not None:
                model.move_to_end(key)
                np.testing.assert_array_equal(found, row(model[key]))
        assert len(cache) == len(model)
        assert cache.num_bytes == len(model) * ENTRY <= size * ENTRY


@pytest.mark.parametrize("dimension", [16, 256, 4_096])
def test_it_takes_no_more_memory_than_it_says(dimension):
    bound = 2**20
    tracemalloc.start()
    cache, number = VectorCache(bound), 0
    while number < 2 * bound // (4 * dimension + 256):
        cache.put(number.to_bytes(20, "big"), row(number, dimension))
        number += 1
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used <= 1.02 * bound
    assert used >= 0.6 * cache.num_bytes


def test_a_kept_vector_is_nobody_elses():
    cache, given_row = VectorCache(10_000), row(1)
    cache.put(b"k", given_row)
    given_row[:] = 2
    np.testing.assert_array_equal(cache.get(b"k"), row(1))
    with pytest.raises(ValueError, match="read-only"):
        cache.get(b"k")[0] = 3


def test_no_room_keeps_nothing():
    cache = VectorCache(0)
    cache.put(b"k", row(1))
    assert cache.get(b"k") is None


def test_keys_tell_apart_all_that_decides_a_vector():
    one = Keys("model")
    inputs = [
        Prepared((1, 2)),
        Prepared((2, 1)),
        Prepared((1, 2), skip=1),
        Prepared((1,)),
        Prepared((12,)),
        Prepared((0, 1)),
        Prepared((0, 1, 2)),
    ]
    keys = one.of(inputs) + Keys("other").of(inputs)
    assert len(set(keys)) == len(keys)
    assert one.of([Prepared((1, 2), is_truncated=True)]) == keys[:1]
