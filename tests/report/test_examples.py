from reasonembed.schemas import ARTIFACTS
from tests.report.parsed_page import page_of
from tests.report.small_run import STAGES, Builder


def test_examples_do_not_depend_on_the_moment(whole):
    first, second = (page_of(whole).text.split("Examples")[2] for _ in range(2))
    assert first == second
    assert "Best positive d0, label 5.25" in first
    assert "Hardest negative (ranked first) d1, label 1.25" in first
    assert "thought plain" in first and "Rows that failed" in first


def test_no_sample_and_one_step(tmp_path):
    builder = Builder(tmp_path).make(*STAGES[:8])
    builder.commit("samples", ARTIFACTS["samples"].schema.empty_table(), inputs=["queries"])
    builder.run.directory("train").begin({})
    builder.log(0)
    text = page_of(builder).text
    assert "No query became a sample" in text and "1 steps" in text
    assert "cannot be drawn" not in text
