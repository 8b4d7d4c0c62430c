"""What jobs do around the cluster, without one."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console

import ray
from ray_jobs.evaluate import _write_results
from ray_jobs.job import Job, _in_shards, quiet, session
from ray_jobs.metrics import pool_actors
from reasonembed.config import load
from reasonembed.corpus import CorpusStore
from reasonembed.errors import ConfigError, DriftError
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.evaluation.results import read_result
from reasonembed.evaluation.runs import read_run
from reasonembed.progress import Reporter
from reasonembed.run import Run
from reasonembed.shards import Shard, ShardRecords
from tests.ray.processes import ROOT
from tests.remixer.fakes import corpus_table
from tests.report.small_results import collection


def test_what_the_package_warns_of_is_said_and_nothing_else(tmp_path, capfd):
    with quiet(tmp_path / "ray.log") as console:
        console.print("said")
        logging.getLogger("reasonembed.evaluation.folders").warning("[2] of 3 are left out")
        logging.getLogger("reasonembed.evaluation.folders").info("no matter")
        logging.getLogger("elsewhere").warning("noise")
    logging.getLogger("reasonembed.evaluation.folders").warning("later")
    assert capfd.readouterr().out.splitlines() == ["said", "[2] of 3 are left out"]


def test_ids_with_blanks_cost_a_run_its_trec_file_and_nothing_else(tmp_path):
    given = collection("titles", queries=2, gold="A title")
    store = CorpusStore(corpus_table({"A title": "one", "Another": "two"}))
    config = SimpleNamespace(train=SimpleNamespace(seed=7))
    run = SimpleNamespace(
        dir=tmp_path,
        collection=given,
        config=config,
        instruction="",
        identity=lambda stage: {"stage": stage},
    )
    ranked = {id_: {"A title": 2.0, "Another": 1.0} for id_ in given.queries}
    (tmp_path / "evaluate").mkdir()
    measured = {"after": evaluate_run(ranked, given.qrels)}
    _write_results(
        SimpleNamespace(run=run),
        store,
        {"after": ranked},
        measured,
        place=tmp_path / "evaluate",
    )
    assert read_run(tmp_path / "evaluate" / "after.parquet") == ranked
    result = read_result(tmp_path / "evaluate" / "after")
    assert result.seed == 7 and "'A title'" in result.provenance["no_trec_file"]
    assert not (tmp_path / "evaluate" / "after.trec").exists()


def config_in(folder, *overrides):
    return load(ROOT / "configs/quickstart.yaml", overrides=[f"run_dir={folder}", *overrides])


def test_a_configuration_with_a_secret_is_never_written(tmp_path):
    secret = "generate.llm.model=sk-" + "a1" * 20
    with (
        pytest.raises(ConfigError, match=r"generate\.llm\.model looks like a secret"),
        session(config_in(tmp_path / "run", secret)),
    ):
        pass
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shard", [Shard(1, 2), Shard(1, 3)])
def test_a_shard_that_is_refused_leaves_no_trace(tmp_path, shard):
    run = Run(config_in(tmp_path / "run"))
    records = ShardRecords(run.artifact("queries").place)
    for index in (1, 2):
        records.begin(Shard(index, 2))
        records.end(Shard(index, 2))
    job = Job(run, Reporter(Console(file=io.StringIO())), shard=shard)
    with pytest.raises(DriftError), _in_shards(job, "generate"):
        raise DriftError("made with another configuration")
    assert records.missing() == []
    with pytest.raises(RuntimeError), _in_shards(job, "generate"):
        raise RuntimeError("an actor died")
    assert shard in records.missing()


def test_a_head_that_does_not_answer_is_no_end_of_progress(monkeypatch):
    def gone(**_):
        raise ray.exceptions.RaySystemError("GCS is down")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    context = SimpleNamespace(get_job_id=lambda: "01000000")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(ray._private.state, "actors", gone)
    assert pool_actors() == {}
