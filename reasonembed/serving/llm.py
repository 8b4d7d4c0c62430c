"""q′ and grades for searches: the stages' `Rewriter` and `Annotator` over one engine, in threads.

Without torch; the engine loads what it needs. An LLM that fails is no failure of a search: its
rows are None, and the log says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa

from reasonembed.config import AnnotateConfig, RewriteConfig
from reasonembed.corpus import CorpusStore
from reasonembed.llm.protocol import Engine
from reasonembed.remixer.annotate import PAIRS, Annotator, JudgedQuery
from reasonembed.remixer.rewrite import Rewriter
from reasonembed.schemas import CORPUS, from_rows, stable_hash
from reasonembed.tasks import TASKS, Task

log = logging.getLogger(__name__)

_GENERIC = "generic"
_CONCURRENCY = 8  # calls at once; an engine makes batches of what they hold
_CACHED_REWRITES = 4_096
_CACHED_CHARACTERS = 16_384  # of a rewrite that is kept: more is a text of somebody's, not a query


@dataclass(eq=False)
class _Call:
    """Queries that are being rewritten together.

    Attributes:
        keys: Of the queries.
        task: Gives q′ by key.
        waiting: Requests that want some of them.
    """

    keys: Sequence[str]
    task: asyncio.Task[dict[str, str]]
    waiting: int = 0


class EngineRewriting:
    """q′ by an engine; the newest ones are kept, so that a query asked again costs nothing.

    Requests that ask for the same at once share one call, which ends when none of them waits.

    Args:
        config: Of the rewriting stage.
        engine: Who is asked; is closed by its owner.
        tasks: By name; an unknown one is taken for the generic task.
        concurrency: Calls of the engine at once.
    """

    def __init__(
        self,
        config: RewriteConfig,
        engine: Engine,
        *,
        tasks: Mapping[str, Task] = TASKS,
        concurrency: int = _CONCURRENCY,
    ) -> None:
        self._rewriter = Rewriter(config, engine=engine, tasks=tasks)
        self._tasks = tasks
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="rewrite")
        self._kept: OrderedDict[str, str] = OrderedDict()
        self._running: dict[str, _Call] = {}

    async def rewrite(self, queries: Sequence[str], *, task: str) -> list[str | None]:
        """See `Rewriting.rewrite`."""
        task = task if task in self._tasks else _GENERIC
        # Keys in place of texts: however long they are, what is kept of them is short.
        keys = [stable_hash(task, query, size=16) for query in queries]
        query_of = dict(zip(keys, queries, strict=True))
        written = {key: self._kept[key] for key in query_of if key in self._kept}
        missing = [key for key in query_of if key not in written]
        self._begin({key: query_of[key] for key in missing if key not in self._running}, task)
        calls = {self._running[key] for key in missing}
        for call in calls:
            call.waiting += 1
        try:
            if calls:
                await asyncio.wait({call.task for call in calls})
        finally:
            for call in calls:
                self._leave(call)
        for call in calls:
            written |= call.task.result()
        for key in query_of.keys() & written.keys():
            self._keep(key, written[key])
        return [written.get(key) for key in keys]

    def _begin(self, missing: Mapping[str, str], task: str) -> None:
        """Has queries rewritten, if there are any, for whoever waits for them."""
        if missing:
            call = _Call(list(missing), asyncio.create_task(self._write(missing, task)))
            self._running |= dict.fromkeys(missing, call)

    def _leave(self, call: _Call) -> None:
        """The last to leave a call ends it: nobody would read what it writes."""
        call.waiting -= 1
        if not call.waiting:
            call.task.cancel()
            for key in call.keys:
                del self._running[key]

    async def _write(self, queries: Mapping[str, str], task: str) -> dict[str, str]:
        rows = [
            {"query_id": stable_hash(task, query), "query": query, "task": task}
            for query in queries.values()
        ]
        table = await _in_thread(self._threads, lambda: self._rewriter(pa.Table.from_pylist(rows)))
        texts = table["rewritten_query"].to_pylist() if table else [None] * len(queries)
        pairs = zip(queries, texts, strict=True)
        return {key: text for key, text in pairs if text is not None}

    def _keep(self, key: str, text: str) -> None:
        if len(text) > _CACHED_CHARACTERS:
            return
        self._kept[key] = text
        self._kept.move_to_end(key)
        if len(self._kept) > _CACHED_REWRITES:
            self._kept.popitem(last=False)


class EngineGrading:
    """Grades by an engine; equal documents of a query are judged once.

    Args:
        config: Of the annotation stage.
        engine: Who is asked; is closed by its owner.
        tasks: By name; an unknown one is taken for the generic task.
        concurrency: Queries whose documents are judged at once.
    """

    def __init__(
        self,
        config: AnnotateConfig,
        engine: Engine,
        *,
        tasks: Mapping[str, Task] = TASKS,
        concurrency: int = _CONCURRENCY,
    ) -> None:
        self._config, self._engine, self._tasks = config, engine, tasks
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="grade")

    async def grade(self, query: str, documents: Sequence[str], *, task: str) -> list[float | None]:
        """See `Grading.grade`: the expected label where the annotator gives one, else the label."""
        if not documents:
            return []
        task = task if task in self._tasks else _GENERIC
        table = await _in_thread(self._threads, lambda: self._judge(query, documents, task))
        grades: dict[str, float | None] = {}
        for row in table.to_pylist() if table else []:
            expected, label = row["expected_label"], row["relevance_label"]
            grades[row["doc_id"]] = label if expected is None else expected
        found = [grades.get(stable_hash(one)) for one in documents]
        return [None if grade is None else float(grade) for grade in found]

    def _judge(self, query: str, documents: Sequence[str], task: str) -> pa.Table:
        texts = {stable_hash(one): one for one in documents}  # an id that follows from the text
        query_id = stable_hash(task, query)
        annotator = Annotator(
            self._config,
            engine=self._engine,
            corpus=_corpus(texts, task),
            queries={query_id: JudgedQuery(query, task)},
            tasks=self._tasks,
        )
        pairs: list[dict[str, object]] = [
            {"query_id": query_id, "doc_id": doc_id} for doc_id in texts
        ]
        return annotator(from_rows(pairs, PAIRS, where="pairs"))


def _corpus(texts: Mapping[str, str], task: str) -> CorpusStore:
    rows: list[dict[str, object]] = [
        {
            "doc_id": doc_id,
            "text": text,
            "title": "",
            "task": task,
            "parent_id": None,
            "text_hash": doc_id,
            "group_id": doc_id,
        }
        for doc_id, text in texts.items()
    ]
    return CorpusStore(from_rows(rows, CORPUS, where="corpus"))


async def _in_thread(threads: ThreadPoolExecutor, call: Callable[[], pa.Table]) -> pa.Table | None:
    """What the call gives; None where it fails. A cancelled call that waits is never made."""
    try:
        return await asyncio.get_running_loop().run_in_executor(threads, call)
    except Exception as error:  # the LLM's side of the boundary: searches go on without it
        log.error("the LLM gave no answer: %s: %s", type(error).__name__, str(error)[:200])
        return None
