import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.redapter.loss import (
    false_negative_mask,
    info_nce,
    intensity_weights,
    reasoning_intensity,
    ri_info_nce,
    scores,
)

# τ = 0.1 keeps losses above 1e-3. Below, log-softmax in float32 loses relative precision by
# cancellation, and with it the ratio of two losses; no reference can agree closely there.
SETTINGS = {"temperature": 0.1, "cap": 5.0, "epsilon": 1e-6}
# The reference runs in float64; scores reach 1/τ = 10, where float32 resolves 1e-6.
RTOL, ATOL = 1e-4, 2e-5


def unit(rng, rows, dim=16):
    values = torch.tensor(rng.normal(size=(rows, dim)), dtype=torch.float32)
    return torch.nn.functional.normalize(values, dim=-1)


def problem(seed=0, queries=6, group=3):
    rng = np.random.default_rng(seed)
    positives = torch.arange(queries) * group
    docs = unit(rng, queries * group)
    query, rewritten = (
        torch.nn.functional.normalize(docs[positives] + noise * unit(rng, queries), dim=-1)
        for noise in (2.0, 1.0)
    )
    return query, rewritten, docs, positives


def slow_reference(query, rewritten, docs, positives, *, temperature, cap, epsilon, weighted):
    """The equations, term by term, in float64."""

    def loss_of(vector, positive):
        terms = [np.exp(vector @ doc / temperature) for doc in docs]
        return -np.log(terms[positive] / sum(terms))

    query, rewritten, docs = (x.numpy().astype(np.float64) for x in (query, rewritten, docs))
    ell = np.array([loss_of(v, p) for v, p in zip(query, positives.tolist(), strict=True)])
    ell_r = np.array([loss_of(v, p) for v, p in zip(rewritten, positives.tolist(), strict=True)])
    intensity = np.minimum(np.maximum(ell / (ell_r + epsilon), 0), cap)
    weight = intensity / intensity.sum() if weighted else np.full(len(ell), 1 / len(ell))
    return ell, ell_r, intensity, weight, (weight * ell).sum()


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_equations(seed, weighted):
    inputs = problem(seed)
    found = ri_info_nce(*inputs, **SETTINGS, is_weighted=weighted)
    expected = slow_reference(*inputs, **SETTINGS, weighted=weighted)
    names = ("losses_B", "rewritten_losses_B", "intensity_B", "weight_B", "loss")
    for name, value in zip(names, expected, strict=True):
        np.testing.assert_allclose(
            getattr(found, name).numpy(), value, rtol=RTOL, atol=ATOL, err_msg=name
        )


def test_equal_rewritten_queries_give_intensity_one_and_the_plain_mean():
    query, _, docs, positives = problem()
    found = ri_info_nce(query, query, docs, positives, **SETTINGS, is_weighted=True)
    plain = torch.nn.functional.cross_entropy(query @ docs.T / 0.1, positives)
    # Not quite 1: ε stands in the denominator only.
    expected_B = found.losses_B / (found.losses_B + 1e-6)
    torch.testing.assert_close(found.intensity_B, expected_B)
    assert expected_B.min() > 0.999
    torch.testing.assert_close(found.loss, plain)


def test_a_tiny_cap_gives_uniform_weights():
    found = ri_info_nce(*problem(), **SETTINGS | {"cap": 1e-4}, is_weighted=True)
    torch.testing.assert_close(found.weight_B, torch.full((6,), 1 / 6))


@settings(max_examples=60, deadline=None)
@given(
    losses=st.lists(
        st.tuples(st.floats(0, 100, width=32), st.floats(0, 100, width=32)), min_size=1, max_size=9
    ),
    cap=st.floats(0.01, 10),
)
def test_intensity_stays_in_range_and_weights_sum_to_one(losses, cap):
    ell, ell_r = torch.tensor(losses).T
    intensity = reasoning_intensity(ell, ell_r, cap=cap, epsilon=1e-6)
    weight = intensity_weights(intensity)
    assert bool((intensity >= 0).all()) and bool((intensity <= cap * (1 + 1e-6)).all())
    assert bool((weight >= 0).all())
    assert weight.sum().item() == pytest.approx(1, abs=1e-5)


def test_only_the_numerator_side_carries_a_gradient():
    query, rewritten, docs, positives = problem()
    rewritten = rewritten.clone().requires_grad_()
    inputs = [query.clone().requires_grad_(), docs.clone().requires_grad_()]
    found = ri_info_nce(inputs[0], rewritten, inputs[1], positives, **SETTINGS, is_weighted=True)
    gradients = torch.autograd.grad(found.loss, [*inputs, rewritten], allow_unused=True)
    assert gradients[2] is None  # nothing flows into q′

    # And none through the ratio: the gradient is that of a sum with constant weights.
    losses = info_nce(scores(inputs[0], inputs[1], temperature=0.1), positives)
    constant = torch.autograd.grad((found.weight_B.clone() * losses).sum(), inputs)
    for gradient, expected in zip(gradients, constant, strict=False):
        assert torch.equal(gradient, expected)


def test_gradient_agrees_with_finite_differences():
    query, rewritten, docs, positives = problem(queries=3, group=2)
    weight = ri_info_nce(query, rewritten, docs, positives, **SETTINGS, is_weighted=True).weight_B

    def loss(query_BD, doc_MD):
        # In float64, which `scores` would cast away; the weights are constants by definition.
        scores_BM = query_BD @ doc_MD.T / 0.5
        return (weight.double() * info_nce(scores_BM, positives)).sum()

    inputs = [query.double().requires_grad_(), docs.double().requires_grad_()]
    assert torch.autograd.gradcheck(loss, inputs)


def test_order_of_queries_does_not_matter():
    query, rewritten, docs, positives = problem()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    plain = ri_info_nce(query, rewritten, docs, positives, **SETTINGS, is_weighted=True)
    mixed = ri_info_nce(
        query[order], rewritten[order], docs, positives[order], **SETTINGS, is_weighted=True
    )
    torch.testing.assert_close(mixed.loss, plain.loss)
    torch.testing.assert_close(mixed.weight_B, plain.weight_B[order])


def test_a_batch_of_one_and_a_solved_batch_are_finite():
    query = unit(np.random.default_rng(0), 1)
    found = ri_info_nce(query, query, query, torch.tensor([0]), **SETTINGS, is_weighted=True)
    assert found.loss.item() == 0 and found.weight_B.tolist() == [1.0]


def test_extreme_scores_stay_finite():
    query, docs = torch.eye(2), -torch.eye(2)
    found = ri_info_nce(
        query,
        query,
        docs,
        torch.tensor([0, 1]),
        **SETTINGS | {"temperature": 1e-3},
        is_weighted=True,
    )
    assert found.losses_B.tolist() == pytest.approx([1000, 1000])


def test_rank_of_the_positive():
    docs = torch.eye(3)
    query = torch.nn.functional.normalize(torch.tensor([[3.0, 2, 1], [3.0, 2, 1], [3.0, 2, 1]]))
    positives = torch.tensor([0, 1, 2])
    found = ri_info_nce(query, query, docs, positives, **SETTINGS, is_weighted=True)
    assert found.positive_rank_B.tolist() == [1, 2, 3]


def test_mask_takes_out_known_positives_but_never_the_chosen_one():
    hashes = ["a", "x", "b", "a", "c", "b"]
    known = [{"a", "b"}, {"b"}, {"c"}]
    mask = false_negative_mask(hashes, known, [0, 2, 4])
    assert mask.tolist() == [
        [False, False, True, True, False, True],  # its other positive and a twin of its own
        [False, False, False, False, False, True],
        [False] * 6,
    ]


def test_masked_passages_leave_the_denominator():
    query, rewritten, docs, positives = problem(queries=2, group=3)
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[:, [1, 2, 4]] = True
    masked = ri_info_nce(
        query, rewritten, docs, positives, **SETTINGS, is_weighted=True, mask_BM=mask
    )
    kept = ri_info_nce(
        query, rewritten, docs[[0, 3, 5]], torch.tensor([0, 1]), **SETTINGS, is_weighted=True
    )
    torch.testing.assert_close(masked.loss, kept.loss)
    torch.testing.assert_close(masked.intensity_B, kept.intensity_B)
