"""Samples in the forms of other programs, read and written.

Reads and writes `samples`. Forms:

- `parquet`: a file of `schemas.SAMPLES`; carries everything.
- `reasonembed`: a folder of `{task}-formatted.jsonl`, a line a sample with `prompt`, `query`,
  `reasoning_query`, `pos`, `neg` (lists of texts), as the authors of arXiv:2510.08252 have released
  theirs; `train_group_size` and `batch_size`, if there, are read over.
- `flagembedding`: a JSONL file with `query`, `pos`, `neg` and perhaps `prompt`. It has no place for
  a rewritten query, so the query stands for it: every reasoning intensity is 1 then, and the loss
  is plain InfoNCE.
- `sentence-transformers`: a Parquet file with the columns `anchor`, `positive`, `negative_1`, ...;
  written only.
- `run`: another run's committed samples; read only.
- `msmarco-triples`, `msmarco-text-triples`, `msmarco-hard-negatives`: MS MARCO's published files;
  read only, see `msmarco`.

Both JSONL forms may hold what other programs read over: `pos_scores` and `neg_scores` (the labels),
`pos_ids` and `neg_ids`, `query_id`, `task`, `source_doc_id`, `split`. Texts without ids get hashes
of their text. All is read line by line and written part by part.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reasonembed.artifacts import Artifact
from reasonembed.config import SampleSource
from reasonembed.corpus import text_hash
from reasonembed.errors import ConfigError, SchemaError
from reasonembed.remixer.assemble import HELD_OUT, TRAIN, Placed, Row, split_of
from reasonembed.remixer.lines import Tally, numbered_lines
from reasonembed.remixer.msmarco import read_msmarco
from reasonembed.schemas import SAMPLES, conform, stable_hash
from reasonembed.storage import Place as Location
from reasonembed.tasks import Task

ExportForm = Literal["parquet", "reasonembed", "flagembedding", "sentence-transformers"]
Split = Literal["train", "held_out", "all"]
Anchor = Callable[[str, str], str]

_SUFFIX = "-formatted.jsonl"
_BATCH_ROWS = 500

# ---- reading --------------------------------------------------------------------------------


def read_source(
    source: SampleSource,
    *,
    tasks: Mapping[str, Task],
    held_out_share: float,
    tally: Tally | None = None,
    scratch: Path | None = None,
) -> Iterator[Placed]:
    """Rows of `schemas.SAMPLES` from samples that were made elsewhere, one at a time.

    Args:
        source: Where they lie, and in which form.
        tasks: By name; the task's instruction is taken where a row has no `prompt`.
        held_out_share: For rows that do not say to which split they belong. Where no source
            document is known, the query's own text decides (see `assemble.split_of`).
        tally: Receives counts while the rows are read.
        scratch: Folder for a scratch file of MS MARCO's passages; default the system's.

    Raises:
        ConfigError: There is nothing at the path, the run's samples are not complete, or neither
            the rows, nor `task`, nor the file's name tell the task.
        SchemaError: More rows than `max_bad_share` have not the form; the message names file and
            line or row of the first.
    """
    counted = tally or Tally(source.max_bad_share)
    if source.form == "run":
        artifact = finished_samples(source.path)
        yield from _checked(artifact.parts(), source.path)
    elif source.form == "parquet":
        for file in _files(source, ".parquet"):
            yield from _checked(_parquet_tables(file), str(file))
    elif source.form.startswith("msmarco"):
        yield from read_msmarco(
            source,
            task=_task(source.task or "msmarco", tasks, where=source.path),
            held_out_share=held_out_share,
            tally=counted,
            scratch=scratch,
        )
    else:
        yield from _from_lines(source, tasks, held_out_share, counted)


def _from_lines(
    source: SampleSource, tasks: Mapping[str, Task], held_out_share: float, tally: Tally
) -> Iterator[Placed]:
    repeats: Counter[str] = Counter()
    for file in _files(source, ".jsonl", ".jsonl.gz"):
        form = _LineForm(source, file, tasks, held_out_share, repeats)
        for number, line in numbered_lines(file):
            tally.seen += 1
            place = f"{file} line {number}"
            try:
                row = form.row(line)
            except SchemaError as error:
                tally.refuse(f"{place}: {error}")
            else:
                yield Placed(place, row)
    tally.close()


def _task(name: str, tasks: Mapping[str, Task], *, where: object) -> Task:
    if name not in tasks:
        raise ConfigError(
            f"{where}: there is no task {name!r}; set task in assemble.sources to one of "
            f"{', '.join(tasks)}, or define it under tasks:"
        )
    return tasks[name]


def finished_samples(run_dir: str | Path | Location) -> Artifact:
    """The samples of a run.

    Raises:
        ConfigError: There are none, or not all of them.
    """
    samples = Artifact.declared(str(Location(run_dir) / "samples"), "samples")
    if samples.finished() is None:
        raise ConfigError(f"{run_dir} holds no finished samples; run its stage assemble first")
    return samples


def _files(source: SampleSource, *suffixes: str) -> list[Path]:
    path = Path(source.path)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = [file for file in files if file == path or file.name.endswith(suffixes)]
    if not found:
        raise ConfigError(
            f"assemble.sources: {path} is no file and no folder with files that end in "
            f"{' or '.join(suffixes)}"
        )
    return found


def _parquet_tables(file: Path) -> Iterator[pa.Table]:
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(_BATCH_ROWS):
                yield conform(pa.Table.from_batches([batch]), SAMPLES, where=str(file))
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{file} cannot be read as Parquet: {error}") from error


def _checked(tables: Iterable[pa.Table], where: str) -> Iterator[Placed]:
    for number, row in enumerate(_rows(tables)):
        place = f"{where} row {number}"
        if not row["positives"] or not row["negatives"]:
            raise SchemaError(f"{place}: a sample needs positives and negatives")
        if row["split"] not in (TRAIN, HELD_OUT):
            raise SchemaError(f"{place}: split is {row['split']!r}, not {TRAIN} or {HELD_OUT}")
        yield Placed(place, row)


def _rows(tables: Iterable[pa.Table]) -> Iterator[Row]:
    for table in tables:
        for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
            yield from batch.to_pylist()


@dataclass(frozen=True)
class _LineForm:
    """What a line of one file means.

    Attributes:
        source: Form and task.
        file: Its name may tell the task.
        tasks: By name.
        held_out_share: For rows without a split.
        repeats: How often each query without an id has occurred in the source.
    """

    source: SampleSource
    file: Path
    tasks: Mapping[str, Task]
    held_out_share: float
    repeats: Counter[str]

    def row(self, line: bytes) -> Row:
        """A row of `schemas.SAMPLES`.

        Raises:
            ConfigError: Nothing tells the task, or nothing the instruction.
            SchemaError: The line has not the form.
        """
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise SchemaError(f"no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise SchemaError(f"a JSON object is needed, this is {type(fields).__name__}")
        query, task = _text(fields, "query"), self._task(fields)
        source_doc_id = _optional(fields, "source_doc_id")
        return {
            "query_id": _optional(fields, "query_id") or self._query_id(task, query),
            "task": task,
            "instruction": self._instruction(fields, task),
            "query": query,
            "rewritten_query": self._rewritten(fields, query),
            "positives": _labelled(fields, "pos"),
            "negatives": _labelled(fields, "neg"),
            "source_doc_id": source_doc_id,
            "split": self._split(fields, source_doc_id or text_hash(query)),
        }

    def _query_id(self, task: str, query: str) -> str:
        """A hash of task and text; a query that a source repeats keeps all its samples."""
        made = f"t-{stable_hash(task, text_hash(query))}"
        self.repeats[made] += 1
        return made if self.repeats[made] == 1 else f"{made}-{self.repeats[made]}"

    def _task(self, fields: Row) -> str:
        if own := _optional(fields, "task"):
            return own
        name = self.file.name.removesuffix(".gz")
        from_name = name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None
        task = self.source.task or from_name
        if task is None:
            raise ConfigError(
                f"{self.file} tells no task: set task in assemble.sources, or call it "
                f"<task>{_SUFFIX}"
            )
        return _task(task, self.tasks, where=self.file).name

    def _instruction(self, fields: Row, task: str) -> str:
        if self.source.form == "reasonembed" or fields.get("prompt") is not None:
            return _string(fields.get("prompt"), "prompt")
        if task not in self.tasks:
            raise ConfigError(
                f"{self.file}: a row has no prompt, and there is no task {task!r} to take the "
                "instruction from; define it under tasks:"
            )
        return self.tasks[task].instruction

    def _rewritten(self, fields: Row, query: str) -> str:
        if self.source.form == "reasonembed":
            return _text(fields, "reasoning_query")
        if "reasoning_query" in fields:
            raise SchemaError("it has a reasoning_query; set form: reasonembed")
        return query

    def _split(self, fields: Row, group: str) -> str:
        split = _optional(fields, "split") or split_of(group, self.held_out_share)
        if split not in (TRAIN, HELD_OUT):
            raise SchemaError(f"split is {split!r}, not {TRAIN} or {HELD_OUT}")
        return split


def _labelled(fields: Row, side: str) -> list[Row]:
    texts = fields.get(side)
    if not isinstance(texts, list) or not texts:
        raise SchemaError(f"{side} must be a list of texts, one at least; it is {_shown(texts)}")
    ids = _beside(fields, f"{side}_ids", len(texts))
    labels = _beside(fields, f"{side}_scores", len(texts))
    return [
        _passage(_string(text, side), doc_id, label, side)
        for text, doc_id, label in zip(texts, ids, labels, strict=True)
    ]


def _passage(text: str, doc_id: Any, label: Any, side: str) -> Row:
    hashed = text_hash(text)
    if label is not None and (not isinstance(label, (int, float)) or not math.isfinite(label)):
        raise SchemaError(f"{side}_scores must hold numbers, not {_shown(label)}")
    own = hashed if doc_id is None else _string(doc_id, f"{side}_ids")
    return {"doc_id": own, "text": text, "label": label, "text_hash": hashed}


def _beside(fields: Row, name: str, length: int) -> list[Any]:
    """A list as long as the texts; of nulls where there is none."""
    values = fields.get(name)
    if values is None:
        return [None] * length
    if not isinstance(values, list) or len(values) != length:
        raise SchemaError(f"{name} must be a list as long as its texts, {length}")
    return values


def _text(fields: Row, name: str) -> str:
    value = _string(fields.get(name), name)
    if not value.strip():
        raise SchemaError(f"{name} is blank")
    return value


def _optional(fields: Row, name: str) -> str | None:
    return None if fields.get(name) is None else _text(fields, name)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise SchemaError(f"{name} must be a text, not {_shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character, Arrow cannot hold it
        raise SchemaError(f"{name} holds half of a surrogate pair: {_shown(value)}") from error
    return value


def _shown(value: Any) -> str:
    return "missing" if value is None else ascii(value)[:80]


# ---- writing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        samples: How many there were.
        rows: Of the file or files; more than samples where each positive has its own.
        note: What the form leaves out or how it is shaped; may be empty.
    """

    samples: int
    rows: int
    note: str


@dataclass(frozen=True)
class _Selection:
    """Samples of a split, in the order in which they were committed."""

    artifact: Artifact
    split: Split

    def tables(self) -> Iterator[pa.Table]:
        for table in self.artifact.parts():
            if self.split != "all":
                table = table.filter(pc.equal(table.column("split"), self.split))
            yield table

    def rows(self) -> Iterator[Row]:
        return _rows(self.tables())


def export_samples(
    samples: Artifact,
    out: Path,
    *,
    form: ExportForm,
    split: Split,
    anchor: Anchor,
    max_negatives: int,
) -> Exported:
    """Writes samples in another program's form.

    Args:
        samples: Of a run; see `finished_samples`.
        out: A file, or a folder for the form `reasonembed`; must not exist.
        form: See the module.
        split: Which samples.
        anchor: Makes the anchors of `sentence-transformers` from instruction and query, for its
            data sets have no column for an instruction.
        max_negatives: Of `sentence-transformers`; fewer if a sample has fewer, for every row has
            the same columns.

    Raises:
        ConfigError: `out` exists, or the split is empty.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; give another place, or delete it first")
    selection = _Selection(samples, split)
    counts = [len(table) for table in selection.tables()]
    if not sum(counts):
        raise ConfigError(f"{samples.uri} has no samples of the split {split}")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}-partial")
    _remove(scratch)  # of an export that was killed
    rows, note = sum(counts), ""
    try:
        if form == "parquet":
            _write_parquet(selection, scratch)
        elif form == "reasonembed":
            _write_folder(selection, scratch)
        elif form == "flagembedding":
            note = "rewritten queries are left out"
            _write_file(selection, scratch)
        else:
            rows, note = _write_columns(selection, scratch, anchor, max_negatives)
        scratch.rename(out)
    finally:
        _remove(scratch)
    return Exported(sum(counts), rows, note)


def _remove(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)
    place.unlink(missing_ok=True)


def _write_parquet(selection: _Selection, out: Path) -> None:
    with pq.ParquetWriter(out, SAMPLES) as writer:
        for table in selection.tables():
            writer.write_table(table)


def _write_folder(selection: _Selection, out: Path) -> None:
    out.mkdir(exist_ok=True)
    streams: dict[str, IO[str]] = {}
    with ExitStack() as stack:
        for row in selection.rows():
            name = f"{row['task'].replace('/', '_')}{_SUFFIX}"
            if name not in streams:
                file = (out / name).open("w", encoding="utf-8")
                streams[name] = stack.enter_context(file)
            line = _line(row) | {"reasoning_query": row["rewritten_query"]}
            streams[name].write(json.dumps(line, ensure_ascii=False) + "\n")


def _write_file(selection: _Selection, out: Path) -> None:
    with out.open("w", encoding="utf-8") as stream:
        for row in selection.rows():
            stream.write(json.dumps(_line(row), ensure_ascii=False) + "\n")


def _line(row: Row) -> Row:
    """Both JSONL forms, without a rewritten query."""
    line: Row = {"prompt": row["instruction"], "query": row["query"]}
    for side, name in (("positives", "pos"), ("negatives", "neg")):
        line[name] = [one["text"] for one in row[side]]
        line[f"{name}_ids"] = [one["doc_id"] for one in row[side]]
        line[f"{name}_scores"] = [one["label"] for one in row[side]]
    own = {name: row[name] for name in ("query_id", "task", "source_doc_id", "split")}
    return line | own


def _write_columns(
    selection: _Selection, out: Path, anchor: Anchor, max_negatives: int
) -> tuple[int, str]:
    fewest = min(
        pc.min(pc.list_value_length(table.column("negatives"))).as_py()
        for table in selection.tables()
        if len(table)
    )
    count = min(fewest, max_negatives)
    names = ["anchor", "positive", *(f"negative_{i}" for i in range(1, count + 1))]
    schema = pa.schema([pa.field(name, pa.string(), nullable=False) for name in names])
    rows = 0
    with pq.ParquetWriter(out, schema) as writer:
        for table in selection.tables():
            for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
                tuples = [row for sample in batch.to_pylist() for row in _tuples(sample, anchor)]
                lines = [dict(zip(names, row, strict=False)) for row in tuples]
                writer.write_table(pa.Table.from_pylist(lines, schema=schema))
                rows += len(lines)
    return rows, (
        f"columns {names[0]}, {names[1]} and {count} negatives (a sample has {fewest} at least, "
        f"train.group_size has room for {max_negatives}); a row a positive; instructions stand in "
        "the anchors; labels, ids and rewritten queries are left out"
    )


def _tuples(sample: Row, anchor: Anchor) -> Iterator[list[str]]:
    query = anchor(sample["instruction"], sample["query"])
    negatives = [one["text"] for one in sample["negatives"]]
    for positive in sample["positives"]:
        yield [query, positive["text"], *negatives]
