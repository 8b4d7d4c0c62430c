import pytest
import torch
import torch.multiprocessing

from reasonembed.redapter.step import _chunks, contrastive_step
from reasonembed.schemas import row_seed
from tests.redapter import gloo_worker

# Chunks and workers change the order of float32 sums; measured about 3e-7 of the largest entry.
RELATIVE = 1e-5


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        scale = max(other.abs().max().item(), 1e-8)
        assert (one - other).abs().max().item() <= RELATIVE * scale


def plain_gradient(*, chunk_texts, dropout=0.0):
    """The same forward passes kept in one graph: ordinary autograd, no cache."""
    model, batch = gloo_worker.make_encoder(dropout=dropout), gloo_worker.make_batch()

    def embed(texts, seed):
        rows = [None] * len(texts)
        for number, chunk in enumerate(_chunks(texts, chunk_texts=chunk_texts)):
            torch.manual_seed(row_seed(seed, number))
            vectors = gloo_worker.encode(model, [texts[i] for i in chunk])
            for index, vector in zip(chunk, vectors, strict=True):
                rows[index] = vector
        return torch.stack(rows)

    vectors = embed([*batch.queries, *batch.passages], 3)
    rewritten = embed(batch.rewritten_queries, row_seed(3, "rewritten"))
    num = gloo_worker.QUERIES
    output = gloo_worker.global_loss(vectors[:num], rewritten, vectors[num:])
    return output, torch.autograd.grad(output.loss, list(model.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("chunk_texts", [1, 5, 32, 1000])
def test_chunks_give_the_gradient_of_plain_autograd(chunk_texts, dropout):
    output, gradients = gloo_worker.step(chunk_texts=chunk_texts, dropout=dropout)
    expected, expected_gradients = plain_gradient(chunk_texts=chunk_texts, dropout=dropout)
    torch.testing.assert_close(output.loss, expected.loss.detach())
    assert_same(gradients, expected_gradients)
    assert max(g.abs().max().item() for g in gradients) > 1e-3


def test_without_dropout_the_size_of_chunks_does_not_matter():
    whole, chunked = gloo_worker.step(), gloo_worker.step(chunk_texts=3)
    torch.testing.assert_close(chunked[0].loss, whole[0].loss)
    assert_same(chunked[1], whole[1])


def test_dropout_is_drawn_and_repeats_with_the_seed():
    first, again = gloo_worker.step(dropout=0.5), gloo_worker.step(dropout=0.5)
    assert torch.equal(first[0].loss, again[0].loss)
    assert not torch.equal(first[0].loss, gloo_worker.step()[0].loss)


def test_one_chunk_is_forwarded_once_and_several_twice():
    def count_forwards(chunk_texts):
        model, forwards = gloo_worker.make_encoder(), []

        def encode(ids):
            forwards.append((len(ids), torch.is_grad_enabled()))
            return gloo_worker.encode(model, ids)

        contrastive_step(
            encode,
            gloo_worker.make_batch(),
            global_loss=gloo_worker.global_loss,
            parameters=list(model.parameters()),
            chunk_texts=chunk_texts,
            seed=0,
        )
        return forwards

    assert count_forwards(32) == [(32, True), (8, False)]
    assert count_forwards(16) == [*[(16, False)] * 2, (8, False), *[(16, True)] * 2]


def test_two_workers_give_the_loss_and_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(gloo_worker.run, args=(2, str(tmp_path)), nprocs=2)
    output, gradients = gloo_worker.step()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, value in vars(output).items():
            torch.testing.assert_close(found["output"][name], value, rtol=RELATIVE, atol=1e-6)
        assert_same(found["gradients"], gradients)
