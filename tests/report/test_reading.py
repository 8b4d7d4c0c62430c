import pytest

from tests.report.parsed_page import page_of
from tests.report.small_run import Builder


def test_agreement_is_stated_plainly(whole):
    text = page_of(whole).text
    assert "grade (1 to 5), which makes the samples, is no better than guessing: AUC 0.50" in text
    assert "No gain can be credited" in text
    assert "No language model ran here" in text


@pytest.mark.parametrize(
    ("model", "said"),
    [("SmolLM2-135M-Instruct", "135 million parameters"), ("Qwen/Qwen3-32B", "hold for these")],
)
def test_reading_depends_on_the_models(tmp_path, model, said):
    assert said in page_of(Builder(tmp_path, engine="openai", model=model)).text
