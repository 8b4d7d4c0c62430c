"""Does the planner tell the time of configurations that it was not calibrated on?

    python benchmarks/planner.py [--quick] [--only NAME ...] [--json FILE]

A probe of the quick start (SmolLM2-135M on vLLM, MiniLM, training of four layers) calibrates it.
Then other configurations are planned and, after that, run: other numbers of rows, lengths of
answers and documents, batches, training. A stage counts from five seconds on; of shorter ones the
start-up of one process more or less decides. The goal is 25 %. Two cores that do nothing else take
about ten minutes, seven with --quick.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from reasonembed.config import load
from reasonembed.planner.probe import write_sample

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "planner.json"
CONFIG = ROOT / "configs" / "quickstart.yaml"
GOAL, COUNTS_FROM_S = 0.25, 5.0
DOCUMENTS = 300
ALL = {"annotate.audit_queries": 0, "plan.max_seeds_per_task": 18}
HELD_OUT: dict[str, dict[str, object]] = {
    "other rows and lengths": {
        "plan.max_seeds_per_task": 22,
        "annotate.candidates_per_query": 3,
        "generate.sampling.max_tokens": 96,
        "annotate.sampling.max_tokens": 56,
        "rewrite.sampling.max_tokens": 100,
        "generate.max_document_words": 180,
        "annotate.max_document_words": 140,
        "mine.encoder.max_document_tokens": 192,
        "train.batch_queries": 16,
    },
    "other batches and training": {
        "runtime.generate.batch_rows": 7,
        "runtime.annotate.batch_rows": 12,
        "runtime.rewrite.batch_rows": 7,
        "runtime.embed.batch_rows": 128,
        "train.batch_queries": 8,
        "train.epochs": 6,
        "train.encoder.max_query_tokens": 64,
        "train.encoder.max_document_tokens": 96,
    },
}
"""Overrides of the quick start; none of them is the probe's."""


def command(*arguments: str, environment: dict[str, str]) -> str:
    """Runs the command line in a process of its own; gives what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "reasonembed.cli", *arguments],
        cwd=ROOT, env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout


def sets(changes: dict[str, object]) -> list[str]:
    """As arguments."""
    return [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]


def measured(run_dir: Path) -> dict[str, float]:
    """Seconds of each stage."""
    lines = (run_dir / "timeline.jsonl").read_text().splitlines()
    notes = [json.loads(line) for line in lines]
    return {note["stage"]: note["seconds"] for note in notes if note["outcome"] == "done"}


def rows_of(name: str, planned: dict[str, float], actual: dict[str, float]) -> list[dict]:
    """One row a stage that counts, and one for all stages."""
    found = []
    pairs = [(stage, planned[stage], seconds) for stage, seconds in actual.items()]
    pairs.append(("all", sum(p for _, p, _ in pairs), sum(a for _, _, a in pairs)))
    for stage, plan, seconds in pairs:
        if seconds < COUNTS_FROM_S:
            continue
        ratio = plan / seconds
        found.append(
            {
                "name": f"{name}: {stage}",
                "planned_s": round(plan, 1),
                "measured_s": round(seconds, 1),
                "ratio": round(ratio, 3),
                "unit": "planned by measured seconds",
                "goal": GOAL,
                "holds": abs(ratio - 1) <= GOAL,
            }
        )
    return found


def main() -> None:
    """Calibrates, plans, measures, compares."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first of them alone")
    parser.add_argument("--only", nargs="*", default=[], choices=list(HELD_OUT))
    parser.add_argument("--rows", type=int, default=32, help="of the probe")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chosen = arguments.only or list(HELD_OUT)[: 1 if arguments.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"REASONEMBED_PLANNER": f"{folder}/planner"}
        scratch = f"{folder}/calibration"
        texts = Path(folder) / "texts"
        write_sample(load(CONFIG), texts, documents=DOCUMENTS)
        given = ALL | {"corpus.source": texts, "evaluate.collection": texts}
        began = time.monotonic()
        command(
            "plan", str(CONFIG), "--probe", "--rows", str(arguments.rows), *sets(given),
            "--set", f"run_dir={scratch}", environment=environment,
        )  # fmt: skip
        print(f"probe: {time.monotonic() - began:.0f} s", flush=True)
        rows = []
        for name in chosen:
            run_dir = Path(folder) / name.replace(" ", "-")
            options = [*sets(given | HELD_OUT[name]), "--set", f"run_dir={run_dir}"]
            said = command("plan", str(CONFIG), "--json", *options, environment=environment)
            planned = {one["stage"]: one["seconds"] for one in json.loads(said)["stages"]}
            command("run", str(CONFIG), *options, environment=environment)
            rows += rows_of(name, planned, measured(run_dir))
            for row in rows[-sum(one["name"].startswith(f"{name}:") for one in rows) :]:
                print(
                    f"{row['name']:32} planned {row['planned_s']:7.1f}  measured "
                    f"{row['measured_s']:7.1f}  ratio {row['ratio']:.2f}", flush=True
                )  # fmt: skip
    errors = [abs(row["ratio"] - 1) for row in rows]
    held = math.fsum(row["holds"] for row in rows) / len(rows)
    print(f"median error {median(errors):.0%}, within {GOAL:.0%}: {held:.0%} of {len(rows)}")
    if arguments.json:
        device = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
        out = {"device": device, "versions": {"python": platform.python_version()}, "rows": rows}
        arguments.json.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
