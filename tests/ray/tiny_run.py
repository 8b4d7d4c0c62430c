"""A whole run in seconds: a made-up corpus, a scripted LLM, a random checkpoint of kilobytes."""

import json
import sys
from pathlib import Path

import yaml

from tests.embedder.tiny import save_checkpoint

_SUBJECTS = ("lists", "threads", "files", "dates", "sockets", "classes", "numbers", "strings")


def write_corpus(folder: Path, *, documents: int = 48, duplicates: int = 6) -> Path:
    """`corpus.jsonl`, `queries.jsonl`, `qrels/test.tsv`: BEIR form, with exact duplicates."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(documents):
        subject = _SUBJECTS[i % len(_SUBJECTS)]
        words = " ".join(f"{subject}{(i * 7 + k * 3) % 31}" for k in range(30))
        rows.append(
            {"_id": f"d{i:03d}", "title": "", "text": f"About {subject} case {i}: {words}."}
        )
    rows += [dict(rows[i], _id=f"twin{i:03d}") for i in range(duplicates)]
    _jsonl(folder / "corpus.jsonl", rows)
    queries = [
        {"_id": f"e{i}", "text": f"what goes wrong with {_SUBJECTS[i % 8]} number {i}"}
        for i in range(8)
    ]
    _jsonl(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    lines = ["query-id\tcorpus-id\tscore", *(f"e{i}\td{40 + i:03d}\t1" for i in range(8))]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def write_config(folder: Path, *, delay_s: float = 0.0, **runtime: object) -> Path:
    """A configuration over `write_corpus`; the LLM notes every request in `requests.jsonl`."""
    write_corpus(folder / "data")
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        save_checkpoint(checkpoint)
    llm = {"model": f"scripted:{delay_s}", "engine": "scripted"}
    encoder = {"model": str(checkpoint), "max_query_tokens": 48, "max_document_tokens": 48}
    pool = {"batch_rows": 4, "num_cpus": 0.5}
    config = {
        "run_dir": str(folder / "run"),
        "corpus": {"source": str(folder / "data")},
        "plan": {"min_chars": 20, "max_seeds_per_task": 24},
        "generate": {"llm": llm},
        "mine": {"encoder": encoder, "top_k": 6},
        "annotate": {"llm": llm, "candidates_per_query": 4, "audit_queries": 4},
        "rewrite": {"llm": llm},
        "train": {
            "encoder": encoder,
            "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
            "batch_queries": 8,
            "group_size": 3,
            "max_steps": 6,
            "learning_rate": 1e-2,
            "intensity_start_step": 2,
        },
        "evaluate": {"collection": str(folder / "data"), "top_k": 20},
        "runtime": {
            "generate": pool,
            "annotate": pool,
            "rewrite": pool,
            "embed": {"batch_rows": 16, "num_cpus": 0.5, "threads": 1},
            "engine": {"log_path": str(folder / "requests.jsonl")},
            "train": {"num_workers": 2, "num_cpus": 0.5, "threads": 1, "checkpoint_every": 2},
            "object_store_bytes": 150_000_000,
            **runtime,
        },
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def _jsonl(file: Path, rows: list[dict[str, str]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    write_config(Path(sys.argv[1]).resolve())
