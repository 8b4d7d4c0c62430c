"""How fast is it from vectors to metrics, against the limit and against what others do?

    OMP_NUM_THREADS=2 python benchmarks/evaluate.py [--queries 1000] [--documents 60000]

On the same vectors, with excluded documents for every query and a fifth of the corpus exact copies,
top 1,000 and then nDCG, MAP, recall and precision at 1, 5, 10, 25, 50 and 100 and the reciprocal
rank:

- own: `evaluation.search.dense_run`, then `evaluation.metrics.evaluate_run`
- limit: one numpy matrix product, -inf for what is excluded, `argpartition`, a sort of the 1,000,
  then our own metrics; keeps no promise about ties or rounding
- numpy: the same search, then pytrec_eval over the whole lists, as anyone would write it down
- mteb: `SearchEncoderWrapper._full_corpus_search` of mteb 2 (mteb/models/search_wrappers.py):
  50,000 documents at a time, `torch.topk`, a heap a query, then pytrec_eval as in
  `calculate_retrieval_scores`. That path excludes nothing; -inf is put in for it here, and its nAUC
  and its own MRR are left out, both in its favour
- mteb_ranked: `SearchEncoderWrapper._rerank_documents`, by which mteb's BRIGHT(v1.1) does exclude:
  for every query, all documents but the excluded ones are gathered and scored
- bright: `get_scores` and `calculate_retrieval_metrics` of BRIGHT's retrievers.py: all scores as
  Python lists, a dictionary of all documents and a full sort a query, then pytrec_eval. The lists
  are made 100 queries at a time, in its favour

Vectors hold whole numbers so small that every product is exact in float32: all methods see the same
scores, so all 25 metrics of each must agree to 1e-9, which is asserted before anything is timed
again. Every method runs in a process of its own, rounds in turn, ratios within a round. The goal:
own takes at most 1.3 times as long as numpy. Prints a table with the verdict and writes
`benchmarks/results/evaluate.json`.
"""

import argparse
import heapq
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

RESULT = Path(__file__).parent / "results" / "evaluate.json"
METHODS = ("limit", "own", "numpy", "mteb", "mteb_ranked", "bright")
SLOW = ("mteb_ranked", "bright")  # one round is enough to say how slow
IMPORTS = {  # start-up is no part of what is timed
    "own": ["reasonembed.evaluation.search", "reasonembed.evaluation.metrics"],
    "limit": ["reasonembed.evaluation.metrics"],
    "numpy": ["pytrec_eval"],
    "mteb": ["pytrec_eval", "torch"],
    "mteb_ranked": ["pytrec_eval", "torch"],
    "bright": ["pytrec_eval"],
}
CUTOFFS = (1, 5, 10, 25, 50, 100)
MEASURES = {"ndcg": "ndcg_cut", "map": "map_cut", "recall": "recall", "p": "P"}
TOLERANCE = 1e-9
GOAL = 1.3  # own to numpy, at most
BLOCK = 100  # queries whose scores BRIGHT's way holds as Python lists at a time
MTEB_CHUNK = 50_000  # its `corpus_chunk_size`


def make_data(folder: Path, *, queries: int, documents: int, dimension: int) -> None:
    """Clustered vectors of whole numbers, a fifth of them copies; gold and exclusions near them."""
    rng = np.random.default_rng(0)
    clusters = rng.integers(200, size=documents)
    centres = rng.standard_normal((200, dimension))
    vectors_ND = centres[clusters] + 1.5 * rng.standard_normal((documents, dimension))
    copies = rng.choice(documents, documents // 5, replace=False)
    originals = rng.integers(documents, size=len(copies))
    vectors_ND[copies], clusters[copies] = vectors_ND[originals], clusters[originals]
    sources = rng.choice(documents, queries, replace=False)
    queries_QD = vectors_ND[sources] + 1.5 * rng.standard_normal((queries, dimension))
    for name, vectors in (("queries", queries_QD), ("documents", vectors_ND)):
        # Sums of `dimension` products of at most 127 stay below 2^24, where float32 is exact.
        np.save(folder / f"{name}.npy", np.rint(vectors * 20).clip(-127, 127).astype(np.float32))
    qrels, excluded = {}, {}
    for number, source in enumerate(sources.tolist()):
        near = rng.permutation(np.flatnonzero(clusters == clusters[source])).tolist()
        gold = {source, *near[:5], *rng.integers(documents, size=2).tolist()}
        qrels[f"q{number}"] = {f"d{one}": 1 + one % 3 for one in gold}
        far = rng.integers(documents, size=2_000 if number % 10 == 0 else 20).tolist()
        excluded[f"q{number}"] = [f"d{one}" for one in {*near[5:30], *far} - gold]
    (folder / "judged.json").write_text(json.dumps([qrels, excluded]))


def own(queries_QD, documents_ND, query_ids, doc_ids, qrels, excluded, k):
    from reasonembed.evaluation.metrics import evaluate_run
    from reasonembed.evaluation.search import dense_run

    run = dense_run(
        queries_QD, [(doc_ids, documents_ND)], query_ids=query_ids, excluded=excluded, k=k
    )
    return evaluate_run(run, qrels).mean


def limit(queries_QD, documents_ND, query_ids, doc_ids, qrels, excluded, k):
    from reasonembed.evaluation.metrics import evaluate_run

    found = argpartition(queries_QD, documents_ND, query_ids, doc_ids, excluded, k)
    return evaluate_run(found, qrels).mean


def numpy(queries_QD, documents_ND, query_ids, doc_ids, qrels, excluded, k):
    return by_pytrec_eval(
        argpartition(queries_QD, documents_ND, query_ids, doc_ids, excluded, k), qrels
    )


def argpartition(queries_QD, documents_ND, query_ids, doc_ids, excluded, k):
    scores_QN = queries_QD @ documents_ND.T
    mask(scores_QN, query_ids, doc_ids, excluded)
    top_QK = np.argpartition(scores_QN, -k, axis=1)[:, -k:]
    scores_QK = np.take_along_axis(scores_QN, top_QK, axis=1)
    order_QK = np.argsort(-scores_QK, axis=1)
    top_QK = np.take_along_axis(top_QK, order_QK, axis=1)
    scores_QK = np.take_along_axis(scores_QK, order_QK, axis=1)
    return {
        query_id: dict(zip([doc_ids[one] for one in top], scores, strict=True))
        for query_id, top, scores in zip(
            query_ids, top_QK.tolist(), scores_QK.tolist(), strict=True
        )
    }


def mask(scores_QN, query_ids, doc_ids, excluded) -> None:
    positions = {doc_id: position for position, doc_id in enumerate(doc_ids)}
    for row, query_id in enumerate(query_ids):
        scores_QN[row, [positions[doc_id] for doc_id in excluded[query_id]]] = -np.inf


def by_pytrec_eval(run, qrels):
    """Means of all metrics over whole lists; the shared end of the others' ways."""
    import pytrec_eval

    cuts = ",".join(map(str, CUTOFFS))
    measures = {f"{name}.{cuts}" for name in MEASURES.values()} | {"recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(qrels, measures).evaluate(run)
    names = {f"{ours}@{k}": f"{theirs}_{k}" for ours, theirs in MEASURES.items() for k in CUTOFFS}
    names["recip_rank"] = "recip_rank"
    return {
        ours: sum(figures[theirs] for figures in found.values()) / len(found)
        for ours, theirs in names.items()
    }


def mteb(queries_QD, documents_ND, query_ids, doc_ids, qrels, excluded, k):
    import torch

    queries = torch.from_numpy(queries_QD)
    positions = {doc_id: position for position, doc_id in enumerate(doc_ids)}
    heaps = {query_id: [] for query_id in query_ids}
    for start in range(0, len(doc_ids), MTEB_CHUNK):
        chunk_ids = doc_ids[start : start + MTEB_CHUNK]
        scores = queries @ torch.from_numpy(documents_ND[start : start + MTEB_CHUNK]).T
        for row, query_id in enumerate(query_ids):
            out = [positions[one] - start for one in excluded[query_id]]
            scores[row, [one for one in out if 0 <= one < len(chunk_ids)]] = -torch.inf
        values, found = torch.topk(scores, min(k + 1, scores.shape[1]), dim=1, largest=True)
        found, values = found.tolist(), values.tolist()
        for row, query_id in enumerate(query_ids):
            for position, score in zip(found[row], values[row], strict=True):
                if len(heaps[query_id]) < k:
                    heapq.heappush(heaps[query_id], (score, chunk_ids[position]))
                else:
                    heapq.heappushpop(heaps[query_id], (score, chunk_ids[position]))
    run = {query_id: {one: score for score, one in heap} for query_id, heap in heaps.items()}
    return by_pytrec_eval(run, qrels)


def mteb_ranked(queries_QD, documents_ND, query_ids, doc_ids, qrels, excluded, k):
    import torch

    queries, documents = torch.from_numpy(queries_QD), torch.from_numpy(documents_ND)
    positions = {doc_id: position for position, doc_id in enumerate(doc_ids)}
    run = {}
    for row, query_id in enumerate(query_ids):
        out = set(excluded[query_id])
        ranked_ids = [doc_id for doc_id in doc_ids if doc_id not in out]
        indices = torch.tensor([positions[doc_id] for doc_id in ranked_ids])
        scores = queries[row].unsqueeze(0) @ documents[indices].T
        assert not torch.isnan(scores).any()
        values, found = torch.topk(scores, min(k, len(ranked_ids)), dim=1, largest=True)
        heap = []
        for position, score in zip(found[0].tolist(), values[0].tolist(), strict=True):
            heapq.heappush(heap, (score, ranked_ids[position]))
        run[query_id] = {doc_id: score for score, doc_id in heap}
    return by_pytrec_eval(run, qrels)


def bright(queries_QD, documents_ND, query_ids, doc_ids, qrels, excluded, k):
    run = {}
    for start in range(0, len(query_ids), BLOCK):
        scores = (queries_QD[start : start + BLOCK] @ documents_ND.T).tolist()
        for query_id, doc_scores in zip(query_ids[start : start + BLOCK], scores, strict=True):
            current = {}
            for doc_id, score in zip(doc_ids, doc_scores, strict=True):
                current[str(doc_id)] = score
            for doc_id in set(excluded[query_id]):
                if doc_id != "N/A":
                    current.pop(doc_id)
            run[query_id] = {}
            for doc_id, score in sorted(current.items(), key=lambda x: x[1], reverse=True)[:k]:
                run[query_id][doc_id] = score
    return by_pytrec_eval(run, qrels)


def measure(method: str, folder: Path, k: int) -> None:
    """One method in this process: seconds, processor seconds, peak memory, and its metrics."""
    queries_QD, documents_ND = (np.load(folder / f"{one}.npy") for one in ("queries", "documents"))
    qrels, excluded = json.loads((folder / "judged.json").read_text())
    doc_ids = [f"d{number}" for number in range(len(documents_ND))]
    for module in IMPORTS[method]:
        importlib.import_module(module)
    if "torch" in IMPORTS[method]:
        sys.modules["torch"].set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    started, used = time.perf_counter(), time.process_time()
    metrics = globals()[method](queries_QD, documents_ND, list(qrels), doc_ids, qrels, excluded, k)
    figures = {
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - used,
        "peak_mb": peak_mb(),
        "metrics": metrics,
    }
    sys.stdout.write("\n" + json.dumps(figures) + "\n")


def peak_mb() -> float:
    """Peak resident memory; `getrusage` would count the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def run(method: str, folder: Path, k: int) -> dict:
    command = [sys.executable, __file__, "--method", method, "--folder", str(folder), "--k", str(k)]
    root = Path(__file__).parent.parent
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(f"{method}: {done.stderr[-2_000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def check_same(rounds: dict) -> None:
    """Every method has all 25 metrics of the limit, to 1e-9, and they are neither 0 nor 1."""
    wanted = rounds["limit"][0]["metrics"]
    assert len(wanted) == 25 and 0.1 < wanted["ndcg@10"] < 0.9, wanted
    for method, found in rounds.items():
        metrics = found[0]["metrics"]
        assert metrics.keys() == wanted.keys(), method
        worst = max(wanted, key=lambda name: abs(metrics[name] - wanted[name]))
        difference = abs(metrics[worst] - wanted[worst])
        assert difference < TOLERANCE, f"{method}: {worst} differs by {difference}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--documents", type=int, default=60_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--k", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--method")
    parser.add_argument("--folder")
    arguments = parser.parse_args()
    if arguments.method:
        measure(arguments.method, Path(arguments.folder), arguments.k)
        return
    sizes = {name: getattr(arguments, name) for name in ("queries", "documents", "dimension")}
    assert sizes["dimension"] * 127**2 < 2**24, "products would not be exact in float32"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    methods = list(dict.fromkeys(["limit", *arguments.methods.split(",")]))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, **sizes)
        # The first round warms the disk's cache, checks that all agree, and counts for the slow.
        first = {method: [run(method, folder, arguments.k)] for method in methods}
        check_same(first)
        rounds = {method: first[method] if method in SLOW else [] for method in methods}
        for _ in range(arguments.rounds):
            for method in methods:
                if method not in SLOW:
                    rounds[method].append(run(method, folder, arguments.k))
    report(rounds, {**sizes, "k": arguments.k}, first["limit"][0]["metrics"], arguments.out)


def ratios(found: list, base: list) -> list[float]:
    """Of each round to the limit of that round; a slow method has one, to the median limit."""
    if len(found) == len(base):
        return [one["seconds"] / other["seconds"] for one, other in zip(found, base, strict=True)]
    return [found[0]["seconds"] / statistics.median(one["seconds"] for one in base)]


def interval(values: list[float]) -> list[float]:
    """95 % bootstrap interval of the median."""
    drawn = np.random.default_rng(0).choice(values, (10_000, len(values)))
    return np.quantile(np.median(drawn, axis=1), [0.025, 0.975]).tolist()


def report(rounds, sizes, metrics, out) -> None:
    rows = {}
    for method, found in rounds.items():
        row = {
            name: statistics.median(one[name] for one in found)
            for name in ("seconds", "processor_seconds")
        }
        for base in ("limit", "numpy"):
            if base in rounds:
                against = ratios(found, rounds[base])
                row[f"ratio_to_{base}"] = statistics.median(against)
                row[f"ratio_to_{base}_95"] = interval(against)
        rows[method] = {
            **row,
            "peak_mb": max(one["peak_mb"] for one in found),
            "rounds": len(found),
        }
    print(f"{sizes}, threads {os.environ['OMP_NUM_THREADS']}, nDCG@10 {metrics['ndcg@10']:.5f}")
    print(f"{'method':>12} {'seconds':>8} {'cpu s':>8} {'x limit':>8} {'95 %':>14} {'peak MB':>8}")
    for method, row in rows.items():
        low, high = row["ratio_to_limit_95"]
        print(
            f"{method:>12} {row['seconds']:8.2f} {row['processor_seconds']:8.2f} "
            f"{row['ratio_to_limit']:8.2f} {low:6.2f} to {high:4.2f} {row['peak_mb']:8.0f}"
        )
    if goal := verdict(rows):
        print(goal)
    out.parent.mkdir(exist_ok=True)
    machine = f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, no accelerator"
    models = [one for one in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in one]
    machine = ", ".join([machine, *{one.split(":")[1].strip() for one in models}])
    written = {"device": machine, **sizes, "metrics": metrics, "methods": rows}
    written["goal"] = f"own / numpy <= {GOAL}"
    out.write_text(json.dumps(written, indent=1) + "\n")


def verdict(rows: dict) -> str:
    """Whether our own way met its goal; empty where one of the two was not timed."""
    if not {"own", "numpy"} <= rows.keys():
        return ""
    ratio, (low, high) = (rows["own"][f"ratio_to_numpy{end}"] for end in ("", "_95"))
    met = "met" if ratio <= GOAL else "MISSED"
    return f"own / numpy {ratio:.2f}, {low:.2f} to {high:.2f}: <= {GOAL} {met}"


if __name__ == "__main__":
    main()
