import re

import pytest

from tests.report.parsed_page import page_of
from tests.report.small_run import Builder


def test_the_verdict_is_the_scorecard_s(whole):
    text = page_of(whole).text
    card = whole.run.directory("evaluate").finished()
    figures = {name: f"{values['ndcg@10']:.4f}" for name, values in card["systems"].items()}
    assert figures["before"] != figures["after"]
    assert f"from {figures['before']} to {figures['after']}" in text
    assert f"BM25 {figures['bm25']}, the miner {figures['miner']}" in text
    assert "No difference that these queries can show" in text
    assert "Ranked better than the trained model, without any training: BM25" in text


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.2, "Training helped"), (-0.2, -0.01, "Training did harm"), (-0.1, 0.1, "No differ")],
)
def test_the_verdict_follows_the_interval(whole, low, high, said, monkeypatch):
    card = whole.run.directory("evaluate").finished()
    card["comparison"] |= {"low": low, "high": high}
    monkeypatch.setattr("reasonembed.artifacts.StageDirectory.finished", lambda self: card)
    assert said in page_of(whole).text


def test_a_failed_stage_is_seen(tmp_path):
    builder = Builder(tmp_path).make("corpus")
    with pytest.raises(RuntimeError), builder.run.timed("plan"):
        raise RuntimeError("stopped")
    page = page_of(builder)
    assert "✗ plan" in page.text and "1 of 12 stages are done, plan is next" in page.text


def test_runtime_does_not_change_the_fingerprint(tmp_path):
    def shown(name, **settings):
        text = page_of(Builder(tmp_path / name, **settings)).text
        return re.search(r"Configuration ([0-9a-f]{32})", text)[1]

    # Same corpus and collection names: only the fields under test differ.
    data = {"corpus": {"source": "python-stdlib"}, "evaluate": {"collection": "python-stdlib"}}
    assert shown("a", **data) == shown("b", runtime={"batch_tokens": 7}, **data)
    assert shown("c", **data) != shown("d", export={"golden_texts": 3}, **data)
