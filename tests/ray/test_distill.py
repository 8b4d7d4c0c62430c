"""A small annotator is taught end to end: scripted teacher, random student of kilobytes."""

import json

import pytest
import torch
import yaml

from ray_jobs import distill
from reasonembed.artifacts import Artifact
from reasonembed.config import load
from reasonembed.errors import ConfigError
from reasonembed.redapter import sft
from reasonembed.remixer.distill import held_out_queries, pairs_of
from reasonembed.run import Run
from reasonembed.schemas import CANDIDATES, QUERIES, from_rows
from tests.ray.processes import reasonembed
from tests.ray.tiny_run import write_config
from tests.redapter.chat_student import save_student_checkpoint
from tests.remixer.fakes import corpus_table

pytestmark = pytest.mark.slow


QUERIES_MADE, CANDIDATES_EACH = 12, 3


def write_mined_run(folder, *, runtime, **distill):
    """A run up to `mine`, written without any of its stages; and its configuration."""
    file = write_config(folder)
    settings = yaml.safe_load(file.read_text())
    settings["distill"] = {"batch_tokens": 12_000, "dtype": "float32"} | distill
    settings["runtime"] |= runtime
    file.write_text(yaml.safe_dump(settings))
    run = Run(load(file))
    documents = {f"d{i:03d}": f"About case {i} of keys in a mapping." for i in range(40)}
    corpus = run.artifact("corpus")
    corpus.begin({"made": "by hand"})
    corpus.commit("corpus", corpus_table(documents))
    queries = [
        {
            "query_id": f"q{i:02d}", "query": f"why does case {i} lose its keys?",
            "source_doc_id": f"d{i:03d}", "task": "generic", "status": "ok", "detail": None,
            "finish_reason": "stop", "prompt_tokens": 1, "cached_tokens": 0,
            "completion_tokens": 1, "tries": 1, "seed": 0, "model": "m",
        }
        for i in range(QUERIES_MADE)
    ]  # fmt: skip
    run.artifact("queries").begin({"made": "by hand"})
    run.artifact("queries").commit("queries", from_rows(queries, QUERIES, where="queries"))
    candidates = [
        {
            "query_id": row["query_id"], "source_doc_id": row["source_doc_id"], "task": "generic",
            "doc_ids": [f"d{20 + (i + k) % 20:03d}" for k in range(CANDIDATES_EACH)],
            "scores": [1.0] * CANDIDATES_EACH, "origins": [[]] * CANDIDATES_EACH,
            "num_excluded": 1, "source_rank": 1,
        }
        for i, row in enumerate(queries)
    ]  # fmt: skip
    table = from_rows(candidates, CANDIDATES, where="candidates")
    run.artifact("candidates").begin({"made": "by hand"})
    run.artifact("candidates").commit("candidates", table)
    return file, run


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    config, run = write_mined_run(
        folder,
        runtime={
            "distill": {"batch_rows": 32, "num_cpus": 0.5},
            "train": {"num_cpus": 0.5, "threads": 1, "chunk_tokens": 400},
        },
        llm={"model": "scripted", "engine": "scripted"},
        student=str(save_student_checkpoint(folder / "student")),
        held_out_share=0.3,
        learning_rate=1e-3,
        epochs=1,
        lora={"rank": 4, "alpha": 8, "dropout": 0.0},
    )
    done = reasonembed("distill", str(config))
    assert done.returncode == 0, done.stdout + done.stderr
    return config, run, done.stdout


def asked(run):
    return (run.dir.parent / "requests.jsonl").read_text().count("\n")


def held_out(run):
    sources = {f"q{i:02d}": f"d{i:03d}" for i in range(QUERIES_MADE)}
    return held_out_queries(sources, share=0.3, seed=42)


def test_every_pair_was_analysed_three_times(taught):
    _, run, _ = taught
    trajectories = run.artifact("trajectories").read()
    assert trajectories.num_rows == QUERIES_MADE * CANDIDATES_EACH * 3
    assert {len(rows) for rows in pairs_of(trajectories).values()} == {3}


def test_only_agreeing_answers_of_other_queries_were_learnt(taught):
    _, run, printed = taught
    learnt = Artifact.declared(run.annotator_dir.parent / "training", "trajectories").read()
    assert 0 < learnt.num_rows < QUERIES_MADE * CANDIDATES_EACH * 3
    for (query, _), rows in pairs_of(learnt).items():
        assert query not in held_out(run)
        assert len({row["relevance_label"] for row in rows}) == 1
    assert f"kept: {learnt.num_rows}" in printed and "held out: " in printed


def test_the_student_is_an_ordinary_checkpoint_that_has_moved(taught):
    _, run, _ = taught
    model = sft._load(run.annotator_dir, dtype="float32")
    before = sft._load(run.dir.parent / "student", dtype="float32")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.state_dict()[name], before.state_dict()[name])
    example = sft.ChatTokenizer(run.annotator_dir).example("why", answer="so")
    assert example == sft.ChatTokenizer(run.dir.parent / "student").example("why", answer="so")


def test_agreement_is_measured_on_the_held_out_pairs(taught):
    _, run, printed = taught
    found = json.loads((run.annotator_dir.parent / "agreement.json").read_text())
    assert found["pairs"] == len(held_out(run)) * CANDIDATES_EACH
    assert found["engines"] == {"teacher": "scripted", "student": "scripted"}
    agreement = found["agreement"]
    assert agreement["num_pairs"] == found["pairs"] - found["pairs without majority"]
    # Both are scripted and draw by other seeds: they agree by chance.
    assert 0 <= agreement["exact"] < 0.7
    assert f"exact: {round(agreement['exact'], 3)}" in printed
    assert found["student"]["cost"]["num_pairs"] == found["pairs"]


def test_the_students_settings_leave_the_teachers_answers_as_they_are(taught):
    _, run, _ = taught

    def identities(**changes):
        changed = run.config.distill.model_copy(update=changes)
        other = Run(run.config.model_copy(update={"distill": changed}))
        return other.identity("trajectories"), other.identity("annotator")

    teacher, student = identities()
    assert student == run.directory("annotator").stage().identity
    assert identities(max_failed_share=0.9) == (teacher, student)
    for change in (
        {"samples": 5}, {"epochs": 9}, {"lora": None}, {"max_pairs": 7}, {"min_agreement": 0.9},
        {"held_out_share": 0.4}, {"learning_rate": 1.0}, {"max_per_label": 3},
    ):  # fmt: skip
        found = identities(**change)
        assert found[0] == teacher and found[1] != student, change
    for change in ({"tries": 5}, {"seed": 5}, {"max_document_words": 5}):
        assert identities(**change)[0] != teacher, change


def test_again_computes_nothing(taught):
    config, run, _ = taught
    before, made = asked(run), run.annotator_dir.stat().st_mtime_ns
    assert reasonembed("distill", str(config)).returncode == 0
    assert (asked(run), run.annotator_dir.stat().st_mtime_ns) == (before, made)


def test_another_setting_is_refused_and_a_fresh_student_hears_the_same_answers(taught):
    config, run, _ = taught
    before, made = asked(run), run.annotator_dir.stat().st_mtime_ns
    change = ("--set", "distill.learning_rate=0.002")
    refused = reasonembed("distill", str(config), *change)
    assert refused.returncode == 2
    assert "distill.learning_rate: made with 0.001, now 0.002" in refused.stderr
    done = reasonembed("distill", str(config), *change, "--fresh")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run.annotator_dir.stat().st_mtime_ns != made
    # The teacher is not asked again; the student is, about the held-out pairs.
    assert asked(run) == before + len(held_out(run)) * CANDIDATES_EACH * 3


def test_without_the_section_or_candidates_it_is_refused(taught, tmp_path):
    config, run, _ = taught
    done = reasonembed("distill", str(config), "--set", "distill=null")
    assert done.returncode == 2 and "needs a section distill" in done.stderr
    with pytest.raises(ConfigError, match="run it up to the stage mine first"):
        distill._plan(run, run.distill_config(), known=["another query"])
