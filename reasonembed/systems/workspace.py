"""Where an evaluation keeps what it makes, all of it found again by what decided it.

<results>/corpora/<corpus>                      documents, read once
<results>/vectors/<encoder>                     by text, shared by all collections and protocols
<results>/rewrites/<collection>/<llm>           by query
<results>/judgments/<collection>/<llm>          by query and document
<results>/<protocol>/<collection>/<system>      see `evaluation.results`
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from reasonembed import __version__
from reasonembed.artifacts import Artifact, StageDirectory
from reasonembed.config import LLMConfig, RuntimeConfig, fingerprint
from reasonembed.corpus import PYTHON_STDLIB, CorpusStore, read_corpus
from reasonembed.embedder.vectors import Encoder, vectors_artifact
from reasonembed.errors import ConfigError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.excerpts import EXCERPTS_FILE
from reasonembed.evaluation.results import RESULT_FILE, corpus_fingerprint, result_dir
from reasonembed.remixer.mine import Documents, read_documents, texts_at
from reasonembed.run import source_digest
from reasonembed.schemas import ARTIFACTS, stable_hash
from reasonembed.systems.encoding import dimension_of

RUN_FILE, TREC_FILE = "run.parquet", "run.trec.gz"


class SearchedCorpus:
    """A committed corpus; ids are kept once read, texts are not.

    Args:
        artifact: Rows of `schemas.CORPUS`, finished by `Workspace.corpus`.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact

    @property
    def fingerprint(self) -> str:
        """See `results.corpus_fingerprint`."""
        made = self.artifact.finished()
        assert made is not None, "finished by `Workspace.corpus`"
        return str(made["fingerprint"])

    @cached_property
    def documents(self) -> Documents:
        """One document for each distinct text, by place."""
        return read_documents(self.artifact)

    @property
    def doc_ids(self) -> list[str]:
        """Ids of all documents."""
        found: list[str] = self.documents.members.to_pylist()
        return found

    def everything(self) -> tuple[list[str], list[str]]:
        """Ids and texts of all documents, by id; all of them are in memory."""
        rows = self.artifact.read(columns=["doc_id", "text"])
        return rows.column("doc_id").to_pylist(), rows.column("text").to_pylist()

    def texts(self, doc_ids: Iterable[str]) -> dict[str, str]:
        """Texts by id; of copies that of the one that stands for them."""
        wanted = list(doc_ids)
        places = self.documents.table.take(self.documents.positions(wanted))
        return dict(zip(wanted, texts_at(self.artifact, places), strict=True))

    def copies(self, doc_id: str) -> tuple[str, ...]:
        """Documents of equal text, the one that stands for all first.

        The document alone where it has no copy, or is not there.
        """
        return self._copies.get(doc_id, (doc_id,))

    @cached_property
    def _copies(self) -> dict[str, tuple[str, ...]]:
        rows = self.documents.stands_for
        several = np.flatnonzero(self.documents.num_copies[rows] > 1)
        groups: dict[int, list[str]] = {}
        doc_ids = self.documents.members.take(pa.array(several)).to_pylist()
        for doc_id, row in zip(doc_ids, rows[several].tolist(), strict=True):
            groups.setdefault(row, []).append(doc_id)
        return {doc_id: tuple(group) for group in groups.values() for doc_id in group}


class ResultDirectory(StageDirectory):
    """Belongs to an identity as soon as its result is whole; what a kill left is written over."""

    def _is_empty(self) -> bool:
        return self.finished() is None

    def reopen(self) -> None:
        """Marks it as not done and takes away what lies there, before it is made anew.

        Readers look for files, and would take those of the former result for the new one's.
        """
        for name in ("_done.json", RESULT_FILE, EXCERPTS_FILE, TREC_FILE, RUN_FILE):
            Path(self.uri, name).unlink(missing_ok=True)


class Workspace:
    """A folder of results and everything that lies behind them.

    Args:
        results: The folder; made where it is not there.
        runtime: How things are computed; decides no figure.
    """

    def __init__(self, results: Path, *, runtime: RuntimeConfig | None = None) -> None:
        # Absolute, because workers do not share the driver's working directory.
        self.results, self.runtime = results.absolute(), runtime or RuntimeConfig()
        self._digests: dict[str, str] = {}
        self._corpora: dict[str, SearchedCorpus] = {}

    def result(self, *, protocol: str, collection: str, system: str) -> ResultDirectory:
        """Where one result lies."""
        place = result_dir(self.results, protocol=protocol, collection=collection, system=system)
        return ResultDirectory(place, name=f"{protocol} {collection} {system}")

    def corpus_digest(self, collection: Collection) -> str:
        """Hash of the files that hold a collection's documents.

        Raises:
            ConfigError: The collection does not say where they are.
        """
        source = _source_of(collection)
        if source not in self._digests:
            self._digests[source] = source_digest(source)
        return self._digests[source]

    def corpus(self, collection: Collection) -> SearchedCorpus:
        """The documents of a collection, read and committed the first time.

        Documents are copies here where their texts are equal but for white space at their ends,
        as Anserini has it for its corrected judgments of BRIGHT. Indentation means something to an
        encoder, and one vector of several texts would stand for none of them.

        Raises:
            CorpusError: They cannot be read.
            DriftError: They are not those that were committed.
        """
        source = _source_of(collection)
        name = _corpus_name(source)
        place = self.results / "corpora" / name
        if name in self._corpora:
            return self._corpora[name]
        artifact = Artifact(place, name=name, **vars(ARTIFACTS["corpus"]))
        artifact.begin(
            {"source.content": self.corpus_digest(collection)},
            version=__version__,
            cure=f"{source} was changed after it was searched. Put it back, give another folder "
            f"with --results, or delete {place}.",
        )
        if not artifact.commits():
            artifact.commit("corpus-000000", _grouped(read_corpus(source)))
        if artifact.finished() is None:
            store = CorpusStore(artifact.read())
            found = {"fingerprint": corpus_fingerprint(store), "documents": len(store)}
            artifact.finish(found)
        self._corpora[name] = SearchedCorpus(artifact)
        return self._corpora[name]

    def vectors(self, encoder: Encoder, identity: dict[str, Any]) -> Artifact:
        """Everything that an encoder has embedded here, or in `runtime.vectors_dir`.

        Args:
            encoder: What embeds.
            identity: Of `embedder.vectors.encoder_identity`.
        """
        place = Path(self.runtime.vectors_dir or self.results / "vectors")
        dimension = dimension_of(encoder, cache_dir=self.runtime.cache_dir)
        artifact = vectors_artifact(place, encoder, identity=identity, dimension=dimension)
        artifact.begin(identity, version=__version__)
        return artifact

    def answers(
        self, kind: str, collection: Collection, llm: LLMConfig, identity: dict[str, Any]
    ) -> Artifact:
        """What an LLM has answered about a collection.

        Args:
            kind: `rewrites` or `judgments`.
            collection: What was asked about.
            llm: Who was asked.
            identity: What decides the answers; names the folder, so that none of another is found.
        """
        name = f"{_plain(Path(llm.model).name)}-{fingerprint(identity)[:12]}"
        place = self.results / kind / _plain(collection.name) / name
        artifact = Artifact(place, name=f"{kind} of {collection.name}", **vars(ARTIFACTS[kind]))
        artifact.begin(identity, version=__version__)
        return artifact


def _source_of(collection: Collection) -> str:
    if collection.corpus_source is None:
        raise ConfigError(
            f"{collection.name}: there is no corpus to search; a BEIR folder holds it as "
            "corpus.jsonl"
        )
    return collection.corpus_source


def _grouped(corpus: pa.Table) -> pa.Table:
    texts = corpus.column("text").to_pylist()
    groups = pa.array([stable_hash(text.strip(), size=16) for text in texts])
    return corpus.set_column(corpus.column_names.index("group_id"), "group_id", groups)


def _corpus_name(source: str) -> str:
    """A folder's name; two corpora of one name elsewhere do not share it."""
    if source == PYTHON_STDLIB:
        return source
    whole = source if "://" in source else str(Path(source).absolute())
    return f"{_plain(Path(whole).name)}-{stable_hash(whole)[:8]}"


def _plain(name: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", name)
