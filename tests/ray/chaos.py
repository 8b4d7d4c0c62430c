"""A cluster whose machines die, with and without warning, under a run; see `test_chaos`."""

from __future__ import annotations

import json
import math
import random
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from cluster.spot_watcher import Notice, drain_by_ray
from reasonembed.config import load
from reasonembed.llm.scripted import FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED
from reasonembed.run import Run
from tests.ray.processes import end_session, start_reasonembed
from tests.ray.tiny_run import write_config

POISON = (FAIL_ERROR, FAIL_INVALID, FAIL_TRUNCATED)
# Room for one actor of a pool, or one training worker, and not for two: each machine has one.
MACHINE = {"num_cpus": 3, "object_store_memory": 80_000_000}
ACTOR_CPUS, TRAINER_CPUS = 1.6, 2.0
BLOCK_ROWS = 2
OVERLAP = {"generate": 2, "annotate": 1, "rewrite": 1}
DELAY_S = {"generate": 1.0, "annotate": 0.4, "rewrite": 0.8}  # of a block
MADE = {"generate": "queries", "annotate": "judgments", "rewrite": "rewrites"}
STRUCK = ("generate", "embed", "mine", "annotate", "rewrite", "train")
COMPARED = ("seeds", "queries", "candidates", "judgments", "rewrites", "samples")
NOTICE_S = 3.0
# Sums over another number of workers run in another order, and Adam lets that grow.
LOSS_TOLERANCE = 1e-3


class Machines:
    """A head that holds no work, and machines that do and that go."""

    def __init__(self, count: int = 2) -> None:
        from ray.cluster_utils import Cluster

        # A dead node is noticed after two seconds, not after the default of half a minute.
        quick = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        head = {"num_cpus": 0, "object_store_memory": 80_000_000, "include_dashboard": False}
        self.cluster = Cluster(
            initialize_head=True, head_node_args={**head, "_system_config": quick}
        )
        self._nodes = [self.cluster.add_node(**MACHINE) for _ in range(count)]

    @property
    def address(self) -> str:
        """Of the cluster."""
        return str(self.cluster.address)

    def strike(self, how: str, rng: random.Random) -> None:
        """Takes a machine away and brings another one.

        Args:
            how: `kill` says nothing before; `drain` announces it, as a watcher of spots does.
            rng: Chooses the machine.
        """
        node = self._nodes.pop(rng.randrange(len(self._nodes)))
        goes_at = time.time()
        if how == "drain":
            goes_at += NOTICE_S
            drain_by_ray(self.address, node.node_id)(Notice("chaos", goes_at))
            self._nodes.append(self.cluster.add_node(**MACHINE))
            time.sleep(max(0.0, goes_at - time.time()))
            self.cluster.remove_node(node, allow_graceful=False)
        else:
            self.cluster.remove_node(node, allow_graceful=False)
            self._nodes.append(self.cluster.add_node(**MACHINE))

    def end(self) -> None:
        """Ends all of it."""
        self.cluster.shutdown()


@dataclass
class Line:
    """A line of the table.

    Attributes:
        seed: Of the run.
        engine: `scripted` or `vllm`.
        kills: Machines that went without a word while a stage was at work.
        drains: Machines whose end was announced.
        stages: Which stages were at work then.
        rows: That LLMs had to make.
        recomputed: Of these, those that were computed more than once.
        bound: How many that may be: a batch for each block that an actor holds, for each strike.
        equal: Whether all artifacts are those of an undisturbed run; null: not compared.
        steps_repeated: Of training.
        seconds: Of the whole run.
    """

    seed: int
    engine: str = "scripted"
    kills: int = 0
    drains: int = 0
    stages: list[str] = field(default_factory=list)
    rows: int = 0
    recomputed: int = 0
    bound: int = 0
    equal: bool | None = None
    steps_repeated: int = 0
    seconds: float = 0.0


def write_run(folder: Path, *, variant: int) -> Path:
    """A tiny run whose texts are of any length and whose documents break the LLM now and then."""
    folder.mkdir()
    config = write_config(folder)
    rng = random.Random(variant)
    file = folder / "data" / "corpus.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["text"] += f" note{number}" * rng.choice((1, 30, 2_000))
        if rng.random() < 0.15:
            row["text"] = f"{rng.choice(POISON)} {row['text']}"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = yaml.safe_load(config.read_text())
    pool = {"batch_rows": BLOCK_ROWS, "num_cpus": ACTOR_CPUS, "min_actors": 2, "max_actors": 2}
    for stage, overlap in OVERLAP.items():
        data["runtime"][stage] = pool | {"overlap": overlap}
        data[stage] |= {
            "max_failed_share": 1.0,
            "llm": {"model": f"scripted:{DELAY_S[stage]}", "engine": "scripted"},
        }
    data["runtime"]["embed"] |= {"batch_rows": 8, "num_cpus": ACTOR_CPUS}
    data["runtime"]["mine"] = {"num_cpus": ACTOR_CPUS, "shard_documents": 10, "query_block": 8}
    data["runtime"]["train"] |= {"min_workers": 1, "num_cpus": TRAINER_CPUS, "max_failures": -1}
    data["plan"]["max_chars"] = 100_000
    data["annotate"] |= {"candidates_per_query": 3, "audit_queries": 0}
    # With dropout another number of workers would draw other masks.
    data["train"] |= {"max_steps": 6, "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
    config.write_text(yaml.safe_dump(data))
    return config


def write_real_run(folder: Path) -> Path:
    """The same with a real model that writes a few short queries; dozens of seconds a machine."""
    config = write_run(folder, variant=0)
    data = yaml.safe_load(config.read_text())
    data["plan"]["max_seeds_per_task"] = 8
    data["generate"] |= {
        "llm": {"model": "smollm2-135m-instruct", "max_model_len": 1_024, "dtype": "float32"},
        "prompt": "generate-short",
        "sampling": {"temperature": 0.6, "max_tokens": 24},
        "max_document_words": 60,
        "keep_truncated": True,
    }
    data["runtime"]["generate"]["overlap"] = 1
    data["runtime"]["engine"] = {"kv_cache_gib": 1}
    config.write_text(yaml.safe_dump(data))
    return config


@contextmanager
def driver(config: Path, *, last: str, address: str) -> Iterator[tuple[Any, Run]]:
    """A run on the cluster, in a process of its own."""
    process = start_reasonembed(
        *("run", str(config), "--to", last),
        variables={
            "RAY_ADDRESS": address,
            "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "6",
            "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    try:
        yield process, Run(load(config))
    finally:
        end_session(process.pid)


def finished(process: Any, *, what: str, timeout_s: float = 300) -> None:
    """Waits for a driver to succeed."""
    _, errors = process.communicate(timeout=timeout_s)
    assert process.returncode == 0, f"{what}: {process.returncode}: {errors[-3_000:]}"


def undisturbed(config: Path, *, address: str) -> Run:
    """The run that the others are compared with."""
    with driver(config, last="train", address=address) as (process, run):
        finished(process, what="undisturbed")
        return run


def stages_done(run: Run) -> set[str]:
    """Names of stages that have ended well."""
    return {row["stage"] for row in run.timeline() if row["outcome"] == "done"}


def seconds_of(run: Run) -> dict[str, float]:
    """How long each stage takes; of those that ask an LLM, from the first commit to the last."""
    seconds = {row["stage"]: float(row["seconds"]) for row in run.timeline()}
    for stage, kind in MADE.items():
        at_ns = [commit.committed_at_ns for commit in run.artifact(kind).commits()]
        seconds[stage] = (max(at_ns) - min(at_ns)) / 1e9
    return seconds


def disturbed(
    config: Path, *, last: str, seed: int, machines: Machines, seconds: dict[str, float]
) -> Line:
    """Lets machines die under a run, stage by stage.

    Args:
        config: Of the run.
        last: Its last stage.
        seed: Decides when which machine goes, and how.
        machines: That may go.
        seconds: How long each stage takes when nothing happens; see `seconds_of`.
    """
    rng, line, started = random.Random(seed), Line(seed), time.time()
    with driver(config, last=last, address=machines.address) as (process, run):
        until = run.stages[: run.stages.index(last) + 1]
        for stage in STRUCK:
            how = rng.choice(("kill", "kill", "drain", "drain", "nothing", "nothing"))
            after_s = rng.uniform(0.0, 0.9) * seconds[stage]
            if how != "nothing" and stage in until:
                _strike(stage, how, after_s, process, run, machines, rng, line)
        finished(process, what=f"seed {seed}")
    line.seconds = round(time.time() - started, 1)
    return line


def _strike(
    stage: str,
    how: str,
    after_s: float,
    process: Any,
    run: Run,
    machines: Machines,
    rng: random.Random,
    line: Line,
) -> None:
    while process.poll() is None and not _has_begun(run, stage):
        time.sleep(0.05)
    time.sleep(after_s)
    if process.poll() is not None or stage in stages_done(run):
        return  # it came too late
    machines.strike(how, rng)
    line.stages.append(stage)
    line.kills += how == "kill"
    line.drains += how == "drain"
    line.bound += BLOCK_ROWS * OVERLAP.get(stage, 0)


def _has_begun(run: Run, stage: str) -> bool:
    """An LLM's stage begins with its first commit, for its actors take most of it to start up."""
    if stage in MADE:
        return bool(run.artifact(MADE[stage]).commits())
    return run.stages[run.stages.index(stage) - 1] in stages_done(run)


def disturbed_real(config: Path, *, seed: int, machines: Machines) -> Line:
    """A machine goes while a real model writes: after the first queries, before the last."""
    rng, started = random.Random(seed), time.time()
    line = Line(seed, engine="vllm")
    how = rng.choice(("kill", "drain"))
    with driver(config, last="generate", address=machines.address) as (process, run):
        queries = run.artifact("queries")
        while process.poll() is None and not queries.commits():
            time.sleep(0.05)
        is_at_work = process.poll() is None
        machines.strike(how, rng)
        finished(process, what=f"vllm, seed {seed}")
    line.stages += ["generate"] if is_at_work else []
    line.kills, line.drains = int(how == "kill"), int(how == "drain")
    line.rows = len(run.artifact("seeds").keys())
    assert_once(run, "queries", run.artifact("seeds").keys())
    line.seconds = round(time.time() - started, 1)
    return line


def assert_once(run: Run, kind: str, planned: set[str]) -> None:
    """Every planned id is committed, in one row of all parts."""
    artifact = run.artifact(kind)
    assert artifact.keys() == planned, f"{run.dir} {kind}"
    assert sum(one.rows for one in artifact.commits()) == len(planned), f"{run.dir} {kind}"


def compare(run: Run, reference: Run, line: Line) -> None:
    """Ids, contents, work that was done twice, and what training saw; fills the line in."""
    seeds = run.artifact("seeds").keys()
    assert_once(run, "queries", seeds)
    for kind in ("candidates", "judgments", "rewrites", "samples"):
        assert_once(run, kind, reference.artifact(kind).keys())
    assert set(run.artifact("queries").statuses()) > {"ok"}, "the poison did no harm"
    for kind in COMPARED:
        assert rows_of(run, kind).equals(rows_of(reference, kind)), f"seed {line.seed}: {kind}"
    wanted, made = requests(reference), requests(run)
    assert made.keys() == wanted.keys()
    line.rows = len(wanted)
    line.recomputed = sum(math.ceil((made[id_] - wanted[id_]) / wanted[id_]) for id_ in made)
    assert line.recomputed <= line.bound, f"seed {line.seed}: {line}"
    assert min((made - wanted).values(), default=0) >= 0
    if run.directory("train").finished():
        line.steps_repeated = _compare_training(run, reference)
    line.equal = True


def rows_of(run: Run, kind: str) -> pa.Table:
    """An artifact's rows, in the order of its key."""
    artifact = run.artifact(kind)
    return artifact.read().sort_by([(name, "ascending") for name in artifact.key])


def requests(run: Run) -> Counter[str]:
    """How often each row was asked for."""
    lines = (run.dir.parent / "requests.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["id"] for line in lines)


def _compare_training(run: Run, reference: Run) -> int:
    noted, expected = steps_of(run), steps_of(reference)
    last = {row["step"]: row for row in noted}
    assert sorted(last) == [row["step"] for row in expected]
    for row in expected:
        assert last[row["step"]]["loss"] == pytest.approx(row["loss"], rel=LOSS_TOLERANCE), row
        assert last[row["step"]]["batch"] == row["batch"]
    return len(noted) - len(expected)


def steps_of(run: Run) -> list[dict[str, Any]]:
    """The log of training, line by line; steps that were taken again occur again."""
    file = run.dir / "train" / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_table(file: Path, lines: list[Line]) -> None:
    """The lines as JSON."""
    file.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
