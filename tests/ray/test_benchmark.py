"""Systems measured on actor pools: what one process finds, and nothing computed again."""

import json
import subprocess
import sys

import yaml
from rich.console import Console

from reasonembed.config import load_benchmark
from reasonembed.progress import Reporter
from reasonembed.systems.benchmark import measure_all
from reasonembed.systems.local import LocalWork
from tests.embedder.tiny import encoder_config, save_checkpoint
from tests.ray.processes import ROOT, environment
from tests.ray.tiny_run import write_corpus


def write_benchmark(folder):
    llm = {"model": "scripted", "engine": "scripted"}
    encoder = encoder_config(save_checkpoint(folder / "checkpoint")).model_dump()
    system = {
        "name": "tiny",
        "retrieve": {"kind": "dense", "encoder": encoder},
        "rewrite": {"llm": llm},
        "rerank": {"annotate": {"llm": llm}, "top": 3},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(system))
    pool = {"batch_rows": 8, "num_cpus": 0.5}
    config = {
        "systems": ["bm25", str(folder / "tiny.yaml")],
        "collections": [
            str(write_corpus(folder / "data")),
            str(write_corpus(folder / "more", documents=50)),
        ],
        "results_dir": str(folder / "results"),
        "runtime": {
            "embed": {**pool, "threads": 1},
            "rewrite": pool,
            "annotate": pool,
            "object_store_bytes": 150_000_000,
        },
    }
    file = folder / "benchmark.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def on_ray(file):
    command = [sys.executable, "-m", "ray_jobs.benchmark", "--config", str(file)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False
    )


def test_actor_pools_find_what_one_process_finds(tmp_path):
    file = write_benchmark(tmp_path)
    done = on_ray(file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] tiny on 2 collections" in done.stdout and "nDCG@10" in done.stdout
    assert (tmp_path / "results" / "report.html").is_file() and "report.html" in done.stdout
    commits = {
        one: one.stat().st_mtime_ns for one in (tmp_path / "results").rglob("_commits/*.json")
    }
    alone = load_benchmark(file, given={"results_dir": str(tmp_path / "alone")})
    work = LocalWork(Reporter(Console(quiet=True)))
    for result in measure_all(alone, work=work):
        place = tmp_path / "results" / "bright" / result.collection / result.system / "result.json"
        assert json.loads(place.read_text())["metrics"]["mean"] == result.metrics.mean
    again = on_ray(file)
    assert again.returncode == 0, again.stderr
    assert commits == {
        one: one.stat().st_mtime_ns for one in (tmp_path / "results").rglob("_commits/*.json")
    }
