"""Whole measurements with a model of kilobytes and a scripted LLM: made, stopped, made again."""

import json
import shutil
from dataclasses import replace
from importlib.metadata import version
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from reasonembed import models
from reasonembed.artifacts import Artifact
from reasonembed.config import RunRetriever, RuntimeConfig, SystemConfig
from reasonembed.corpus import CorpusStore
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.vectors import ENCODING_VERSION
from reasonembed.errors import (
    ConfigError,
    CorpusError,
    DriftError,
    EvaluationError,
    ModelError,
    QualityError,
)
from reasonembed.evaluation import protocols
from reasonembed.evaluation.datasets import load_collection
from reasonembed.evaluation.results import read_result
from reasonembed.evaluation.runs import read_run
from reasonembed.index.bm25 import ANALYSIS_VERSION
from reasonembed.llm import protocol as llm_protocol
from reasonembed.llm.scripted import FAIL_ERROR
from reasonembed.progress import Reporter
from reasonembed.systems import workspace as workspaces
from reasonembed.systems.local import LocalWork
from reasonembed.systems.measure import measure
from reasonembed.systems.retrieval import run_file
from reasonembed.systems.table import table_lines
from reasonembed.systems.workspace import Workspace
from tests.embedder.test_endpoint import embeddings
from tests.embedder.tiny import encoder_config, save_checkpoint
from tests.llm.chat_server import Reply, serving
from tests.ray.tiny_run import write_corpus

SINGLE = 1e-5  # runs are kept in single precision, which the sums are taken from
SCRIPTED = {"model": "scripted", "engine": "scripted"}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def data(tmp_path):
    folder = write_corpus(tmp_path / "data")
    rows = [{"query_id": "e0", "excluded_ids": ["d000", "d008", "twin000"]}]
    (folder / "excluded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def workspace(tmp_path):
    return Workspace(tmp_path / "results", runtime=small_blocks())


def small_blocks(**more):
    pools = {name: {"batch_rows": 4} for name in ("embed", "rewrite", "annotate")}
    return RuntimeConfig.model_validate(pools | more)


def dense(checkpoint, **more):
    encoder = encoder_config(checkpoint, query_template="{query}").model_dump()
    return SystemConfig.model_validate(
        {"name": "tiny", "retrieve": {"kind": "dense", "encoder": encoder}} | more
    )


def run_of(system, data, workspace, *, protocol="bright", work=None, **loading):
    (result,) = measure(
        system,
        [load_collection(str(data), **loading)],
        protocols.get(protocol),
        workspace=workspace,
        work=work or quiet_work(),
    )
    return result


def quiet_work(**settings):
    return LocalWork(Reporter(Console(file=StringIO())), **settings)


def whole_corpus(workspace, data):
    corpus = workspace.corpus(load_collection(str(data)))
    return CorpusStore(corpus.artifact.read())


def ranking(workspace, name="tiny", *, protocol="bright"):
    return read_run(workspace.results / protocol / "data" / name / "run.parquet")


def forbid_everything(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model or an index was touched")

    for name in (
        "reasonembed.systems.encoding.OpenEmbedder.load",
        "reasonembed.llm.protocol.WithEngine.load",
        "reasonembed.systems.encoding.resolve_contract",
        "reasonembed.systems.retrieval.BM25Index",
        "reasonembed.systems.retrieval.dense_run",
        "reasonembed.systems.retrieval.read_vectors",
        "reasonembed.systems.reranking.Annotator",
        "reasonembed.models._hash",
    ):
        monkeypatch.setattr(name, refuse)


def as_made(result):
    """A result without who took the figures last, and when."""
    made = {key: one for key, one in result.provenance.items() if key != "measured"}
    return replace(result, provenance=made)


def test_a_dense_system_from_nothing(checkpoint, data, workspace):
    result = run_of(dense(checkpoint), data, workspace)
    folder = workspace.results / "bright" / "data" / "tiny"
    assert read_result(folder) == result
    assert result.headline == "ndcg@10" and result.protocol == "bright"
    assert set(result.metrics.per_query) == {f"e{i}" for i in range(8)}
    assert result.provenance["corpus"] and result.provenance["system"]["name"] == "tiny"
    run = ranking(workspace)
    assert not {"d000", "d008", "twin000"} & run["e0"].keys()
    assert len(run["e0"]) == 54 - 3 and len(run["e1"]) == 54
    for i in range(1, 6):  # equal texts share a vector, so they tie to the last bit
        assert run["e1"][f"d00{i}"] == run["e1"][f"twin00{i}"]
    assert read_run(folder / "run.trec.gz") == run
    # By hand: the model's own vectors, in one go.
    embedder = Embedder.load(dense(checkpoint).retrieve.encoder)
    collection = load_collection(str(data))
    store = whole_corpus(workspace, data)
    documents = embedder.encode_documents(store.texts(["d040", "d013"]))
    query = embedder.encode_queries([collection.queries["e3"]])[0]
    assert [run["e3"]["d040"], run["e3"]["d013"]] == pytest.approx(documents @ query, abs=1e-5)


def test_measuring_again_touches_neither_model_nor_index(
    checkpoint, data, workspace, monkeypatch, tmp_path
):
    # As files of gigabytes: hashed once, whatever process asks.
    monkeypatch.setattr("reasonembed.models._REMEMBERED_BYTES", 0)
    monkeypatch.setenv("REASONEMBED_CACHE", str(tmp_path / "cache"))
    models._hash_files.cache_clear()
    rewrite, rerank = {"llm": SCRIPTED}, {"annotate": {"llm": SCRIPTED}, "top": 3}
    systems = [dense(checkpoint, rewrite=rewrite, rerank=rerank), bm25(), hybrid(checkpoint)]
    before = [run_of(system, data, workspace) for system in systems]
    forbid_everything(monkeypatch)
    models._hash_files.cache_clear()
    again = [run_of(system, data, Workspace(workspace.results)) for system in systems]
    assert list(map(as_made, again)) == list(map(as_made, before))
    measured = again[0].provenance["measured"]
    assert measured.keys() == {"reasonembed", "commit", "pytrec-eval-terrier", "time"}
    assert measured["pytrec-eval-terrier"] == version("pytrec-eval-terrier")


def test_a_result_can_be_looked_at_where_its_weights_are_gone(
    checkpoint, data, workspace, tmp_path
):
    moved = tmp_path / "elsewhere"
    shutil.copytree(checkpoint, moved)
    before = run_of(dense(moved), data, workspace)
    shutil.rmtree(moved)
    after = run_of(dense(moved), data, Workspace(workspace.results))
    assert as_made(after) == as_made(before)


def bm25(**more):
    return SystemConfig.model_validate({"name": "words", "retrieve": {"kind": "bm25"}} | more)


def hybrid(checkpoint, fusion="rrf"):
    parts = {"bm25": {"kind": "bm25"}, "dense": dense(checkpoint).retrieve.model_dump()}
    retrieve = {"kind": "hybrid", "fusion": fusion, "parts": parts}
    return SystemConfig.model_validate({"name": "both", "retrieve": retrieve})


class Stopped(Exception):
    """As a kill would, between two commits."""


def noted(monkeypatch, *, stop_after=None):
    """Every text that was embedded; raises once so many blocks were."""
    texts, blocks = [], []
    for name in ("encode_documents", "encode_queries"):
        real = getattr(Embedder, name)

        def encode(self, given, *, _real=real, **more):
            if stop_after is not None and len(blocks) == stop_after:
                raise Stopped
            blocks.append(len(given))
            texts.extend(given)
            return _real(self, given, **more)

        monkeypatch.setattr(Embedder, name, encode)
    return texts


def test_what_was_stopped_goes_on_and_computes_nothing_twice(
    checkpoint, data, workspace, monkeypatch
):
    with monkeypatch.context() as patch:
        first = noted(patch, stop_after=5)
        with pytest.raises(Stopped):
            run_of(dense(checkpoint), data, workspace)
    assert len(first) == 20
    with monkeypatch.context() as patch:
        second = noted(patch)
        result = run_of(dense(checkpoint), data, Workspace(workspace.results))
    assert len(first + second) == len(set(first + second)) == 48 + 8  # equal texts once
    whole = Workspace(workspace.results.with_name("whole"))
    other = run_of(dense(checkpoint), data, whole)
    assert result.metrics == other.metrics


def test_collections_and_protocols_share_vectors(checkpoint, data, workspace, monkeypatch):
    run_of(dense(checkpoint), data, workspace)
    other = data.with_name("more")
    shutil.copytree(data, other)
    with (other / "queries.jsonl").open("a") as lines:
        lines.write(json.dumps({"_id": "new", "text": "a question of its own"}) + "\n")
    with (other / "qrels" / "test.tsv").open("a") as lines:
        lines.write("new\td001\t1\n")
    texts = noted(monkeypatch)
    run_of(dense(checkpoint), other, workspace)
    run_of(dense(checkpoint), data, workspace, protocol="mteb-v1.1")
    assert texts == ["a question of its own"]


def test_one_model_is_loaded_for_several_collections(checkpoint, data, workspace, monkeypatch):
    loads, real = [], Embedder.load
    monkeypatch.setattr(Embedder, "load", lambda *a, **k: loads.append(a) or real(*a, **k))
    engines, engine = [], llm_protocol.WithEngine.load
    monkeypatch.setattr(
        llm_protocol.WithEngine, "load", lambda self: engines.append(self) or engine(self)
    )
    work, computed = quiet_work(), []
    compute = work.compute
    monkeypatch.setattr(work, "compute", lambda *a, **k: computed.append(k) or compute(*a, **k))
    other = write_corpus(data.with_name("more"), documents=56)
    collections = [load_collection(str(folder)) for folder in (data, other)]
    rerank = {"annotate": {"llm": SCRIPTED}, "top": 3}
    system = dense(checkpoint, rewrite={"llm": SCRIPTED}, rerank=rerank)
    results = measure(
        system,
        collections,
        protocols.get("bright"),
        workspace=workspace,
        work=work,
    )
    assert [result.collection for result in results] == ["data", "more"]
    assert (len(engines), len(loads)) == (2, 1)  # one thing is loaded at a time
    assert [one["label"] for one in computed] == [
        "rewrite queries",
        "embed (tiny)",
        "judge the top 3",
    ]
    # As when each is measured alone.
    alone = Workspace(workspace.results.with_name("alone"), runtime=workspace.runtime)
    for folder, result in zip((data, other), results, strict=True):
        found = run_of(system, folder, alone)
        assert found.metrics == result.metrics
        assert found.provenance["judged"] == result.provenance["judged"]


def test_a_corpus_that_changed_is_refused(checkpoint, data, workspace):
    run_of(dense(checkpoint), data, workspace)
    with (data / "corpus.jsonl").open("a") as lines:
        lines.write(json.dumps({"_id": "late", "text": "a late document"}) + "\n")
    with pytest.raises(DriftError, match=r"corpus\.content"):  # the finished result
        run_of(dense(checkpoint), data, Workspace(workspace.results))
    with pytest.raises(DriftError, match="was changed after it was searched"):  # the corpus
        run_of(bm25(), data, Workspace(workspace.results))


def test_a_corpus_that_is_gone_is_said(data, workspace):
    collection = load_collection(str(data))
    (data / "corpus.jsonl").unlink()
    bright = protocols.get("bright")
    with pytest.raises(CorpusError, match="data"):
        measure(bm25(), [collection], bright, workspace=workspace, work=quiet_work())
    assert not (workspace.results / "bright").exists()


def test_other_settings_under_one_name_are_refused_and_named(checkpoint, data, workspace):
    run_of(dense(checkpoint), data, workspace)
    longer = dense(checkpoint)
    encoder = longer.retrieve.encoder.model_copy(update={"max_document_tokens": 64})
    longer = longer.model_copy(
        update={"retrieve": longer.retrieve.model_copy(update={"encoder": encoder})}
    )
    with pytest.raises(DriftError, match=r"max_document_tokens: made with 48, now 64") as error:
        run_of(longer, data, workspace)
    assert "--fresh" not in str(error.value) and "--results" in str(error.value)


def test_other_judgments_are_refused(checkpoint, data, workspace):
    run_of(bm25(), data, workspace)
    with (data / "qrels" / "test.tsv").open("a") as lines:
        lines.write("e0\td001\t1\n")
    with pytest.raises(DriftError, match="collection: made with"):
        run_of(bm25(), data, workspace)


def test_top_then_remove_gives_fewer_documents(checkpoint, data, workspace):
    small = {"depth": 10, "keep": 10}
    for name in ("bright", "reasonembed"):
        measure(
            dense(checkpoint),
            [load_collection(str(data))],
            replace(protocols.get(name), **small),
            workspace=workspace,
            work=quiet_work(),
        )
    before, after = ranking(workspace), ranking(workspace, protocol="reasonembed")
    assert len(before["e0"]) == 10
    shut = {"d000", "d008", "twin000"}
    assert not shut & (before["e0"].keys() | after["e0"].keys())
    assert set(after["e0"]) <= set(before["e0"])
    assert {len(scores) for query_id, scores in after.items() if query_id != "e0"} == {10}


@pytest.mark.parametrize("fusion", ["rrf", "weighted"])
def test_a_hybrid_holds_what_its_parts_find(checkpoint, data, workspace, fusion):
    run_of(hybrid(checkpoint, fusion), data, workspace)
    run_of(dense(checkpoint), data, workspace)
    run_of(bm25(), data, workspace)
    run, parts = ranking(workspace, "both"), (ranking(workspace), ranking(workspace, "words"))
    for query_id, scores in run.items():
        assert set(scores) == set(parts[0][query_id]) | set(parts[1][query_id])
    by_hand = dict.fromkeys(run["e1"], 0.0)
    for part in parts:
        scores = part["e1"]
        low, high = min(scores.values()), max(scores.values())
        for doc_id, score in scores.items():
            place = 1 + sum(other > score for other in scores.values())
            by_hand[doc_id] += 1 / (60 + place) if fusion == "rrf" else (score - low) / (high - low)
    found = list(run["e1"].items())
    assert dict(found) == pytest.approx(by_hand, rel=SINGLE, abs=SINGLE)
    assert [score for _, score in found] == sorted(run["e1"].values(), reverse=True)


def test_rewritten_queries_are_searched_and_failures_stay(checkpoint, data, workspace):
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    rows[2]["text"] += f" {FAIL_ERROR}"
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = run_of(dense(checkpoint, name="plain"), data, workspace)
    system = dense(checkpoint, rewrite={"llm": SCRIPTED})
    result = run_of(system, data, workspace)
    assert result.provenance["rewrites_failed"] == 1
    runs = ranking(workspace), ranking(workspace, "plain")
    assert runs[0]["e2"] == runs[1]["e2"] and runs[0]["e1"] != runs[1]["e1"]
    assert plain.provenance["collection"] == result.provenance["collection"]


def test_an_llm_that_drops_half_its_answers_ends_the_measurement(checkpoint, data, workspace):
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["text"] += f" {FAIL_ERROR}"
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(QualityError, match="4 of 8 rows failed"):
        run_of(dense(checkpoint, rewrite={"llm": SCRIPTED}), data, workspace)


def test_reranking_orders_the_top_by_grade(checkpoint, data, workspace):
    plain = dense(checkpoint, name="plain")
    annotate = {"llm": SCRIPTED, "samples": 3}
    run_of(plain, data, workspace)
    result = run_of(dense(checkpoint, rerank={"annotate": annotate, "top": 6}), data, workspace)
    before, after = ranking(workspace, "plain"), ranking(workspace)
    rows = judgments(workspace)
    assert all(len(row["votes"]) == 3 for row in rows)
    grades = {(row["query_id"], row["doc_id"]): np.mean(row["votes"]) for row in rows}
    store = whole_corpus(workspace, data)
    assert result.provenance["judged"] == len(rows)
    for query_id, scores in after.items():
        top, order = list(before[query_id])[:6], list(scores)
        assert set(order[:6]) == set(top) and order[6:] == list(before[query_id])[6:]
        found = [grades[query_id, store.group_members(store.group(one))[0]] for one in order[:6]]
        assert found == sorted(found, reverse=True)


def judgments(workspace):
    (place,) = (workspace.results / "judgments" / "data").iterdir()
    return Artifact.declared(place, "judgments").read().to_pylist()


def test_another_system_asks_the_annotator_for_new_pairs_only(
    checkpoint, data, workspace, tmp_path
):
    log = tmp_path / "requests.jsonl"
    noting = Workspace(workspace.results, runtime=small_blocks(engine={"log_path": str(log)}))
    rerank = {"annotate": {"llm": SCRIPTED}, "top": 5}
    run_of(dense(checkpoint, rerank=rerank), data, noting)
    first = log.read_text().splitlines()
    run_of(bm25(rerank=rerank), data, noting)
    run_of(dense(checkpoint, rerank=rerank), data, noting, protocol="mteb-v1.1")
    asked = [json.loads(line)["id"] for line in log.read_text().splitlines()]
    assert 0 < len(first) < len(asked)
    assert len(asked) == len(set(asked)) == len(judgments(workspace))


def test_a_run_file_is_a_system(checkpoint, data, workspace, tmp_path):
    run_of(dense(checkpoint), data, workspace)
    file = workspace.results / "bright" / "data" / "tiny" / "run.trec.gz"
    system = SystemConfig.model_validate(
        {"name": "file", "retrieve": {"kind": "run", "path": str(file)}}
    )
    assert (
        run_of(system, data, workspace).metrics
        == run_of(dense(checkpoint), data, workspace).metrics
    )
    strange = tmp_path / "strange.trec"
    strange.write_text("e0 Q0 nowhere 1 0.5 x\n")
    system = SystemConfig.model_validate(
        {"name": "strange", "retrieve": {"kind": "run", "path": str(strange)}}
    )
    with pytest.raises(EvaluationError, match="1 documents of the run are not in data"):
        run_of(system, data, workspace)


def test_copies_of_gold_are_credited_beside_the_official_figure(data, workspace):
    with (data / "qrels" / "test.tsv").open("a") as lines:
        lines.write("e1\ttwin001\t1\n")
    result = run_of(bm25(), data, workspace)
    store = whole_corpus(workspace, data)
    assert store.group("d001") == store.group("twin001")
    assert result.credited.per_query["e0"] == result.metrics.per_query["e0"]
    assert result.credited.per_query["e1"] != result.metrics.per_query["e1"]


def test_an_endpoint_needs_an_address(data, workspace):
    retrieve = {"kind": "endpoint", "model": "m", "dimension": 3, "query_template": "{query}"}
    system = SystemConfig.model_validate({"name": "far", "retrieve": retrieve})
    with pytest.raises(ConfigError, match=r"set runtime\.endpoints\.far"):
        run_of(system, data, workspace)


def test_lengths_are_cut_by_the_protocol_and_no_further(checkpoint, data, workspace):
    wide = data.with_name("wide")
    shutil.copytree(checkpoint, wide)
    settings = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 1024}))
    encoder = dense(wide).retrieve.encoder.model_copy(update={"max_document_tokens": 600})
    retrieve = {"kind": "dense", "encoder": encoder.model_dump()}
    system = SystemConfig.model_validate({"name": "long", "retrieve": retrieve})
    collection = replace(load_collection(str(data)), name="r2med/data", benchmark="r2med")
    for protocol in ("bright", "reasonembed"):
        measure(
            system,
            [collection],
            protocols.get(protocol),
            workspace=workspace,
            work=quiet_work(),
        )
    found = {
        (identity["encoder.max_query_tokens"], identity["encoder.max_document_tokens"])
        for place in (workspace.results / "vectors").iterdir()
        for identity in [json.loads((place / "_stage.json").read_text())["identity"]]
    }
    assert found == {(48, 600), (48, 512)}


def test_parts_are_searched_like_the_whole(checkpoint, data, workspace):
    whole = run_of(dense(checkpoint), data, workspace)
    parted = Workspace(
        workspace.results.with_name("parted"),
        runtime=small_blocks(
            mine={"shard_documents": 7}, vectors_dir=str(workspace.results / "vectors")
        ),
    )
    assert run_of(dense(checkpoint), data, parted).metrics == whole.metrics


def failing(data, *queries):
    """The queries get no answer of the scripted LLM."""
    rows = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    for number in queries:
        rows[number]["text"] += f" {FAIL_ERROR}"
    (data / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_answers_that_failed_are_asked_for_again_after_the_result(
    checkpoint, data, workspace, monkeypatch
):
    failing(data, 2)
    system = dense(checkpoint, rewrite={"llm": SCRIPTED})
    assert run_of(system, data, workspace).provenance["rewrites_failed"] == 1
    before = ranking(workspace)
    monkeypatch.setattr("reasonembed.llm.scripted.FAIL_ERROR", "no such mark")  # it answers now
    assert run_of(system, data, workspace).provenance["rewrites_failed"] == 1
    texts = noted(monkeypatch)
    work = quiet_work(retry=frozenset({"error"}))
    assert run_of(system, data, workspace, work=work).provenance["rewrites_failed"] == 0
    assert len(texts) == 1  # the new query alone
    after = ranking(workspace)
    assert after["e2"] != before["e2"] and after["e1"] == before["e1"]
    texts.clear()
    forbid_everything(monkeypatch)
    run_of(system, data, workspace, work=work)  # nothing is left to be asked for


def test_what_a_kill_left_is_no_result(checkpoint, data, workspace, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("reasonembed.systems.measure.write_excerpts", stop)
        with pytest.raises(Stopped):
            run_of(bm25(), data, workspace)
    assert (workspace.results / "bright" / "data" / "words" / "run.parquet").is_file()
    other = SystemConfig.model_validate({"name": "words", "retrieve": {"kind": "bm25", "k1": 2.0}})
    result = run_of(other, data, workspace)
    assert result.provenance["identity"]["retrieve.words.k1"] == 2.0


def test_what_stood_there_before_a_kill_is_no_result_either(data, workspace, monkeypatch):
    failing(data, 2)
    system = bm25(rewrite={"llm": SCRIPTED})
    run_of(system, data, workspace)
    folder = workspace.results / "bright" / "data" / "words"
    left = {"result.json", "run.parquet", "run.trec.gz", "excerpts.jsonl.gz", "_done.json"}
    assert {file.name for file in folder.iterdir()} == left | {"_stage.json"}
    monkeypatch.setattr("reasonembed.llm.scripted.FAIL_ERROR", "no such mark")
    monkeypatch.setattr("reasonembed.systems.measure.write_both", stop)
    with pytest.raises(Stopped):
        run_of(system, data, workspace, work=quiet_work(retry=frozenset({"error"})))
    assert [file.name for file in folder.iterdir()] == ["_stage.json"]


def test_collections_that_are_done_are_kept_where_another_fails(data, workspace):
    empty = write_corpus(data.with_name("empty"))
    rows = [json.loads(line) for line in (empty / "corpus.jsonl").read_text().splitlines()]
    rows = [row | {"title": "", "text": "..."} for row in rows]
    (empty / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    collections = [load_collection(str(folder)) for folder in (data, empty)]
    with pytest.raises(EvaluationError, match="empty: none of the 54 documents holds a word"):
        measure(
            bm25(),
            collections,
            protocols.get("bright"),
            workspace=workspace,
            work=quiet_work(),
        )
    assert read_result(workspace.results / "bright" / "data" / "words").system == "words"


def stop(*_, **__):
    raise Stopped


def test_a_corpus_is_read_once_for_all_systems(checkpoint, data, workspace, monkeypatch):
    other = write_corpus(data.with_name("more"))
    reads, read = [], workspaces.read_documents
    monkeypatch.setattr(
        workspaces, "read_documents", lambda corpus: reads.append(corpus) or read(corpus)
    )
    monkeypatch.setattr(Artifact, "read", refusing_texts(Artifact.read))
    collections = [load_collection(str(folder)) for folder in (data, other)]
    for system in (dense(checkpoint), dense(checkpoint, name="again")):
        measure(
            system, collections, protocols.get("bright"), workspace=workspace, work=quiet_work()
        )
    assert len(reads) == 2


def refusing_texts(read):
    """`Artifact.read` that gives a corpus whole but to the fingerprint, which is kept."""

    def checked(self, *, columns=None, only=None):
        assert self.finished() is None or "text" not in (columns or self.schema.names)
        return read(self, columns=columns, only=only)

    return checked


def test_indentation_makes_another_document_and_white_space_around_it_does_not(
    checkpoint, data, workspace
):
    rows = {"flat": "if x: y = 1", "deep": "if x:\n    y = 1", "same": "  if x: y = 1\n"}
    with (data / "corpus.jsonl").open("a") as lines:
        for id_, text in rows.items():
            lines.write(json.dumps({"_id": id_, "title": "", "text": text}) + "\n")
    run_of(dense(checkpoint), data, workspace)
    scores = ranking(workspace)["e1"]
    assert scores["flat"] == scores["same"] != scores["deep"]
    corpus = workspace.corpus(load_collection(str(data)))
    assert corpus.copies("same") == corpus.copies("flat") == ("flat", "same")
    assert corpus.copies("deep") == ("deep",) and corpus.copies("nowhere") == ("nowhere",)
    assert corpus.texts(["deep", "d001"])["deep"] == rows["deep"]
    assert len(corpus.doc_ids) == 57


def test_settings_that_decide_nothing_are_in_no_identity(checkpoint, data, workspace):
    for fusion, settings, other in (
        ("rrf", {"rrf_constant": 60}, "weights"),
        ("weighted", {"weights": {"bm25": 1.0, "dense": 1.0}}, "rrf_constant"),
    ):
        system = hybrid(checkpoint, fusion)
        name = {"name": f"both-{fusion}"}
        identity = run_of(system.model_copy(update=name), data, workspace).provenance["identity"]
        found = {f"retrieve.{key}": value for key, value in settings.items()}
        assert found.items() <= identity.items() and f"retrieve.{other}" not in identity
        assert identity["retrieve.bm25.analysis"] == ANALYSIS_VERSION
        assert identity["retrieve.dense.encoding"] == ENCODING_VERSION
        assert not [key for key in identity if ".parts" in key]


def test_run_files_of_several_tasks_are_found_by_their_names(data, workspace, tmp_path):
    retriever = RunRetriever(kind="run", path=str(tmp_path / "{collection}" / "{task}.trec"))
    collection = replace(load_collection(str(data)), name="bright/biology")
    assert run_file(retriever, collection) == tmp_path / "bright" / "biology" / "biology.trec"
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "data.trec").write_text("e0 Q0 d001 1 0.5 x\n")
    path = {"kind": "run", "path": str(tmp_path / "of" / "{task}.trec")}
    system = SystemConfig.model_validate({"name": "file", "retrieve": path})
    assert run_of(system, data, workspace).metrics.num_missing == 7


def test_an_endpoints_own_length_is_said_with_the_result(data, workspace, tmp_path):
    endpoint = {"kind": "endpoint", "model": "m", "dimension": 3, "query_template": "{query}"}
    (tmp_path / "data.trec").write_text("e0 Q0 d001 1 0.5 x\n")
    parts = {"far": endpoint, "file": {"kind": "run", "path": str(tmp_path / "data.trec")}}
    retrieve = {"kind": "hybrid", "parts": parts}
    system = SystemConfig.model_validate({"name": "far", "retrieve": retrieve})
    answers = Answers()
    runtime = small_blocks(endpoints={"far": "http://127.0.0.1:1/v1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reasonembed.systems.encoding.OpenEmbedder.load", lambda self: answers)
        place = Workspace(workspace.results, runtime=runtime)
        limited = run_of(system, data, place, protocol="reasonembed")
        free = run_of(system, data, place, protocol="bright")
    assert limited.provenance["length"] == "the endpoint's own"
    assert "length" not in free.provenance
    assert any("far: " in line and "endpoint" in line for line in lines_of(limited))
    assert not any("far: " in line and "endpoint" in line for line in lines_of(free))


def far_system(name="far"):
    endpoint = {"kind": "endpoint", "model": "m", "dimension": 3, "query_template": "{query}"}
    return SystemConfig.model_validate({"name": name, "retrieve": endpoint})


def answering(*shape, most=10**6):
    """A server whose vectors are the length of a text, and what is given."""

    def answer(body):
        if max(map(len, body["input"])) > most:
            return Reply({"error": {"message": "too many tokens"}}, status=400)
        return embeddings(*([len(text), *shape] for text in body["input"]))

    return serving(answer)


def far(workspace, server, name="far"):
    return Workspace(workspace.results, runtime=small_blocks(endpoints={name: server.url}))


def test_a_result_says_which_server_and_how_many_texts_it_cut(data, workspace):
    with (data / "corpus.jsonl").open("a") as lines:
        for number in range(2):
            row = {"_id": f"long{number}", "title": "", "text": f"{number} " * 1_000}
            lines.write(json.dumps(row) + "\n")
    with answering(1, 2, most=1_500) as server:
        result = run_of(far_system(), data, far(workspace, server))
        num_asked = len(server.requests)
        again = run_of(far_system("again"), data, far(workspace, server, "again"))
    for one, name in ((result, "far"), (again, "again")):
        assert one.provenance["endpoints"] == {name: [server.url]}
        assert one.provenance["texts_cut"] == 2
    assert any("2 texts were too long for the endpoint" in line for line in lines_of(result))
    assert len(server.requests) == num_asked


def test_another_model_behind_an_address_is_refused(data, workspace):
    with answering(1, 2) as first:
        run_of(far_system(), data, far(workspace, first))
    with (data / "queries.jsonl").open("a") as lines:
        lines.write(json.dumps({"_id": "new", "text": "a question of its own"}) + "\n")
    with (data / "qrels" / "test.tsv").open("a") as lines:
        lines.write("new\td001\t1\n")
    more = data.rename(data.with_name("more"))
    with (
        answering(-50, 2) as other,
        pytest.raises(ModelError, match=f"{other.url} is not the model .* made by {first.url}"),
    ):
        run_of(far_system(), more, far(workspace, other))
    with answering(1, 2.1) as same:
        result = run_of(far_system(), more, far(workspace, same))
    assert result.provenance["endpoints"] == {"far": [first.url, same.url]}


def lines_of(result):
    return table_lines([result], place=Path("results"))


class Answers:
    """What an endpoint might say."""

    def encode_documents(self, texts):
        return np.array([[len(text), 1, 2] for text in texts], np.float32)

    def encode_queries(self, texts, *, instruction=""):
        return self.encode_documents(texts)


def test_shards_read_each_row_group_once(checkpoint, data, workspace, monkeypatch):
    run_of(dense(checkpoint), data, workspace)
    reads, read = [], Artifact.row_group

    def noting(self, part, number, *, columns):
        reads.extend([(part, number)] if columns == ["vector"] else [])
        return read(self, part, number, columns=columns)

    monkeypatch.setattr(Artifact, "row_group", noting)
    runtime = small_blocks(mine={"shard_documents": 8})
    system = dense(checkpoint, name="again")
    run_of(system, data, Workspace(workspace.results, runtime=runtime))
    documents = 48 // 4  # blocks of four, none of which two shards share
    assert len(reads) == documents + 8 // 4
