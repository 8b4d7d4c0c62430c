"""What do Ray Data and the ledger cost? Tokens per second of the LLM jobs against bare vLLM.

    python benchmarks/llm.py [--rows 192] [--rounds 2] [--whole]

Both sides get the same prompts, seeds and engine settings (those of `configs/quickstart.yaml`, one
try a row), each in a process of its own, in turn: jobs, bare, jobs, bare, ... `jobs` is what the
stages run: planned rows through an actor pool into committed Parquet. `bare` builds the same engine
and hands it the same blocks, and nothing else. `--whole` adds a third side that hands the engine
all prompts in one call. The clock runs from the engine's being ready to the last answer, for jobs
to the last commit; start-up stands apart. Prints a table, writes `benchmarks/results/llm.json`.

Run it on a machine that does nothing else: the engine takes all cores.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import Artifact
from reasonembed.config import LLMPool, RunConfig, load
from reasonembed.corpus import read_corpus
from reasonembed.evaluation.datasets import load_collection
from reasonembed.llm.protocol import (
    Completion,
    Engine,
    Request,
    WithEngine,
    failure,
    make_engine,
)
from reasonembed.remixer.annotate import PAIRS, Annotator, JudgedQuery, query_blocks
from reasonembed.remixer.generate import QueryGenerator
from reasonembed.run import Run
from reasonembed.schemas import SEEDS, from_rows, row_seed, stable_hash

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "llm.json"
STAGES = {"generate": "queries", "annotate": "judgments"}
DOCUMENTS_A_QUERY = 12
OVERRIDES = [
    "generate.tries=1",
    "annotate.tries=1",
    "annotate.label_from=written",  # one question a row, whatever the answer
    "assemble.rule=threshold",
]


def configuration(folder: Path, model: str) -> RunConfig:
    overrides = [*OVERRIDES, f"run_dir={folder / 'run'}"]
    overrides += [f"{stage}.llm.model={model}" for stage in STAGES]
    return load(ROOT / "configs" / "quickstart.yaml", overrides=overrides)


# ---- what is asked ----------------------------------------------------------------------------


def prepare(config: RunConfig) -> None:
    Run(config).artifact("corpus").commit(
        "corpus", read_corpus(config.corpus.source, task=config.corpus.task)
    )


def planned(config: RunConfig, stage: str, rows: int) -> pa.Table:
    """Seeds or pairs; which documents, a hash decides."""
    texts = Run(config).artifact("corpus").read(columns=["doc_id", "text"]).to_pylist()
    fitting = [row["doc_id"] for row in texts if 300 <= len(row["text"]) <= 3000]
    doc_ids = sorted(fitting, key=lambda doc_id: stable_hash("benchmark", doc_id))
    if stage == "annotate":
        queries = list(load_collection(config.evaluate.collection).queries)
        pairs = [
            {"query_id": queries[i // DOCUMENTS_A_QUERY], "doc_id": doc_ids[i]} for i in range(rows)
        ]
        return from_rows(pairs, PAIRS, where="pairs")
    seeds = [
        {
            "query_id": f"q{i}",
            "source_doc_id": doc_ids[i],
            "task": config.corpus.task,
            "min_words": 30,
            "max_words": 80,
            "education_level": "college",
            "seed": row_seed(42, i),
        }
        for i in range(rows)
    ]
    return from_rows(seeds, SEEDS, where="seeds")


def blocks(table: pa.Table, stage: str, pool: LLMPool) -> list[pa.Table]:
    if stage == "annotate":
        return query_blocks(table, pool.batch_rows)
    return [table.slice(i, pool.batch_rows) for i in range(0, table.num_rows, pool.batch_rows)]


@dataclass(frozen=True)
class MakeMapper:
    """Builds a stage around an engine, as the stage's own job does."""

    config: RunConfig
    stage: str

    def __call__(self, engine: Engine) -> Callable[[pa.Table], pa.Table]:
        shared: dict[str, Any] = {
            "engine": engine,
            "corpus": Run(self.config).corpus_store(),
            "tasks": self.config.task_table,
        }
        if self.stage == "generate":
            return QueryGenerator(self.config.generate, **shared)
        found = load_collection(self.config.evaluate.collection).queries
        task = self.config.corpus.task
        queries = {query_id: JudgedQuery(text, task) for query_id, text in found.items()}
        return Annotator(self.config.annotate, queries=queries, **shared)


class Recorder:
    """An engine that notes what it is asked."""

    def __init__(self) -> None:
        self.blocks: list[list[Request]] = []

    def complete(self, requests: list[Request]) -> list[Completion]:
        self.blocks.append(list(requests))
        return [failure("not asked") for _ in requests]

    def close(self) -> None:
        """Nothing to free."""


# ---- the sides --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Noted:
    """Builds a mapper in its actor and notes when it was ready."""

    make: Callable[[], Callable[[pa.Table], pa.Table]]
    file: Path

    def __call__(self) -> Callable[[pa.Table], pa.Table]:
        mapper = self.make()
        self.file.write_text(repr(time.time()))
        return mapper


def run_jobs(config: RunConfig, stage: str, rows: int, folder: Path) -> dict[str, float]:
    from ray_jobs.job import session
    from ray_jobs.ledger import run_planned

    started = time.time()
    table = planned(config, stage, rows)
    pool = getattr(config.runtime, stage)
    kind, ready_file = STAGES[stage], folder / f"ready-{time.time_ns()}"
    artifact = Artifact.declared(folder / f"out-{time.time_ns()}", kind)
    llm = getattr(config, stage).llm
    make = WithEngine(
        llm, config.runtime.engine, config.runtime.cache_dir, MakeMapper(config, stage)
    )
    with session(config) as job:
        begun = time.time()
        run_planned(
            job,
            table,
            artifact,
            Noted(make, ready_file),
            pool,
            label=stage,
            cut=query_blocks if stage == "annotate" else None,
        )
        ended = time.time()
    ready = float(ready_file.read_text())
    names = ("prompt_tokens", "cached_tokens", "completion_tokens")
    made = artifact.read(columns=list(names))
    read, cached, written = (pc.sum(made.column(name)).as_py() for name in names)
    return {
        "rows": made.num_rows,
        "ray_start_s": begun - started,
        "engine_start_s": ready - begun,
        "seconds": ended - ready,
        "read": read,
        "cached": cached,
        "written": written,
    }


def run_bare(config: RunConfig, stage: str, rows: int, *, whole: bool) -> dict[str, float]:
    recorder = Recorder()
    note = MakeMapper(config, stage)(recorder)
    for block in blocks(planned(config, stage, rows), stage, getattr(config.runtime, stage)):
        note(block)
    asked = recorder.blocks
    if whole:
        asked = [[request for block in asked for request in block]]
    begun = time.time()
    engine = make_engine(
        getattr(config, stage).llm, config.runtime.engine, cache_dir=config.runtime.cache_dir
    )
    ready = time.time()
    done = [answer for block in asked for answer in engine.complete(block)]
    ended = time.time()
    engine.close()
    return {
        "rows": len(done),
        "engine_start_s": ready - begun,
        "seconds": ended - ready,
        "read": sum(answer.prompt_tokens for answer in done),
        "cached": sum(answer.cached_tokens for answer in done),
        "written": sum(answer.completion_tokens for answer in done),
    }


def measure(side: str, stage: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float]:
    """One side in a process of its own."""
    out = folder / f"result-{time.time_ns()}.json"
    command = [sys.executable, __file__, "--side", side, "--stage", stage, "--out", str(out)]
    command += ["--rows", str(arguments.rows), "--model", arguments.model, "--folder", str(folder)]
    pool = getattr(configuration(folder, arguments.model).runtime, stage)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": f"{pool.num_cpus:.0f}",  # as Ray sets it for an actor
        # GNU's OpenMP spins at barriers on the thread that started the engine and sleeps on others.
        # Ray Data calls from another one; unset, that alone makes bare several times slower where
        # something else runs.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
    with (folder / "log.txt").open("ab") as log:
        done = subprocess.run(command, env=environment, stdout=log, stderr=log, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{side} {stage} failed:\n{(folder / 'log.txt').read_text()[-4000:]}")
    result: dict[str, float] = json.loads(out.read_text())
    return result


# ---- the table --------------------------------------------------------------------------------


def speed(rows: list[dict[str, Any]], side: str, stage: str) -> float:
    return statistics.median(
        (row["read"] + row["written"]) / row["seconds"]
        for row in rows
        if (row["side"], row["stage"]) == (side, stage)
    )


def compare(arguments: argparse.Namespace) -> None:
    sides = ["jobs", "bare", *(["whole"] if arguments.whole else [])]
    rows: list[dict[str, Any]] = []
    print(
        f"{'stage':10}{'side':7}{'start-up':>9}{'seconds':>9}{'read':>9}{'written':>9}{'tok/s':>8}"
    )
    with tempfile.TemporaryDirectory(prefix="reasonembed-llm-") as name:
        folder = Path(name)
        prepare(configuration(folder, arguments.model))
        for stage in STAGES:
            for _ in range(arguments.rounds):
                for side in sides:
                    row: dict[str, Any] = {"stage": stage, "side": side}
                    row |= measure(side, stage, arguments, folder)
                    rows.append(row)
                    start_up = row.get("ray_start_s", 0.0) + row["engine_start_s"]
                    rate = (row["read"] + row["written"]) / row["seconds"]
                    print(
                        f"{stage:10}{side:7}{start_up:9.1f}{row['seconds']:9.2f}{row['read']:9}"
                        f"{row['written']:9}{rate:8.0f}",
                        flush=True,
                    )
    ratios = {
        stage: {
            f"jobs / {side}": round(speed(rows, "jobs", stage) / speed(rows, side, stage), 4)
            for side in sides[1:]
        }
        for stage in STAGES
    }
    print(f"tokens per second, medians of {arguments.rounds} (at least 0.9 is asked for): {ratios}")
    RESULT.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, no accelerator"
    summary = {"device": machine, "model": arguments.model, "ratios": ratios, "rows": rows}
    RESULT.write_text(json.dumps(summary, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=192, help="rows a stage")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="also all prompts in one bare call")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--side", choices=["jobs", "bare", "whole"], help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.side:
        compare(arguments)
        return
    config = configuration(arguments.folder, arguments.model)
    if arguments.side == "jobs":
        result = run_jobs(config, arguments.stage, arguments.rows, arguments.folder)
    else:
        whole = arguments.side == "whole"
        result = run_bare(config, arguments.stage, arguments.rows, whole=whole)
    arguments.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
