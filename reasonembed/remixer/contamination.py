"""Does the training data hold a benchmark's queries or gold documents?

Three checks of every text that is trained on, seeds included, against every query and every gold
document of a benchmark: equal words; a shared run of 13 words; near-duplicates, which MinHash
finds and the exact Jaccard of their 5-word shingles confirms. Reads `samples`, `seeds`, `corpus`
and benchmarks in BEIR or BRIGHT form; writes nothing.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from reasonembed.corpus import CorpusStore, passage_text
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.datasets import Collection, load_collection
from reasonembed.remixer.duplicates import shingles, similarity
from reasonembed.schemas import stable_hash

Check = Literal["exact", "near-duplicate", "13-gram"]
CHECKS: tuple[Check, ...] = ("exact", "near-duplicate", "13-gram")
PARTS = ("query", "rewritten query", "seed", "positive", "negative")
GRAM, SHINGLE = 13, 5  # words
MIN_JACCARD = 0.8
_PERMUTATIONS = 128
_BANDS = (32, 4)  # bands and rows: a pair of 0.8 is missed once in 10^7; what is found is verified
_EXAMPLES = 2  # of each kind
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Revision:
    """Counts of a published state of a benchmark; gold are distinct pairs."""

    queries: int
    documents: int
    gold: int


BRIGHT_REVISION = {
    "biology": Revision(103, 57_359, 372),
    "earth_science": Revision(116, 121_249, 585),
    "economics": Revision(103, 50_220, 800),
    "psychology": Revision(101, 52_835, 692),
    "robotics": Revision(101, 61_961, 520),
    "stackoverflow": Revision(117, 107_081, 478),
    "sustainable_living": Revision(108, 60_792, 576),
    "leetcode": Revision(142, 413_932, 262),
    "pony": Revision(112, 7_894, 2_219),
    "aops": Revision(111, 188_002, 524),
    "theoremqa_questions": Revision(194, 188_002, 439),
    "theoremqa_theorems": Revision(76, 23_839, 151),
}
"""BRIGHT as it has been since autumn 2024, which published results are for (CC-BY-4.0,
xlangai/BRIGHT)."""


@dataclass(frozen=True)
class Benchmark:
    """What the training data is searched for.

    Attributes:
        name: Of the benchmark, or of its task.
        queries: Text by id.
        gold: Text of each gold document by id; None where it is not at hand.
        excluded: Documents that a query excludes.
        warnings: What is not as it should be in its files.
    """

    name: str
    queries: Mapping[str, str]
    gold: Mapping[str, str | None]
    excluded: frozenset[str] = frozenset()
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, collection: Collection) -> Benchmark:
        """A collection; its documents' texts are still to be found."""
        gold = sorted({doc_id for judged in collection.qrels.values() for doc_id in judged})
        excluded = frozenset().union(*collection.excluded.values())
        return cls(collection.name, collection.queries, dict.fromkeys(gold), excluded)

    def with_texts_of(self, corpus: CorpusStore) -> Benchmark:
        """Gold documents without a text get that of the corpus's document of the same id."""
        gold = {
            doc_id: corpus.text(doc_id) if text is None and doc_id in corpus else text
            for doc_id, text in self.gold.items()
        }
        return replace(self, gold=gold)


@dataclass(frozen=True)
class TrainingText:
    """A text that is trained on, or was written from.

    Attributes:
        part: One of `PARTS`.
        text_id: Of the query or of the document.
        text: The text.
    """

    part: str
    text_id: str
    text: str


@dataclass(frozen=True)
class Overlap:
    """A text of the training data and one of the benchmark."""

    check: Check
    kind: Literal["query", "gold document"]
    benchmark_id: str
    part: str
    text_id: str
    text: str  # the benchmark's


@dataclass
class Count:
    """What one check found between one kind of the benchmark and one part of the training data."""

    benchmark_ids: set[str] = field(default_factory=set)
    text_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Contamination:
    """What of a benchmark stands in the training data.

    Attributes:
        benchmark: What was searched for.
        counts: By (check, kind of the benchmark's text, part of the training data); no zeros.
        examples: A few of each count.
        named_seeds: Seeds that the benchmark names as gold or excluded, by id.
    """

    benchmark: Benchmark
    counts: Mapping[tuple[str, str, str], Count]
    examples: Sequence[Overlap]
    named_seeds: Sequence[str]


def contamination(
    benchmarks: Sequence[Benchmark], texts: Iterable[TrainingText]
) -> list[Contamination]:
    """Searches the training data for several benchmarks in one pass.

    Args:
        benchmarks: See `load_benchmarks`.
        texts: See `training_texts`; read once, none of them is kept.

    Returns:
        One for each benchmark, in their order.
    """
    index = _Index(benchmarks)
    counts: list[dict[tuple[str, str, str], Count]] = [{} for _ in benchmarks]
    examples: list[list[Overlap]] = [[] for _ in benchmarks]
    named = [{*one.gold, *one.excluded} for one in benchmarks]
    seeds: list[list[str]] = [[] for _ in benchmarks]
    for text in texts:
        if text.part == "seed":
            for place, ids in enumerate(named):
                if text.text_id in ids:
                    seeds[place].append(text.text_id)
        for check, item in index.find(text.text):
            key = (check, item.kind, text.part)
            count = counts[item.place].setdefault(key, Count())
            if len(count.benchmark_ids) < _EXAMPLES and item.id not in count.benchmark_ids:
                found = Overlap(check, item.kind, item.id, text.part, text.text_id, item.text)
                examples[item.place].append(found)
            count.benchmark_ids.add(item.id)
            count.text_ids.add(text.text_id)
    return [
        Contamination(one, counts[i], sorted(examples[i], key=_gravity), seeds[i])
        for i, one in enumerate(benchmarks)
    ]


def _gravity(overlap: Overlap) -> tuple[int, int, str, str]:
    return (
        CHECKS.index(overlap.check),
        PARTS.index(overlap.part),
        overlap.benchmark_id,
        overlap.text_id,
    )


def training_texts(
    samples: Iterable[pa.Table], *, corpus: CorpusStore, seeds: Iterable[str] = ()
) -> Iterator[TrainingText]:
    """Everything that is trained on, each document once, then the seeds.

    Args:
        samples: Rows of `schemas.SAMPLES` in parts, one of which is held at a time.
        corpus: Where the seeds stand.
        seeds: Source documents that queries were written from.
    """
    seen: dict[str, set[str]] = {"positive": set(), "negative": set()}
    for table in samples:
        for name, part in (("query", "query"), ("rewritten_query", "rewritten query")):
            for id_, text in zip(table.column("query_id"), table.column(name), strict=True):
                yield TrainingText(part, id_.as_py(), text.as_py())
        for part, known in seen.items():
            yield from _documents(table.column(f"{part}s"), part, known)
    for doc_id in sorted(set(seeds)):
        if doc_id in corpus:
            yield TrainingText("seed", doc_id, corpus.text(doc_id))


def _documents(column: pa.ChunkedArray, part: str, known: set[str]) -> Iterator[TrainingText]:
    """Documents of a list column whose text hash is not known yet."""
    for chunk in column.chunks:
        flat = chunk.flatten()
        hashes, ids, texts = (pc.struct_field(flat, x) for x in ("text_hash", "doc_id", "text"))
        for place, hash_ in enumerate(hashes.to_pylist()):
            if hash_ not in known:  # in Arrow until here: a text stands there dozens of times
                known.add(hash_)
                yield TrainingText(part, ids[place].as_py(), texts[place].as_py())


# ---- the search ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    place: int  # of the benchmark
    kind: Literal["query", "gold document"]
    id: str
    text: str


class _Index:
    """The texts of all benchmarks, by what the checks look for."""

    def __init__(self, benchmarks: Sequence[Benchmark]) -> None:
        from datasketch import MinHashLSH

        self._items = list(_items(benchmarks))
        self._exact: dict[str, list[int]] = {}
        self._grams: dict[int, list[int]] = {}
        self._vocabulary: set[int] = set()
        self._shingles: list[frozenset[int]] = []
        self._bands = MinHashLSH(num_perm=_PERMUTATIONS, params=_BANDS)
        for number, item in enumerate(self._items):
            words = _words(item.text)
            self._exact.setdefault(stable_hash(*words, size=16), []).append(number)
            for gram in _runs(words, GRAM):
                self._grams.setdefault(gram, []).append(number)
            self._vocabulary |= _runs(words, SHINGLE)
            self._shingles.append(shingles(item.text, size=SHINGLE))
            self._bands.insert(number, _signature(self._shingles[-1]))

    def find(self, text: str) -> Iterator[tuple[Check, _Item]]:
        """What of the benchmarks stands in a text, by each check."""
        words = _words(text)
        for number in self._exact.get(stable_hash(*words, size=16), ()):
            yield "exact", self._items[number]
        for number in self._near(text, words):
            yield "near-duplicate", self._items[number]
        shared = {n for gram in _runs(words, GRAM) for n in self._grams.get(gram, ())}
        for number in sorted(shared):
            yield "13-gram", self._items[number]

    def _near(self, text: str, words: Sequence[str]) -> list[int]:
        # Jaccard j means that at least j of a text's own shingles are shared, and few texts do.
        runs = _runs(words, SHINGLE)
        if len(runs & self._vocabulary) < MIN_JACCARD * len(runs):
            return []
        own = shingles(text, size=SHINGLE)
        found = sorted(self._bands.query(_signature(own)))
        return [n for n in found if similarity(own, self._shingles[n]) >= MIN_JACCARD]


def _items(benchmarks: Sequence[Benchmark]) -> Iterator[_Item]:
    for place, one in enumerate(benchmarks):
        for id_, text in one.queries.items():
            yield _Item(place, "query", id_, text)
        for id_, gold in one.gold.items():
            if gold is not None:
                yield _Item(place, "gold document", id_, gold)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _runs(words: Sequence[str], size: int) -> set[int]:
    """Hashes of the runs of so many words; tuples would take ten times the memory."""
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


def _signature(grams: frozenset[int]) -> Any:
    from datasketch import MinHash

    # The permutations take 32 bits of the 64.
    signature = MinHash(num_perm=_PERMUTATIONS, hashfunc=lambda gram: gram >> 32)
    signature.update_batch(sorted(grams))
    return signature


# ---- files --------------------------------------------------------------------------------------


def load_benchmarks(path: str) -> list[Benchmark]:
    """Reads benchmarks in BEIR or BRIGHT form.

    Args:
        path: A BEIR folder (`queries.jsonl`, `qrels/test.tsv`, and `corpus.jsonl` if it is there);
            a file of BRIGHT's examples (JSONL, also gzipped, or Parquet, with `id`, `query`,
            `gold_ids` and `excluded_ids`); or a folder of such files, those of the hub
            (`examples/`, `documents/`) among them.

    Raises:
        EvaluationError: There is no such thing, or a file is malformed.
    """
    place = Path(path)
    if (place / "queries.jsonl").is_file():
        return [_beir(place)]
    files = [place] if place.is_file() else _example_files(place)
    if not files:
        raise EvaluationError(
            f"report.benchmarks: {path!r} is neither a BEIR folder (queries.jsonl, qrels/test.tsv) "
            "nor a file or folder of BRIGHT's examples (topics.*.jsonl.gz, examples/*.parquet)"
        )
    return [_bright(file) for file in files]


def _example_files(folder: Path) -> list[Path]:
    found = [*folder.glob("topics.*.jsonl*"), *(folder / "examples").glob("*.parquet")]
    return sorted(found or (folder / "examples").glob("*.jsonl*"))


def _beir(folder: Path) -> Benchmark:
    benchmark = Benchmark.of(load_collection(str(folder)))
    if not (folder / "corpus.jsonl").is_file():
        return benchmark
    gold = dict(benchmark.gold)
    for where, row in _rows(folder / "corpus.jsonl"):
        doc_id = row.get("_id")
        if doc_id in gold:
            text = _text(row, "text", where=where)
            gold[doc_id] = passage_text(str(row.get("title") or ""), text)
    missing = [doc_id for doc_id, text in gold.items() if text is None]
    warnings = (_missing(folder.name, missing),) if missing else ()
    return replace(benchmark, gold=gold, warnings=warnings)


def _bright(file: Path) -> Benchmark:
    task = _bright_task(file)
    queries: dict[str, str] = {}
    gold: dict[str, str | None] = {}
    excluded: set[str] = set()
    pairs = 0
    for where, row in _rows(file):
        query_id = _text(row, "id", where=where)
        if query_id in queries:
            raise EvaluationError(f"{where}: query {query_id!r} stands there twice; keep one")
        queries[query_id] = _text(row, "query", where=where)
        ids = _ids(row, "gold_ids", where=where)
        gold |= dict.fromkeys(ids)
        pairs += len(ids)
        excluded |= _ids(row, "excluded_ids", where=where)
    num_documents, missing = 0, ""
    if documents := _document_files(file, task):
        num_documents = _fill(gold, documents)
        missing = _missing(file.name, [id_ for id_, text in gold.items() if text is None])
    counts = Revision(len(queries), num_documents, pairs)
    warnings = [*_count_warnings(file, task, counts), *filter(None, [missing])]
    name = f"BRIGHT {task}" if task else file.name
    return Benchmark(name, queries, gold, frozenset(excluded), tuple(warnings))


def _bright_task(file: Path) -> str | None:
    name = file.name.lower().replace("-", "_")
    return next((task for task in BRIGHT_REVISION if task in name), None)


def _document_files(examples: Path, task: str | None) -> list[Path]:
    """The documents beside the examples, as the hub has them."""
    folder = examples.parent.parent / "documents"
    if task is None or examples.parent.name != "examples" or not folder.is_dir():
        return []
    return sorted(file for file in folder.iterdir() if _bright_task(file) == task)


def _fill(gold: dict[str, str | None], files: Sequence[Path]) -> int:
    """Puts in the texts of gold documents; returns how many documents there are."""
    number = 0
    for file in files:
        for where, row in _rows(file):
            number += 1
            if row.get("id") in gold:
                gold[row["id"]] = _text(row, "content", where=where)
    return number


def _count_warnings(file: Path, task: str | None, found: Revision) -> Iterator[str]:
    if task is None:
        return
    known = BRIGHT_REVISION[task]
    for what in ("queries", "documents", "gold"):
        there, wanted = getattr(found, what), getattr(known, what)
        if there != wanted and (what != "documents" or there):
            things = "gold pairs" if what == "gold" else what
            yield (
                f"{file.name} has {there:,} {things}; the revision of BRIGHT that published "
                f"results are for has {wanted:,}"
            )


def _missing(name: str, ids: Sequence[str]) -> str:
    return f"{name}: {len(ids):,} gold documents are not there, such as {ids[:3]}" if ids else ""


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each row of a JSONL or Parquet file."""
    try:
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as parquet:
                rows = (row for batch in parquet.iter_batches() for row in batch.to_pylist())
                yield from ((f"{file}, row {n}", row) for n, row in enumerate(rows))
            return
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise EvaluationError(f"{file}, line {number}: expected an object")
                    yield f"{file}, line {number}", row
    except (OSError, EOFError, zlib.error, ValueError, pa.ArrowException) as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error


def _text(row: Mapping[str, Any], name: str, *, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f"{where}: {name!r} must be a string with text, got {value!r}")
    return value


def _ids(row: Mapping[str, Any], name: str, *, where: str) -> set[str]:
    ids = row.get(name)
    if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids):
        raise EvaluationError(f"{where}: {name!r} must be a list of ids, got {ids!r}")
    return set(ids) - {"N/A"}  # what BRIGHT writes for none
