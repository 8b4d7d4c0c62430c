"""What a configuration asks of each stage: rows, tokens, operations, traffic, memory, disk.

A stage is one load or several, one after another: the evaluation embeds with two models and then
searches. Nothing here says how long anything takes; see `estimate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from reasonembed.config import (
    PAPER_TASK_BATCHES,
    DenseRetriever,
    EncoderConfig,
    EngineRuntime,
    LLMPool,
    LLMStageConfig,
    RunConfig,
    TaskBatch,
)
from reasonembed.planner.answers import Answers, AnswerStatistics
from reasonembed.planner.formulae import (
    Decode,
    Device,
    decode,
    forward,
    logits,
    prompt_tokens_a_pair,
    training_flops,
    training_memory,
    training_passes,
)
from reasonembed.planner.inputs import Inputs
from reasonembed.planner.shapes import ModelShape, shape_of
from reasonembed.planner.sources import Source
from reasonembed.planner.tokens import token_counts
from reasonembed.remixer.answers import prompt_template
from reasonembed.remixer.audit import NEGATIVES_PER_QUERY

_CHAT_TOKENS = 30  # that chat templates put around a prompt
_INSTRUCTION_TOKENS = 25  # in front of a query that is embedded
_GRADE_TOKENS = 8  # of the question that follows an analysis
_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
_BYTES_A_TOKEN_OF_TEXT = 4.0


@dataclass(frozen=True)
class Load:
    """Work of one model, or of none, in a stage.

    Attributes:
        kind: `llm`, `embed`, `train` or `cpu`.
        key: Equal keys go at equal rates; see `calibration`.
        model: Name; empty without one.
        rows: Planned.
        tokens_in: Read, those in the prefix cache included.
        tokens_cached: Of these, found in the cache.
        tokens_out: Written.
        flops: Operations, but for those of `written`.
        written: Operations of tokens that are written: one at a time they are slower.
        traffic: Bytes that decoding moves.
        limit_s: Device-seconds that the device's data sheet allows for this.
        disk: Bytes written.
        memory: Bytes a device needs, by what for.
        workers: Actors or training workers, at most.
        gpus: Of each.
        blocks: That can be worked on at once.
        problem: Why it cannot run on this device, and what to change.
        notes: What could be better.
    """

    kind: str
    key: str
    model: str = ""
    rows: float = 0
    tokens_in: float = 0
    tokens_cached: float = 0
    tokens_out: float = 0
    flops: float = 0
    written: float = 0
    traffic: float = 0
    limit_s: float = 0
    disk: float = 0
    memory: dict[str, float] = field(default_factory=dict)
    workers: int = 1
    gpus: int = 0
    blocks: float = 1
    problem: str = ""
    notes: tuple[str, ...] = ()

    @property
    def used_workers(self) -> float:
        """Workers that have something to do."""
        return max(1.0, min(self.workers, math.ceil(self.blocks)))


@dataclass(frozen=True)
class Site:
    """What loads are for: the configuration, what is known of the texts, a device, a cache."""

    config: RunConfig
    inputs: Inputs
    device: Device
    statistics: AnswerStatistics

    @property
    def cache_dir(self) -> str | None:
        """Of packaged weights."""
        return self.config.runtime.cache_dir

    def shape(self, model: str) -> ModelShape:
        """Of a model."""
        return shape_of(model, cache_dir=self.cache_dir)

    def documents(
        self, model: str, *, max_tokens: int | None = None, max_words: int | None = None
    ) -> tuple[float, ...]:
        """Tokens of sampled documents."""
        counts = self.inputs.document_tokens(
            model, max_tokens=max_tokens, max_words=max_words, cache_dir=self.cache_dir
        )
        return tuple(counts.tolist())

    def words(self, text: str, model: str) -> float:
        """Tokens of a text."""
        return token_counts([text], model, cache_dir=self.cache_dir)[0]


# ---- language models ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """Mean tokens of one question, and of these those that nobody computed before."""

    tokens: float
    computed: float


def engine_bits(engine: EngineRuntime, dtype: str) -> tuple[int, int]:
    """Bits of a weight, and of keys and values."""
    weights = 8 if engine.quantization == "fp8" else _BITS[dtype]
    return weights, 8 if engine.kv_cache_dtype == "fp8" else _BITS[dtype]


def engine_for(engine: EngineRuntime, device: Device) -> EngineRuntime:
    """With what the configuration changes on this kind of GPU."""
    other = engine.by_accelerator.get(device.name)
    changes = other.model_dump(exclude_none=True) if other else {}
    return engine.model_copy(update=changes)


def llm_key(stage: LLMStageConfig, engine: EngineRuntime) -> str:
    """What decides the speed of an engine, besides the device."""
    bits = engine_bits(engine, stage.llm.dtype)
    settings = (stage.llm.engine, engine.mode, f"tp{engine.tensor_parallel_size}", *bits)
    return "|".join(map(str, ("llm", stage.llm.model, *settings)))


@dataclass(frozen=True)
class _Engine:
    """One engine: its model, its GPUs and how it is set."""

    shape: ModelShape
    device: Device
    settings: EngineRuntime
    bits: tuple[int, int]
    devices: int

    @classmethod
    def of(cls, site: Site, stage: LLMStageConfig) -> _Engine:
        """What a stage starts on a site."""
        settings = engine_for(site.config.runtime.engine, site.device)
        devices = settings.tensor_parallel_size if site.device.is_gpu else 1
        bits = engine_bits(settings, stage.llm.dtype)
        return cls(site.shape(stage.llm.model), site.device, settings, bits, devices)

    def decode(self, *, context: float, most: float) -> Decode:
        """Writing, by texts of a mean length."""
        return decode(
            self.shape,
            self.device,
            context=context,
            devices=self.devices,
            weight_bits=self.bits[0],
            kv_bits=self.bits[1],
            share=self.settings.gpu_memory_utilization,
            most=most,
        )

    def memory(self, decoding: Decode, *, context: float) -> dict[str, float]:
        """Bytes of each device."""
        held = decoding.batch * context * self.shape.kv_bytes(bits=self.bits[1])
        weights = self.shape.weights * self.bits[0] / 8
        return {"weights": weights / self.devices, "keys and values": held / self.devices}

    def problem(self, longest: float) -> str:
        """Why it does not start, or not even one text of that length fits; empty where it does."""
        heads = self.shape.heads
        if heads % self.devices:
            return (
                f"the {heads} heads of {self.shape.name} cannot be cut evenly by "
                f"runtime.engine.tensor_parallel_size {self.devices}"
            )
        size = self.shape.weights * self.bits[0] / 8e9
        text = longest * self.shape.kv_bytes(bits=self.bits[1]) / 1e9
        each = self.device.memory * self.settings.gpu_memory_utilization / 1e9
        if size + text <= self.devices * each:
            return ""
        needs = (
            f"{self.shape.name} takes {size:.0f} GB and {longest:,.0f} tokens of context "
            f"{text:.1f} GB more; "
        )
        if not self.device.is_gpu:
            return f"{needs}this machine has {each:.0f} GB for it: take a smaller model, or GPUs"
        least = math.ceil((size + text) / each)
        even = next((n for n in range(least, heads) if heads % n == 0), heads)
        return (
            f"{needs}{self.devices} x {self.device.name} have {self.devices * each:.0f} GB. It "
            f"needs {least}: set runtime.engine.tensor_parallel_size {even}, "
            "runtime.engine.quantization fp8, a smaller model or a larger GPU"
        )


def llm_load(
    site: Site,
    stage: LLMStageConfig,
    pool: LLMPool,
    *,
    rows: float,
    prompt: Prompt,
    answer: Answers,
) -> Load:
    """The load of one LLM stage.

    Args:
        site: See `Site`.
        stage: Its configuration.
        pool: Its actors.
        rows: Planned.
        prompt: Of one question.
        answer: What is written; see `answers`.
    """
    if stage.llm.engine != "vllm":
        return _remote_load(stage, pool, rows=rows, prompt=prompt, answer=answer)
    engine, device, asked = _Engine.of(site, stage), site.device, rows * answer.asks
    context = prompt.tokens + answer.tokens_a_try / 2
    at_once = min(engine.settings.max_num_seqs, pool.batch_rows * pool.overlap)
    each = engine.decode(context=context, most=at_once)
    is_open = pool.overlap > 1 or engine.settings.mode == "async"
    work = llm_work(
        engine.shape,
        computed=asked * prompt.computed,
        written=rows * answer.tokens,
        steps=answer.steps(rows, batch=pool.batch_rows, at_once=each.batch, is_open=is_open),
        context=context,
        bits=engine.bits,
    )
    writing_s = engine.devices * rows * answer.tokens / each.tokens_per_s
    return Load(
        "llm",
        llm_key(stage, engine.settings),
        model=stage.llm.model,
        rows=rows,
        tokens_in=asked * prompt.tokens,
        tokens_cached=asked * (prompt.tokens - prompt.computed),
        tokens_out=rows * answer.tokens,
        flops=work.read,
        written=work.written,
        traffic=work.traffic,
        limit_s=work.read / device.flops + writing_s,
        disk=rows * (200 + _BYTES_A_TOKEN_OF_TEXT * answer.tokens_a_try),
        memory=engine.memory(each, context=context),
        workers=pool.max_actors,
        gpus=max(math.ceil(pool.num_gpus), engine.devices) if device.is_gpu else 0,
        blocks=rows / pool.batch_rows,
        problem=engine.problem(prompt.tokens + answer.limit),
        notes=_batch_note(each.fits, at_once, device),
    )


@dataclass(frozen=True)
class LLMWork:
    """Operations on what is read and on what is written, and bytes that decoding moves."""

    read: float
    written: float
    traffic: float


def llm_work(
    shape: ModelShape,
    *,
    computed: float,
    written: float,
    steps: float,
    context: float,
    bits: tuple[int, int],
) -> LLMWork:
    """What a prediction and a measurement of an LLM stage share.

    Args:
        shape: The model.
        computed: Prompt tokens that were not in the cache.
        written: Tokens.
        steps: Of decoding, each of which reads all weights.
        context: Mean tokens of a text while it is written.
        bits: Of a weight, of keys and values.
    """
    each = forward(shape, mean_length=context)
    kept = (shape.inner_weights + shape.embedding) * bits[0] / 8
    traffic = steps * kept + written * context * shape.kv_bytes(bits=bits[1])
    return LLMWork(computed * each, written * (each + logits(shape)), traffic)


def _remote_load(
    stage: LLMStageConfig, pool: LLMPool, *, rows: float, prompt: Prompt, answer: Answers
) -> Load:
    """A server's or a script's work is not ours to plan: only rows count."""
    return Load(
        "cpu",
        f"cpu|{stage.llm.engine}",
        model=stage.llm.model,
        rows=rows,
        tokens_in=rows * answer.asks * prompt.tokens,
        tokens_out=rows * answer.tokens,
        workers=pool.max_actors,
        blocks=rows / pool.batch_rows,
        notes=("an engine elsewhere: its hours and its price are not planned",)
        if stage.llm.engine == "openai"
        else (),
    )


def _batch_note(fits: float, at_once: int, device: Device) -> tuple[str, ...]:
    if not device.is_gpu or fits < 2 * at_once:
        return ()
    return (
        f"{at_once} texts at once, memory has room for {fits:.0f}: raise "
        "runtime.engine.max_num_seqs, and batch_rows x overlap with it",
    )


def prompts(site: Site) -> dict[str, Prompt]:
    """The questions of every LLM stage, as they are filled in."""
    config, found = site.config, {}
    query = query_tokens(site)
    if config.filter is not None:
        template, document = (
            _template(site, "filter", config.filter),
            _document(site, config.filter),
        )
        found["filter"] = Prompt(template + document, document)
    generate, annotate, rewrite = config.generate, config.annotate, config.rewrite
    template = _template(site, generate.prompt, generate)
    document = _document(site, generate)
    found["generate"] = Prompt(template + document, template / 2 + document)
    template, document = _template(site, "annotate", annotate), _document(site, annotate)
    pairs = _pairs_a_query(site)
    for name, asked in (("annotate", query), ("audit", _evaluated_tokens(site))):
        many = pairs if name == "annotate" else 1 + NEGATIVES_PER_QUERY
        computed = prompt_tokens_a_pair(
            template=template, query=asked, document=document, pairs_a_query=many,
            caching="query-first",
        )  # fmt: skip
        found[name] = Prompt(template + asked + document, computed)
    template = _template(site, "rewrite", rewrite)
    found["rewrite"] = Prompt(template + query, query)
    return found


def _template(site: Site, name: str, stage: LLMStageConfig) -> float:
    return _CHAT_TOKENS + site.words(prompt_template(name).template, stage.llm.model)


def _document(site: Site, stage: LLMStageConfig) -> float:
    return fmean(site.documents(stage.llm.model, max_words=stage.max_document_words))


def query_tokens(site: Site) -> float:
    """Of a generated query."""
    return site.statistics.answers("generate", site.config).tokens_a_try


def _evaluated_tokens(site: Site) -> float:
    return site.inputs.query_chars / 4


def _pairs_a_query(site: Site) -> float:
    config = site.config
    found = config.mine.top_k
    if config.mine.fusion == "quota" and config.mine.quotas:
        found = sum(config.mine.quotas.values())
    return min(config.annotate.candidates_per_query, found, max(1, site.inputs.distinct - 1))


# ---- rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """How many rows each stage plans."""

    documents: float
    distinct: float
    asked: float
    seeds: float
    queries: float
    pairs: float
    audited: float
    samples: float


def planned_rows(site: Site) -> Rows:
    """Rows by the rules of the configuration and the yields that are known or assumed."""
    config, inputs = site.config, site.inputs
    eligible = inputs.documents * inputs.eligible
    kept = eligible if config.filter is None else eligible * site.statistics.yields.kept
    seeds = min(config.plan.max_seeds_per_task, kept) * config.plan.variants
    queries = seeds * site.statistics.yields.queries
    audited = min(config.annotate.audit_queries, inputs.queries) * (1 + NEGATIVES_PER_QUERY)
    share = 1.0 if config.assemble.rule == "rank" else site.statistics.yields.samples
    samples = queries * share * (1 - config.assemble.held_out_share)
    if inputs.sources:
        samples = math.fsum(one.rows for one in inputs.sources)
    pairs = queries * _pairs_a_query(site)
    return Rows(
        inputs.documents, inputs.distinct, eligible, seeds, queries, pairs, audited, samples
    )


# ---- embedding ----------------------------------------------------------------------------------


def embed_key(encoder: EncoderConfig, threads: int | None) -> str:
    """What decides the speed of an embedder, besides the device."""
    cut = f"{encoder.layers or 'all'} layers"
    return f"embed|{encoder.model}|{cut}|{encoder.dtype}|{threads or 'all'} threads"


def embed_work(shape: ModelShape, lengths: Sequence[float]) -> float:
    """Operations of one pass over texts of so many tokens; attention grows with the square."""
    total = math.fsum(lengths)
    if not total:
        return 0.0
    return total * forward(shape, mean_length=math.fsum(n * n for n in lengths) / total)


def embed_load(
    site: Site, encoder: EncoderConfig, *, documents: float, queries: float, query_tokens: float
) -> Load:
    """Vectors of so many documents and queries.

    Args:
        site: See `Site`.
        encoder: What embeds.
        documents: Distinct ones that have no vector yet.
        queries: The same.
        query_tokens: Of a query with its instruction.
    """
    runtime, device = site.config.runtime, site.device
    pool = runtime.embed
    shape = site.shape(encoder.model).cut(encoder.layers)
    lengths = site.documents(encoder.model, max_tokens=encoder.max_document_tokens)
    asked = min(query_tokens, encoder.max_query_tokens)
    flops = documents * embed_work(shape, lengths) / len(lengths)
    flops += queries * embed_work(shape, [asked])
    rows, size = documents + queries, _BITS[encoder.dtype] / 8
    weights = shape.weights * size
    batch = runtime.batch_tokens * (shape.hidden * 8 + shape.intermediate * 2) * size
    notes: tuple[str, ...] = ()
    if device.is_gpu and weights + batch > device.memory:
        notes = (
            f"may not fit: {shape.name} takes {weights / 1e9:.0f} GB and a batch of "
            f"{runtime.batch_tokens:,} tokens about {batch / 1e9:.0f} GB; a {device.name} has "
            f"{device.memory / 1e9:.0f} GB: "
            "lower runtime.batch_tokens, or take another GPU",
        )
    return Load(
        "embed",
        embed_key(encoder, pool.threads),
        model=encoder.model,
        rows=rows,
        tokens_in=documents * fmean(lengths) + queries * asked,
        flops=flops,
        limit_s=flops / device.flops,
        disk=rows * (shape.hidden * 4 + 40),
        memory={"weights": weights, "a batch": batch},
        workers=pool.max_actors,
        gpus=max(1, math.ceil(pool.num_gpus)) if device.is_gpu else 0,
        blocks=rows / pool.batch_rows,
        problem=_too_large(shape, weights, device),
        notes=notes,
    )


def _too_large(shape: ModelShape, needed: float, device: Device, *, cure: str = "") -> str:
    if not device.is_gpu or needed <= device.memory:
        return ""
    return (
        f"{shape.name} takes {needed / 1e9:.0f} GB without any text; a {device.name} has "
        f"{device.memory / 1e9:.0f} GB: take a larger GPU or a smaller model{cure}"
    )


# ---- training -----------------------------------------------------------------------------------


def train_key(config: RunConfig) -> str:
    """What decides the speed of training, besides the device."""
    train, runtime = config.train, config.runtime.train
    what = f"{train.encoder.layers or 'all'} layers|{train.encoder.dtype}"
    how = f"{runtime.num_workers} workers|{runtime.threads or 'all'} threads|{runtime.sharding}"
    return f"train|{train.encoder.model}|{what}|{'lora' if train.lora else 'full'}|{how}"


@dataclass(frozen=True)
class Training:
    """Steps and tokens of a training run."""

    steps: int
    tokens: float
    rewritten: float
    mean_length: float


def planned_training(site: Site, *, samples: float) -> Training:
    """Steps and tokens, by the batch shape of each task; all tasks together have the samples."""
    train = site.config.train
    sources = site.inputs.sources or (_made_here(site),)
    whole = math.fsum(one.rows for one in sources) or 1.0
    parts = [_training(site, one, samples=samples * one.rows / whole) for one in sources]
    steps, tokens, rewritten, squares = (math.fsum(column) for column in zip(*parts, strict=True))
    share = min(1.0, train.max_steps / steps) if train.max_steps and steps else 1.0
    return Training(
        round(steps * share), tokens * share, rewritten * share, squares / max(1.0, tokens)
    )


def _made_here(site: Site) -> Source:
    config = site.config
    thought = site.statistics.answers("rewrite", config).tokens_a_try
    kept = query_tokens(site) if config.rewrite.keep_query else 0
    passages = site.documents(config.train.encoder.model)
    return Source(1.0, config.corpus.task, query_tokens(site), thought + kept, passages)


def _training(site: Site, source: Source, *, samples: float) -> tuple[float, float, float, float]:
    """Steps, tokens, tokens of q′, and the squared lengths of the texts."""
    encoder, shape = site.config.train.encoder, _batch_shape(site.config, source.task)
    steps = int(samples * site.config.train.epochs // shape.batch_queries)
    turns, group = steps * shape.batch_queries, shape.group_size
    query, rewritten = (
        min(tokens + _INSTRUCTION_TOKENS, encoder.max_query_tokens) if tokens else 0.0
        for tokens in (source.query, source.rewritten)
    )
    passages = [min(one, encoder.max_document_tokens) for one in source.passages]
    tokens = turns * (query + group * fmean(passages))
    squares = turns * (query**2 + group * fmean(one * one for one in passages))
    return steps, tokens, turns * rewritten, squares


def _batch_shape(config: RunConfig, task: str) -> TaskBatch:
    train = config.train
    shapes = PAPER_TASK_BATCHES if train.task_batches == "paper" else train.task_batches
    own = TaskBatch(batch_queries=train.batch_queries, group_size=train.group_size)
    return shapes.get(task, own)


def train_load(site: Site, *, samples: float) -> Load:
    """Fine-tuning on so many samples."""
    config, device = site.config, site.device
    train, runtime = config.train, config.runtime.train
    shape = site.shape(train.encoder.model).cut(train.encoder.layers)
    plan = planned_training(site, samples=samples)
    workers, steps = runtime.num_workers, max(1, plan.steps)
    flops = train_work(
        shape, tokens=plan.tokens, rewritten=plan.rewritten, mean_length=plan.mean_length,
        tokens_a_step=plan.tokens / steps / workers, config=config,
    )  # fmt: skip
    size = _BITS[train.encoder.dtype] // 8
    needed = training_memory(
        shape, is_lora=train.lora is not None, dtype_bytes=size, workers=workers,
        is_sharded=runtime.sharding == "fsdp",
    )  # fmt: skip
    kept = shape.hidden * shape.layers * (2 if runtime.activation_checkpointing else 34) * size / 2
    chunk = min(runtime.chunk_tokens, plan.tokens / steps / workers) * kept
    cures = _training_cures(config)
    problem = _too_large(shape, needed, device, cure=f", or {cures}")
    if not plan.steps:
        problem = (
            f"{samples:,.0f} samples fill no batch of train.batch_queries "
            f"{train.batch_queries:,} or of its task in train.task_batches: lower it"
        )
    notes: tuple[str, ...] = ()
    if device.is_gpu and needed + chunk > device.memory:
        notes = (
            f"may not fit: training {shape.name} takes about {needed / 1e9:.0f} GB a worker "
            f"and a chunk of {runtime.chunk_tokens:,} tokens about {chunk / 1e9:.0f} GB; a "
            f"{device.name} has {device.memory / 1e9:.0f} GB: set {cures}, or a smaller "
            "runtime.train.chunk_tokens",
        )
    return Load(
        "train",
        train_key(config),
        model=train.encoder.model,
        rows=plan.steps,
        tokens_in=plan.tokens + plan.rewritten,
        flops=flops,
        limit_s=flops / device.flops,
        disk=2 * training_memory(
            shape, is_lora=train.lora is not None, dtype_bytes=0, workers=1, is_sharded=False
        ),
        memory={"weights and optimizer": needed, "activations of a chunk": chunk},
        workers=workers,
        gpus=1 if device.is_gpu else 0,
        blocks=workers,
        problem=problem,
        notes=notes,
    )  # fmt: skip


def _training_cures(config: RunConfig) -> str:
    """Settings that take memory away and are not set yet."""
    runtime = config.runtime.train
    is_sharded = runtime.sharding == "fsdp"
    found = [f"{'' if is_sharded else 'runtime.train.sharding fsdp with '}more workers"]
    found += [] if runtime.activation_checkpointing else ["runtime.train.activation_checkpointing"]
    found += ["train.lora"] if config.train.lora is None else []
    return ", ".join(found)


def train_work(
    shape: ModelShape,
    *,
    tokens: float,
    rewritten: float,
    mean_length: float,
    tokens_a_step: float,
    config: RunConfig,
) -> float:
    """Operations of training, what the gradient cache computes twice included.

    Args:
        shape: The backbone.
        tokens: Of queries and passages.
        rewritten: Of q′, which is embedded without a gradient.
        mean_length: Of texts, weighted by tokens.
        tokens_a_step: Of one worker.
        config: Of the run.
    """
    runtime = config.runtime.train
    chunks = max(1, math.ceil(tokens_a_step / runtime.chunk_tokens))
    passes = training_passes(
        is_lora=config.train.lora is not None,
        recomputes=runtime.activation_checkpointing,
        cache_share=(chunks - 1) / chunks,
    )
    trained = training_flops(shape, tokens=tokens, mean_length=mean_length, passes=passes)
    return trained + rewritten * forward(shape, mean_length=mean_length)


# ---- stages -------------------------------------------------------------------------------------


def loads(site: Site, stages: Sequence[str]) -> dict[str, list[Load]]:
    """The loads of stages, in order."""
    rows = planned_rows(site)
    return {stage: _with_kinds(site, stage, _STAGES[stage](site, rows)) for stage in stages}


def _with_kinds(site: Site, stage: str, found: list[Load]) -> list[Load]:
    """With a note where the stage's actors would not start on this kind of GPU."""
    section = {"audit": "annotate", "evaluate": "embed"}.get(stage, stage)
    kinds = getattr(getattr(site.config.runtime, section, None), "accelerators", ())
    if not kinds or site.device.name in kinds:
        return found
    note = (
        f"runtime.{section}.accelerators [{', '.join(kinds)}] leaves out the {site.device.name} "
        "that this plan is for"
    )
    return [replace(one, notes=(*one.notes, note)) if one.gpus else one for one in found]


def _cpu(stage: str, rows: float, *, disk: float = 0.0) -> Load:
    return Load("cpu", f"cpu|{stage}", rows=rows, disk=disk)


def _llm(name: str, attribute: str, rows_of: str) -> Callable[[Site, Rows], list[Load]]:
    def build(site: Site, rows: Rows) -> list[Load]:
        config = site.config
        stage: LLMStageConfig = getattr(config, attribute)
        pool: LLMPool = getattr(config.runtime, attribute)
        count = float(getattr(rows, rows_of))
        if not count:
            return [_cpu(name, 0)]
        answer = site.statistics.answers(name, config)
        prompt = site.statistics.corrected(name, config, prompts(site)[name])
        return [
            llm_load(site, stage, pool, rows=count, prompt=prompt, answer=answer),
            _cpu(name, count),
        ]

    return build


def _corpus(site: Site, rows: Rows) -> list[Load]:
    mean = fmean(site.inputs.chars)
    return [_cpu("corpus", rows.documents, disk=rows.documents * (mean + 100) * 0.5)]


def _embed(site: Site, rows: Rows) -> list[Load]:
    config, found = site.config, []
    others = [one.encoder for one in config.mine.also.values() if isinstance(one, DenseRetriever)]
    asked = query_tokens(site) + _INSTRUCTION_TOKENS
    for encoder in (config.mine.encoder, *others):
        evaluated = site.inputs.queries if encoder is config.mine.encoder else 0
        found.append(
            embed_load(
                site, encoder, documents=rows.distinct, queries=rows.queries + evaluated,
                query_tokens=asked,
            )
        )  # fmt: skip
    return [*found, _cpu("embed", rows.distinct)]


def _evaluate(site: Site, rows: Rows) -> list[Load]:
    encoder, made = site.config.train.encoder, site.inputs.queries
    asked = _evaluated_tokens(site) + _INSTRUCTION_TOKENS
    trained = fmean(one.query for one in site.inputs.sources or (_made_here(site),))
    mixed = made * asked + rows.samples * (trained + _INSTRUCTION_TOKENS)
    both = [
        embed_load(site, encoder, documents=rows.distinct, queries=queries, query_tokens=tokens)
        for queries, tokens in (
            (made, asked), (made + rows.samples, mixed / max(1.0, made + rows.samples))
        )
    ]  # fmt: skip
    return [*both, _cpu("evaluate", rows.distinct)]


def _train(site: Site, rows: Rows) -> list[Load]:
    return [train_load(site, samples=rows.samples)]


def _export(site: Site, rows: Rows) -> list[Load]:
    encoder = site.config.train.encoder
    shape = site.shape(encoder.model).cut(encoder.layers)
    size = shape.weights * _BITS[encoder.dtype] / 8
    return [_cpu("export", size / 1e6, disk=size)]


_STAGES: dict[str, Callable[[Site, Rows], list[Load]]] = {
    "corpus": _corpus,
    "filter": _llm("filter", "filter", "asked"),
    "plan": lambda site, rows: [_cpu("plan", rows.documents)],
    "generate": _llm("generate", "generate", "seeds"),
    "embed": _embed,
    "mine": lambda site, rows: [_cpu("mine", rows.distinct)],
    "annotate": _llm("annotate", "annotate", "pairs"),
    "audit": _llm("audit", "annotate", "audited"),
    "rewrite": _llm("rewrite", "rewrite", "queries"),
    "assemble": lambda site, rows: [_cpu("assemble", rows.samples)],
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
}
