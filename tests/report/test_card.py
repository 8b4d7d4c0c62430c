import json
import re
import subprocess

import numpy as np
import pytest
import torch
import yaml

from reasonembed.embedder import Embedder, resolve_contract
from reasonembed.errors import ModelError
from reasonembed.redapter.export import export
from reasonembed.report import write_report
from reasonembed.report.card import _languages, _training, card, write_card
from reasonembed.report.facts import Facts
from tests.embedder.tiny import save_checkpoint
from tests.report.small_run import STAGES, Builder

LICENCE = "---\nlicense: apache-2.0\nbase_model: Qwen/Qwen3-4B\n---\n# A start\n"


def built(folder, base, *, stages=STAGES, pooling="auto", **settings):
    """A run with a model that stands alone, exported but not trained."""
    limits = {"max_query_tokens": 64, "max_document_tokens": 64, "pooling": pooling}
    train = {"encoder": {"model": str(base)} | limits, "batch_queries": 2, "lora": None}
    builder = Builder(folder, train=train, **settings).make(*stages)
    learnt = folder / "learnt"
    if not learnt.exists():
        from transformers import AutoModel

        model = AutoModel.from_pretrained(base)
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(learnt)
    contract = resolve_contract(base, builder.run.config.train.encoder)
    export(
        base, learnt, contract, output_dir=builder.run.model_dir,
        instruction=builder.run.instruction, golden_texts=["one", "two"],
    )  # fmt: skip
    return builder.run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("base"))
    (folder / "README.md").write_text(LICENCE)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    run = built(tmp_path_factory.mktemp("card"), base)
    run.save_config()
    write_report(run)
    return run


def parts(text):
    """Front matter, and the text of each section."""
    empty, matter, body = text.split("---\n", 2)
    assert empty == ""
    sections = re.split(r"^## (.*)\n", body, flags=re.MULTILINE)
    return yaml.safe_load(matter), dict(zip(sections[1::2], sections[2::2], strict=True))


def test_the_front_matter_is_what_the_hub_reads(run):
    hub = pytest.importorskip("huggingface_hub")
    text = (run.model_dir / "README.md").read_text(encoding="utf-8")
    matter, _ = parts(text)
    assert matter == {
        "license": "apache-2.0",
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": matter["tags"],
        "base_model": "Qwen/Qwen3-4B",  # the start's own base
    }
    data = hub.ModelCard(text).data
    assert data.base_model == "Qwen/Qwen3-4B" and "retrieval" in data.tags


def test_the_figures_are_the_run_s_own(run):
    _, said = parts((run.model_dir / "README.md").read_text(encoding="utf-8"))
    samples = run.artifact("samples").read().column("split").to_pylist()
    queries = run.artifact("queries").read().column("status").to_pylist().count("ok")
    descent = said["Training data"]
    assert "Corpus: `data` (task `generic`), 8 documents" in descent
    assert f"Queries: {queries}, written from" in descent
    assert "Language model `m`: writes, judges, rewrites" in descent
    assert "mined with `miner-model`" in descent
    assert f"Samples: {samples.count('train')} to train on, 0 held out" in descent
    assert "| steps | 4 |" in said["Training"]
    assert "| adapters | none: all weights were trained |" in said["Training"]
    settings = re.search(r"```yaml\n(.*?)```", said["Training"], re.DOTALL)[1]
    assert yaml.safe_load(settings)["batch_queries"] == 2

    found = run.directory("evaluate").finished()
    shown = dict(re.findall(r"^\| (.+?) \| ([\d.]+) \|", said["Evaluation"], re.MULTILINE))
    assert float(shown["After training"]) == pytest.approx(
        found["systems"]["after"]["ndcg@10"], abs=5e-5
    )
    assert shown.keys() == {"BM25", "Miner", "Backbone before training", "After training"}
    assert "3 queries; exact search by cosine" in said["Evaluation"]
    assert "95 % interval " in said["Evaluation"]
    assert "licence `apache-2.0`" in said["Base model and licence"]


def trained(folder, *, tasks=("generic",), is_rewritten=True, made=None, **settings):
    """The card's table of a training, by name."""
    samples = Builder(folder / "first").make(*STAGES[: STAGES.index("train")]).run
    row = samples.artifact("samples").read().to_pylist()[0]
    changes = {} if is_rewritten else {"rewritten_query": row["query"]}
    rows = [
        row | changes | {"query_id": f"q{place}", "task": task} for place, task in enumerate(tasks)
    ]
    held_out = row | {"query_id": "held out", "task": "pony", "split": "held_out"}
    train = {"encoder": {"model": "backbone-model"}} | settings
    builder = Builder(folder / "second", train=train)
    builder.commit("samples", [*rows, held_out])
    directory = builder.run.directory("train")
    directory.begin({})
    directory.finish(made or {"steps": 300, "step kept": 300})
    return dict(re.findall(r"^\| (.+?) \| (.+) \|$", _training(Facts(builder.run)), re.MULTILINE))


@pytest.mark.parametrize(
    ("tasks", "settings", "queries", "passages"),
    [
        (["biology", "earth_science"], {}, "64", "16"),
        (["leetcode"], {}, "512", "2"),
        (["leetcode"], {"task_batches": {}}, "64", "16"),
        (["leetcode", "biology"], {}, "64 of `biology`; 512 of `leetcode`", "16 of `biology`; 2"),
        (["leetcode", "biology"], {"small_tasks": "merge"}, "64", "16"),
    ],
)
def test_the_shape_of_a_step_is_that_of_the_run_s_tasks(
    tmp_path, tasks, settings, queries, passages
):
    said = trained(tmp_path, tasks=tasks, **settings)
    assert said["queries in a step"] == queries
    assert said["passages a query"].startswith(passages)


def test_intensity_is_named_where_it_weighed_something(tmp_path):
    weighted = "InfoNCE; samples with a rewritten query weigh by reasoning intensity from step 100"
    assert trained(tmp_path / "a")["objective"].startswith(weighted)
    few = trained(tmp_path / "b", made={"steps": 100, "step kept": 100})
    assert few["objective"] == "InfoNCE"
    assert trained(tmp_path / "c", is_rewritten=False)["objective"] == "InfoNCE"
    early = trained(tmp_path / "d", made={"steps": 300, "step kept": 50})
    assert early["objective"] == "InfoNCE"  # of the weights that were kept


def test_what_ended_the_training_and_what_was_kept_is_named(tmp_path):
    whole = trained(tmp_path / "a", epochs=2)
    assert whole["epochs"] == "2" and "step kept" not in whole
    best = {"keep": "best", "validate_every": 10, "max_steps": 300}
    cut = trained(tmp_path / "b", made={"steps": 300, "step kept": 120}, **best)
    assert cut["epochs"] == "not counted: the number of steps was given"
    assert cut["steps"] == "300"
    assert cut["step kept"] == "120, the best by held-out nDCG@10"


def test_a_language_is_named_where_it_is_known(tmp_path):
    def languages(folder, **settings):
        return _languages(Facts(Builder(folder, **settings).run))

    stdlib = {"corpus": {"source": "python-stdlib"}}
    assert languages(tmp_path / "a", **stdlib) == ["en"]
    assert languages(tmp_path / "b") == []
    imported = {"assemble": {"sources": [{"path": "samples.jsonl"}]}}
    assert languages(tmp_path / "c", **stdlib, **imported) == []


def test_what_was_not_measured_is_said(run):
    _, said = parts(card(Facts(run)))  # as after the export: nothing was searched yet
    assert said["Contamination"].strip() == "Not measured."
    _, measured = parts((run.model_dir / "README.md").read_text(encoding="utf-8"))
    assert "`data`, exact: " in measured["Contamination"]
    assert "`data`, 13-gram: nothing found" in measured["Contamination"]


def test_a_run_that_has_nothing_but_a_model(tmp_path, base):
    plain = save_checkpoint(tmp_path / "plain")
    stages = STAGES[: STAGES.index("evaluate")]
    run = built(tmp_path, plain, stages=stages)
    write_card(Facts(run))
    matter, said = parts((run.model_dir / "README.md").read_text(encoding="utf-8"))
    assert matter["license"] == "unknown" and "base_model" not in matter
    assert "it is unknown" in said["Base model and licence"]
    assert said["Evaluation"].strip() == "Not evaluated yet."


def test_imported_samples_name_their_sources_and_the_runs_behind_them(tmp_path, base, run):
    sources = [{"path": str(run.dir)}, {"path": "data/msmarco", "form": "msmarco-triples"}]
    stages = ("corpus", "train", "export")
    builder = Builder(tmp_path, assemble={"sources": sources})
    builder.commit("samples", run.artifact("samples").read())
    builder.make(*stages)
    lines = list(card_lines(builder.run))
    assert lines[0] == "- Samples were imported from `run` (form `run`)"
    assert "- Language model `m`: writes, judges, rewrites" in lines
    assert "- Samples were imported from `msmarco` (form `msmarco-triples`)" in lines
    assert not any(str(tmp_path) in line for line in lines)


def card_lines(run):
    from reasonembed.report.card import _descent

    return [f"- {line}" for line in _descent(Facts(run))]


def test_without_a_model_there_is_no_card_and_a_torn_contract_is_an_error(tmp_path):
    builder = Builder(tmp_path)
    assert write_card(Facts(builder.run)) is None
    builder.run.model_dir.mkdir(parents=True)
    (builder.run.model_dir / "contract.json").write_text("{")
    with pytest.raises(ModelError, match=r"cannot read .*contract\.json"):
        write_card(Facts(builder.run))


@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_the_examples_do_what_they_say(tmp_path, base, pooling):
    asked = {"collection": str(tmp_path / "data"), "instruction": 'find a "thing" that\'s {good}'}
    run = built(tmp_path, base, stages=("corpus",), pooling=pooling, evaluate=asked)
    write_card(Facts(run))
    _, said = parts((run.model_dir / "README.md").read_text(encoding="utf-8"))
    blocks = re.findall(r"```(\w+)\n(.*?)\n```", said["How to use it"], re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", "bash"]
    ours = Embedder.load_export(run.model_dir, device="cpu")
    queries = ours.encode_queries(["why is my loop slow?"], instruction=run.instruction)
    documents = ours.encode_documents(["Appending to a list takes constant time."])
    for _, block in blocks[:2]:
        names = {"print": lambda *_: None}
        exec(block.replace("path/to/this/folder", str(run.model_dir)), names)
        np.testing.assert_allclose(np.asarray(names["queries"]), queries, atol=1e-5)
        np.testing.assert_allclose(np.asarray(names["documents"]), documents, atol=1e-5)
    shell = blocks[2][1].partition("\n")[2].replace("curl", "printf '%s\\n'")
    sent = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True)
    body = json.loads(sent.stdout.partition("-d\n")[2])
    assert body["instruction"] == run.instruction
