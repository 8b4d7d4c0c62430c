import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.redapter.loss import (
    equal_text_mask,
    graded_nce,
    info_nce,
    intensity_ratio,
    intensity_weights,
    known_positive_mask,
    label_targets,
    reasoning_intensity,
    ri_info_nce,
    scores,
    several_nce,
    smoothed,
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
    intensity = reasoning_intensity(intensity_ratio(ell, ell_r, epsilon=1e-6), cap=cap)
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

    def loss(query_BD, doc_MD):  # the weights are constants by definition
        scores_BM = scores(query_BD, doc_MD, temperature=0.5)
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


def own(columns, num_columns):
    found = torch.zeros(len(columns), num_columns, dtype=torch.bool)
    for row, these in enumerate(columns):
        found[row, these] = True
    return found


def test_known_positives_are_masked_but_never_the_querys_own_targets():
    hashes = ["a", "x", "b", "a", "c", "b"]
    known = [{"a", "b"}, {"b"}, {"c", "nowhere"}]
    mask = known_positive_mask(hashes, known, own([[0], [2], [4]], 6))
    assert mask.tolist() == [
        [False, False, True, True, False, True],  # its other positive and a twin of its own
        [False, False, False, False, False, True],
        [False] * 6,
    ]


def test_a_text_counts_once_for_each_query_as_its_own_target_if_it_is_one():
    hashes = ["a", "x", "b", "x", "a", "b"]
    mask = equal_text_mask(hashes, own([[0], [2], [4], [2, 5]], 6))
    assert mask.tolist() == [
        [False, False, False, True, True, True],
        [False, False, False, True, True, True],
        [True, False, False, True, False, True],  # its own is the later one: the earlier goes
        [False, False, False, True, True, False],  # two targets of one text are both kept
    ]


def test_half_precision_is_scored_in_float32_and_float64_stays():
    query, _, docs, _ = problem()
    assert scores(query.bfloat16(), docs.bfloat16(), temperature=1).dtype is torch.float32
    assert scores(query.double(), docs.double(), temperature=1).dtype is torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(query, docs, temperature=1)
    torch.testing.assert_close(found, query @ docs.T, rtol=1e-6, atol=1e-6)


def one_hot(positives, num_columns):
    return torch.nn.functional.one_hot(positives, num_columns).float()


@pytest.mark.parametrize("of", [several_nce, graded_nce])
def test_one_target_is_info_nce_again(of):
    query, _, docs, positives = problem()
    scores_BM = scores(query, docs, temperature=0.1).requires_grad_()
    target_BM = one_hot(positives, len(docs))
    found, expected = of(scores_BM, target_BM), info_nce(scores_BM, positives)
    torch.testing.assert_close(found, expected, rtol=RTOL, atol=ATOL)
    gradients = [
        torch.autograd.grad(x.sum(), scores_BM, retain_graph=True) for x in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=RTOL, atol=ATOL)


def test_several_positives_do_not_compete_with_each_other():
    easy_hard = torch.tensor([[9.0, 3.0, -1.0, -2.0]])
    target = torch.tensor([[0.5, 0.5, 0, 0]])
    negatives = np.exp(-1.0) + np.exp(-2.0)
    expected = np.mean([np.log(1 + negatives / np.exp(s)) for s in (9.0, 3.0)])
    assert several_nce(easy_hard, target).item() == pytest.approx(expected, rel=1e-5)
    solved = torch.tensor([[50.0, 40.0, -50.0, -50.0]])
    assert several_nce(solved, target).item() == pytest.approx(0, abs=1e-6)  # not log 2


def test_several_positives_without_any_negative_left_are_finite():
    scores_BM = torch.tensor([[1.0, float("-inf")]], requires_grad=True)
    found = several_nce(scores_BM, torch.tensor([[1.0, 0.0]]))
    (gradient,) = torch.autograd.grad(found.sum(), scores_BM)
    assert found.item() == 0 and torch.isfinite(gradient).all()


def test_graded_targets_are_reached_where_scores_are_log_targets():
    labels = torch.tensor([[5.0, 4.0, 1.0, 2.0]])
    target = label_targets(labels)
    assert target.argsort(descending=True).tolist() == [[0, 1, 3, 2]]
    assert (target[0, 0] / target[0, 1]).item() == pytest.approx(np.exp(4), rel=1e-4)
    assert graded_nce(target.log() + 7, target).item() == pytest.approx(0, abs=1e-6)
    assert graded_nce(torch.zeros(1, 4), target).item() > 1
    masked = torch.tensor([[1.0, 0.5, float("-inf"), 0.0]])
    assert torch.isfinite(graded_nce(masked, torch.tensor([[0.7, 0.3, 0.0, 0.0]]))).all()


def test_an_infinite_cap_cuts_nothing():
    inputs = problem()
    found = ri_info_nce(*inputs, **SETTINGS | {"cap": float("inf")}, is_weighted=True)
    torch.testing.assert_close(found.intensity_B, found.ratio_B)
    assert found.ratio_B.max() > 1.2


def test_smoothing_goes_from_the_intensities_to_uniform_weights():
    values = torch.tensor([1.0, 2.0, 5.0, 0.0])
    assert torch.equal(smoothed(values, share=0), values)
    torch.testing.assert_close(smoothed(values, share=1), torch.full((4,), 2.0))
    torch.testing.assert_close(smoothed(values, share=0.5).sum(), values.sum())
    found = ri_info_nce(*problem(), **SETTINGS, is_weighted=True, smoothing=1.0)
    torch.testing.assert_close(found.weight_B, torch.full((6,), 1 / 6))


def test_shorter_dimensions_are_trained_and_intensity_stays_that_of_all():
    inputs = problem()
    whole = ri_info_nce(*inputs, **SETTINGS, is_weighted=True)
    found = ri_info_nce(*inputs, **SETTINGS, is_weighted=True, dimensions=(4, 8))
    torch.testing.assert_close(found.weight_B, whole.weight_B)
    torch.testing.assert_close(found.losses_B, whole.losses_B)
    query, _, docs, positives = inputs
    losses = [
        info_nce(
            scores(
                *(torch.nn.functional.normalize(x[:, :d]) for x in (query, docs)), temperature=0.1
            ),
            positives,
        )
        for d in (4, 8, 16)
    ]
    torch.testing.assert_close(found.loss, (whole.weight_B * sum(losses) / 3).sum())


def test_other_positives_stand_not_in_the_way_of_the_rank():
    docs = torch.eye(3)
    query = torch.nn.functional.normalize(torch.tensor([[3.0, 2, 1]]))
    target = torch.tensor([[0.5, 0.0, 0.5]])
    found = ri_info_nce(
        query, query, docs, torch.tensor([2]), **SETTINGS, is_weighted=True,
        targets="several", target_BM=target,
    )  # fmt: skip
    assert found.positive_rank_B.tolist() == [2]  # only the middle one is above and no positive


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
