"""Configuration: one frozen pydantic model a stage, read from YAML, fingerprinted.

Everything outside `runtime:` decides the result and enters fingerprints; `runtime:` says where and
how many, and never does. Unknown keys are errors that name their path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reasonembed.errors import AccessError, ConfigError
from reasonembed.schemas import stable_hash
from reasonembed.storage import check_uri
from reasonembed.tasks import TASKS, Relation, Task

Share = Annotated[float, Field(ge=0, le=1)]
_Model = TypeVar("_Model", bound=BaseModel)
_GENERIC = TASKS["generic"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})
Positive = Annotated[int, Field(gt=0)]


class Strict(BaseModel):
    """Base of all configuration: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _keep_defaults(cls, data: Any) -> Any:
        """A section given in part keeps the rest of its own default, not of its type's."""
        if not isinstance(data, dict):
            return data
        kept = {
            name: field.default.model_dump() | data[name]
            for name, field in cls.model_fields.items()
            if isinstance(field.default, Strict) and isinstance(data.get(name), dict)
        }
        return data | kept


class LLMConfig(Strict):
    """A generative model and the engine that runs it."""

    model: str = Field(description="packaged name, local folder or hub id")
    engine: Literal["vllm", "openai", "scripted"] = "vllm"
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    max_model_len: Positive = 40_960
    chat_template_kwargs: dict[str, bool | int | str] = Field(default_factory=dict)


class SamplingConfig(Strict):
    """How tokens are drawn; one sample a row."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    max_tokens: Positive = 2048


class EncoderConfig(Strict):
    """An embedding model and its tokenisation contract; `auto` is resolved from the weights."""

    model: str
    layers: Positive | None = Field(
        None, description="first layers of a decoder that are used; default all"
    )
    attention: Literal["auto", "causal", "bidirectional"] = Field(
        "auto", description="whether tokens of a decoder see those after them"
    )
    pooling: Literal["auto", "last", "mean", "cls"] = "auto"
    pool_template: bool = Field(
        True, description="whether what the template puts before a text enters the mean"
    )
    append_token: str = Field(
        "auto", description="`auto`, `none`, or a token such as <|endoftext|>"
    )
    query_template: str = "Instruct: {instruction}\nQuery: {query}"
    document_template: str = "{document}"
    max_query_tokens: Positive = 512
    max_document_tokens: Positive = 512
    dtype: Literal["bfloat16", "float16", "float32"] = "float32"


class TaskConfig(Strict):
    """A retrieval task of the user's own; see `tasks.Task` for what each text is used for."""

    display_name: str
    relation: Relation = "helps"
    query_kind: str = "a question"
    document_kind: str = "a document"
    instruction: str = _GENERIC.instruction
    relevance: str = _GENERIC.relevance


class CorpusConfig(Strict):
    """What is read, and as which retrieval task."""

    source: str = Field(
        description="`python-stdlib`, a Parquet or JSONL file or a BEIR folder (here, or in an "
        "object store), or files on the hub"
    )
    task: str = Field("generic", description="of the built-in table, or one of `tasks:`")
    limit: Positive | None = None


class LengthBucket(Strict):
    """A target length of the query in words, and how often it is drawn."""

    min_words: Annotated[int, Field(ge=0)]
    max_words: Positive
    weight: Annotated[float, Field(gt=0)] = 1.0


PAPER_LENGTHS = tuple(
    LengthBucket(min_words=low, max_words=high, weight=weight)
    for low, high, weight in (
        (20, 100, 1),
        (100, 200, 2),
        (200, 300, 3),
        (300, 400, 3),
        (400, 500, 2),
        (500, 700, 1),
    )
)


class PlanConfig(Strict):
    """Which documents become seeds, and under which conditions queries are written."""

    max_seeds_per_task: Positive = 10_000
    min_chars: Annotated[int, Field(ge=0)] = 200
    max_chars: Positive = 5_000
    max_gold_similarity: Share = Field(
        0.8,
        description="a document whose word 5-grams are more like those of a gold document of the "
        "evaluation (Jaccard) is no seed; 1 for exact duplicates only",
    )
    variants: Positive = 1
    lengths: tuple[LengthBucket, ...] = PAPER_LENGTHS
    education_levels: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {"high school": 1.0, "college": 2.0, "phd": 2.0}
    )
    seed: int = 42

    @model_validator(mode="after")
    def _ranges(self) -> PlanConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(f"min_chars {self.min_chars} > max_chars {self.max_chars}")
        for bucket in self.lengths:
            if bucket.min_words > bucket.max_words:
                raise ValueError(f"length bucket {bucket.min_words}..{bucket.max_words} is empty")
        if not self.lengths or not self.education_levels:
            raise ValueError("lengths and education_levels must each hold at least one entry")
        return self


class LLMStageConfig(Strict):
    """What every stage that asks an LLM has."""

    llm: LLMConfig
    sampling: SamplingConfig = SamplingConfig()
    max_document_words: Positive = 4_000
    max_failed_share: Share = 0.2
    tries: Positive = Field(
        2, description="an answer that cannot be used is asked for again with another seed"
    )
    seed: int = 42


class FilterConfig(LLMStageConfig):
    """Does a document belong to the task's domain? A yes or no by an LLM, before seeds."""

    sampling: SamplingConfig = SamplingConfig(temperature=0.0, max_tokens=1)
    domain: str | None = Field(None, description="default: the task's display name")
    min_probability: Share = Field(0.5, description="of yes against no, for a document to be kept")


class GenerateConfig(LLMStageConfig):
    """Query synthesis from seed documents."""

    sampling: SamplingConfig = SamplingConfig(temperature=1.0, top_p=0.6, max_tokens=8_192)
    max_query_chars: Positive = 8_000
    prompt: Literal["generate", "generate-short"] = Field(
        "generate", description="`generate-short` suits models under a billion parameters"
    )
    opening: str = Field("", description="words that every query is made to begin with")
    keep_truncated: bool = Field(
        False, description="keep a query that reached max_tokens up to its last full sentence"
    )
    max_copied_share: Share = Field(
        0.5, description="largest share of a query's 8-grams that may stand in its source document"
    )
    max_query_similarity: Share = Field(
        0.8, description="of two queries whose word 3-grams are more alike (Jaccard), one is used"
    )


class BM25Retriever(Strict):
    """BM25 beside the miner."""

    kind: Literal["bm25"]
    variant: Literal["standard", "query-side"] = Field(
        "standard",
        description="query-side: the query's words are weighted as a document's are (BRIGHT's row)",
    )
    k1: Annotated[float, Field(ge=0)] = 0.9
    b: Share = 0.4


class DenseRetriever(Strict):
    """Another embedding model beside the miner."""

    kind: Literal["dense"]
    encoder: EncoderConfig


class EndpointRetriever(Strict):
    """An OpenAI-compatible embedding endpoint; its address is `runtime.endpoints.<name>`."""

    kind: Literal["endpoint"]
    model: str
    query_template: str = "Instruct: {instruction}\nQuery: {query}"
    dimension: Positive
    max_chars: Positive | None = Field(
        None, description="where texts are cut before they are sent; default never"
    )

    @model_validator(mode="after")
    def _template(self) -> EndpointRetriever:
        if "{query}" not in self.query_template:
            raise ValueError(f"query_template {self.query_template!r} lacks {{query}}")
        return self


class RunRetriever(Strict):
    """A run file over our query ids, made by anything: TREC, JSON or Parquet."""

    kind: Literal["run"]
    path: str


Retriever = Annotated[
    BM25Retriever | DenseRetriever | EndpointRetriever | RunRetriever, Field(discriminator="kind")
]


class MineConfig(Strict):
    """Source-excluded mining with one retriever, or with several whose results are fused."""

    encoder: EncoderConfig = Field(description="the miner; also measured in the evaluation")
    also: dict[str, Retriever] = Field(
        default_factory=dict, description="more retrievers, by a name of your choice"
    )
    fusion: Literal["rrf", "quota"] = Field(
        "rrf",
        description="`rrf`: by reciprocal rank; `quota`: so many of each retriever, in turn",
    )
    rrf_constant: Positive = 60
    quotas: dict[str, Positive] = Field(
        default_factory=dict, description="candidates of each retriever; the miner is called miner"
    )
    top_k: Positive = 100
    max_source_similarity: Share = Field(
        0.8,
        description="a document whose word 5-grams are more like the source's (Jaccard) is shut "
        "out with it; 1 for exact duplicates only",
    )
    exclude_ids: str | None = Field(
        None, description="a text file of documents that are no candidates: one id a line"
    )
    max_source_rank: Positive | None = Field(
        None,
        description="a query whose own source the miner ranks lower speaks of something else and "
        "is used no further; at most `top_k`",
    )

    @model_validator(mode="after")
    def _names(self) -> MineConfig:
        if self.max_source_rank is not None and self.max_source_rank > self.top_k:
            raise ValueError(
                f"max_source_rank {self.max_source_rank} is more than top_k {self.top_k}, and "
                "lower ranks are not known"
            )
        if "miner" in self.also:
            raise ValueError("also: the name 'miner' is taken by mine.encoder")
        if self.fusion == "quota" and self.quotas.keys() != {"miner", *self.also}:
            raise ValueError(
                f"quotas names {sorted(self.quotas)}, the retrievers are "
                f"{sorted(['miner', *self.also])}"
            )
        return self


class CascadeConfig(Strict):
    """A cheap first pass: the label's probabilities at once, the analysis where they are unsure."""

    min_confidence: Share = Field(
        0.9, description="probability of the likeliest label from which no analysis is asked for"
    )
    checked_share: Share = Field(
        0.05, description="of the sure pairs, those that are analysed all the same, to be compared"
    )


class AnnotateConfig(LLMStageConfig):
    """Graded relevance after a written analysis in three steps."""

    sampling: SamplingConfig = SamplingConfig(
        temperature=0.7, top_p=0.95, top_k=40, max_tokens=2_048
    )
    label_from: Literal["written", "expected"] = Field(
        "written",
        description="`written`: the score that the model writes; `expected`: the mean of 1..5 "
        "under the probabilities of the score token",
    )
    samples: Positive = Field(
        1, description="analyses a pair; the label is their median, the spread is kept"
    )
    cascade: CascadeConfig | None = None
    candidates_per_query: Positive = 100
    audit_queries: Annotated[int, Field(ge=0)] = Field(
        0, description="evaluation queries whose pairs are judged as well, to measure the annotator"
    )

    @model_validator(mode="after")
    def _samples_that_differ(self) -> AnnotateConfig:
        _check_samples(self.samples, self.sampling)
        return self


def _check_samples(samples: int, sampling: SamplingConfig) -> None:
    if samples > 1 and sampling.temperature == 0:
        raise ValueError(
            f"samples {samples} at temperature 0 are {samples} times the same answer; raise "
            "sampling.temperature, or ask for one"
        )


class RewriteConfig(LLMStageConfig):
    """The reasoning-augmented query q′, from the query alone."""

    sampling: SamplingConfig = SamplingConfig(temperature=0.7, top_p=0.95, max_tokens=512)
    keep_query: bool = True
    opening: str = Field("", description="words that every reasoning is made to begin with")


class SampleSource(Strict):
    """Samples that were made elsewhere."""

    path: str = Field(description="a run directory, or a file or folder of that form")
    form: Literal[
        "run",
        "parquet",
        "reasonembed",
        "flagembedding",
        "msmarco-triples",
        "msmarco-text-triples",
        "msmarco-hard-negatives",
    ] = "run"
    task: str | None = Field(None, description="where the form names none; MS MARCO's is msmarco")
    max_negatives: Positive | None = Field(
        None, description="of an MS MARCO query, drawn by `seed`; default all"
    )
    seed: int = 42
    max_bad_share: Share = Field(
        0.0, description="of the lines that may be unusable; they are passed over and counted"
    )

    @model_validator(mode="after")
    def _of_this_form(self) -> SampleSource:
        if self.max_negatives is not None and not self.form.startswith("msmarco"):
            raise ValueError(f"max_negatives is for MS MARCO's forms; this one is {self.form}")
        if self.max_bad_share and self.form in ("run", "parquet"):
            raise ValueError(f"max_bad_share is for forms of lines; this one is {self.form}")
        return self


class AssembleConfig(Strict):
    """How judged candidates become training samples."""

    sources: tuple[SampleSource, ...] = Field(
        (), description="if any: samples are read from these instead of being made in this run"
    )

    rule: Literal["threshold", "rank"] = Field(
        "threshold",
        description="`threshold`: the paper's rule on the label; `rank`: the best and the worst of "
        "each query's own candidates by expected label",
    )
    positive_min: Annotated[int, Field(ge=1, le=5)] = 3
    negative_max: Annotated[int, Field(ge=1, le=5)] = 2
    rank_positives: Positive = 1
    rank_negatives: Positive = 8
    positives_from: Literal["annotated", "source"] = Field(
        "annotated",
        description="`source`: a control, not a method: the same samples, but with the document "
        "that the query was written from as the one positive",
    )
    max_positives: Positive | None = Field(None, description="of a query, the highest labels first")
    max_negatives: Positive | None = Field(None, description="of a query, the best ranked first")
    held_out_share: Share = Field(
        0.0, description="of the source documents' duplicate groups, kept out of training"
    )

    @model_validator(mode="after")
    def _disjoint(self) -> AssembleConfig:
        if self.negative_max >= self.positive_min:
            raise ValueError(
                f"negative_max {self.negative_max} must lie below positive_min {self.positive_min}"
            )
        return self

    @model_validator(mode="after")
    def _control_of_this_run(self) -> AssembleConfig:
        if self.sources and self.positives_from == "source":
            raise ValueError(
                "positives_from 'source' needs samples that this run makes; those of sources: come "
                "with their positives"
            )
        return self


class LoRAConfig(Strict):
    """Low-rank adapters on every projection of the decoder."""

    rank: Positive = 32
    alpha: Positive = 64
    dropout: Share = 0.1


class TaskBatch(Strict):
    """Batch shape of one task."""

    batch_queries: Positive
    group_size: Annotated[int, Field(ge=2)]


PAPER_TASK_BATCHES = {
    "leetcode": TaskBatch(batch_queries=512, group_size=2),
    "pony": TaskBatch(batch_queries=16, group_size=64),
}
"""The released code's tuned shapes; with 64 queries by 16 elsewhere, always 1,024 passages."""


class TrainConfig(Strict):
    """RI-InfoNCE fine-tuning (arXiv:2510.08252; the released code's values where it is silent)."""

    encoder: EncoderConfig
    lora: LoRAConfig | None = Field(LoRAConfig(), description="null trains all weights")
    batch_queries: Positive = Field(
        64, description="queries in a global step, all workers together"
    )
    group_size: Annotated[int, Field(ge=2)] = Field(16, description="1 positive + hard negatives")
    task_batches: Literal["paper"] | dict[str, TaskBatch] = Field(
        "paper", description="tasks that differ; paper: leetcode 512 queries by 2, pony 16 by 64"
    )
    tail: Literal["carry", "paper"] = Field(
        "carry",
        description="an epoch's samples that fill no batch: open the task's next epoch, or (paper) "
        "are dropped",
    )
    small_tasks: Literal["refuse", "merge"] = Field(
        "refuse", description="tasks with fewer samples than a batch: an error, or mixed batches"
    )
    epochs: Positive = 1
    max_steps: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_share: Share = 0.1
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 0.02
    intensity_cap: Annotated[float, Field(gt=0, allow_inf_nan=True)] | Literal["adaptive"] = Field(
        5.0, description="κ; .inf for none; adaptive: follows a quantile of what training sees"
    )
    intensity_cap_quantile: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="of l / (l′ + ε), which an adaptive κ follows"
    )
    intensity_smoothing: Share = Field(0.0, description="λ in RI ← (1 − λ) RI + λ mean RI")
    intensity_start_step: Annotated[int, Field(ge=0)] = 100
    intensity_epsilon: Annotated[float, Field(gt=0)] = 1e-6
    targets: Literal["paper", "several", "graded"] = Field(
        "paper",
        description="paper: one positive is drawn; several: as many as there are, up to half a "
        "group; graded: these, with the group's labels as soft targets",
    )
    masks: tuple[Literal["known_positives", "equal_texts"], ...] = Field(
        (), description="passages that are no negatives of a query; the paper masks none"
    )
    matryoshka_dimensions: tuple[Positive, ...] = Field(
        (), description="shorter vectors, cut from the front, that are trained as well"
    )
    gradient_scale: Literal["exact", "paper"] = Field(
        "exact", description="∇L; paper: ∇L divided by the number of workers"
    )
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        3, description="in a row, whose loss or gradient is not finite; one more ends the training"
    )
    validate_every: Positive | None = Field(
        None, description="steps from one look at held-out samples to the next; default none"
    )
    validate_queries: Positive = Field(256, description="held-out samples looked at, at most")
    keep: Literal["last", "best"] = Field(
        "last", description="checkpoint that is exported; best: by held-out nDCG@10"
    )
    seed: int = 42

    @model_validator(mode="after")
    def _gradients_that_do_not_vanish(self) -> TrainConfig:
        if self.encoder.dtype == "float16":
            raise ValueError(
                "encoder.dtype 'float16' would round small gradients to zero, for training does "
                "not scale them; use 'bfloat16' or 'float32'"
            )
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> TrainConfig:
        if self.keep == "best" and self.validate_every is None:
            raise ValueError("keep 'best' needs validate_every, the steps between measurements")
        return self


class EvaluateConfig(Strict):
    """The collection and what is compared on it."""

    collection: str = Field(
        "python-stdlib",
        description="`python-stdlib`, a folder in BEIR form, here or in an object store, or a "
        "benchmark's task such as `bright:biology`; searched corpus: ours",
    )
    top_k: Positive = 1_000
    bm25: bool = True
    instruction: str | None = None


class HybridRetriever(Strict):
    """Several retrievers whose results are fused."""

    kind: Literal["hybrid"]
    parts: dict[str, Retriever] = Field(min_length=2, description="by a name of your choice")
    fusion: Literal["rrf", "weighted"] = Field(
        "rrf",
        description="`rrf`: by reciprocal rank; `weighted`: weighted sum of scores, each "
        "retriever's brought to 0..1 within a query",
    )
    rrf_constant: Positive = 60
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="of each part, for `weighted`; default all 1"
    )

    @model_validator(mode="after")
    def _weights_of_parts(self) -> HybridRetriever:
        if self.weights and (self.fusion == "rrf" or self.weights.keys() != self.parts.keys()):
            raise ValueError(
                f"weights names {sorted(self.weights)}: it goes with fusion 'weighted' and names "
                f"each of the parts {sorted(self.parts)}"
            )
        return self


class RerankConfig(Strict):
    """The annotator's grades decide the order of a run's top."""

    annotate: AnnotateConfig
    top: Positive = Field(100, description="documents of a query that are judged")
    weight: Share = Field(
        1.0,
        description="of the grade against the retriever's score, each brought to 0..1 within a "
        "query; 1: the grade alone, and the retriever where grades are equal",
    )


class SystemConfig(Strict):
    """What answers queries: a retriever, perhaps with rewritten queries and a reranker."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also its folder's")
    retrieve: Annotated[
        BM25Retriever | DenseRetriever | EndpointRetriever | RunRetriever | HybridRetriever,
        Field(discriminator="kind"),
    ]
    instruction: Literal["none", "instruct", "represent"] = Field(
        "none",
        description="which of a protocol's sentences fills {instruction} of the query template",
    )
    rewrite: RewriteConfig | None = Field(None, description="search by the rewritten query")
    rerank: RerankConfig | None = None
    source: str = Field("", description="where the settings stand that were followed")


class DistillConfig(LLMStageConfig):
    """A small annotator taught by a large one (arXiv:2510.08252: Qwen3-235B to Qwen3-8B).

    `llm` is the teacher; its answers are filtered before the student learns them.
    """

    sampling: SamplingConfig = SamplingConfig(
        temperature=0.7, top_p=0.95, top_k=40, max_tokens=2_048
    )
    student: str = Field(description="packaged name, local folder or hub id")
    samples: Positive = Field(3, description="trajectories of the teacher a pair")
    min_agreement: Share = Field(
        0.6, description="share of a pair's parsed labels that its majority must hold"
    )
    max_pairs: Positive = 20_000
    max_per_label: Positive | None = Field(
        None, description="trajectories of one task and label; mined pairs are mostly 1 and 2"
    )
    held_out_share: Share = Field(0.1, description="of the queries, to measure the student")
    lora: LoRAConfig | None = Field(LoRAConfig(), description="null trains all weights")
    epochs: Positive = 2
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    warmup_share: Share = 0.03
    batch_tokens: Positive = Field(16_384, description="in a global step, padding included")
    max_tokens: Positive = Field(4_096, description="of a prompt and its trajectory")
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @model_validator(mode="after")
    def _samples_that_differ(self) -> DistillConfig:
        _check_samples(self.samples, self.sampling)
        return self


class ReportConfig(Strict):
    """What the report compares the data with."""

    benchmarks: tuple[str, ...] = Field(
        (), description="BEIR folders or BRIGHT files that the samples are searched for"
    )


class ExportConfig(Strict):
    """What travels with the weights."""

    golden_texts: Positive = 8


_LABEL_VALUE = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"  # of a node of Kubernetes or Ray
Label = Annotated[str, Field(pattern=_LABEL_VALUE)]
Market = Literal["any", "spot", "on-demand", "spot-first"]
MARKET: Any = Field(
    "any",
    description="which machines, by their label ray.io/market-type; spot-first: on-demand ones "
    "where spot has none",
)
ACCELERATORS: Any = Field(
    (), description="kinds of GPU, by the label ray.io/accelerator-type; default any"
)


class PoolConfig(Strict):
    """A pool of actors. Never enters a fingerprint."""

    min_actors: Positive = 1
    max_actors: Positive = 1
    batch_rows: Positive = 32
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    market: Market = MARKET
    accelerators: tuple[Label, ...] = ACCELERATORS

    @model_validator(mode="after")
    def _grows(self) -> PoolConfig:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors {self.min_actors} > max_actors {self.max_actors}")
        return self


class LLMPool(PoolConfig):
    """A pool of actors that each hold an LLM engine."""

    overlap: Positive = Field(
        1, description="blocks that an actor of an asynchronous engine takes at once"
    )


class EmbedPool(PoolConfig):
    """A pool of actors that each hold an embedder."""

    batch_rows: Positive = 256
    threads: Positive | None = Field(None, description="threads of the maths library, each actor")


class MinePool(PoolConfig):
    """Actors that search shards of the corpus."""

    batch_rows: Positive = Field(1, description="pairs of a shard and a block of queries")
    shard_documents: Positive = Field(200_000, description="vectors that an actor holds at once")
    query_block: Positive = Field(8_192, description="queries that are searched and merged at once")


class EngineOnAccelerator(Strict):
    """What an engine does otherwise on one kind of GPU; what is not given stays as it is."""

    max_num_seqs: Positive | None = None
    max_model_len: Positive | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = None
    kv_cache_gib: Positive | None = None
    quantization: Literal["none", "fp8"] | None = None
    kv_cache_dtype: Literal["auto", "fp8"] | None = None


class EngineRuntime(Strict):
    """How an LLM engine is run; decides speed, not text but for the rounding of fewer bits."""

    mode: Literal["auto", "in_process", "async"] = "auto"
    max_num_seqs: Positive = 64
    kv_cache_gib: Positive | None = None
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    tensor_parallel_size: Positive = 1
    max_model_len: Positive | None = Field(
        None, description="less context than the model's llm.max_model_len, where memory is short"
    )
    quantization: Literal["none", "fp8"] = "none"
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    by_accelerator: dict[Label, EngineOnAccelerator] = Field(
        default_factory=dict,
        description="other settings on some kinds of GPU, by the label ray.io/accelerator-type",
    )
    enforce_eager: bool = False
    base_url: str | None = Field(None, description="of an OpenAI-compatible server")
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Positive = 32
    timeout_s: Annotated[float, Field(gt=0)] = Field(120.0, description="of one HTTP request")
    dead_after_s: Annotated[float, Field(gt=0)] = Field(
        300.0,
        description="a server that has answered nothing for so long while it was asked ends the "
        "stage; the stage goes on when it is run again",
    )
    log_path: str | None = Field(None, description="scripted engine: where it notes each request")

    @model_validator(mode="after")
    def _patience(self) -> EngineRuntime:
        if self.dead_after_s < self.timeout_s:
            raise ValueError(
                f"dead_after_s {self.dead_after_s:g} < timeout_s {self.timeout_s:g}: a slow answer "
                "would pass for a dead server"
            )
        return self

    def on_accelerator(self, kind: str | None) -> EngineRuntime:
        """As it is on one kind of GPU.

        Args:
            kind: The label ray.io/accelerator-type of the node; None where it has no such label.
        """
        own = self.by_accelerator.get(kind or "")
        changes = own.model_dump(exclude_none=True) if own else {}
        return self.model_copy(update={"by_accelerator": {}, **changes})


class TrainRuntime(Strict):
    """Workers of the training stage.

    With dropout, the number of workers and `chunk_tokens` decide which masks are drawn from the
    same seed, as another seed would; without it they change a result by rounding alone.
    """

    num_workers: Positive = Field(1, description="the most there can be, where min_workers is set")
    min_workers: Positive | None = Field(
        None,
        description="go on with so many while machines are missing; the batch stays the same",
    )
    use_gpu: bool = False
    num_cpus: Annotated[float, Field(ge=0)] = 1
    market: Market = MARKET
    accelerators: tuple[Label, ...] = ACCELERATORS
    threads: Positive | None = None
    sharding: Literal["none", "fsdp"] = Field(
        "none", description="fsdp: parameters, gradients and optimizer are cut over the workers"
    )
    activation_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    compile: bool = Field(False, description="torch.compile, a layer at a time")
    packing: Literal["auto", "on", "off"] = Field(
        "auto",
        description="texts of a forward in one row without padding; auto: where that is faster",
    )
    kernels: Literal["none", "liger"] = Field(
        "none", description="liger: fused kernels of the package liger-kernel, on GPUs"
    )
    async_checkpoints: bool = Field(True, description="training goes on while one is written")
    chunk_tokens: Positive = Field(
        8_192,
        description="tokens a forward, padding included; a larger share of the batch is cached",
    )
    checkpoint_every: Positive = 50
    max_failures: Annotated[int, Field(ge=-1)] | None = Field(
        None,
        description="restarts after errors; default 3, with min_workers 10; -1: without limit",
    )
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = Field(
        (), description="where each step is noted besides train/log.jsonl"
    )

    @model_validator(mode="after")
    def _range_of_workers(self) -> TrainRuntime:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is more than num_workers {self.num_workers}"
            )
        return self

    @model_validator(mode="after")
    def _one_market(self) -> TrainRuntime:
        if self.market == "spot-first":
            raise ValueError(
                "market: workers that train together have no second choice; say spot, on-demand "
                "or any, and min_workers to go on with fewer"
            )
        return self

    @model_validator(mode="after")
    def _kernels_of_gpus(self) -> TrainRuntime:
        if self.kernels == "liger" and not self.use_gpu:
            raise ValueError("kernels: liger needs use_gpu: true; on CPUs choose kernels: none")
        return self


class LimitsConfig(Strict):
    """How much a request may hold and how much may wait; `GET /info` publishes it."""

    max_inputs: Positive = Field(2_048, description="of a request, as OpenAI's service has it")
    max_request_tokens: Positive = Field(300_000, description="of all inputs of a request")
    max_queued_tokens: Positive = Field(
        600_000, description="admitted by an ingress and not answered; beyond, requests get 429"
    )
    max_body_bytes: Positive = 16 * 2**20
    max_answer_bytes: Positive = Field(
        512 * 2**20,
        description="of all answers of an ingress that are being computed, written or read by "
        "their clients; beyond, requests get 429",
    )
    max_top_k: Positive = 1_000
    max_hits: Positive = Field(100_000, description="queries times hits of a request")
    max_excluded_ids: Positive = Field(
        50_000, description="excluded ids of all queries of a request together"
    )
    max_queued_searches: Positive = Field(
        4_096, description="queries that an ingress searches for at once; beyond, requests get 429"
    )
    max_rerank_documents: Positive = 1_000
    timeout_s: Annotated[float, Field(gt=0)] = Field(600.0, description="of a whole request")

    @model_validator(mode="after")
    def _fits(self) -> LimitsConfig:
        if self.max_request_tokens > self.max_queued_tokens:
            raise ValueError(
                f"max_request_tokens {self.max_request_tokens} > max_queued_tokens "
                f"{self.max_queued_tokens}: the largest request would never be admitted"
            )
        return self


class BatchingConfig(Strict):
    """How a replica makes batches of what waits."""

    batch_tokens: Positive | None = Field(
        None, description="padded tokens of a batch; default 2,048 on CPUs, 16,384 on GPUs"
    )
    lanes: Positive | None = Field(
        None, description="forward passes at once; default one a core on CPUs, one on GPUs"
    )
    short_tokens: Positive = Field(
        256, description="texts up to here never share a batch with longer ones"
    )


class ReplicasConfig(Strict):
    """Replicas of the embedder; `max` above `min` lets their number follow the load."""

    min: Positive = 1
    max: Positive = 1
    num_cpus: Annotated[float, Field(ge=0)] = 1
    num_gpus: Annotated[float, Field(ge=0)] = 0
    threads: Positive | None = Field(None, description="of the maths library, each replica")
    backend: Literal["torch", "vllm"] = "torch"
    target_wait_s: Annotated[float, Field(gt=0)] = Field(
        2.0, description="seconds of queued work that a replica should have when all are busy"
    )

    @model_validator(mode="after")
    def _grows(self) -> ReplicasConfig:
        if self.min > self.max:
            raise ValueError(f"min {self.min} > max {self.max}")
        return self


class ServeRuntime(Strict):
    """Where the service listens, how much it takes, and how many replicas it has."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65_535)] = 8000
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ingresses: Positive = Field(1, description="replicas that tokenise, admit and answer")
    embedder: ReplicasConfig = ReplicasConfig()
    limits: LimitsConfig = LimitsConfig()
    batching: BatchingConfig = BatchingConfig()
    cache_mib: Annotated[int, Field(ge=0)] = Field(
        256, description="of vectors, an ingress; 0: none"
    )
    index_shards: Positive = Field(1, description="replicas that an index's vectors are cut over")
    keys_file: str | None = Field(None, description="names and hashes of bearer keys")
    allow_anonymous: bool = Field(
        False, description="serve without keys beyond this machine (on loopback it is allowed)"
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="without a finished forward pass for so long, /readyz says 503"
    )
    drain_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="that requests under way have to end when a replica stops"
    )

    @model_validator(mode="after")
    def _both_or_none(self) -> ServeRuntime:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("TLS needs both ssl_certfile and ssl_keyfile")
        return self


class EchoConfig(Strict):
    """The model `echo`: hashes in place of a model, to test clients and load against."""

    dimension: Positive = 64
    max_tokens: Positive = Field(8_192, description="limit of a text; words count as tokens")
    tokens_per_s: Positive | None = Field(None, description="speed that it keeps to; default none")


class ServeConfig(ServeRuntime):
    """A service: one model, its indexes, and what may rewrite queries and grade documents."""

    model: str = Field(
        description="a run, an exported model, a system of the catalogue, a packaged name, a "
        "local folder, a hub id, or `echo`"
    )
    encoder: EncoderConfig | None = Field(
        None, description="contract of a model that brings none; its `model` is the one above"
    )
    name: str | None = Field(None, description="what requests call the model; default its folder")
    aliases: tuple[str, ...] = Field((), description="other names that requests may use")
    instruction: str | None = Field(None, description="of queries that name none")
    default_input_type: Literal["query", "document"] = Field(
        "document", description="of inputs whose role the request does not say"
    )
    dimensions: tuple[Positive, ...] = Field(
        (), description="lengths that vectors may be cut to, beside those it was trained for"
    )
    indexes: tuple[str, ...] = Field((), description="folders that `reasonembed index build` made")
    rewrite: RewriteConfig | None = Field(None, description="lets searches ask for q′")
    rerank: AnnotateConfig | None = Field(None, description="lets searches ask for grades")
    engine: EngineRuntime = EngineRuntime()
    llm_gpus: Annotated[float, Field(ge=0)] = Field(
        0, description="that rewrite's and rerank's replica holds, where their engine is vllm"
    )
    echo: EchoConfig = EchoConfig()
    cache_dir: str | None = Field(None, description="converted weights; default the user's cache")


class CostRuntime(Strict):
    """What machines cost, and how much may be spent."""

    shape: str | None = Field(
        None, description="kind of cluster that is planned for, of the file of prices"
    )
    prices: str | None = Field(
        None, description="a file of prices; default the packaged, dated one"
    )
    max_cost: Annotated[float, Field(gt=0)] | None = Field(
        None, description="money after which the run stops at the next commit, to be resumed"
    )


class RuntimeConfig(Strict):
    """Where and how many; changing anything here changes no result."""

    filter: LLMPool = LLMPool()
    generate: LLMPool = LLMPool()
    embed: EmbedPool = EmbedPool()
    mine: MinePool = MinePool()
    annotate: LLMPool = LLMPool()
    rewrite: LLMPool = LLMPool()
    distill: LLMPool = LLMPool()
    engine: EngineRuntime = EngineRuntime()
    train: TrainRuntime = TrainRuntime()
    serve: ServeRuntime = ServeRuntime()
    cost: CostRuntime = CostRuntime()
    progress_s: Annotated[float, Field(gt=0)] = Field(
        30.0, description="between two lines of progress where nobody watches"
    )
    endpoints: dict[str, str] = Field(
        default_factory=dict, description="addresses of embedding endpoints, by retriever"
    )
    vectors_dir: str | None = Field(
        None, description="vectors shared between runs; default inside the run"
    )
    batch_tokens: Positive = Field(8_192, description="padded tokens a forward of the embedder")
    object_store_bytes: Positive | None = Field(None, description="of a local Ray")
    logical_cpus: Positive | None = Field(None, description="of a local Ray; default at least 4")
    cache_dir: str | None = Field(None, description="converted weights; default the user's cache")

    @model_validator(mode="after")
    def _engines_fit_pools(self) -> RuntimeConfig:
        pools = {
            name: pool
            for name in type(self).model_fields
            if isinstance(pool := getattr(self, name), LLMPool)
        }
        size = self.engine.tensor_parallel_size
        for name, pool in pools.items():
            if 0 < pool.num_gpus < size:
                raise ValueError(
                    f"{name}.num_gpus {pool.num_gpus:g} < engine.tensor_parallel_size {size}: "
                    "an engine takes its GPUs from its actor"
                )
        taken = {kind for pool in pools.values() for kind in pool.accelerators}
        takes_any = any(not pool.accelerators for pool in pools.values())
        if not takes_any and (unused := sorted(self.engine.by_accelerator.keys() - taken)):
            raise ValueError(
                f"engine.by_accelerator names {unused[0]!r}, which no pool takes; pools take: "
                f"{', '.join(sorted(taken))}"
            )
        return self


class BenchmarkConfig(Strict):
    """Systems, collections and the protocol under which they are compared."""

    systems: tuple[str, ...] = Field(
        ("bm25", "all-minilm-l6-v2-short"),
        min_length=1,
        description="names of the catalogue, or YAML files",
    )
    collections: tuple[str, ...] = Field(
        ("python-stdlib",),
        min_length=1,
        description="such as python-stdlib, bright, bright:biology, or a folder",
    )
    protocol: Literal["bright", "reasonembed", "mteb-v1.1"] = "bright"
    data_dir: str | None = Field(None, description="folder of collections that are at hand")
    results_dir: str = "results"
    runtime: RuntimeConfig = RuntimeConfig()


class IndexConfig(Strict):
    """An index on disk: what it is made of, by which model, and where it goes."""

    source: str = Field(
        description="a run, a collection (queries and gold come along), or what `corpus.source` "
        "takes"
    )
    out: str = Field(description="a folder that is made")
    model: str | None = Field(
        None,
        description="a run, an exported model, a system of the catalogue, a packaged name, a "
        "local folder, a hub id, or `echo`; default the source's own, if that is a run",
    )
    encoder: EncoderConfig | None = Field(
        None, description="contract of a model that brings none; its `model` is the one above"
    )
    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="what requests call the index; default the folder's",
    )
    task: str | None = Field(None, description="of its queries; default the source's, or generic")
    instruction: str | None = Field(
        None, description="of its queries; default the source's or that of `task`"
    )
    dense: bool = Field(True, description="whether it holds vectors")
    bm25: BM25Retriever | None = Field(
        BM25Retriever(kind="bm25"), description="how it is searched by words; null: it is not"
    )
    echo: EchoConfig = EchoConfig()
    queries: bool = Field(
        True, description="whether the benchmark queries of a run or collection come along"
    )
    data_dir: str | None = Field(None, description="folder of collections that are at hand")
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _can_be_searched(self) -> IndexConfig:
        if not self.dense and self.bm25 is None:
            raise ValueError("with neither vectors nor BM25 an index cannot be searched")
        if self.encoder is not None and self.model is None:
            raise ValueError("encoder is the contract of a model; name the model")
        return self


class RunConfig(Strict):
    """A whole run: corpus → queries → judgments → samples → model → metrics."""

    run_dir: str = Field(
        description="a folder, on a cluster one that all nodes see; or a URI such as s3://bucket/run"
    )
    corpus: CorpusConfig
    tasks: dict[str, TaskConfig] = Field(default_factory=dict, description="tasks of your own")
    filter: FilterConfig | None = Field(None, description="default: every document may be a seed")
    plan: PlanConfig = PlanConfig()
    generate: GenerateConfig
    mine: MineConfig
    annotate: AnnotateConfig
    rewrite: RewriteConfig
    assemble: AssembleConfig = AssembleConfig()
    distill: DistillConfig | None = None
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="before")
    @classmethod
    def _imported_samples_are_not_made(cls, data: Any) -> Any:
        """Samples of other origin need none of the sections that make samples."""
        if not isinstance(data, dict) or not isinstance(data.get("assemble"), dict):
            return data
        if not data["assemble"].get("sources"):
            return data
        train = data.get("train")
        backbone = (isinstance(train, dict) and train.get("encoder")) or {"model": "none"}
        no_llm = {"llm": {"model": "none", "engine": "scripted"}}
        unused = dict.fromkeys(("generate", "annotate", "rewrite"), no_llm)
        return {"mine": {"encoder": backbone}, **unused} | data

    @model_validator(mode="after")
    def _across_stages(self) -> RunConfig:
        try:
            check_uri(self.run_dir)
        except AccessError as error:
            raise ValueError(f"run_dir {error}") from error
        if twice := sorted(self.tasks.keys() & TASKS.keys()):
            raise ValueError(f"tasks: {twice[0]!r} is a built-in task; choose another name")
        if self.corpus.task not in self.task_table:
            raise ValueError(
                f"corpus.task {self.corpus.task!r} is unknown; there are: "
                f"{', '.join(self.task_table)}; define others under tasks:"
            )
        if self.assemble.rule == "rank" and self.annotate.label_from != "expected":
            raise ValueError(
                "assemble.rule 'rank' orders by expected labels, but annotate.label_from is "
                f"{self.annotate.label_from!r}; set it to 'expected' or use rule 'threshold'"
            )
        workers, queries = self.runtime.train.num_workers, self.train.batch_queries
        if queries < workers:
            raise ValueError(
                f"train.batch_queries {queries} is less than one query for each of "
                f"runtime.train.num_workers {workers}"
            )
        self._engine_fits_models()
        if self.train.gradient_scale == "paper" and self.runtime.train.min_workers is not None:
            raise ValueError(
                "train.gradient_scale 'paper' divides by the number of workers, which "
                "runtime.train.min_workers lets change; use 'exact' or a fixed number"
            )
        return self

    def _engine_fits_models(self) -> None:
        engine = self.runtime.engine
        own = [engine.max_model_len, *(one.max_model_len for one in engine.by_accelerator.values())]
        stages = (self.filter, self.generate, self.annotate, self.rewrite)
        least = min(stage.llm.max_model_len for stage in stages if stage)
        if too_long := [tokens for tokens in own if tokens and tokens > least]:
            raise ValueError(
                f"runtime.engine: max_model_len {too_long[0]} is more than a stage's "
                f"llm.max_model_len {least}; it can only be less"
            )

    @model_validator(mode="after")
    def _tasks_that_exist(self) -> RunConfig:
        shapes = self.train.task_batches
        named = set() if shapes == "paper" else shapes.keys()
        if unknown := sorted(named - self.task_table.keys()):
            raise ValueError(
                f"train.task_batches: {unknown[0]!r} is no task; there are: "
                f"{', '.join(self.task_table)}"
            )
        return self

    @property
    def task_table(self) -> dict[str, Task]:
        """Every task by name: the built-in ones and this configuration's."""
        own = {name: Task(name=name, **task.model_dump()) for name, task in self.tasks.items()}
        return {**TASKS, **own}


def load(path: str | Path, *, overrides: list[str] | None = None) -> RunConfig:
    """Reads a YAML file and applies `a.b=value` overrides (values are YAML).

    Raises:
        ConfigError: The file is missing or not YAML, an override has no `=`, a key is unknown, or
            a value is out of range; every offending key is listed with its path.
    """
    data = read_mapping(path)
    for override in overrides or []:
        _override(data, override)
    return parse(data, where=str(path))


def load_benchmark(
    path: str | Path | None,
    *,
    overrides: list[str] | None = None,
    given: Mapping[str, Any] = _NOTHING,
) -> BenchmarkConfig:
    """Reads the configuration of a benchmark; see `load` for what is refused.

    Args:
        path: A YAML file; None for the defaults.
        overrides: `a.b=value`, applied last.
        given: Values by field that take the place of the file's.
    """
    data = {} if path is None else read_mapping(path)
    data |= given
    for override in overrides or []:
        _override(data, override)
    return validated(BenchmarkConfig, data, where="evaluate" if path is None else str(path))


def load_serve(
    data: dict[str, Any], *, overrides: list[str] | None = None, where: str
) -> ServeConfig:
    """The configuration of a service; see `load` for what is refused.

    Args:
        data: Fields by name.
        overrides: `a.b=value`, applied last.
        where: What they come from, for the message.
    """
    for override in overrides or []:
        _override(data, override)
    return validated(ServeConfig, data, where=where)


def load_index(given: Mapping[str, Any], *, overrides: list[str] | None = None) -> IndexConfig:
    """The configuration of an index.

    Args:
        given: Values by field.
        overrides: `a.b=value`, applied last.

    Raises:
        ConfigError: As `load`.
    """
    data = dict(given)
    for override in overrides or []:
        _override(data, override)
    if isinstance(data.get("encoder"), dict) and data.get("model"):
        data["encoder"] = {"model": data["model"]} | data["encoder"]
    return validated(IndexConfig, data, where="index build")


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        ConfigError: The file is missing, not YAML, or holds something else.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"no configuration file at {file}; see configs/ for those that ship")
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{file} must hold a mapping, it holds {type(data).__name__}")
    return data


def parse(data: dict[str, Any], *, where: str) -> RunConfig:
    """Validates a mapping; see `load` for what is refused."""
    return validated(RunConfig, data, where=where)


def validated(model: type[_Model], data: dict[str, Any], *, where: str) -> _Model:
    """Validates a mapping as any of the configurations; see `load` for what is refused."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in issue['loc']) or '(whole file)'}: {_say(issue)}"
            for issue in error.errors()
        ]
        raise ConfigError(f"{where}:\n" + "\n".join(lines)) from None


def _say(issue: Any) -> str:
    if issue["type"] == "extra_forbidden":
        return "unknown key; see docs/configuration.md for the keys that exist"
    value = issue.get("input")
    given = "" if isinstance(value, (dict, BaseModel)) or value is None else f" (given: {value!r})"
    return f"{issue['msg']}{given}"


def _override(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {override!r}: expected KEY.KEY=VALUE")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override!r}: the value is not YAML: {error}") from error
    _set(data, path, value, where=f"--set {override!r}")


def _set(data: dict[str, Any], path: str, value: Any, *, where: str) -> None:
    *parents, last = path.split(".")
    node = data
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{where}: {parent!r} is a value, not a section")
        # A copy: a YAML alias is the same mapping, and only the named place is to change.
        node[parent] = node = dict(child)
    node[last] = value


def changed(config: RunConfig, changes: Mapping[str, Any], *, where: str) -> RunConfig:
    """A configuration with values set by their dotted keys.

    Args:
        config: Stays as it is.
        changes: Values by key, such as `{"train.intensity_cap": 2}`.
        where: What asks for them, for the message.

    Raises:
        ConfigError: A key is unknown or a value out of range.
    """
    data = config.model_dump(mode="json")
    for path, value in changes.items():
        _set(data, path, value, where=where)
    return parse(data, where=where)


def flatten(value: Any, *, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` → `{"a.b": 1}`; lists stay whole. For comparing identities."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, child in value.items():
        out |= flatten(child, prefix=f"{prefix}.{key}" if prefix else str(key))
    return out


def fingerprint(identity: dict[str, Any]) -> str:
    """Hash of a flat identity (configuration, prompts, weights, inputs); order does not matter."""
    return stable_hash(yaml.safe_dump(identity, sort_keys=True, allow_unicode=True), size=16)
