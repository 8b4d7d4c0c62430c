"""An index whose vectors an actor pool makes: the folder that one process makes."""

import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
import yaml
from rich.console import Console

from reasonembed.index.store import StoredIndex
from reasonembed.progress import Reporter
from reasonembed.serving.building import build_here, index_config
from reasonembed.systems.local import LocalWork
from tests.embedder.tiny import save_checkpoint
from tests.ray.processes import ROOT, environment
from tests.ray.tiny_run import write_corpus


@pytest.mark.slow  # two drivers; the way of its rows is the benchmark's, tested there
def test_an_actor_pool_builds_what_one_process_builds(tmp_path):
    given = {
        "model": str(save_checkpoint(tmp_path / "checkpoint")),
        "encoder": {"max_query_tokens": 48, "max_document_tokens": 48},
        "name": "tiny",
        "runtime": {
            "embed": {"batch_rows": 16, "num_cpus": 0.5, "threads": 1},
            "object_store_bytes": 150_000_000,
        },
    }
    data, there, here = write_corpus(tmp_path / "data"), tmp_path / "there", tmp_path / "here"
    config = index_config(str(data), out=str(there), given=given)
    file = tmp_path / "index.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [sys.executable, "-m", "ray_jobs.index", "--config", str(file)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "54 documents, 48 different texts" in done.stdout
    quiet = LocalWork(Reporter(Console(file=StringIO())))
    build_here(index_config(str(data), out=str(here), given=given), work=quiet)
    one, other = StoredIndex.load(there), StoredIndex.load(here)
    assert one.about.identity == other.about.identity
    # Which process embeds a block changes nothing.
    np.testing.assert_array_equal(one.vectors_ND, other.vectors_ND)
    for name in ("documents.arrow", "queries.jsonl", "bm25/weights.npy"):
        assert (there / name).read_bytes() == (here / name).read_bytes(), name
