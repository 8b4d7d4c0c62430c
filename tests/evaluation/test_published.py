"""Figures that others published, on public data; skipped where the data are not at hand.

Set REASONEMBED_TEST_DATA to their folder; a `shared/data` beside the project is found by itself.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

import pytest

from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.evaluation.runs import read_trec
from reasonembed.evaluation.systems import bm25_run

SIBLING = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("REASONEMBED_TEST_DATA", SIBLING))
FIVE_DECIMALS = 5e-6  # published values are rounded to five
FOUR_DECIMALS = 5.1e-5  # trec_eval prints four

needs = pytest.mark.skipif(not DATA.is_dir(), reason="REASONEMBED_TEST_DATA is not set")


def read_qrels(file: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line in file.read_text().splitlines():
        query_id, _, doc_id, relevance = line.split()
        qrels.setdefault(query_id, {})[doc_id] = int(relevance)
    return qrels


def read_gz(file: Path):
    return json.loads(gzip.decompress(file.read_bytes()))


@pytest.fixture
def scifact_qrels():
    return read_qrels(DATA / "scifact" / "qrels.beir-v1.0.0-scifact.test.txt")


@needs
def test_scifact_of_a_known_model(scifact_qrels):
    run = read_gz(DATA / "scifact" / "all-MiniLM-L6-v2.run_top100.json.gz")
    mean = evaluate_run(run, scifact_qrels).mean
    published = {
        "ndcg@10": 0.64508,
        "ndcg@1": 0.50333,
        "map@10": 0.59593,
        "recall@10": 0.78333,
        "recall@100": 0.925,
        "p@10": 0.08833,
    }
    assert {name: mean[name] for name in published} == pytest.approx(published, abs=FIVE_DECIMALS)


@needs
def test_scifact_by_bm25(scifact_qrels):
    with (DATA / "scifact" / "corpus.jsonl").open() as lines:
        documents = {row["_id"]: f"{row['title']} {row['text']}" for row in map(json.loads, lines)}
    topics = (DATA / "scifact" / "topics.beir-v1.0.0-scifact.test.tsv").read_text()
    queries = dict(line.split("\t") for line in topics.splitlines())
    run = bm25_run(queries, documents, excluded={}, k=100)
    # Lucene itself, over another tokeniser and stemmer, gives 0.6789.
    assert evaluate_run(run, scifact_qrels).mean["ndcg@10"] == pytest.approx(0.6789, abs=0.01)


@needs
def test_theoremqa_theorems_of_a_retriever_and_a_reranker():
    folder = DATA / "runs" / "rader_theoremqa_theorems"
    qrels = read_qrels(DATA / "bright" / "qrels.bright-theoremqa-theorems.txt")
    retriever = read_gz(folder / "hybrid_BM25_Rader.json.gz")
    reranker = read_gz(folder / "gpt4_score.json.gz")
    run = {
        query_id: {doc: 0.5 * score + 0.5 * retriever[query_id][doc] for doc, score in top.items()}
        for query_id, top in reranker.items()
    }
    metrics = evaluate_run(run, qrels)
    names = {"NDCG": "ndcg", "MAP": "map", "Recall": "recall", "P": "p"}
    for name, value in read_gz(folder / "reranker_retriever_results.json.gz").items():
        measure, _, k = name.partition("@")
        ours = "recip_rank" if measure == "MRR" else f"{names[measure]}@{k}"
        assert metrics.mean[ours] == pytest.approx(value, abs=FIVE_DECIMALS), name
    # 95 % of the reranker's scores are tied: a test of the order of ties.
    tied = evaluate_run(reranker, qrels)
    assert tied.mean["ndcg@10"] == pytest.approx(0.45795, abs=FIVE_DECIMALS)
    assert tied.num_ties > 0.9 * sum(len(scores) for scores in reranker.values())


@needs
def test_trec_evals_own_example():
    folder = DATA / "trec_eval_tests"
    metrics = evaluate_run(
        read_trec(folder / "results.test"),
        read_qrels(folder / "qrels.test"),
        ks=(5, 10, 20, 30, 100, 200, 500, 1000),
    )
    names = {"recip_rank": "recip_rank"}
    for k in (5, 10, 20, 30, 100, 200, 500, 1000):
        pairs = (("ndcg_cut", "ndcg"), ("recall", "recall"), ("map_cut", "map"), ("P", "p"))
        names |= {f"{theirs}_{k}": f"{ours}@{k}" for theirs, ours in pairs}
    checked = 0
    for line in (folder / "out.test.aq").read_text().splitlines():
        measure, query_id, value = line.split()
        if measure in names:
            values = metrics.mean if query_id == "all" else metrics.per_query[query_id]
            assert values[names[measure]] == pytest.approx(float(value), abs=FOUR_DECIMALS), line
            checked += 1
    assert checked >= 33
