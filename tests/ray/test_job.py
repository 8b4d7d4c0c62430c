"""What jobs do around the cluster, without one."""

import logging
from types import SimpleNamespace

from ray_jobs.evaluate import _write_results
from ray_jobs.job import quiet
from reasonembed.corpus import CorpusStore
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.evaluation.results import read_result
from reasonembed.evaluation.runs import read_run
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
    _write_results(SimpleNamespace(run=run), store, {"after": ranked}, measured)
    assert read_run(tmp_path / "evaluate" / "after.parquet") == ranked
    result = read_result(tmp_path / "evaluate" / "after")
    assert result.seed == 7 and "'A title'" in result.provenance["no_trec_file"]
    assert not (tmp_path / "evaluate" / "after.trec").exists()
