"""What holds for every family of backbones, tiny and random, and for the two real small models."""

from functools import partial

import numpy as np
import pytest
import torch

from reasonembed.config import LoRAConfig, TrainConfig, TrainRuntime
from reasonembed.embedder import Embedder, Pooling, Role, resolve_contract
from reasonembed.embedder.encode import budget_batches
from reasonembed.embedder.packing import use_packing
from reasonembed.embedder.pooling import forward
from reasonembed.errors import ModelError
from reasonembed.models import resolve
from reasonembed.redapter.loop import train
from reasonembed.redapter.loss import ri_info_nce
from reasonembed.redapter.sharding import with_adapter
from reasonembed.redapter.step import LocalBatch, contrastive_step
from reasonembed.schemas import row_seed
from tests.embedder.families import DECODERS, FAMILIES, contract, make_model, random_texts
from tests.embedder.tiny import encoder_config
from tests.redapter.samples import samples

# Another batch shape makes float32 sums in another order; vectors have norm 1.
ATOL = 1e-5
# Of the largest entry of a gradient: the same through two layers and back.
RELATIVE = 1e-4
# Ids 0 and 1 pad in one family or another; here they stand inside texts and end them as well.
TEXTS = [*random_texts(3, 9, 1, 20, 9, 9, 14), (7, 1, 0, 1, 9), (5, 0, 0), (1,), (0,), (8, 1, 1)]
FULL = max(map(len, TEXTS))


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_packed_or_alone_a_text_has_one_vector(family):
    model = make_model(family)
    for pooling in Pooling:
        embed = partial(forward, model, contract(pooling))
        with torch.no_grad():
            alone = torch.cat([embed([text]) for text in TEXTS])
            torch.testing.assert_close(embed(TEXTS), alone, atol=ATOL, rtol=0)
            if use_packing(model, "auto"):
                torch.testing.assert_close(embed(TEXTS, packed=True), alone, atol=ATOL, rtol=0)
                torch.testing.assert_close(embed(TEXTS), alone, atol=ATOL, rtol=0)
        # Different texts are told apart, so the above can fail.
        different = alone[:7] if pooling is not Pooling.CLS else alone[[0, 1, 3]]
        similar = (different @ different.T).fill_diagonal_(0)
        assert similar.max() < 0.999


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"mpnet"}))
def test_gradients_of_padded_and_packed_passes_agree(family):
    model = make_model(family)
    assert use_packing(model, "on")
    gradients = []
    for packed in (False, True):
        vectors = forward(model, contract(Pooling.MEAN), TEXTS, packed=packed)
        weight = torch.linspace(-1, 1, vectors.numel()).view_as(vectors)
        model.zero_grad()
        (vectors * weight).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    padded, packed = gradients
    assert padded.keys() == packed.keys() and len(padded) > 10
    for name, gradient in padded.items():
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (packed[name] - gradient).abs().max().item() <= RELATIVE * scale, name


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_the_left_gives_the_same_states(family):
    model = make_model(family)
    first = {"roberta": 2, "xlm-roberta": 2, "mpnet": 2}.get(family, 0)
    with torch.no_grad():
        right = forward(model, contract(Pooling.LAST, normalise=False), TEXTS)
        for text, expected in zip(TEXTS, right, strict=True):
            pad = FULL - len(text)
            mask = torch.tensor([[0] * pad + [1] * len(text)])
            left = model(
                input_ids=torch.tensor([[3] * pad + list(text)]),
                attention_mask=mask,
                position_ids=first + (mask.cumsum(1) - 1).clamp(min=0),
            ).last_hidden_state[0, -1]
            torch.testing.assert_close(left, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_id_pads_changes_nothing(family):
    """In Qwen3 it is the end token's own."""
    if family in ("roberta", "xlm-roberta"):
        pytest.skip("positions begin after the padding id")
    model, other = (make_model(family, pad_token_id=pad) for pad in (0, 9))
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected, found = (forward(m, contract(Pooling.LAST), TEXTS) for m in (model, other))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_of_every_family_can_be_adapted(family):
    lora = LoRAConfig(rank=2, alpha=4, dropout=0.0)
    model = with_adapter(make_model(family), lora, task_type="FEATURE_EXTRACTION", name=family)
    learnt = [name for name, p in model.named_parameters() if p.requires_grad]
    per_layer = [sum(f".{n}." in name for name in learnt) for n in (0, 1)]
    assert per_layer[0] == per_layer[1] == len(learnt) / 2  # so none outside, as in a pooler
    assert per_layer[0] == 2 * {"modernbert": 4}.get(family, 7 if family in DECODERS else 6)
    packed = use_packing(model, "auto")
    vectors = forward(model, contract(Pooling.MEAN), TEXTS, packed=packed)
    vectors.square().sum().mul(vectors.sum()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ---- dropout of encoders and the gradient cache -----------------------------------------------

QUERIES, GROUP, SEED = 3, 2, 7


def triplets():
    texts = random_texts(5, 3, 8, 6, 7, 9, 14, 4, 11, 2, 9, 12)
    return LocalBatch(texts[:3], texts[3:6], texts[6:])


def loss(query_BD, rewritten_BD, doc_MD):
    return ri_info_nce(
        query_BD, rewritten_BD, doc_MD, torch.arange(QUERIES) * GROUP,
        temperature=0.1, cap=5.0, epsilon=1e-6, is_weighted=True,
    )  # fmt: skip


@pytest.mark.parametrize("packing", ["on", "off"])
def test_both_passes_of_the_gradient_cache_draw_the_dropout_of_an_encoder(packing):
    """Against the same passes in one graph: ordinary autograd, nothing computed twice."""
    model = make_model("bert", attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.3).train()
    packed, batch = use_packing(model, packing), triplets()
    cut = partial(budget_batches, batch_tokens=25, packed=packed)
    encode = partial(forward, model, contract(Pooling.MEAN), packed=packed)

    def in_one_graph(texts, seed):
        chunks = list(cut([len(text) for text in texts]))
        assert len(chunks) > 1 or texts is batch.rewritten_queries
        parts = []
        for number, chunk in enumerate(chunks):
            torch.manual_seed(row_seed(seed, number))
            parts.append(encode([texts[i] for i in chunk]))
        return torch.cat(parts)[torch.tensor([i for c in chunks for i in c]).argsort()]

    vectors = in_one_graph([*batch.queries, *batch.passages], SEED)
    rewritten = in_one_graph(batch.rewritten_queries, row_seed(SEED, "rewritten")).detach()
    expected = loss(vectors[:QUERIES], rewritten, vectors[QUERIES:]).loss
    learnt = [p for name, p in model.named_parameters() if "pooler" not in name]
    gradients = torch.autograd.grad(expected, learnt)
    output = contrastive_step(
        encode, batch, num_queries=QUERIES, global_loss=loss,
        parameters=list(model.parameters()), cut=cut, seed=SEED,
    )  # fmt: skip
    torch.testing.assert_close(output.loss.loss, expected.detach())
    for parameter, gradient in zip(learnt, gradients, strict=True):
        scale = max(gradient.abs().max().item(), 1e-3)
        assert (parameter.grad - gradient).abs().max().item() <= RELATIVE * scale


# ---- the two real small models ----------------------------------------------------------------

REAL = {"all-minilm-l6-v2": (Pooling.MEAN, None), "smollm2-135m-instruct": (Pooling.LAST, 3)}
WORDS = ["", "x", "why does a dictionary keep its order", "a set does not " * 30, "loop over keys"]


def weights_of(name):
    try:
        return resolve(name)
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", REAL)
def test_real_models_give_one_vector_packed_padded_or_alone(name):
    path, (pooling, layers) = weights_of(name), REAL[name]
    config = encoder_config(path, layers=layers)
    resolved = resolve_contract(path, config)
    assert resolved.pooling is pooling
    packed, padded = (
        Embedder(path, resolved, device="cpu", batch_tokens=100, packing=packing)
        for packing in ("on", "off")
    )
    vectors = packed.encode_documents(WORDS)
    np.testing.assert_allclose(vectors, padded.encode_documents(WORDS), atol=ATOL)
    alone = np.concatenate([packed.encode_documents([text]) for text in WORDS])
    np.testing.assert_allclose(vectors, alone, atol=ATOL)
    assert (vectors @ vectors.T)[~np.eye(len(WORDS), dtype=bool)].max() < 0.999
    long = packed.tokenise(["word " * 100], role=Role.DOCUMENT)[0]
    end = resolved.append_token_id
    assert len(long) == 48 and (end is None) == (pooling is Pooling.MEAN)
    assert end is None or (long[-1] == end and long.count(end) == 1)


def train_encoder(path, folder, **changes):
    values = {
        "encoder": encoder_config(path), "batch_queries": 2, "group_size": 2, "max_steps": 2,
        "learning_rate": 1e-3, "temperature": 0.05,
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.0},
    }  # fmt: skip
    losses = []
    result = train(
        TrainConfig.model_validate(values | changes), samples(), weights=path, output_dir=folder,
        runtime=TrainRuntime(threads=1, chunk_tokens=60),
        report=lambda metrics, _: losses.append(metrics["loss"]),
    )  # fmt: skip
    assert result.contract.pooling is Pooling.MEAN and np.isfinite(losses).all()
    return losses


def test_a_bidirectional_encoder_is_trained_with_its_own_dropout(tmp_path):
    path = weights_of("all-minilm-l6-v2")
    first, again = (train_encoder(path, tmp_path / name) for name in ("first", "again"))
    assert first == again and len(first) == 2
    other = train_encoder(path, tmp_path / "other", seed=43, max_steps=1)
    assert other[0] != first[0]


def test_all_weights_of_an_encoder_are_trained(tmp_path):
    train_encoder(weights_of("all-minilm-l6-v2"), tmp_path, lora=None, max_steps=1)
