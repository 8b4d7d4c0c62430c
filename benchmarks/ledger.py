"""What the ledger costs: memory of a driver that plans, time to list, resume and merge, scaling.

    python -m benchmarks.ledger [--quick] [--json FILE]

Three questions. How much memory does a driver hold that plans 10⁴ … 10⁷ rows, of its own and with a
pool of actors behind it? How long does it take to list the commits of 10⁷ rows, to find out which
of 10⁷ planned rows are missing, and to merge 10⁴ parts; beside that, what reading the keys alone
takes (the limit) and what sets of Python's strings take (the way it was done before)? And how many
rows a second do 1, 2, 4 and 8 workers of a fixed latency give?

Every measurement is a process of its own; memory is the peak of `RssAnon`, sampled twenty times a
second: what is mapped from a file can be given back at any time. `--quick` goes up to 10⁶ rows.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import reasonembed.storage as storage_module
from reasonembed.artifacts import Artifact
from reasonembed.blocks import write_blocks
from reasonembed.config import EngineRuntime, LLMConfig, PoolConfig, SamplingConfig
from reasonembed.llm.protocol import Request
from reasonembed.llm.scripted import ScriptedEngine
from reasonembed.progress import Reporter

ROOT = Path(__file__).parents[1]
PIECE = 50_000  # rows that the plan gives at once
PART_ROWS = 1_000
LATENCY_S, BLOCKS_EACH = 0.5, 40
SCHEMA = pa.schema(
    [
        pa.field("query_id", pa.string(), nullable=False),
        pa.field("doc_id", pa.string(), nullable=False),
        ("status", pa.string()),
        ("process", pa.int64()),
    ]
)


def artifact(folder: Path) -> Artifact:
    return Artifact(folder, schema=SCHEMA, key=("query_id", "doc_id"), name="pairs")


def plan(rows: int, piece: int = PIECE) -> Iterator[pa.Table]:
    """Pairs, twenty of a query; ids as long as the pipeline's own."""
    for start in range(0, rows, piece):
        numbers = range(start, min(start + piece, rows))
        yield pa.table(
            {
                "query_id": [f"q-{one // 20 * 2654435761 % 2**64:016x}" for one in numbers],
                "doc_id": [f"d{one * 40503 % 10**9:09d}" for one in numbers],
            }
        )


def committed(table: pa.Table) -> pa.Table:
    pid = [os.getpid()] * table.num_rows
    return table.append_column("status", [["ok"] * table.num_rows]).append_column("process", [pid])


# ---- one measurement, in a process of its own --------------------------------------------------


def anonymous_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def measured(work: Callable[[], object]) -> dict[str, Any]:
    """Seconds, and the peak of memory before and while something runs."""
    before = peak = anonymous_mb()
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.05):
            peak = max(peak, anonymous_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    begun, busy = time.monotonic(), time.process_time()
    try:
        said = work()
    finally:
        stop.set()
        thread.join()
    seconds, busy = time.monotonic() - begun, time.process_time() - busy
    return {"seconds": seconds, "cpu_s": busy, "before_mb": before, "peak_mb": peak, "said": said}


def fill(folder: Path, rows: int) -> int:
    """Commits as many rows as planned; without waiting for the disk, for it is not measured."""
    storage_module._write_durably = lambda path, data: path.write_bytes(data)
    out = artifact(folder)
    for number, table in enumerate(plan(rows, PART_ROWS)):
        out.commit(f"0123456789ab-{number:08d}", committed(table))
    return len(out.commits())


def resume(folder: Path, rows: int) -> int:
    keep = artifact(folder).anti_join()
    return sum(keep(table).num_rows for table in plan(rows))


def resume_by_sets(folder: Path, rows: int) -> int:
    done = artifact(folder).keys()
    return sum(
        f"{query}\x1f{doc}" not in done
        for table in plan(rows)
        for query, doc in zip(*(column.to_pylist() for column in table.columns), strict=True)
    )


def read_keys(folder: Path, rows: int) -> int:
    """What no way to resume can do without: the committed keys are read, the plan is made."""
    read = sum(
        pq.read_table(file, columns=["query_id", "doc_id"], partitioning=None).num_rows
        for file in sorted((folder / "data").iterdir())
    )
    return read - sum(table.num_rows for table in plan(rows))


def write_plan(folder: Path, rows: int) -> int:
    out = artifact(folder)
    return len(write_blocks(out.place, plan(rows), keep=out.anti_join(), rows=64))


class Driver:
    """Stands in for a `Job`."""

    retry: frozenset[str] = frozenset()

    def __init__(self, owner: Path) -> None:
        from rich.console import Console

        self.owner, self.reporter = str(owner), Reporter(Console(quiet=True))


class Instant:
    """A stage that costs nothing."""

    def __call__(self) -> Callable[[pa.Table], pa.Table]:
        return committed


class Scripted:
    """A stage whose engine takes a fixed time for each block."""

    def __call__(self) -> Callable[[pa.Table], pa.Table]:
        config = LLMConfig(model=f"scripted:{LATENCY_S}", engine="scripted")
        engine = ScriptedEngine(config, EngineRuntime())

        def answer(table: pa.Table) -> pa.Table:
            engine.complete(
                [
                    Request(one, "why?", SamplingConfig(), seed=1)
                    for one in table["doc_id"].to_pylist()
                ]
            )
            return committed(table)

        return answer


def start_ray() -> None:
    import ray.data

    ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100_000_000,
    )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars, context.target_max_block_size = False, None


def run_stage(folder: Path, rows: int) -> int:
    """The whole of a stage, on two actors that do nothing."""
    from ray_jobs.ledger import run_planned

    pool = PoolConfig(min_actors=2, max_actors=2, num_cpus=0.5, batch_rows=4_096)
    return run_planned(Driver(folder), plan(rows), artifact(folder / "out"), Instant(), pool,
                       label="x")  # fmt: skip


def scale(folder: Path, workers: int) -> float:
    """Blocks a second, from when all workers are there until the first of them has no more."""
    from ray_jobs.ledger import run_planned

    pool = PoolConfig(min_actors=workers, max_actors=workers, num_cpus=0.1, batch_rows=8)
    out, rows = artifact(folder / "out"), workers * BLOCKS_EACH * 8
    run_planned(Driver(folder / "of nobody"), plan(rows), out, Scripted(), pool, label="x")
    of: dict[int, list[int]] = {}
    for commit in out.commits():
        (pid,) = out._read_part(commit, ["process"], None)["process"].unique().to_pylist()
        of.setdefault(pid, []).append(commit.committed_at_ns)
    assert len(of) == workers, f"{len(of)} of {workers} workers had something to do"
    begin, end = max(map(min, of.values())), min(map(max, of.values()))
    return sum(begin < at <= end for times in of.values() for at in times) / (end - begin) * 1e9


TASKS: dict[str, Callable[[Path, int], object]] = {
    "fill": fill,
    "list": lambda folder, _: len(artifact(folder).commits()),
    "resume": resume,
    "resume by sets": resume_by_sets,
    "read keys": read_keys,
    "statuses": lambda folder, _: dict(artifact(folder).statuses()),
    "compact": lambda folder, _: artifact(folder).compact(),
    "write plan": write_plan,
    "stage": run_stage,
    "scale": scale,
}


def child(task: str, folder: str, size: str) -> None:
    if task in ("stage", "scale"):
        start_ray()
    found = measured(lambda: TASKS[task](Path(folder), int(size)))
    sys.stdout.write("\n" + json.dumps(found) + "\n")


def ask(task: str, folder: Path, size: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ledger", "--child", task, str(folder), str(size)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(f"{task:>16} {size:>10,}: {found['seconds']:7.1f} s, "
          f"{found['before_mb']:4.0f} -> {found['peak_mb']:4.0f} MB, {found['said']}")  # fmt: skip
    return found


# ---- the table ---------------------------------------------------------------------------------


def row(
    name: str,
    ours: float,
    unit: str,
    *,
    limit: float | None = None,
    peer: float | None = None,
    goal: str = "",
    holds: bool | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "ours": round(ours, 3),
        "peer": peer and round(peer, 3),
        "limit": limit and round(limit, 3),
        "unit": unit,
        "ratio_to_peer": peer and round(ours / peer, 3),
        "ratio_to_limit": limit and round(ours / limit, 3),
        "goal": goal,
        "holds": holds,
    }


def memory(folder: Path, task: str, sizes: list[int]) -> list[dict[str, Any]]:
    found = []
    for size in sizes:
        place = folder / f"{task}-{size}"
        found.append(ask(task, place, size)["peak_mb"])
        shutil.rmtree(place, ignore_errors=True)
    goal = "at most 64 MB more than with the fewest rows"
    return [
        row(f"driver's memory, {task}, {size:,} planned rows", peak, "MB", goal=goal,
            holds=peak - found[0] <= 64)
        for size, peak in zip(sizes, found, strict=True)
    ]  # fmt: skip


def ten_million(folder: Path, rows: int) -> list[dict[str, Any]]:
    place, table = folder / "filled", []
    parts = ask("fill", place, rows)["said"]

    def both(task: str, when: str, **beside: Any) -> None:
        found = ask(task, place, rows)
        if task == "resume":
            assert found["said"] == 0, "a committed row was not found"
        name = f"{task}, {rows:,} rows in {when}"
        table.append(row(name, found["cpu_s"], "CPU s", **beside))
        table.append(row(f"{name}: wall clock", found["seconds"], "s"))
        table.append(row(f"{name}: memory", found["peak_mb"], "MB"))

    many = f"{parts:,} parts"
    both("list", many)
    limit = ask("read keys", place, rows)["cpu_s"]
    sets = ask("resume by sets", place, rows) if rows <= 1_000_000 else None
    both("resume", many, limit=limit, peer=sets and sets["cpu_s"])
    both("statuses", many)
    both("compact", many)
    few = f"{ask('list', place, rows)['said']:,} parts"
    both("list", few)
    both("resume", few, limit=ask("read keys", place, rows)["cpu_s"])
    shutil.rmtree(place)
    return table


def scaling(folder: Path) -> list[dict[str, Any]]:
    rates = {}
    for workers in (1, 2, 4, 8):
        place = folder / f"scale-{workers}"
        rates[workers] = float(ask("scale", place, workers)["said"])
        shutil.rmtree(place)
    return [
        row(f"efficiency of {workers} workers ({LATENCY_S} s a block)",
            rate / workers / rates[1], "of one worker", limit=1.0, goal=">= 0.9",
            holds=rate / workers / rates[1] >= 0.9)
        for workers, rate in rates.items()
    ] + [
        row(f"blocks a second, {workers} workers", rate, "1/s", limit=workers / LATENCY_S)
        for workers, rate in rates.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=("memory", "ids", "scaling"))
    parser.add_argument("--child", nargs=3)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    sizes = [10**power for power in range(4, 7 if arguments.quick else 8)]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if arguments.only in (None, "memory"):
            rows += memory(folder, "write plan", sizes) + memory(folder, "stage", sizes)
        if arguments.only in (None, "ids"):
            rows += ten_million(folder, sizes[-1])
        if arguments.only in (None, "scaling"):
            rows += scaling(folder)
    device = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[1]:.1f}"
    versions = {"python": platform.python_version(), "pyarrow": pa.__version__}
    for one in rows:
        print(f"{one['name']:<60} {one['ours']:>10} {one['unit']:<14} {one['holds'] or ''}")
    if arguments.json:
        written = {"device": device, "versions": versions, "rows": rows}
        arguments.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
