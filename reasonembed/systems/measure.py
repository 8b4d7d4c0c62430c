"""One system on collections under one protocol: from what is at hand to results.

Everything on the way is kept (`systems.workspace`), so that what was computed once is not computed
again: a measurement that was stopped goes on, a finished one touches neither model nor index, and
its metrics are taken anew from the run, so that a new metric costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonembed import __version__, tasks
from reasonembed.artifacts import StageDirectory
from reasonembed.config import (
    BM25Retriever,
    EndpointRetriever,
    HybridRetriever,
    LLMStageConfig,
    RerankConfig,
    Retriever,
    RunRetriever,
    SystemConfig,
    flatten,
)
from reasonembed.embedder.vectors import encoder_identity
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.excerpts import write_excerpts
from reasonembed.evaluation.metrics import Run, evaluate_run
from reasonembed.evaluation.protocols import Protocol
from reasonembed.evaluation.results import Result, measured_by, provenance, write_result
from reasonembed.evaluation.runs import read_run, write_both
from reasonembed.index.bm25 import ANALYSIS_VERSION
from reasonembed.models import is_at_hand
from reasonembed.run import file_digest, llm_identity
from reasonembed.schemas import stable_hash
from reasonembed.systems.local import Work
from reasonembed.systems.reranking import Found, rerank
from reasonembed.systems.retrieval import (
    Asked,
    embed,
    endpoint_notes,
    limited,
    parts_of,
    retrieve,
    run_file,
)
from reasonembed.systems.rewriting import Rewritten, rewritten_queries
from reasonembed.systems.workspace import RUN_FILE, TREC_FILE, ResultDirectory, Workspace

_REWRITES, _JUDGMENTS = _FAILED = ("rewrites_failed", "judgments_failed")
# Limits and plans that change no answer.
_NO_ANSWER = ("max_failed_share", "audit_queries", "candidates_per_query")


def measure(
    system: SystemConfig,
    collections: Sequence[Collection],
    protocol: Protocol,
    *,
    workspace: Workspace,
    work: Work,
) -> list[Result]:
    """Measures a system on collections, or takes the figures from its finished runs.

    Step by step over all of them, so that an encoder is loaded once, an LLM started once, and
    neither has to make room for the other: queries are rewritten, texts embedded, collections
    searched, their runs reranked.

    Returns:
        One of each collection.

    Raises:
        DriftError: What decides a result is not what it was when the result was made.
        ConfigError: A collection has no corpus, or an endpoint no address.
        CorpusError: A corpus cannot be read.
        EvaluationError: A corpus is not the collection's, or a run file does not fit it.
        QualityError: Too many of an LLM's answers cannot be used; run again with `--retry`.
    """
    every = [_Asking(system, one, protocol, workspace) for one in collections]
    for one in every:
        one.begin()
    todo = [one for one in every if not is_done(one.place, retry=work.retry)]
    results = {one.collection.name: _result(one) for one in every if one not in todo}
    for one in todo:
        one.collection.check_against(workspace.corpus(one.collection).doc_ids)
    rewritten = _rewritten(system, todo, work=work)
    asked = [one.asked(new.queries, work) for one, new in zip(todo, rewritten, strict=True)]
    embed(system, asked)
    runs = _runs(system, todo, asked)
    for one, new, searched, found in zip(todo, rewritten, asked, runs, strict=True):
        failed = {} if system.rewrite is None else {_REWRITES: new.num_failed}
        _write(one, searched, found.run, notes=found.notes | failed)
        results[one.collection.name] = _result(one)  # now: the next collection may fail
    return [results[one.collection.name] for one in every]


def is_done(place: StageDirectory, *, retry: frozenset[str] = frozenset()) -> bool:
    """Whether a result needs nothing.

    Args:
        place: Of the result.
        retry: Statuses of an LLM's answers that are asked for again; with some, a result that
            lacks answers is not done.
    """
    made = place.finished()
    return made is not None and not (retry and any(made.get(name) for name in _FAILED))


@dataclass(frozen=True)
class _Asking:
    """What is measured, and where."""

    system: SystemConfig
    collection: Collection
    protocol: Protocol
    workspace: Workspace

    @property
    def place(self) -> ResultDirectory:
        """Where the result lies."""
        return self.workspace.result(
            protocol=self.protocol.name, collection=self.collection.name, system=self.system.name
        )

    def begin(self) -> None:
        """Claims the place, or checks that what lies there is this system's result."""
        place = self.place
        stored = place.stage() if place.finished() is not None else None
        place.begin(
            self.identity(known=stored.identity if stored else {}),
            version=__version__,
            cure="Restore these values, give another folder with --results, or delete "
            f"{place.uri}.",
        )

    def asked(self, queries: Mapping[str, str], work: Work) -> Asked:
        """What the retriever is asked."""
        corpus = self.workspace.corpus(self.collection)
        return Asked(
            self.collection, queries, self.instruction, self.protocol, corpus, self.workspace, work
        )

    @property
    def ignores_length(self) -> bool:
        """Whether the protocol has a length that an endpoint, which counts itself, knows not of."""
        limit = self.protocol.length_limit(self.collection)
        parts = parts_of(self.system).values()
        return limit is not None and any(isinstance(part, EndpointRetriever) for part in parts)

    @property
    def instruction(self) -> str:
        """What fills the query template."""
        return self.protocol.instruction(self.collection, style=self.system.instruction)

    def identity(self, *, known: Mapping[str, Any]) -> dict[str, Any]:
        """What decides the run, flat.

        Args:
            known: Identity of a finished result: weights that are not on this machine are taken to
                be those, so that a result can be looked at without them.
        """
        rules = self.protocol
        found = {
            "collection": self.collection.fingerprint(),
            "corpus.content": self.workspace.corpus_digest(self.collection),
            "instruction": self.instruction,
            "protocol.depth": rules.depth,
            "protocol.keep": rules.keep,
            "protocol.exclusion": rules.exclusion,
        }
        retriever = self.system.retrieve
        if isinstance(retriever, HybridRetriever):
            found["retrieve.fusion"] = retriever.fusion
            if retriever.fusion == "rrf":
                found["retrieve.rrf_constant"] = retriever.rrf_constant
            else:
                found["retrieve.weights"] = retriever.weights or dict.fromkeys(retriever.parts, 1.0)
        for name, part in parts_of(self.system).items():
            found |= self._retriever(part, prefix=f"retrieve.{name}.", known=known)
        if self.system.rewrite is not None:
            found |= self._answers("rewrite", self.system.rewrite, known=known)
        if (reranker := self.system.rerank) is not None:
            found |= {"rerank.top": reranker.top, "rerank.weight": reranker.weight}
            found |= self._answers("annotate", reranker.annotate, known=known)
        return found

    def _retriever(
        self, part: Retriever, *, prefix: str, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        if isinstance(part, BM25Retriever):
            found = flatten(part) | {"analysis": ANALYSIS_VERSION}
        elif isinstance(part, RunRetriever):
            found = {"kind": part.kind, "content": file_digest(run_file(part, self.collection))}
        elif isinstance(part, EndpointRetriever):
            found = encoder_identity(part)
        else:
            encoder = limited(part.encoder, self.protocol.length_limit(self.collection))
            found = encoder_identity(
                encoder,
                cache_dir=self._cache,
                weights=self._known_weights(encoder.model, known.get(f"{prefix}weights")),
            )
        return {f"{prefix}{key}": value for key, value in found.items()}

    def _answers(
        self, prompt: str, config: LLMStageConfig, *, known: Mapping[str, Any]
    ) -> dict[str, Any]:
        weights = self._known_weights(config.llm.model, known.get(f"{prompt}.weights"))
        found = self.answers(prompt, config, weights=weights)
        return {f"{prompt}.{key}": value for key, value in found.items()}

    def answers(
        self, prompt: str, config: LLMStageConfig, *, weights: str | None = None
    ) -> dict[str, Any]:
        """What decides an LLM's answers about the queries, flat."""
        settings = {key: value for key, value in flatten(config).items() if key not in _NO_ANSWER}
        settings["llm.model"] = Path(config.llm.model).name  # where weights lie decides nothing
        task = tasks.get(self.collection.task)
        llm = llm_identity(prompt, config.llm, task=task, cache_dir=self._cache, weights=weights)
        queries = stable_hash(*sorted(self.collection.queries.items()), size=16)
        return settings | llm | {"queries": queries}

    def _known_weights(self, model: str, known: str | None) -> str | None:
        if known is None or is_at_hand(model, cache_dir=self._cache):
            return None
        return known

    @property
    def _cache(self) -> str | None:
        return self.workspace.runtime.cache_dir


def _rewritten(system: SystemConfig, todo: Sequence[_Asking], *, work: Work) -> list[Rewritten]:
    config = system.rewrite
    if config is None or not todo:
        return [Rewritten(one.collection.queries, 0) for one in todo]
    workspace = todo[0].workspace
    asked = []
    for one in todo:
        identity = one.answers("rewrite", config)
        artifact = workspace.answers("rewrites", one.collection, config.llm, identity)
        asked.append((one.collection, artifact))
    return rewritten_queries(asked, config, work=work, runtime=workspace.runtime)


@dataclass(frozen=True)
class _Run:
    """What was found, and what the provenance says of it."""

    run: Run
    notes: dict[str, Any]


def _runs(system: SystemConfig, todo: Sequence[_Asking], asked: Sequence[Asked]) -> Iterator[_Run]:
    """Runs by collection, searched for as they are asked for; to be reranked, all are first."""
    searched = (_search(system, one, is_one=len(asked) == 1) for one in asked)
    config = system.rerank
    if config is None or not todo:
        yield from searched
        return
    runs = list(searched)
    found = [
        _found(asking, config, one, before.run)
        for asking, one, before in zip(todo, asked, runs, strict=True)
    ]
    work, runtime = asked[0].work, asked[0].workspace.runtime
    for before, new in zip(runs, rerank(found, config, work=work, runtime=runtime), strict=True):
        judged = {"judged": new.num_judged, _JUDGMENTS: new.num_failed}
        yield _Run(new.run, before.notes | judged)


def _search(system: SystemConfig, asked: Asked, *, is_one: bool) -> _Run:
    if not is_one:
        asked.work.reporter.say(f"search {asked.collection.name} ({system.name})")
    started = time.monotonic()
    run = retrieve(system, asked)
    return _Run(run, {"seconds": round(time.monotonic() - started, 2)})


def _found(asking: _Asking, config: RerankConfig, asked: Asked, run: Run) -> Found:
    collection, workspace = asking.collection, asking.workspace
    identity = asking.answers("annotate", config.annotate)
    identity |= {"corpus.content": workspace.corpus_digest(collection)}
    artifact = workspace.answers("judgments", collection, config.annotate.llm, identity)
    corpus = asked.corpus
    return Found(run, collection, config, artifact, corpus.artifact, corpus.copies)


def _write(asking: _Asking, asked: Asked, run: Run, *, notes: dict[str, Any]) -> None:
    """Writes the run, and says how it was made."""
    corpus = asked.corpus
    if asking.ignores_length:
        notes["length"] = "the endpoint's own"
    notes |= endpoint_notes(asking.system, asked)
    place = asking.place
    folder = Path(place.uri)
    place.reopen()
    notes |= write_both(run, folder / RUN_FILE, folder / TREC_FILE, tag=asking.system.name)
    write_excerpts(folder, asked.collection, run, texts=corpus.texts)
    stage = place.stage()
    assert stage is not None, "begun by `measure`"
    made = provenance(
        asked.collection,
        corpus=corpus.fingerprint,
        instruction=asked.instruction,
        system=asking.system.model_dump(mode="json"),
        identity=stage.identity,
        **notes,
    )
    place.finish(made)


def _result(asked: _Asking) -> Result:
    """Takes the figures from the run, and writes them."""
    collection, folder, made = asked.collection, Path(asked.place.uri), asked.place.finished()
    assert made is not None, "finished by `_write`"
    run = read_run(folder / RUN_FILE)
    copies = asked.workspace.corpus(collection).copies
    result = Result(
        system=asked.system.name,
        seed=None,
        collection=collection.name,
        benchmark=collection.benchmark or collection.name,
        protocol=asked.protocol.name,
        headline=asked.protocol.headline(is_long=collection.is_long),
        metrics=evaluate_run(run, collection.qrels),
        credited=evaluate_run(run, collection.credit_duplicates(copies).qrels),
        provenance=made | {"measured": measured_by()},
    )
    write_result(result, folder)
    return result
