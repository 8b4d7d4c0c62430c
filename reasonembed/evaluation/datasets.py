"""Collections by name.

    python-stdlib                         the embedded set: questions to Python's documentation
    FOLDER                                files of `evaluation.folders` (BEIR, TREC)
    trec:topics=FILE,qrels=FILE[,corpus=FILE][,excluded=FILE][,name=NAME]
    bright, bright:biology,pony           12 tasks, or those named
    bright-long                           8 tasks: whole pages, of which one is looked for
    bright+gpt4_reason                    with the queries of a reasoning variant
    bright+adjusted                       copies of gold passages are gold, as Anserini counts
    bright@mteb                           mteb's pinned copy; or bright@<revision of the hub>
    r2med, r2med:biology                  8 tasks
    bright-pro                            7 tasks
    browsecomp-plus                       two judgments: evidence, gold
    limit, limit-small

A collection of a benchmark is called "<benchmark and options>/<task>", as in
"bright+gpt4_reason/biology". Files in `data_dir` come first, then the hub.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import as_file, files
from pathlib import Path

from reasonembed import tasks
from reasonembed.errors import EvaluationError
from reasonembed.evaluation import adapters, bright
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.files import get_ids, get_string, insert, read_rows
from reasonembed.evaluation.folders import load_folder, load_trec
from reasonembed.evaluation.specs import Spec
from reasonembed.fetched import fetched
from reasonembed.storage import is_uri

__all__ = ["BENCHMARKS", "PYTHON_STDLIB", "Collection", "load_collection", "load_collections"]

PYTHON_STDLIB = "python-stdlib"
TREC, BRIGHT_PLUS = "trec", "bright-plus"
_GENERIC = tasks.get("generic")

BENCHMARKS: dict[str, Callable[[Spec, Path | None], list[Collection]]] = {
    **dict.fromkeys(bright.BENCHMARKS, bright.load),
    "r2med": adapters.load_r2med,
    "browsecomp-plus": adapters.load_browsecomp,
    "limit": adapters.load_limit,
    "limit-small": adapters.load_limit,
}
"""Readers of published benchmarks by name."""


def load_collections(
    spec: str, *, data_dir: Path | None = None, task: tasks.Task = _GENERIC
) -> list[Collection]:
    """The collections that a name stands for; see the module.

    Queries and judgments are read at once. A corpus on the hub is fetched when it is read, by
    `corpus.read_corpus(collection.corpus_source)`.

    Args:
        spec: The name; that of a benchmark wins over a folder of the same name (write `./bright`).
        data_dir: Folder that holds benchmarks, each in a folder of its own name.
        task: What queries of a folder or of TREC files are; benchmarks have their own.

    Raises:
        EvaluationError: There is no such collection, it is neither at hand nor on the hub, a file
            is malformed or ends early, or its parts contradict each other.
        StorageError: A folder lies in a store that cannot be read.
    """
    name = re.split(r"[@+:]", spec, maxsplit=1)[0]
    if spec == PYTHON_STDLIB:
        return [_python_stdlib()]
    if name in BENCHMARKS:
        return BENCHMARKS[name](Spec.parse(spec), data_dir)
    if name == TREC:
        return [load_trec(Spec.parse(spec), task)]
    folder = fetched(spec) if is_uri(spec) else Path(spec)
    if name == BRIGHT_PLUS and not folder.is_dir():
        raise EvaluationError(
            f"{spec}: the form of the files of BRIGHT+ (arXiv:2506.07116) is not known here, and "
            "not guessed; give each of its tasks as a folder with queries.jsonl, qrels/test.tsv "
            "and corpus.jsonl"
        )
    if not folder.is_dir():
        raise EvaluationError(
            f"no collection {spec!r}: give {PYTHON_STDLIB!r}, a folder with queries.jsonl and "
            f"qrels/test.tsv, {TREC}:topics=FILE,qrels=FILE, or a benchmark: "
            f"{', '.join(BENCHMARKS)}"
        )
    return [load_folder(folder, task)]


def load_collection(
    spec: str, *, data_dir: Path | None = None, task: tasks.Task = _GENERIC
) -> Collection:
    """The one collection that a name stands for; arguments as of `load_collections`.

    Raises:
        EvaluationError: As `load_collections`, or it stands for several.
    """
    found = load_collections(spec, data_dir=data_dir, task=task)
    if len(found) > 1:
        raise EvaluationError(
            f"{spec!r} stands for {len(found)} collections, one is needed, such as "
            f"{found[0].name.replace('/', ':')}"
        )
    return found[0]


def _python_stdlib() -> Collection:
    queries: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    excluded: dict[str, frozenset[str]] = {}
    source = files("reasonembed.evaluation") / "data" / "python_stdlib" / "queries.jsonl"
    with as_file(source) as path:
        for where, row in read_rows([path]):
            query_id = get_string(row, "query_id", where=where)
            insert(queries, query_id, get_string(row, "query", where=where), where=where)
            qrels[query_id] = dict.fromkeys(get_ids(row, "gold_ids", where=where), 1)
            excluded[query_id] = frozenset(get_ids(row, "excluded_ids", where=where))
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
