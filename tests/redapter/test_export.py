import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reasonembed.config import TrainConfig, TrainRuntime
from reasonembed.embedder import Embedder, Role, resolve_contract
from reasonembed.errors import ConfigError, ModelError
from reasonembed.redapter.export import export
from reasonembed.redapter.loop import train
from tests.embedder.tiny import WORDS, encoder_config, save_checkpoint
from tests.redapter.samples import samples

TEXTS = ["a dictionary keeps order", WORDS * 3, "why {x}"]
INSTRUCTION = "find {what} helps"


def trained(folder, output):
    return train(
        TrainConfig.model_validate(
            {
                "encoder": encoder_config(folder),
                "batch_queries": 4,
                "group_size": 2,
                "max_steps": 3,
                "learning_rate": 1e-2,
                "lora": {"rank": 4, "alpha": 8},
            }
        ),
        samples(),
        weights=folder,
        runtime=TrainRuntime(threads=1),
        output_dir=output,
        report=lambda *_: None,
    )


def exported(folder, result, output, **changes):
    values = {"instruction": INSTRUCTION, "golden_texts": TEXTS} | changes
    contract = values.pop("contract", result.contract)
    return export(folder, result.adapter_dir, contract, output_dir=output, **values)


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
    exported(checkpoint, trained(checkpoint, tmp_path / "train"), tmp_path / "model")
    ours = Embedder.load_export(tmp_path / "model", device="cpu")
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
    source = shutil.copytree(run[1].adapter_dir, tmp_path / "adapter")
    file = source / "adapter_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="changes nothing"):
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
    trained_on = TrainConfig.model_validate(
        {
            "encoder": config,
            "batch_queries": 4,
            "group_size": 2,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "lora": {"rank": 4, "alpha": 8},
        }
    )
    result = train(
        trained_on,
        samples(),
        weights=checkpoint,
        runtime=TrainRuntime(threads=1),
        output_dir=tmp_path / "train",
        report=lambda *_: None,
    )
    exported(checkpoint, result, tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["num_hidden_layers"] == 1
    again = resolve_contract(tmp_path / "model", config.model_copy(update={"model": "x"}))
    assert again.layers is None
    assert Embedder.load_export(tmp_path / "model").encode_documents(TEXTS).shape == (3, 32)
    with pytest.raises(ConfigError, match="layers 3 is more than the 2"):
        resolve_contract(checkpoint, encoder_config(checkpoint, layers=3))
