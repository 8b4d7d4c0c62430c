import json
import shutil
from dataclasses import replace

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from reasonembed.embedder import Pooling, Role, TokenisationContract, resolve_contract
from reasonembed.embedder.contract import load_tokenizer
from reasonembed.embedder.tokenisation import ContractTokenizer
from reasonembed.errors import ConfigError, ModelError
from tests.embedder.tiny import WORDS, encoder_config, save_checkpoint, save_tokenizer


def test_auto_for_a_decoder_is_last_token_and_endoftext(checkpoint):
    contract = resolve_contract(checkpoint, encoder_config(checkpoint))
    assert contract.pooling is Pooling.LAST
    assert contract.append_token_id == 0  # <|endoftext|>
    assert contract.dimension == 32


def test_auto_keeps_the_token_that_the_tokenizer_appends(tmp_path):
    folder = save_checkpoint(tmp_path, appends=True)
    contract = resolve_contract(folder, encoder_config(folder))
    assert contract.append_token_id == 1  # <|im_end|>


def test_a_beginning_token_alone_is_not_taken_for_an_end_token(tmp_path):
    folder = save_checkpoint(tmp_path, with_bos=True)
    assert resolve_contract(folder, encoder_config(folder)).append_token_id == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, Pooling.MEAN),
        ({"pooling_mode_cls_token": True}, Pooling.CLS),
        ({"pooling_mode_lasttoken": True}, Pooling.LAST),
        ({"pooling_mode": "lasttoken"}, Pooling.LAST),
        ({"pooling_mode": "mean"}, Pooling.MEAN),
    ],
)
def test_auto_pooling_follows_sentence_transformers(checkpoint, tmp_path, settings, expected):
    folder = _declare(checkpoint, tmp_path, settings)
    contract = resolve_contract(folder, encoder_config(folder))
    assert contract.pooling is expected
    assert (contract.append_token_id is None) == (expected is not Pooling.LAST)


def test_a_pooling_that_is_not_known_is_refused(checkpoint, tmp_path):
    folder = _declare(checkpoint, tmp_path, {"pooling_mode_max_tokens": True})
    with pytest.raises(ModelError, match="other than last, mean or cls"):
        resolve_contract(folder, encoder_config(folder))


def _declare(checkpoint, tmp_path, settings):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("kind", "architecture", "pooling"),
    [
        ("bert", "BertModel", Pooling.MEAN),
        ("mpnet", "MPNetForMaskedLM", Pooling.MEAN),
        ("xlm-roberta", "XLMRobertaModel", Pooling.MEAN),
        ("modernbert", "ModernBertModel", Pooling.MEAN),
        ("bert", "BertLMHeadModelForCausalLM", Pooling.LAST),
        ("qwen3", "Qwen3Model", Pooling.LAST),
        ("llama", "LlamaForCausalLM", Pooling.LAST),
    ],
)
def test_auto_pooling_is_mean_for_encoders_and_last_for_decoders(
    checkpoint, tmp_path, kind, architecture, pooling
):
    folder = _copy(checkpoint, tmp_path, model_type=kind, architectures=[architecture])
    contract = resolve_contract(folder, encoder_config(folder))
    assert contract.pooling is pooling
    assert (contract.append_token_id is None) == (pooling is Pooling.MEAN)


@pytest.mark.parametrize(("kind", "padding", "limit"), [("roberta", 1, 510), ("mpnet", 0, 510)])
def test_positions_before_the_first_are_not_counted(checkpoint, tmp_path, kind, padding, limit):
    """Of 514 positions RoBERTa's own checkpoints use 512."""
    folder = _copy(checkpoint, tmp_path, model_type=kind, pad_token_id=padding)
    config = encoder_config(folder, max_document_tokens=limit)
    assert resolve_contract(folder, config).max_document_tokens == limit
    with pytest.raises(ConfigError, match=f"{limit} positions"):
        resolve_contract(folder, encoder_config(folder, max_document_tokens=limit + 1))


def _copy(checkpoint, tmp_path, **changes):
    folder = tmp_path / "copy"
    shutil.copytree(checkpoint, folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.parametrize("kind", ["qwen3", "llama-3", "smollm2", "mistral", "gpt2-like"])
def test_auto_end_token_of_each_family(tmp_path, kind):
    special, begins, ends, expected = {
        # Qwen3 ends turns by another token than the one that the paper's weights are read at.
        "qwen3": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", 0),
        # Llama 3 adds a beginning and no end; chat models end turns by <|eot_id|>.
        "llama-3": (
            ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"],
            "<|begin_of_text|>",
            "<|eot_id|>",
            1,
        ),
        "smollm2": (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], None, "<|im_end|>", 0),
        "mistral": (["<unk>", "<s>", "</s>"], "<s>", "</s>", 2),
        "gpt2-like": (["<eos>"], None, "<eos>", 0),
    }[kind]
    folder = save_checkpoint(tmp_path)
    save_tokenizer(folder, special=special, begins=begins, ends=ends, with_bos=begins is not None)
    contract = resolve_contract(folder, encoder_config(folder))
    assert contract.append_token_id == expected
    tokenizer = ContractTokenizer(load_tokenizer(folder), contract)
    for text in ("a", "", WORDS * 9):
        (ids,) = tokenizer.tokenise([text], role=Role.DOCUMENT)
        assert ids[-1] == expected and ids.count(expected) == 1 and len(ids) <= 48
        assert begins is None or ids[0] == special.index(begins)
    assert len(ids) == 48


def test_an_unknown_word_is_not_taken_for_an_end_token(tmp_path):
    folder = save_checkpoint(tmp_path)
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", unk_token="[UNK]"
    ).save_pretrained(folder)
    assert resolve_contract(folder, encoder_config(folder)).append_token_id == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_template": "Query:"}, "lacks {query}"),
        ({"document_template": "{document} {document}"}, "holds {document} twice"),
        ({"max_query_tokens": 3}, "max_query_tokens 3"),
        ({"max_document_tokens": 513}, "max_document_tokens 513"),
        ({"append_token": "<|nothing|>"}, "not one token"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(checkpoint, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolve_contract(checkpoint, encoder_config(checkpoint, **changes))


def test_json_round_trip_and_fingerprint(checkpoint):
    contract = resolve_contract(checkpoint, encoder_config(checkpoint))
    again = TokenisationContract.from_json(json.loads(json.dumps(contract.to_json())))
    assert again == contract
    renamed = TokenisationContract.from_json(contract.to_json() | {"model": "elsewhere"})
    longer = TokenisationContract.from_json(contract.to_json() | {"max_query_tokens": 49})
    assert renamed.fingerprint() == contract.fingerprint() != longer.fingerprint()
    shorter = replace(contract, matryoshka_dimensions=(8, 16))
    assert shorter.fingerprint() == contract.fingerprint()
    assert TokenisationContract.from_json(json.loads(json.dumps(shorter.to_json()))) == shorter
    data = contract.to_json()
    del data["matryoshka_dimensions"]  # as exports of earlier versions
    assert TokenisationContract.from_json(data) == contract
    with pytest.raises(ModelError, match="expected"):
        TokenisationContract.from_json({"model": "x"})
    with pytest.raises(ModelError, match="max"):
        TokenisationContract.from_json(contract.to_json() | {"pooling": "max"})
