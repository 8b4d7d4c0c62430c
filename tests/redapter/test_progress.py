import json
import math

import numpy as np
import pytest
import torch

from reasonembed.errors import ModelError
from reasonembed.redapter.progress import Progress


def count(progress, step, *, loss=1.0, norm=1.0, ids=("a", "b"), most=2):
    return progress.count_step(
        step,
        loss=loss,
        norm=norm,
        is_finite=math.isfinite(loss) and math.isfinite(norm),
        query_ids=ids,
        max_skipped_steps=most,
        cure="lower the rate",
    )


def test_the_cap_is_the_papers_before_a_step_and_follows_the_quantile_after():
    progress, rng = Progress(), np.random.default_rng(0)
    assert progress.cap == 5.0
    for _ in range(400):
        ratios = torch.tensor(np.exp(rng.normal(1.0, 0.5, size=256)))
        progress.observe(ratios, quantile=0.9)
    assert progress.cap == pytest.approx(math.exp(1.0 + 0.5 * 1.2816), rel=0.03)


def test_a_cap_that_is_resumed_goes_on_as_if_nothing_had_happened():
    def observed(progress, seeds):
        for seed in seeds:
            progress.observe(
                torch.rand(32, generator=torch.Generator().manual_seed(seed)), quantile=0.5
            )
        return progress.cap

    whole, first, second = Progress(), Progress(), Progress()
    observed(first, range(70))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert observed(second, range(70, 90)) == observed(whole, range(90))


def test_a_ratio_of_zero_is_no_minus_infinity():
    progress = Progress()
    progress.observe(torch.zeros(4), quantile=0.5)
    assert progress.cap == pytest.approx(1e-6)


def test_ratios_that_are_not_finite_leave_the_cap_to_the_others():
    progress, finite = Progress(), Progress()
    progress.observe(torch.tensor([2.0, math.nan, 3.0, math.inf]), quantile=0.5)
    finite.observe(torch.tensor([2.0, 3.0]), quantile=0.5)
    assert progress == finite and math.isfinite(progress.cap)
    progress.observe(torch.tensor([math.nan, -math.inf]), quantile=0.5)
    assert progress == finite


@pytest.mark.parametrize("bad", [{"loss": math.nan}, {"norm": math.inf}])
def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(bad, caplog):
    progress = Progress()
    assert count(progress, 0)
    assert not count(progress, 1, **bad, ids=("q1", "q2"))
    assert "step 1" in caplog.text and "q1, q2" in caplog.text
    assert count(progress, 2)
    assert not count(progress, 3, **bad, ids=("q3",))
    assert not count(progress, 4, **bad, ids=("q4",))
    assert progress.skipped_in_a_row == 2
    with pytest.raises(
        ModelError, match=r"step 5: .* 3 such steps in a row.*lower the rate.*q3, q4, q5$"
    ):
        count(progress, 5, **bad, ids=("q5",))


def test_a_run_that_is_resumed_among_skipped_steps_names_all_their_queries():
    first, second = Progress(), Progress()
    count(first, 0, loss=math.nan, ids=("q1",))
    state = json.loads(json.dumps(first.state_dict()))
    count(first, 1, ids=("q2",))
    second.load_state_dict(state)
    with pytest.raises(ModelError, match=r"2 such steps in a row.*: q1, q3$"):
        count(second, 1, loss=math.nan, ids=("q3",), most=1)


def test_only_so_many_queries_of_skipped_steps_are_remembered():
    progress = Progress()
    for step in range(3):
        count(progress, step, loss=math.nan, ids=[f"{step}-{i}" for i in range(600)], most=9)
    assert len(progress.skipped_ids) == 1000
    assert progress.skipped_ids[-1] == "2-599"


def test_what_is_not_finite_on_another_worker_is_skipped_here():
    found = Progress().count_step(
        0, loss=1.0, norm=1.0, is_finite=False, query_ids=["a"], max_skipped_steps=1, cure=""
    )
    assert not found


def test_with_none_to_be_skipped_the_first_ends_the_run():
    with pytest.raises(ModelError, match="at most 0"):
        count(Progress(), 0, loss=math.nan, most=0)
