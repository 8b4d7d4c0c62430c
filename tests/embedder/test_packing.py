import copy
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from reasonembed.embedder import Pooling, packing
from reasonembed.embedder.packing import PACKABLE, attend, is_causal, packed_inputs, use_packing
from reasonembed.embedder.pooling import forward
from reasonembed.errors import ConfigError
from tests.embedder.families import DECODERS, FAMILIES, contract, make_model, random_texts

LENGTHS = (3, 9, 1, 20, 9, 9, 3, 14)
# Sums of float64 in another order.
ATOL = 1e-12


def block_mask(lengths, *, causal, window):
    """What a packed row would need in place of bounds: bool [T, T]."""
    text = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    token = torch.arange(len(text))
    distance = token[:, None] - token[None]
    mask = text[:, None] == text[None]
    if causal:
        mask &= distance >= 0
    return mask if window is None else mask & (distance.abs() < window)


@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_packed_attention_is_that_of_a_block_mask(heads, causal, window):
    torch.manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(1, heads[0], total, 8), *[(1, heads[1], total, 8)] * 2]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    layer = SimpleNamespace(is_causal=causal, num_key_value_groups=heads[0] // heads[1])
    inputs = packed_inputs(random_texts(*LENGTHS), first_position=0, device=torch.device("cpu"))
    bounds = {name: inputs[name] for name in ("text_bounds", "longest_text")}
    found, _ = attend(layer, *tensors, None, scaling=0.3, sliding_window=window, **bounds)
    mask = block_mask(LENGTHS, causal=causal, window=window)
    expected, _ = sdpa_attention_forward(layer, *tensors, mask[None, None], scaling=0.3)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * weight).sum(), tensors) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=ATOL, rtol=0)


def test_positions_begin_anew_and_no_mask_is_made():
    inputs = packed_inputs([(7, 8), (9,), (5, 5, 5)], first_position=2, device=torch.device("cpu"))
    assert inputs["input_ids"].tolist() == [[7, 8, 9, 5, 5, 5]]
    assert inputs["position_ids"].tolist() == [[2, 3, 2, 2, 3, 4]]
    assert inputs["text_bounds"].tolist() == [0, 2, 3, 6]
    assert inputs["text_bounds"].dtype is torch.int32
    assert inputs["attention_mask"].numel() == 1


def test_every_family_is_packed_that_can_be():
    assert {family for family in FAMILIES if use_packing(make_model(family), "auto")} == set(
        PACKABLE
    )
    assert not use_packing(make_model("qwen3"), "off")
    with pytest.raises(ConfigError, match="mpnet cannot be packed"):
        use_packing(make_model("mpnet"), "on")


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders_alone_are_causal(family):
    assert is_causal(make_model(family)) == (family in DECODERS)
    # transformers' switch to a decoder that sees both sides.
    assert not is_causal(make_model(family, is_causal=False))


def test_a_decoder_that_was_turned_bidirectional_is_packed_as_such():
    model, texts = make_model("llama", is_causal=False), random_texts(*LENGTHS)
    causal, mean = make_model("llama"), contract(Pooling.CLS)
    assert use_packing(model, "on") and use_packing(causal, "on")
    with torch.no_grad():
        packed = forward(model, mean, texts, packed=True)
        torch.testing.assert_close(packed, forward(model, mean, texts), atol=1e-5, rtol=0)
        assert not torch.allclose(packed, forward(causal, mean, texts, packed=True), atol=1e-2)


def test_dropout_of_attention_weights_is_drawn_and_repeats_with_the_seed():
    model = make_model("bert", attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).train()
    assert use_packing(model, "on")

    def vectors(seed):
        torch.manual_seed(seed)
        return forward(model, contract(Pooling.MEAN), random_texts(*LENGTHS), packed=True)

    first = vectors(1)
    assert torch.equal(first, vectors(1)) and not torch.allclose(first, vectors(2), atol=1e-2)


@pytest.mark.parametrize(
    ("family", "share"),
    [("bert", "attention_probs_dropout_prob"), ("qwen3", "attention_dropout")],
)
def test_a_gpu_is_not_made_to_wait_by_dropout_of_attention_weights(monkeypatch, family, share):
    weight = SimpleNamespace(is_cuda=True, device="cuda", dtype=torch.bfloat16)
    monkeypatch.setattr(packing, "_is_ampere", lambda device: device == "cuda")

    def is_packed(wanted, *, dropout, training):
        model = make_model(family, **{share: dropout}).train(training)
        model.parameters = lambda: iter([weight])
        return use_packing(model, wanted)

    assert not is_packed("auto", dropout=0.1, training=True)
    assert is_packed("auto", dropout=0.1, training=False)
    assert is_packed("auto", dropout=0.0, training=True)
    assert is_packed("on", dropout=0.1, training=True)


def test_cpus_pack_whatever_is_dropped():
    assert use_packing(make_model("bert").train(), "auto")


def reference_kernel(
    query, key, value, bounds, bounds_k, longest, longest_k, *, scale, window_size, enable_gqa
):
    """What `varlen_attn` documents, by a mask: (left, right) reach, -1 without end."""
    assert torch.equal(bounds, bounds_k) and longest == longest_k == max(LENGTHS) and enable_gqa
    mask = block_mask(bounds.diff().tolist(), causal=False, window=None)
    token = torch.arange(len(query))
    ahead = token[None] - token[:, None]
    left, right = (len(query) if reach < 0 else reach for reach in window_size)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        attn_mask=mask & (ahead >= -left) & (ahead <= right), scale=scale, enable_gqa=True,
    )  # fmt: skip
    return mixed[0].transpose(0, 1)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_the_kernel_is_asked_for_the_same_attention(monkeypatch, causal, window):
    torch.manual_seed(0)
    heads = [torch.randn(count, sum(LENGTHS), 8, dtype=torch.float64) for count in (6, 2, 2)]
    bounds = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)], dtype=torch.int32)
    same = {"scale": 0.3, "causal": causal, "window": window}
    monkeypatch.setattr(packing, "varlen_attn", reference_kernel)
    found = packing._kernel(*heads, bounds, max(LENGTHS), **same)
    expected = packing._by_length(*heads, bounds, dropout=0.0, **same)
    torch.testing.assert_close(found, expected, atol=ATOL, rtol=0)


def test_the_kernel_of_this_release_takes_what_is_asked():
    with FakeTensorMode():  # shapes alone, for there is no kernel on CPUs
        heads = [torch.randn(n, 12, 8, dtype=torch.bfloat16) for n in (6, 2, 2)]
        bounds = torch.zeros(4, dtype=torch.int32)
        mixed = packing._kernel(*heads, bounds, 5, scale=None, causal=True, window=None)
        assert mixed.shape == (12, 6, 8)


@pytest.mark.slow
def test_layers_are_not_compiled_anew_for_every_set_of_lengths():
    from torch._dynamo.testing import CompileCounter

    plain = make_model("qwen3")
    assert use_packing(plain, "on")
    compiled, counter = copy.deepcopy(plain), CompileCounter()
    compiled.layers[0].compile(dynamic=True, backend=counter)
    last, counts = contract(Pooling.LAST), []
    for lengths in [(5, 3), (9, 4, 4), (7, 6, 5, 2), (8, 7, 3, 3, 2)]:
        texts = random_texts(*lengths)
        with torch.no_grad():
            found = forward(compiled, last, texts, packed=True)
            expected = forward(plain, last, texts, packed=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        counts.append(counter.frame_count)
    assert 0 < counts[1] == counts[-1], counts


@pytest.mark.gpu
@pytest.mark.parametrize("family", PACKABLE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernel_of_gpus_gives_the_same_vectors_and_gradients(family, dtype):
    texts, cls = random_texts(*LENGTHS), contract(Pooling.CLS if family == "bert" else Pooling.LAST)
    exact = make_model(family).to("cuda")
    half = copy.deepcopy(exact).to(dtype)
    assert use_packing(half, "auto") and not use_packing(copy.deepcopy(exact), "auto")
    expected, found = forward(exact, cls, texts), forward(half, cls, texts, packed=True)
    assert (expected * found).sum(dim=1).min() > 0.99
    weight = torch.randn_like(expected)
    for vectors in (expected, found):
        (vectors * weight).sum().backward()
    both = zip(exact.named_parameters(), half.parameters(), strict=True)
    for (name, one), other in both:
        if one.grad is not None and one.grad.norm() > 1e-3:
            cosine = torch.nn.functional.cosine_similarity(
                one.grad.flatten(), other.grad.float().flatten(), dim=0
            )
            assert cosine > 0.97, name
