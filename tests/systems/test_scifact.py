"""MTEB's published figures through our own encoder, search and metrics; where the data are at hand.

Set REASONEMBED_TEST_DATA to their folder; a `shared/data` beside the project is found by itself.
"""

import os
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from reasonembed.evaluation import protocols
from reasonembed.evaluation.datasets import load_collection
from reasonembed.progress import Reporter
from reasonembed.systems.catalogue import load_system
from reasonembed.systems.local import LocalWork
from reasonembed.systems.measure import measure
from reasonembed.systems.workspace import Workspace

SIBLING = Path(__file__).parents[3] / "shared" / "data"
DATA = Path(os.environ.get("REASONEMBED_TEST_DATA", SIBLING)) / "scifact"
FIVE_DECIMALS = 5e-6  # published values are rounded to five
PUBLISHED = {
    "ndcg@10": 0.64508,
    "ndcg@1": 0.50333,
    "map@10": 0.59593,
    "recall@10": 0.78333,
    "recall@100": 0.925,
    "p@10": 0.08833,
}


@pytest.mark.slow
@pytest.mark.timeout(3_600)  # a million tokens
@pytest.mark.skipif(not DATA.is_dir(), reason="REASONEMBED_TEST_DATA is not set")
def test_scifact_to_five_decimals(tmp_path):
    files = {
        "topics": DATA / "topics.beir-v1.0.0-scifact.test.tsv",
        "qrels": DATA / "qrels.beir-v1.0.0-scifact.test.txt",
        "corpus": DATA / "corpus.jsonl",
    }
    spec = ",".join(f"{name}={file}" for name, file in files.items())
    (result,) = measure(
        load_system("all-minilm-l6-v2"),
        [load_collection(f"trec:{spec}")],
        protocols.get("mteb-v1.1"),
        workspace=Workspace(tmp_path),
        work=LocalWork(Reporter(Console(file=StringIO()))),
    )
    found = {name: result.metrics.mean[name] for name in PUBLISHED}
    assert found == pytest.approx(PUBLISHED, abs=FIVE_DECIMALS)
