"""Does training help beyond the luck of a seed? Trains and evaluates a finished run anew.

    python benchmarks/seeds.py configs/quickstart.yaml runs/quickstart 1 2

Each seed shares the run's data (samples, vectors of miner and untrained backbone) and repeats
train, export and evaluate. Prints a table and writes `benchmarks/results/seeds.json`.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path

from reasonembed.artifacts import link_tree
from reasonembed.run import Run

RESULT = Path(__file__).parent / "results" / "seeds.json"
SYSTEMS = ("bm25", "miner", "before", "after")
MADE_ANEW = {"train", "export", "evaluate", "logs"}


def link_data(source: Path, target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for folder in source.iterdir():
        if folder.is_dir() and folder.name not in MADE_ANEW and not (target / folder.name).exists():
            link_tree(folder, target / folder.name)


def scores(run_dir: Path) -> dict[str, object]:
    run = Run.existing(run_dir)
    card = run.directory("evaluate").finished()
    assert card is not None, f"{run_dir} is not evaluated"
    row: dict[str, object] = {"seed": run.config.train.seed}
    for metric, paired in (("ndcg@10", "comparison"), ("recall@100", "deep_comparison")):
        row[metric] = {name: system[metric] for name, system in card["systems"].items()} | {
            key: card[paired][key] for key in ("low", "high", "p_value")
        }
    return row


def main() -> None:
    config, source, *seeds = sys.argv[1:]
    rows = [scores(Path(source))]
    for seed in seeds:
        target = Path(f"{source}-seed{seed}")
        link_data(Path(source), target)
        changes = ["--set", f"run_dir={target}", "--set", f"train.seed={seed}"]
        command = ["-m", "reasonembed.cli", "run", config, *changes, "--from", "train"]
        subprocess.run([sys.executable, *command], check=True)
        rows.append(scores(target))
    for metric in ("ndcg@10", "recall@100"):
        print(f"{metric:>10}     BM25    miner   before    after   after - before, 95 %")
        for row in rows:
            figures = row[metric]
            cells = " ".join(f"{figures[name]:8.4f}" for name in SYSTEMS)
            print(f"{row['seed']:>10} {cells}   [{figures['low']:+.4f}, {figures['high']:+.4f}]")
    RESULT.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, no accelerator"
    RESULT.write_text(json.dumps({"device": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
