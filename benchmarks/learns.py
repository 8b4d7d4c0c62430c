"""Does training help, and do reasoning-intensity weights, on real questions?

    OMP_NUM_THREADS=2 python benchmarks/learns.py TheoremQA/ --cache runs/learns [--models minilm]

TheoremQA (github.com/TIGER-AI-Lab/TheoremQA, MIT): a question is a query, the theorem that it
applies is its document, and q′ is the question with GPT-4's solution. The folder holds
`theoremqa_test.json`, `all_theorems.json` and, from the repository's history, `llm_outputs/GPT4*`.

Theorems are split into train, development and test; a theorem of development or test is neither
positive nor negative in training. Questions with a picture are left out. Hard negatives are drawn
from the 16 training theorems that all-MiniLM-L6-v2 ranks highest, the positive left out.

Three systems: the model before, InfoNCE, RI-InfoNCE; the last two see the same batches for a seed
and differ in the weights alone. The learning rate is the one with which InfoNCE does best on the
development questions with a seed of its own; test questions choose nothing. All questions are
searched against all theorems.

A cell (model, system, rate, seed) is kept in `--cache` and never computed again. Prints a table and
writes `benchmarks/results/learns.json` and `learns.md`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from reasonembed import __version__
from reasonembed.ablation import interval
from reasonembed.config import EncoderConfig, LoRAConfig, TrainConfig, TrainRuntime, flatten
from reasonembed.embedder.contract import resolve_contract
from reasonembed.embedder.encode import Embedder
from reasonembed.evaluation.compare import compare_seeds
from reasonembed.evaluation.metrics import Run, evaluate_run
from reasonembed.evaluation.search import dense_run
from reasonembed.models import resolve
from reasonembed.redapter.batches import Sample, samples_from_rows
from reasonembed.redapter.export import export
from reasonembed.redapter.loop import train
from reasonembed.schemas import stable_hash

RESULTS = Path(__file__).parent / "results"
METRICS = ("ndcg@10", "recall@10")
SEEDS = 5
CHOOSING_SEED = 0
TEST_SHARE, DEVELOPMENT_SHARE = 0.35, 0.15
HARDEST = 16
INFO_NCE, RI = "InfoNCE", "RI-InfoNCE"


@dataclass(frozen=True)
class Model:
    """What is trained, and how; two cores decide lengths, layers and steps."""

    encoder: EncoderConfig
    lora: LoRAConfig | None
    rates: tuple[float, ...]
    steps: int


MODELS = {
    "minilm": Model(
        EncoderConfig(
            model="all-minilm-l6-v2",
            query_template="{query}",
            max_query_tokens=128,
            max_document_tokens=64,
        ),
        lora=None,
        rates=(5e-5, 2e-4),
        steps=20,
    ),
    "smollm2": Model(
        EncoderConfig(
            model="smollm2-135m-instruct",
            layers=4,
            query_template="Instruct: {instruction}\nQuery: {query}",
            max_query_tokens=128,
            max_document_tokens=64,
        ),
        lora=LoRAConfig(rank=32, alpha=64, dropout=0.1),
        rates=(1e-3, 2e-3),
        steps=30,
    ),
}
INSTRUCTION = "Given a question, retrieve the theorem that helps to answer it."


# ---- the data ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Questions and theorems; `split` by theorem."""

    questions: dict[str, str]
    rewritten: dict[str, str]
    theorem: dict[str, str]
    documents: dict[str, str]
    split: dict[str, str]

    def asked(self, part: str) -> list[str]:
        return [one for one in self.questions if self.split[self.theorem[one]] == part]


def read_data(folder: Path) -> Data:
    rows = [
        row
        for row in json.loads((folder / "theoremqa_test.json").read_text("utf-8"))
        if row["Picture"] is None
    ]
    texts = json.loads((folder / "all_theorems.json").read_text("utf-8"))
    documents = {name.lower(): f"{name}\n{text}" for name, text in texts.items()}
    (answers,) = sorted((folder / "llm_outputs").glob("GPT4*.jsonl"))
    lines = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
    solution = {line["id"]: line["rationale"] for line in lines}
    questions = {row["id"]: row["Question"] for row in rows}
    return Data(
        questions=questions,
        rewritten={one: f"{text}\n{solution[one]}" for one, text in questions.items()},
        theorem={row["id"]: row["theorem"].lower() for row in rows},
        documents=documents,
        split={name: part_of(name) for name in documents},
    )


def part_of(theorem: str) -> str:
    draw = int(stable_hash("split", theorem), 16) / 2**64
    if draw < TEST_SHARE:
        return "test"
    return "development" if draw < TEST_SHARE + DEVELOPMENT_SHARE else "train"


def make_samples(data: Data, miner: Embedder) -> list[Sample]:
    names = [name for name in data.documents if data.split[name] == "train"]
    asked = data.asked("train")
    ranked = search(miner, data, {one: data.questions[one] for one in asked}, names, k=HARDEST + 1)
    return samples_from_rows(
        {
            "query_id": one,
            "task": "theoremqa_theorems",
            "instruction": INSTRUCTION,
            "query": data.questions[one],
            "rewritten_query": data.rewritten[one],
            "positives": [passage(data, data.theorem[one], label=5.0)],
            "negatives": [
                passage(data, name, label=1.0) for name in ranked[one] if name != data.theorem[one]
            ][:HARDEST],
            "split": "train",
        }
        for one in asked
    )


def passage(data: Data, name: str, *, label: float) -> dict[str, object]:
    text = data.documents[name]
    return {"doc_id": name, "text": text, "label": label, "text_hash": stable_hash(text)}


def search(
    embedder: Embedder, data: Data, texts: dict[str, str], names: list[str], *, k: int
) -> Run:
    """Exact top k theorems of every question; `texts` by question."""
    queries_QD = embedder.encode_queries(list(texts.values()), instruction=INSTRUCTION)
    documents_ND = embedder.encode_documents([data.documents[name] for name in names])
    return dense_run(queries_QD, [(names, documents_ND)], query_ids=list(texts), excluded={}, k=k)


# ---- a cell -----------------------------------------------------------------------------------

Values = dict[str, dict[str, dict[str, float]]]
"""By part, metric, question."""


def measure(embedder: Embedder, data: Data, texts: dict[str, str]) -> Values:
    parts = {part: data.asked(part) for part in ("development", "test")}
    asked = {one: texts[one] for part in parts.values() for one in part}
    run = search(embedder, data, asked, list(data.documents), k=100)
    found = evaluate_run(run, {one: {data.theorem[one]: 1} for one in asked}).per_query
    return {
        part: {metric: {one: found[one][metric] for one in of} for metric in METRICS}
        for part, of in parts.items()
    }


def train_config(model: Model, *, steps: int, rate: float, seed: int, system: str) -> TrainConfig:
    return TrainConfig(
        encoder=model.encoder,
        lora=model.lora,
        batch_queries=32,
        group_size=2,
        max_steps=steps,
        learning_rate=rate,
        temperature=0.05,
        # As in the released code, weights begin a little before the warm-up is over.
        intensity_start_step=steps // 12 if system == RI else 1_000_000,
        masks=("known_positives", "equal_texts"),
        seed=seed,
    )


def trained(config: TrainConfig, samples: list[Sample], data: Data) -> tuple[Values, dict]:
    weights = resolve(config.encoder.model)
    last: dict = {}
    with tempfile.TemporaryDirectory(prefix="learns-") as name:
        began = time.perf_counter()
        result = train(
            config,
            samples,
            weights=weights,
            runtime=TrainRuntime(chunk_tokens=16_384, checkpoint_every=1_000_000),
            output_dir=Path(name),
            report=lambda metrics, _: last.update(metrics),
        )
        seconds = time.perf_counter() - began
        export(
            weights,
            result.weights_dir,
            result.contract,
            output_dir=Path(name) / "export",
            instruction=INSTRUCTION,
            golden_texts=list(data.documents.values())[:4],
        )
        embedder = Embedder.load_export(Path(name) / "export")
        return measure(embedder, data, data.questions), {"train_s": seconds, "last_step": last}


class Cells:
    """Results by what decides them, one file each."""

    def __init__(self, cache: Path, data: Data, samples: list[Sample]) -> None:
        self._cache, self._data, self._samples = cache, data, samples
        self._made_of = stable_hash(samples, asdict(data))
        cache.mkdir(parents=True, exist_ok=True)

    def trained(self, config: TrainConfig, label: str) -> dict:
        key = stable_hash(flatten(config), self._made_of)
        file = self._cache / f"{label.replace(' ', '-')}-{key}.json"
        if file.is_file():
            return json.loads(file.read_text())
        began = time.perf_counter()
        values, notes = trained(config, self._samples, self._data)
        cell = {"values": values, "notes": notes}
        scratch = file.with_suffix(".partial")
        scratch.write_text(json.dumps(cell))
        scratch.replace(file)
        shown = statistics.fmean(values["development"]["ndcg@10"].values())
        took = time.perf_counter() - began
        print(f"  {label}: development nDCG@10 {shown:.4f}, {took:.0f} s", flush=True)
        return cell


# ---- the comparison ---------------------------------------------------------------------------


def mean(cell: dict, part: str, metric: str) -> float:
    return statistics.fmean(cell["values"][part][metric].values())


def compare_systems(name: str, cells: Cells, data: Data, *, seeds: tuple[int, ...], steps: int):
    model = MODELS[name]
    steps = steps or model.steps

    def cell(rate: float, seed: int, system: str) -> dict:
        config = train_config(model, steps=steps, rate=rate, seed=seed, system=system)
        return cells.trained(config, f"{name} {system} {rate:g} seed {seed}")

    tried = {
        rate: mean(cell(rate, CHOOSING_SEED, INFO_NCE), "development", "ndcg@10")
        for rate in model.rates
    }
    rate = max(tried, key=lambda one: tried[one])
    weights = resolve(model.encoder.model)
    backbone = Embedder(weights, resolve_contract(weights, model.encoder))
    before = {"values": measure(backbone, data, data.questions)}
    reasoned = {"values": measure(backbone, data, data.rewritten)}
    found = {"before": [before] * len(seeds)} | {
        system: [cell(rate, seed, system) for seed in seeds] for system in (INFO_NCE, RI)
    }
    pairs = ((INFO_NCE, "before"), (RI, "before"), (RI, INFO_NCE))
    return {
        "model": model.encoder.model,
        "training": "full" if model.lora is None else f"LoRA rank {model.lora.rank}",
        "layers": model.encoder.layers or "all",
        "steps": steps,
        "learning_rate": rate,
        "development_by_rate": {f"{one:g}": figure for one, figure in tried.items()},
        "before_asked_with_rewritten": {one: mean(reasoned, "test", one) for one in METRICS},
        "systems": {
            system: {metric: [mean(one, "test", metric) for one in own] for metric in METRICS}
            for system, own in found.items()
        },
        "differences": {
            metric: {
                f"{a} - {b}": asdict(
                    compare_seeds(
                        *([one["values"]["test"][metric] for one in found[side]] for side in (a, b))
                    )
                )
                for a, b in pairs
            }
            for metric in METRICS
        },
        "train_s": [one["notes"]["train_s"] for one in (*found[INFO_NCE], *found[RI])],
        "last_steps": [one["notes"]["last_step"] for one in found[RI]],
    }


def markdown(results: dict[str, dict], *, num_test: int, num_documents: int) -> str:
    lines = []
    for one in results.values():
        seeds = len(one["systems"][RI]["ndcg@10"])
        what = f"{one['model']}, {one['training']}, {one['layers']} layers"
        lines += [
            f"{what}, {one['steps']} steps, {seeds} seeds; {num_test} questions, "
            f"{num_documents} theorems",
            "",
            "| system | nDCG@10 | recall@10 |",
            "|---|---|---|",
        ]
        for system, figures in one["systems"].items():
            cells = [show(figures[metric], is_fixed=system == "before") for metric in METRICS]
            lines.append(f"| {system} | {' | '.join(cells)} |")
        lines += [
            "",
            "| difference in nDCG@10 | mean | 95 % over queries | 95 % over seeds |",
            "|---|---|---|---|",
        ]
        for pair, found in one["differences"]["ndcg@10"].items():
            over = found["over_queries"]
            lines.append(
                f"| {pair.replace(' - ', ' − ')} | {over['mean_difference']:+.4f} "
                f"| {interval(over['low'], over['high'])} "
                f"| {interval(found['low'], found['high'])} |"
            )
        lines.append("")
    return "\n".join(lines)


def show(values: list[float], *, is_fixed: bool) -> str:
    spread = "" if is_fixed or len(values) < 2 else f" ± {statistics.stdev(values):.4f}"
    return f"{statistics.fmean(values):.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", type=Path, help="folder of TheoremQA")
    parser.add_argument("--cache", type=Path, required=True, help="finished cells")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--steps", type=int, default=0, help="another number, for a trial")
    parser.add_argument("--out", type=Path, default=RESULTS / "learns.json")
    arguments = parser.parse_args()
    if not (arguments.data / "theoremqa_test.json").is_file():
        print(f"skipped: {arguments.data} holds no theoremqa_test.json")
        return
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    transformers.utils.logging.disable_progress_bar()
    data = read_data(arguments.data)
    samples = make_samples(data, Embedder.load(MODELS["minilm"].encoder))
    counts = {part: len(data.asked(part)) for part in ("train", "development", "test")}
    print(f"questions {counts}, theorems {len(data.documents)}, samples {len(samples)}", flush=True)
    cells = Cells(arguments.cache, data, samples)
    seeds = tuple(range(1, arguments.seeds + 1))
    results = {
        name: compare_systems(name, cells, data, seeds=seeds, steps=arguments.steps)
        for name in arguments.models.split(",")
    }
    table = markdown(results, num_test=counts["test"], num_documents=len(data.documents))
    print(table)
    written = {
        "device": f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores, "
        "no accelerator",
        "versions": {
            "reasonembed": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "questions": counts,
        "theorems": len(data.documents),
        "models": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table)


if __name__ == "__main__":
    main()
