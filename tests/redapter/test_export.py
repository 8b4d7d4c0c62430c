import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from reasonembed.config import SampleSource, TrainConfig, TrainRuntime
from reasonembed.embedder import Attention, Embedder, Role, resolve_contract
from reasonembed.embedder.contract import load_tokenizer, read_contract
from reasonembed.embedder.encode import load_backbone
from reasonembed.embedder.tokenisation import ContractTokenizer
from reasonembed.errors import ConfigError, ModelError
from reasonembed.models import resolve
from reasonembed.redapter import export as export_module
from reasonembed.redapter.batches import samples_from_rows
from reasonembed.redapter.export import export
from reasonembed.redapter.loop import train
from reasonembed.remixer.formats import read_source
from reasonembed.tasks import TASKS
from tests.embedder.tiny import WORDS, encoder_config, save_checkpoint, save_tokenizer
from tests.redapter.samples import samples

TEXTS = ["a dictionary keeps order", WORDS * 3, "why {x}"]
INSTRUCTION = "find {what} helps"


def trained(folder, output, *, rows=None, encoder=None, **changes):
    return train(
        TrainConfig.model_validate(
            {
                "encoder": encoder_config(folder, **encoder or {}),
                "batch_queries": 4,
                "group_size": 2,
                "max_steps": 3,
                "learning_rate": 1e-2,
                "lora": {"rank": 4, "alpha": 8},
            }
            | changes
        ),
        rows or samples(),
        weights=folder,
        runtime=TrainRuntime(threads=1),
        output_dir=output,
        report=lambda *_: None,
    )


def exported(folder, result, output, **changes):
    values = {"instruction": INSTRUCTION, "golden_texts": TEXTS} | changes
    contract = values.pop("contract", result.contract)
    return export(folder, result.weights_dir, contract, output_dir=output, **values)


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    result = trained(checkpoint, folder / "train")
    exported(checkpoint, result, folder / "model")
    return folder / "model", result


@pytest.mark.parametrize("kind", ["plain", "with_bos", "appends"])
def test_plain_sentence_transformers_gives_the_same_ids_and_vectors(tmp_path, kind):
    from sentence_transformers import SentenceTransformer

    checkpoint = save_checkpoint(
        tmp_path / "base", with_bos=kind == "with_bos", appends=kind == "appends"
    )
    result = trained(checkpoint, tmp_path / "train")
    exported(checkpoint, result, tmp_path / "model")
    ours = Embedder.load_export(tmp_path / "model", device="cpu")
    as_trained = ContractTokenizer(load_tokenizer(checkpoint), result.contract)
    for role in Role:
        expected = as_trained.tokenise(TEXTS, role=role)
        assert ours.tokenise(TEXTS, role=role) == expected
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")

    tokenizer = theirs.tokenizer
    for text, ids in zip(TEXTS, ours.tokenise(TEXTS, role=Role.DOCUMENT), strict=True):
        their_ids = tokenizer(text, truncation=True, max_length=theirs.max_seq_length)["input_ids"]
        assert tuple(their_ids) == ids
    queries = theirs.encode(TEXTS, prompt_name="query")
    documents = theirs.encode(TEXTS)
    pairs = [
        (queries, ours.encode_queries(TEXTS, instruction=INSTRUCTION)),
        (documents, ours.encode_documents(TEXTS)),
    ]
    for their_vectors, our_vectors in pairs:
        np.testing.assert_allclose(np.linalg.norm(their_vectors, axis=1), 1, atol=1e-5)
        assert np.sum(their_vectors * our_vectors, axis=1).min() >= 0.9999
    assert np.sum(queries * documents, axis=1).max() < 0.9999  # the prompt matters


def test_the_export_is_read_with_its_own_contract(run, checkpoint):
    folder, result = run
    embedder = Embedder.load_export(folder, device="cpu")
    assert embedder.contract.append_token_id == result.contract.append_token_id
    assert embedder.contract.weights != result.contract.weights
    (ids,) = embedder.tokenise([WORDS * 3], role=Role.DOCUMENT)
    assert len(ids) == 48 and ids.count(0) == 1 and ids[-1] == 0
    # The ordinary way in, from configuration, comes to the same contract but for the name.
    again = resolve_contract(folder, encoder_config(folder))
    assert again.fingerprint() == embedder.contract.fingerprint()
    base = Embedder.load(encoder_config(checkpoint), device="cpu")
    cosine = np.sum(base.encode_documents(TEXTS) * embedder.encode_documents(TEXTS), axis=1)
    assert cosine.max() < 0.9999


def test_damaged_weights_are_noticed_at_load(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: -tensors[name]}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="weights are not the exported ones"):
        Embedder.load_export(folder, device="cpu")


def test_another_tokenizer_is_noticed_at_load(run, checkpoint, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / "copy")
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["merges"] = data["model"]["merges"][:20]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ModelError, match="tokenizer is not the exported one"):
        Embedder.load_export(folder, device="cpu")


def test_an_untrained_adapter_is_refused(run, checkpoint, tmp_path):
    source = shutil.copytree(run[1].weights_dir, tmp_path / "adapter")
    file = source / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=r"training had no effect: .* by more than 0\.0e\+00"):
        export(
            checkpoint, source, run[1].contract, output_dir=tmp_path / "out",
            instruction="", golden_texts=TEXTS,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_export_is_left_alone(run, checkpoint, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConfigError, match="no earlier export"):
        exported(checkpoint, run[1], tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_an_earlier_export_is_replaced(run, checkpoint, tmp_path):
    target = shutil.copytree(run[0], tmp_path / "model")
    (target / "stale.txt").write_text("old")
    exported(checkpoint, run[1], target, golden_texts=["one"])
    assert not (target / "stale.txt").exists()
    assert len(json.loads((target / "golden.json").read_text())) == 2


def test_what_sentence_transformers_cannot_express_is_refused(run, checkpoint, tmp_path):
    config = encoder_config(checkpoint, query_template="{query} ({instruction})")
    contract = resolve_contract(checkpoint, config)
    with pytest.raises(ConfigError, match=r"must end in \{query\}"):
        exported(checkpoint, run[1], tmp_path / "out", contract=contract)
    with pytest.raises(ConfigError, match="golden_texts"):
        exported(checkpoint, run[1], tmp_path / "out", golden_texts=[])


def test_export_of_the_first_layers_holds_those_alone(checkpoint, tmp_path):
    config = encoder_config(checkpoint, layers=1)
    result = trained(checkpoint, tmp_path / "train", encoder={"layers": 1})
    exported(checkpoint, result, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 1
    again = resolve_contract(tmp_path / "model", config.model_copy(update={"model": "x"}))
    assert again.layers is None
    assert Embedder.load_export(tmp_path / "model").encode_documents(TEXTS).shape == (3, 32)
    with pytest.raises(ConfigError, match="layers 3 is more than the 2"):
        resolve_contract(checkpoint, encoder_config(checkpoint, layers=3))


# ---- what was trained -----------------------------------------------------------------------


def test_all_weights_are_exported_as_they_were_trained(checkpoint, tmp_path):
    result = trained(checkpoint, tmp_path / "train", lora=None, learning_rate=1e-3)
    made = exported(checkpoint, result, tmp_path / "model")
    assert made.cosine_to_trained == pytest.approx(1, abs=1e-6)
    assert made.cosine_to_backbone < 0.999
    learnt, found = (
        load_file(folder / "model.safetensors")
        for folder in (result.weights_dir, tmp_path / "model")
    )
    assert learnt.keys() == found.keys()
    assert all(torch.equal(learnt[name], found[name]) for name in learnt)
    Embedder.load_export(tmp_path / "model", device="cpu")


def test_weights_that_did_not_move_or_are_of_another_model_are_refused(checkpoint, run, tmp_path):
    from transformers import AutoModel

    AutoModel.from_pretrained(checkpoint).save_pretrained(tmp_path / "same")
    one_layer = load_backbone(checkpoint, dtype="float32", layers=1).model
    one_layer.save_pretrained(tmp_path / "less")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("same", "training had no effect"),
        ("less", "is of another model: .*Missing key"),
        ("empty", r"neither adapter_model\.safetensors nor model\.safetensors"),
    ):
        with pytest.raises(ModelError, match=f"(?s){message}"):
            export(
                checkpoint, tmp_path / name, run[1].contract, output_dir=tmp_path / "out",
                instruction="", golden_texts=TEXTS,
            )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_adapters_of_16_bits_are_merged_in_32(run, checkpoint, tmp_path):
    source = shutil.copytree(run[1].weights_dir, tmp_path / "adapter")
    file = source / "adapter_model.safetensors"
    adapters = {name: value.bfloat16() for name, value in load_file(file).items()}
    save_file(adapters, file)
    export(
        checkpoint, source, run[1].contract, output_dir=tmp_path / "model",
        instruction="", golden_texts=TEXTS,
    )  # fmt: skip
    merged, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "model", checkpoint)
    )
    (down,) = (n for n in adapters if "layers.0" in n and "down_proj.lora_A" in n)
    name = "layers.0.mlp.down_proj.weight"
    update = adapters[down.replace("_A.", "_B.")].double() @ adapters[down].double()
    expected = base[f"model.{name}"].double() + 8 / 4 * update
    # A product in bfloat16 would be off by 1e-3 of the update, float32 by 1e-7.
    assert (merged[name].double() - expected).abs().max() < 1e-6 * expected.abs().max()


def test_a_model_of_16_bits_keeps_its_type_and_nearly_its_vectors(checkpoint, tmp_path):
    encoder = {"dtype": "bfloat16"}
    result = trained(checkpoint, tmp_path / "train", encoder=encoder)
    made = exported(checkpoint, result, tmp_path / "model")
    assert 0.995 < made.cosine_to_trained < 0.999999
    assert (
        load_file(tmp_path / "model" / "model.safetensors")["norm.weight"].dtype is torch.bfloat16
    )


def test_a_merge_that_goes_wrong_is_noticed_with_its_figure(run, checkpoint, tmp_path, monkeypatch):
    load = export_module._adapted

    def broken(*arguments):
        adapted = load(*arguments)
        merge = adapted.merge_and_unload

        def merge_wrongly():
            model = merge()
            model.layers[0].mlp.down_proj.weight.data *= -1
            return model

        adapted.merge_and_unload = merge_wrongly
        return adapted

    monkeypatch.setattr(export_module, "_adapted", broken)
    with pytest.raises(ModelError, match=r"merged weights and trained model .*cosine -?0\."):
        exported(checkpoint, run[1], tmp_path / "out")


def test_sentence_transformers_follows_attention_and_document_template(checkpoint, tmp_path):
    from sentence_transformers import SentenceTransformer

    encoder = {"attention": "bidirectional", "document_template": "passage {it}: {document}"}
    result = trained(checkpoint, tmp_path / "train", encoder=encoder, max_steps=1)
    assert result.contract.attention is Attention.BIDIRECTIONAL
    exported(checkpoint, result, tmp_path / "model")
    ours = Embedder.load_export(tmp_path / "model", device="cpu")
    theirs = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    for found, name in (
        (ours.encode_documents(TEXTS), "document"),
        (ours.encode_queries(TEXTS, instruction=INSTRUCTION), "query"),
    ):
        # Batches of another shape, so float32 sums in another order.
        np.testing.assert_allclose(theirs.encode(TEXTS, prompt_name=name), found, atol=1e-5)
    # `auto` finds what the exported configuration says.
    again = encoder_config(tmp_path / "model", document_template="passage {it}: {document}")
    assert resolve_contract(tmp_path / "model", again).attention is Attention.BIDIRECTIONAL


def test_what_training_and_other_programs_cannot_express_is_refused_by_name(
    run, checkpoint, tmp_path
):
    encoder = {"pooling": "mean", "pool_template": False}
    with pytest.raises(ConfigError, match=r"train\.encoder\.pool_template false"):
        trained(checkpoint, tmp_path / "train", encoder=encoder)
    for change, message in (
        ({"pool_template": False}, r"encoder\.pool_template false"),
        ({"document_template": "{document}."}, r"document_template '\{document\}\.' must end in"),
    ):
        contract = replace(run[1].contract, **change)
        with pytest.raises(ConfigError, match=message):
            exported(checkpoint, run[1], tmp_path / "out", contract=contract)


# ---- the MS MARCO start ---------------------------------------------------------------------


def msmarco_samples(folder):
    """Samples of the published hard-negative form."""
    folder.mkdir()
    lines = [
        {"qid": q, "pos": [q], "neg": {"bm25": [(q + i) % 12 for i in range(5)]}} for q in range(12)
    ]
    texts = {
        "collection.tsv": [f"{i}\tkey {i} keeps the order of loop {i}" for i in range(12)],
        "queries.train.tsv": [f"{i}\twhy key {i} follows" for i in range(12)],
        "msmarco-hard-negatives.jsonl": [json.dumps(line) for line in lines],
    }
    for name, rows in texts.items():
        (folder / name).write_text("\n".join(rows))
    source = SampleSource(path=str(folder), form="msmarco-hard-negatives", max_negatives=3)
    placed = read_source(source, tasks=TASKS, held_out_share=0.0)
    return samples_from_rows(one.row for one in placed)


def test_the_main_stage_begins_where_the_ms_marco_stage_has_ended(checkpoint, tmp_path):
    rows = msmarco_samples(tmp_path / "data")
    first = trained(checkpoint, tmp_path / "first", rows=rows)
    exported(checkpoint, first, tmp_path / "start")
    name = str(tmp_path / "start")
    assert resolve(name) == tmp_path / "start"
    second = trained(tmp_path / "start", tmp_path / "second", max_steps=1, learning_rate=1e-6)
    assert second.contract.append_token_id == first.contract.append_token_id
    exported(tmp_path / "start", second, tmp_path / "model")
    start, end, base = (
        embedder.encode_queries(TEXTS, instruction=INSTRUCTION)
        for embedder in (
            Embedder.load_export(tmp_path / "start", device="cpu"),
            Embedder.load_export(tmp_path / "model", device="cpu"),
            Embedder.load(encoder_config(checkpoint), device="cpu"),
        )
    )
    assert np.sum(start * end, axis=1).min() > 0.999  # one tiny step away
    assert np.sum(start * base, axis=1).max() < 0.999


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooling": "mean"}, r"pooling <Pooling\.MEAN.*trained with <Pooling\.LAST"),
        ({"query_template": "Q: {query}"}, r"query_template 'Q: \{query\}' \(trained with 'Instr"),
        ({"append_token": "<|im_end|>"}, r"append_token_id 1 \(trained with 0\)"),
        ({"attention": "bidirectional"}, r"attention <Attention\.BIDI.*with <Attention\.CAUSAL"),
        ({"document_template": "d: {document}"}, r"document_template 'd: \{document\}' \(trained"),
    ],
)
def test_an_export_is_not_trained_on_under_another_contract(run, change, message):
    with pytest.raises(ConfigError, match=f"was trained under another contract: .*{message}"):
        trained(run[0], run[0] / "never", encoder=change)


# ---- other programs -------------------------------------------------------------------------


@pytest.mark.slow
def test_vllm_serves_it_with_the_same_vectors(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"))
    vllm = pytest.importorskip("vllm")
    # Heads as wide as vLLM's kernels know them.
    save_tokenizer(tmp_path / "base")
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    config = Qwen3Config(vocab_size=400, initializer_range=0.1, **size, **heads)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    exported(tmp_path / "base", trained(tmp_path / "base", tmp_path / "t"), tmp_path / "model")
    ours = Embedder.load_export(tmp_path / "model", device="cpu")
    engine = vllm.LLM(
        str(tmp_path / "model"), runner="pooling", dtype="float32", enforce_eager=True,
        max_model_len=48, max_num_seqs=4,
    )  # fmt: skip
    ids = ours.tokenise([*TEXTS[:1], TEXTS[2]], role=Role.DOCUMENT)
    found = engine.embed([TEXTS[0], TEXTS[2]], use_tqdm=False)
    assert [tuple(one.prompt_token_ids) for one in found] == ids
    theirs = np.array([one.outputs.embedding for one in found])
    assert np.sum(theirs * ours.encode_ids(ids), axis=1).min() >= 0.999


def test_an_export_says_which_shorter_lengths_it_was_trained_for(checkpoint, tmp_path):
    result = trained(checkpoint, tmp_path / "train", matryoshka_dimensions=[8, 16])
    exported(checkpoint, result, tmp_path / "model")
    assert read_contract(tmp_path / "model").matryoshka_dimensions == (8, 16)
    again = resolve_contract(tmp_path / "model", encoder_config(tmp_path / "model"))
    assert again.matryoshka_dimensions == (8, 16)
