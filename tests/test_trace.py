import pytest
from typer.testing import CliRunner

from reasonembed.cli import app
from reasonembed.config import FilterConfig
from reasonembed.errors import ConfigError
from reasonembed.run import Run
from reasonembed.trace import trace_document, trace_query
from tests.report.small_run import Builder, llm


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    made = Builder(tmp_path_factory.mktemp("trace"))
    made.make(*(s for s in made.run.stages if s not in ("train", "export", "evaluate")))
    made.run.save_config()
    return made


def text(lines):
    return "\n".join(lines)


def test_a_sample_s_whole_descent(builder):
    sample = builder.run.artifact("samples").read().to_pylist()[0]
    said = text(trace_query(builder.run, sample["query_id"]))
    assert f"seed       document {sample['source_doc_id']} (generic)" in said
    assert sample["query"] in said
    assert "d0 [miner 1]: label 5, expected 5.25 - analysis plain" in said
    assert "not judged" in said
    assert "rewrite    ok (m, 2 tokens)" in said
    assert "sample     train, task generic" in said
    assert "positives: d0 (5.25)" in said


def test_votes_routes_tries_and_lost_candidates_are_told(tmp_path):
    builder = Builder(tmp_path).make("corpus", "plan", "generate", "mine")
    query_id = builder.usable()[0]["query_id"]
    row = builder.judgment(query_id, "d0", 4) | {"votes": [4, 3, 4], "route": "checked"}
    row |= {"quick_label": 3.5, **llm(tries=2)}
    lost = builder.judgment(query_id, "elsewhere", 1)
    builder.commit("judgments", [row, lost])
    said = text(trace_query(builder.run, query_id))
    assert "label 4, expected 4.25, votes 4 3 4, checked, quick label 3.50, 2 tries" in said
    assert "elsewhere [no candidate any more]: label 1" in said
    assert "sample     none" in said


def test_a_query_that_failed_ends_there(builder):
    failed = [q for q in builder.run.artifact("queries").read().to_pylist() if q["query"] is None]
    said = text(trace_query(builder.run, failed[0]["query_id"]))
    assert "filtered - 50% copied plain" in said or "filtered - 51% copied plain" in said
    assert "candidates none yet" in said


def test_an_unknown_query_and_document_are_refused(builder):
    with pytest.raises(ConfigError, match="planned no query 'q-x'"):
        list(trace_query(builder.run, "q-x"))
    with pytest.raises(ConfigError, match="no document 'nowhere'"):
        list(trace_document(builder.run, "nowhere"))


def test_a_document_the_other_way_round(builder):
    run = builder.run
    samples = run.artifact("samples").read().to_pylist()
    holders = [s["query_id"] for s in samples if "d0" in [p["doc_id"] for p in s["positives"]]]
    said = text(trace_document(run, "d0"))
    assert "seed       no: held out for evaluation" in said
    assert f"candidate  of {len(builder.usable())} queries" in said
    assert f"    1      {holders[0]} [miner 1]: label 5" in said
    assert f"positive   in {len(holders)} samples" in said
    assert ", ".join(sorted(holders)) in said
    assert "negative   in 0 samples" in said


def test_every_seed_and_its_queries_are_found(builder):
    seeds = builder.run.artifact("seeds").read().to_pylist()
    source = seeds[0]["source_doc_id"]
    said = text(trace_document(builder.run, source))
    for seed in seeds:
        assert (f"seed       of {seed['query_id']}" in said) == (seed["source_doc_id"] == source)


def test_why_a_document_is_no_seed(tmp_path):
    builder = Builder(tmp_path, plan={"min_chars": 16, "max_seeds_per_task": 1, "max_chars": 30})
    rows = {
        "d0": ("document gold plain", "g0"),
        "d1": ("short", "g1"),
        "d2": ("long " * 10, "g2"),
        "d3": ("document with a twin", "g3"),
        "d4": ("document with a twin", "g3"),
        "d5": ("document of another sort", "g5"),
        "d6": ("document without answer", "g6"),
        "d7": ("document that is too many", "g7"),
    }
    builder.commit(
        "corpus",
        [
            {
                "doc_id": doc_id,
                "text": words,
                "title": "",
                "task": "generic",
                "parent_id": None,
                "text_hash": group,
                "group_id": group,
            }
            for doc_id, (words, group) in rows.items()
        ],
    )
    config = FilterConfig.model_validate({"llm": {"model": "m", "engine": "scripted"}})
    run = Run(builder.run.config.model_copy(update={"filter": config}))
    builder.commit(
        "domains",
        [
            {"doc_id": d, "task": "generic", "probability": p, "status": "ok", **llm()}
            for d, p in (("d3", 0.9), ("d5", 0.1), ("d7", 0.9))
        ],
    )
    builder.commit("seeds", [_seed("d3")])

    def why(doc_id):
        return next(line for line in trace_document(run, doc_id) if line.startswith("seed"))

    assert why("d0") == "seed       no: held out for evaluation"
    assert why("d1").endswith("held out for evaluation")  # the evaluation names d0, d1 and d2
    assert why("d4") == "seed       no: exact duplicate"
    assert why("d5") == "seed       no: another domain (probability 0.10, needed 0.50)"
    assert why("d6") == "seed       no: the domain filter has no answer for it"
    assert why("d7") == "seed       no: over the cap of its task"
    assert why("d3") == "seed       of q-1"
    assert "equal text: d4" in text(trace_document(run, "d3"))


def _seed(doc_id):
    return {
        "query_id": "q-1",
        "source_doc_id": doc_id,
        "task": "generic",
        "min_words": 1,
        "max_words": 2,
        "education_level": "phd",
        "seed": 0,
    }


def test_samples_in_several_parts_are_all_looked_at(tmp_path):
    builder = Builder(tmp_path).make("corpus")
    artifact = builder.run.artifact("samples")
    artifact.begin({})
    held = {"text": "t", "label": None, "text_hash": "h"}
    rows = [
        {
            "query_id": f"q{i}",
            "task": "generic",
            "instruction": "",
            "query": "q",
            "rewritten_query": "r",
            "positives": [{"doc_id": f"d{i}", **held}, {"doc_id": "d7", **held}],
            "negatives": [{"doc_id": "d3", **held}] * (i % 2),
            "source_doc_id": None,
            "split": "held_out",
        }
        for i in range(6)
    ]
    for number in range(3):
        builder.commit("samples", rows[2 * number : 2 * number + 2], part=f"p{number}")
    said = text(trace_document(builder.run, "d3"))
    assert "positive   in 1 samples\n           q3" in said
    assert "negative   in 3 samples\n           q1, q3, q5" in said
    assert "seed       no: none planned" in said
    assert "sample     held_out" in text(trace_query(builder.run, "q4"))
    assert "d4 (no label), d7 (no label)" in text(trace_query(builder.run, "q4"))


def test_the_command_takes_one_of_the_two(builder):
    runner = CliRunner()
    run_dir = str(builder.run.dir)
    query_id = builder.usable()[0]["query_id"]
    assert "seed       document" in runner.invoke(app, ["trace", run_dir, query_id]).output
    shown = runner.invoke(app, ["trace", run_dir, "--from-doc", "d0"]).output
    assert "document   d0 (generic)" in shown
    for wrong in ([], [query_id, "--from-doc", "d0"]):
        error = runner.invoke(app, ["trace", run_dir, *wrong]).exception
        assert isinstance(error, ConfigError)
