"""From adapter to a model that stands alone, in the form that sentence-transformers reads.

Writes merged weights, a tokenizer that appends the end token by itself, the contract, and golden
token ids and vectors. Reads a checkpoint and an adapter of `loop.train`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reasonembed.embedder.contract import (
    CONTRACT_FILE,
    Pooling,
    TokenisationContract,
    load_tokenizer,
)
from reasonembed.embedder.encode import Backbone, Embedder, load_backbone
from reasonembed.embedder.golden import write_golden
from reasonembed.embedder.tokenisation import apply_template
from reasonembed.errors import ConfigError, ModelError
from reasonembed.models import weights_fingerprint

# Merging in float32 moves a vector by rounding only, about 1e-6.
_MIN_COSINE = 0.9999


def export(
    weights: Path,
    adapter_dir: Path,
    contract: TokenisationContract,
    *,
    output_dir: Path,
    instruction: str,
    golden_texts: Sequence[str],
) -> TokenisationContract:
    """Merges an adapter and writes a folder that sentence-transformers and `Embedder` load.

    Args:
        weights: Checkpoint that the adapter was trained on.
        adapter_dir: What `loop.train` returned.
        contract: What it was trained under.
        output_dir: Made anew; replaced if an earlier export lies there.
        instruction: Becomes part of sentence-transformers' prompt named `query`.
        golden_texts: At least one; their ids and vectors are recorded, and the merge is checked on
            them.

    Returns:
        The contract of the merged weights.

    Raises:
        ConfigError: No golden text, a template that does not end in `{query}`, or a folder in the
            way that is no export.
        ModelError: The merged weights give other vectors than the adapter, or the same as the
            backbone: then the adapter has learned nothing or was not loaded.
    """
    prompt = _prompt(contract, instruction)
    if not golden_texts:
        raise ConfigError("export.golden_texts: at least one text is needed to check the merge")
    if output_dir.exists() and not (output_dir / CONTRACT_FILE).is_file():
        raise ConfigError(f"{output_dir} exists and is no earlier export; choose another folder")
    scratch = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    merged = _merge(weights, adapter_dir, contract, texts=golden_texts)
    merged.to(getattr(torch, contract.dtype)).save_pretrained(scratch)
    _save_tokenizer(weights, contract, target=scratch)
    _save_modules(contract, prompt=prompt, target=scratch)
    contract = replace(contract, weights=weights_fingerprint(scratch), layers=None)
    _write_json(scratch / CONTRACT_FILE, contract.to_json())
    embedder = Embedder(scratch, contract, device="cpu")
    write_golden(embedder, golden_texts, instruction=instruction, directory=scratch)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    scratch.rename(output_dir)
    return contract


def _prompt(contract: TokenisationContract, instruction: str) -> str:
    if not contract.query_template.endswith("{query}"):
        raise ConfigError(
            f"encoder.query_template {contract.query_template!r} must end in {{query}}: "
            "sentence-transformers knows prompts that stand before the text only"
        )
    return apply_template(contract.query_template, query="", instruction=instruction)


def _merge(
    weights: Path, adapter_dir: Path, contract: TokenisationContract, *, texts: Sequence[str]
) -> Any:
    from peft import PeftModel

    # In float32, whatever the weights are: merging in 16 bits rounds small updates away.
    exact = replace(contract, dtype="float32")
    backbone = load_backbone(weights, dtype="float32", layers=contract.layers)

    def vectors(model: Any) -> NDArray[np.float32]:
        loaded = Backbone(model, backbone.tokenizer)
        return Embedder(loaded, exact, device="cpu").encode_documents(texts)

    before = vectors(backbone.model)
    adapted = PeftModel.from_pretrained(backbone.model, adapter_dir).eval()
    expected = vectors(adapted)
    merged = adapted.merge_and_unload()
    found = vectors(merged)
    worst = float(np.sum(found * expected, axis=1).min())
    if not worst >= _MIN_COSINE:
        raise ModelError(
            f"merged weights and adapter disagree: cosine {worst:.6f} on a golden text, at least "
            f"{_MIN_COSINE} is expected"
        )
    if np.array_equal(found, before):
        raise ModelError(f"the adapter in {adapter_dir} changes nothing; was it trained?")
    return merged


def _save_tokenizer(weights: Path, contract: TokenisationContract, *, target: Path) -> None:
    from tokenizers import processors

    tokenizer, end = load_tokenizer(weights), contract.append_token_id
    # Any pad token does, masks come from lengths; right, as this project pads.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if end is not None and tokenizer("a")["input_ids"][-1] != end:
        token = tokenizer.convert_ids_to_tokens(end)
        append = processors.TemplateProcessing(
            single=f"$A:0 {token}:0",
            pair=f"$A:0 {token}:0 $B:1 {token}:1",
            special_tokens=[(token, end)],
        )
        backend = tokenizer.backend_tokenizer
        before = [backend.post_processor] if backend.post_processor is not None else []
        backend.post_processor = processors.Sequence([*before, append])
    tokenizer.model_max_length = max(contract.max_query_tokens, contract.max_document_tokens)
    tokenizer.save_pretrained(target)
    if end is not None and load_tokenizer(target)("a")["input_ids"][-1] != end:
        raise ModelError(
            f"{type(tokenizer).__name__} does not keep the appended token {end} when it is saved; "
            "sentence-transformers would give other token ids"
        )


def _save_modules(contract: TokenisationContract, *, prompt: str, target: Path) -> None:
    kinds = ["Transformer", "Pooling"] + (["Normalize"] if contract.normalise else [])
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": f"{index}_{kind}" if index else "",
            "type": f"sentence_transformers.models.{kind}",
        }
        for index, kind in enumerate(kinds)
    ]
    _write_json(target / "modules.json", modules)
    for module in modules[1:]:
        (target / str(module["path"])).mkdir()
    modes = {"cls_token": Pooling.CLS, "mean_tokens": Pooling.MEAN, "lasttoken": Pooling.LAST}
    chosen = {f"pooling_mode_{name}": mode is contract.pooling for name, mode in modes.items()}
    size = {"word_embedding_dimension": contract.dimension}
    _write_json(target / "1_Pooling" / "config.json", size | chosen | {"include_prompt": True})
    limit = max(contract.max_query_tokens, contract.max_document_tokens)
    settings = {"max_seq_length": limit, "do_lower_case": False}
    _write_json(target / "sentence_bert_config.json", settings)
    prompts = {"prompts": {"query": prompt, "document": ""}, "default_prompt_name": None}
    similarity = {"similarity_fn_name": "cosine"}
    _write_json(target / "config_sentence_transformers.json", prompts | similarity)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
