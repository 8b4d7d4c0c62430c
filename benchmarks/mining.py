"""How fast is exact mining, against the limit and against what others use?

    OMP_NUM_THREADS=2 python benchmarks/mining.py [--queries 10000] [--documents 200000]

On the same vectors, top k with each query's source shut out (the peers shut out nothing and search
for one more):

- own: `index.exact.search`
- limit: the numpy matrix products of the same blocks on all cores, results thrown away
- FAISS: `IndexFlatIP.search`, as a reference
- hn_mine: the search of FlagEmbedding's `scripts/hn_mine.py` (batches of 64 queries against a flat
  FAISS index, then lists of floats and ids), written out here because the package wants other
  versions of its dependencies; its encoding and sampling are left out
- st_faiss, st: `sentence_transformers.util.mine_hard_negatives`, with and without FAISS, on a stub
  model that looks vectors up; needs the package `datasets`

Every method runs in a process of its own, rounds interleaved. Before anything is timed the ids are
compared: they must be equal except where scores are closer than rounding. Prints a table and writes
`benchmarks/results/mining.json`.
"""

import argparse
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

RESULT = Path(__file__).parent / "results" / "mining.json"
METHODS = ("limit", "own", "faiss", "hn_mine", "st_faiss", "st")
SLOW = ("hn_mine", "st_faiss", "st")  # one round is enough to say how slow
IMPORTS = {  # start-up is no part of what is timed
    "own": ["reasonembed.index.exact"],
    "limit": ["reasonembed.index.exact"],
    "faiss": ["faiss"],
    "hn_mine": ["faiss"],
    "st_faiss": ["faiss", "datasets", "sentence_transformers.util"],
    "st": ["datasets", "sentence_transformers.util"],
}
TIE = 1e-5  # scores of unit vectors that float32 products cannot tell apart


def make_vectors(folder: Path, *, queries: int, documents: int, dimension: int) -> None:
    """Clustered unit vectors, queries near their source, so that the top is as dense as in life."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((200, dimension), dtype=np.float32)
    noise = rng.standard_normal((documents, dimension), dtype=np.float32)
    documents_ND = centres[rng.integers(200, size=documents)] + 1.5 * noise
    documents_ND /= np.linalg.norm(documents_ND, axis=1, keepdims=True)
    source_Q = rng.choice(documents, queries, replace=False)
    noise = rng.standard_normal((queries, dimension), dtype=np.float32)
    queries_QD = documents_ND[source_Q] + 0.5 * noise / np.sqrt(dimension)
    queries_QD /= np.linalg.norm(queries_QD, axis=1, keepdims=True)
    np.save(folder / "documents.npy", documents_ND)
    np.save(folder / "queries.npy", queries_QD.astype(np.float32))
    np.save(folder / "sources.npy", source_Q)


def limit(queries_QD, documents_ND, source_Q, k):
    from reasonembed.index.exact import DOCUMENT_BLOCK, QUERY_BLOCK

    for low in range(0, len(queries_QD), QUERY_BLOCK):
        for start in range(0, len(documents_ND), DOCUMENT_BLOCK):
            queries_QD[low : low + QUERY_BLOCK] @ documents_ND[start : start + DOCUMENT_BLOCK].T


def own(queries_QD, documents_ND, source_Q, k):
    from reasonembed.index.exact import search

    return search(queries_QD, documents_ND, k=k, excluded=[[one] for one in source_Q.tolist()])[1]


def faiss(queries_QD, documents_ND, source_Q, k):
    import faiss

    index = faiss.IndexFlatIP(documents_ND.shape[1])
    index.add(documents_ND)
    return index.search(queries_QD, k + 1)[1]


def hn_mine(queries_QD, documents_ND, source_Q, k):
    import faiss

    # create_index and batch_search of FlagEmbedding/scripts/hn_mine.py
    index = faiss.IndexFlatIP(documents_ND.shape[1])
    index.add(np.asarray(documents_ND, dtype=np.float32))
    all_scores, all_inxs = [], []
    for start in range(0, len(queries_QD), 64):
        batch = queries_QD[start : start + 64]
        scores, inxs = index.search(np.asarray(batch, dtype=np.float32), k=k + 1)
        all_scores.extend(scores.tolist())
        all_inxs.extend(inxs.tolist())
    return all_inxs


def st_faiss(queries_QD, documents_ND, source_Q, k, use_faiss=True):
    import torch
    from datasets import Dataset
    from sentence_transformers.util import dot_score, mine_hard_negatives, pairwise_dot_score

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

    class Stub:
        device, prompts, model_card_data = torch.device("cpu"), {}, None
        similarity = staticmethod(dot_score)
        similarity_pairwise = staticmethod(pairwise_dot_score)

        def get_embedding_dimension(self):
            return documents_ND.shape[1]

        def encode_query(self, sentences, *_, convert_to_tensor=False, **__):
            table = queries_QD if sentences[0].startswith("q") else documents_ND
            found = table[[int(one[1:]) for one in sentences]]
            return torch.from_numpy(found) if convert_to_tensor else found

        encode = encode_document = encode_query

    mined = mine_hard_negatives(
        Dataset.from_dict(
            {
                "anchor": [f"q{row}" for row in range(len(queries_QD))],
                "positive": [f"d{source}" for source in source_Q.tolist()],
            }
        ),
        Stub(),
        corpus=[f"d{row}" for row in range(len(documents_ND))],
        range_max=k,
        num_negatives=k,
        sampling_strategy="top",
        output_format="n-tuple",
        batch_size=1_024,
        faiss_batch_size=1_024,
        use_faiss=use_faiss,
        verbose=False,
    )
    asked = [f"q{row}" for row in range(len(queries_QD))]
    assert list(mined["anchor"]) == asked, "queries are missing"
    names = [name for name in mined.column_names if name.startswith("negative")]
    return np.array([[int(one[1:]) for one in mined[name]] for name in names]).T


def st(queries_QD, documents_ND, source_Q, k):
    return st_faiss(queries_QD, documents_ND, source_Q, k, use_faiss=False)


def measure(method: str, folder: Path, k: int) -> None:
    """One method in this process: seconds, processor seconds, peak memory, and its ids."""
    arrays = [np.load(folder / f"{name}.npy") for name in ("queries", "documents", "sources")]
    for module in IMPORTS[method]:
        importlib.import_module(module)
    started, used = time.perf_counter(), time.process_time()
    found = globals()[method](*arrays, k)
    figures = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - used,
        "peak_mb": peak_mb(),
    }
    if found is not None:
        np.save(folder / f"{method}.npy", np.asarray(found))
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


def peak_mb() -> float:
    """Peak resident memory; `getrusage` would count the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run(method: str, folder: Path, k: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--method", method, "--folder", str(folder), "--k", str(k)]
    root = Path(__file__).parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{method}: {done.stderr[-2_000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_same(folder: Path, method: str) -> int:
    """Compares a method's ids with our own; gives how many differ, all of them ties by rounding."""
    own_QK, other_QK = np.load(folder / "own.npy"), np.load(folder / f"{method}.npy")
    arrays = [np.load(folder / f"{name}.npy") for name in ("queries", "documents", "sources")]
    queries_QD, documents_ND, source_Q = arrays
    differing = 0
    for row, (ours, theirs) in enumerate(zip(own_QK, other_QK, strict=True)):
        kept = theirs[theirs != source_Q[row]][: len(ours)]
        a, b = (documents_ND[one].astype(float) @ queries_QD[row] for one in (ours, kept))
        assert len(kept) == len(ours), f"{method}: query {row} has {len(kept)} results"
        assert np.abs(a - b).max() < TIE, f"{method}: query {row} has other results"
        differing += int((ours != kept).sum())
    return differing


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--method")
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.method:
        measure(arguments.method, Path(arguments.folder), arguments.k)
        return
    sizes = {name: getattr(arguments, name) for name in ("queries", "documents", "dimension")}
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    methods = arguments.methods.split(",")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_vectors(folder, **sizes)
        rounds = {method: [run(method, folder, arguments.k)] for method in methods}
        ties = {one: check_same(folder, one) for one in methods if one not in ("limit", "own")}
        for _ in range(arguments.rounds - 1):
            for method in methods:
                if method not in SLOW:
                    rounds[method].append(run(method, folder, arguments.k))
    report(rounds, ties, {**sizes, "k": arguments.k})


def report(rounds, ties, sizes) -> None:
    index_mb = sizes["documents"] * sizes["dimension"] * 4 / 2**20
    rows = {}
    for method, found in rounds.items():
        ratios = [
            one["seconds"] / base["seconds"]
            for one, base in zip(found, rounds["limit"], strict=False)
        ]
        rows[method] = {
            "seconds": statistics.median(one["seconds"] for one in found),
            "processor_seconds": statistics.median(one["processor_seconds"] for one in found),
            "ratio_to_limit": statistics.median(ratios),
            "peak_mb": max(one["peak_mb"] for one in found),
            "places_that_differ_by_rounding": ties.get(method),
            "rounds": len(found),
        }
    print(f"{sizes}, index {index_mb:.0f} MB, threads {os.environ['OMP_NUM_THREADS']}")
    print(f"{'method':>10} {'seconds':>9} {'cpu s':>9} {'x limit':>8} {'peak MB':>8} {'ties':>7}")
    for method, row in rows.items():
        place = row["places_that_differ_by_rounding"]
        place = "" if place is None else place
        print(
            f"{method:>10} {row['seconds']:9.2f} {row['processor_seconds']:9.2f} "
            f"{row['ratio_to_limit']:8.2f} {row['peak_mb']:8.0f} {place:>7}"
        )
    RESULT.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, no accelerator"
    written = {"device": machine, **sizes, "index_mb": round(index_mb), "methods": rows}
    RESULT.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
