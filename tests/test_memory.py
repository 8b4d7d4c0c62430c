"""Embedding and mining need the same memory for a corpus of 1, 4 and 16 times the size.

Each role of the pipeline (a worker that embeds, one that looks for near-duplicates of the sources,
one that searches, the driver that plans and merges) runs in a process of its own, whose data may
not grow beyond a limit below the size of the largest corpus, vectors included.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from reasonembed.artifacts import Artifact
from tests.remixer.fakes import corpus_table

ROOT = Path(__file__).parent.parent
DOCUMENTS, SIZES = 2_048, (1, 4, 16)
DIMENSION, WORDS, QUERIES = 3_072, 80, 64
GROWTH = 1.3  # largest peak of a role over its smallest
LIMIT_BYTES = 300 * 2**20

ROLES = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
import numpy as np
import pyarrow as pa
from reasonembed.artifacts import Artifact
from reasonembed.embedder.vectors import EmbedPlanned
from reasonembed.index.places import by_row_group, locate
from reasonembed.index.shards import (
    CommittedHits, ShardSearch, block_keys, block_rows, group_queries, plan_shards,
)
from reasonembed.remixer.mine import (
    SourceIndex, plan_queries, read_documents, shut_out, texts_at, texts_of,
)
from reasonembed.schemas import ARTIFACTS, embeddings
from reasonembed.tasks import TASKS

pa.set_cpu_count(1)
folder, role, k = Path(sys.argv[1]), sys.argv[2], 20
corpus = Artifact.declared(folder / "corpus", "corpus")
vectors = Artifact(folder / "vectors", schema=embeddings(DIMENSION), key=("id",), name="stub")
hits = Artifact(folder / "hits", name="hits", **vars(ARTIFACTS["hits"]))


class Stub:
    def encode_documents(self, texts):
        seeds = [len(text) + sum(text.encode()[:64]) for text in texts]
        return np.stack(
            [np.random.default_rng(seed).standard_normal(DIMENSION, np.float32) for seed in seeds]
        )

    def encode_queries(self, texts, *, instruction=""):
        return self.encode_documents(texts)


def queries(documents):
    ids = documents.doc_ids.take(pa.array(range(QUERIES))).to_pylist()
    return pa.table({
        "query_id": [f"q{i}" for i in range(QUERIES)],
        "query": [f"why {i}" for i in range(QUERIES)],
        "source_doc_id": ids,
        "task": ["generic"] * QUERIES,
    })


def embed():
    documents = read_documents(corpus)
    places = documents.table.rename_columns({"text_id": "id"}).sort_by([
        (name, "ascending") for name in ("part", "group", "chars", "id")
    ])
    places = places.append_column("corpus", pa.repeat(corpus.uri, places.num_rows))
    planned = plan(documents)
    texts = pa.table({"id": planned["text_id"], "text": planned["query"],
                      "instruction": [""] * QUERIES})
    embedder = EmbedPlanned(Stub(), vectors.schema)
    everything = pa.concat_tables([places, texts], promote_options="default")
    for start in range(0, everything.num_rows, 256):
        vectors.commit(f"a-{start:06d}", embedder(everything.slice(start, 256)))


def near_duplicates():
    documents = read_documents(corpus)
    sources = np.unique(documents.positions(queries(documents)["source_doc_id"].to_pylist()))
    index = SourceIndex(texts_at(corpus, documents.table.take(sources)), max_similarity=0.8)
    found = [
        one.where[row]
        for one in by_row_group(documents.table)
        for row, text in enumerate(texts_of(corpus, one))
        if index.sources_of(text)
    ]
    assert sorted(found) == sources.tolist()  # each repeats itself, and no text another


def plan(documents):
    asked = queries(documents)
    sources = np.unique(documents.positions(asked["source_doc_id"].to_pylist()))
    shut = shut_out(documents, sources.tolist(), near=[], exclude_ids=None)
    return plan_queries(asked, documents, shut, tasks=TASKS)


def prepare():
    documents = read_documents(corpus)
    located = locate(vectors)
    shards = plan_shards(documents.table, located, name="stub", max_documents=2048)
    (block,) = group_queries(plan(documents), [], k=k, max_queries=QUERIES)
    keys = block_keys(block, shards, name="stub", k=k)
    return documents, shards, block_rows(block, located, name="stub"), keys


def search():
    documents, shards, rows, keys = prepare()
    tables = {shard.key: shard.rows for shard in shards} | dict.fromkeys(keys, rows)
    searcher = ShardSearch(vectors, shard=tables.get, block=tables.get, k=k)
    for number, (shard, key) in enumerate(zip(shards, keys, strict=True)):
        pair = pa.table({"shard": [shard.key], "query_block": [key]})
        hits.commit(f"a-{number:03d}", searcher(pair))


def merge():
    documents, shards, rows, keys = prepare()
    pairs = [(shard.key, key) for shard, key in zip(shards, keys, strict=True)]
    scores, positions = CommittedHits(hits).merged(pairs, doc_ids=documents.doc_ids, k=k)
    assert (positions >= 0).all(), positions
    sources = documents.positions(plan(documents)["source_doc_id"].to_pylist())
    assert not (positions == sources[:, None]).any()


globals()[role]()
status = Path("/proc/self/status").read_text().splitlines()
# Not `getrusage`, which counts the process that started this one.
print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))
"""


def write_corpus(folder: Path, size: int) -> int:
    """Commits it in parts of one row group, as a corpus that grew; gives its bytes."""
    artifact, rng = Artifact.declared(folder / "corpus", "corpus"), np.random.default_rng(size)
    total = 0
    for part in range(size):
        words = rng.integers(0, 10**9, (DOCUMENTS, WORDS)).astype(str)
        texts = {f"d{part:02d}-{i:05d}": " ".join(row) for i, row in enumerate(words.tolist())}
        total += sum(map(len, texts.values())) + len(texts) * DIMENSION * 4
        artifact.commit(f"corpus-{part:06d}", corpus_table(texts))
    return total


def peak(folder: Path, role: str) -> int:
    constants = {"LIMIT": LIMIT_BYTES, "DIMENSION": DIMENSION, "QUERIES": QUERIES}
    code = "".join(f"{name} = {value}\n" for name, value in constants.items()) + ROLES
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), role],
        cwd=ROOT,
        env={
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONHASHSEED": "0",
            "ARROW_DEFAULT_MEMORY_POOL": "system",
            "MALLOC_ARENA_MAX": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_corpus_of_16_times_the_size_needs_the_same_memory(tmp_path):
    peaks: dict[str, list[int]] = {}
    largest = 0
    for size in SIZES:
        folder = tmp_path / str(size)
        largest = write_corpus(folder, size)
        for role in ("embed", "near_duplicates", "search", "merge"):
            peaks.setdefault(role, []).append(peak(folder, role))
    assert largest > LIMIT_BYTES
    growth = {role: max(found) / min(found) for role, found in peaks.items()}
    assert max(growth.values()) < GROWTH, {
        role: [f"{one >> 20} MB" for one in found] for role, found in peaks.items()
    }
