"""Builds an index on disk from a run, a collection or a corpus.

What takes long, the vectors, is committed part by part: in the run, where the source is one, else
in `.<index>.building` beside the index. A build that was killed goes on there; the finished folder
appears at once, and the other one goes.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reasonembed import __version__, tasks
from reasonembed.artifacts import Artifact, differences, locked
from reasonembed.config import (
    BM25Retriever,
    EchoConfig,
    EncoderConfig,
    IndexConfig,
    RuntimeConfig,
    ServeConfig,
    flatten,
    load_index,
)
from reasonembed.embedder.contract import CONTRACT_FILE, read_contract, resolve_contract
from reasonembed.embedder.vectors import EmbedPlanned, encoder_identity
from reasonembed.errors import ConfigError, CorpusError, DriftError, ModelError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.datasets import BENCHMARKS, PYTHON_STDLIB, TREC, load_collection
from reasonembed.index.bm25 import ANALYSIS_VERSION, BM25Index
from reasonembed.index.places import locate, places_for, read_vectors
from reasonembed.index.store import (
    DOCUMENTS,
    About,
    BenchmarkQuery,
    StoredIndex,
    is_index,
    read_about,
    write_index,
)
from reasonembed.models import resolve
from reasonembed.remixer.mine import Documents, read_documents
from reasonembed.run import Run
from reasonembed.schemas import embeddings, stable_hash
from reasonembed.serving.backend import ECHO, OpenModel, open_model
from reasonembed.serving.protocol import EmbedItem, Prepared, Vectors
from reasonembed.systems.catalogue import load_system
from reasonembed.systems.encoding import TEXTS, OpenEmbedder, dimension_of, planned_texts
from reasonembed.systems.local import LocalWork, Maker, Work
from reasonembed.systems.naming import encoder_named, is_run, retrievers_of
from reasonembed.systems.workspace import Workspace

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GENERIC = "generic"


def index_config(
    source: str,
    *,
    out: str,
    given: Mapping[str, Any],
    system: str | None = None,
    overrides: list[str] | None = None,
) -> IndexConfig:
    """The configuration of a build; a run's `runtime` is that of what is made from it.

    Args:
        source: See `IndexConfig.source`.
        out: The folder.
        given: Other values by field.
        system: Of the catalogue, or a file: sets the model, and BM25 as far as it has one.
        overrides: `a.b=value`, applied last.

    Raises:
        ConfigError: A value is out of range, or both a system and a model are given.
    """
    data: dict[str, Any] = {"source": source, "out": out, **given}
    if system is not None:
        if data.get("model"):
            raise ConfigError(f"--model {data['model']} and --system {system}: give one of them")
        dense, bm25 = retrievers_of(load_system(system))
        if dense is None:
            data["dense"] = False
        else:
            data["model"] = system
        if bm25 is not None:
            data.setdefault("bm25", bm25.model_dump())
    if is_run(source):
        data.setdefault("runtime", Run.existing(source).config.runtime.model_dump(mode="json"))
    return load_index(data, overrides=overrides)


def build_here(config: IndexConfig, *, work: LocalWork) -> StoredIndex:
    """Builds in this process; see `build_index`."""
    try:
        return build_index(config, work=work)
    finally:
        work.close()


def build_index(config: IndexConfig, *, work: Work) -> StoredIndex:
    """Builds an index, goes on where it was stopped, or finds that it is there.

    Args:
        config: What is built.
        work: Who embeds.

    Raises:
        ConfigError: The source has no model and none is named, a name does not fit, or something
            else lies in the folder.
        DriftError: Another index lies there; the fields that differ are named.
        CorpusError, EvaluationError, ModelError, StorageError: As those who read sources and
            models, and write.
    """
    out = Path(config.out).absolute()
    plan = _plan(config, out)
    scratch = _scratch(out)
    if _is_built(out, plan.identity):
        work.reporter.say(f"  {out} is up to date")
    else:
        with locked(scratch):
            if not _is_built(out, plan.identity):  # by another process, a moment ago
                folder = scratch / "index"
                shutil.rmtree(folder, ignore_errors=True)  # of a build that was killed as it wrote
                about = _write(plan, folder, work)
                folder.rename(out)
                work.reporter.say(f"  {about.num_documents:,} documents in {out}")
    shutil.rmtree(scratch, ignore_errors=True)
    return StoredIndex.load(out)


def _scratch(out: Path) -> Path:
    return out.with_name(f".{out.name}.building")


def _is_built(out: Path, identity: Mapping[str, Any]) -> bool:
    if not is_index(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{out} exists and is no index; choose another --out")
        return False
    if changes := differences(dict(read_about(out).identity), dict(identity)):
        raise DriftError(
            f"{out} is another index:\n"
            + "\n".join(f"  {change}" for change in changes)
            + f"\nChoose another --out, or delete {out} and build again."
        )
    return True


# What is built.


class _Source(Protocol):
    """Documents, and the queries that come with them."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the documents; known before they are read."""

    @property
    def collection(self) -> Collection | None:
        """Queries and gold, where there are any."""

    @property
    def task(self) -> str:
        """Of the queries."""

    @property
    def instruction(self) -> str | None:
        """Of the queries, where the source says one."""

    def corpus(self) -> Artifact:
        """Committed rows of `schemas.CORPUS`."""

    def vectors(self, encoder: EncoderConfig, identity: dict[str, Any]) -> Artifact:
        """Where the encoder's vectors are committed, begun."""


@dataclass(frozen=True)
class _RunSource:
    """The corpus of a run; its evaluation's queries."""

    run: Run
    with_queries: bool

    @property
    def identity(self) -> dict[str, Any]:
        artifact = self.run.artifact("corpus")
        stage = artifact.stage()
        if stage is None or not artifact.commits():
            raise ConfigError(f"{self.run.place} has no corpus yet; run its stage corpus")
        keys = sorted(commit.keys_digest for commit in artifact.commits())
        return {"corpus": stage.fingerprint, "corpus.keys": stable_hash(*keys)}

    @property
    def collection(self) -> Collection | None:
        return self.run.collection if self.with_queries else None

    @property
    def task(self) -> str:
        # A task of the run's own is known to nobody else; its instruction comes along.
        return self.run.task.name if self.run.task.name in tasks.TASKS else _GENERIC

    @property
    def instruction(self) -> str | None:
        return self.run.instruction

    def corpus(self) -> Artifact:
        return self.run.artifact("corpus")

    def vectors(self, encoder: EncoderConfig, identity: dict[str, Any]) -> Artifact:
        cache = self.run.config.runtime.cache_dir
        artifact = self.run.vectors(encoder, dimension=dimension_of(encoder, cache_dir=cache))
        artifact.begin(identity, version=__version__)
        return artifact


@dataclass(frozen=True)
class _FileSource:
    """A collection or a bare corpus, read into a workspace."""

    workspace: Workspace
    documents: Collection
    is_bare: bool
    with_queries: bool

    @property
    def identity(self) -> dict[str, Any]:
        return {"source.content": self.workspace.corpus_digest(self.documents)}

    @property
    def collection(self) -> Collection | None:
        return self.documents if self.with_queries and not self.is_bare else None

    @property
    def task(self) -> str:
        return self.documents.task

    @property
    def instruction(self) -> str | None:
        return None if self.is_bare else self.documents.instruction

    def corpus(self) -> Artifact:
        return self.workspace.corpus(self.documents).artifact

    def vectors(self, encoder: EncoderConfig, identity: dict[str, Any]) -> Artifact:
        return self.workspace.vectors(encoder, identity)


@dataclass(frozen=True)
class _Plan:
    """An index that is to be, and what decides it."""

    config: IndexConfig
    source: _Source
    name: str
    model: _Model | None

    @property
    def task(self) -> str:
        return self.config.task or self.source.task

    @property
    def instruction(self) -> str | None:
        if self.config.instruction is not None or self.config.task is None:
            return self.config.instruction or self.source.instruction
        return tasks.get(self.config.task).instruction

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides the index; where and how it is made does not."""
        bm25, collection = self.config.bm25, self.source.collection
        words = (
            {} if bm25 is None else {f"bm25.{key}": one for key, one in bm25.model_dump().items()}
        )
        if bm25 is not None:
            words["bm25.analysis"] = ANALYSIS_VERSION
        said = {"name": self.name, "task": self.task, "instruction": self.instruction}
        if collection is not None:
            said["queries"] = collection.fingerprint()
        model = {} if self.model is None else self.model.identity
        made = {} if self.model is None else {"contract": self.model.fingerprint}
        return self.source.identity | said | words | model | made


def _plan(config: IndexConfig, out: Path) -> _Plan:
    if config.task is not None:
        tasks.get(config.task)  # a mistake shows before anything is read
    name = config.name or out.name
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"the index cannot be called {name!r}: requests name it in addresses; give another "
            "name with --name, of letters, digits, '.', '_' and '-'"
        )
    return _Plan(config, _source(config, out), name, _model(config, out))


def _source(config: IndexConfig, out: Path) -> _Source:
    if is_run(config.source):
        return _RunSource(Run.existing(config.source), config.queries)
    workspace = Workspace(_scratch(out), runtime=config.runtime)
    if _is_collection(config.source):
        data_dir = None if config.data_dir is None else Path(config.data_dir)
        task = tasks.get(config.task or _GENERIC)
        collection = load_collection(config.source, data_dir=data_dir, task=task)
        return _FileSource(workspace, collection, False, config.queries)
    bare = Collection(
        name=config.source,
        queries={},
        qrels={},
        excluded={},
        task=_GENERIC,
        instruction="",
        corpus_source=config.source,
    )
    return _FileSource(workspace, bare, True, False)


def _is_collection(source: str) -> bool:
    name = re.split(r"[@+:]", source, maxsplit=1)[0]
    if name in (PYTHON_STDLIB, TREC) or name in BENCHMARKS:
        return True
    folder = Path(source)
    return folder.is_dir() and any(
        next(folder.glob(pattern), None) is not None for pattern in ("quer*", "topics*")
    )


def _model(config: IndexConfig, out: Path) -> _Model | None:
    if not config.dense:
        return None
    if config.model == ECHO:
        as_fast = config.echo.model_copy(update={"tokens_per_s": None})  # decides no vector
        return _Echo(as_fast, _scratch(out) / "vectors" / ECHO)
    if config.model is None and not is_run(config.source):
        raise ConfigError(
            f"{config.source} says of no model; name one with --model or --system, or index words "
            "alone with --no-dense"
        )
    name = config.model or config.source
    encoder = encoder_named(name, encoder=config.encoder)
    return _Weights(_served_name(name), encoder, config.runtime)


def _served_name(name: str) -> str:
    """What a service calls the model: nothing of the path that leads to it."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return load_system(name).name
    return path.absolute().name if path.is_dir() else name


# The model.


class _Model(Protocol):
    """What embeds the documents."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def fingerprint(self) -> str:
        """Of contract and weights; what a service compares with its model's."""

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the vectors."""

    def vectors(self, source: _Source) -> Artifact:
        """Where they are committed, begun."""

    def maker(self, artifact: Artifact) -> Maker:
        """Makes what embeds, where it runs."""


@dataclass(frozen=True)
class _Weights:
    """A model that is loaded."""

    name: str
    encoder: EncoderConfig
    runtime: RuntimeConfig

    @cached_property
    def fingerprint(self) -> str:
        path = resolve(self.encoder.model, cache_dir=self.runtime.cache_dir)
        found = resolve_contract(path, self.encoder).fingerprint()
        is_export = (path / CONTRACT_FILE).is_file()
        if is_export and found != read_contract(path).fingerprint():
            raise ModelError(
                f"{path} would be embedded with under another contract than {CONTRACT_FILE} holds; "
                "export the model again"
            )
        return found

    @cached_property
    def identity(self) -> dict[str, Any]:
        return encoder_identity(self.encoder, cache_dir=self.runtime.cache_dir)

    def vectors(self, source: _Source) -> Artifact:
        return source.vectors(self.encoder, self.identity)

    def maker(self, artifact: Artifact) -> Maker:
        return OpenEmbedder(self.encoder, None, self.runtime, artifact)


@dataclass(frozen=True)
class _Echo:
    """Hashes in place of a model; see `serving.echo`."""

    config: EchoConfig
    place: Path
    name: str = ECHO

    @property
    def fingerprint(self) -> str:
        return _open_echo(self.config).served.fingerprint

    @property
    def identity(self) -> dict[str, Any]:
        return flatten(self.config.model_dump(exclude={"tokens_per_s"}), prefix="echo")

    def vectors(self, source: _Source) -> Artifact:
        schema = embeddings(self.config.dimension)
        artifact = Artifact(self.place, schema=schema, key=("id",), name=ECHO)
        artifact.begin(self.identity, version=__version__)
        return artifact

    def maker(self, artifact: Artifact) -> Maker:
        return _EchoMaker(self.config, artifact.schema)


@dataclass(frozen=True)
class _EchoMaker:
    """A `Maker` of it."""

    config: EchoConfig
    schema: pa.Schema

    @property
    def key(self) -> str:
        return repr(self.config)

    def load(self) -> OpenModel:
        return _open_echo(self.config)

    def mapper(self, loaded: OpenModel) -> EmbedPlanned:
        return EmbedPlanned(_EchoEmbedder(loaded), self.schema)

    def __call__(self) -> EmbedPlanned:
        return self.mapper(self.load())


class _EchoEmbedder:
    """Embeds as the service does."""

    def __init__(self, model: OpenModel) -> None:
        self._model = model

    def encode_documents(self, texts: Sequence[str]) -> Vectors:
        # A blank document has no word, and no other document is to be like it.
        said = [text if text.strip() else "(blank)" for text in texts]
        return self._embed([EmbedItem(text, truncate="end") for text in said])

    def encode_queries(self, texts: Sequence[str], *, instruction: str = "") -> Vectors:
        return self._embed(
            [EmbedItem(text, "query", instruction, truncate="end") for text in texts]
        )

    def _embed(self, items: Sequence[EmbedItem]) -> Vectors:
        prepared = [one for one in self._model.preparer.prepare(items) if isinstance(one, Prepared)]
        assert len(prepared) == len(items), "texts of a corpus are Unicode with a word"
        assert self._model.forward is not None, "opened to embed"
        return self._model.forward(prepared)


def _open_echo(config: EchoConfig) -> OpenModel:
    return open_model(ServeConfig(model=ECHO, echo=config))


# How it is made.


def _write(plan: _Plan, folder: Path, work: Work) -> About:
    corpus = plan.source.corpus()
    documents = read_documents(corpus)
    table = _documents(corpus, documents)
    num_texts = documents.table.num_rows
    work.reporter.say(f"  {table.num_rows:,} documents, {num_texts:,} different texts")
    queries = _queries(plan.source.collection, table)
    dimension, fill = 0, None
    if plan.model is not None:
        vectors = _embedded(plan, plan.model, corpus, documents, work)
        dimension = vectors.schema.field("vector").type.list_size
        fill = _Filler(vectors, documents, table.column("group").to_numpy())
    bm25 = _bm25(plan.config.bm25, table, work)
    about = About(
        name=plan.name,
        model="" if plan.model is None else plan.model.name,
        fingerprint="" if plan.model is None else plan.model.fingerprint,
        task=plan.task,
        instruction=plan.instruction,
        identity=plan.identity,
    )
    return write_index(
        folder,
        about,
        table,
        dimension=dimension,
        fill=fill,
        bm25=bm25,
        queries=queries,
    )


def _documents(corpus: Artifact, documents: Documents) -> pa.Table:
    """Rows of `DOCUMENTS`; a group is numbered by the row of the document that stands for it."""
    rows = corpus.read(columns=["doc_id", "title", "text"])
    members = pc.index_in(rows.column("doc_id").combine_chunks(), value_set=documents.members)
    groups = documents.stands_for[members.to_numpy()]
    titles = rows.column("title")
    titles = pc.if_else(pc.equal(titles, ""), pa.scalar(None, pa.string()), titles)
    columns = [rows.column("doc_id"), titles, rows.column("text"), pa.array(groups, pa.int32())]
    return pa.table(columns, names=DOCUMENTS.names).cast(DOCUMENTS)


def _queries(collection: Collection | None, documents: pa.Table) -> list[BenchmarkQuery]:
    if collection is None:
        return []
    collection.check_against(documents.column("doc_id").to_pylist())
    return [
        BenchmarkQuery(
            query_id,
            text,
            dict(collection.qrels[query_id]),
            tuple(sorted(collection.excluded.get(query_id, ()))),
        )
        for query_id, text in collection.queries.items()
    ]


def _embedded(
    plan: _Plan, model: _Model, corpus: Artifact, documents: Documents, work: Work
) -> Artifact:
    """Commits the vectors that are missing."""
    artifact = model.vectors(plan.source)
    work.compute(
        planned_texts({corpus.uri: documents}, TEXTS.empty_table()),
        artifact,
        model.maker(artifact),
        plan.config.runtime.embed,
        label="embed",
    )
    return artifact


@dataclass(frozen=True)
class _Filler:
    """Writes committed vectors into the index's array, a row group at a time."""

    vectors: Artifact
    documents: Documents
    groups: np.ndarray[Any, np.dtype[np.int32]]

    def __call__(self, out: Any) -> None:
        ids = self.documents.table.column("text_id").combine_chunks().take(pa.array(self.groups))
        places = places_for(ids, locate(self.vectors), name=self.vectors.name)
        read_vectors(self.vectors, places, out=out)


def _bm25(config: BM25Retriever | None, documents: pa.Table, work: Work) -> BM25Index | None:
    if config is None:
        return None
    work.reporter.say(f"  counting the words of {documents.num_rows:,} documents")
    texts = documents.column("text").to_pylist()
    try:
        return BM25Index(texts, variant=config.variant, k1=config.k1, b=config.b)
    except ValueError as error:
        raise CorpusError(f"{error}; build with --no-bm25, or give another corpus") from error
