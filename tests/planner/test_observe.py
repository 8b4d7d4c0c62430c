"""A run whose blocks were committed at known times is seen to have gone at known rates."""

import json
from dataclasses import replace

import pyarrow as pa
import pytest

from reasonembed.errors import StorageError
from reasonembed.lease import held
from reasonembed.planner.calibration import Calibration, Rates
from reasonembed.planner.formulae import Device
from reasonembed.planner.inputs import read_inputs
from reasonembed.planner.loads import Site, llm_key
from reasonembed.planner.observe import llm_block, observed
from reasonembed.planner.probe import probe_config, write_sample
from reasonembed.run import Run
from reasonembed.schemas import CORPUS, QUERIES
from tests.planner.plans import changed

CPU = Device("cpu", 1e11, 1e10, 1e10, is_gpu=False)
TRUE = Rates(0.0, 8e-12, 4e-11, 3e-11, 1e-3)
START_S = 17.0
BEGAN = 1_000_000.0


def corpus(run):
    rows = [
        {
            "doc_id": f"d{i:03d}", "text": f"{i} " + "some words of a text " * 30, "title": "",
            "task": "python-stdlib", "parent_id": None, "text_hash": f"h{i}", "group_id": f"g{i}",
        }
        for i in range(80)
    ]  # fmt: skip
    run.artifact("corpus").commit("p", pa.Table.from_pylist(rows, schema=CORPUS))


def query(i, tokens):
    return {
        "query_id": f"q{i}", "query": "why", "source_doc_id": f"d{i:03d}", "task": "python-stdlib",
        "status": "ok", "detail": None, "finish_reason": "stop", "prompt_tokens": 200 + i,
        "cached_tokens": 20, "completion_tokens": tokens, "tries": 1, "seed": 1, "model": "m",
    }  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    settings = changed("quickstart").model_copy(update={"run_dir": str(tmp_path / "run")})
    target = Run(settings)
    corpus(target)
    site = Site(settings, read_inputs(settings), CPU, Calibration("cpu").statistics)
    artifact, at = target.artifact("queries"), BEGAN + START_S
    for block in range(5):
        rows = [query(i, 20 + (i + block) % 30) for i in range(8 * block, 8 * block + 8)]
        at += TRUE.work_s(llm_block(site, settings.generate, rows))
        monkeypatch.setattr("reasonembed.artifacts.time.time_ns", lambda at=at: int(at * 1e9))
        artifact.commit(f"b{block}", pa.Table.from_pylist(rows, schema=QUERIES))
    monkeypatch.undo()
    note = {"stage": "generate", "started": BEGAN, "seconds": at + 2 - BEGAN, "outcome": "done"}
    (target.place / "timeline.jsonl").append(note | {"result": {}})
    return target, site


def test_rates_starts_and_answers_are_found(run):
    target, site = run
    known = observed(target, Calibration("cpu"), CPU, site.inputs)
    key = llm_key(target.config.generate, target.config.runtime.engine)
    work = [one for one in known.measurements if one.key == key and one.start_s is None]
    assert len(work) == 4  # between five commits
    started = [one for one in known.measurements if one.start_s is not None]
    assert [one.stage for one in started] == ["generate"]
    assert started[0].start_s == pytest.approx(START_S, abs=0.2)
    rest = [one for one in known.measurements if one.key == "cpu|generate"]
    assert rest[0].seconds == pytest.approx(2.0, abs=0.01)
    seen = known.seen[f"generate|{target.config.generate.llm.model}"]
    assert 1 / 45 < seen.ends < 1 / 25 and seen.again == 0
    block = replace(
        llm_block(site, target.config.generate, [query(i, 40) for i in range(16)]), key=key
    )
    assert known.rates(block, CPU).work_s(block) == pytest.approx(TRUE.work_s(block), rel=0.1)


def test_a_stage_that_was_run_twice_tells_nothing(run):
    target, site = run
    (target.place / "timeline.jsonl").append(target.timeline()[0] | {"outcome": "failed"})
    (target.place / "timeline.jsonl").append(target.timeline()[0])
    assert not observed(target, Calibration("cpu"), CPU, site.inputs).measurements


def test_stages_that_no_plan_has_tell_nothing(run):
    target, site = run
    note = {"stage": "distill", "started": BEGAN, "seconds": 9.0, "outcome": "done"}
    (target.place / "timeline.jsonl").append(note)
    assert observed(target, Calibration("cpu"), CPU, site.inputs).measurements


def test_blocks_that_were_merged_are_one_measurement(run):
    target, site = run
    assert target.artifact("queries").compact() > 0
    known = observed(target, Calibration("cpu"), CPU, site.inputs)
    (only,) = [one for one in known.measurements if one.kind == "llm"]
    assert only.rows == 40 and only.seconds == target.timeline()[0]["seconds"]


# ---- probe ----------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    docs = [{"_id": f"d{i}", "text": f"text {i} " * 40} for i in range(400)]
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, docs)))
    asked = [{"_id": f"e{i}", "text": f"question {i}"} for i in range(50)]
    (folder / "queries.jsonl").write_text("\n".join(map(json.dumps, asked)))
    lines = ["query-id\tcorpus-id\tscore", *(f"e{i}\td{7 * i}\t1" for i in range(50))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_sample_holds_the_gold_of_its_queries(source, tmp_path):
    settings = changed("quickstart", corpus__source=str(source), evaluate__collection=str(source))
    count = write_sample(settings, tmp_path / "sample", documents=80)
    assert 80 <= count <= 100
    small = changed(
        "quickstart",
        corpus__source=str(tmp_path / "sample"),
        evaluate__collection=str(tmp_path / "sample"),
    )
    found = read_inputs(small)
    assert found.documents == count and found.queries == 20
    ids = [json.loads(line)["_id"] for line in (tmp_path / "sample/corpus.jsonl").open()]
    assert {f"d{7 * i}" for i in range(1)} <= set(ids)
    Run(small).collection.check_against(set(ids))


def test_a_probe_has_the_settings_of_the_run_but_few_rows(source, tmp_path):
    settings = changed(
        "quickstart", corpus__source=str(source), evaluate__collection=str(source),
        runtime__cost__shape="aws-l4", runtime__cost__max_cost=3,
    )  # fmt: skip
    found = probe_config(settings, tmp_path / "sample", rows=24)
    assert found.run_dir == f"{settings.run_dir}-probe"
    assert found.generate.llm == settings.generate.llm
    assert found.generate.sampling == settings.generate.sampling
    assert found.runtime.generate.num_cpus == settings.runtime.generate.num_cpus
    assert found.runtime.generate.batch_rows == 4 and found.plan.max_seeds_per_task == 12
    assert found.train.max_steps == 6 and found.runtime.cost.max_cost is None
    assert (tmp_path / "sample" / "corpus.jsonl").is_file()


def test_a_probe_leaves_the_folder_of_another_one_alone(source, tmp_path):
    from ray_jobs.probe import probe

    settings = changed(
        "quickstart", corpus__source=str(source), evaluate__collection=str(source)
    ).model_copy(update={"run_dir": str(tmp_path / "run")})
    other = Run(probe_config(settings, tmp_path / "sample", rows=24))
    with held(other.place):
        (other.place / "mine").write(b"")
        with pytest.raises(StorageError, match="in use"):
            probe(settings, tmp_path / "again", rows=24)
    assert (other.place / "mine").read() == b""
