"""The model card: `README.md` of an exported model, in the form that the hub reads.

Says what the run's records say and no more: what was not measured is said to be so. Written when
the model is exported and again with every report, when evaluation and contamination are known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from reasonembed import __version__
from reasonembed.config import PAPER_TASK_BATCHES, TaskBatch
from reasonembed.corpus import PYTHON_STDLIB
from reasonembed.embedder.contract import CONTRACT_FILE, Pooling, TokenisationContract
from reasonembed.embedder.tokenisation import apply_template
from reasonembed.errors import ModelError, ReasonEmbedError, StorageError
from reasonembed.remixer.assemble import TRAIN
from reasonembed.remixer.contamination import CHECKS
from reasonembed.report.charts import number
from reasonembed.report.facts import METRICS, SYSTEMS, Facts, signed
from reasonembed.run import Run
from reasonembed.schemas import Status
from reasonembed.storage import Place, is_uri, last_part

CARD_FILE = "README.md"
UNKNOWN = "unknown"
_SHOWN = ("ndcg@10", "recall@100", "recip_rank")
_PLURALS = {"query": "queries", "gold document": "gold documents"}
_TAGS = ("sentence-transformers", "feature-extraction", "retrieval", "reasoning", "reasonembed")


def write_card(facts: Facts) -> Place | None:
    """Writes the exported model's card, over an earlier one; None where no model is exported.

    Raises:
        StorageError: The file cannot be written.
        ModelError: The model's contract cannot be read.
    """
    folder = facts.run.model_place
    if not (folder / CONTRACT_FILE).is_file():
        return None
    file = folder / CARD_FILE
    file.write(card(facts).encode())
    return file


def card(facts: Facts) -> str:
    """The card of the run's model, front matter and text."""
    contract = _contract(facts.run.model_place)
    base, licence = _base(facts)
    sections = {
        "How to use it": _use(facts, contract),
        "Base model and licence": _origin(facts, base, licence),
        "Training data": "\n".join(f"- {line}" for line in _descent(facts)),
        "Contamination": _contamination(facts),
        "Training": _training(facts),
        "Evaluation": _evaluation(facts),
        "Limits": _limits(facts, contract),
    }
    parts = [
        f"---\n{_front_matter(base, licence, languages=_languages(facts))}---",
        f"# {facts.run.name}",
        _summary(facts, contract),
        *(f"## {title}\n\n{text}" for title, text in sections.items()),
        f"Written by reasonembed {__version__} from the run's own records.",
    ]
    return "\n\n".join(parts) + "\n"


def _contract(folder: Place) -> TokenisationContract:
    try:
        data = json.loads((folder / CONTRACT_FILE).read() or b"")
    except (StorageError, ValueError) as error:
        raise ModelError(f"cannot read {folder / CONTRACT_FILE}: {error}") from error
    return TokenisationContract.from_json(data)


# ---- what it comes from ---------------------------------------------------------------------


def _base(facts: Facts) -> tuple[str | None, str]:
    """Hub id of the base model, None where it has none, and its licence.

    A model that was trained on from an export of ours has that export's base.
    """
    name = facts.config.train.encoder.model
    said = _front_matter_of(_beside(name, CARD_FILE))
    licence = said.get("license") or _json_of(_beside(name, "config.json")).get("license")
    base = said.get("base_model") if Path(name).expanduser().is_dir() else name
    return (base if _is_hub_id(base) else None), str(licence or UNKNOWN)


def _beside(name: str, file: str) -> Path | None:
    """A file of a model, if it is on this machine; a report downloads nothing."""
    found: Path | None = Path(name).expanduser() / file
    if not Path(name).expanduser().is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(name, file) if _is_hub_id(name) else None
        found = Path(cached) if isinstance(cached, str) else None
    return found if found and found.is_file() else None


def _is_hub_id(name: object) -> bool:
    return isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/"))


def _front_matter_of(file: Path | None) -> dict[str, Any]:
    """What stands in a card's front matter; empty where there is none."""
    if file is None:
        return {}
    head, _, rest = file.read_text(encoding="utf-8", errors="replace").partition("---\n")
    matter, end, _ = rest.partition("\n---")
    try:
        found = yaml.safe_load(matter) if end and not head.strip() else None
    except yaml.YAMLError:  # somebody else's card
        found = None
    return found if isinstance(found, dict) else {}


def _json_of(file: Path | None) -> dict[str, Any]:
    found = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _languages(facts: Facts) -> list[str]:
    """Of the texts that it was trained on; empty where nothing says so."""
    is_stdlib = facts.config.corpus.source == PYTHON_STDLIB and not facts.config.assemble.sources
    return ["en"] if is_stdlib else []


def _front_matter(base: str | None, licence: str, *, languages: list[str]) -> str:
    matter: dict[str, Any] = {"language": languages} if languages else {}
    matter |= {
        "license": licence,
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": list(_TAGS),
    }
    if base is not None:
        matter["base_model"] = base
    return yaml.safe_dump(matter, sort_keys=False, allow_unicode=True)


def _origin(facts: Facts, base: str | None, licence: str) -> str:
    name = facts.config.train.encoder.model
    is_place = is_uri(name) or Path(name).is_absolute()
    start = f"Training began with `{last_part(name) if is_place else name}`"
    chain = f", which descends from `{base}`" if base and base != name else ""
    if licence == UNKNOWN:
        said = "The base model's files do not say its licence: it is unknown, look it up before use"
    else:
        said = f"The base model's card names the licence `{licence}`"
    return f"{start}{chain}. {said}. The training data may have terms of its own."


def _descent(facts: Facts) -> Iterator[str]:
    """Where the samples come from, one statement a line."""
    run = facts.run
    if run.config.assemble.sources:
        for source in run.config.assemble.sources:
            yield f"Samples were imported from `{last_part(source.path)}` (form `{source.form}`)"
            if source.form == "run":
                yield from _descent_of_run(source.path)
    else:
        yield from _made(facts)
    table = facts.rows("samples", "split")
    if table is not None:
        splits = table.column("split").to_pylist()
        trained = splits.count(TRAIN)
        yield (f"Samples: {number(trained)} to train on, {number(len(splits) - trained)} held out")


def _descent_of_run(path: str) -> Iterator[str]:
    try:
        yield from _descent(Facts(Run.existing(path)))
    except (ReasonEmbedError, OSError):
        yield f"How the samples of `{last_part(path)}` were made cannot be read any more"


def _made(facts: Facts) -> Iterator[str]:
    corpus = facts.config.corpus
    documents = _num_rows(facts, "corpus")
    yield f"Corpus: `{Path(corpus.source).name}` (task `{corpus.task}`), {documents} documents"
    queries = facts.rows("queries", "status")
    if queries is not None:
        usable = queries.column("status").to_pylist().count(Status.OK)
        yield f"Queries: {number(usable)}, written from documents of the corpus by a language model"
    for model, work in facts.llms():
        yield f"Language model `{model}`: {work}"
    yield f"Candidates were mined with `{last_part(facts.config.mine.encoder.model)}`"


def _num_rows(facts: Facts, kind: str) -> str:
    commits = facts.run.artifact(kind).commits()
    return number(sum(commit.rows for commit in commits)) if commits else "(not recorded)"


def _contamination(facts: Facts) -> str:
    """What the report has found; searching takes long, so only a report does it."""
    if facts.contamination is None:
        return "Not measured."
    lines = []
    for found in facts.contamination:
        for check in CHECKS:
            parts = [
                f"{number(len(count.benchmark_ids))} {_PLURALS[kind]} in the {part} texts"
                for (one, kind, part), count in sorted(found.counts.items())
                if one == check
            ]
            said = "; ".join(parts) or "nothing found"
            lines.append(f"- `{found.benchmark.name}`, {check}: {said}")
    return "\n".join(lines) or "Not measured: no benchmark could be read."


# ---- how it was trained and what came of it -------------------------------------------------


def _training(facts: Facts) -> str:
    config = facts.config.train
    made = facts.run.directory("train").finished() or {}
    lora, shapes = config.lora, _shapes(facts)
    rows = {
        "objective": _objective(facts, made.get("step kept", made.get("steps", 0))),
        "adapters": f"LoRA, rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g}, merged"
        if lora
        else "none: all weights were trained",
        "queries in a step": _each({task: one.batch_queries for task, one in shapes.items()}),
        "passages a query": f"{_each({task: one.group_size for task, one in shapes.items()})}, "
        "those of the other queries as negatives too",
        "epochs": "not counted: the number of steps was given"
        if config.max_steps
        else config.epochs,
        "steps": made.get("steps", "not recorded"),
        **_kept(facts, made),
        "last loss": made.get("loss", "not recorded"),
        "learning rate": f"{config.learning_rate:g}",
        "temperature": f"{config.temperature:g}",
        "tokens of a query, of a document": f"{config.encoder.max_query_tokens}, "
        f"{config.encoder.max_document_tokens}",
        "seed": config.seed,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    whole = yaml.safe_dump(
        config.model_dump(mode="json", exclude={"encoder": {"model"}}), sort_keys=False
    )
    return (
        f"| | |\n|---|---|\n{table}\n\n<details><summary>All settings</summary>\n\n"
        f"```yaml\n{whole}```\n\n</details>"
    )


def _objective(facts: Facts, steps: int) -> str:
    """The loss that the exported weights have seen in `steps` steps."""
    start = facts.config.train.intensity_start_step
    samples = _trained_on(facts, "query", "rewritten_query") if start < steps else None
    if samples is None:
        return "InfoNCE"
    is_rewritten = pc.not_equal(samples["query"], samples["rewritten_query"])
    if not pc.any(is_rewritten).as_py():
        return "InfoNCE"
    return (
        "InfoNCE; samples with a rewritten query weigh by reasoning intensity from step "
        f"{number(start)} on"
    )


def _trained_on(facts: Facts, *columns: str) -> pa.Table | None:
    """Columns of the samples that are not held out; None where there are no samples any more."""
    samples = facts.rows("samples", "split", *columns)
    return None if samples is None else samples.filter(pc.field("split") == TRAIN)


def _shapes(facts: Facts) -> dict[str, TaskBatch]:
    """Batch shape of each task that was trained on."""
    config = facts.config.train
    common = TaskBatch(batch_queries=config.batch_queries, group_size=config.group_size)
    own = PAPER_TASK_BATCHES if config.task_batches == "paper" else config.task_batches
    samples = _trained_on(facts, "task")
    tasks = Counter(() if samples is None else samples["task"].to_pylist())
    shapes = {task: own.get(task, common) for task in tasks or [facts.config.corpus.task]}
    if config.small_tasks == "merge":
        small = {task for task in tasks if tasks[task] < shapes[task].batch_queries}
        shapes |= dict.fromkeys(small, common)
    return dict(sorted(shapes.items()))


def _each(figures: Mapping[str, int]) -> str:
    """A figure, with the tasks that have it where they differ."""
    tasks: dict[int, list[str]] = {}
    for task, figure in figures.items():
        tasks.setdefault(figure, []).append(f"`{task}`")
    if len(tasks) == 1:
        return str(*tasks)
    return "; ".join(f"{figure} of {', '.join(names)}" for figure, names in tasks.items())


def _kept(facts: Facts, made: Mapping[str, Any]) -> dict[str, str]:
    if facts.config.train.keep != "best":
        return {}
    return {"step kept": f"{made.get('step kept', 'not recorded')}, the best by held-out nDCG@10"}


def _evaluation(facts: Facts) -> str:
    found = facts.scorecard
    if found is None:
        return "Not evaluated yet."
    head = " | ".join(METRICS[metric] for metric in _SHOWN)
    rows = [
        f"| {SYSTEMS.get(name, name)} | "
        + " | ".join(number(figures[metric], 4) for metric in _SHOWN)
        + " |"
        for name, figures in found["systems"].items()
    ]
    config, paired = facts.config, found["comparison"]
    encoder = config.train.encoder
    return (
        f"Collection `{found['collection']}`, {number(found['queries'])} queries; exact search by "
        f"cosine over the whole corpus, the best {number(config.evaluate.top_k)} of each query; "
        f"{encoder.max_query_tokens} tokens of a query, {encoder.max_document_tokens} of a "
        "document; metrics as trec_eval computes them, means over queries.\n\n"
        f"| | {head} |\n|---|{'---|' * len(_SHOWN)}\n" + "\n".join(rows) + "\n\n"
        f"After minus before training in nDCG@10, paired over queries: "
        f"{signed(paired['mean_difference'])}, 95 % interval {signed(paired['low'])} to "
        f"{signed(paired['high'])} (bootstrap over queries)."
    )


def _summary(facts: Facts, contract: TokenisationContract) -> str:
    is_bare = contract.document_template == "{document}"
    kept = "stay bare" if is_bare else f"stand in `{contract.document_template!r}`"
    return (
        "A text embedding model for retrieval where a query and what answers it share few words: "
        f"`{last_part(facts.config.train.encoder.model)}`, trained with ReasonEmbed "
        f"(arXiv:2510.08252). Vectors have {contract.dimension} numbers"
        f"{' and length 1' if contract.normalise else ''}; compare them by cosine. Queries carry "
        f"an instruction, documents {kept}."
    )


def _limits(facts: Facts, contract: TokenisationContract) -> str:
    lines = [
        f"Texts are cut: queries after {contract.max_query_tokens} tokens with their instruction, "
        f"documents after {contract.max_document_tokens}.",
        "It knows one way of writing queries, that of the template; other instructions than those "
        "it was trained with were not measured.",
        "Queries and labels that language models have written carry those models' mistakes and "
        "habits."
        if not facts.config.assemble.sources
        else "What is wrong in the imported samples was learnt with them.",
        "Figures are of the collection named above and of one training run; they say little of "
        "other languages and domains.",
    ]
    return "\n".join(f"- {line}" for line in lines)


# ---- how to use it --------------------------------------------------------------------------

_PLACE = "path/to/this/folder"
_SENTENCE_TRANSFORMERS = """\
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{place}")
queries = model.encode(["why is my loop slow?"], prompt_name="query")
documents = model.encode(["Appending to a list takes constant time."]{as_document})
print(model.similarity(queries, documents))"""
_POOLED = {
    Pooling.LAST: """\
    last = batch["attention_mask"].sum(dim=1) - 1
    vectors = hidden[torch.arange(len(texts)), last]""",
    Pooling.MEAN: """\
    mask = batch["attention_mask"].unsqueeze(-1)
    vectors = (hidden * mask).sum(dim=1) / mask.sum(dim=1)""",
    Pooling.CLS: "    vectors = hidden[:, 0]",
}
_TRANSFORMERS = """\
import torch
from transformers import AutoModel, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{place}")  # appends the end token, pads on the right
model = AutoModel.from_pretrained("{place}").eval()
prompt = {prompt}


@torch.inference_mode()
def embed(texts, limit):
    batch = tokenizer(texts, padding=True, truncation=True, max_length=limit, return_tensors="pt")
    hidden = model(**batch).last_hidden_state.float()
{pooled}
    return {vectors}


queries = embed([prompt + "why is my loop slow?"], {max_query_tokens})
documents = embed([{document}], {max_document_tokens})
print(queries @ documents.T)"""
_SERVE = """\
reasonembed serve {place}
curl http://127.0.0.1:8000/v1/embeddings -H 'Content-Type: application/json' \\
  -d '{{"model": "{name}", "input": ["why is my loop slow?"], "input_type": "query",
       "instruction": {instruction}}}\'"""


def _use(facts: Facts, contract: TokenisationContract) -> str:
    prompt = apply_template(contract.query_template, query="", instruction=facts.run.instruction)
    before = contract.document_template.removesuffix("{document}")
    vectors = "torch.nn.functional.normalize(vectors, dim=-1)" if contract.normalise else "vectors"
    transformers = _TRANSFORMERS.format(
        place=_PLACE,
        prompt=json.dumps(prompt, ensure_ascii=False),
        document=json.dumps(
            f"{before}Appending to a list takes constant time.", ensure_ascii=False
        ),
        pooled=_POOLED[contract.pooling],
        vectors=vectors,
        max_query_tokens=contract.max_query_tokens,
        max_document_tokens=contract.max_document_tokens,
    )
    limits = contract.max_query_tokens, contract.max_document_tokens
    cut = "" if len(set(limits)) == 1 else f", and both sides are cut at {max(limits)} tokens"
    as_document = ', prompt_name="document"' if before else ""
    sentences = _SENTENCE_TRANSFORMERS.format(place=_PLACE, as_document=as_document)
    serve = _SERVE.format(
        place=_PLACE,
        name=Path(_PLACE).name,
        # Inside single quotes of a shell.
        instruction=json.dumps(facts.run.instruction, ensure_ascii=False).replace("'", "\\u0027"),
    )
    return "\n\n".join(
        [
            f"With sentence-transformers; the prompt named `query` is the instruction{cut}:",
            f"```python\n{sentences}\n```",
            "With transformers alone:",
            f"```python\n{transformers}\n```",
            "As a service that checks golden token ids and vectors when it starts:",
            f"```bash\n{serve}\n```",
            f"vLLM serves it, too: `vllm serve {_PLACE} --runner pooling`; queries then need the "
            "prompt above in front of them."
            + (
                " Tokens of this model see both sides: a program that runs it as a causal decoder "
                "gives other vectors."
                if facts.config.train.encoder.attention == "bidirectional"
                else ""
            ),
        ]
    )
