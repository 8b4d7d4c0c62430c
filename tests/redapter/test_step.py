import pytest
import torch

from reasonembed.redapter.loss import ri_info_nce
from reasonembed.redapter.step import LocalBatch, SumAtEnd, contrastive_step
from reasonembed.schemas import row_seed

QUERIES, GROUP, WIDTH, DIM = 8, 3, 5, 12
# Chunks change the order of float32 sums; measured about 3e-7 of the largest entry.
RELATIVE = 1e-5


def make_encoder(*, dropout=0.0):
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Embedding(50, DIM),
        torch.nn.Linear(DIM, DIM),
        torch.nn.Tanh(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(DIM, DIM),
    )


def encode(model, batch):
    vectors = torch.stack([model(torch.tensor(ids)).mean(dim=0) for ids in batch])
    return torch.nn.functional.normalize(vectors, dim=-1)


def make_batch(*, has_rewritten=True):
    made = torch.Generator().manual_seed(2)

    def texts(count):
        lengths = torch.randint(1, WIDTH, (count,), generator=made).tolist()
        return [tuple(torch.randint(0, 50, (n,), generator=made).tolist()) for n in lengths]

    queries, rewritten = texts(QUERIES), texts(QUERIES)
    return LocalBatch(queries, rewritten if has_rewritten else [], texts(QUERIES * GROUP))


def global_loss(query_BD, rewritten_BD, doc_MD):
    return ri_info_nce(
        query_BD,
        rewritten_BD,
        doc_MD,
        torch.arange(QUERIES) * GROUP,
        temperature=0.1,
        cap=5.0,
        epsilon=1e-6,
        is_weighted=True,
    )


def by_count(size):
    """So many texts a chunk, in the given order."""
    return lambda lengths: [
        list(range(len(lengths)))[start : start + size] for start in range(0, len(lengths), size)
    ]


def step(
    *, chunk=1000, dropout=0.0, encode_with=encode, batch=None, loss=global_loss, reduction=None
):
    model = make_encoder(dropout=dropout)
    parameters = list(model.parameters())
    output = contrastive_step(
        lambda ids: encode_with(model, ids),
        batch or make_batch(),
        num_queries=QUERIES,
        global_loss=loss,
        parameters=parameters,
        cut=by_count(chunk),
        seed=3,
        reduction=reduction,
    )
    return output.loss, [parameter.grad for parameter in parameters]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        scale = max(other.abs().max().item(), 1e-8)
        assert (one - other).abs().max().item() <= RELATIVE * scale


def plain_gradient(*, chunk, dropout):
    """The same forward passes kept in one graph: ordinary autograd, no cache."""
    model, batch = make_encoder(dropout=dropout), make_batch()

    def embed(texts, seed):
        parts = []
        for number, rows in enumerate(by_count(chunk)(texts)):
            torch.manual_seed(row_seed(seed, number))
            parts.append(encode(model, [texts[i] for i in rows]))
        return torch.cat(parts)

    vectors = embed([*batch.queries, *batch.passages], 3)
    rewritten = embed(batch.rewritten_queries, row_seed(3, "rewritten"))
    output = global_loss(vectors[:QUERIES], rewritten, vectors[QUERIES:])
    return output, torch.autograd.grad(output.loss, list(model.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("chunk", [1, 5, 32, 1000])
def test_chunks_give_the_gradient_of_plain_autograd(chunk, dropout):
    output, gradients = step(chunk=chunk, dropout=dropout)
    expected, expected_gradients = plain_gradient(chunk=chunk, dropout=dropout)
    torch.testing.assert_close(output.loss, expected.loss.detach())
    assert_same(gradients, expected_gradients)
    assert max(g.abs().max().item() for g in gradients) > 1e-3


def test_without_dropout_the_size_of_chunks_does_not_matter():
    whole, chunked = step(), step(chunk=3)
    torch.testing.assert_close(chunked[0].loss, whole[0].loss)
    assert_same(chunked[1], whole[1])


def test_dropout_is_drawn_and_repeats_with_the_seed():
    first, again = step(dropout=0.5), step(dropout=0.5)
    assert torch.equal(first[0].loss, again[0].loss)
    assert not torch.equal(first[0].loss, step()[0].loss)


def forwards(*, chunk, batch=None):
    seen = []

    def counted(model, ids):
        seen.append((len(ids), torch.is_grad_enabled()))
        return encode(model, ids)

    step(chunk=chunk, encode_with=counted, batch=batch)
    return seen


def test_k_chunks_are_forwarded_2k_minus_1_times_and_rewritten_queries_once():
    assert forwards(chunk=32) == [(8, False), (32, True)]
    assert forwards(chunk=12) == [
        (8, False),  # q′
        (12, False), (8, False), (12, True),  # the first chunk last, and its graph is kept
        (12, True), (8, True),
    ]  # fmt: skip


def test_queries_stand_for_rewritten_ones_where_there_are_none():
    batch = make_batch(has_rewritten=False)
    assert forwards(chunk=32, batch=batch) == [(32, True)]
    output, _ = step(batch=batch)
    torch.testing.assert_close(output.rewritten_losses_B, output.losses_B)


def test_only_the_last_backward_may_reduce_and_gradients_are_finished_once():
    calls = []

    class Recorded(SumAtEnd):
        def before_backward(self, *, is_last):
            calls.append(is_last)

        def finish(self, parameters):
            calls.append(len(parameters))

    step(chunk=12, reduction=Recorded())
    assert calls == [False, False, True, 5]


def test_a_loss_that_is_not_finite_comes_back_as_such():
    def infinite(query_BD, rewritten_BD, doc_MD):
        found = global_loss(query_BD, rewritten_BD, doc_MD)
        return type(found)(**vars(found) | {"loss": found.loss * float("inf")})

    output, gradients = step(chunk=12, loss=infinite)
    assert not torch.isfinite(output.loss)
    assert not all(torch.isfinite(gradient).all() for gradient in gradients)
