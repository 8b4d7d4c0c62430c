import math

import numpy as np
import pytest
import torch

from reasonembed.config import TaskBatch, TrainConfig, TrainRuntime
from reasonembed.errors import ConfigError
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.redapter import validate
from reasonembed.redapter.batches import samples_from_rows
from reasonembed.redapter.best import Best, Record, best_record
from reasonembed.redapter.loop import train
from reasonembed.redapter.validate import HeldOut, Validation, Validator, ndcg, read_held_out
from reasonembed.schemas import ARTIFACTS, from_rows, stable_hash
from tests.embedder.tiny import encoder_config
from tests.redapter import validate_worker
from tests.redapter.samples import sample_rows

CONFIG = TrainConfig.model_validate(
    {
        "encoder": {"model": "m"},
        "batch_queries": 3,
        "group_size": 4,
        "temperature": 0.1,
        "validate_every": 5,
        "validate_queries": 7,
    }
)
SHAPE = TaskBatch(batch_queries=CONFIG.batch_queries, group_size=CONFIG.group_size)
D = 8


class Words:
    """Gives each text its own token ids, in place of a tokenizer."""

    def tokenise(self, texts, *, role, instruction=""):
        return [tuple(map(ord, f"{instruction}{text}")) for text in texts]


def vector(ids):
    rng = np.random.default_rng(int(stable_hash(*ids), 16))
    made = rng.standard_normal(D)
    return made / np.linalg.norm(made)


def encode(sequences):
    return torch.tensor(np.array([vector(ids) for ids in sequences]), dtype=torch.float32)


def held_out(rows):
    found = samples_from_rows(rows)
    return [HeldOut(one, row["source_doc_id"]) for one, row in zip(found, rows, strict=True)]


def validator(rows):
    return Validator(held_out(rows), CONFIG, shape=lambda _: SHAPE, tokenizer=Words())


def figures(rows, **options):
    found = validator(rows).measure(encode, **({"batch_tokens": 300} | options))
    assert found.pop("held_out_s") > 0
    return found


def two_tasks():
    return sample_rows(task="a", count=5) + sample_rows(task="b", count=4, negatives=6)


@pytest.mark.parametrize("num_passages", [4, 40])
def test_ndcg_is_that_of_trec_eval(num_passages):
    rng = np.random.default_rng(num_passages)
    scores = rng.permutation(20 * num_passages).reshape(20, num_passages).astype(np.float32)
    relevant = rng.random((20, num_passages)) < 0.2
    relevant[:, 0] = True
    run = {f"q{q}": {f"d{d}": float(s) for d, s in enumerate(row)} for q, row in enumerate(scores)}
    qrels = {f"q{q}": {f"d{d}": 1 for d in np.flatnonzero(row)} for q, row in enumerate(relevant)}
    expected = evaluate_run(run, qrels).per_query
    found = ndcg(torch.tensor(scores), torch.tensor(relevant))
    assert found.tolist() == pytest.approx([expected[f"q{q}"]["ndcg@10"] for q in range(20)])


def test_what_must_not_be_found_earns_nothing():
    scores = torch.tensor([[-math.inf, 0.5, -math.inf]])
    assert ndcg(scores, torch.tensor([[True, False, False]])).item() == 0
    assert ndcg(scores, torch.tensor([[False, True, False]])).item() == 1


def reference(rows, groups):
    """The same figures, one query at a time, from the texts themselves."""
    run, qrels, losses, ranks = {}, {}, [], []
    order = sorted(rows, key=lambda row: (row["task"], stable_hash(row["query_id"])))
    for task in ("a", "b"):
        own = [row for row in order if row["task"] == task]
        corpus = {p.text_hash: p.text for row in own for p in groups[row["query_id"]]}
        corpus |= {p["text_hash"]: p["text"] for row in own for p in row["positives"]}
        texts = {key: vector(tuple(map(ord, text))) for key, text in corpus.items()}
        for place, row in enumerate(own):
            query = vector(tuple(map(ord, row["instruction"] + row["query"])))
            known = {p["text_hash"] for p in row["positives"]}
            run[row["query_id"]] = {key: float(query @ v) for key, v in texts.items()}
            qrels[row["query_id"]] = dict.fromkeys(known, 1)
            first = place // SHAPE.batch_queries * SHAPE.batch_queries
            batch = {
                p.text_hash
                for one in own[first : first + SHAPE.batch_queries]
                for p in groups[one["query_id"]]
            }
            chosen = groups[row["query_id"]][0].text_hash
            rivals = {key: query @ texts[key] for key in batch - known}
            best = query @ texts[chosen]
            total = sum(math.exp((s - best) / CONFIG.temperature) for s in rivals.values())
            losses.append(math.log1p(total))
            ranks.append(1 + sum(query @ v > best for k, v in texts.items() if k not in known))
    return {
        "held_out_loss": np.mean(losses),
        "held_out_ndcg@10": evaluate_run(run, qrels).mean["ndcg@10"],
        "held_out_positive_rank": np.mean(ranks),
    }


def test_figures_are_those_of_a_slow_reference():
    rows = two_tasks()
    groups = {
        one.sample.query_id: validate._group(one.sample, SHAPE.group_size, seed=CONFIG.seed)
        for one in held_out(rows)
    }
    assert figures(rows) == pytest.approx(reference(rows, groups), rel=1e-5)  # float32 scores


def test_the_order_of_rows_and_the_size_of_a_forward_change_nothing():
    rows = two_tasks()
    expected = figures(rows)
    assert figures(rows[::-1]) == expected
    assert figures(rows, batch_tokens=1) == pytest.approx(expected, rel=1e-6)


def test_workers_share_the_texts_and_agree(monkeypatch):
    rows, world_size = two_tasks(), 4
    expected, parts, forwards = figures(rows), [], []

    def counted(sequences):
        forwards[-1] += 1
        return encode(sequences)

    def part_of(rank):
        forwards.append(0)
        return validator(rows).measure(counted, batch_tokens=300, rank=rank, world_size=world_size)

    figures_of_first = []

    def broadcast(own, src):
        figures_of_first.append(own.clone())
        own.copy_(figures_of_first[src])

    monkeypatch.setattr(validate.dist, "broadcast", broadcast)
    monkeypatch.setattr(validate.dist, "all_reduce", lambda own: parts.append(own.clone()))
    for rank in range(world_size):
        part_of(rank)
    # Each vector comes from one worker alone, and none takes fewer forward passes than another.
    assert (sum((part != 0).any(dim=1).int() for part in parts) == 1).all()
    assert len(set(forwards)) == 1
    figures_of_first.clear()
    # Who adds up in another order must not come to another decision about the best weights.
    monkeypatch.setattr(
        validate.dist,
        "all_reduce",
        lambda own: own.copy_(sum(parts)).add_(1e-3 * len(figures_of_first)),
    )
    for rank in range(world_size):
        found = part_of(rank)
        assert {name: found[name] for name in expected} == expected
    assert not torch.equal(figures_of_first[0], figures_of_first[-1])


def test_packed_texts_are_cut_by_their_tokens():
    sizes = []

    def counted(sequences):
        lengths = [len(ids) for ids in sequences]
        sizes.append((sum(lengths), len(lengths) * max(lengths)))
        return encode(sequences)

    validator(two_tasks()).measure(counted, batch_tokens=300, is_packed=True)
    assert all(tokens <= 300 for tokens, _ in sizes)
    assert any(padded > 300 for _, padded in sizes)


def test_a_source_document_is_hidden_from_its_own_query_alone():
    rows = sample_rows(task="a", count=4)
    found = figures(rows)
    query = vector(tuple(map(ord, rows[0]["instruction"] + rows[0]["query"])))

    def closest(sequences):  # every positive of row 1 is exactly what query 0 asks for
        rivals = {tuple(map(ord, p["text"])) for p in rows[1]["positives"]}
        made = [query if ids in rivals else vector(ids) for ids in sequences]
        return torch.tensor(np.array(made), dtype=torch.float32)

    def rank(rows):
        return validator(rows).measure(closest, batch_tokens=300)["held_out_positive_rank"]

    hidden = [dict(row) for row in rows]
    hidden[0]["source_doc_id"] = rows[1]["positives"][0]["doc_id"]
    assert rank(hidden) == rank(rows) - 1 / 4  # one rival less for one query of four
    own = [dict(row) for row in rows]
    own[0]["source_doc_id"] = rows[0]["positives"][0]["doc_id"]
    assert figures(own) == found  # a source that is a positive is to be found


def tables(rows):
    return [from_rows(rows, ARTIFACTS["samples"].schema, where="test")]


def test_only_so_many_held_out_rows_are_read_whatever_their_order():
    rows = sample_rows(count=20)
    for row in rows[:15]:
        row["split"] = "held_out"
    found = read_held_out(tables(rows), CONFIG)
    ids = [one.sample.query_id for one in found]
    assert len(ids) == 7 and set(ids) <= {row["query_id"] for row in rows[:15]}
    again = read_held_out([*tables(rows[10:]), *tables(rows[:10][::-1])], CONFIG)
    assert again == found


def test_nothing_held_out_is_said_with_the_cure_and_only_where_it_is_asked_for():
    rows = tables(sample_rows())
    with pytest.raises(ConfigError, match=r"validate_every is 5.*assemble\.held_out_share"):
        read_held_out(rows, CONFIG)
    unasked = CONFIG.model_copy(update={"validate_every": None})
    assert read_held_out(rows, unasked) == []
    with pytest.raises(ValueError, match="keep 'best' needs validate_every"):
        TrainConfig.model_validate({"encoder": {"model": "m"}, "keep": "best"})


# ---- while training -----------------------------------------------------------------------------


class Course:
    """Steps and measurements of a run whose scores are given; notes what is done to its weights."""

    def __init__(self, folder, scores, *, every=2, is_fresh=True):
        self.steps, self.scores = 0, scores
        config = CONFIG.model_copy(update={"validate_every": every})
        best = Best(folder, self.write, is_fresh=is_fresh, rank=0)
        validation = Validation(config, total=len(scores) - 1, measure=self.measure, best=best)
        self.best, self.one_step = best, validation.around(self.take)

    def take(self, step):
        self.steps = step + 1
        return {"step": float(step)}

    def measure(self):
        return {"held_out_ndcg@10": self.scores[self.steps]}

    def write(self, target):
        target.mkdir()
        (target / "model").write_text(str(self.steps))

    def run(self, steps):
        return [self.one_step(step) for step in steps]


def kept(folder):
    return sorted(path.name for path in folder.glob("weights*"))


def test_measured_before_the_first_step_at_intervals_and_after_the_last(tmp_path):
    found = Course(tmp_path, [0.1, 0.2, 0.3, 0.9, 0.2, 0.25]).run(range(5))
    scores = [(row.get("held_out_start_ndcg@10"), row.get("held_out_ndcg@10")) for row in found]
    assert scores == [(0.1, None), (None, 0.3), (None, None), (None, 0.2), (None, 0.25)]


def test_the_best_weights_are_kept_through_a_restart(tmp_path):
    scores = [0.1, 0.0, 0.3, 0.0, 0.4, 0.0, 0.4]
    Course(tmp_path, scores).run(range(5))
    assert kept(tmp_path) == ["weights-4"]
    again = Course(tmp_path, scores, is_fresh=False)  # killed; goes on from an earlier checkpoint
    again.run(range(2, 6))
    assert (
        again.best.record == best_record(tmp_path) == Record(4, 0.4, folder="weights-4")
    )  # ties: the first
    for _ in range(2):
        again.best.place(tmp_path / "weights")
        assert (tmp_path / "weights" / "model").read_text() == "4"
    assert kept(tmp_path) == ["weights", "weights-4"]
    anew = Course(tmp_path, [0.0, 0.1, 0.2, 0.1, 0.05])
    anew.run(range(4))
    assert best_record(tmp_path) == Record(2, 0.2, folder="weights-2")


def test_killed_between_weights_and_their_record_the_old_ones_stay(tmp_path):
    course = Course(tmp_path, [0.1, 0.2, 0.3, 0.4, 0.5])
    course.run(range(2))

    def killed(target):
        course_write(target)
        raise KeyboardInterrupt

    course_write, course.best._write = course.best._write, killed
    with pytest.raises(KeyboardInterrupt):
        course.run(range(2, 4))
    again = Course(tmp_path, course.scores, is_fresh=False)
    assert again.best.record == Record(2, 0.3, folder="weights-2")
    again.best.place(tmp_path / "weights")
    assert (tmp_path / "weights" / "model").read_text() == "2"


def test_better_weights_of_the_same_step_never_touch_those_that_are_recorded(tmp_path):
    (tmp_path / ".weights-1.partial").mkdir()  # killed while it was written
    Course(tmp_path, [0.0, 0.0, 0.3]).run(range(2))
    assert kept(tmp_path) == ["weights-2"] and not list(tmp_path.glob(".weights*"))

    def killed(target):
        assert not target.exists()
        raise KeyboardInterrupt

    for score, name in ((0.4, "weights-2-again"), (0.5, "weights-2")):
        course = Course(tmp_path, [0.0, 0.0, score], is_fresh=False)
        course.best._write = killed
        with pytest.raises(KeyboardInterrupt):
            course.run(range(2))
        assert kept(tmp_path) == [best_record(tmp_path).folder]
        course = Course(tmp_path, [0.0, 0.0, score], is_fresh=False)
        course.run(range(2))
        assert best_record(tmp_path) == Record(2, score, folder=name)
        assert kept(tmp_path) == [name]
    course.best.place(tmp_path / "weights")
    assert (tmp_path / "weights" / "model").read_text() == "2"


def test_a_trained_model_is_measured_and_its_best_weights_are_exported(checkpoint, tmp_path):
    rows = sample_rows(count=12)
    for row in rows[8:]:
        row["split"] = "held_out"
    config = TrainConfig.model_validate(
        {
            "encoder": encoder_config(checkpoint),
            "batch_queries": 4,
            "group_size": 3,
            "max_steps": 5,
            "learning_rate": 0.03,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.5},
            "validate_every": 2,
            "keep": "best",
        }
    )

    def run(**options):
        reports, observed = [], []
        train(
            config,
            samples_from_rows(rows),
            weights=checkpoint,
            runtime=TrainRuntime(threads=1),
            output_dir=tmp_path,
            report=lambda metrics, _: reports.append(metrics),
            observe=lambda step, groups, output: observed.append((step, len(groups))),
            **options,
        )
        return reports, observed

    reports, observed = run(held_out=read_held_out(tables(rows), config))
    assert observed == [(step, 4) for step in range(5)]
    scores = {int(m["step"]) + 1: m["held_out_ndcg@10"] for m in reports if "held_out_s" in m}
    assert list(scores) == [2, 4, 5]
    record = best_record(tmp_path)
    assert record.score == max(scores.values()) == scores[record.step]
    exported = (tmp_path / "weights" / "adapter_model.safetensors").read_bytes()
    best = tmp_path / f"weights-{record.step}" / "adapter_model.safetensors"
    assert exported == best.read_bytes()
    # Dropout of a step does not depend on whether one looked at held-out samples before.
    unseen = config.model_copy(update={"validate_every": None, "keep": "last"})
    config, looked = unseen, [m["query_loss"] for m in reports]
    assert [m["query_loss"] for m in run()[0]] == looked


@pytest.mark.slow
def test_workers_with_a_part_of_the_weights_each_measure_the_same(checkpoint, tmp_path):
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    torch.multiprocessing.spawn(validate_worker.in_group, args=(2, checkpoint, shared), nprocs=2)
    found = [torch.load(shared / f"{rank}.pt") for rank in range(2)]
    expected = validate_worker.run(checkpoint, alone)
    names = ["held_out_loss", "held_out_ndcg@10", "held_out_positive_rank"]
    for step in (1, 2):
        measured = [[rows[step][name] for name in names] for rows in found]
        assert measured[0] == measured[1]
        # Gradients are summed in another order.
        assert measured[0] == pytest.approx([expected[step][name] for name in names], rel=1e-4)
    assert best_record(shared).step == best_record(alone).step
    assert (shared / "weights" / "adapter_model.safetensors").is_file()
