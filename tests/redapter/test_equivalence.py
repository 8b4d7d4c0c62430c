"""The step equals plain autograd over the whole batch, however it is cut and shared out.

One group of processes for each number of workers takes all cases; see `equivalence`.
"""

import multiprocessing
from functools import cache

import pytest
import torch
import torch.multiprocessing

from tests.redapter import equivalence
from tests.redapter.equivalence import CASES, GROUP, QUERIES, SHARDED

# Of the largest entry. Sums stand in another order: measured 1e-15 in float64. FSDP2 adds up in
# float32 (measured 1e-7), and a float32 model computes in it (measured 3e-6).
EXACT, ROUNDED = 1e-12, 5e-5
TOLERANCE = dict.fromkeys(CASES, EXACT) | dict.fromkeys(["float32", *SHARDED], ROUNDED)


@cache
def reference(name):
    return equivalence.reference(CASES[name])


@pytest.fixture(scope="module")
def groups_of_workers(tmp_path_factory):
    """What every worker found, by number of workers."""
    alone = {name: case for name, case in CASES.items() if name not in SHARDED}
    found = {1: [{name: equivalence.take_step(case) for name, case in alone.items()}]}
    # Workers are forked from a process that has imported everything once: that takes seconds.
    multiprocessing.set_forkserver_preload([equivalence.__name__])
    for world_size in (2, 4):
        folder = tmp_path_factory.mktemp(f"workers{world_size}")
        torch.multiprocessing.start_processes(
            equivalence.run,
            args=(world_size, str(folder)),
            nprocs=world_size,
            start_method="forkserver",
        )
        found[world_size] = [
            torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)
        ]
    return found


def assert_close(one, other, *, tolerance, what):
    scale = max(other.abs().max().item(), 1e-6)
    assert (one - other).abs().max().item() <= tolerance * scale, what


# One worker has nothing to cut.
RUNS = [(size, name) for size in (1, 2, 4) for name in CASES if size > 1 or name not in SHARDED]


@pytest.mark.parametrize(("world_size", "name"), RUNS)
def test_loss_and_gradient_are_those_of_the_reference(groups_of_workers, world_size, name):
    expected, tolerance = reference(name), TOLERANCE[name]
    scale = 1 / world_size if name == "paper-scale" else 1
    for rank, found in enumerate(groups_of_workers[world_size]):
        for field in ("loss", "losses_B", "rewritten_losses_B", "weight_B"):
            assert_close(
                found[name]["output"][field].double(),
                expected[field],
                tolerance=tolerance,
                what=f"{field} on {rank}",
            )
        for parameter, gradient in expected["gradients"].items():
            if gradient is None:
                assert found[name]["gradients"][parameter] is None
                continue
            assert_close(
                found[name]["gradients"][parameter].double(),
                scale * gradient,
                tolerance=tolerance,
                what=f"gradient of {parameter} on {rank}",
            )


@pytest.mark.parametrize("name", CASES)
def test_the_reference_has_something_to_compare(name):
    gradients = [g for g in reference(name)["gradients"].values() if g is not None]
    assert all(g.abs().max() > 1e-6 for g in gradients)
    weights = reference(name)["weight_B"]
    is_weighted = CASES[name].is_weighted and CASES[name].has_rewrites
    assert (weights.max() - weights.min() > 1e-3) == is_weighted


def test_options_differ_from_each_other():
    losses = {
        name: round(float(reference(name)["loss"]), 6)
        for name in (
            "whole-ri-full-nomasks", "whole-mean-full-nomasks", "whole-ri-full-masks",
            "known_positives", "equal_texts", "several", "graded", "matryoshka", "smoothing",
            "no-cap",
        )
    }  # fmt: skip
    assert len(set(losses.values())) == len(losses), losses


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_counts_are_those_of_all_workers(groups_of_workers, world_size):
    case = CASES["several"]
    num_tokens = sum(
        equivalence.local_batch(case, rank=r, world_size=world_size).num_tokens
        for r in range(world_size)
    )
    for found in groups_of_workers[world_size]:
        assert found["several"]["num_tokens"] == num_tokens
        assert found["several"]["num_at_limit"] == world_size * (world_size + 1) / 2


def test_workers_of_unequal_shares_make_equal_passes_if_that_is_needed(groups_of_workers):
    shares = [
        len(equivalence.local_batch(CASES["equal-passes"], rank=r, world_size=4).passages)
        for r in range(4)
    ]
    assert shares == [2 * GROUP, 2 * GROUP, GROUP, GROUP] and sum(shares) == QUERIES * GROUP
    passes = [found["equal-passes"]["passes"] for found in groups_of_workers[4]]
    assert all(one == passes[0] for one in passes) and len(passes[0]) > 2
    assert passes[0] == [False] * (len(passes[0]) - 1) + [True]
