"""The tokenisation contract: everything besides the weights that decides a vector.

Training, mining, evaluation, export and service all take it from here; it is saved as
`contract.json` beside exported weights.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from reasonembed.config import EncoderConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.models import weights_fingerprint
from reasonembed.schemas import stable_hash

CONTRACT_FILE = "contract.json"
MIN_TOKENS = 8
DTYPES = ("float32", "float16", "bfloat16")
_END_TOKENS = ("<|endoftext|>", "<|end_of_text|>")
# Decoders that transformers can let see both sides of a token (`is_causal` of the configuration),
# tested to do so padded and packed. A window, as Mistral's, would reach ahead by another number of
# tokens in the two.
SWITCHABLE = ("llama", "qwen2", "qwen3")
# Families of RoBERTa's descent: positions begin after the padding id.
_AFTER_PADDING = ("camembert", "roberta", "xlm-roberta", "xlm-roberta-xl")


class Pooling(StrEnum):
    """Which hidden states make the vector."""

    LAST = "last"
    MEAN = "mean"
    CLS = "cls"


class Attention(StrEnum):
    """Which tokens a token sees: those up to itself, or all."""

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"


@dataclass(frozen=True)
class TokenisationContract:
    """How a text becomes a vector, given the weights.

    Attributes:
        model: The name that the configuration gave; for people, not part of the fingerprint.
        weights: `models.weights_fingerprint` of the checkpoint.
        query_template: Holds `{query}` and, where the model takes one, `{instruction}`.
        document_template: Holds `{document}`.
        append_token_id: The id that ends every text, also a truncated one; None where the
            tokenizer's own form is kept as it is.
        attention: Which tokens a token sees.
        pooling: Which hidden states make the vector.
        pool_template: Whether the tokens before the text, the template's and those that the
            tokenizer begins with, enter the mean.
        max_query_tokens: Length limit of a query, template and special tokens included.
        max_document_tokens: The same of a document.
        dtype: Of the weights in the forward pass; vectors are float32 in any case.
        dimension: Length of a vector.
        layers: Layers of the checkpoint that are used, from the first; None for all.
        normalise: Whether vectors have L2 norm 1.
        matryoshka_dimensions: Shorter lengths that the weights were trained for, cut from the
            front; decide no vector, so they are not part of the fingerprint.
    """

    model: str
    weights: str
    query_template: str
    append_token_id: int | None
    attention: Attention
    pooling: Pooling
    max_query_tokens: int
    max_document_tokens: int
    dtype: str
    dimension: int
    document_template: str = "{document}"
    pool_template: bool = True
    layers: int | None = None
    normalise: bool = True
    matryoshka_dimensions: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A mapping of JSON values; `from_json` reads it back."""
        plain = {
            "attention": self.attention.value,
            "pooling": self.pooling.value,
            "matryoshka_dimensions": list(self.matryoshka_dimensions),
        }
        return asdict(self) | plain

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TokenisationContract:
        """Reads what `to_json` wrote.

        Raises:
            ModelError: A key is missing or unknown, or attention or pooling is not known.
        """
        names = {field.name for field in fields(cls)}
        data = {"matryoshka_dimensions": ()} | data  # older exports were trained for none
        if set(data) != names:
            raise ModelError(
                f"{CONTRACT_FILE} holds keys {sorted(data)}, expected {sorted(names)}; if another "
                "version has written it, export the model again"
            )
        kinds = {"attention": Attention, "pooling": Pooling, "matryoshka_dimensions": tuple}
        try:
            return cls(**data | {name: kind(data[name]) for name, kind in kinds.items()})
        except ValueError as error:
            raise ModelError(f"{CONTRACT_FILE}: {error}") from error

    def fingerprint(self) -> str:
        """Hash of all that decides a vector; two names of the same weights agree."""
        decides = self.to_json() | {"model": None}
        del decides["matryoshka_dimensions"]
        return stable_hash(json.dumps(decides, sort_keys=True), size=16)


def read_contract(directory: Path) -> TokenisationContract:
    """The contract beside exported weights.

    Raises:
        ModelError: There is none, it cannot be read, or it is of other weights.
    """
    file = directory / CONTRACT_FILE
    if not file.is_file():
        raise ModelError(f"{directory} is no export: {CONTRACT_FILE} is missing")
    contract = TokenisationContract.from_json(_read_json(file))
    if contract.dtype not in DTYPES:
        raise ModelError(f"{file}: dtype {contract.dtype!r} is none of {', '.join(DTYPES)}")
    size = _read_json(directory / "config.json").get("hidden_size")
    if size is not None and size != contract.dimension:
        raise ModelError(
            f"{file}: dimension {contract.dimension}, but the weights beside it give {size}; one "
            "of the two is of another model, so export it again"
        )
    return contract


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's fast tokenizer.

    Raises:
        ModelError: The folder holds no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, use_fast=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} holds no usable tokenizer: {error}") from error


def resolve_contract(path: Path, config: EncoderConfig) -> TokenisationContract:
    """Fills in every `auto` from the checkpoint.

    Attention: what the configuration of the weights says by `is_causal`, else causal for decoders.
    Weights that bring model code of their own must be told: that code is not run, and whether it
    let tokens see both sides is written nowhere else. Pooling: what sentence-transformers'
    `1_Pooling` says, else mean for encoders that were trained on masked words, and last for
    decoders. End token (last pooling only): the one that the tokenizer appends, else the first of
    `<|endoftext|>` (Qwen3, as released by the paper), `<|end_of_text|>` (Llama 3, whose tokenizer
    adds a beginning alone) that the vocabulary holds, else the tokenizer's end-of-sequence token.

    Args:
        path: Checkpoint folder.
        config: Encoder section of the configuration.

    Raises:
        ConfigError: A template does not hold its slot once, a length limit is too small or larger
            than the model's positions, the token to append is not one token of the vocabulary,
            attention must be said or cannot be switched, `pool_template` is false without mean
            pooling, or the folder is an export that was trained under another contract.
        ModelError: The folder is not a checkpoint.
    """
    model_config = _read_json(path / "config.json")
    _check_templates(config)
    _check_lengths(config, limit=_positions(model_config))
    pooling = _resolve_pooling(path, config, model_config)
    if not config.pool_template and pooling is not Pooling.MEAN:
        raise ConfigError(f"encoder.pool_template false is for mean pooling; this is {pooling}")
    contract = TokenisationContract(
        model=config.model,
        weights=weights_fingerprint(path),
        query_template=config.query_template,
        document_template=config.document_template,
        append_token_id=_resolve_end_token(path, config, pooling),
        attention=_resolve_attention(config, model_config),
        pooling=pooling,
        pool_template=config.pool_template,
        max_query_tokens=config.max_query_tokens,
        max_document_tokens=config.max_document_tokens,
        dtype=config.dtype,
        dimension=int(model_config["hidden_size"]),
        layers=_resolve_layers(config, available=model_config.get("num_hidden_layers")),
    )
    if not (path / CONTRACT_FILE).is_file():
        return contract
    trained = TokenisationContract.from_json(_read_json(path / CONTRACT_FILE))
    _check_trained(path, contract, trained)
    return replace(contract, matryoshka_dimensions=trained.matryoshka_dimensions)


_TRAINED = (
    "attention",
    "pooling",
    "pool_template",
    "query_template",
    "document_template",
    "append_token_id",
    "normalise",
)


def _check_trained(
    path: Path, contract: TokenisationContract, trained: TokenisationContract
) -> None:
    """An export says what its weights were trained under; under anything else they mean little."""
    differ = [
        f"{name} {getattr(contract, name)!r} (trained with {getattr(trained, name)!r})"
        for name in _TRAINED
        if getattr(contract, name) != getattr(trained, name)
    ]
    if differ:
        raise ConfigError(
            f"encoder: {path} was trained under another contract: {'; '.join(differ)}; use what "
            "it was trained with, or other weights"
        )


def _resolve_layers(config: EncoderConfig, *, available: int | None) -> int | None:
    if config.layers is not None and available is not None and config.layers > available:
        raise ConfigError(
            f"encoder.layers {config.layers} is more than the {available} of {config.model}"
        )
    # An export holds the layers that are used and no others: asking it for that many is no cut.
    return None if config.layers == available else config.layers


def first_position(model_type: str | None, *, padding_id: int | None) -> int:
    """Position id of a text's first token.

    Args:
        model_type: Of the transformers configuration.
        padding_id: Its `pad_token_id`.
    """
    if model_type == "mpnet":
        return 2  # whatever its padding id
    return (padding_id or 0) + 1 if model_type in _AFTER_PADDING else 0


def _positions(model_config: dict[str, Any]) -> int | None:
    available = model_config.get("max_position_embeddings")
    first = first_position(
        model_config.get("model_type"), padding_id=model_config.get("pad_token_id", 1)
    )
    return None if available is None else int(available) - first


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}") from error


def _check_templates(config: EncoderConfig) -> None:
    for name in ("query", "document"):
        template = getattr(config, f"{name}_template")
        if f"{{{name}}}" not in template:
            raise ConfigError(f"encoder.{name}_template {template!r} lacks {{{name}}}")
        if template.count(f"{{{name}}}") > 1:
            raise ConfigError(f"encoder.{name}_template {template!r} holds {{{name}}} twice")


def _check_lengths(config: EncoderConfig, *, limit: int | None) -> None:
    for name in ("max_query_tokens", "max_document_tokens"):
        value = getattr(config, name)
        if value < MIN_TOKENS or (limit is not None and value > limit):
            raise ConfigError(
                f"encoder.{name} {value} must lie between {MIN_TOKENS} and the "
                f"{limit} positions of {config.model}"
            )


def _resolve_pooling(path: Path, config: EncoderConfig, model_config: dict[str, Any]) -> Pooling:
    if config.pooling != "auto":
        return Pooling(config.pooling)
    declared = path / "1_Pooling" / "config.json"
    if (path / "modules.json").is_file() and declared.is_file():
        return _declared_pooling(declared)
    # Decoders are causal: only their last position has seen the whole text.
    is_decoder = any("CausalLM" in name for name in model_config.get("architectures") or ())
    return Pooling.LAST if is_decoder or not _fills_gaps(model_config) else Pooling.MEAN


def _resolve_attention(config: EncoderConfig, model_config: dict[str, Any]) -> Attention:
    own, family = _own_attention(model_config), model_config.get("model_type")
    if config.attention == "auto":
        own_code = (model_config.get("auto_map") or {}).get("AutoModel")
        if own_code and "is_causal" not in model_config and family in SWITCHABLE:
            raise ConfigError(
                f"encoder.attention: {config.model} brings model code of its own ({own_code}), "
                "which is not run here and may let tokens see those after them; say causal or "
                "bidirectional, as the model's authors do"
            )
        return own
    wanted = Attention(config.attention)
    if wanted is not own and family not in SWITCHABLE:
        raise ConfigError(
            f"encoder.attention {wanted}: that of {family} models is {own}; it can be chosen for "
            f"{', '.join(SWITCHABLE)} only"
        )
    return wanted


def _own_attention(model_config: dict[str, Any]) -> Attention:
    """What transformers' own code does with such a configuration."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if "is_causal" in model_config:
        is_causal = bool(model_config["is_causal"])
    elif _fills_gaps(model_config):
        is_causal = bool(model_config.get("is_decoder"))
    else:
        sees_both = bool(model_config.get("use_bidirectional_attention"))
        is_decoder = model_config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        is_causal = is_decoder and not sees_both
    return Attention.CAUSAL if is_causal else Attention.BIDIRECTIONAL


def _fills_gaps(model_config: dict[str, Any]) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return model_config.get("model_type") in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def _declared_pooling(file: Path) -> Pooling:
    settings = _read_json(file)
    mode = settings.get("pooling_mode")  # sentence-transformers >= 5.2; booleans before
    if mode is None:
        modes = {"lasttoken": "last", "mean_tokens": "mean", "cls_token": "cls"}
        mode = next((m for key, m in modes.items() if settings.get(f"pooling_mode_{key}")), None)
    known = {"lasttoken": Pooling.LAST, "last": Pooling.LAST, "mean": Pooling.MEAN}
    known["cls"] = Pooling.CLS
    if mode not in known:
        raise ModelError(f"{file} declares a pooling other than last, mean or cls: {settings}")
    return known[mode]


def _resolve_end_token(path: Path, config: EncoderConfig, pooling: Pooling) -> int | None:
    wanted = config.append_token
    if wanted == "none" or (wanted == "auto" and pooling is not Pooling.LAST):
        return None
    tokenizer = load_tokenizer(path)
    if wanted != "auto":
        token_id = tokenizer.get_vocab().get(wanted)
        if token_id is None:
            raise ConfigError(
                f"encoder.append_token {wanted!r} is not one token of {config.model}'s vocabulary"
            )
        return int(token_id)
    return _auto_end_token(tokenizer)


def _auto_end_token(tokenizer: Any) -> int:
    last = tokenizer("a")["input_ids"][-1]
    if last in set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
        return int(last)
    vocabulary = tokenizer.get_vocab()
    for token in (*_END_TOKENS, tokenizer.eos_token):
        if token in vocabulary:
            return int(vocabulary[token])
    raise ConfigError(
        "encoder.append_token: the tokenizer has no end-of-sequence token; name a token to append, "
        "or `none`"
    )
