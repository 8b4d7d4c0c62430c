"""What one system returned for each query, with the beginnings of the texts: for a person's eyes.

Lies beside a result as `excerpts.jsonl.gz`, so that a page can be written where neither the
collection nor its corpus is at hand.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Collection as Ids
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.files import read_text

EXCERPTS_FILE = "excerpts.jsonl.gz"
NUM_FOUND, NUM_EXCLUDED = 10, 5
_QUERY_CHARS, _DOCUMENT_CHARS = 2_000, 400

Texts = Callable[[Ids[str]], Mapping[str, str]]
"""Gives the texts of doc ids; one that it does not know may be left out."""


@dataclass(frozen=True)
class Looked:
    """A query and what one system returned for it.

    Attributes:
        query_id: Of the query.
        query: Its beginning.
        gold: Relevance by doc id.
        ranks: Place of each gold document that came back, from 1.
        found: Ids of the first documents, in the order that trec_eval measures.
        scores: Their scores.
        num_found: How many came back.
        excluded: The first ids, sorted, of those that the query must not get back.
        num_excluded: How many these are.
        texts: Beginnings of the texts of gold and found documents, by doc id.
    """

    query_id: str
    query: str
    gold: dict[str, int]
    ranks: dict[str, int]
    found: list[str]
    scores: list[float]
    num_found: int
    excluded: list[str]
    num_excluded: int
    texts: dict[str, str]


def look_at(
    query_ids: Iterable[str],
    collection: Collection,
    run: Mapping[str, Mapping[str, float]],
    *,
    texts: Texts,
) -> dict[str, Looked]:
    """What a run returned for some queries.

    Args:
        query_ids: Of the collection; those that the run lacks have nothing found.
        collection: Queries, gold and exclusions.
        run: Score by query id and doc id.
        texts: Asked once, for the gold and the first documents of all these queries.
    """
    ranked = {query_id: _ranked(run.get(query_id, {})) for query_id in query_ids}
    shown = {
        doc_id
        for query_id, doc_ids in ranked.items()
        for doc_id in (*collection.qrels[query_id], *doc_ids[:NUM_FOUND])
    }
    known = texts(shown) if shown else {}
    return {
        query_id: _looked(query_id, collection, doc_ids, run.get(query_id, {}), known)
        for query_id, doc_ids in ranked.items()
    }


def _looked(
    query_id: str,
    collection: Collection,
    doc_ids: list[str],
    scores: Mapping[str, float],
    texts: Mapping[str, str],
) -> Looked:
    gold = dict(collection.qrels[query_id])
    found = doc_ids[:NUM_FOUND]
    excluded = collection.excluded.get(query_id, frozenset())
    return Looked(
        query_id=query_id,
        query=collection.queries[query_id][:_QUERY_CHARS],
        gold=gold,
        ranks={doc_id: place for place, doc_id in enumerate(doc_ids, start=1) if doc_id in gold},
        found=found,
        scores=[float(scores[doc_id]) for doc_id in found],
        num_found=len(doc_ids),
        excluded=sorted(excluded)[:NUM_EXCLUDED],
        num_excluded=len(excluded),
        texts={
            doc_id: texts[doc_id][:_DOCUMENT_CHARS]
            for doc_id in dict.fromkeys((*gold, *found))
            if doc_id in texts
        },
    )


def _ranked(scores: Mapping[str, float]) -> list[str]:
    """Doc ids as trec_eval orders them: by score as float32, then by id, both descending."""
    return sorted(scores, key=lambda doc_id: (np.float32(scores[doc_id]), doc_id), reverse=True)


def write_excerpts(
    directory: Path,
    collection: Collection,
    run: Mapping[str, Mapping[str, float]],
    *,
    texts: Texts,
) -> Path:
    """Writes `excerpts.jsonl.gz` beside a result, a line a query, whole or not at all.

    Args:
        directory: Of the result.
        collection: See `look_at`.
        run: See `look_at`.
        texts: See `look_at`.
    """
    looked = look_at(collection.queries, collection, run, texts=texts)
    lines = "".join(json.dumps(asdict(one), ensure_ascii=False) + "\n" for one in looked.values())
    file = directory / EXCERPTS_FILE
    scratch = file.with_name(f".{EXCERPTS_FILE}")
    # A lone surrogate, which JSON can hold and UTF-8 cannot, must not cost the evaluation its page.
    scratch.write_bytes(gzip.compress(lines.encode("utf-8", "replace"), mtime=0))
    scratch.replace(file)
    return file


def read_excerpts(directory: Path) -> dict[str, Looked]:
    """What `write_excerpts` wrote, by query id; empty where it wrote nothing.

    Raises:
        EvaluationError: The file is damaged.
    """
    file = directory / EXCERPTS_FILE
    if not file.is_file():
        return {}
    rows = (json.loads(line) for line in read_text(file).split("\n") if line)
    try:
        return {row["query_id"]: Looked(**row) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(
            f"{file} cannot be read: {error}; evaluate again, which computes no vector anew"
        ) from error
