from types import SimpleNamespace

import numpy as np
import pytest
import torch

from reasonembed.embedder import Attention, Pooling, TokenisationContract
from reasonembed.embedder.pooling import forward, pool


class PositionModel(torch.nn.Module):
    """A transformer whose hidden state is the token's position, so pooling has exact values."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.masks = []

    def forward(self, input_ids, attention_mask):
        self.masks.append(attention_mask)
        positions = torch.arange(input_ids.shape[1]).float().expand(input_ids.shape)
        return SimpleNamespace(last_hidden_state=positions[..., None] + self.weight)


def contract(pooling, *, normalise=False):
    return TokenisationContract(
        model="fake",
        weights="",
        query_template="{query}",
        append_token_id=0,
        attention=Attention.CAUSAL,
        pooling=pooling,
        max_query_tokens=8,
        max_document_tokens=8,
        dtype="float32",
        dimension=1,
        normalise=normalise,
    )


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [(Pooling.LAST, [2, 0, 4]), (Pooling.MEAN, [1, 0, 2]), (Pooling.CLS, [0, 0, 0])],
)
def test_pooled_position_is_exact_and_padding_is_ignored(pooling, expected):
    # Id 0 is end token and padding at once, and stands inside a text as well.
    batch = [(5, 0, 0), (0,), (1, 0, 2, 3, 0)]
    model = PositionModel()
    vectors = forward(model, contract(pooling), batch)
    assert vectors[:, 0].tolist() == expected
    assert model.masks[0].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


def test_nan_in_padding_does_not_leak():
    hidden = torch.tensor([[[1.0], [3.0], [float("nan")]], [[5.0], [7.0], [9.0]]])
    assert [pool(hidden[:1], [2], kind).item() for kind in Pooling] == [3.0, 2.0, 1.0]
    assert [pool(hidden, [2, 3], kind)[:, 0].tolist() for kind in Pooling] == [
        [3.0, 9.0],
        [2.0, 7.0],
        [1.0, 5.0],
    ]


@pytest.mark.parametrize("pooling", list(Pooling))
def test_packed_and_padded_states_are_pooled_alike(pooling):
    texts = [torch.randn(length, 3) for length in (2, 5, 1, 3)]
    lengths = [len(text) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=9.0)
    packed = torch.cat(texts)[None]
    expected = {
        Pooling.LAST: [text[-1] for text in texts],
        Pooling.MEAN: [text.mean(dim=0) for text in texts],
        Pooling.CLS: [text[0] for text in texts],
    }[pooling]
    for states in (padded, packed):
        torch.testing.assert_close(pool(states, lengths, pooling), torch.stack(expected))


def test_padding_gets_no_gradient():
    hidden = torch.randn(2, 4, 3, requires_grad=True)
    for pooling in Pooling:
        (gradient,) = torch.autograd.grad(pool(hidden, [2, 4], pooling).sum(), hidden)
        assert gradient[0, 2:].eq(0).all() and gradient.ne(0).any()


def test_vectors_are_float32_of_norm_one():
    hidden = torch.randn(3, 4, 6, dtype=torch.bfloat16)
    assert pool(hidden, [1, 2, 4], Pooling.MEAN).dtype is torch.float32
    vectors = forward(PositionModel(), contract(Pooling.LAST, normalise=True), [(1, 2), (1, 2, 3)])
    np.testing.assert_allclose(vectors.detach().norm(dim=-1), 1)


def test_a_text_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without any token"):
        forward(PositionModel(), contract(Pooling.LAST), [(1,), ()])
