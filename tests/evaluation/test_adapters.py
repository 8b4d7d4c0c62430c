from __future__ import annotations

import json
from pathlib import Path

import pytest

from reasonembed.corpus import read_corpus
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.datasets import load_collection, load_collections
from tests.evaluation.real_data import DATA, needs_data


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(repo: str, **options: object) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)


def write_lines(file: Path, *rows: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_r2med(folder: Path) -> None:
    write_lines(folder / "query.jsonl", {"id": "q1", "text": "A patient."})
    write_lines(
        folder / "qrels.jsonl",
        {"q_id": "q1", "p_id": "d1", "score": 1},
        {"q_id": "q1", "p_id": "d2", "score": 0},
    )


def test_r2med(tmp_path: Path):
    write_r2med(tmp_path / "R2MED" / "Biology")
    write_r2med(tmp_path / "R2MED" / "PMC-Treatment")
    write_lines(tmp_path / "R2MED" / "Biology" / "corpus.jsonl", {"id": "d1", "text": "x"})
    biology, treatment = load_collections("r2med:biology,PMC-Treatment", data_dir=tmp_path)
    assert (biology.name, biology.task) == ("r2med/biology", "r2med-biology")
    assert (treatment.name, treatment.task) == ("r2med/pmc-treatment", "r2med-pmc-treatment")
    assert biology.benchmark == treatment.benchmark == "r2med"
    assert biology.qrels == {"q1": {"d1": 1}}
    assert biology.revision == "unknown"  # it has 103 queries
    assert read_corpus(str(biology.corpus_source))["doc_id"].to_pylist() == ["d1"]
    assert treatment.corpus_source == "hf://datasets/R2MED/PMC-Treatment/corpus.jsonl"


def test_r2med_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def snapshot(repo: str, **options: object) -> str:
        asked.append((repo, options["allow_patterns"]))
        write_r2med(tmp_path / repo)
        return str(tmp_path / repo)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = load_collections("r2med")
    assert [one.name for one in found][:2] == ["r2med/biology", "r2med/bioinformatics"]
    assert len(found) == 8
    assert asked[5] == ("R2MED/PMC-Treatment", ["query.jsonl", "qrels.jsonl"])


def test_a_second_load_names_the_same_corpus_of_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commit = "ab" * 20

    def snapshot(repo: str, *, revision: str | None, allow_patterns: list[str], **_: object) -> str:
        folder = tmp_path / repo / commit
        if "corpus.jsonl" in allow_patterns:
            assert revision == commit
            write_lines(folder / "corpus.jsonl", {"id": "d1", "text": "x"})
        else:
            write_r2med(folder)
            (folder / "query.jsonl").rename(folder / allow_patterns[0])
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    for spec, repo in (("r2med:biology", "R2MED/Biology"), ("limit", "orionweller/LIMIT")):
        first = load_collection(spec)
        assert first.corpus_source == f"hf://datasets/{repo}@{commit}/corpus.jsonl"
        assert read_corpus(first.corpus_source)["doc_id"].to_pylist() == ["d1"]
        assert load_collection(spec) == first


def test_r2med_that_cannot_be_had(tmp_path: Path):
    (tmp_path / "r2med" / "Biology").mkdir(parents=True)
    message = (
        r"query.jsonl is not in .*r2med/Biology, and .*no route.* into r2med/Biology of a folder"
    )
    with pytest.raises(EvaluationError, match=message):
        load_collections("r2med:biology", data_dir=tmp_path)
    with pytest.raises(EvaluationError, match=r"r2med takes neither @REVISION nor \+OPTION"):
        load_collections("r2med+gpt4_reason:biology")


@needs_data
def test_limit_small():
    limit = load_collection("limit-small", data_dir=DATA)
    assert (len(limit.queries), limit.benchmark) == (1000, "limit-small")
    assert {len(gold) for gold in limit.qrels.values()} == {2}
    assert limit.revision == "as published (arXiv:2508.21038)"
    doc_ids = read_corpus(str(limit.corpus_source))["doc_id"].to_pylist()
    assert len(doc_ids) == 46
    limit.check_against(doc_ids)


class TestBrowseComp:
    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True)
        (folder / "queries.tsv").write_text("7\twho?\n8\twhen?\n")
        (folder / "qrel_evidence.txt").write_text("7 0 1 1\n7 0 2 1\n8 0 3 1\n")
        (folder / "qrel_golds.txt").write_text("7 0 2 1\n")
        return folder

    def test_two_judgments_of_one_corpus(self, tmp_path: Path):
        self.write(tmp_path / "browsecomp-plus" / "topics-qrels")
        evidence, gold = load_collections("browsecomp-plus", data_dir=tmp_path)
        assert (evidence.name, gold.name) == ("browsecomp-plus/evidence", "browsecomp-plus/gold")
        assert evidence.qrels == {"7": {"1": 1, "2": 1}, "8": {"3": 1}}
        assert (gold.queries, gold.qrels) == ({"7": "who?"}, {"7": {"2": 1}})
        corpus = "hf://datasets/Tevatron/browsecomp-plus-corpus/data/*.parquet"
        assert evidence.corpus_source == gold.corpus_source == corpus

    def test_the_queries_are_never_fetched(self, tmp_path: Path):
        with pytest.raises(EvaluationError, match=r"make it with .*decrypt_dataset.py"):
            load_collections("browsecomp-plus", data_dir=tmp_path)
        with pytest.raises(EvaluationError, match=r"make it with .*decrypt_dataset.py"):
            load_collections("browsecomp-plus")

    def test_missing_judgments(self, tmp_path: Path):
        folder = self.write(tmp_path / "BrowseComp-Plus")
        (folder / "qrel_golds.txt").unlink()
        with pytest.raises(EvaluationError, match=r"holds no qrel_golds\.txt"):
            load_collections("browsecomp-plus:gold", data_dir=tmp_path)


def test_a_form_that_is_not_known_is_not_guessed():
    with pytest.raises(EvaluationError, match=r"the files of BRIGHT\+ .* is not known here"):
        load_collections("bright-plus:biology")


def test_one_collection_is_needed(tmp_path: Path):
    write_r2med(tmp_path / "r2med" / "Biology")
    write_r2med(tmp_path / "r2med" / "Bioinformatics")
    with pytest.raises(EvaluationError, match="stands for 2 collections, one is needed"):
        load_collection("r2med:biology,bioinformatics", data_dir=tmp_path)
