"""Evaluation collections: queries, gold documents, and documents that a query must not get back.

`qrels` here hold gold only. Some collections write excluded documents into their relevance files as
rows of relevance 0; such rows say "not gold" and nothing else, so they are read and left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from reasonembed import tasks
from reasonembed.errors import EvaluationError
from reasonembed.schemas import stable_hash

PYTHON_STDLIB = "python-stdlib"
_Value = TypeVar("_Value")
_SHOWN = 5  # ids named in a message


_GENERIC = tasks.get("generic")


@dataclass(frozen=True)
class Collection:
    """What systems are compared on.

    Attributes:
        name: Of the collection.
        queries: Text by query id; every query has gold.
        qrels: Relevance (1 or more) of the gold documents, by query id and doc id.
        excluded: Documents to remove from a query's ranking before the cut; a query may be absent.
        task: Name in `reasonembed.tasks`.
        instruction: What queries ask for.
        corpus_source: `CorpusConfig.source` of the documents, or None if they lie elsewhere.

    Raises:
        EvaluationError: Queries and qrels differ, a query has no gold, or gold is excluded.
    """

    name: str
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    excluded: Mapping[str, frozenset[str]]
    task: str
    instruction: str
    corpus_source: str | None

    def __post_init__(self) -> None:
        for what, given in (("qrels", self.qrels), ("exclusions", self.excluded)):
            unknown = sorted(set(given) - set(self.queries))
            if unknown:
                raise EvaluationError(
                    f"{self.name}: {len(unknown)} query ids of the {what} have no text, such as "
                    f"{unknown[:_SHOWN]}"
                )
        for query_id in self.queries:
            gold = self.qrels.get(query_id, {})
            if not gold or min(gold.values()) < 1:
                raise EvaluationError(
                    f"{self.name}: query {query_id!r} needs gold documents of relevance 1 or more, "
                    f"it has {dict(gold)}; leave the query out or judge it"
                )
            both = sorted(gold.keys() & self.excluded.get(query_id, frozenset()))
            if both:
                raise EvaluationError(
                    f"{self.name}: query {query_id!r} has documents that are gold and excluded: "
                    f"{both[:_SHOWN]}; a document can be one of the two"
                )

    def named_documents_of(self, query_id: str) -> frozenset[str]:
        """Documents that a query names, as gold or as excluded."""
        return frozenset(self.qrels[query_id]) | self.excluded.get(query_id, frozenset())

    def named_documents(self) -> frozenset[str]:
        """Documents that any query names; none of them may be a seed of training queries."""
        return frozenset().union(*map(self.named_documents_of, self.queries))

    def fingerprint(self) -> str:
        """Hash of queries, judgments and exclusions."""
        rows = [
            (query_id, text, sorted(self.qrels[query_id].items()))
            for query_id, text in sorted(self.queries.items())
        ]
        excluded = [(id_, sorted(docs)) for id_, docs in sorted(self.excluded.items())]
        return stable_hash(rows, excluded, size=16)

    def check_against(self, doc_ids: Iterable[str]) -> None:
        """Makes sure that the searched corpus holds every gold document.

        An excluded document that the corpus lacks is no error: nothing can return it.

        Raises:
            EvaluationError: Gold documents are missing; the message names some.
        """
        known = set(doc_ids)
        missing = sorted({doc for gold in self.qrels.values() for doc in gold} - known)
        if missing:
            raise EvaluationError(
                f"{self.name}: {len(missing)} gold documents are not in the corpus of "
                f"{len(known)} documents, such as {missing[:_SHOWN]}; is it the right corpus?"
            )

    def credit_duplicates(self, twins: Callable[[str], Iterable[str]]) -> Collection:
        """The same collection with gold extended to documents of equal text.

        Corpora hold up to 38 % duplicates, and the official qrels count a gold document's twin as
        wrong. Report this variant beside the official one, never in its place. A twin that the
        query excludes stays excluded.

        Args:
            twins: The doc ids whose text equals that of a document, itself included.
        """
        qrels = {
            query_id: {
                twin: relevance
                for doc_id, relevance in gold.items()
                for twin in (doc_id, *twins(doc_id))
                if twin not in self.excluded.get(query_id, frozenset())
            }
            for query_id, gold in self.qrels.items()
        }
        return replace(self, name=f"{self.name} (duplicates credited)", qrels=qrels)


def load_collection(name: str, *, task: tasks.Task = _GENERIC) -> Collection:
    """The packaged collection `python-stdlib`, or a folder in BEIR form.

    A folder holds `queries.jsonl` ({"_id", "text"}), `qrels/test.tsv` (query-id, corpus-id, score)
    and, if queries exclude documents, `excluded.jsonl` ({"query_id", "excluded_ids"}). Its queries
    are those that `test.tsv` judges; its corpus is `corpus.jsonl`, if there.

    Args:
        name: `python-stdlib` or the path of a folder.
        task: Task of a folder's queries; `python-stdlib` has its own.

    Raises:
        EvaluationError: A file is missing or malformed, or its parts contradict each other.
    """
    if name == PYTHON_STDLIB:
        return _python_stdlib()
    folder = Path(name)
    if not folder.is_dir():
        raise EvaluationError(
            f"no collection {name!r}: give {PYTHON_STDLIB!r} or a folder with queries.jsonl and "
            "qrels/test.tsv"
        )
    return _beir(folder, task)


def _python_stdlib() -> Collection:
    source = files("reasonembed.evaluation") / "data" / "python_stdlib" / "queries.jsonl"
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    excluded: dict[str, frozenset[str]] = {}
    for where, row in _json_lines(source):
        query_id = _string(row, "query_id", where=where)
        _insert(queries, query_id, _string(row, "query", where=where), where=where)
        qrels[query_id] = dict.fromkeys(_ids(row, "gold_ids", where=where), 1)
        excluded[query_id] = frozenset(_ids(row, "excluded_ids", where=where))
    task = tasks.get(PYTHON_STDLIB)
    return Collection(
        name=PYTHON_STDLIB,
        queries=queries,
        qrels=qrels,
        excluded=excluded,
        task=task.name,
        instruction=task.instruction,
        corpus_source=PYTHON_STDLIB,
    )


def _beir(folder: Path, task: tasks.Task) -> Collection:
    qrels = _read_qrels(folder / "qrels" / "test.tsv")
    texts: dict[str, str] = {}
    for where, row in _json_lines(folder / "queries.jsonl"):
        query_id = _string(row, "_id", where=where)
        _insert(texts, query_id, _string(row, "text", where=where), where=where)
    excluded: dict[str, frozenset[str]] = {}
    if (folder / "excluded.jsonl").is_file():
        for where, row in _json_lines(folder / "excluded.jsonl"):
            query_id = _string(row, "query_id", where=where)
            ids = frozenset(_ids(row, "excluded_ids", where=where))
            _insert(excluded, query_id, ids, where=where)
    return Collection(
        name=folder.name,
        queries={query_id: text for query_id, text in texts.items() if query_id in qrels},
        qrels=qrels,
        excluded={query_id: ids for query_id, ids in excluded.items() if query_id in qrels},
        task=task.name,
        instruction=task.instruction,
        corpus_source=str(folder) if (folder / "corpus.jsonl").is_file() else None,
    )


def _read_qrels(file: Path) -> dict[str, dict[str, int]]:
    """Gold of BEIR's test.tsv; rows of relevance 0 and below are not gold."""
    qrels: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_lines(file), start=1):
        fields = line.rstrip("\r\n").split("\t")
        if not line.strip() or (number == 1 and fields[-1] == "score"):
            continue
        try:
            query_id, doc_id, score = fields
            relevance = int(score)
        except ValueError:
            raise EvaluationError(
                f"{file}, line {number}: expected query-id, corpus-id and a whole-number score "
                f"between tabs, got {line[:80]!r}"
            ) from None
        judged = qrels.setdefault(query_id, {})
        if relevance > 0:
            _insert(judged, doc_id, relevance, where=f"{file}, line {number}")
    return qrels


def _lines(file: Traversable) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise EvaluationError(f"{file} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{file} is not UTF-8: {error}") from error


def _json_lines(file: Traversable) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each line that holds an object."""
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise EvaluationError(f"{where}: expected an object, got {line[:80]!r}")
        yield where, row


def _string(row: dict[str, Any], name: str, *, where: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(
            f"{where}: {name!r} must be a string that is not blank, got {value!r}"
        )
    return value


def _ids(row: dict[str, Any], name: str, *, where: str) -> list[str]:
    ids = row.get(name)
    if not isinstance(ids, list) or not all(isinstance(one, str) and one for one in ids):
        raise EvaluationError(f"{where}: {name!r} must be a list of ids, got {ids!r}")
    return ids


def _insert(table: dict[str, _Value], key: str, value: _Value, *, where: str) -> None:
    if key in table:
        raise EvaluationError(f"{where}: {key!r} stands there twice; keep one")
    table[key] = value
