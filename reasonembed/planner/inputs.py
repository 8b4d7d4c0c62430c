"""What a plan knows of the texts: counted where the corpus is at hand, else assumed and said."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from reasonembed.config import RunConfig
from reasonembed.corpus import read_corpus
from reasonembed.errors import ConfigError, CorpusError, EvaluationError
from reasonembed.evaluation.datasets import load_collection
from reasonembed.planner.sources import Source, read_sources
from reasonembed.planner.tokens import CHARS_A_TOKEN, token_counts
from reasonembed.remixer.answers import cut_words
from reasonembed.run import Run

CHARS_A_WORD = 6.0
_SAMPLE = 300
_WHOLE, _PARTS = 50_000, 8  # rows up to which a corpus is read whole; parts that are, beyond
_SPREAD = 0.9  # sigma of the logarithm of lengths, where only the mean is known
_QUERIES, _QUERY_CHARS = 100, 800


@dataclass(frozen=True)
class Inputs:
    """The corpus and the evaluation in numbers.

    Attributes:
        documents: Rows of the corpus.
        distinct: Of them, different texts.
        texts: Some of the distinct ones, every so-manieth; empty where only numbers are known.
        chars: Length of each of `texts`, or of as many that stand for them.
        eligible: Share of the documents whose length lets them be seeds.
        queries: Of the evaluation.
        query_chars: Their mean length.
        origin: Where this comes from.
        assumed: What else is to be said of it.
        sources: Samples that were made elsewhere; empty where the run makes its own.
    """

    documents: int
    distinct: int
    chars: tuple[int, ...]
    eligible: float
    texts: tuple[str, ...] = ()
    queries: int = _QUERIES
    query_chars: float = _QUERY_CHARS
    origin: str = ""
    assumed: tuple[str, ...] = field(default=())
    sources: tuple[Source, ...] = ()

    def document_tokens(
        self,
        model: str,
        *,
        max_tokens: int | None = None,
        max_words: int | None = None,
        cache_dir: str | None = None,
    ) -> np.ndarray[Any, Any]:
        """Tokens of the sampled documents, as the model would see them, cut as given."""
        if self.texts:
            texts = self.texts
            if max_words is not None:
                texts = tuple(cut_words(text, max_words) for text in texts)
            counts = np.asarray(token_counts(texts, model, cache_dir=cache_dir), float)
        else:
            counts = np.asarray(self.chars, float) / CHARS_A_TOKEN
            if max_words is not None:
                counts = np.minimum(counts, max_words * CHARS_A_WORD / CHARS_A_TOKEN)
        return counts if max_tokens is None else np.minimum(counts, max_tokens)


def read_inputs(
    config: RunConfig, *, documents: int | None = None, may_read: bool = True
) -> Inputs:
    """Counts what is there.

    Args:
        config: Names the corpus and the evaluation.
        documents: How many there are, where the corpus is elsewhere.
        may_read: Whether a corpus that is not committed may be read, which takes a while.

    Raises:
        ConfigError: Nothing is known of the corpus, or of the samples of `assemble.sources`.
        SchemaError: Those samples cannot be read.
    """
    queries, query_chars, said = _evaluation(config)
    sources, of_sources = read_sources(config)
    said += of_sources
    table = None if documents else _corpus(config, may_read=may_read)
    if table is not None:
        found = _counted(table, config, queries=queries, query_chars=query_chars, said=said)
    else:
        found = _assumed(config, documents, queries=queries, query_chars=query_chars, said=said)
    return replace(found, sources=sources)


def _corpus(config: RunConfig, *, may_read: bool) -> pa.Table | None:
    artifact = Run(config).artifact("corpus")
    if commits := artifact.commits():
        if sum(commit.rows for commit in commits) <= _WHOLE:
            return artifact.read(columns=["text", "text_hash"])
        parts = commits[:: max(1, len(commits) // _PARTS)][:_PARTS]
        some = [artifact.row_group(one.part, 0, columns=["text", "text_hash"]) for one in parts]
        return pa.concat_tables(some)
    if not may_read:
        return None
    try:
        return read_corpus(
            config.corpus.source, task=config.corpus.task, limit=config.corpus.limit
        ).select(["text", "text_hash"])
    except CorpusError:
        return None


def _counted(
    table: pa.Table, config: RunConfig, *, queries: int, query_chars: float, said: tuple[str, ...]
) -> Inputs:
    documents, distinct = _all_documents(config, table)
    lengths = pc.utf8_length(table.column("text")).to_numpy()
    plan = config.plan
    may = (lengths >= plan.min_chars) & (lengths <= plan.max_chars)
    rows = np.unique(np.linspace(0, table.num_rows - 1, _SAMPLE).astype(int))
    texts = tuple(table.column("text").take(pa.array(rows)).to_pylist())
    return Inputs(
        documents=documents,
        distinct=distinct,
        chars=tuple(len(text) for text in texts),
        eligible=float(may.mean()),
        texts=texts,
        queries=queries,
        query_chars=query_chars,
        origin=f"the corpus, {len(texts)} of its texts counted in tokens",
        assumed=said,
    )


def _all_documents(config: RunConfig, table: pa.Table) -> tuple[int, int]:
    """Documents and distinct texts: of a large committed corpus as its stage said."""
    run = Run(config)
    rows = sum(commit.rows for commit in run.artifact("corpus").commits())
    distinct: int = pc.count_distinct(table.column("text_hash")).as_py()
    if rows <= table.num_rows:
        return table.num_rows, distinct
    said = [
        note["result"].get("distinct texts")
        for note in run.timeline()
        if note["stage"] == "corpus" and note.get("result")
    ]
    share = distinct / table.num_rows
    return rows, int(said[-1]) if said and said[-1] else round(rows * share)


def _assumed(
    config: RunConfig,
    documents: int | None,
    *,
    queries: int,
    query_chars: float,
    said: tuple[str, ...],
) -> Inputs:
    known = _bright().get(config.corpus.task)
    if known is None and documents is None:
        raise ConfigError(
            f"corpus.source {config.corpus.source!r} cannot be read here and nothing is known of "
            f"task {config.corpus.task!r}; say how many documents there are with --documents"
        )
    rows, distinct, mean, asked = known or (documents or 0, documents or 0, 1_000, queries)
    if documents is not None:
        rows, distinct = documents, round(distinct * documents / max(1, rows))
    limit = config.corpus.limit
    if limit is not None and limit < rows:
        rows, distinct = limit, min(limit, distinct)
    chars = _lognormal(mean)
    may = [config.plan.min_chars <= one <= config.plan.max_chars for one in chars]
    origin = "published statistics of BRIGHT" if known else f"{rows:,} documents of {mean:,} chars"
    return Inputs(
        documents=rows,
        distinct=distinct,
        chars=chars,
        eligible=fmean(may) * distinct / rows,
        queries=asked,
        query_chars=query_chars,
        origin=f"{origin}: the corpus is not here",
        assumed=said,
    )


def _evaluation(config: RunConfig) -> tuple[int, float, tuple[str, ...]]:
    try:
        found = load_collection(
            config.evaluate.collection, task=config.task_table[config.corpus.task]
        )
    except (EvaluationError, CorpusError, ConfigError, OSError):
        return _QUERIES, _QUERY_CHARS, (f"{_QUERIES} evaluation queries: they are not here",)
    texts = list(found.queries.values())
    return len(texts), fmean(map(len, texts)), ()


def _lognormal(mean: float) -> tuple[int, ...]:
    """Lengths of a mean that are spread as corpora's are, in equal shares."""
    middle = math.log(mean) - _SPREAD**2 / 2
    normal = NormalDist(middle, _SPREAD)
    return tuple(round(math.exp(normal.inv_cdf((i + 0.5) / _SAMPLE))) for i in range(_SAMPLE))


@lru_cache(maxsize=1)
def _bright() -> dict[str, tuple[int, int, int, int]]:
    text = files("reasonembed.planner").joinpath("data/corpora.yaml").read_text("utf-8")
    return {name: tuple(row) for name, row in yaml.safe_load(text).items()}
