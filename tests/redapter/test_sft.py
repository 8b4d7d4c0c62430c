import itertools
import math

import pytest
import torch
import torch.multiprocessing
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from reasonembed.config import TrainRuntime
from reasonembed.embedder.contract import load_tokenizer
from reasonembed.errors import ConfigError, DriftError, ModelError
from reasonembed.redapter import sft
from reasonembed.redapter.checkpoints import load_learnt
from reasonembed.redapter.sft import ChatTokenizer, Example, StepPlan, fine_tune, save_student
from tests.redapter import chat_student
from tests.redapter.chat_student import config, examples
from tests.redapter.saved import learnt

# Padding, chunks and workers change the order of float32 sums; measured about 1e-6 of the largest.
RELATIVE = 1e-5
TIMED = {"step_s", "tokens_per_s"}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return chat_student.save_student_checkpoint(tmp_path_factory.mktemp("student"))


def last_checkpoint(folder):
    return max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


def train(student, folder, *, resume_from=None, stop_after=None, **changes):
    reports = []

    def report(metrics, saved):
        reports.append((metrics, saved and saved.wait()))
        if len(reports) == stop_after:
            raise KeyboardInterrupt  # as a lost machine: nothing is tidied up

    result = fine_tune(
        config(**changes),
        examples(student),
        weights=student,
        runtime=TrainRuntime(checkpoint_every=2, chunk_tokens=60, threads=1),
        output_dir=folder,
        report=report,
        resume_from=resume_from,
    )
    return result, reports


@pytest.fixture(scope="module")
def finished(student, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return *train(student, folder), last_checkpoint(folder)


def model_of(folder):
    return sft._load(folder, dtype="float32").eval()


def slow_loss(model, batch):
    """One text after the other, one token after the other, no padding, no mask."""
    total = torch.zeros(())
    for example in batch:
        logits = model(input_ids=torch.tensor([example.ids])).logits[0]
        for place in range(len(example.ids) - example.num_answer, len(example.ids)):
            total = total - logits[place - 1].log_softmax(dim=-1)[example.ids[place]]
    return total


def test_prompt_and_answer_are_what_generation_sees_and_the_end_is_learnt(student):
    tokenizer = load_tokenizer(student)
    example = ChatTokenizer(student).example("why does a set", answer=" what follows")
    prompt = example.ids[: -example.num_answer]
    assert tokenizer.decode(prompt) == "<s>user: why does a set<|im_end|><s>assistant:"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why does a set"}], add_generation_prompt=True
    )
    assert list(prompt) == list(rendered["input_ids"])
    assert tokenizer.decode(example.ids[-example.num_answer :]) == " what follows<|im_end|>"


def test_a_model_without_chat_template_is_refused(checkpoint):
    with pytest.raises(ModelError, match="no chat template"):
        ChatTokenizer(checkpoint)


def test_loss_is_that_of_the_answers_tokens_alone(student):
    model, batch = model_of(student), examples(student)
    assert len({len(e.ids) for e in batch}) > 3 and len({e.num_answer for e in batch}) > 3
    with torch.no_grad():
        torch.testing.assert_close(
            sft.answer_loss(model, batch), slow_loss(model, batch), rtol=RELATIVE, atol=0
        )


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=RELATIVE, atol=0)
    for one, other in zip(found[1], expected[1], strict=True):
        assert (one - other).abs().max() <= RELATIVE * max(other.abs().max().item(), 1e-3)


def test_chunks_give_the_gradient_of_the_slow_mean_over_all_tokens(student):
    model, batch = model_of(student), examples(student)
    loss = slow_loss(model, batch) / sum(example.num_answer for example in batch)
    expected = loss.detach(), torch.autograd.grad(loss, list(model.parameters()))
    assert_same(chat_student.step(student), expected)
    assert_same(chat_student.step(student, chunk_tokens=60), expected)


def test_two_workers_sharded_or_not_give_the_loss_and_the_gradient_of_one(student, tmp_path):
    torch.multiprocessing.spawn(chat_student.run, args=(2, student, str(tmp_path)), nprocs=2)
    for texts in (9, 1):
        expected = chat_student.step(student, texts=texts)
        for rank, sharding in itertools.product(range(2), ("none", "fsdp")):
            found = torch.load(tmp_path / f"{rank}-{texts}-{sharding}.pt", weights_only=True)
            assert_same((found["loss"], found["gradients"]), expected)


@given(
    lengths=st.lists(st.integers(2, 60), min_size=1, max_size=40),
    batch_tokens=st.integers(1, 200),
    seed=st.integers(0, 9),
)
def test_every_epoch_holds_every_example_once_within_the_budget(lengths, batch_tokens, seed):
    texts = [Example((number,) * length, 1) for number, length in enumerate(lengths)]
    settings = config(batch_tokens=batch_tokens, seed=seed, epochs=3)
    plan, again = StepPlan(texts, settings), StepPlan(texts, settings)
    batches = [plan.batch(step) for step in range(plan.total_steps)]
    assert batches == [again.batch(step) for step in range(again.total_steps)]
    assert sorted(e.ids for batch in batches for e in batch) == sorted(3 * [e.ids for e in texts])
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(len(e.ids) for e in batch) <= batch_tokens


def test_epochs_and_seeds_shuffle_anew():
    texts = [Example((number,) * 5, 1) for number in range(32)]
    one, other = (StepPlan(texts, config(batch_tokens=20, seed=seed)) for seed in (0, 1))
    assert one.total_steps == 16
    assert one.batch(0) != one.batch(8)
    assert other.batch(0) != one.batch(0)


def test_nothing_to_learn_is_refused():
    with pytest.raises(ConfigError, match="min_agreement"):
        StepPlan([], config())


def test_every_step_is_reported_and_saved_on_time(finished):
    result, reports, checkpoint = finished
    assert [metrics["step"] for metrics, _ in reports] == list(range(result.steps))
    names = {"step", "loss", "learning_rate", "grad_norm", "answer_tokens", *TIMED}
    for number, (metrics, path) in enumerate(reports, start=1):
        assert set(metrics) == names and all(map(math.isfinite, metrics.values()))
        assert (path is not None) == (number % 2 == 0 or number == result.steps)
    assert checkpoint.name == f"checkpoint-{result.steps}"


@pytest.mark.parametrize("lora", [{"rank": 4, "alpha": 8, "dropout": 0.1}, None])
def test_an_interrupted_run_resumes_bit_for_bit(student, tmp_path, lora):
    _, whole = train(student, tmp_path / "whole", lora=lora)
    with pytest.raises(KeyboardInterrupt):
        train(student, tmp_path / "cut", stop_after=3, lora=lora)
    _, rest = train(student, tmp_path / "cut", resume_from=tmp_path / "cut/checkpoint-2", lora=lora)

    def untimed(reports):
        return [{k: v for k, v in metrics.items() if k not in TIMED} for metrics, _ in reports]

    assert untimed(rest) == untimed(whole[2:])
    last = f"checkpoint-{len(whole)}"
    resumed, uninterrupted = (learnt(tmp_path / run / last) for run in ("cut", "whole"))
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


def test_resuming_a_finished_run_does_nothing(student, tmp_path, finished):
    again, reports = train(student, tmp_path, resume_from=finished[2])
    assert reports == [] and again.steps == finished[0].steps and not any(tmp_path.iterdir())


def test_a_checkpoint_of_other_settings_is_refused(student, tmp_path, finished):
    with pytest.raises(DriftError, match="other settings or answers"):
        train(student, tmp_path, resume_from=finished[2], learning_rate=1e-3)


@pytest.mark.parametrize(
    "changes",
    [{}, {"lora": None, "learning_rate": 3e-3}, {"dtype": "bfloat16"}],
    ids=["lora", "all weights", "bfloat16"],
)
def test_what_is_saved_is_what_was_learnt_and_stands_alone(student, tmp_path, changes):
    _, reports = train(student, tmp_path / "sft", epochs=20, **changes)
    checkpoint = last_checkpoint(tmp_path / "sft")
    assert reports[-1][0]["loss"] < 0.5 * reports[0][0]["loss"]
    settings = config(epochs=20, **changes)
    for _ in range(2):  # a second time in the place of the first
        save_student(settings, checkpoint, weights=student, output_dir=tmp_path / "model")
    exact = settings.model_copy(update={"dtype": "float32"})
    placed = sft._prepare(exact, student, TrainRuntime()).placed
    load_learnt(checkpoint, placed)
    saved, batch = model_of(tmp_path / "model"), examples(student)
    with torch.no_grad():
        found, expected = (sft.answer_loss(m, batch) for m in (saved, placed.model.eval()))
    # 16 bits keep 8 bits of mantissa: 2^-9 of every weight.
    tolerance = 3e-2 if settings.dtype == "bfloat16" else 1e-4
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert {w.dtype for w in weights.values()} == {getattr(torch, settings.dtype)}
    assert ChatTokenizer(tmp_path / "model").example("a", answer="b") == ChatTokenizer(
        student
    ).example("a", answer="b")


def test_adapters_train_every_projection_and_nothing_else(finished):
    names = learnt(finished[2]).keys()
    assert all("lora_" in name for name in names)
    assert {name.split(".")[-4] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_a_loss_that_is_not_finite_stops_the_run(student, tmp_path):
    with pytest.raises(ModelError, match=r"step \d: loss .*lower distill\.learning_rate"):
        train(student, tmp_path, learning_rate=1e30, lora=None)


def test_learning_rate_rises_then_falls_and_is_never_zero():
    settings = config(warmup_share=0.2, learning_rate=1.0)
    rates = [sft.learning_rate_at(step, total_steps=10, config=settings) for step in range(10)]
    falling = [(1 + math.cos(math.pi * part / 8)) / 2 for part in range(8)]
    assert rates == pytest.approx([0.5, 1, *falling])
    assert min(rates) > 0
    assert sft.learning_rate_at(0, total_steps=1, config=settings) == 1.0
