"""Samples that were made elsewhere are counted, or planned as published, or refused."""

import gzip
import json
import random

import pytest

from reasonembed.errors import ConfigError
from reasonembed.planner import sources
from reasonembed.planner.inputs import read_inputs
from tests.planner.plans import config, plan


def with_sources(path, form, **more):
    source = json.dumps({"path": str(path), "form": form, **more})
    return config("msmarco-qwen3-8b", **{"assemble.sources": f"[{source}]"})


def planned(settings):
    return plan(settings, inputs=read_inputs(settings))


def test_ms_marco_that_is_not_here_is_planned_as_published():
    found = planned(config("msmarco-qwen3-8b"))
    assert found.stage("train").rows == 502_939 // 128
    # 19 H100-hours train all weights; LoRA with the gradient cache takes 2 2/3 passes of their 3.
    assert found.stage("train").device_hours == pytest.approx(19.2 * 8 / 9, rel=0.05)
    assert any("502,939 samples of data/msmarco" in one for one in found.assumptions)


def test_ms_marco_that_is_here_has_no_more_samples_than_lines(tmp_path):
    (tmp_path / "collection.tsv").write_text("")
    (tmp_path / "queries.train.tsv").write_text("")
    with gzip.open(tmp_path / "msmarco-hard-negatives.jsonl.gz", "wb") as file:
        file.write(b"{}\n" * 1_000)
    found, said = sources.read_sources(with_sources(tmp_path, "msmarco-hard-negatives"))
    assert found[0].rows == 1_000 and "at most" in said[0]


def test_lines_are_counted_by_task(tmp_path):
    passages = {"pos": ["one two"], "neg": ["three"] * 15}
    row = {"prompt": "", "query": "a query", "reasoning_query": "a query, thought over", **passages}
    for task, rows in (("biology", 640), ("pony", 160)):
        (tmp_path / f"{task}-formatted.jsonl").write_text(f"{json.dumps(row)}\n" * rows)
    settings = with_sources(tmp_path, "reasonembed")
    found, _ = sources.read_sources(settings)
    assert [(one.task, one.rows) for one in found] == [("biology", 640), ("pony", 160)]
    assert found[0].rewritten > found[0].query > 0
    assert planned(settings).stage("train").rows == 640 // 128 + 160 // 16  # pony's own shape


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_a_large_file_is_counted_by_its_beginning(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(sources, "_HEAD", 2**21)
    rng, file = random.Random(0), tmp_path / f"lines.jsonl{ending}"
    with gzip.open(file, "wb") if ending else file.open("wb") as out:
        out.writelines(b"%0200x\n" % rng.getrandbits(800) for _ in range(30_000))
    assert sources._lines(file) == pytest.approx(30_000, rel=0.15)  # a buffer is read ahead


@pytest.mark.parametrize("form", ["run", "parquet", "flagembedding"])
def test_samples_that_are_nowhere_are_refused(tmp_path, form):
    with pytest.raises(ConfigError, match="a plan counts the samples"):
        read_inputs(with_sources(tmp_path / "none", form))
