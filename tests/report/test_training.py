import json
import math
import re

import pytest

from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder


def trained(folder, *, steps=30, **changed):
    builder = Builder(folder).make(*STAGES[: STAGES.index("train")])
    directory = builder.run.directory("train")
    directory.begin({})
    for step in range(steps):
        course = math.exp(-step / 10)
        row = {
            "loss": 1 + 2 * course,
            "query_loss": 1.5 + course,
            "rewritten_loss": 1 + course,
            "intensity_min": 0.5,
            "intensity_median": 1 + course / 4,
            "intensity_max": 5.0,
            "intensity_capped_share": 0.1,
            "effective_batch_size": 1.8,
            "positive_rank": 1 + 3 * course,
            "grad_norm": 2.0 if step < 3 else 0.5,
        }
        builder.log(step, **row, **{name: values(step) for name, values in changed.items()})
    return builder


def section(page, start="Training", end="Evaluation"):
    return page.text.split(f" {start} ")[-1].split(f" {end} ")[0]


def note_samples(builder, *, steps=30, intensity=lambda step, place: 1.0, labels=(4.0, 5.0)):
    ids = [row["query_id"] for row in builder.run.artifact("samples").read().to_pylist()]
    with (builder.run.dir / "train" / "samples.jsonl").open("a") as stream:
        for step in range(steps):
            found = [intensity(step, place) for place in range(len(ids))]
            row = {
                "step": step,
                "query_ids": ids,
                "labels": [labels[place % len(labels)] for place in range(len(ids))],
                "query_loss": found,
                "rewritten_loss": found,
                "intensity": found,
            }
            stream.write(json.dumps(row) + "\n")


def test_every_curve_says_what_it_tells(tmp_path):
    text = section(page_of(trained(tmp_path)))
    for title in (
        "Loss What is minimised",
        "Loss l of the query and l′",
        "Mean rank of the positive in the batch",
        "Reasoning intensity of a step's queries median max min cap κ",
        "Share of queries at the cap",
        "Effective batch size 1/Σw²",
        "Gradient norm before clipping",
        "Learning rate",
        "Tokens a second",
    ):
        assert title.split(" What")[0] in text, title
    assert "3 of 30 steps were clipped" in text
    assert "100 in the median step" in text
    assert "from 2.8" in text and "at the first steps to 1.1" in text
    assert "Held-out" not in text and "peak" not in text and "skipped" not in text


def test_a_step_that_was_taken_again_is_drawn_once(tmp_path):
    builder = trained(tmp_path, steps=5)
    builder.log(4, loss=7.0)
    text = section(page_of(builder))
    assert text.lstrip().startswith("5 steps")


def test_held_out_curve_begins_before_training_and_marks_what_is_exported(tmp_path):
    scores = {9: 0.3, 19: 0.42, 29: 0.4}
    builder = trained(
        tmp_path,
        **{
            "held_out_ndcg@10": scores.get,
            "held_out_loss": lambda step: 2.0 if step in scores else None,
            "held_out_start_ndcg@10": lambda step: 0.2 if step == 0 else None,
        },
    )
    text = section(page_of(builder))
    assert "highest, 0.4200, after 20 steps." in text and "exported" not in text
    with builder.run.timed("train") as note:
        note["result"] = {"step kept": 20}
    page = page_of(builder)
    assert "highest, 0.4200, after 20 steps; exported: step 20." in section(page)
    assert "20: 0.42" in page.texts  # the mark itself
    assert "Held-out loss" in page.text


def test_share_of_the_peak_and_skipped_steps_where_there_are_any(tmp_path):
    builder = trained(tmp_path, peak_share=lambda _: 0.37, is_skipped=lambda step: float(step == 3))
    text = section(page_of(builder))
    assert "37% in the median step" in text
    assert "skipped: 1 step" in text


def test_intensity_by_task_length_and_label_early_and_late(tmp_path):
    builder = trained(tmp_path)
    note_samples(builder, intensity=lambda step, place: 3.0 if step < 15 else 1.5 + place % 2)
    page = page_of(builder)
    text = section(page)
    assert "intensity of 3.00 in the first third of the steps and of" in text
    assert "Reasoning intensity by task" in text
    assert "Reasoning intensity by length of the query" in text
    assert "median is highest for label 5 (2.50) and lowest for label 4 (1.50)" in text
    described = [t for t in page.texts if t.startswith("Reasoning intensity by label")]
    assert any("label 4 first third of the steps: median 3" in t for t in described)


def with_tasks(builder, number):
    """Samples as many as tasks, in one step early and one step late."""
    row = builder.run.artifact("samples").read().to_pylist()[0]
    tasks = [f"task-{place:02}" for place in range(number)]
    rows = [row | {"query_id": f"q-{task}", "task": task} for task in tasks]
    builder.run.artifact("samples").discard()
    builder.commit("samples", rows)


def test_the_highest_and_the_lowest_task_are_of_all_and_what_is_not_drawn_is_counted(tmp_path):
    builder = trained(tmp_path)
    with_tasks(builder, 30)
    note_samples(builder, intensity=lambda step, place: 1.0 + place / 10)
    page = page_of(builder)
    text = section(page)
    assert "highest for task-29 (3.90) and lowest for task-00 (1.00)." in text
    assert "Drawn are the first 24 of 30 by name." in text
    (described,) = [t for t in page.texts if t.startswith("Reasoning intensity by task: ")]
    assert "task-23" in described and "task-24" not in described
    assert text.count("Drawn are") == 1  # the other charts have all


def test_a_group_that_was_not_seen_late_is_not_of_the_end(tmp_path):
    builder = trained(tmp_path)
    with_tasks(builder, 2)
    note_samples(builder, steps=30, intensity=lambda step, place: 2.0 + place)
    file = builder.run.dir / "train" / "samples.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[15:]:  # late: the first task alone, and no labels
        row |= {key: row[key][:1] for key in ("query_ids", "intensity")} | {"labels": [None]}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = section(page_of(builder))
    assert "At the end the median is 2.00." in text  # of the one task that was seen
    assert "At the start the median is highest for label 5 (3.00) and lowest for label 4" in text
    assert "At the end the median is highest" not in text


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps_and_lost_samples_do_no_harm(tmp_path, steps):
    builder = trained(tmp_path, steps=max(1, steps))
    note_samples(builder, steps=steps, labels=(None,))
    with (builder.run.dir / "train" / "samples.jsonl").open("a") as stream:
        row = {"step": 99, "query_ids": ["gone"], "labels": [None], "intensity": [None]}
        stream.write(json.dumps(row) + "\n")
    text = section(page_of(builder))
    assert "cannot be drawn" not in text
    assert "by label" not in text


def test_an_adaptive_cap_is_drawn_from_the_log(tmp_path):
    builder = trained(tmp_path, intensity_cap=lambda step: 2.0 + step)
    page_of(builder)
    markup = (builder.run.dir / "report.html").read_text(encoding="utf-8")
    chart = next(part for part in markup.split("<figure>") if "intensity of a step" in part)
    (marked,) = re.findall(r'points="([^"]*)" class="line mark"', chart)
    assert len(set(marked.split())) == 30
