import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.config import EncoderConfig, TrainConfig
from reasonembed.errors import ConfigError
from reasonembed.redapter.batches import BatchPlan, rank_slice, samples_from_rows
from reasonembed.schemas import SAMPLES, from_rows
from tests.redapter.samples import sample_rows, samples


def config(**changes):
    values = {"encoder": EncoderConfig(model="m"), "batch_queries": 4, "group_size": 3, "seed": 7}
    return TrainConfig.model_validate(values | changes)


def names(plan, step):
    return [
        (group.sample.query_id, [passage.doc_id for passage in group.passages])
        for group in plan.batch(step)
    ]


def test_rows_of_the_artifact_are_read():
    table = from_rows(sample_rows(count=2), SAMPLES, where="test")
    assert isinstance(table, pa.Table)
    found = samples_from_rows(table.to_pylist())
    assert found == samples(count=2)
    assert found[0].positives[1].doc_id == "positive0-1"


@settings(max_examples=30, deadline=None)
@given(
    counts=st.tuples(st.integers(4, 15), st.integers(4, 15)),
    batch=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_an_epoch_holds_full_single_task_batches_without_repetition(counts, batch, seed):
    both = samples(task="a", count=counts[0]) + samples(task="b", count=counts[1])
    plan = BatchPlan(both, config(batch_queries=batch, seed=seed))
    assert plan.steps_per_epoch == sum(count // batch for count in counts)
    seen = []
    for step in range(plan.steps_per_epoch):
        groups = plan.batch(step)
        assert len(groups) == batch
        assert len({group.sample.task for group in groups}) == 1
        seen += [group.sample.query_id for group in groups]
    assert len(seen) == len(set(seen)) == sum(count // batch * batch for count in counts)


def test_groups_hold_one_positive_and_different_negatives():
    plan = BatchPlan(samples(), config(group_size=4))
    for group in plan.batch(0):
        positive, *negatives = group.passages
        assert positive in group.sample.positives
        assert len(set(negatives)) == 3 and set(negatives) <= set(group.sample.negatives)


def test_a_short_list_of_negatives_is_repeated_evenly():
    plan = BatchPlan(samples(negatives=2), config(group_size=5))
    for group in plan.batch(0):
        assert len(group.passages) == 5
        assert max(group.passages[1:].count(p) for p in group.passages[1:]) <= 2


def test_a_step_depends_on_samples_seed_and_step_alone():
    ordered, mixed = samples(), samples()[::-1]
    steps = [5, 0, 3, 0, 1]  # any order, across epochs: a resumed run starts in the middle
    first, second = BatchPlan(ordered, config()), BatchPlan(mixed, config())
    straight = {step: names(first, step) for step in range(6)}
    assert all(names(second, step) == straight[step] for step in steps)
    assert first.fingerprint == second.fingerprint
    assert names(BatchPlan(ordered, config(seed=8)), 0) != straight[0]
    assert BatchPlan(samples(negatives=4), config()).fingerprint != first.fingerprint


def test_epochs_differ_and_the_dropped_tail_moves():
    plan = BatchPlan(samples(count=7), config(epochs=40))
    assert (plan.steps_per_epoch, plan.total_steps) == (1, 40)
    epochs = [names(plan, epoch) for epoch in range(40)]
    assert epochs[0] != epochs[1]
    assert len({query_id for epoch in epochs for query_id, _ in epoch}) == 7


def test_max_steps_rules_over_epochs():
    assert BatchPlan(samples(), config(max_steps=1)).total_steps == 1
    assert BatchPlan(samples(), config(max_steps=11)).total_steps == 11
    assert BatchPlan(samples(), config(epochs=3)).total_steps == 6


def test_a_task_that_would_vanish_is_an_error_with_its_count():
    with pytest.raises(ConfigError, match=r"batch_queries is 4.*tiny: 3"):
        BatchPlan(samples() + samples(task="tiny", count=3), config())
    with pytest.raises(ConfigError, match="every task: 0"):
        BatchPlan([], config())


@pytest.mark.parametrize("side", ["positives", "negatives"])
def test_a_sample_without_a_side_is_an_error(side):
    (row,) = sample_rows(count=1)
    with pytest.raises(ConfigError, match=f"'stdlib-0' has no {side}"):
        samples_from_rows([row | {side: []}])


def test_shares_of_the_ranks_concatenate_to_the_batch():
    groups = BatchPlan(samples(), config()).batch(0)
    shares = [rank_slice(groups, rank=rank, world_size=2) for rank in range(2)]
    assert [*shares[0], *shares[1]] == list(groups)
    with pytest.raises(ConfigError, match="4 does not divide by 3 workers"):
        rank_slice(groups, rank=0, world_size=3)
