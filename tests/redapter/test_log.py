from types import SimpleNamespace

import torch

from reasonembed.redapter.log import SampleLog, TrainLog, summary


def test_a_step_taken_again_counts_once_and_a_torn_line_not_at_all(tmp_path):
    file = tmp_path / "log.jsonl"
    log = TrainLog(file)
    assert log.steps() == []
    for step, loss in ((0, 1.0), (1, 2.0), (2, 3.0)):
        log.append({"step": step, "loss": loss})
    with file.open("a") as stream:
        stream.write('{"step": 3, "lo')  # killed here
    assert [row["loss"] for row in log.steps()] == [1.0, 2.0, 3.0]
    log.append({"step": 1, "loss": 5.0})  # gone on from an earlier checkpoint
    expected = [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 5.0}, {"step": 2, "loss": 3.0}]
    assert log.steps() == expected == TrainLog(file).steps()


def test_a_log_is_not_read_twice_and_begins_anew_with_another_run(tmp_path):
    file = tmp_path / "log.jsonl"
    log = TrainLog(file)
    log.append({"step": 0})
    assert len(log.steps()) == 1
    before = file.read_bytes()
    file.write_bytes(b"x" * (len(before) - 1) + b"\n")  # what was read is not looked at again
    log.append({"step": 1})
    assert [row["step"] for row in log.steps()] == [0, 1]
    file.write_text('{"step": 9}\n')
    assert [row["step"] for row in log.steps()] == [9]


def test_each_sample_of_a_step_is_noted(tmp_path):
    groups = [
        SimpleNamespace(sample=SimpleNamespace(query_id=f"q{i}"), labels=(4.0, 1.0))
        for i in range(2)
    ]
    output = SimpleNamespace(
        losses_B=torch.tensor([0.5, float("nan")]),
        rewritten_losses_B=torch.tensor([0.25, 1.0]),
        intensity_B=torch.tensor([2.0, 1 / 3]),
    )
    log = SampleLog(tmp_path / "samples.jsonl")
    log.append(7, groups, output)
    assert log.steps() == [
        {
            "step": 7,
            "query_ids": ["q0", "q1"],
            "labels": [4.0, 4.0],
            "query_loss": [0.5, None],
            "rewritten_loss": [0.25, 1.0],
            "intensity": [2.0, 0.33333],
        }
    ]


def test_summary_says_what_the_step_noted():
    row = {
        "loss": 1.23456,
        "intensity_median": 1.5,
        "intensity_capped_share": 0.031,
        "positive_rank": 2.25,
        "tokens_per_s": 12_345.6,
        "peak_share": 0.37,
    }
    assert summary(row) == (
        "loss 1.235, intensity 1.50, 3% at the cap, positive rank 2.2, 12,346 tokens/s, 37% of peak"
    )
    assert summary({"loss": 1.0, "positive_rank": float("nan")}) == "loss 1.000"
    assert summary({}) == ""
