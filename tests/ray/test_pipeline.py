"""One finished run, looked at from all sides, and run again in all the ways users do."""

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor

import pyarrow.compute as pc
import pytest

from reasonembed.report.blame import blame
from reasonembed.run import STAGES, Run
from reasonembed.schemas import Status
from tests.ray.processes import reasonembed


@pytest.fixture(scope="module")
def run(tiny):
    return Run.existing(tiny[0] / "run")


def requests_noted(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def test_every_stage_says_what_it_gave(tiny):
    folder, _, printed = tiny
    stages = Run.existing(folder / "run").stages
    assert stages == tuple(stage for stage in STAGES if stage != "filter")
    for number, stage in enumerate(stages, start=1):
        assert f"[{number}/{len(stages)}] {stage}" in printed
    assert str(folder / "run" / "report.html") in printed
    assert "Traceback" not in printed and "INFO" not in printed


def test_every_planned_id_is_there_once(run):
    planned = run.artifact("seeds").keys()
    for kind in ("queries", "candidates", "rewrites"):
        assert run.artifact(kind).keys() == planned
    pairs = {
        f"{row['query_id']}\x1f{doc_id}"
        for row in run.artifact("candidates").read().to_pylist()
        for doc_id in row["doc_ids"][:4]
    }
    judged = run.artifact("judgments")
    assert judged.keys() == pairs
    assert sum(commit.rows for commit in judged.commits()) == len(pairs)


def test_no_candidate_is_the_source_or_its_twin(run):
    store = run.corpus_store()
    rows = run.artifact("candidates").read().to_pylist()
    assert any(row["num_excluded"] for row in rows)
    for row in rows:
        shut = store.group(row["source_doc_id"])
        assert shut not in {store.group(doc_id) for doc_id in row["doc_ids"]}
        assert len(row["doc_ids"]) == 6


def test_evaluation_documents_are_no_seeds(run):
    store = run.corpus_store()
    named = {store.group(doc_id) for doc_id in run.collection.named_documents()}
    sources = run.artifact("seeds").read().column("source_doc_id").to_pylist()
    assert not named & {store.group(doc_id) for doc_id in sources}


def test_scorecard_holds_all_systems(run):
    card = run.directory("evaluate").finished()
    assert list(card["systems"]) == ["bm25", "miner", "before", "after"]
    # The backbone is the miner here, so the untrained system must find exactly what it finds.
    assert card["systems"]["before"] == card["systems"]["miner"]
    assert card["systems"]["after"] != card["systems"]["before"]


def test_every_evaluated_query_knows_its_closest_training_samples(run):
    trained = run.artifact("samples").keys()
    for query_id in run.collection.queries:
        found = blame(run, query_id)
        assert found and {sample.query_id for sample in found} <= trained
        similarities = [sample.similarity for sample in found]
        assert similarities == sorted(similarities, reverse=True) and max(similarities) <= 1.001


def test_running_again_computes_nothing(tiny, run):
    folder, config, _ = tiny
    before = requests_noted(folder)
    made = {file: file.stat().st_mtime_ns for file in run.dir.rglob("_commits/*.json")}
    trained = (run.dir / "train" / "log.jsonl").read_bytes()
    done = reasonembed("run", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    assert requests_noted(folder) == before
    assert made == {file: file.stat().st_mtime_ns for file in run.dir.rglob("_commits/*.json")}
    assert trained == (run.dir / "train" / "log.jsonl").read_bytes()


def test_another_configuration_is_refused_by_field(tiny):
    _, config, _ = tiny
    done = reasonembed("run", str(config), "--set", "mine.top_k=5", "--from", "mine")
    assert done.returncode == 2
    assert "mine.top_k: made with 6, now 5" in done.stderr
    assert "Traceback" not in done.stderr


def test_where_it_runs_is_no_other_configuration(tiny):
    _, config, _ = tiny
    changes = ["runtime.annotate.batch_rows=7", "runtime.annotate.max_actors=2"]
    arguments = [part for change in changes for part in ("--set", change)]
    done = reasonembed("run", str(config), *arguments, "--from", "annotate", "--to", "annotate")
    assert done.returncode == 0, done.stderr


def test_status_stale_trace_and_report(tiny, run):
    _, config, _ = tiny
    shown = reasonembed("status", str(run.dir)).stdout
    assert re.search(r"annotate\s+│ done\s+│ 96\s", shown), shown
    assert "Nothing is stale" in reasonembed("why-stale", str(run.dir)).stdout
    changed = reasonembed(
        "why-stale", str(run.dir), "--config", str(config), "--set", "rewrite.keep_query=false"
    ).stdout
    assert "rewrite.keep_query: made with True, now False" in changed
    query_id = sorted(run.artifact("samples").keys())[0]
    traced = reasonembed("trace", str(run.dir), query_id).stdout
    for stage in ("seed ", "query ", "candidates ", "rewrite ", "sample "):
        assert f"\n{stage}" in f"\n{traced}"
    (run.dir / "report.html").unlink()
    assert reasonembed("report", str(run.dir)).returncode == 0
    assert (run.dir / "report.html").stat().st_size > 10_000
    unknown = reasonembed("trace", str(run.dir), "q-none")
    assert unknown.returncode == 2 and "q-none" in unknown.stderr


def test_failed_rows_stay_rows_and_are_retried(tiny, tmp_path):
    """The corpus of a copy gets failure marks; gate, report by status, then cure and retry."""
    folder, config, _ = tiny
    data = tmp_path / "data"
    shutil.copytree(folder / "data", data)
    corpus = (data / "corpus.jsonl").read_text().splitlines()
    marked = [
        line.replace("About", "SCRIPT-ERROR About", 1) if '"d00' in line else line
        for line in corpus
    ]
    (data / "corpus.jsonl").write_text("\n".join(marked) + "\n")
    run_dir = tmp_path / "run"
    changes = [f"run_dir={run_dir}", f"corpus.source={data}", "generate.max_failed_share=0.1"]
    base = ["run", str(config), *(part for change in changes for part in ("--set", change))]
    failed = reasonembed(*base, "--to", "generate")
    assert failed.returncode == 3
    assert "queries: " in failed.stderr and "scripted failure" in failed.stderr
    queries = Run.existing(run_dir).artifact("queries")
    assert queries.keys() == Run.existing(run_dir).artifact("seeds").keys()
    broken = queries.statuses()[Status.ERROR]
    assert broken > 2
    num_commits = len(queries.commits())
    again = reasonembed(*base, "--to", "generate", "--retry", "error")
    assert again.returncode == 3
    assert len(queries.commits()) > num_commits  # tried again, and as the mark stays, failed again
    assert queries.statuses()[Status.ERROR] == broken
    allowed = reasonembed(*base, "--set", "generate.max_failed_share=0.9", "--to", "embed")
    assert allowed.returncode == 0, allowed.stderr
    ok = queries.read().filter(pc.field("status") == "ok").num_rows
    assert f"query texts: {ok}" in allowed.stdout


def test_mistakes_are_answered_before_work_starts(tiny, tmp_path):
    _, config, _ = tiny
    (tmp_path / "file").write_text("")
    a, b, c = (f"run_dir={tmp_path / name}" for name in "abc")
    cases = {
        ("--set", "plan.min_chras=3"): (2, "plan.min_chras: unknown key"),
        ("--set", "train.temperature=-1"): (2, "train.temperature: "),
        ("--from", "minee"): (2, "no stage 'minee'"),
        ("--from", "train", "--to", "mine"): (2, "comes after"),
        ("--retry", "errors"): (2, "statuses are"),
        ("--set", a, "--set", "corpus.source=nowhere"): (1, "nowhere"),
        ("--set", f"run_dir={tmp_path / 'file' / 'run'}"): (2, "a part of this path is a file"),
        ("--set", b, "--set", "runtime.annotate.num_gpus=1"): (
            2,
            "runtime.annotate asks for 1 GPUs, this machine has 0",
        ),
        ("--set", c, "--set", "runtime.train.num_workers=8"): (
            2,
            "runtime.train asks for 4 CPUs and leaves nothing",
        ),
    }
    with ThreadPoolExecutor(2) as pool:  # most of the time is Python's start
        found = pool.map(lambda arguments: reasonembed("run", str(config), *arguments), cases)
        for done, (arguments, (code, message)) in zip(found, cases.items(), strict=True):
            assert done.returncode == code and message in done.stderr, (arguments, done.stderr)
