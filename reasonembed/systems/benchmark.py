"""Every system of a benchmark's configuration on each of its collections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from reasonembed.artifacts import locked
from reasonembed.config import (
    BenchmarkConfig,
    DenseRetriever,
    EndpointRetriever,
    RunRetriever,
    RuntimeConfig,
    SystemConfig,
)
from reasonembed.errors import ConfigError, EvaluationError
from reasonembed.evaluation import protocols
from reasonembed.evaluation.collection import Collection
from reasonembed.evaluation.datasets import load_collections
from reasonembed.evaluation.results import Result
from reasonembed.models import resolve
from reasonembed.progress import Reporter
from reasonembed.systems.catalogue import load_system
from reasonembed.systems.encoding import address_of
from reasonembed.systems.local import LocalWork, Work
from reasonembed.systems.measure import is_done, measure
from reasonembed.systems.retrieval import parts_of, run_file
from reasonembed.systems.table import table_lines
from reasonembed.systems.workspace import Workspace


def measure_all(config: BenchmarkConfig, *, work: Work) -> list[Result]:
    """Measures system by system, each on all collections at once: loading a model takes long.

    Systems, collections, addresses and run files are looked at and weights are found before
    anything is computed, so that a mistake in them shows at once.

    Returns:
        By system, then by collection, in the order of the configuration.

    Raises:
        ConfigError: A system is unknown or stands twice, or an endpoint that is needed has no
            address.
        EvaluationError: A collection cannot be had or stands twice, or a run file is missing.
        ModelError: There are no weights of a system whose results are not finished.
        StorageError: Another process works in the same folder.
    """
    protocol = protocols.get(config.protocol)
    systems = [placed(load_system(name)) for name in config.systems]
    collections = _collections(config)
    _check(systems, collections)
    workspace = Workspace(Path(config.results_dir), runtime=config.runtime)
    unfinished = [
        system
        for system in systems
        if not _is_finished(system, collections, protocol.name, workspace, retry=work.retry)
    ]
    _find_models(unfinished, config.runtime)
    results: list[Result] = []
    with locked(workspace.results):
        for number, system in enumerate(systems, start=1):
            on = f"{len(collections)} collections" if len(collections) > 1 else collections[0].name
            work.reporter.say(f"[{number}/{len(systems)}] {system.name} on {on}")
            results += measure(system, collections, protocol, workspace=workspace, work=work)
    return results


def measure_here(
    config: BenchmarkConfig, reporter: Reporter, *, retry: frozenset[str] = frozenset()
) -> list[str]:
    """Measures in this process, and says what came out; see `measure_all` for what is refused.

    Args:
        config: What is measured.
        reporter: Says how far it is.
        retry: Statuses of an LLM's answers that are asked for again.
    """
    work = LocalWork(reporter, retry=retry)
    try:
        return table_lines(measure_all(config, work=work), place=Path(config.results_dir))
    finally:
        work.close()


def _collections(config: BenchmarkConfig) -> list[Collection]:
    data_dir = None if config.data_dir is None else Path(config.data_dir)
    return [
        collection
        for spec in config.collections
        for collection in load_collections(spec, data_dir=data_dir)
    ]


def _check(systems: list[SystemConfig], collections: list[Collection]) -> None:
    _refuse_twice("system", (system.name for system in systems))
    _refuse_twice("collection", (collection.name for collection in collections))
    for system in systems:
        parts = parts_of(system).values()
        for file in (
            run_file(part, one)
            for part in parts
            if isinstance(part, RunRetriever)
            for one in collections
        ):
            if not file.is_file():
                raise EvaluationError(f"{system.name}: there is no run file {file}")


def _is_finished(
    system: SystemConfig,
    collections: list[Collection],
    protocol: str,
    workspace: Workspace,
    *,
    retry: frozenset[str],
) -> bool:
    places = (
        workspace.result(protocol=protocol, collection=one.name, system=system.name)
        for one in collections
    )
    return all(is_done(place, retry=retry) for place in places)


def _find_models(systems: list[SystemConfig], runtime: RuntimeConfig) -> None:
    """Fetches weights that are needed and not at hand, once all addresses are known."""
    for system in systems:
        for name, part in parts_of(system).items():
            if isinstance(part, EndpointRetriever):
                address_of(name, part, runtime, where=f"the retriever {name}")
    for system in systems:
        for model in _models_of(system):
            resolve(model, cache_dir=runtime.cache_dir)


def _models_of(system: SystemConfig) -> list[str]:
    """Names of all weights that are loaded here."""
    parts = parts_of(system).values()
    models = [part.encoder.model for part in parts if isinstance(part, DenseRetriever)]
    asked = [system.rewrite, system.rerank and system.rerank.annotate]
    return models + [one.llm.model for one in asked if one and one.llm.engine == "vllm"]


def placed(system: SystemConfig) -> SystemConfig:
    """The system with folders of models that exist made absolute.

    Actors of a cluster work in folders of their own.
    """
    return SystemConfig.model_validate(_placed(system.model_dump()))


def _placed(fields: dict[str, Any]) -> dict[str, Any]:
    found = {key: _placed(one) if isinstance(one, dict) else one for key, one in fields.items()}
    # Servers and scripts know models by names that only look like folders.
    is_here = found.get("kind") != "endpoint" and found.get("engine", "vllm") == "vllm"
    model = found.get("model")
    if is_here and isinstance(model, str) and (Path(model) / "config.json").is_file():
        found["model"] = str(Path(model).absolute())
    return found


def _refuse_twice(what: str, names: Iterable[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise ConfigError(f"{what} {name!r} stands {count} times; name it once")
