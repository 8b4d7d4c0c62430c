"""Does memory stay flat as a corpus grows? Embedding and mining of 1, 4 and 16 times the documents.

    python benchmarks/memory.py [--documents 1000]

The stages `corpus` to `mine` run as they always do, with all-MiniLM-L6-v2, shards of a fixed size,
and a scripted LLM, which costs nothing. Every process of the run is looked at five times a second;
its figure is resident memory without what it shares (weights and object store are mapped). Prints
the peak by kind of process and writes `benchmarks/results/memory.json`.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import yaml

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "memory.json"
SIZES = (1, 4, 16)
WORDS, SEEDS = 24, 64
KINDS = {
    "MapWorker": "actor that embeds, or searches a shard",
    "Write": "task that commits",
    "_near_in": "task that looks for near-duplicates of sources",
}


def write_run(folder: Path, documents: int) -> tuple[Path, int]:
    """A corpus of random English-like words, and its configuration; gives the corpus's bytes."""
    rng = np.random.default_rng(0)
    vocabulary = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r")]
    data = folder / "data"
    (data / "qrels").mkdir(parents=True)
    words = rng.choice(vocabulary, (documents, WORDS)).tolist()
    with (data / "corpus.jsonl").open("w") as file:
        for number, row in enumerate(words):
            file.write(json.dumps({"_id": f"d{number:07d}", "text": " ".join(row)}) + "\n")
    (data / "queries.jsonl").write_text(json.dumps({"_id": "e", "text": "why"}) + "\n")
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\ne\td0000000\t1\n")
    llm = {"model": "scripted:0", "engine": "scripted"}
    encoder = {"model": "all-minilm-l6-v2", "query_template": "{query}"}
    encoder |= {"max_query_tokens": 64, "max_document_tokens": 64}
    config = {
        "run_dir": str(folder / "run"),
        "corpus": {"source": str(data)},
        "plan": {"min_chars": 20, "max_seeds_per_task": SEEDS},
        "generate": {"llm": llm, "max_query_similarity": 1.0},
        "mine": {"encoder": encoder, "top_k": 20},
        "annotate": {"llm": llm},
        "rewrite": {"llm": llm},
        "train": {"encoder": encoder},
        "evaluate": {"collection": str(data)},
        "runtime": {
            "embed": {"batch_rows": 256, "threads": 2},
            "mine": {"shard_documents": 1_000},
            "object_store_bytes": 150_000_000,
        },
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file, (data / "corpus.jsonl").stat().st_size + documents * 384 * 4


def kind(process: psutil.Process) -> str | None:
    """What a process does, as its title says; None for Ray's own."""
    title = " ".join(process.cmdline())
    if "reasonembed.cli run" in title:
        return "driver"
    return next((name for start, name in KINDS.items() if title.startswith(f"ray::{start}")), None)


def peaks(file: Path) -> dict[str, int]:
    """Runs a configuration up to `mine`; the largest memory of each kind of process, in bytes."""
    command = [sys.executable, "-m", "reasonembed.cli", "run", str(file), "--to", "mine"]
    found: dict[str, int] = {}
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        driver = psutil.Process(run.pid)
        while run.poll() is None:
            for process in [driver, *driver.children(recursive=True)]:
                try:
                    memory, name = process.memory_info(), kind(process)
                except psutil.Error:
                    continue  # it has ended
                if name is not None:
                    found[name] = max(found.get(name, 0), memory.rss - memory.shared)
            time.sleep(0.2)
        if run.returncode:
            sys.exit(run.stderr.read()[-2_000:])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=1_000)
    documents = parser.parse_args().documents
    rows = []
    for size in SIZES:
        with tempfile.TemporaryDirectory() as name:
            file, corpus_bytes = write_run(Path(name), size * documents)
            found = {one: round(n / 2**20) for one, n in sorted(peaks(file).items())}
        rows.append({"documents": size * documents, "mb": round(corpus_bytes / 2**20), **found})
        print(rows[-1], flush=True)
    kinds = set(rows[0]).intersection(*rows) - {"documents", "mb"}
    growth = {
        one: round(max(row[one] for row in rows) / min(row[one] for row in rows), 2)
        for one in sorted(kinds)
    }
    print("largest peak over smallest:", growth)
    machine = f"{platform.machine()}, {platform.system()}, no accelerator"
    RESULT.write_text(json.dumps({"device": machine, "runs": rows, "growth": growth}, indent=1))


if __name__ == "__main__":
    main()
