"""One run: its configuration, where each stage's artifact lies, and what identifies each stage.

Knows nothing of Ray: the command line reads a run with it, the jobs write one.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from reasonembed import __version__
from reasonembed.artifacts import Artifact, StageDirectory, differences, link_tree
from reasonembed.config import (
    DenseRetriever,
    DistillConfig,
    EncoderConfig,
    LLMConfig,
    RunConfig,
    RunRetriever,
    SampleSource,
    flatten,
    parse,
)
from reasonembed.corpus import PYTHON_STDLIB, CorpusStore, corpus_files
from reasonembed.embedder.vectors import Encoder, encoder_identity, vectors_artifact
from reasonembed.errors import ConfigError, CorpusError, DriftError, Interrupted, cause_of
from reasonembed.evaluation.datasets import Collection, load_collection
from reasonembed.fetched import cache_root
from reasonembed.models import from_root, resolve, weights_fingerprint
from reasonembed.remixer.answers import prompt_fingerprint
from reasonembed.remixer.assemble import JUDGED_COLUMNS
from reasonembed.remixer.msmarco import msmarco_files
from reasonembed.schemas import ARTIFACTS, Status, stable_hash
from reasonembed.storage import Place
from reasonembed.tasks import Task

STAGES = (
    "corpus",
    "filter",
    "plan",
    "generate",
    "embed",
    "mine",
    "annotate",
    "audit",
    "rewrite",
    "assemble",
    "train",
    "export",
    "evaluate",
)
"""Stages in the order in which they run; a configuration may leave some out (`Run.stages`)."""

_KINDS = {
    "filter": "domains",
    "plan": "seeds",
    "generate": "queries",
    "mine": "candidates",
    "annotate": "judgments",
    "rewrite": "rewrites",
    "assemble": "samples",
}
_ROW_BY_ROW = {
    "corpus", "filter", "plan", "generate", "mine", "annotate", "audit", "trajectories", "rewrite"
}  # fmt: skip
_ADOPTED = {
    kind: kind for kind in ("corpus", "domains", "seeds", "queries", "judgments", "rewrites")
} | {"candidates": "candidates-before"}  # to tell how much a second round's differ
_MAKES_SAMPLES = STAGES[STAGES.index("filter") : STAGES.index("assemble")]
# Gates and extras that change no row, and limits that later stages read.
_NOT_RESULT = ("max_failed_share", "audit_queries", "min_probability", "max_source_rank")


@dataclass(frozen=True)
class Encoders:
    """The three encoders that a run embeds with."""

    miner: EncoderConfig
    backbone: EncoderConfig
    trained: EncoderConfig


class Run:
    """A run directory and the configuration that made, or will make, it.

    It lies on a disk or in an object store. What other programs read and write as files lies there
    under the same names; `local` and `writing` bring it to this machine and back.

    Args:
        config: Decides everything.
        is_growing: Inputs may be other than those that a stage was made from: stages of rows keep
            their rows and add what is missing, the others are made anew.
    """

    def __init__(self, config: RunConfig, *, is_growing: bool = False) -> None:
        self.config, self.is_growing = _with_models_from_root(config), is_growing
        # Absolute, because workers do not share the driver's working directory.
        self.place = Place(config.run_dir)

    @classmethod
    def existing(cls, run_dir: str | Path) -> Run:
        """The run in a directory, with the configuration that was last used there.

        Raises:
            ConfigError: The directory holds no run.
        """
        place = Place(run_dir)
        file = place / "config.resolved.yaml"
        raw = file.read() if not place.is_local or file.is_file() else None
        if raw is None:
            place.check()
            raise ConfigError(f"{run_dir} holds no run: there is no {file.name} in it")
        data = yaml.safe_load(raw)
        return cls(parse(data | {"run_dir": str(run_dir)}, where=str(file)))

    def save_config(self) -> None:
        """Writes the resolved configuration beside the artifacts, whole or not at all."""
        text = yaml.safe_dump(
            self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True
        )
        self.config_file.write(text.encode())

    @property
    def config_file(self) -> Place:
        """Where the resolved configuration lies."""
        return self.place / "config.resolved.yaml"

    # ---- places -----------------------------------------------------------------------------

    @property
    def dir(self) -> Path:
        """The folder of a run on this machine; `place` is where any run lies.

        Raises:
            StorageError: The run lies in an object store.
        """
        return self.place.local

    @property
    def name(self) -> str:
        """What people call the run: the name of its folder."""
        return self.dir.resolve().name if self.place.is_local else self.place.name

    @property
    def scratch(self) -> Path:
        """This machine's own folder for files of a run that lies in an object store."""
        runs = cache_root(self._cache) / "runs"
        return runs / stable_hash(self.place.uri) / self.place.name

    def local(self, name: str) -> Path:
        """A file or folder of the run as one of this machine; it need not be there.

        Of a run on a disk the very same; of another, a copy as it is now.

        Raises:
            StorageError: It cannot be read.
        """
        place = self.place / name
        if place.is_local:
            return place.local
        target = self.scratch / "fetched" / name
        place.fetch(target)
        return target

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A folder of this machine that becomes, or is, the run's folder `name`.

        In an object store its files appear when the body has ended, over earlier ones.

        Raises:
            StorageError: It cannot be written.
        """
        place = self.place / name if name else self.place
        if place.is_local:
            place.local.mkdir(parents=True, exist_ok=True)
            yield place.local
            return
        with tempfile.TemporaryDirectory(prefix="reasonembed-") as folder:
            target = Path(folder) / place.name
            target.mkdir()
            yield target
            place.put(target)

    @property
    def logs(self) -> Path:
        """This machine's folder for what a driver and its programs say."""
        return self.dir / "logs" if self.place.is_local else self.scratch / "logs"

    def artifact(self, kind: str) -> Artifact:
        """A declared artifact of this run: `corpus`, `seeds`, `queries`, ... or `audit`."""
        declared = ARTIFACTS["judgments" if kind == "audit" else kind]
        return Artifact(str(self.place / kind), name=kind, **vars(declared))

    def vectors(self, encoder: Encoder, *, dimension: int) -> Artifact:
        """Everything that one encoder has embedded; see `vectors_artifact`."""
        identity = self.encoder_identity(encoder)
        place = self.vectors_place
        return vectors_artifact(place, encoder, identity=identity, dimension=dimension)

    @property
    def vectors_place(self) -> Place:
        """Folder of the vectors of all encoders."""
        return Place(self.config.runtime.vectors_dir or self.place / "embeddings")

    def directory(self, stage: str) -> StageDirectory:
        """The directory of a stage whose result is not rows: `train`, `export`, `evaluate`."""
        return StageDirectory(str(self.place / stage), name=stage)

    def outputs(self, stage: str) -> list[StageDirectory]:
        """Everything that a stage writes."""
        if stage in ("train", "export", "evaluate"):
            return [self.directory(stage)]
        if stage == "embed":
            return []  # vectors are never stale (`vectors`), so no stage owns them
        hits = [self.artifact("hits")] if stage == "mine" else []
        return [self.artifact(_KINDS.get(stage, stage)), *hits]

    def discard_from(self, stage: str) -> None:
        """Deletes what `stage` and all stages after it have written.

        The last stage first: killed half way, no stage is left that was made from what is gone.
        """
        for later in reversed(STAGES[STAGES.index(stage) :]):
            for output in self.outputs(later):
                output.discard()

    @property
    def model_place(self) -> Place:
        """Where the exported model lies."""
        return self.place / "export" / "model"

    @property
    def model_dir(self) -> Path:
        """The same as a folder of this machine.

        Raises:
            StorageError: The run lies in an object store.
        """
        return self.model_place.local

    def distill_config(self) -> DistillConfig:
        """How an annotator is distilled.

        Raises:
            ConfigError: The configuration does not say.
        """
        if self.config.distill is None:
            raise ConfigError("distilling needs a section distill: in the configuration")
        return self.config.distill

    @property
    def annotator_place(self) -> Place:
        """Where the distilled annotator's model lies; what was made on the way, beside it."""
        return self.place / "annotator" / "model"

    @property
    def annotator_dir(self) -> Path:
        """The same as a folder of this machine.

        Raises:
            StorageError: The run lies in an object store.
        """
        return self.annotator_place.local

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that this configuration asks for, in order."""
        left_out = {"filter"} if self.config.filter is None else set()
        if self.config.assemble.sources:
            left_out |= set(_MAKES_SAMPLES)
        return tuple(stage for stage in STAGES if stage not in left_out)

    # ---- contents ---------------------------------------------------------------------------

    def corpus_store(self) -> CorpusStore:
        """The committed corpus."""
        return CorpusStore(self.artifact("corpus").read())

    @cached_property
    def collection(self) -> Collection:
        """The evaluation collection."""
        return load_collection(self.config.evaluate.collection, task=self.task)

    @property
    def encoders(self) -> Encoders:
        """Miner, untrained backbone, and the exported model."""
        trained = self.config.train.encoder.model_copy(update={"model": str(self.model_place)})
        return Encoders(self.config.mine.encoder, self.config.train.encoder, trained)

    @property
    def task(self) -> Task:
        """The corpus's retrieval task."""
        return self.config.task_table[self.config.corpus.task]

    @property
    def instruction(self) -> str:
        """The query instruction of the evaluation."""
        return self.config.evaluate.instruction or self.task.instruction

    # ---- identities -------------------------------------------------------------------------

    def identity(self, stage: str) -> dict[str, Any]:
        """What decides a stage's result, flat: configuration, prompts, weights, inputs.

        Everything under `runtime` is left out: where a stage runs changes no row.
        """
        return _IDENTITIES[stage](self)

    def begin(self, stage: str, output: StageDirectory) -> None:
        """Claims a stage's output for the present configuration; see `StageDirectory.begin`."""
        identity = self.identity(stage)
        if not self.is_growing:
            output.begin(identity, version=__version__)
        elif stage in _ROW_BY_ROW:
            output.begin(identity, version=__version__, may_change=_comes_from_outside)
        else:
            stored = output.stage()
            if stored is not None and stored.identity != identity:
                output.discard()
            output.begin(identity, version=__version__)

    def adopt(self, other: Run) -> None:
        """Takes over another run's rows, from the corpus to the judgments, without copying bytes.

        For a second round over the same queries, mined by another model: pairs that were judged
        are not judged again. What this run has already is left alone; whether the rows may be
        used is checked by each stage when it begins.

        Raises:
            StorageError: A file cannot be linked or written.
        """
        for kind, name in _ADOPTED.items():
            source, target = other.place / kind, self.place / name
            if source.is_local and target.is_local:
                if source.is_dir() and not target.local.exists():
                    link_tree(source.local, target.local)
            elif not (target / "_stage.json").is_file():
                source.share(target)

    def next_round(self, config: RunConfig) -> RunConfig:
        """`config` with this run's trained model as the miner.

        Raises:
            ConfigError: This run has exported no model, or `config` would write into it.
        """
        if self.directory("export").finished() is None:
            raise ConfigError(f"{self.place} has no exported model to mine with; finish it first")
        if Place(config.run_dir) == self.place:
            raise ConfigError(
                f"run_dir {config.run_dir} is the first round's own; give the second one its own "
                "with --set run_dir=…"
            )
        mine = config.mine.model_copy(update={"encoder": self.encoders.trained})
        return config.model_copy(update={"mine": mine})

    def encoder_identity(self, encoder: Encoder) -> dict[str, Any]:
        """What decides the vectors of an encoder."""
        return encoder_identity(encoder, cache_dir=self._cache)

    def stale(self) -> dict[str, list[str]]:
        """Why stages that exist would not be made the same way today, by stage."""
        reasons = {}
        for stage in STAGES:
            lines = []
            for output in self.outputs(stage):
                stored = output.stage()
                if stored is not None and output.name != "hits":  # dated by the shards in its keys
                    lines += differences(stored.identity, self.identity(stage))
            if lines:
                reasons[stage] = lines
        return reasons

    @property
    def _cache(self) -> str | None:
        return self.config.runtime.cache_dir

    def _settings(self, name: str) -> dict[str, Any]:
        """A stage's own settings; its encoder's stand in `encoder_identity`, without the place."""
        settings = flatten(getattr(self.config, name), prefix=name)
        return {
            key: value
            for key, value in settings.items()
            if key.split(".")[-1] not in _NOT_RESULT and not key.startswith(f"{name}.encoder.")
        }

    def _inputs(self, *kinds: str, content: bool = False) -> dict[str, Any]:
        """Identity of the inputs; with `content`, of every committed row as well."""
        found = {}
        for kind in kinds:
            artifact = self.artifact(kind)
            stage = artifact.stage()
            found[f"input.{kind}"] = stage.fingerprint if stage else "(not made yet)"
            if content:
                columns = JUDGED_COLUMNS if kind == "judgments" else None
                found[f"input.{kind}.content"] = artifact.content(columns=columns)
        return found

    def _made(self, stage: str) -> dict[str, Any]:
        """Identity of a stage that is one result, and what it says of that result."""
        directory = self.directory(stage)
        begun, done = directory.stage(), directory.finished()
        if begun is None or done is None:
            return {f"input.{stage}": "(not made yet)"}
        return {f"input.{stage}": begun.fingerprint, f"input.{stage}.content": stable_hash(done)}

    def _llm(self, name: str, llm: LLMConfig) -> dict[str, Any]:
        return llm_identity(name, llm, task=self.task, cache_dir=self._cache)

    # ---- timeline ---------------------------------------------------------------------------

    @contextmanager
    def timed(self, stage: str) -> Iterator[dict[str, Any]]:
        """Notes a stage's wall time and whatever the caller puts in, also when it fails.

        A configuration that is refused is no attempt: nothing was done, and what is there stays.
        """
        note: dict[str, Any] = {"stage": stage, "started": time.time(), "outcome": "failed"}
        try:
            yield note
            note["outcome"] = "done"
        except (ConfigError, DriftError):
            note["outcome"] = "refused"
            raise
        except Exception as error:  # looked at, and raised again
            if isinstance(cause := cause_of(error), Interrupted):
                note |= {"outcome": "interrupted", "detail": str(cause)}
            raise
        finally:
            if note["outcome"] != "refused":
                self.note_attempt(note)

    def note_attempt(self, note: dict[str, Any]) -> None:
        """Writes one attempt of a stage to the timeline, with its seconds up to now."""
        note["seconds"] = round(time.time() - note["started"], 2)
        (self.place / "timeline.jsonl").append(note)

    def timeline(self) -> list[dict[str, Any]]:
        """Every attempt of every stage, in order."""
        return (self.place / "timeline.jsonl").rows()


def _with_models_from_root(config: RunConfig) -> RunConfig:
    """What is trained or embeds, wherever a worker stands; no identity holds a model's place."""

    def placed(encoder: EncoderConfig) -> EncoderConfig:
        return encoder.model_copy(update={"model": from_root(encoder.model)})

    changed: dict[str, Any] = {
        name: section.model_copy(update={"encoder": placed(section.encoder)})
        for name, section in (("mine", config.mine), ("train", config.train))
    }
    if config.distill is not None:
        student = from_root(config.distill.student)
        changed["distill"] = config.distill.model_copy(update={"student": student})
    return config.model_copy(update=changed)


def llm_identity(
    prompt: str,
    llm: LLMConfig,
    *,
    task: Task,
    cache_dir: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """What decides an LLM's answers besides the settings of its stage.

    Args:
        prompt: Name of the prompt.
        llm: The model.
        task: Its words stand in the prompts.
        cache_dir: Of packaged weights.
        weights: Their fingerprint, where it is known; else they are looked for and read.
    """
    if llm.engine != "vllm":
        weights = llm.model
    elif weights is None:
        weights = weights_fingerprint(resolve(llm.model, cache_dir=cache_dir))
    return {"prompt": prompt_fingerprint(prompt), "task": stable_hash(task), "weights": weights}


def _comes_from_outside(field: str) -> bool:
    """Whether a field of an identity changes when documents are added and nothing else does."""
    given = ("source.content", "held_out", "exclude_ids.content")
    is_run_file = field.startswith("also.") and field.endswith(".content")
    return field in given or is_run_file or field.startswith("input.")


def _corpus(run: Run) -> dict[str, Any]:
    settings = run._settings("corpus")
    del settings["corpus.source"]  # what lies there counts, not where
    try:
        content = source_digest(run.config.corpus.source)
    except CorpusError:
        content = "(missing)"  # the reader says so with the cure
    return settings | {"source.content": content}


def source_digest(source: str) -> str:
    """Hash of what a corpus is read from.

    Raises:
        CorpusError: It is not there.
    """
    if source == PYTHON_STDLIB:
        return f"python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    digests = [file_digest(file) for file in corpus_files(source)]
    return digests[0] if len(digests) == 1 else stable_hash(*digests, size=16)


def file_digest(path: str | Path) -> str:
    """Hash of a file's bytes, or of all files of a folder with their names."""
    place = Path(path)
    if place.is_dir():
        files = sorted(file for file in place.rglob("*") if file.is_file())
        return stable_hash(*(f"{file.relative_to(place)} {file_digest(file)}" for file in files))
    if not place.is_file():
        return "(missing)"  # the reader says so with the cure
    with place.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:32]


def _filter(run: Run) -> dict[str, Any]:
    config = run.config.filter
    if config is None:
        raise ConfigError("the stage filter needs a section filter: in the configuration")
    # Only documents that the plan could use are asked about, so its rules decide the rows.
    return run._settings("filter") | run._llm("filter", config.llm) | run._inputs("corpus")


def _plan(run: Run) -> dict[str, Any]:
    held_out = stable_hash(*sorted(run.collection.named_documents()))
    identity = run._settings("plan") | {"held_out": held_out} | run._inputs("corpus")
    if run.config.filter is None:
        return identity
    limit = {"filter.min_probability": run.config.filter.min_probability}
    return identity | limit | run._inputs("domains")


def _generate(run: Run) -> dict[str, Any]:
    config = run.config.generate
    return run._settings("generate") | run._llm(config.prompt, config.llm) | run._inputs("seeds")


def _mine(run: Run) -> dict[str, Any]:
    config = run.config.mine
    identity = run._settings("mine") | run.encoder_identity(config.encoder)
    for name, other in config.also.items():
        if isinstance(other, DenseRetriever):
            found = run.encoder_identity(other.encoder)
            identity |= {f"also.{name}.{key}": value for key, value in found.items()}
        elif isinstance(other, RunRetriever):
            identity[f"also.{name}.content"] = file_digest(other.path)
    if config.exclude_ids:
        identity["exclude_ids.content"] = file_digest(config.exclude_ids)
    return identity | run._inputs("corpus", "queries")


def _annotate(run: Run) -> dict[str, Any]:
    config = run.config.annotate
    # A judgment depends on its two texts: which miner found the pair is no matter.
    inputs = run._inputs("corpus", "queries")
    return run._settings("annotate") | run._llm("annotate", config.llm) | inputs


def _audit(run: Run) -> dict[str, Any]:
    config = run.config.annotate
    # The miner chooses the pairs. How many queries is no matter: more of them are a superset.
    miner = {
        f"miner.{key}": value
        for key, value in run.encoder_identity(run.config.mine.encoder).items()
    }
    inputs = {"collection": run.collection.fingerprint(), "instruction": run.instruction}
    llm = run._llm("annotate", config.llm)
    return run._settings("annotate") | llm | miner | inputs | run._inputs("corpus")


def _trajectories(run: Run) -> dict[str, Any]:
    # What is done with the answers is no matter here: the student's settings change no row.
    decides = ("llm", "sampling", "max_document_words", "tries", "seed")
    settings = {
        key: value
        for key, value in run._settings("distill").items()
        if key.split(".")[1] in decides
    }
    return (
        settings | run._llm("annotate", run.distill_config().llm) | run._inputs("corpus", "queries")
    )


def _annotator(run: Run) -> dict[str, Any]:
    student = weights_fingerprint(resolve(run.distill_config().student, cache_dir=run._cache))
    settings = run._settings("distill")
    del settings["distill.student"]  # its weights stand for it, wherever they lie
    answers = run.artifact("trajectories").content(columns=["answer", "relevance_label"])
    inputs = run._inputs("trajectories") | run._inputs("candidates", content=True)
    return settings | inputs | {"student": student, "input.trajectories.content": answers}


def _rewrite(run: Run) -> dict[str, Any]:
    config = run.config.rewrite
    return run._settings("rewrite") | run._llm("rewrite", config.llm) | run._inputs("queries")


def _assemble(run: Run) -> dict[str, Any]:
    if sources := run.config.assemble.sources:
        digests = {
            f"source.{number}.content": _samples_digest(source)
            for number, source in enumerate(sources)
        }
        own = {f"instruction.{name}": one.instruction for name, one in run.config.tasks.items()}
        return run._settings("assemble") | digests | own
    inputs = run._inputs("queries", "candidates", "judgments", "rewrites", content=True)
    bound = {"mine.max_source_rank": run.config.mine.max_source_rank}
    return run._settings("assemble") | bound | inputs


def _samples_digest(source: SampleSource) -> str:
    if source.form.startswith("msmarco"):  # a folder that may hold much besides
        try:
            return stable_hash(*(file_digest(file) for file in msmarco_files(source)))
        except ConfigError:
            return "(missing)"  # as below
    if source.form != "run":
        return file_digest(source.path)
    samples = Artifact.declared(str(Place(source.path) / "samples"), "samples")
    if (stage := samples.stage()) is None:
        return "(missing)"  # the reader says so with the cure
    return stable_hash(stage.fingerprint, samples.finished())


def _train(run: Run) -> dict[str, Any]:
    encoder = run.encoder_identity(run.config.train.encoder)
    # What samples were made of stands in their identity, so they need not be read for this.
    keys = sorted(commit.keys_digest for commit in run.artifact("samples").commits())
    made = {"input.samples.keys": stable_hash(*keys)}
    return run._settings("train") | encoder | run._inputs("samples") | made


def _export(run: Run) -> dict[str, Any]:
    return run._settings("export") | {"instruction": run.instruction} | run._made("train")


def _evaluate(run: Run) -> dict[str, Any]:
    inputs = {"collection": run.collection.fingerprint()} | run._inputs("corpus")
    return run._settings("evaluate") | inputs | run._made("export")


_IDENTITIES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "corpus": _corpus,
    "filter": _filter,
    "plan": _plan,
    "generate": _generate,
    "mine": _mine,
    "annotate": _annotate,
    "audit": _audit,
    "trajectories": _trajectories,
    "annotator": _annotator,
    "rewrite": _rewrite,
    "assemble": _assemble,
    "train": _train,
    "export": _export,
    "evaluate": _evaluate,
}


def statuses_from(text: str) -> frozenset[str]:
    """Reads `error,truncated`: which failed rows are to be computed again.

    Raises:
        ConfigError: One of them is no status of a failed row.
    """
    wanted = frozenset(filter(None, text.split(",")))
    known = {str(status) for status in Status} - {str(Status.OK)}
    if unknown := wanted - known:
        raise ConfigError(f"--retry {sorted(unknown)}: statuses are {', '.join(sorted(known))}")
    return wanted
