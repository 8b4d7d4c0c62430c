"""Which results a person means: a file, a folder, a run, or a system's name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from reasonembed.errors import EvaluationError
from reasonembed.evaluation.results import RUN_PROTOCOL, Result, find_result_files, read_result
from reasonembed.evaluation.standings import System

_RUN_FILE, _RUN_RESULTS = "config.resolved.yaml", "evaluate"
_Found = list[tuple[Path, Result]]


def load_systems(
    sources: Sequence[str],
    *,
    results: Path,
    protocol: str | None = None,
    collections: Sequence[str] = (),
) -> list[System]:
    """The systems that are to be compared.

    A source is a place or several between commas, which are the seeds of one system. A place is a
    `result.json`, a folder with results of one system, a folder or run directory and a system of
    it as `PATH:SYSTEM`, or the name of a system in `results`.

    Args:
        sources: One for each system.
        results: Folder that names of systems are looked up in.
        protocol: Leave out results under another.
        collections: Names of collections or of benchmarks; leave out other results.

    Returns:
        The systems in the order of the sources, named as in their results, or by their source
        where that is no name of its own.

    Raises:
        EvaluationError: Nothing is found, or more than one system, or a result is damaged.
    """

    def wanted(result: Result) -> bool:
        named = {result.collection, result.benchmark}
        return protocol in (None, result.protocol) and (
            not collections or not named.isdisjoint(collections)
        )

    below = cache(_below)  # several sources may lie in one folder
    found = [_load(source, results, wanted, below) for source in sources]
    names = [_name(source, one) for source, one in zip(sources, found, strict=True)]
    return [
        System(
            name if names.count(name) == 1 else source,
            [result for _, result in one],
            [file.parent for file, _ in one],
        )
        for source, name, one in zip(sources, names, found, strict=True)
    ]


def _load(
    source: str, results: Path, wanted: Callable[[Result], bool], below: Callable[[Path], _Found]
) -> _Found:
    places = source.split(",")
    found = [_of_one_system(place, results, wanted, below) for place in places]
    if len(places) == 1:
        return found[0]
    _check_seeds(source, [result for one in found for _, result in one])
    seeds = [(result.collection, result.seed) for one in found for _, result in one]
    if len(set(seeds)) == len(seeds) and all(seed is not None for _, seed in seeds):
        return [pair for one in found for pair in one]
    # The commas say that these are seeds; which ones, the results do not.
    return [
        (file, replace(result, seed=number))
        for number, one in enumerate(found, start=1)
        for file, result in one
    ]


def _check_seeds(source: str, results: Iterable[Result]) -> None:
    """A run's systems are stages of one training; those of a results folder may have any name."""
    names = _distinct(result.system for result in results if result.protocol == RUN_PROTOCOL)
    if len(names) > 1:
        raise EvaluationError(
            f"{source}: places between commas are seeds of one system, and these are {len(names)}: "
            f"{', '.join(names)}; name the same one of each run"
        )


def _of_one_system(
    place: str, results: Path, wanted: Callable[[Result], bool], below: Callable[[Path], _Found]
) -> _Found:
    everything = _at(place, results, below)
    found = [pair for pair in everything if wanted(pair[1])]
    if not found:
        there = _distinct(f"{one.collection} under {one.protocol}" for _, one in everything)
        raise EvaluationError(
            f"{place} has no result on these collections under this protocol; it has "
            f"{', '.join(there)}"
        )
    systems = _distinct(result.system for _, result in found)
    if len(systems) > 1:
        named = " or ".join(f"{place}:{system}" for system in systems)
        raise EvaluationError(f"{place} holds several systems; name one: {named}")
    protocols = _distinct(result.protocol for _, result in found)
    if len(protocols) > 1:
        raise EvaluationError(
            f"{place} has results under several protocols: {', '.join(protocols)}; choose one "
            "with --protocol"
        )
    return found


def _name(source: str, found: _Found) -> str:
    systems = _distinct(result.system for _, result in found)
    return systems[0] if len(systems) == 1 else source


def _at(place: str, results: Path, below: Callable[[Path], _Found]) -> _Found:
    path = Path(place)
    if path.exists():
        return below(path)
    folder, _, system = place.rpartition(":")
    if folder and not Path(folder).exists():
        raise EvaluationError(f"there is no {place}, and no folder {folder}")
    everything = below(Path(folder) if folder else results)
    found = [pair for pair in everything if pair[1].system == system]
    if not found:
        known = ", ".join(_distinct(result.system for _, result in everything)) or "none"
        raise EvaluationError(
            f"{place} is no file or folder, and {folder or results} has no system {system!r}; its "
            f"systems: {known}"
        )
    return found


def _below(path: Path) -> _Found:
    if path.is_file():
        return [(path, read_result(path))]
    # A run holds much besides, such as a model and vectors.
    found = find_result_files(path / _RUN_RESULTS if (path / _RUN_FILE).is_file() else path)
    if not found:
        raise EvaluationError(f"{path} holds no result.json; evaluate something into it first")
    return found


def _distinct(names: Iterable[str]) -> list[str]:
    return sorted(set(names))
