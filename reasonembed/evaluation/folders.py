"""Collections of files: BEIR's folders, those of LIMIT and R2MED, and TREC's topics and qrels.

    queries    queries.jsonl, query.jsonl, topics*.jsonl ({"_id" or "id", "text" or "query"}) or
               queries.tsv, topics*.tsv (id, tab, text)
    judgments  qrels/test.tsv, qrels.jsonl, qrels*.txt or qrels*.tsv
    excluded   excluded.jsonl, exclude*.txt; may be missing
    documents  corpus.jsonl, corpus.parquet or corpus/*.parquet; may be missing

All may be gzipped (`.gz`), except Parquet.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonembed import tasks
from reasonembed.corpus import holds_corpus
from reasonembed.errors import EvaluationError
from reasonembed.evaluation import revisions
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.files import get_string, insert, lines_of, read_rows, read_text
from reasonembed.evaluation.metrics import Qrels
from reasonembed.evaluation.qrels import gold_of, read_excluded, read_qrels
from reasonembed.evaluation.specs import Spec

_QUERIES = (
    *("queries.jsonl", "query.jsonl", "topics*.jsonl", "queries.tsv", "topics*.tsv"),
    *("queries.jsonl.gz", "query.jsonl.gz", "topics*.jsonl.gz"),
    *("queries.tsv.gz", "topics*.tsv.gz"),
)
_QRELS = (
    *("qrels/test.tsv", "qrels.jsonl", "qrels*.txt", "qrels*.tsv"),
    *("qrels/test.tsv.gz", "qrels.jsonl.gz", "qrels*.txt.gz", "qrels*.tsv.gz"),
)
_EXCLUDED = ("excluded.jsonl", "exclude*.txt", "excluded.jsonl.gz", "exclude*.txt.gz")
_SHOWN = 3  # files and ids named in a message
_ID, _TEXT = ("_id", "id", "query_id"), ("text", "query")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Files:
    """The files of one collection.

    Attributes:
        queries: Ids and texts.
        qrels: Judgments; queries that they do not judge, or judge by 0 alone, are left out.
        excluded: What queries must not get back, or None.
        corpus: What `corpus.read_corpus` reads, or None.
    """

    queries: Path
    qrels: Path
    excluded: Path | None = None
    corpus: str | None = None


def find_files(folder: Path) -> Files:
    """The files of a collection in a folder.

    Raises:
        EvaluationError: Queries or judgments are missing, or there are several files of a kind.
    """
    excluded = _matching(folder, _EXCLUDED)
    return Files(
        queries=_one(folder, _QUERIES, what="queries"),
        qrels=_one(folder, _QRELS, what="judgments"),
        excluded=_one(folder, _EXCLUDED, what="excluded documents") if excluded else None,
        corpus=str(folder) if holds_corpus(folder) else None,
    )


def load_folder(folder: Path, task: tasks.Task) -> Collection:
    """The collection in a folder, under the folder's name.

    Raises:
        EvaluationError: A file is missing or malformed, or its parts contradict each other.
    """
    return read_files(find_files(folder), name=folder.resolve().name, task=task)


def load_trec(spec: Spec, task: tasks.Task) -> Collection:
    """The collection of `trec:topics=FILE,qrels=FILE[,corpus=FILE][,excluded=FILE][,name=NAME]`.

    Without a name it is called after the folder of its topics.

    Raises:
        EvaluationError: A file is missing or malformed, or its parts contradict each other.
    """
    spec.refuse_options()
    given = dict(one.partition("=")[::2] for one in spec.tasks)
    wrong = given.keys() - {"topics", "qrels", "corpus", "excluded", "name"}
    if wrong or not {"topics", "qrels"} <= given.keys() or not all(given.values()):
        raise EvaluationError(
            f"{spec.text}: the form is "
            "trec:topics=FILE,qrels=FILE[,corpus=FILE][,excluded=FILE][,name=NAME]"
        )
    found = Files(
        queries=Path(given["topics"]),
        qrels=Path(given["qrels"]),
        excluded=Path(given["excluded"]) if "excluded" in given else None,
        corpus=given.get("corpus"),
    )
    name = given.get("name", found.queries.resolve().parent.name)
    return read_files(found, name=name or found.queries.name, task=task)


def read_files(files: Files, *, name: str, task: tasks.Task, benchmark: str = "") -> Collection:
    """Reads a collection; a warning counts the queries that are judged without gold.

    Raises:
        EvaluationError: A file is missing or malformed, or its parts contradict each other.
    """
    judged, texts = gold_of(read_qrels(files.qrels)), read_queries(files.queries)
    excluded = read_excluded(files.excluded) if files.excluded else {}
    if strange := sorted(excluded.keys() - judged.keys() - texts.keys()):
        raise EvaluationError(
            f"{files.excluded}: {len(strange)} query ids are neither in {files.queries} nor in "
            f"{files.qrels}, such as {strange[:_SHOWN]}; are these the files of one collection?"
        )
    qrels = _with_gold(judged, files.qrels)
    queries = {id_: text for id_, text in texts.items() if id_ in qrels}
    pairs = sum(map(len, qrels.values()))
    return Collection(
        name=name,
        queries=queries,
        qrels=qrels,
        excluded={query_id: ids for query_id, ids in excluded.items() if query_id in qrels},
        task=task.name,
        instruction=task.instruction,
        corpus_source=files.corpus,
        benchmark=benchmark,
        revision=revisions.find_revision(name, queries=len(queries), gold=pairs),
    )


def read_queries(file: Path) -> dict[str, str]:
    """Text by query id, of JSON lines or of lines `id TAB text`.

    Raises:
        EvaluationError: The file cannot be read, a line has not the form, or an id stands twice.
    """
    queries: dict[str, str] = {}
    if file.name.endswith((".tsv", ".tsv.gz", ".txt", ".txt.gz")):
        for number, line in lines_of(read_text(file)):
            where = f"{file}, line {number}"
            query_id, _, text = line.partition("\t")
            if not query_id or not text.strip():
                raise EvaluationError(f"{where}: expected id, tab, query; got {line[:80]!r}")
            insert(queries, query_id, text, where=where)
    else:
        for where, row in read_rows([file]):
            query_id = get_string(row, *_ID, where=where)
            insert(queries, query_id, get_string(row, *_TEXT, where=where), where=where)
    return queries


def _with_gold(judged: Mapping[str, Mapping[str, int]], file: Path) -> Qrels:
    """The judgments of queries that have gold; without it nothing can be found for a query."""
    without = [query_id for query_id, gold in judged.items() if not gold]
    if len(without) == len(judged):
        raise EvaluationError(f"{file}: no query has a document of relevance 1 or more")
    if without:
        log.warning(
            "%s: %d of %d queries have no document of relevance 1 or more, such as %r; they are "
            "left out of the mean, where trec_eval counts them 0",
            *(file, len(without), len(judged), without[0]),
        )
    return {query_id: dict(gold) for query_id, gold in judged.items() if gold}


def _matching(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def _one(folder: Path, patterns: Sequence[str], *, what: str) -> Path:
    found = _matching(folder, patterns)
    if len(found) == 1:
        return found[0]
    if found:
        raise EvaluationError(
            f"{folder} holds {len(found)} files of {what}: "
            f"{', '.join(path.name for path in found[:_SHOWN])}; leave one, or name the files: "
            "trec:topics=FILE,qrels=FILE"
        )
    raise EvaluationError(
        f"{folder} holds no {what}: give it {', '.join(p for p in patterns if '.gz' not in p)}"
    )
