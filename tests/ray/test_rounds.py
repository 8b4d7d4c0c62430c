"""A run that grows, a second round of mining, other numbers of workers: what is computed again?"""

import json
import shutil

import pytest

from reasonembed.run import Run
from tests.ray.processes import reasonembed
from tests.ray.tiny_run import write_config

pytestmark = pytest.mark.slow


def requests_noted(folder):
    return [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]


def judged_pairs(judgments):
    return set(zip(judgments["query_id"].to_pylist(), judgments["doc_id"].to_pylist(), strict=True))


def finish(config, *arguments):
    done = reasonembed("run", str(config), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def add_documents(folder, *, number):
    file = folder / "data" / "corpus.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    new = [
        {"_id": f"new{i}", "title": "", "text": f"Added {i}: {rows[i]['text']} threads and files"}
        for i in range(number)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *new]))
    return {row["_id"] for row in new}


@pytest.mark.timeout(300)
def test_workers_blocks_and_shards_change_no_row(tiny, tmp_path):
    one = Run.existing(tiny[0] / "run")
    pool = {"batch_rows": 3, "num_cpus": 0.5, "max_actors": 2, "min_actors": 2}
    search = {"shard_documents": 7, "query_block": 5, "num_cpus": 0.5, "max_actors": 2}
    config = write_config(tmp_path, generate=pool, annotate=pool, rewrite=pool, mine=search)
    finish(config, "--to", "assemble")
    two = Run.existing(tmp_path / "run")
    for kind in ("corpus", "seeds", "queries", "candidates", "judgments", "rewrites", "samples"):
        assert two.artifact(kind).read().equals(one.artifact(kind).read()), kind


@pytest.fixture(scope="module")
def grown(tiny, tmp_path_factory):
    """A copy of the finished tiny run to which documents were added."""
    folder = tmp_path_factory.mktemp("grown")
    shutil.copytree(tiny[0] / "run", folder / "run")
    shutil.copytree(tiny[0] / "checkpoint", folder / "checkpoint")
    config = write_config(folder)
    before = Run.existing(folder / "run")
    old = {kind: before.artifact(kind).read() for kind in ("seeds", "candidates", "judgments")}
    new = add_documents(folder, number=6)
    refused = reasonembed("run", str(config), "--to", "assemble")
    printed = finish(config, "--grow", "--to", "assemble")
    return Run.existing(folder / "run"), folder, old, new, refused, printed


@pytest.mark.timeout(300)
def test_growth_must_be_asked_for(grown):
    refused = grown[4]
    assert refused.returncode == 2
    assert "source.content" in refused.stderr


def test_only_what_is_new_is_asked_of_an_llm(grown):
    run, folder, old, *_ = grown
    seeds = set(run.artifact("seeds").keys()) - set(old["seeds"]["query_id"].to_pylist())
    judged = judged_pairs(old["judgments"])
    for noted in requests_noted(folder):
        query_id, _, doc_id = noted["id"].partition("|")
        if doc_id and doc_id != "rewrite":
            assert (query_id, doc_id) not in judged
        else:
            assert query_id in seeds


def test_queries_whose_candidates_changed_are_mined_again(grown):
    run, _, old, new, *_ = grown
    now = {row["query_id"]: row["doc_ids"] for row in run.artifact("candidates").read().to_pylist()}
    then = {row["query_id"]: row["doc_ids"] for row in old["candidates"].to_pylist()}
    changed = [query_id for query_id, found in then.items() if now[query_id] != found]
    assert changed, "no added document came among the candidates"
    assert all(new & set(now[query_id]) for query_id in changed)
    again = sum(commit.rows for commit in run.artifact("candidates").commits()) - len(now)
    assert again == len(changed)
    pairs = {
        (query_id, doc_id)
        for query_id, found in now.items()
        for doc_id in found[: run.config.annotate.candidates_per_query]
    }
    assert pairs <= judged_pairs(run.artifact("judgments").read())


@pytest.mark.timeout(300)
def test_a_second_round_judges_new_pairs_only(tiny, tmp_path):
    folder, config, _ = tiny
    noted = len(requests_noted(folder))
    first = Run.existing(folder / "run")
    second_dir = tmp_path / "second"
    printed = finish(
        config,
        *("--set", f"run_dir={second_dir}", "--mine-with", str(first.dir), "--to", "assemble"),
    )
    second = Run.existing(second_dir)
    assert second.config.mine.encoder.model == str(first.model_dir)
    for kind in ("corpus", "seeds", "queries", "rewrites"):
        assert second.artifact(kind).read().equals(first.artifact(kind).read()), kind
    assert "queries with other candidates than before" in printed
    asked = {row["id"] for row in requests_noted(folder)[noted:]}
    judged = judged_pairs(first.artifact("judgments").read())
    assert not asked & {"|".join(pair) for pair in judged}
    assert first.artifact("candidates").read() != second.artifact("candidates").read()
