"""BRIGHT (arXiv:2407.12883), short and long, and BRIGHT-Pro (arXiv:2605.04018).

Their tables are Parquet on the hub: `examples/<task>…` holds queries, gold and excluded ids,
`documents/<task>…` the passages and `long_documents/<task>…` whole pages; each reasoning variant of
BRIGHT is one more `examples` with the query replaced. The same tables as `.jsonl` or `.jsonl.gz`
are read too, and so are the topic files of Anserini (`topics.bright-<task>-original.jsonl.gz`),
whose `qrels.bright-<task>.fixed.txt` count copies of gold passages as gold.

Traps of the data: `["N/A"]` stands for "no ids", one task repeats gold ids, ids of queries repeat
across tasks, and some tasks have lists of excluded ids with entries that no corpus holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonembed import hub, tasks
from reasonembed.errors import EvaluationError
from reasonembed.evaluation import revisions
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.files import get_ids, get_string, insert, read_rows
from reasonembed.evaluation.metrics import Qrels
from reasonembed.evaluation.qrels import NOTHING, gold_of, read_qrels
from reasonembed.evaluation.specs import Spec, local_folders
from reasonembed.records import table_files

EXAMPLES = "examples"
REASONED = (
    "gpt4_reason",
    "claude-3-opus_reason",
    "Gemini-1.0_reason",
    "llama3-70b_reason",
    "grit_reason",
)
"""Tables with the queries replaced by what a model thought about them."""

ADJUSTED = "adjusted"
"""The option for judgments that count copies of gold passages."""

_POSTS = tasks.BRIGHT[:7]
_MTEB = ("mteb/BRIGHT", "c26703e6600d97c579ee2985f16cf307db13ed85")


@dataclass(frozen=True)
class _Benchmark:
    """What its name tells: where files lie, the tasks, the tables and columns that count."""

    repo: str
    folders: tuple[str, ...]
    tasks: tuple[str, ...]
    documents: str = "documents"
    gold: str = "gold_ids"
    options: tuple[str, ...] = ()


_BRIGHT = ("xlangai/BRIGHT", ("bright", "BRIGHT"))
BENCHMARKS: Mapping[str, _Benchmark] = {
    "bright": _Benchmark(*_BRIGHT, tasks.BRIGHT, options=(*REASONED, ADJUSTED)),
    "bright-long": _Benchmark(
        *_BRIGHT,
        (*_POSTS, "pony"),
        documents="long_documents",
        gold="gold_ids_long",
        options=REASONED,
    ),
    "bright-pro": _Benchmark("yale-nlp/Bright-Pro", ("bright-pro", "Bright-Pro"), _POSTS),
}


def load(spec: Spec, data_dir: Path | None) -> list[Collection]:
    """The tasks of one of `BENCHMARKS`, as named.

    Args:
        spec: `@mteb` takes mteb's pinned copy, any other revision is one of the hub; `+<table>`
            takes the queries of `REASONED`, `+adjusted` the duplicate-adjusted judgments.
        data_dir: Folder in which `bright` (or `BRIGHT`, `bright-pro`, …) lies; what is not there
            comes from the hub.

    Raises:
        EvaluationError: The data cannot be had, is damaged, or contradicts itself.
    """
    request = _Request.of(spec, data_dir)
    found = request.find_examples(spec.choose(request.benchmark.tasks))
    collections = [request.read(task, place) for task, place in found.items()]
    revisions.check_one_revision({one.name: one.revision for one in collections})
    return collections


@dataclass(frozen=True)
class _Place:
    """Where a task's queries were found: their files, and the commit if they are the hub's."""

    files: Sequence[Path]
    commit: str | None = None


@dataclass(frozen=True)
class _Request:
    """What was asked for, and where to look."""

    label: str
    benchmark: _Benchmark
    repo: str
    revision: str | None
    home: str
    table: str
    is_adjusted: bool
    is_long: bool
    folders: Sequence[Path]

    @classmethod
    def of(cls, spec: Spec, data_dir: Path | None) -> _Request:
        benchmark = BENCHMARKS[spec.name]
        queries = _queries_table(spec, benchmark)
        repo, revision = benchmark.repo, spec.revision
        if revision == "mteb" and benchmark.repo == _BRIGHT[0]:
            repo, revision = _MTEB
        at = f"@{spec.revision}" if spec.revision else ""
        is_adjusted = ADJUSTED in spec.options
        options = [queries] * (queries != EXAMPLES) + [ADJUSTED] * is_adjusted
        return cls(
            label="+".join((f"{spec.name}{at}", *options)),
            benchmark=benchmark,
            repo=repo,
            revision=revision,
            home=f"{benchmark.folders[0]}{at}",
            table=queries,
            is_adjusted=is_adjusted,
            is_long=benchmark.gold == "gold_ids_long",
            folders=local_folders(data_dir, *(f"{name}{at}" for name in benchmark.folders)),
        )

    def find_examples(self, chosen: Sequence[str]) -> dict[str, _Place]:
        """Where each task's queries lie; those that no folder holds are fetched, at once."""
        found: dict[str, _Place] = {}
        for task in chosen:
            for folder in self.folders:
                if files := self._example_files(folder, task):
                    found[task] = _Place(files)
                    break
        missing = [task for task in chosen if task not in found]
        if missing:
            found |= self._fetch_examples(missing)
        return {task: found[task] for task in chosen}

    def _example_files(self, folder: Path, task: str) -> list[Path]:
        variant = "original" if self.table == EXAMPLES else self.table
        topics = f"topics.bright-{task.replace('_', '-')}-{variant}"
        return table_files(folder / self.table, task, error=EvaluationError) or table_files(
            folder, topics, error=EvaluationError
        )

    def _fetch_examples(self, missing: Sequence[str]) -> dict[str, _Place]:
        looked = f"not in {', '.join(map(str, self.folders))}, and" if self.folders else "not here:"
        cure = (
            f"or put {self.table}/<task>.parquet or .jsonl into {self.home} of a folder and give "
            "that as data_dir"
        )
        try:
            snapshot = hub.fetch(
                self.repo,
                [f"{self.table}/{task}*.parquet" for task in missing],
                error=EvaluationError,
                revision=self.revision,
            )
        except EvaluationError as error:
            raise EvaluationError(
                f"{self.label}: queries of {', '.join(missing)} are {looked} {error}; {cure}"
            ) from error
        found: dict[str, _Place] = {}
        for task in missing:
            files = table_files(snapshot.folder / self.table, task, error=EvaluationError)
            if not files:
                raise EvaluationError(
                    f"{self.label}: queries of {task} are {looked} the hub's copy of {self.repo} "
                    f"on this machine lacks {self.table}/{task}; {cure}"
                )
            found[task] = _Place(files, snapshot.commit)
        return found

    def read(self, task: str, place: _Place) -> Collection:
        """The collection of one task."""
        name = f"{self.label}/{task}"
        queries: dict[str, str] = {}
        qrels: Qrels = {}
        excluded: dict[str, frozenset[str]] = {}
        for where, row in read_rows(place.files):
            query_id = get_string(row, "id", where=where)
            insert(queries, query_id, get_string(row, "query", where=where), where=where)
            gold = get_ids(row, self.benchmark.gold, where=where)
            qrels[query_id] = {doc_id: 1 for doc_id in gold if doc_id != NOTHING}
            if row.get("excluded_ids") is not None:  # BRIGHT-Pro has no such column
                out = get_ids(row, "excluded_ids", where=where)
                excluded[query_id] = frozenset(out) - {NOTHING}
        if not queries:
            raise EvaluationError(f"{place.files[0]}: there are no queries; is the file whole?")
        pairs = sum(map(len, qrels.values()))
        revision = revisions.find_revision(name, queries=len(queries), gold=pairs)
        return Collection(
            name=name,
            queries=queries,
            qrels=self._adjusted(qrels, task) if self.is_adjusted else qrels,
            excluded=excluded,
            task=task,
            instruction=tasks.get(task).instruction,
            corpus_source=self._corpus_source(task, place),
            benchmark=self.label,
            revision=revision,
            is_long=self.is_long,
        )

    def _adjusted(self, official: Qrels, task: str) -> Qrels:
        """Judgments that hold the official gold and its copies."""
        name = f"qrels.bright-{task.replace('_', '-')}.fixed.txt"
        file = next((f / name for f in self.folders if (f / name).is_file()), None)
        if file is None:
            raise EvaluationError(
                f"{self.label}: {name} is in no folder of {list(map(str, self.folders))}; without "
                "it take the official judgments: copies of gold are credited beside them anyway"
            )
        adjusted = gold_of(read_qrels(file))
        for query_id, gold in official.items():
            lost = sorted(gold.keys() - adjusted.get(query_id, {}).keys())
            if lost:
                raise EvaluationError(
                    f"{file}: query {query_id!r} lacks official gold, such as {lost[0]!r}; the "
                    "file belongs to another revision"
                )
        return adjusted

    def _corpus_source(self, task: str, place: _Place) -> str:
        for folder in self.folders:
            inside = folder / self.benchmark.documents
            files = table_files(inside, task, error=EvaluationError)
            if files:
                several = inside / f"{task}-*-of-*.parquet"
                return str(files[0] if len(files) == 1 else several)
        pattern = f"{self.benchmark.documents}/{task}*.parquet"
        return hub.address(self.repo, pattern, revision=place.commit or self.revision)


def _queries_table(spec: Spec, benchmark: _Benchmark) -> str:
    """The table that the options ask for."""
    unknown = [option for option in spec.options if option not in benchmark.options]
    if unknown:
        there = ", ".join(f"+{option}" for option in benchmark.options) or "none"
        raise EvaluationError(
            f"{spec.text}: {spec.name} has no option +{unknown[0]}; there are: {there}"
        )
    chosen = [option for option in spec.options if option in REASONED]
    if len(chosen) > 1:
        raise EvaluationError(f"{spec.text}: a query has one form; take +{chosen[0]} or the other")
    return chosen[0] if chosen else EXAMPLES
