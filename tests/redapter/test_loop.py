import math

import pytest
import torch
from safetensors.torch import load_file

from reasonembed.config import TrainConfig, TrainRuntime
from reasonembed.corpus import text_hash
from reasonembed.errors import ConfigError, DriftError, ModelError
from reasonembed.redapter import loop, objective
from reasonembed.redapter.batches import BatchPlan, samples_from_rows
from reasonembed.redapter.loop import learning_rate_at, train
from reasonembed.redapter.objective import batch_mask
from tests.embedder.tiny import encoder_config
from tests.redapter.samples import sample_rows, samples


def config(checkpoint, **changes):
    values = {
        "encoder": encoder_config(checkpoint),
        "batch_queries": 4,
        "group_size": 3,
        "max_steps": 5,
        "intensity_start_step": 2,
        "temperature": 0.1,
        "learning_rate": 1e-2,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    }
    return TrainConfig.model_validate(values | changes)


def run(checkpoint, folder, *, resume_from=None, stop_after=None, runtime=None, **changes):
    reports = []

    def report(metrics, saved):
        reports.append((metrics, saved and saved.wait()))
        if len(reports) == stop_after:
            raise KeyboardInterrupt  # as a lost machine: nothing is tidied up

    result = train(
        config(checkpoint, **changes),
        samples(),
        weights=checkpoint,
        runtime=runtime or TrainRuntime(checkpoint_every=2, chunk_tokens=120, threads=1),
        output_dir=folder,
        report=report,
        resume_from=resume_from,
    )
    return result, reports


def adapter(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def finished(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result, reports = run(checkpoint, folder)
    return folder, result, reports


def test_every_step_is_reported_with_all_metrics(finished):
    folder, result, reports = finished
    assert [metrics["step"] for metrics, _ in reports] == [0, 1, 2, 3, 4]
    paths = [path and path.name for _, path in reports]
    assert paths == [None, "checkpoint-2", None, "checkpoint-4", "checkpoint-5"]
    assert result.weights_dir == folder / "weights"
    expected = {
        "loss", "query_loss", "rewritten_loss", "intensity_min", "intensity_median",
        "intensity_max", "intensity_capped_share", "effective_batch_size", "positive_rank",
        "learning_rate", "grad_norm", "step", "step_s", "tokens_per_s", "is_skipped",
        "queries_at_limit", "batch", "intensity_cap",
    }  # fmt: skip
    for metrics, _ in reports:
        assert set(metrics) == expected
        assert all(math.isfinite(value) for value in metrics.values())


def test_weighting_starts_at_its_step_and_intensity_is_seen_before(finished):
    _, _, reports = finished
    for metrics, _ in reports:
        is_uniform = metrics["effective_batch_size"] == pytest.approx(4, abs=1e-3)
        assert is_uniform == (metrics["step"] < 2)
        assert metrics["intensity_max"] > metrics["intensity_min"] > 0


def test_an_interrupted_run_resumes_bit_for_bit(checkpoint, tmp_path, finished):
    folder, _, whole = finished
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, stop_after=3)  # after checkpoint-2, in the middle of an epoch
    _, reports = run(checkpoint, tmp_path, resume_from=tmp_path / "checkpoint-2")
    timed = {"step_s", "tokens_per_s"}
    for (found, _), (expected, _) in zip(reports, whole[2:], strict=True):
        assert {k: v for k, v in found.items() if k not in timed} == {
            k: v for k, v in expected.items() if k not in timed
        }
    resumed, uninterrupted = adapter(tmp_path / "weights"), adapter(folder / "weights")
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_weights_outside_the_forward_pass_do_not_stand_in_the_way_of_resuming(bert, tmp_path):
    settings = {"lora": None, "learning_rate": 1e-3}
    done, whole = run(bert, tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run(bert, tmp_path / "cut", stop_after=3, **settings)
    resume_from = tmp_path / "cut/checkpoint-2"
    again, rest = run(bert, tmp_path / "cut", resume_from=resume_from, **settings)
    assert [m["loss"] for m, _ in rest] == [m["loss"] for m, _ in whole[2:]]
    found, expected = (load_file(r.weights_dir / "model.safetensors") for r in (again, done))
    before = load_file(bert / "model.safetensors")
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    still = {name for name in before if torch.equal(found[name], before[name])}
    assert still == {"pooler.dense.weight", "pooler.dense.bias"}


def test_what_a_killed_run_left_is_removed_when_it_goes_on(checkpoint, tmp_path, finished):
    left = (".checkpoint-1", ".checkpoint-6", "checkpoint-1", "checkpoint-3", "checkpoint-9")
    others = ("weights-2", "checkpoint-2.pt", "checkpoint_manager_snapshot")
    for name in (*left, *others):
        (tmp_path / name).mkdir()
    resume_from = finished[0] / "checkpoint-2"
    with pytest.raises(DriftError):
        run(checkpoint, tmp_path, resume_from=resume_from, learning_rate=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {*left, *others}  # not this run's
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, resume_from=resume_from, stop_after=1)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", *others}
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path, stop_after=1)
    assert {path.name for path in tmp_path.iterdir()} == set(others)


def test_resuming_a_finished_run_does_nothing(checkpoint, tmp_path, finished):
    folder, _, _ = finished
    again, reports = run(checkpoint, tmp_path, resume_from=folder / "checkpoint-5")
    assert reports == [] and again.weights_dir == tmp_path / "weights"
    written, expected = adapter(tmp_path / "weights"), adapter(folder / "weights")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_a_checkpoint_of_other_settings_is_refused(checkpoint, tmp_path, finished):
    folder, _, _ = finished
    with pytest.raises(DriftError, match="other settings or samples"):
        run(checkpoint, tmp_path, resume_from=folder / "checkpoint-5", learning_rate=1e-3)


def test_training_lowers_the_loss_and_moves_only_the_adapter(checkpoint, tmp_path):
    _, reports = run(checkpoint, tmp_path, max_steps=25)
    losses = [metrics["query_loss"] for metrics, _ in reports]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    names = adapter(tmp_path / "weights").keys()
    assert all("lora_" in name for name in names)
    assert {name.split(".")[-3] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_masking_known_positives_changes_the_loss(checkpoint, tmp_path):
    twins = [
        # Every sample has the passages of the first: each batch is full of false negatives.
        type(sample)(**{**vars(sample), "positives": samples()[0].positives})
        for sample in samples()
    ]

    def first_loss(mask):
        reports = []
        train(
            config(checkpoint, max_steps=1, masks=mask),
            twins,
            weights=checkpoint,
            runtime=TrainRuntime(threads=1),
            output_dir=tmp_path / str(len(mask)),
            report=lambda metrics, _: reports.append(metrics),
        )
        return reports[0]["query_loss"]

    assert first_loss(("known_positives",)) < first_loss(()) - 0.1


def passage(doc_id, text):
    return {"doc_id": doc_id, "text": text, "label": None, "text_hash": text_hash(text)}


def masked_texts(checkpoint, rows):
    """For each query id: the chosen positive, and the texts that are masked for it."""
    settings = config(checkpoint, batch_queries=len(rows), masks=["known_positives"])
    plan = BatchPlan(samples_from_rows(rows), settings)
    found = []
    for epoch in range(8):  # each chooses positives anew
        groups = plan.batch(epoch)
        passages = [one for group in groups for one in group.passages]
        for group, mask in zip(groups, batch_mask(settings, groups).tolist(), strict=True):
            texts = sorted(p.text for p, is_masked in zip(passages, mask, strict=True) if is_masked)
            found.append((group.sample.query_id, group.passages[0].text, texts))
    return found


def test_known_positives_are_masked_by_text_whatever_their_ids(checkpoint):
    first, second = sample_rows(count=2, negatives=2)
    first["positives"] = [passage("a", "own"), passage("b", "other text")]
    second["positives"] = [passage("c", "other  text")]  # white space does not count
    second["negatives"] = [passage("d", "own"), passage("e", "unknown")]
    masked = masked_texts(checkpoint, [first, second])
    assert ("stdlib-0", "own", ["other  text", "own"]) in masked
    assert ("stdlib-0", "other text", ["other  text", "own"]) in masked
    # Its only positive is masked where the first query brings it, and its own column never is.
    assert ("stdlib-1", "other  text", []) in masked
    assert ("stdlib-1", "other  text", ["other text"]) in masked
    assert len({str(one) for one in masked}) == 4


def test_samples_of_one_query_know_each_others_positives(checkpoint):
    first, second = sample_rows(count=2, negatives=2)
    first["positives"], second["positives"] = [passage("a", "one")], [passage("b", "two")]
    apart = masked_texts(checkpoint, [first, second])
    assert all(texts == [] for _, _, texts in apart)
    second["query"] = first["query"]
    for query_id, _, texts in masked_texts(checkpoint, [first, second]):
        assert texts == (["two"] if query_id == "stdlib-0" else ["one"])


def test_samples_without_rewritten_queries_train_by_the_plain_mean(checkpoint, tmp_path):
    plain = [type(one)(**{**vars(one), "rewritten_query": one.query}) for one in samples()]
    reports = []
    train(
        config(checkpoint, max_steps=3, intensity_start_step=0, intensity_cap="adaptive"),
        plain,
        weights=checkpoint,
        runtime=TrainRuntime(threads=1),
        output_dir=tmp_path,
        report=lambda metrics, _: reports.append(metrics),
    )
    assert {metrics["intensity_cap"] for metrics in reports} == {5.0}  # nothing to learn it from
    for metrics in reports:  # dropout moves the intensities, and would move the weights
        assert metrics["intensity_max"] > metrics["intensity_min"]
        assert metrics["effective_batch_size"] == pytest.approx(4, abs=1e-3)
        assert metrics["loss"] == pytest.approx(metrics["query_loss"])


def test_tasks_of_different_shapes_train_together(checkpoint, tmp_path):
    mixed = samples() + samples(task="wide", count=6)
    reports = []
    train(
        config(
            checkpoint,
            max_steps=None,
            intensity_start_step=100,
            masks=["known_positives", "equal_texts"],
            task_batches={"wide": {"batch_queries": 6, "group_size": 2}},
        ),
        mixed,
        weights=checkpoint,
        runtime=TrainRuntime(threads=1, chunk_tokens=120),
        output_dir=tmp_path,
        report=lambda metrics, _: reports.append(metrics),
    )
    sizes = sorted(metrics["effective_batch_size"] for metrics in reports)
    assert sizes == pytest.approx([4, 4, 6], abs=1e-3)  # 8 samples by 4, and 6 by 6


def test_a_loss_that_is_never_finite_stops_the_run_with_its_queries(checkpoint, tmp_path):
    with pytest.raises(
        ModelError, match=r"step 1: loss .*2 such steps.*lower train\.learning_rate.*stdlib-\d"
    ):
        run(checkpoint, tmp_path, temperature=1e-45, max_skipped_steps=1)


def test_a_step_that_is_not_finite_is_skipped_and_the_next_goes_on(
    checkpoint, tmp_path, monkeypatch
):
    def infinite_once(config, groups, *, step, cap):
        compute = objective.batch_loss(config, groups, step=step, cap=cap)

        def computed(*vectors):
            found = compute(*vectors)
            factor = float("inf") if step == 1 else 1.0
            return type(found)(**vars(found) | {"loss": found.loss * factor})

        return computed

    monkeypatch.setattr(loop, "batch_loss", infinite_once)
    _, reports = run(checkpoint, tmp_path)
    assert [metrics["is_skipped"] for metrics, _ in reports] == [0, 1, 0, 0, 0]
    assert all(math.isfinite(m["loss"]) for m, _ in reports if m["step"] != 1)


def test_more_workers_than_queries_are_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="less than one query for each of 5 workers"):
        train(
            config(checkpoint),
            samples(),
            weights=checkpoint,
            runtime=TrainRuntime(),
            output_dir=tmp_path,
            report=lambda *_: None,
            world_size=5,
        )


def test_shorter_vectors_must_be_shorter(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=r"matryoshka_dimensions \[32\] must lie below the 32"):
        run(checkpoint, tmp_path, matryoshka_dimensions=[8, 32])


OPTIONS = [
    {"intensity_cap": "adaptive", "intensity_start_step": 0},
    {"intensity_cap": math.inf, "intensity_start_step": 0},
    {"targets": "several", "group_size": 4, "matryoshka_dimensions": [8, 16]},
    {"targets": "graded", "group_size": 4, "intensity_smoothing": 0.5},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_goes_past_the_paper_trains_and_resumes_bit_for_bit(checkpoint, tmp_path, options):
    _, whole = run(checkpoint, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(checkpoint, tmp_path / "cut", stop_after=3, **options)
    resume_from = tmp_path / "cut/checkpoint-2"
    _, rest = run(checkpoint, tmp_path / "cut", resume_from=resume_from, **options)
    timed = {"step_s", "tokens_per_s", "peak_share"}
    for (found, _), (expected, _) in zip(rest, whole[2:], strict=True):
        assert {k: v for k, v in found.items() if k not in timed} == {
            k: v for k, v in expected.items() if k not in timed
        }
        assert math.isfinite(found["loss"])
    if options.get("intensity_cap") == "adaptive":
        caps = [metrics["intensity_cap"] for metrics, _ in whole]
        assert caps[0] == 5.0 and len(set(caps)) == len(caps)


def test_queries_that_reach_their_limit_are_counted(checkpoint, tmp_path):
    encoder = encoder_config(checkpoint, max_query_tokens=8)
    _, reports = run(checkpoint, tmp_path, encoder=encoder, max_steps=1)
    assert reports[0][0]["queries_at_limit"] == 4
    _, reports = run(checkpoint, tmp_path, max_steps=1)
    assert reports[0][0]["queries_at_limit"] == 0


def test_learning_rate_rises_then_falls_and_is_never_zero(checkpoint):
    settings = config(checkpoint, warmup_share=0.2, learning_rate=1.0)
    rates = [learning_rate_at(step, total_steps=10, config=settings) for step in range(10)]
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert learning_rate_at(0, total_steps=1, config=settings) == 1.0
    no_warmup = config(checkpoint, warmup_share=0.0, learning_rate=1.0)
    assert learning_rate_at(0, total_steps=4, config=no_warmup) == 1.0
