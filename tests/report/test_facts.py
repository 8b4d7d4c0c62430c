import math

from reasonembed.report import write_report
from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder


def test_a_step_that_stands_twice_counts_as_its_later_line(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[:10])
    builder.log(3, loss=0.123456)
    builder.log(2, loss=math.nan, grad_norm=math.inf)
    markup = write_report(builder.run).read_text(encoding="utf-8")
    page = page_of(builder)
    assert "4 steps" in page.text and "3: 0.123456" in markup and "3: 2.7" not in markup
    assert "2: 2.8" not in markup


def test_torn_lines_cost_nothing_else(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[:10])
    for name in ("timeline.jsonl", "train/log.jsonl"):
        with (builder.run.dir / name).open("a") as stream:
            stream.write('{"stage": "exp')
    text = page_of(builder).text
    assert "10 of 12 stages are done" in text and "4 steps" in text


def test_odd_notes_are_shown_as_dashes(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan")
    with (builder.run.dir / "timeline.jsonl").open("a") as stream:
        stream.write('{"stage": "generate"}\n[1]\n{"seconds": NaN, "stage": "generate"}\n')
        stream.write('{"stage": "plan", "outcome": "done", "result": {"not a seed: x": "many"}}\n')
    assert "cannot be drawn" not in page_of(builder).text
