"""A probe: the same stages over few rows, in a scratch run beside the real one.

It goes through the jobs that the run itself goes through, on the same pools, so that start-up,
batches, prefix cache and failures are those of the real thing. What it showed is kept; see
`calibration`.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa

from reasonembed.config import LLMStageConfig, RunConfig, changed
from reasonembed.corpus import read_corpus
from reasonembed.evaluation.datasets import load_collection

DEFAULT_ROWS = 240
_BLOCKS = 3  # of a stage, so that rates can be told from start-up
_STEPS = 6
_DOCUMENTS_A_ROW = 8
_PAIRS_A_QUERY = 2
_GOLD_SHARE = 4  # at most one in so many documents is gold


def probe_config(config: RunConfig, folder: Path, *, rows: int = DEFAULT_ROWS) -> RunConfig:
    """The configuration of a scratch run in which each LLM stage computes about so many rows.

    Args:
        config: Of the real run.
        folder: Receives the sampled corpus and evaluation; see `write_sample`.
        rows: Of each LLM stage, about.

    Raises:
        CorpusError: The corpus cannot be read.
        EvaluationError: The evaluation cannot.
    """
    seeds = max(4, rows // 2)
    documents = write_sample(config, folder, documents=seeds * _DOCUMENTS_A_ROW)
    workers = config.runtime.train.num_workers
    batch = max(workers, min(config.train.batch_queries, seeds // 2))
    pairs = min(_PAIRS_A_QUERY, config.annotate.candidates_per_query)
    changes: dict[str, object] = {
        "run_dir": f"{config.run_dir.rstrip('/')}-probe",
        "corpus.source": str(folder),
        "corpus.limit": None,
        "evaluate.collection": str(folder),
        "plan.max_seeds_per_task": seeds,
        "annotate.candidates_per_query": pairs,
        "annotate.audit_queries": min(4, config.annotate.audit_queries),
        "assemble.held_out_share": 0.0,
        "train.batch_queries": batch,
        "train.task_batches": {},
        "train.small_tasks": "merge",
        "train.max_steps": _STEPS,
        "train.epochs": max(config.train.epochs, 2 * math.ceil(_STEPS * batch / seeds)),
        "train.validate_every": None,
        "train.keep": "last",
        "runtime.train.checkpoint_every": 10_000,
        "runtime.vectors_dir": None,
        "runtime.cost.max_cost": None,
    }
    for name, many in (("filter", documents), ("generate", seeds), ("rewrite", seeds)):
        changes |= _stage(config, name, rows=many)
    changes |= _stage(config, "annotate", rows=seeds * pairs)
    batch_rows = max(1, min(config.runtime.embed.batch_rows, documents // _BLOCKS))
    changes["runtime.embed.batch_rows"] = batch_rows
    return changed(config, changes, where="probe")


def write_sample(config: RunConfig, folder: Path, *, documents: int) -> int:
    """Writes every so-manieth document, and some evaluation queries with their gold, as BEIR's.

    Args:
        config: Names corpus and evaluation.
        folder: Made where it is not there.
        documents: How many, about.

    Returns:
        How many there are.

    Raises:
        CorpusError: The corpus cannot be read.
        EvaluationError: The evaluation cannot.
    """
    task = config.corpus.task
    table = read_corpus(config.corpus.source, task=task, limit=config.corpus.limit)
    found = load_collection(config.evaluate.collection, task=config.task_table[task])
    known = set(table.column("doc_id").to_pylist())
    gold: dict[str, dict[str, int]] = {}
    kept: set[str] = set()
    for query_id, judged in sorted(found.qrels.items()):
        if known.issuperset(judged) and len(kept | judged.keys()) <= documents // _GOLD_SHARE:
            gold[query_id], kept = dict(judged), kept | judged.keys()
    rows = np.unique(np.linspace(0, table.num_rows - 1, documents).astype(int))
    ids = table.column("doc_id").take(pa.array(rows)).to_pylist()
    wanted = kept.union(ids)
    chosen = [
        {"_id": row["doc_id"], "title": row["title"], "text": row["text"]}
        for row in table.select(["doc_id", "title", "text"]).to_pylist()
        if row["doc_id"] in wanted
    ]
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    _write_lines(folder / "corpus.jsonl", [json.dumps(row) for row in chosen])
    asked = [{"_id": query_id, "text": found.queries[query_id]} for query_id in gold]
    _write_lines(folder / "queries.jsonl", [json.dumps(row) for row in asked])
    lines = [f"{query}\t{doc}\t{n}" for query, docs in gold.items() for doc, n in docs.items()]
    _write_lines(folder / "qrels" / "test.tsv", ["query-id\tcorpus-id\tscore", *lines])
    return len(chosen)


def _write_lines(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _stage(config: RunConfig, name: str, *, rows: int) -> dict[str, object]:
    stage: LLMStageConfig | None = getattr(config, name)
    if stage is None:
        return {}
    batch = max(1, min(getattr(config.runtime, name).batch_rows, rows // _BLOCKS))
    return {f"{name}.max_failed_share": 1.0, f"runtime.{name}.batch_rows": batch}
