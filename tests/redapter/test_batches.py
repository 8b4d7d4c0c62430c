import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonembed.config import EncoderConfig, TrainConfig
from reasonembed.errors import ConfigError
from reasonembed.redapter.batches import (
    MIXED,
    BatchPlan,
    rank_slice,
    read_samples,
    samples_from_rows,
)
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


SIZES = {
    "counts": st.tuples(st.integers(4, 15), st.integers(4, 15)),
    "batch": st.integers(1, 4),
    "seed": st.integers(0, 99),
}


def two_tasks(counts):
    return samples(task="a", count=counts[0]) + samples(task="b", count=counts[1])


@settings(max_examples=30, deadline=None)
@given(**SIZES)
def test_an_epoch_of_the_paper_holds_full_single_task_batches_and_drops_the_tail(
    counts, batch, seed
):
    plan = BatchPlan(two_tasks(counts), config(batch_queries=batch, seed=seed, tail="paper"))
    assert plan.total_steps == sum(count // batch for count in counts)
    seen = []
    for step in range(plan.total_steps):
        groups = plan.batch(step)
        assert len(groups) == batch
        assert len({group.sample.task for group in groups}) == 1
        seen += [group.sample.query_id for group in groups]
    assert len(seen) == len(set(seen)) == sum(count // batch * batch for count in counts)
    for task, count in zip("ab", counts, strict=True):
        assert plan.counts()[task].never_shown == count % batch


@settings(max_examples=40, deadline=None)
@given(**SIZES, epochs=st.integers(1, 5))
def test_carried_over_no_turn_is_lost_and_none_comes_twice(counts, batch, seed, epochs):
    plan = BatchPlan(two_tasks(counts), config(batch_queries=batch, seed=seed, epochs=epochs))
    assert plan.total_steps == sum(epochs * count // batch for count in counts)
    shown = dict.fromkeys((s.query_id for s in two_tasks(counts)), 0)
    for step in range(plan.total_steps):
        groups = plan.batch(step)
        assert len({group.sample.task for group in groups}) == 1
        ids = [group.sample.query_id for group in groups]
        assert len(set(ids)) == len(ids) == batch
        for query_id in ids:
            shown[query_id] += 1
        at_epoch_end = step + 1 in {plan.steps_before(e + 1) for e in range(epochs)}
        if at_epoch_end:  # each has had all its turns but for the tail, which waits
            epoch = next(e for e in range(epochs) if step + 1 == plan.steps_before(e + 1)) + 1
            assert set(shown.values()) <= {epoch, epoch - 1}
            waiting = sum(epoch - times for times in shown.values())
            assert waiting == sum(epoch * count % batch for count in counts)
    for task, count in zip("ab", counts, strict=True):
        found = plan.counts()[task]
        assert (found.samples, found.shown) == (count, epochs * count // batch * batch)
        assert found.never_shown == (count % batch if epochs == 1 else 0)


@settings(max_examples=30, deadline=None)
@given(
    **SIZES,
    tail=st.sampled_from(["carry", "paper"]),
    start=st.integers(0, 30),
    workers=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_a_run_resumed_at_any_step_on_other_workers_sees_the_same_batches(
    counts, batch, seed, tail, start, workers
):
    settings = config(batch_queries=batch, seed=seed, max_steps=32, tail=tail)
    first, second = (min(n, batch) for n in workers)
    whole = BatchPlan(two_tasks(counts), settings, num_workers=first)
    straight = [names(whole, step) for step in range(32)]
    resumed = BatchPlan(two_tasks(counts)[::-1], settings, num_workers=second)
    assert [names(resumed, step) for step in range(start, 32)] == straight[start:]
    assert names(resumed, 0) == straight[0]  # and back again


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
    plan = BatchPlan(samples(count=7), config(epochs=40, tail="paper"))
    assert plan.total_steps == 40
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
    for step in range(plan.total_steps):
        groups = plan.batch(step)
        (task,) = {group.sample.task for group in groups}
        (size,) = {len(group.passages) for group in groups}
        shapes.setdefault(task, []).append((len(groups), size))
    assert shapes == {"wide": [(6, 2)], "deep": [(2, 5)] * 3, "plain": [(4, 3)]}


def test_a_task_of_its_own_shape_leaves_the_other_tasks_samples_as_they_are():
    mixed = samples(task="wide", count=7) + samples(task="plain", count=7)

    def plain(plan):
        steps = [names(plan, step) for step in range(plan.total_steps)]
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


def test_small_tasks_are_merged_if_asked_for():
    tasks = [("x", 3), ("y", 2), ("wide", 5), ("plain", 8)]
    mixed = [one for task, count in tasks for one in samples(task=task, count=count)]
    plan = BatchPlan(mixed, config(task_batches=OWN_SHAPES, small_tasks="merge", epochs=2))
    batches = [plan.batch(step) for step in range(plan.total_steps)]
    assert len(batches) == 5 + 4  # 2 x 10 by 4 of the small tasks, 2 x 8 by 4 of `plain`
    for groups in batches:
        found = {group.sample.task for group in groups}
        assert found == {"plain"} or found <= {"x", "y", "wide"}
        assert {len(group.passages) for group in groups} == {3}  # the common shape
    assert {task: count.batch for task, count in plan.counts().items()} == {
        "x": MIXED, "y": MIXED, "wide": MIXED, "plain": "plain",
    }  # fmt: skip
    assert all(count.shown == 2 * count.samples for count in plan.counts().values())
    assert "['wide', 'x', 'y']" in plan.notes()[0]


def test_small_tasks_that_are_too_few_together_are_refused():
    with pytest.raises(ConfigError, match=r"of the small tasks x, y together there are 3;"):
        BatchPlan(
            samples(task="x", count=1) + samples(task="y", count=2) + samples(),
            config(small_tasks="merge"),
        )


def test_leetcode_and_pony_have_the_papers_shapes_unless_others_are_given():
    plan = BatchPlan(samples(task="pony", count=16), config())
    assert [len(group.passages) for group in plan.batch(0)] == [64] * 16
    with pytest.raises(ConfigError, match="512, of leetcode there are 4"):
        BatchPlan(samples(task="leetcode", count=4), config())
    plan = BatchPlan(samples(task="leetcode", count=4), config(task_batches={}))
    assert [len(group.passages) for group in plan.batch(0)] == [3] * 4


def test_workers_share_unequally_but_none_goes_without():
    mixed = samples(task="wide", count=7) + samples(task="deep", count=7) + samples(count=8)
    settings = config(task_batches=OWN_SHAPES)
    BatchPlan(mixed, settings, num_workers=2)
    with pytest.raises(ConfigError) as refused:
        BatchPlan(mixed, settings, num_workers=3)
    assert str(refused.value) == (
        "train.task_batches.deep.batch_queries 2 (deep) is less than one query for each of 3 "
        "workers"
    )


def test_what_is_never_shown_is_noted():
    plan = BatchPlan(samples(count=7), config())
    assert plan.notes() == ["stdlib: 3 of 7 samples are in no batch of this run (tail: carry)"]
    assert BatchPlan(samples(count=7), config(epochs=2)).notes() == []
    assert BatchPlan(samples(), config(max_steps=1)).counts()["stdlib"].never_shown == 4


def test_a_negative_that_is_a_positive_too_is_left_out_and_counted():
    rows = sample_rows(count=4)
    rows[0]["negatives"][2] = rows[0]["positives"][1] | {"doc_id": "twin"}
    plan = BatchPlan(samples_from_rows(rows), config())
    assert plan.num_contradictions == 1
    assert plan.notes() == ["1 negatives left out: a positive has the same text"]
    group = next(g for g in plan.batch(0) if g.sample.query_id == "stdlib-0")
    assert len(group.sample.negatives) == len(group.sample.negative_labels) == 4
    rows[0]["negatives"] = rows[0]["positives"]
    with pytest.raises(ConfigError, match="'stdlib-0' has no negatives but texts that are its pos"):
        samples_from_rows(rows)


@pytest.mark.parametrize("targets", ["several", "graded"])
def test_several_positives_take_up_to_half_of_the_group(targets):
    rows = sample_rows(count=4, negatives=5)
    for row in rows:
        for side, label in (("positives", 4.0), ("negatives", 1.0)):
            for passage in row[side]:
                passage["label"] = label
    for group_size, expected in ((8, 2), (4, 2), (3, 1)):
        plan = BatchPlan(samples_from_rows(rows), config(group_size=group_size, targets=targets))
        for group in plan.batch(0):
            assert (len(group.passages), group.num_positives) == (group_size, expected)
            assert set(group.passages[:expected]) <= set(group.sample.positives)
            assert set(group.passages[expected:]) <= set(group.sample.negatives)
            wanted = (4.0,) * expected + (1.0,) * (group_size - expected)
            assert group.labels == wanted


def test_graded_targets_need_labels():
    rows = sample_rows(count=4)
    rows[3]["negatives"][0]["label"] = None
    with pytest.raises(ConfigError, match=r"'graded' needs a label of every .* 'stdlib-3'"):
        BatchPlan(samples_from_rows(rows), config(targets="graded"))


@pytest.mark.parametrize("side", ["positives", "negatives"])
def test_a_sample_without_a_side_is_an_error(side):
    (row,) = sample_rows(count=1)
    with pytest.raises(ConfigError, match=f"'stdlib-0' has no {side}"):
        samples_from_rows([row | {side: []}])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shares_of_the_ranks_concatenate_to_the_batch(world_size):
    groups = BatchPlan(samples(), config()).batch(0)
    shares = [rank_slice(groups, rank=r, world_size=world_size) for r in range(world_size)]
    assert [group for share in shares for group in share] == list(groups)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
