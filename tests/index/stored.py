"""Small indexes on disk."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from reasonembed.index.bm25 import BM25Index
from reasonembed.index.store import DOCUMENTS, About, BenchmarkQuery, StoredIndex, write_index

WORDS = ("dict", "keeps", "order", "of", "insertion", "loop", "removes", "keys", "ünïcode", "雪")


def documents(texts, *, groups=None, titles=None):
    """Rows of `DOCUMENTS`; equal texts share a group."""
    width = max(3, len(str(len(texts) - 1)))  # so that they are sorted
    numbers = {text: number for number, text in reversed(list(enumerate(texts)))}
    return pa.table(
        {
            "doc_id": [f"d{row:0{width}d}" for row in range(len(texts))],
            "title": titles or [None] * len(texts),
            "text": pa.array(texts, pa.large_string()),
            "group": pa.array(groups or [numbers[text] for text in texts], pa.int32()),
        },
        schema=DOCUMENTS,
    )


def about(**changes):
    values = {
        "name": "tiny",
        "model": "m",
        "fingerprint": "f00d",
        "task": "generic",
        "instruction": None,
        "identity": {"source": "x"},
    }
    return About(**values | changes)


def write(folder, table, vectors_ND=None, *, bm25=False, queries=()):
    def fill(out):
        out[:] = vectors_ND

    return write_index(
        folder,
        about(),
        table,
        dimension=0 if vectors_ND is None else vectors_ND.shape[1],
        fill=None if vectors_ND is None else fill,
        bm25=BM25Index(table.column("text").to_pylist()) if bm25 else None,
        queries=queries,
    )


def example(folder):
    """Twelve documents, of which 1, 4 and 7 are copies, with everything that an index can hold."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 5)) for _ in range(12)]
    texts[4] = texts[7] = texts[1]
    vectors_ND = rng.normal(size=(12, 4)).astype(np.float32)
    vectors_ND[[4, 7]] = vectors_ND[1]
    titles = [None, "A title", *[None] * 10]
    gold = BenchmarkQuery("q1", "why\u2028so?", {"d003": 2}, ("d001",))
    write(folder, documents(texts, titles=titles), vectors_ND, bm25=True, queries=[gold])
    return StoredIndex.load(folder)


coarse = st.integers(-2, 2).map(float)  # few values, so that ties are the rule
