"""From what training has learnt to a model that stands alone.

Writes plain weights, a tokenizer that appends the end token by itself, the contract, and golden
token ids and vectors: what sentence-transformers, transformers and vLLM load as they load any other
model. Reads what `loop.train` returns: adapters, or all weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
from reasonembed.embedder.golden import MIN_COSINE, write_golden
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, apply_template
from reasonembed.errors import ConfigError, ModelError
from reasonembed.models import weights_fingerprint

_ADAPTER = "adapter_model.safetensors"
# Merging in float32 moves a vector by rounding only, no number of it by more than this.
_ROUNDING = 1e-6

_Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class Exported:
    """What was written, and how sure that is.

    Attributes:
        contract: Of the exported weights.
        cosine_to_backbone: Of the golden texts' vectors before and after training; the lowest.
            Near 1, training has done little.
        cosine_to_trained: Of the golden texts' vectors under the trained weights, merged in
            float32, and under the stored ones; the lowest. Below 1 is what storing in the
            contract's type costs.
    """

    contract: TokenisationContract
    cosine_to_backbone: float
    cosine_to_trained: float


def export(
    weights: Path,
    learnt: Path,
    contract: TokenisationContract,
    *,
    output_dir: Path,
    instruction: str,
    golden_texts: Sequence[str],
) -> Exported:
    """Writes a folder that sentence-transformers, transformers, vLLM and `Embedder` load.

    Args:
        weights: What the training began with.
        learnt: The `weights_dir` of `loop.train`: adapters, which are merged, or all weights.
        contract: What it was trained under.
        output_dir: Made anew; replaced if an earlier export lies there.
        instruction: Becomes part of sentence-transformers' prompt named `query`; the one named
            `document` is the document template.
        golden_texts: At least one; their ids and vectors are recorded, and the weights are checked
            on them.

    Raises:
        ConfigError: No golden text, a template that does not end in its text, one that is not
            pooled, or a folder in the way that is no export.
        ModelError: The written weights give other vectors than the trained ones, or those give the
            same as the backbone: then nothing was learnt or nothing was loaded.
    """
    prompts = _prompts(contract, instruction)
    if not golden_texts:
        raise ConfigError("export.golden_texts: at least one text is needed to check the weights")
    if output_dir.exists() and not (output_dir / CONTRACT_FILE).is_file():
        raise ConfigError(f"{output_dir} exists and is no earlier export; choose another folder")
    scratch = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    trained = _trained(weights, learnt, contract, texts=golden_texts)
    trained.model.to(getattr(torch, contract.dtype)).save_pretrained(scratch)
    _save_tokenizer(weights, contract, target=scratch, texts=golden_texts)
    _save_modules(contract, prompts=prompts, target=scratch)
    contract = replace(contract, weights=weights_fingerprint(scratch), layers=None)
    _write_json(scratch / CONTRACT_FILE, contract.to_json())
    embedder = Embedder(scratch, contract, device="cpu")
    stored = embedder.encode_documents(golden_texts)
    cosine = _check_equal(
        stored, trained.vectors, least=MIN_COSINE[contract.dtype], what="the exported weights"
    )
    write_golden(embedder, golden_texts, instruction=instruction, directory=scratch)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    scratch.rename(output_dir)
    return Exported(contract, trained.cosine_to_backbone, cosine)


def _prompts(contract: TokenisationContract, instruction: str) -> dict[str, str]:
    if not contract.pool_template:
        raise ConfigError("encoder.pool_template false is for finished models, not for an export")
    for name in ("query", "document"):
        template = getattr(contract, f"{name}_template")
        if not template.endswith(f"{{{name}}}"):
            raise ConfigError(
                f"encoder.{name}_template {template!r} must end in {{{name}}}: "
                "sentence-transformers knows prompts that stand before the text only"
            )
    query = apply_template(contract.query_template, query="", instruction=instruction)
    return {"query": query, "document": contract.document_template.removesuffix("{document}")}


@dataclass(frozen=True)
class _Trained:
    """The backbone as it was trained, in float32, and its vectors of the golden texts."""

    model: Any
    vectors: _Vectors
    cosine_to_backbone: float


def _trained(
    weights: Path, learnt: Path, contract: TokenisationContract, *, texts: Sequence[str]
) -> _Trained:
    # In float32, whatever the weights are: merging in 16 bits rounds small updates away.
    exact = replace(contract, dtype="float32")
    backbone = load_backbone(
        weights, dtype="float32", layers=contract.layers, attention=contract.attention
    )

    def vectors(model: Any) -> _Vectors:
        loaded = Backbone(model, backbone.tokenizer)
        return Embedder(loaded, exact, device="cpu").encode_documents(texts)

    before = vectors(backbone.model)
    if (learnt / _ADAPTER).is_file():
        adapted = _adapted(backbone.model, learnt)
        expected = vectors(adapted)
        model = adapted.merge_and_unload()
        found = vectors(model)
        _check_equal(found, expected, least=MIN_COSINE["float32"], what="merged weights")
    else:
        model = _with_weights(backbone.model, learnt)
        found = vectors(model)
    return _Trained(model, found, _check_learnt(found, before, learnt))


def _adapted(model: Any, learnt: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, learnt).eval()


def _with_weights(model: Any, learnt: Path) -> Any:
    """The model with all weights of a folder.

    Raises:
        ModelError: There are none, or they are of another model.
    """
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in sorted(learnt.glob("model*.safetensors")):
        found |= load_file(file)
    if not found:
        raise ModelError(
            f"{learnt} holds neither {_ADAPTER} nor model.safetensors; was the training finished?"
        )
    try:
        model.load_state_dict(found)
    except RuntimeError as error:
        raise ModelError(f"{learnt} is of another model: {error}") from error
    return model


def _check_equal(found: _Vectors, expected: _Vectors, *, least: float, what: str) -> float:
    """The lowest cosine of a text's two vectors.

    Raises:
        ModelError: It is below `least`, or no number.
    """
    worst = float(np.sum(found * expected, axis=1).min())
    if not worst >= least:
        raise ModelError(
            f"{what} and trained model disagree: cosine {worst:.6f} on a golden text, at "
            f"least {least} is expected"
        )
    return worst


def _check_learnt(found: _Vectors, before: _Vectors, learnt: Path) -> float:
    """The lowest cosine of a text's vectors before and after training.

    Raises:
        ModelError: No vector has moved by more than rounding.
    """
    largest = float(np.abs(found - before).max())
    if not largest > _ROUNDING:
        raise ModelError(
            f"training had no effect: {learnt} moves no number of a golden vector by more than "
            f"{largest:.1e}, which rounding does as well; was it trained, and at which rate?"
        )
    return float(np.sum(found * before, axis=1).min())


def _save_tokenizer(
    weights: Path, contract: TokenisationContract, *, target: Path, texts: Sequence[str]
) -> None:
    tokenizer, end = load_tokenizer(weights), contract.append_token_id
    # Any pad token does, masks come from lengths; right, as this project pads.
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if end is not None and tokenizer("a")["input_ids"][-1] != end:
        _append(tokenizer, end)
    tokenizer.model_max_length = max(contract.max_query_tokens, contract.max_document_tokens)
    tokenizer.save_pretrained(target)
    saved = load_tokenizer(target)
    expected, found = (
        ContractTokenizer(one, contract).tokenise(texts, role=Role.DOCUMENT)
        for one in (load_tokenizer(weights), saved)
    )
    if found != expected or (end is not None and saved("a")["input_ids"][-1] != end):
        raise ModelError(
            f"{type(tokenizer).__name__} does not keep the appended token {end} when it is saved; "
            "sentence-transformers would give other token ids"
        )


def _append(tokenizer: Any, end: int) -> None:
    """Makes the tokenizer end every text with a token, after what it adds by itself.

    A template that is there is made longer: a second one behind it would take what the first one
    has put in front for a text of its own, and end that as well.
    """
    from tokenizers import Tokenizer, processors

    backend, token = tokenizer.backend_tokenizer, tokenizer.convert_ids_to_tokens(end)
    state = json.loads(backend.to_str())
    present = state["post_processor"] or {}
    templates = [
        one
        for one in present.get("processors", [present])
        if one.get("type") == "TemplateProcessing"
    ]
    if not templates:
        form = {"single": f"$A:0 {token}:0", "pair": f"$A:0 {token}:0 $B:1 {token}:1"}
        added = processors.TemplateProcessing(**form, special_tokens=[(token, end)])
        kept = [backend.post_processor] if present else []
        backend.post_processor = processors.Sequence([*kept, added])
        return
    for place, form_name in enumerate(("single", "pair")):
        piece = {"SpecialToken": {"id": token, "type_id": place}}
        templates[-1][form_name].append(piece)
    templates[-1]["special_tokens"][token] = {"id": token, "ids": [end], "tokens": [token]}
    backend.post_processor = Tokenizer.from_str(json.dumps(state)).post_processor


def _save_modules(contract: TokenisationContract, *, prompts: dict[str, str], target: Path) -> None:
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
    named = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    _write_json(target / "config_sentence_transformers.json", named)


def _write_json(file: Path, content: Any) -> None:
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
