import json
import shutil

import pytest

from reasonembed.embedder import Pooling, TokenisationContract, resolve_contract
from reasonembed.errors import ConfigError, ModelError
from tests.embedder.tiny import encoder_config, save_checkpoint


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


def test_bert_like_weights_are_pooled_by_mean(checkpoint, tmp_path):
    folder = tmp_path / "bert"
    shutil.copytree(checkpoint, folder)
    config = {"architectures": ["BertModel"], "type_vocab_size": 2, "hidden_size": 32}
    (folder / "config.json").write_text(json.dumps(config))
    assert resolve_contract(folder, encoder_config(folder)).pooling is Pooling.MEAN


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query_template": "Query:"}, "lacks {query}"),
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
    with pytest.raises(ModelError, match="expected"):
        TokenisationContract.from_json({"model": "x"})
    with pytest.raises(ModelError, match="max"):
        TokenisationContract.from_json(contract.to_json() | {"pooling": "max"})
