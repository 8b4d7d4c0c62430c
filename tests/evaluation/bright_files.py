"""Small files in the forms that BRIGHT comes in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ODD = 'ô\u2019s_"page"/ü_0.txt'
BIOLOGY = [
    {
        "query": "Why?\n\nReally why?",
        "reasoning": "notes of a person",
        "id": "0",
        "excluded_ids": ["N/A"],
        "gold_ids_long": ["a/page.txt"],
        "gold_ids": ["a/page_1.txt", "a/page_2.txt", "a/page_1.txt"],
        "gold_answer": "N/A",
    },
    {
        "query": "How?",
        "reasoning": "",
        "id": "1",
        "excluded_ids": ["N/A"],
        "gold_ids_long": ["a/page.txt", "b.txt"],
        "gold_ids": [ODD],
        "gold_answer": "N/A",
    },
]
LEETCODE = [
    {
        "query": "Trap rain.",
        "reasoning": "empty",
        "id": "0",
        "excluded_ids": ["leetcode/42.txt", "in_no_corpus.txt"],
        "gold_ids_long": ["N/A"],
        "gold_ids": ["leetcode/11.txt"],
        "gold_answer": "N/A",
    },
]
TASKS = {"biology": BIOLOGY, "leetcode": LEETCODE}
BIOLOGY_IDS = ["a/page_1.txt", "a/page_2.txt", ODD, "a/page_3.txt"]


def write_table(folder: Path, name: str, rows: list[dict[str, Any]], *, form: str) -> None:
    """Writes a table as `parquet`, `shards`, `jsonl` or `jsonl.gz`."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    elif form == "shards":
        schema = pa.Table.from_pylist(rows).schema
        for number, part in enumerate((rows[:1], rows[1:])):
            table = pa.Table.from_pylist(part, schema=schema)
            pq.write_table(table, folder / f"{name}-{number:05d}-of-00002.parquet")
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        content = gzip.compress(text) if form == "jsonl.gz" else text
        (folder / f"{name}.{form}").write_bytes(content)


def write_bright(data_dir: Path, *, form: str = "parquet", **tables: list[dict[str, Any]]) -> Path:
    """`bright/` with queries of two tasks, or of those given; `topics` is Anserini's form.

    Returns:
        The folder `bright`.
    """
    folder = data_dir / "bright"
    for task, rows in (tables or TASKS).items():
        if form == "topics":
            name = f"topics.bright-{task.replace('_', '-')}-original"
            write_table(folder, name, rows, form="jsonl.gz")
        else:
            write_table(folder / "examples", task, rows, form=form)
    return folder


def write_documents(folder: Path, task: str, ids: list[str], *, form: str = "shards") -> None:
    """`documents/<task>` with texts that tell the ids."""
    rows = [{"id": doc_id, "content": f"text of {doc_id}"} for doc_id in ids]
    write_table(folder / "documents", task, rows, form=form)
