"""Indexes built from runs, collections and corpora: whole, killed, again, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from reasonembed.cli import app
from reasonembed.config import ServeConfig, load
from reasonembed.corpus import read_corpus
from reasonembed.embedder.contract import CONTRACT_FILE, resolve_contract
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.golden import write_golden
from reasonembed.errors import (
    ConfigError,
    CorpusError,
    DriftError,
    EvaluationError,
    StorageError,
    explain,
)
from reasonembed.evaluation.datasets import load_collection
from reasonembed.index.bm25 import BM25Index
from reasonembed.index.store import StoredIndex
from reasonembed.progress import Reporter
from reasonembed.run import Run
from reasonembed.serving import building
from reasonembed.serving.backend import open_model
from reasonembed.serving.building import build_here, build_index, index_config
from reasonembed.systems.local import LocalWork
from tests.embedder.tiny import encoder_config, save_checkpoint
from tests.ray.tiny_run import write_config, write_corpus

ROOT = Path(__file__).parents[2]
ENCODER = {"max_query_tokens": 48, "max_document_tokens": 48}
RUNTIME = {"embed": {"batch_rows": 4, "threads": 1}}
# The same text in another batch of float32 products.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """54 documents, of which 6 are copies of others, and 8 queries."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "data")
    rows = [{"query_id": "e0", "excluded_ids": ["d000", "d008"]}]
    (folder / "excluded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def out(tmp_path):
    return tmp_path / "indexes" / "tiny"


def quiet_work():
    return LocalWork(Reporter(Console(file=StringIO())))


def settings(source, out, *, checkpoint=None, overrides=None, system=None, **given):
    model = {} if checkpoint is None else {"model": str(checkpoint), "encoder": ENCODER}
    values = {"runtime": RUNTIME, **model, **given}
    return index_config(str(source), out=str(out), given=values, system=system, overrides=overrides)


def build(source, out, **given):
    return build_here(settings(source, out, **given), work=quiet_work())


class Idle(LocalWork):
    """Computes nothing, and fails where something is asked of it."""

    def __init__(self):
        super().__init__(Reporter(Console(file=StringIO())))

    def compute(self, planned, artifact, make, pool, **_):
        missing = artifact.missing(planned).num_rows
        assert not missing, f"{missing} texts would be embedded"
        return 0


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def leftovers(out):
    return sorted(file.name for file in out.parent.iterdir() if file.name != out.name)


def vectors_of(checkpoint, texts):
    return Embedder.load(encoder_config(checkpoint), threads=1).encode_documents(texts)


def test_a_collection_brings_documents_queries_and_gold(checkpoint, data, out):
    index = build(data, out, checkpoint=checkpoint)
    rows = sorted(read_corpus(str(data)).to_pylist(), key=lambda row: row["doc_id"])
    assert index.rows(["doc_id"]).column(0).to_pylist() == [row["doc_id"] for row in rows]
    texts = [row["text"] for row in rows]
    assert [one.text for one in index.documents(range(54))] == texts
    np.testing.assert_allclose(
        index.vectors_ND, vectors_of(checkpoint, texts), atol=TOLERANCE, rtol=0
    )
    [twin, source] = index.find(["twin000", "d000"])
    np.testing.assert_array_equal(index.vectors_ND[twin], index.vectors_ND[source])
    assert sorted(index.doc_ids(index.copies(["twin000"]))) == ["d000", "twin000"]
    collection = load_collection(str(data))
    assert {one.query_id: one.text for one in index.queries} == collection.queries
    assert {one.query_id: one.qrels for one in index.queries} == collection.qrels
    excluded = {one.query_id: set(one.excluded_ids) for one in index.queries if one.excluded_ids}
    assert excluded == {"e0": {"d000", "d008"}}
    assert index.about.instruction == collection.instruction and index.about.task == "generic"
    fresh = BM25Index(texts).search(["lists case"], k=9)
    np.testing.assert_array_equal(index.bm25(["lists case"], k=9), fresh)
    assert leftovers(out) == []


def test_a_corpus_file_brings_documents_alone(checkpoint, data, out):
    index = build(data / "corpus.jsonl", out, checkpoint=checkpoint, task="biology")
    assert (len(index), index.queries) == (54, ())
    assert index.about.task == "biology" and "Biology post" in index.about.instruction
    plain = build(data / "corpus.jsonl", out.with_name("plain"), checkpoint=checkpoint)
    assert (plain.about.task, plain.about.instruction) == ("generic", None)
    np.testing.assert_array_equal(plain.vectors_ND, index.vectors_ND)


def test_equal_texts_are_embedded_once(checkpoint, data, out, monkeypatch):
    seen = []
    plain = Embedder.encode_documents

    def noted(self, texts):
        seen.extend(texts)
        return plain(self, texts)

    monkeypatch.setattr(Embedder, "encode_documents", noted)
    build(data, out, checkpoint=checkpoint, bm25=None)
    assert len(seen) == len(set(seen)) == 48


def test_a_second_build_of_the_same_computes_nothing(checkpoint, data, out, monkeypatch):
    build(data, out, checkpoint=checkpoint)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    monkeypatch.setattr(building, "_write", None)
    again = build_index(settings(data, out, checkpoint=checkpoint), work=Idle())
    assert len(again) == 54
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    assert leftovers(out) == []


def test_how_it_is_made_is_no_part_of_it(checkpoint, data, out):
    build(data, out, checkpoint=checkpoint)
    other = settings(data, out, checkpoint=checkpoint, overrides=["runtime.embed.batch_rows=7"])
    build_index(other, work=Idle())


def test_another_index_in_the_same_place_is_an_error_that_names_the_fields(
    checkpoint, data, out, tmp_path
):
    assert build(data, out, checkpoint=checkpoint).about.model == "checkpoint"
    before = contents(out)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    (other / "tokenizer_config.json").write_text(
        json.dumps(json.loads((other / "tokenizer_config.json").read_text()) | {"x": 1})
    )
    shorter = {"overrides": ["encoder.max_document_tokens=32"]}
    for changes, fields in (
        ({"checkpoint": other}, ["encoder.model: made with 'checkpoint', now 'other'", "weights:"]),
        ({"checkpoint": checkpoint, **shorter}, ["encoder.max_document_tokens: made with 48"]),
        ({"checkpoint": checkpoint, "name": "b"}, ["name: made with 'tiny', now 'b'"]),
        ({"checkpoint": checkpoint, "overrides": ["bm25.k1=1.2"]}, ["bm25.k1: made with 0.9"]),
        ({"dense": False}, ["contract: made with"]),
    ):
        with pytest.raises(DriftError) as raised:
            build(data, out, **changes)
        assert all(field in str(raised.value) for field in fields), raised.value
        assert f"Choose another --out, or delete {out}" in str(raised.value)
    changed = shutil.copytree(data, tmp_path / "changed")
    with (changed / "corpus.jsonl").open("a") as stream:
        stream.write('{"_id": "new", "text": "one more"}\n')
    with pytest.raises(DriftError, match=r"source\.content: made with"):
        build(changed, out, checkpoint=checkpoint)
    assert contents(out) == before


def test_a_killed_build_goes_on_and_gives_the_identical_folder(checkpoint, data, out, tmp_path):
    whole = build(data, tmp_path / "whole" / "tiny", checkpoint=checkpoint).folder
    scratch = out.with_name(".tiny.building")
    command = ["index", "build", str(data), "--out", str(out), "--model", str(checkpoint)]
    for key, value in (*ENCODER.items(),):
        command += ["--set", f"encoder.{key}={value}"]
    command += ["--set", "runtime.embed.batch_rows=4", "--set", "runtime.embed.threads=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reasonembed.cli", *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    while num_commits(scratch) < 3:
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    committed = num_commits(scratch)
    assert 3 <= committed < 12
    (scratch / "index").mkdir(exist_ok=True)
    (scratch / "index" / "half.npy").write_bytes(b"of a build that was killed as it wrote")
    work = Counting()
    build_here(settings(data, out, checkpoint=checkpoint), work=work)
    assert work.computed == 48 - 4 * committed
    assert contents(out) == contents(whole)
    assert leftovers(out) == []


class Counting(LocalWork):
    def __init__(self):
        super().__init__(Reporter(Console(file=StringIO())))
        self.computed = 0

    def compute(self, *args, **kwargs):
        found = super().compute(*args, **kwargs)
        self.computed += found
        return found


def num_commits(scratch):
    return sum(1 for _ in scratch.glob("vectors/*/_commits/*.json"))


def test_two_builds_of_one_index_at_once(data, out):
    with (
        building.locked(out.with_name(".tiny.building")),
        pytest.raises(StorageError, match="in use by another driver"),
    ):
        build(data, out, dense=False)
    build(data, out, dense=False)


@pytest.fixture
def run(tmp_path, checkpoint):
    """A run with a corpus and an export, as far as an index looks at them."""
    folder = tmp_path / "of_run"
    folder.mkdir()
    shutil.copytree(checkpoint, folder / "checkpoint")
    made = Run(load(write_config(folder)))
    corpus = made.artifact("corpus")
    corpus.begin(made.identity("corpus"))
    corpus.commit("corpus-000000", read_corpus(made.config.corpus.source))
    corpus.finish({})
    save_export(made.model_dir)
    made.save_config()
    return made


def save_export(folder):
    save_checkpoint(folder)
    contract = resolve_contract(folder, encoder_config(folder))
    (folder / CONTRACT_FILE).write_text(json.dumps(contract.to_json()))
    embedder = Embedder(folder, contract)
    write_golden(embedder, ["why does a loop end"], instruction="find", directory=folder)
    return folder


def test_a_run_brings_its_corpus_its_model_and_its_vectors(run, out):
    index = build(run.dir, out)
    assert len(index) == 54 and len(index.queries) == 8
    assert index.about.instruction == run.instruction
    assert index.about.fingerprint == served_fingerprint(model=str(run.dir))
    assert leftovers(out) == []
    [vectors] = (run.dir / "embeddings").iterdir()
    assert vectors.name.startswith("model-")
    twice = build_index(settings(run.dir, out.with_name("twice")), work=Idle())  # none is computed
    np.testing.assert_array_equal(twice.vectors_ND, index.vectors_ND)


def test_a_runs_own_runtime_counts_unless_another_is_said(run):
    config = index_config(str(run.dir), out="x", given={})
    assert config.runtime == run.config.runtime
    changed = index_config(str(run.dir), out="x", given={}, overrides=["runtime.batch_tokens=99"])
    assert changed.runtime == run.config.runtime.model_copy(update={"batch_tokens": 99})


def test_a_run_that_is_not_finished(run, out):
    (run.model_dir / CONTRACT_FILE).unlink()
    with pytest.raises(ConfigError, match="has no exported model; finish the run, or name a model"):
        build(run.dir, out)
    for commit in (run.dir / "corpus" / "_commits").iterdir():  # a run's corpus has no other end
        commit.unlink()
    with pytest.raises(ConfigError, match="has no corpus yet"):
        build(run.dir, out, dense=False)
    assert not out.parent.exists()


def served_fingerprint(**config):
    return open_model(ServeConfig.model_validate(config), forwards=False).served.fingerprint


def test_the_fingerprint_is_the_services(checkpoint, data, out, tmp_path):
    export = save_export(tmp_path / "export")
    for number, given in enumerate(
        (
            {"model": str(checkpoint), "encoder": ENCODER},
            {"model": str(export)},
            {"model": "echo", "echo": {"dimension": 24}},
        )
    ):
        place = out.with_name(f"i{number}")
        config = index_config(str(data), out=str(place), given=given)
        index = build_here(config, work=quiet_work())
        served = {**given, "encoder": encoder_config(checkpoint)} if "encoder" in given else given
        assert index.about.fingerprint == served_fingerprint(**served), given


def test_echo_makes_the_vectors_that_it_serves(data, out):
    index = build(data, out, model="echo", echo={"dimension": 24})
    config = ServeConfig.model_validate({"model": "echo", "echo": {"dimension": 24}})
    model = open_model(config)
    document = index.documents([7])[0]
    prepared = model.preparer.prepare([building.EmbedItem(document.text)])
    np.testing.assert_array_equal(model.forward(prepared)[0], index.vectors_ND[7])


def test_a_system_brings_its_encoder_and_its_bm25(data, out, checkpoint, tmp_path):
    system = {
        "name": "both",
        "retrieve": {
            "kind": "hybrid",
            "parts": {
                "words": {"kind": "bm25", "k1": 1.5},
                "vectors": {"kind": "dense", "encoder": encoder_config(checkpoint).model_dump()},
            },
        },
    }
    file = tmp_path / "both.yaml"
    file.write_text(json.dumps(system))  # JSON is YAML
    index = build(data, out, system=str(file))
    assert index.about.kinds == ("dense", "bm25", "hybrid")
    assert index.about.model == "both"  # as a service calls it, without the path
    assert index.about.identity["bm25.k1"] == 1.5
    words = build(data, out.with_name("words"), system="bm25-query-side")
    assert words.about.kinds == ("bm25",)
    assert words.about.identity["bm25.variant"] == "query-side"
    assert (words.about.model, words.about.fingerprint) == ("", "")
    with pytest.raises(ConfigError, match="endpoint"):
        build(data, out, system="text-embedding-3-large")
    with pytest.raises(ConfigError, match="give one of them"):
        build(data, out, system="bm25", model="x")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "says of no model; name one with --model or --system, or .* --no-dense"),
        ({"dense": False, "bm25": None}, "neither vectors nor BM25"),
        ({"dense": False, "task": "astrology"}, "unknown task 'astrology'; there are: biology"),
        ({"dense": False, "name": "a/b"}, "name: "),
        ({"dense": False, "nmae": "b"}, "nmae: unknown key"),
        ({"encoder": {"model": "x"}}, "name the model"),
    ],
)
def test_what_is_refused_before_anything_is_made(data, out, given, said):
    with pytest.raises(ConfigError, match=said):
        build(data, out, **given)
    assert not out.parent.exists()


def test_names_that_do_not_fit_an_address(data, tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be called 'my index'.* --name"):
        build(data, tmp_path / "my index", dense=False)


def test_sources_that_cannot_be_read(out, tmp_path):
    with pytest.raises(CorpusError, match="no such file"):
        build(tmp_path / "nowhere.jsonl", out, dense=False)
    with pytest.raises(EvaluationError, match="queries of biology are not here"):
        build("bright:biology", out, dense=False, data_dir=str(tmp_path))
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"_id": "a", "text": "?"}\n')
    with pytest.raises(CorpusError, match=r"holds a word .* --no-bm25"):
        build(blank, out, dense=False)


def test_what_lies_there_is_left_alone(data, out):
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="exists and is no index; choose another --out"):
        build(data, out, dense=False)
    assert (out / "thesis.txt").read_text() == "years of work"


def test_the_command_line(data, out, tmp_path):
    def said(*arguments):
        done = CliRunner().invoke(app, ["index", *map(str, arguments)])
        return done.output if done.exception is None else explain(done.exception)[0]

    built = said("build", data, "--out", out, "--model", "echo", "--name", "tiny-1")
    assert "54 documents, 48 different texts" in built
    for line in ("index: tiny-1", "searched by: dense, bm25, hybrid", "model: echo, 64", "queries"):
        assert line in built, line
    assert "up to date" in said("build", data, "--out", out, "--model", "echo", "--name", "tiny-1")
    shown = said("show", out, "--verify")
    assert "bm25.k1: 0.9" in shown and "files hold what was written" in shown
    assert "the forms are faiss, qdrant, lance" in said("export", out, "--to", "x", "--out", "y")
    exported = said("export", out, "--to", "qdrant", "--out", tmp_path / "points.jsonl")
    assert exported.split() == [
        str(tmp_path / "points.jsonl"),
        str(tmp_path / "points.jsonl.collection.json"),
    ]
    data_file = out / "vectors.npy"
    data_file.write_bytes(data_file.read_bytes()[:-4] + b"oops")
    assert "holds other bytes than were written" in said("show", out, "--verify")
    assert "holds no index" in said("show", tmp_path)
    assert StoredIndex.load(out).about.name == "tiny-1"
