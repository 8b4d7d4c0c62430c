import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.config import EncoderConfig, TrainConfig
from reasonembed.errors import ConfigError
from reasonembed.redapter.batches import BatchPlan, rank_slice, read_samples, samples_from_rows
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
    found = read_samples([table.slice(0, 1), table.slice(1)])
    assert found == samples(count=2)
    assert found[0].positives[1].doc_id == "positive0-1"


def test_held_out_samples_are_never_trained_on():
    rows = sample_rows()
    for row in rows[::2]:
        row["split"] = "held_out"
    found = samples_from_rows(rows)
    assert [one.query_id for one in found] == [row["query_id"] for row in rows[1::2]]
    with pytest.raises(ConfigError, match="no samples to train on: none at all, or all held out"):
        BatchPlan(samples_from_rows(rows[::2]), config())


def test_a_passage_that_samples_share_is_kept_once():
    rows = sample_rows(count=2)
    rows[1]["negatives"] = [dict(one) for one in rows[0]["negatives"]]
    first, second = read_samples([from_rows(rows, SAMPLES, where="test")])
    shared = zip(first.negatives, second.negatives, strict=True)
    assert all(one is other for one, other in shared)


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


OWN_SHAPES = {
    "wide": {"batch_queries": 6, "group_size": 2},
    "deep": {"batch_queries": 2, "group_size": 5},
}


def test_tasks_have_batches_of_their_own_shape():
    mixed = [
        one
        for task in ("wide", "deep", "plain")
        for one in samples(task=task, count=7, negatives=3)
    ]
    plan = BatchPlan(mixed, config(task_batches=OWN_SHAPES))
    shapes = {}
    for step in range(plan.steps_per_epoch):
        groups = plan.batch(step)
        (task,) = {group.sample.task for group in groups}
        (size,) = {len(group.passages) for group in groups}
        shapes.setdefault(task, []).append((len(groups), size))
    assert shapes == {"wide": [(6, 2)], "deep": [(2, 5)] * 3, "plain": [(4, 3)]}


def test_a_task_of_its_own_shape_leaves_the_other_tasks_samples_as_they_are():
    mixed = samples(task="wide", count=7) + samples(task="plain", count=7)

    def plain(plan):
        steps = [names(plan, step) for step in range(plan.steps_per_epoch)]
        return [step for step in steps if step[0][0].startswith("plain")]

    assert plain(BatchPlan(mixed, config())) == plain(
        BatchPlan(mixed, config(task_batches=OWN_SHAPES))
    )


def test_a_task_that_would_vanish_is_an_error_with_its_count():
    with pytest.raises(ConfigError, match=r"train\.batch_queries is 4, of tiny there are 3;"):
        BatchPlan(samples() + samples(task="tiny", count=3), config())
    with pytest.raises(
        ConfigError, match=r"train\.task_batches\.wide\.batch_queries is 6, of wide there are 5;"
    ):
        BatchPlan(samples(task="wide", count=5), config(task_batches=OWN_SHAPES))


def test_batches_that_workers_cannot_share_are_refused_with_the_task():
    mixed = samples(task="wide", count=7) + samples(task="deep", count=7) + samples(count=8)
    settings = config(task_batches=OWN_SHAPES)
    BatchPlan(mixed, settings, num_workers=2)
    with pytest.raises(ConfigError) as refused:
        BatchPlan(mixed, settings, num_workers=4)
    assert str(refused.value) == (
        "train.task_batches.deep.batch_queries 2 (deep) does not divide by 4 workers; "
        "train.task_batches.wide.batch_queries 6 (wide) does not divide by 4 workers"
    )


@pytest.mark.parametrize("side", ["positives", "negatives"])
def test_a_sample_without_a_side_is_an_error(side):
    (row,) = sample_rows(count=1)
    with pytest.raises(ConfigError, match=f"'stdlib-0' has no {side}"):
        samples_from_rows([row | {side: []}])


def test_shares_of_the_ranks_concatenate_to_the_batch():
    groups = BatchPlan(samples(), config()).batch(0)
    shares = [rank_slice(groups, rank=rank, world_size=2) for rank in range(2)]
    assert [*shares[0], *shares[1]] == list(groups)
