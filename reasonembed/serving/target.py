"""What a configuration calls its model: which checkpoint, under which contract, by which name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from reasonembed import tasks
from reasonembed.config import (
    DenseRetriever,
    EncoderConfig,
    HybridRetriever,
    ServeConfig,
    SystemConfig,
)
from reasonembed.embedder.contract import (
    CONTRACT_FILE,
    TokenisationContract,
    read_contract,
    resolve_contract,
)
from reasonembed.errors import ConfigError, ModelError
from reasonembed.evaluation.protocols import BGE_GENERAL
from reasonembed.models import resolve
from reasonembed.storage import Place, is_uri

GENERIC = tasks.get("generic").instruction
"""What queries ask for where nobody says."""
_RUN_FILE = "config.resolved.yaml"


@dataclass(frozen=True)
class Target:
    """What a configuration's `model` stands for.

    Attributes:
        path: Checkpoint folder.
        contract: How its texts become vectors.
        name: Of the model, where the configuration gives none.
        instruction: Of queries, where neither configuration nor request gives one.
        is_export: Whether golden token ids and vectors lie there.
    """

    path: Path
    contract: TokenisationContract
    name: str
    instruction: str
    is_export: bool


def find_target(config: ServeConfig) -> Target:
    """What `config.model` stands for; weights are not loaded, but may be fetched.

    A run or an export brings its contract; else it is `config.encoder`, the catalogue's, or the
    default one, in this order.

    Raises:
        ModelError: There is no such model, or a run that has exported none yet.
        ConfigError: The contract does not fit the weights, or there are two.
    """
    if is_uri(config.model) and (stored := _stored(config)) is not None:
        return stored
    folder = Path(config.model).expanduser()
    is_run = (folder / _RUN_FILE).is_file()
    if is_run or (folder / CONTRACT_FILE).is_file():
        if config.encoder is not None:
            raise ConfigError(_BRINGS_ITS_OWN.format(config.model))
        return _run(folder) if is_run else _export(folder)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ModelError(
            f"{config.model} is neither a run ({_RUN_FILE}) nor an exported model "
            f"({CONTRACT_FILE}) nor a checkpoint (config.json); name one of these, a system of the "
            "catalogue, a packaged model or a hub id"
        )
    if config.encoder is None and (found := _system(config.model)) is not None:
        encoder, instruction = _encoder_of(found)
        return _checkpoint(encoder, config, name=found.name, instruction=instruction)
    encoder = config.encoder or EncoderConfig(model=config.model)
    if encoder.model != config.model:
        raise ConfigError(
            f"encoder.model {encoder.model!r} is not the model {config.model!r} that is to be "
            "served; name the same one in both"
        )
    name = folder.absolute().name if folder.is_dir() else config.model
    return _checkpoint(encoder, config, name=name, instruction=GENERIC)


_BRINGS_ITS_OWN = "encoder: {} brings the contract that it was trained under; leave the section out"


def _stored(config: ServeConfig) -> Target | None:
    """A run or an export in an object store, fetched into the cache; None for a bare checkpoint."""
    from reasonembed.run import Run

    place, name, instruction = Place(config.model), "", GENERIC
    if (place / _RUN_FILE).is_file():
        run = Run.existing(config.model)
        place, name, instruction = run.model_place, run.name, run.instruction
    if not (place / CONTRACT_FILE).is_file():
        if name:
            raise ModelError(f"{config.model} has no exported model yet; finish the run")
        return None
    if config.encoder is not None:
        raise ConfigError(_BRINGS_ITS_OWN.format(config.model))
    path = resolve(place.uri, cache_dir=config.cache_dir)
    return Target(path, read_contract(path), name or place.name, instruction, is_export=True)


def _run(folder: Path) -> Target:
    from reasonembed.run import Run

    run = Run.existing(folder)
    if not (run.model_dir / CONTRACT_FILE).is_file():
        raise ModelError(
            f"{folder} has no exported model yet; finish the run with `reasonembed run "
            f"{run.config_file} --to export`"
        )
    return Target(
        run.model_dir, read_contract(run.model_dir), run.dir.name, run.instruction, is_export=True
    )


def _export(folder: Path) -> Target:
    name = folder.absolute().name
    return Target(folder, read_contract(folder), name, GENERIC, is_export=True)


def _checkpoint(
    encoder: EncoderConfig, config: ServeConfig, *, name: str, instruction: str
) -> Target:
    path = resolve(encoder.model, cache_dir=config.cache_dir)
    contract = resolve_contract(path, encoder)
    return Target(path, contract, name, instruction, is_export=False)


def _system(name: str) -> SystemConfig | None:
    from reasonembed.systems.catalogue import load_system, system_names

    is_file = Path(name).suffix in (".yaml", ".yml")
    return load_system(name) if is_file or name in system_names() else None


def _encoder_of(system: SystemConfig) -> tuple[EncoderConfig, str]:
    """A system's encoder, and what its queries ask for where nobody says."""
    retrieve = system.retrieve
    parts = list(retrieve.parts.values()) if isinstance(retrieve, HybridRetriever) else [retrieve]
    dense = [part.encoder for part in parts if isinstance(part, DenseRetriever)]
    if len(dense) != 1:
        raise ConfigError(
            f"system {system.name} has {len(dense)} encoders whose weights could be served, and "
            "one is needed; name the model itself"
        )
    sentences = {
        "none": "",
        "instruct": GENERIC,
        "represent": BGE_GENERAL,
    }
    return dense[0], sentences[system.instruction]
