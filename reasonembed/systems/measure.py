"""One system on collections under one protocol: from what is at hand to results.

Everything on the way is kept (`systems.workspace`), so that what was computed once is not computed
again: a measurement that was stopped goes on, a finished one touches neither model nor index, and
its metrics are taken anew from the run, so that a new metric costs nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
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
from reasonembed.errors import EvaluationError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.excerpts import write_excerpts
from reasonembed.evaluation.metrics import Run, evaluate_run
from reasonembed.evaluation.protocols import Protocol
from reasonembed.evaluation.results import Result, measured_by, provenance, write_result
from reasonembed.evaluation.runs import read_run, write_run
from reasonembed.index.bm25 import ANALYSIS_VERSION
from reasonembed.models import is_at_hand
from reasonembed.run import file_digest, llm_identity
from reasonembed.schemas import stable_hash
from reasonembed.systems.local import Work
from reasonembed.systems.reranking import Reranked, rerank
from reasonembed.systems.retrieval import Asked, embed, limited, parts_of, retrieve, run_file
from reasonembed.systems.rewriting import Rewritten, rewritten_queries
from reasonembed.systems.workspace import ResultDirectory, Workspace

RUN_FILE, TREC_FILE = "run.parquet", "run.trec.gz"
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

    Step by step over all of them, so that an encoder is loaded once and need not change places with
    an LLM: queries are rewritten, texts embedded, then each collection is searched.

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
    for one in todo:
        one.collection.check_against(workspace.corpus(one.collection).doc_ids)
    rewritten = [_rewritten(one, work=work) for one in todo]
    asked = [one.asked(new.queries, work) for one, new in zip(todo, rewritten, strict=True)]
    embed(system, asked)
    for one, new, searched in zip(todo, rewritten, asked, strict=True):
        if len(collections) > 1:
            work.reporter.say(f"search {one.collection.name} ({system.name})")
        _make(one, searched, notes={} if system.rewrite is None else {_REWRITES: new.num_failed})
    return [_result(one) for one in every]


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


def _rewritten(asked: _Asking, *, work: Work) -> Rewritten:
    collection, config, workspace = asked.collection, asked.system.rewrite, asked.workspace
    if config is None:
        return Rewritten(collection.queries, 0)
    identity = asked.answers("rewrite", config)
    artifact = workspace.answers("rewrites", collection, config.llm, identity)
    return rewritten_queries(collection, config, artifact, work=work, runtime=workspace.runtime)


def _make(asking: _Asking, asked: Asked, *, notes: dict[str, Any]) -> None:
    """Searches, writes the run, and says how it was made."""
    started, corpus = time.monotonic(), asked.corpus
    run = retrieve(asking.system, asked)
    if asking.system.rerank is not None:
        reranked = _reranked(run, asking, asking.system.rerank, asked)
        run = reranked.run
        notes |= {"judged": reranked.num_judged, _JUDGMENTS: reranked.num_failed}
    if asking.ignores_length:
        notes["length"] = "the endpoint's own"
    place = asking.place
    folder = Path(place.uri)
    place.reopen()
    notes |= _write(run, folder, tag=asking.system.name)
    write_excerpts(folder, asked.collection, run, texts=corpus.texts)
    stage = place.stage()
    assert stage is not None, "begun by `measure`"
    made = provenance(
        asked.collection,
        corpus=corpus.fingerprint,
        instruction=asked.instruction,
        system=asking.system.model_dump(mode="json"),
        identity=stage.identity,
        seconds=round(time.monotonic() - started, 2),
        **notes,
    )
    place.finish(made)


def _reranked(run: Run, asking: _Asking, config: RerankConfig, asked: Asked) -> Reranked:
    collection, workspace = asked.collection, asked.workspace
    identity = asking.answers("annotate", config.annotate)
    identity |= {"corpus.content": workspace.corpus_digest(collection)}
    return rerank(
        run,
        collection,
        config,
        workspace.answers("judgments", collection, config.annotate.llm, identity),
        corpus=asked.corpus.artifact,
        copies=asked.corpus.copies,
        work=asked.work,
        runtime=workspace.runtime,
    )


def _write(run: Run, folder: Path, *, tag: str) -> dict[str, str]:
    write_run(run, folder / RUN_FILE, tag=tag)
    try:
        write_run(run, folder / TREC_FILE, tag=tag)
    except EvaluationError as error:  # blanks in ids; the table holds the same run
        return {"no_trec_file": str(error)}
    return {}


def _result(asked: _Asking) -> Result:
    """Takes the figures from the run, and writes them."""
    collection, folder, made = asked.collection, Path(asked.place.uri), asked.place.finished()
    assert made is not None, "finished by `_make`"
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
