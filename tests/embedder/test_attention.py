"""Decoders that see both sides, and means that leave the template out."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from reasonembed.embedder import Attention, Embedder, Pooling, Role, resolve_contract
from reasonembed.embedder.contract import SWITCHABLE, load_tokenizer
from reasonembed.embedder.encode import load_backbone
from reasonembed.embedder.packing import is_causal, use_packing
from reasonembed.embedder.pooling import forward, pool
from reasonembed.embedder.tokenisation import ContractTokenizer
from reasonembed.errors import ConfigError, ModelError
from tests.embedder.families import contract, make_model, random_texts
from tests.embedder.tiny import WORDS, encoder_config, save_checkpoint

# Another batch shape makes float32 sums in another order; vectors have norm 1.
ATOL = 1e-5


@pytest.fixture(scope="module", params=SWITCHABLE)
def saved(request, tmp_path_factory):
    """A checkpoint that says nothing of its attention, as those of decoders do."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model(request.param).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("attention", Attention)
def test_an_earlier_position_sees_a_later_token_or_does_not(saved, attention, packed, monkeypatch):
    monkeypatch.setattr("reasonembed.embedder.encode.load_tokenizer", lambda _: None)
    model = load_backbone(saved, dtype="float32", attention=attention).model
    assert is_causal(model) == (attention is Attention.CAUSAL)
    assert use_packing(model, "on" if packed else "off") == packed
    first = contract(Pooling.CLS, attention=attention)
    (text,) = random_texts(4)
    other = (*text[:-1], (text[-1] + 1) % 60)
    short = text[:2]
    with torch.no_grad():
        # Of equal length there is no mask at all, with a shorter one there is.
        for batch in ([text, other], [text, other, short], [text], [other]):
            vectors = forward(model, first, batch, packed=packed)
            if len(batch) > 1:
                assert torch.allclose(vectors[0], vectors[1], atol=ATOL) == is_causal(model)
            alone = torch.cat([forward(model, first, [one], packed=packed) for one in batch])
            torch.testing.assert_close(vectors, alone, atol=ATOL, rtol=0)


def test_packed_equals_padded_for_decoders_that_see_both_sides(saved, monkeypatch):
    monkeypatch.setattr("reasonembed.embedder.encode.load_tokenizer", lambda _: None)
    model = load_backbone(saved, dtype="float32", attention=Attention.BIDIRECTIONAL).model
    texts = random_texts(3, 9, 1, 20, 9, 14)
    for pooling in Pooling:
        mine = contract(pooling, attention=Attention.BIDIRECTIONAL)
        with torch.no_grad():
            padded = forward(model, mine, texts)
            use_packing(model, "on")
            packed = forward(model, mine, texts, packed=True)
            torch.testing.assert_close(packed, padded, atol=ATOL, rtol=0)


def test_the_saved_weights_keep_the_switch_and_it_can_be_turned_back(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("reasonembed.embedder.encode.load_tokenizer", lambda _: None)
    model = load_backbone(saved, dtype="float32", attention=Attention.BIDIRECTIONAL).model
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert not is_causal(load_backbone(tmp_path, dtype="float32").model)
    again = load_backbone(tmp_path, dtype="float32", attention=Attention.CAUSAL).model
    assert is_causal(again)


# ---- what `auto` finds, and what is refused ---------------------------------------------------


def resolved(folder, *, model=None, **changes):
    if model is not None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | model))
    return resolve_contract(folder, encoder_config(folder, **changes)).attention


@pytest.mark.parametrize(
    ("model", "changes", "expected"),
    [
        ({}, {}, "causal"),
        ({}, {"attention": "bidirectional"}, "bidirectional"),
        ({"is_causal": False}, {}, "bidirectional"),
        ({"is_causal": False}, {"attention": "causal"}, "causal"),
        ({"model_type": "bert"}, {}, "bidirectional"),
        ({"model_type": "bert", "is_decoder": True}, {}, "causal"),
        (
            {"model_type": "gemma3_text", "sliding_window": 8, "use_bidirectional_attention": True},
            {},
            "bidirectional",
        ),
        ({"model_type": "gpt2"}, {}, "causal"),
        ({"auto_map": {"AutoModel": "own.M"}}, {"attention": "causal"}, "causal"),
        ({"auto_map": {"AutoModel": "own.M"}, "is_causal": False}, {}, "bidirectional"),
        ({"auto_map": {"AutoTokenizer": "own.T"}}, {}, "causal"),
    ],
)
def test_attention_of_each_family(copied, model, changes, expected):
    assert resolved(copied, model=model, **changes) == expected


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"auto_map": {"AutoModel": "modeling_qwen.M"}}, {}, r"model code of its own \(modeling_q"),
        ({"model_type": "bert"}, {"attention": "causal"}, "that of bert models is bidirectional"),
        ({"model_type": "gpt2"}, {"attention": "bidirectional"}, "that of gpt2 models is causal"),
        ({}, {"pool_template": False}, "is for mean pooling; this is last"),
        ({}, {"document_template": "passage: "}, r"document_template 'passage: ' lacks \{document"),
    ],
)
def test_what_cannot_be_is_refused_by_name(copied, model, changes, message):
    with pytest.raises(ConfigError, match=message):
        resolved(copied, model=model, **changes)


@pytest.fixture
def copied(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy")


# ---- means that leave the template out --------------------------------------------------------


def test_skipped_tokens_do_not_enter_the_mean():
    states = [torch.randn(length, 3) for length in (5, 2, 3, 4)]
    lengths = [len(one) for one in states]
    # Of a text that is no longer than what is skipped, all tokens are pooled.
    expected = torch.stack([one[2 if len(one) > 2 else 0 :].mean(dim=0) for one in states])
    padded = torch.nn.utils.rnn.pad_sequence(states, batch_first=True, padding_value=float("nan"))
    for given in (padded, torch.cat(states)[None]):
        torch.testing.assert_close(pool(given, lengths, Pooling.MEAN, skip=2), expected)


REASONIR = {
    "attention": "bidirectional", "pooling": "mean", "pool_template": False,
    "append_token": "none", "query_template": "<|user|>\n{instruction}\n<|embed|>\n{query}",
    "document_template": "<|embed|>\n{document}",
}  # fmt: skip
TEXTS = ["why {x}", "\nwhat follows for a loop", WORDS, "", "why {x}"]


@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize("packing", ["on", "off"])
def test_reasonir_is_pooled_as_its_authors_do(tmp_path, with_bos, packing):
    """Whole text with its prompt through the model, then a mean without the prompt's tokens."""
    folder = save_checkpoint(tmp_path, with_bos=with_bos)
    config = encoder_config(folder, **REASONIR)
    mine = resolve_contract(folder, config)
    ours = Embedder(folder, mine, device="cpu", batch_tokens=100, packing=packing)
    loaded = load_backbone(folder, dtype="float32", attention=Attention.BIDIRECTIONAL)
    prompts = {
        Role.QUERY: "<|user|>\nfind {what}\n<|embed|>\n",
        Role.DOCUMENT: "<|embed|>\n",
    }
    found = {
        Role.QUERY: ours.encode_queries(TEXTS, instruction="find {what}"),
        Role.DOCUMENT: ours.encode_documents(TEXTS),
    }
    for role, prompt in prompts.items():
        skip = len(loaded.tokenizer(prompt)["input_ids"])  # with the beginning token
        for text, vector in zip(TEXTS, found[role], strict=True):
            ids = loaded.tokenizer(prompt + text, truncation=True, max_length=48)["input_ids"]
            with torch.no_grad():
                states = loaded.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            expected = states[skip if len(ids) > skip else 0 :].mean(dim=0)
            expected = (expected / expected.norm()).numpy()
            np.testing.assert_allclose(vector, expected, atol=ATOL)
    assert np.array_equal(found[Role.QUERY][0], found[Role.QUERY][4])
    # With the prompt the mean is another one, so the above can fail.
    plain = Embedder.load(encoder_config(folder, **REASONIR | {"pool_template": True}))
    assert (plain.encode_documents(TEXTS) * found[Role.DOCUMENT]).sum(axis=1)[0] < 0.999


def test_a_tokenizer_that_ends_texts_does_not_end_the_counted_template(tmp_path):
    folder = save_checkpoint(tmp_path, with_bos=True, appends=True)
    keeper = ContractTokenizer(
        load_tokenizer(folder), resolve_contract(folder, encoder_config(folder, **REASONIR))
    )
    counted = keeper.tokens_before_text(role=Role.DOCUMENT)
    (ids,) = keeper.tokenise(["x"], role=Role.DOCUMENT)
    assert load_tokenizer(folder).decode(ids[counted:]) == "x<|im_end|>"


def test_all_that_decides_a_vector_is_in_the_contract_and_its_fingerprint():
    base = contract(Pooling.MEAN)
    for change in (
        {"attention": Attention.BIDIRECTIONAL},
        {"document_template": "d: {document}"},
        {"pool_template": False},
    ):
        other = replace(base, **change)
        assert other.fingerprint() != base.fingerprint()
        assert type(base).from_json(json.loads(json.dumps(other.to_json()))) == other
    with pytest.raises(ModelError, match="export the model again"):
        type(base).from_json({k: v for k, v in base.to_json().items() if k != "attention"})
    with pytest.raises(ModelError, match="'sideways' is not a valid Attention"):
        type(base).from_json(base.to_json() | {"attention": "sideways"})
