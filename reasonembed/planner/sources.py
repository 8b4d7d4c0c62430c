"""Samples that were made elsewhere: counted where they are here, else MS MARCO's as published."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean

import pyarrow as pa
import pyarrow.parquet as pq

from reasonembed.config import RunConfig, SampleSource
from reasonembed.errors import ConfigError, SchemaError
from reasonembed.planner.tokens import token_counts
from reasonembed.remixer.assemble import TRAIN
from reasonembed.remixer.formats import finished_samples, read_source
from reasonembed.remixer.msmarco import msmarco_files

_ROWS = 100  # of a file that are counted in tokens
_HEAD = 2**24  # bytes of a file by which its lines are counted
# Queries of MS MARCO's training set that have a passage, and tokens of one and of a passage.
_MSMARCO_QUERIES, _MSMARCO_QUERY, _MSMARCO_PASSAGE = 502_939, 8.0, 80.0


@dataclass(frozen=True)
class Source:
    """Samples of one task.

    Attributes:
        rows: That are trained on.
        task: Decides the batch shape.
        query: Mean tokens, without an instruction.
        rewritten: The same of q′; 0 where nothing was rewritten.
        passages: Tokens of some.
    """

    rows: float
    task: str
    query: float
    rewritten: float
    passages: tuple[float, ...]


def read_sources(config: RunConfig) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """What `assemble.sources` hold, and what was assumed of them.

    Raises:
        ConfigError: One is not here, and is not MS MARCO's.
        SchemaError: One cannot be read.
    """
    found: list[Source] = []
    said = []
    for source in config.assemble.sources:
        if source.form.startswith("msmarco"):
            one, how = _msmarco(source, config)
            many = [one]
        else:
            many, how = [_counted(piece, rows, config) for piece, rows in _pieces(source)], ""
        found += many
        said.append(f"{sum(one.rows for one in many):,.0f} samples of {source.path}{how}")
    return tuple(found), tuple(said)


def _msmarco(source: SampleSource, config: RunConfig) -> tuple[Source, str]:
    rows, how = float(_MSMARCO_QUERIES), ", MS MARCO's number of queries, for they are not here"
    with suppress(ConfigError):  # the run says what is missing
        # A line is a query, or one of several of a query.
        rows, how = min(rows, _lines(msmarco_files(source)[0])), ", at most"
    rows *= 1 - config.assemble.held_out_share
    tokens = f": {_MSMARCO_QUERY:.0f} tokens a query, {_MSMARCO_PASSAGE:.0f} a passage"
    task = source.task or "msmarco"
    return Source(rows, task, _MSMARCO_QUERY, 0.0, (_MSMARCO_PASSAGE,)), how + tokens


def _pieces(source: SampleSource) -> Iterator[tuple[SampleSource, float]]:
    """Each file, or the run, with its rows."""
    if source.form == "run":
        try:
            commits = finished_samples(source.path).commits()
        except ConfigError as error:
            raise ConfigError(f"a plan counts the samples of assemble.sources: {error}") from error
        yield source, sum(commit.rows for commit in commits)
        return
    path = Path(source.path)
    suffixes = (".parquet",) if source.form == "parquet" else (".jsonl", ".jsonl.gz")
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    files = [file for file in files if file == path or file.name.endswith(suffixes)]
    if not files:
        raise ConfigError(
            f"a plan counts the samples of assemble.sources, and there are none at {path}: "
            "plan where they are"
        )
    for file in files:
        rows = _parquet_rows(file) if source.form == "parquet" else _lines(file)
        yield source.model_copy(update={"path": str(file)}), rows


def _parquet_rows(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{file} cannot be read as Parquet: {error}") from error


def _lines(file: Path) -> float:
    """Lines of a plain or gzipped file, by the size of the first ones where it is large."""
    try:
        with file.open("rb") as raw, gzip.open(raw) if file.suffix == ".gz" else raw as stream:
            head, read = stream.read(_HEAD), raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        raise SchemaError(f"{file} cannot be read: {error}") from error
    if len(head) < _HEAD:
        return sum(bool(line.strip()) for line in head.split(b"\n"))
    return head.count(b"\n") * file.stat().st_size / read


def _counted(source: SampleSource, rows: float, config: RunConfig) -> Source:
    read = read_source(
        source, tasks=config.task_table, held_out_share=config.assemble.held_out_share
    )
    some = [placed.row for placed in islice(read, _ROWS)]
    if not some:
        return Source(0.0, config.corpus.task, 0.0, 0.0, (0.0,))
    model, cache_dir = config.train.encoder.model, config.runtime.cache_dir

    def tokens(texts: list[str]) -> tuple[float, ...]:
        return token_counts(texts, model, cache_dir=cache_dir)

    is_rewritten = any(row["rewritten_query"] != row["query"] for row in some)
    return Source(
        rows=rows * fmean(row["split"] == TRAIN for row in some),
        task=some[0]["task"],
        query=fmean(tokens([row["query"] for row in some])),
        rewritten=fmean(tokens([row["rewritten_query"] for row in some])) if is_rewritten else 0.0,
        passages=tokens([p["text"] for row in some for p in row["positives"] + row["negatives"]]),
    )
