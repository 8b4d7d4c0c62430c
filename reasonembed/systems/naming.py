"""Which encoder a name stands for, the same for whoever serves a model or indexes with it."""

from __future__ import annotations

from pathlib import Path

from reasonembed.config import BM25Retriever, DenseRetriever, EncoderConfig, SystemConfig
from reasonembed.embedder.contract import CONTRACT_FILE, load_tokenizer, read_contract
from reasonembed.errors import ConfigError
from reasonembed.run import Run
from reasonembed.storage import Place, is_uri
from reasonembed.systems.catalogue import load_system, system_names
from reasonembed.systems.retrieval import parts_of

_SYSTEM_FILES = (".yaml", ".yml")
_SAME = (
    *("query_template", "document_template", "max_query_tokens", "max_document_tokens"),
    *("dtype", "pool_template", "layers"),
)


def encoder_named(name: str, *, encoder: EncoderConfig | None = None) -> EncoderConfig:
    """The encoder that a model's name stands for, its folder made absolute.

    Args:
        name: A run with an exported model, an export, a system of the catalogue or its file, a
            packaged name, a local folder or a hub id, looked for in this order.
        encoder: Contract of a model that brings none; its own `model` does not count.

    Raises:
        ConfigError: A run has no exported model, a system does not have just one encoder, or a
            model that brings its contract was given another one.
        ModelError: An export's contract cannot be read.
    """
    if is_uri(name) and is_run(name):
        if encoder is not None:
            raise ConfigError(f"{name} brings its own contract; leave out the section encoder")
        return _of_run(name)
    folder = Path(name).expanduser()
    if is_run(folder) or (folder / CONTRACT_FILE).is_file():
        if encoder is not None:
            raise ConfigError(f"{name} brings its own contract; leave out the section encoder")
        return _of_run(folder) if is_run(folder) else _of_export(folder.absolute())
    if encoder is None and (name in system_names() or folder.suffix in _SYSTEM_FILES):
        found, _ = retrievers_of(load_system(name))
        if found is None:
            raise ConfigError(f"the system {name} has no encoder; name one that has")
        return found
    model = str(folder.absolute()) if (folder / "config.json").is_file() else name
    return (encoder or EncoderConfig(model=model)).model_copy(update={"model": model})


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run."""
    return (Place(folder) / "config.resolved.yaml").is_file()


def retrievers_of(system: SystemConfig) -> tuple[EncoderConfig | None, BM25Retriever | None]:
    """The encoder and the BM25 of a system; None for what it has not.

    Raises:
        ConfigError: It has several of a kind, or other retrievers.
    """
    parts = parts_of(system)
    dense = [part.encoder for part in parts.values() if isinstance(part, DenseRetriever)]
    bm25 = [part for part in parts.values() if isinstance(part, BM25Retriever)]
    if len(dense) > 1 or len(bm25) > 1 or len(dense) + len(bm25) < len(parts):
        kinds = ", ".join(f"{name} ({part.kind})" for name, part in parts.items())
        raise ConfigError(
            f"the system {system.name} retrieves by {kinds}; an index holds the vectors of one "
            "model that runs here, and one BM25"
        )
    return (dense[0] if dense else None), (bm25[0] if bm25 else None)


def _of_run(folder: str | Path) -> EncoderConfig:
    """As the run embeds with it, so that its vectors are found again."""
    run = Run.existing(folder)
    if not (run.model_place / CONTRACT_FILE).is_file():
        raise ConfigError(f"{folder} has no exported model; finish the run, or name a model")
    return run.encoders.trained


def _of_export(folder: Path) -> EncoderConfig:
    """What makes `resolve_contract` give an export's own contract."""
    contract = read_contract(folder)
    token = "none"
    if contract.append_token_id is not None:
        token = str(load_tokenizer(folder).convert_ids_to_tokens(contract.append_token_id))
    values = {name: getattr(contract, name) for name in _SAME}
    return EncoderConfig(
        model=str(folder),
        attention=contract.attention.value,
        pooling=contract.pooling.value,
        append_token=token,
        **values,
    )
