import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reasonembed.embedder import Embedder, resolve_contract
from reasonembed.embedder.encode import budget_batches, load_backbone
from reasonembed.errors import ModelError
from tests.embedder.tiny import WORDS, encoder_config

# Another batch shape makes float32 sums in another order; vectors have norm 1.
ATOL = 1e-5

TEXTS = ["a dictionary", WORDS, "", "why does a set", "order of keys in the mapping", "x"]


@pytest.fixture(scope="module")
def embedder(checkpoint):
    return Embedder.load(encoder_config(checkpoint), device="cpu", batch_tokens=64)


@given(lengths=st.lists(st.integers(1, 90), max_size=40), budget=st.integers(1, 200))
def test_batches_keep_the_budget_and_hold_each_text_once(lengths, budget):
    batches = list(budget_batches(lengths, batch_tokens=budget))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= budget


@given(lengths=st.lists(st.integers(1, 90), max_size=40), budget=st.integers(1, 200))
def test_packed_batches_count_real_tokens_and_are_as_full_as_can_be(lengths, budget):
    batches = list(budget_batches(lengths, batch_tokens=budget, packed=True))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    sizes = [sum(lengths[i] for i in batch) for batch in batches]
    for batch, size in zip(batches, sizes, strict=True):
        assert len(batch) == 1 or size <= budget
    for (one, after), size in zip(itertools.pairwise(batches), sizes, strict=False):
        assert size + lengths[after[0]] > budget, one


def test_alone_or_in_a_batch_a_text_has_one_vector(embedder):
    together = embedder.encode_documents(TEXTS)
    alone = np.concatenate([embedder.encode_documents([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=ATOL)
    assert together.dtype == np.float32 and together.shape == (len(TEXTS), 32)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=ATOL)
    others = (together @ together.T)[~np.eye(len(TEXTS), dtype=bool)]
    assert others.max() < 0.999  # different texts are told apart, so the test above can fail


def test_packing_changes_no_vector_and_wastes_no_token(checkpoint):
    found = {}
    for packing in ("on", "off"):
        config = encoder_config(checkpoint)
        encoder = Embedder(
            checkpoint, resolve_contract(checkpoint, config), batch_tokens=64, packing=packing
        )
        found[packing] = encoder.encode_documents(TEXTS)
        is_packed = encoder.stats.padded_tokens == encoder.stats.tokens
        assert is_packed == (packing == "on")
    np.testing.assert_allclose(found["on"], found["off"], atol=ATOL)


def test_order_is_restored_under_permutation(embedder):
    order = np.random.default_rng(0).permutation(len(TEXTS))
    shuffled = embedder.encode_documents([TEXTS[i] for i in order])
    np.testing.assert_allclose(shuffled, embedder.encode_documents(TEXTS)[order], atol=ATOL)


def test_duplicates_are_identical_and_computed_once(embedder):
    before = embedder.stats
    vectors = embedder.encode_documents(["a set", WORDS, "a set", "x", "a set"])
    assert np.array_equal(vectors[0], vectors[2]) and np.array_equal(vectors[0], vectors[4])
    assert embedder.stats.texts - before.texts == 5
    assert embedder.stats.computed - before.computed == 3
    tokens = embedder.stats.tokens - before.tokens
    assert 0 < tokens <= embedder.stats.padded_tokens - before.padded_tokens


def test_instruction_and_role_change_the_vector(embedder):
    vectors = [
        embedder.encode_queries(["a set"], instruction="find documents"),
        embedder.encode_queries(["a set"], instruction="find other things"),
        embedder.encode_documents(["a set"]),
    ]
    assert not any(np.allclose(a, b, atol=1e-3) for a, b in itertools.pairwise(vectors))


def test_nothing_in_gives_nothing_out(embedder):
    assert embedder.encode_documents([]).shape == (0, 32)
    assert embedder.encode_queries([], instruction="x").shape == (0, 32)


def test_bfloat16_is_close_and_still_float32_outside(checkpoint, embedder):
    half = Embedder.load(encoder_config(checkpoint, dtype="bfloat16"), device="cpu")
    vectors = half.encode_documents(TEXTS)
    assert vectors.dtype == np.float32
    cosine = np.sum(vectors * embedder.encode_documents(TEXTS), axis=1)
    assert cosine.min() > 0.99  # 8 bits of mantissa over two layers


def test_a_folder_without_weights_is_a_clear_error(tmp_path, checkpoint):
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_backbone(tmp_path, dtype="float32")


def test_an_export_without_contract_is_refused(checkpoint):
    with pytest.raises(ModelError, match=r"contract\.json is missing"):
        Embedder.load_export(checkpoint)
