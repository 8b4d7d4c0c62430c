"""A run of eight documents, written without a model or a cluster."""

import json

from reasonembed.config import parse
from reasonembed.corpus import text_hash
from reasonembed.evaluation.excerpts import write_excerpts
from reasonembed.evaluation.metrics import evaluate_run
from reasonembed.evaluation.runs import write_run
from reasonembed.evaluation.scorecard import scorecard
from reasonembed.remixer.assemble import JUDGED_COLUMNS, Assembler, Inputs, SampleWriter
from reasonembed.remixer.plan import plan_seeds
from reasonembed.run import STAGES as ALL_STAGES
from reasonembed.run import Run
from reasonembed.schemas import from_rows

NUM_DOCS, VARIANTS = 8, 2
STAGES = tuple(stage for stage in ALL_STAGES if stage != "filter")


def llm(detail=None, *, model="m", tokens=10, finish_reason="stop", tries=1):
    return {
        "detail": detail,
        "finish_reason": finish_reason,
        "prompt_tokens": tokens,
        "cached_tokens": 0,
        "completion_tokens": 2,
        "tries": tries,
        "seed": 0,
        "model": model,
    }


class Builder:
    """A small run, written stage by stage as the jobs write it; no model, no cluster."""

    def __init__(self, folder, *, text="plain", engine="scripted", model="m", **settings):
        self.text, self.folder = text, folder
        llm_config = {"llm": {"model": model, "engine": engine}}
        annotate = llm_config | {"audit_queries": 2, "candidates_per_query": 3}
        self.run = Run(
            parse(
                {
                    "run_dir": str(folder / "run"),
                    "corpus": {"source": str(folder / "data")},
                    "plan": {"min_chars": 1, "variants": VARIANTS, "max_seeds_per_task": 4},
                    "generate": llm_config,
                    "mine": {"encoder": {"model": "miner-model"}},
                    "annotate": annotate,
                    "rewrite": llm_config,
                    "train": {"encoder": {"model": "backbone-model"}, "batch_queries": 2},
                    "evaluate": {"collection": str(folder / "data")},
                }
                | settings,
                where="test",
            )
        )
        self.run.dir.mkdir(parents=True)
        self._collection()

    def _collection(self):
        data = self.folder / "data"
        (data / "qrels").mkdir(parents=True)
        rows = [json.dumps({"_id": f"e{i}", "text": f"asked {i} {self.text}"}) for i in range(3)]
        (data / "queries.jsonl").write_text("\n".join(rows))
        qrels = "".join(f"e{i}\td{i}\t1\n" for i in range(3))
        (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)

    def make(self, *stages):
        for stage in stages:
            with self.run.timed(stage) as note:
                note["result"] = getattr(self, stage)() or {}
        return self

    def commit(self, kind, rows, *, inputs=(), part="part"):
        artifact = self.run.artifact(kind)
        identity = {f"input.{one}": self.run.artifact(one).stage().fingerprint for one in inputs}
        artifact.begin(identity | {"kind": kind}, version="0.1.0")
        table = rows if hasattr(rows, "num_rows") else from_rows(rows, artifact.schema, where=kind)
        artifact.commit(part, table)

    def corpus(self):
        rows = [
            {
                "doc_id": f"d{i}",
                "text": f"document {i} {self.text}",
                "title": self.text,
                "task": "generic",
                "parent_id": None,
                "text_hash": text_hash(str(i)),
                "group_id": f"g{i}",
            }
            for i in range(NUM_DOCS)
        ]
        self.commit("corpus", rows)

    def filter(self):
        probability = {"d1": 0.1, "d2": None}
        rows = [
            {
                "doc_id": f"d{i}",
                "task": "generic",
                "probability": probability.get(f"d{i}", 0.9),
                "status": "error" if i == 2 else "ok",
                **llm("refused" if i == 2 else None),
            }
            for i in range(1, NUM_DOCS)
        ]
        self.commit("domains", rows, inputs=["corpus"])

    def plan(self):
        corpus = self.run.artifact("corpus").read()
        plan = plan_seeds(corpus, self.run.config.plan, held_out={"d0"})
        self.commit("seeds", plan.seeds, inputs=["corpus"])
        return {f"not a seed: {key}": count for key, count in plan.funnel.items()}

    def generate(self):
        seeds = self.run.artifact("seeds").read().to_pylist()
        rows = [
            {
                "query_id": seed["query_id"],
                "query": f"query {number} {self.text}" if number > 1 else None,
                "source_doc_id": seed["source_doc_id"],
                "task": "generic",
                "status": "ok" if number > 1 else "filtered",
                **llm(None if number > 1 else f"{50 + number}% copied {self.text}"),
            }
            for number, seed in enumerate(seeds)
        ]
        self.commit("queries", rows, inputs=["seeds"])

    def usable(self):
        rows = self.run.artifact("queries").read().to_pylist()
        return [row for row in rows if row["status"] == "ok"]

    def embed(self):
        return {"document vectors": NUM_DOCS, "query vectors": len(self.usable())}

    def mine(self):
        rows = [
            {
                "query_id": row["query_id"],
                "source_doc_id": row["source_doc_id"],
                "task": "generic",
                "doc_ids": [f"d{i}" for i in range(NUM_DOCS) if f"d{i}" != row["source_doc_id"]],
                "scores": [0.5] * (NUM_DOCS - 1),
                "origins": [[{"retriever": "miner", "rank": 1 + i}] for i in range(NUM_DOCS - 1)],
                "num_excluded": 1,
                "source_rank": 1,
            }
            for row in self.usable()
        ]
        self.commit("candidates", rows, inputs=["queries"])

    def judgment(self, query_id, doc_id, label):
        detail = None if label else f"no grade {self.text}"
        return {
            "query_id": query_id,
            "doc_id": doc_id,
            "relevance_label": label,
            "expected_label": label and label + 0.25,
            "confidence": None,
            "analysis": f"analysis {self.text}",
            "votes": [label] if label else [],
            "quick_label": None,
            "route": "full",
            "status": "ok" if label else "invalid",
            **llm(detail),
        }

    def annotate(self):
        grades = {"d0": 5, "d1": 1, "d2": 2, "d3": None}
        rows = [
            self.judgment(row["query_id"], doc_id, grades.get(doc_id))
            for row in self.run.artifact("candidates").read().to_pylist()
            for doc_id in row["doc_ids"][:3]
        ]
        self.commit("judgments", rows, inputs=["candidates"])

    def audit(self):
        # e0: gold above the other; e1: below. Agreement is chance.
        rows = [
            self.judgment(f"e{query}", f"d{doc}", grade)
            for query, doc, grade in ((0, 0, 4), (0, 5, 2), (1, 1, 2), (1, 5, 4))
        ]
        self.commit("audit", rows, inputs=["corpus"])

    def rewrite(self):
        rows = [
            {
                "query_id": row["query_id"],
                "rewritten_query": f"{row['query']}\nthought {self.text}",
                "status": "ok",
                **llm(),
            }
            for row in self.usable()
        ]
        self.commit("rewrites", rows, inputs=["queries"])

    def assemble(self):
        made = {
            kind: self.run.artifact(kind).read(columns=columns)
            for kind, columns in (
                ("queries", None),
                ("candidates", None),
                ("judgments", JUDGED_COLUMNS),
                ("rewrites", None),
            )
        }
        assembler = Assembler(
            Inputs(**made, corpus=self.run.corpus_store()),
            config=self.run.config.assemble,
            tasks=self.run.config.task_table,
            max_query_similarity=1.0,
            max_source_rank=None,
        )
        artifact = self.run.artifact("samples")
        inputs = {f"input.{kind}": self.run.artifact(kind).stage().fingerprint for kind in made}
        artifact.begin(inputs, version="0.1.0")
        SampleWriter(artifact).write(assembler.samples(), name="samples")
        return assembler.funnel | {"train": 6}

    def train(self, steps=4):
        directory = self.run.directory("train")
        directory.begin({"input.samples": self.run.artifact("samples").stage().fingerprint})
        for step in range(steps):
            self.log(step, loss=3.0 - step / 10)
        directory.finish({"steps": steps})

    def log(self, step, **changed):
        names = "loss query_loss rewritten_loss intensity_min intensity_median intensity_max"
        names += " intensity_capped_share positive_rank grad_norm"
        row = dict.fromkeys(names.split(), 1.0)
        row |= {"step": float(step), "learning_rate": 1e-4, "step_s": 0.5, "tokens_per_s": 100.0}
        with (self.run.dir / "train" / "log.jsonl").open("a") as stream:
            stream.write(json.dumps(row | changed) + "\n")

    def export(self):
        self.run.directory("export").begin({})
        self.run.directory("export").finish({"weights": "w-trained"})

    def evaluate(self):
        right = {f"e{i}": {f"d{i}": 2.0, "d5": 1.0} for i in range(3)}
        wrong = {f"e{i}": {f"d{i}": 1.0, "d5": 2.0} for i in range(3)}
        after = wrong | {"e0": right["e0"]} | {"e1": {}}
        runs = {"bm25": right, "miner": wrong, "before": wrong, "after": after}
        qrels = self.run.collection.qrels
        measured = {name: evaluate_run(run, qrels) for name, run in runs.items()}
        card = scorecard(measured, self.run.collection, baseline="before", system="after")
        self.run.directory("evaluate").begin({})
        near = self.run.artifact("samples").read().column("query_id").to_pylist()
        closest = {f"e{i}": {near[i]: 0.9, near[i + 1]: 0.5} for i in range(3)}
        folder = self.run.dir / "evaluate"
        write_run(closest, folder / "closest.parquet", tag="closest")
        texts = {
            row["doc_id"]: row["text"] for row in self.run.artifact("corpus").read().to_pylist()
        }
        for name, found in runs.items():
            (folder / name).mkdir()
            write_excerpts(folder / name, self.run.collection, found, texts=lambda _: texts)
        self.run.directory("evaluate").finish(card)
