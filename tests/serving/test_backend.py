from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from reasonembed.config import ServeConfig
from reasonembed.embedder.contract import (
    CONTRACT_FILE,
    Attention,
    Pooling,
    TokenisationContract,
    read_contract,
    resolve_contract,
)
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.golden import GOLDEN_FILE, write_golden
from reasonembed.errors import ConfigError, ModelError
from reasonembed.models import resolve
from reasonembed.serving.backend import check_vllm_serves, open_model
from reasonembed.serving.bare import bare_tokenizer
from reasonembed.serving.protocol import EmbedItem, Prepared
from reasonembed.serving.target import GENERIC, find_target
from tests.embedder.families import contract
from tests.embedder.tiny import WORDS, encoder_config, save_checkpoint

# Another batch shape makes float32 sums in another order.
COSINE = 1 - 1e-6
LIMIT = 96
TEXTS = [WORDS[:n] for n in (3, 50, 51, 52, 120, 9, 1, 400, 30, 50)]


def make_export(folder: Path, *, matryoshka: tuple[int, ...] = (), **changes) -> Path:
    if not folder.exists():
        save_checkpoint(folder)
    config = encoder_config(folder, max_query_tokens=LIMIT, max_document_tokens=LIMIT, **changes)
    made = replace(resolve_contract(folder, config), matryoshka_dimensions=matryoshka)
    (folder / CONTRACT_FILE).write_text(json.dumps(made.to_json()))
    embedder = Embedder(folder, made, device="cpu")
    write_golden(embedder, ["a set", "why {x}"], instruction="Find.", directory=folder)
    return folder


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("models") / "tiny", matryoshka=(8, 16))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def copy(export, tmp_path):
    return Path(shutil.copytree(export, tmp_path / "tiny"))


@pytest.fixture(scope="module")
def opened(export):
    return open_model(config(export))


def config(model, **changes) -> ServeConfig:
    return ServeConfig.model_validate({"model": str(model)} | changes)


def cosines(one, other):
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    return (one * other).sum(axis=1) / norms


# ---- what is said of a model ------------------------------------------------------------------


def test_an_export_is_described(opened, export):
    contract = TokenisationContract.from_json(json.loads((export / CONTRACT_FILE).read_text()))
    served = opened.served
    assert (served.name, served.dimension, served.dimensions) == ("tiny", 32, (8, 16))
    assert (served.max_query_tokens, served.max_document_tokens) == (LIMIT, LIMIT)
    assert served.fingerprint == contract.fingerprint()
    assert served.fingerprint == replace(contract, matryoshka_dimensions=()).fingerprint()
    assert served.default_instruction == GENERIC
    assert served.is_checked and served.vocabulary_size == 357
    assert served == open_model(config(export), forwards=False).served


def test_the_configuration_names_it_and_adds_lengths(export):
    served = open_model(
        config(export, name="mine", aliases=["m"], instruction="Look.", dimensions=[24, 8]),
        forwards=False,
    ).served
    assert (served.name, served.aliases) == ("mine", ("m",))
    assert (served.default_instruction, served.dimensions) == ("Look.", (8, 16, 24))
    with pytest.raises(ConfigError, match=r"dimensions \[32, 64\]: vectors of .* have 32 numbers"):
        open_model(config(export, dimensions=[8, 32, 64]), forwards=False)


def test_an_export_of_an_earlier_version_was_trained_for_no_shorter_length(copy):
    data = json.loads((copy / CONTRACT_FILE).read_text())
    del data["matryoshka_dimensions"]
    (copy / CONTRACT_FILE).write_text(json.dumps(data))
    assert open_model(config(copy)).served.dimensions == ()


def test_a_model_without_contract_takes_the_configured_one(checkpoint):
    encoder = {"model": str(checkpoint), "query_template": "{query}", "max_query_tokens": 40}
    served = open_model(config(checkpoint, encoder=encoder), forwards=False).served
    assert (served.max_query_tokens, served.default_instruction) == (40, "")
    assert not served.takes_instruction
    assert served.name == checkpoint.name and not served.is_checked
    default = open_model(config(checkpoint), forwards=False).served
    assert (default.max_query_tokens, default.default_instruction) == (512, GENERIC)
    without = open_model(config(checkpoint, instruction=""), forwards=False).served
    assert (without.default_instruction, without.takes_instruction) == ("", True)
    with pytest.raises(ConfigError, match=r"instruction: the query template .* takes none"):
        open_model(config(checkpoint, encoder=encoder, instruction="Find."), forwards=False)
    with pytest.raises(ConfigError, match="name the same one in both"):
        open_model(config(checkpoint, encoder=encoder | {"model": "other"}), forwards=False)


def test_systems_of_the_catalogue_and_files(checkpoint, tmp_path):
    weights_of("all-minilm-l6-v2")
    target = find_target(config("all-minilm-l6-v2"))
    assert (target.name, target.instruction) == ("all-minilm-l6-v2", "")
    assert target.contract.max_query_tokens == 256
    assert find_target(config("hybrid-minilm-bm25")).contract == target.contract
    with pytest.raises(ConfigError, match="system bm25 has 0 encoders"):
        find_target(config("bm25"))
    file = tmp_path / "mine.yaml"
    encoder = f"{{kind: dense, encoder: {{model: {checkpoint}}}}}"
    for style, sentence in {"instruct": GENERIC, "represent": "Represent this"}.items():
        file.write_text(f"name: mine\nretrieve: {encoder}\ninstruction: {style}\n")
        found = find_target(config(file))
        assert found.name == "mine" and found.instruction.startswith(sentence)


def test_a_run_brings_its_export_name_and_instruction(export, tmp_path):
    import yaml

    encoder = {"model": "none"}
    llm = {"llm": {"model": "none", "engine": "scripted"}}
    settings = {
        "run_dir": "elsewhere", "corpus": {"source": "python-stdlib"},
        "mine": {"encoder": encoder}, "train": {"encoder": encoder},
        "generate": llm, "annotate": llm, "rewrite": llm,
        "evaluate": {"instruction": "Find what explains it."},
    }  # fmt: skip
    run = tmp_path / "my-run"
    run.mkdir()
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ModelError, match=r"no exported model yet; .*--to export"):
        open_model(config(run))
    shutil.copytree(export, run / "export" / "model")
    served = open_model(config(run), forwards=False).served
    assert (served.name, served.default_instruction) == ("my-run", "Find what explains it.")
    with pytest.raises(ConfigError, match="brings the contract"):
        open_model(config(run, encoder=encoder))


# ---- what is refused --------------------------------------------------------------------------


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"neither a run .* nor an exported model .* checkpoint"):
        open_model(config(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("token_ids", [1, 2], "token ids"), ("vector", [1.0] + [0.0] * 31, "has cosine"),
     ("vector", [1.0], "1")],
)  # fmt: skip
def test_an_export_that_is_not_what_it_was_is_refused(copy, key, value, message):
    rows = json.loads((copy / GOLDEN_FILE).read_text())
    rows[-1][key] = value
    (copy / GOLDEN_FILE).write_text(json.dumps(rows))
    with pytest.raises(ModelError, match=message):
        open_model(config(copy))
    if key == "token_ids":  # without weights as well
        with pytest.raises(ModelError, match=message):
            open_model(config(copy), forwards=False)


def test_an_export_without_golden_vectors_is_refused(copy):
    (copy / GOLDEN_FILE).unlink()
    with pytest.raises(ModelError, match="export the model again"):
        open_model(config(copy))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"dtype": "int8"}, "dtype 'int8' is none of float32"),
     ({"dimension": 64}, "dimension 64, but the weights beside it give 32"),
     ({"pooling": "max"}, "'max' is not a valid Pooling")],
)  # fmt: skip
def test_a_contract_of_other_weights_is_refused(copy, changes, message):
    data = json.loads((copy / CONTRACT_FILE).read_text()) | changes
    (copy / CONTRACT_FILE).write_text(json.dumps(data))
    with pytest.raises(ModelError, match=message):
        open_model(config(copy), forwards=False)


# ---- vectors ----------------------------------------------------------------------------------


def prepared(opened, *items):
    found = opened.preparer.prepare(list(items))
    assert all(isinstance(one, Prepared) for one in found)
    return found


def test_vectors_are_the_embedders(opened, export):
    embedder = Embedder.load_export(export, device="cpu")
    items = [EmbedItem("why", "query"), EmbedItem("a set"), EmbedItem("why", "query", "Find.")]
    vectors = opened.forward(prepared(opened, *items))
    assert vectors.dtype == np.float32 and vectors.flags.c_contiguous
    expected = np.concatenate(
        [
            embedder.encode_queries(["why"], instruction=GENERIC),
            embedder.encode_documents(["a set"]),
            embedder.encode_queries(["why"], instruction="Find."),
        ]
    )
    assert cosines(vectors, expected).min() >= COSINE
    assert cosines(vectors[:1], vectors[2:])[0] < 0.999


def assert_invariant(opened, inputs):
    """Alone, in any batch, in any order."""
    alone = np.concatenate([opened.forward([one]) for one in inputs])
    rng = np.random.default_rng(0)
    for _ in range(3):
        order = rng.permutation(len(inputs))
        mixed = opened.forward([inputs[i] for i in order])
        assert cosines(mixed, alone[order]).min() >= COSINE
    distinct = {one.ids: row for row, one in enumerate(inputs)}
    rows = alone[list(distinct.values())]
    assert (np.triu(rows @ rows.T, 1) < 1 - 1e-3).all()  # so that the above can fail


def test_a_vector_does_not_depend_on_its_batch(opened):
    documents = [EmbedItem(text) for text in TEXTS]
    queries = [EmbedItem(text, "query") for text in TEXTS]
    assert_invariant(opened, prepared(opened, *documents, *queries))


def test_nor_where_the_template_stays_out_of_the_mean(tmp_path):
    encoder = {
        "model": str(save_checkpoint(tmp_path / "mean")), "pooling": "mean", "pool_template": False,
        "document_template": "passage: {document}", "dtype": "float32",
    }  # fmt: skip
    opened = open_model(config(tmp_path / "mean", encoder=encoder))
    inputs = prepared(
        opened, *(EmbedItem(t) for t in TEXTS), *(EmbedItem(t, "query") for t in TEXTS)
    )
    assert len({one.skip for one in inputs}) == 2
    assert_invariant(opened, inputs)
    embedder = Embedder.load(encoder_config(tmp_path / "mean", **encoder), device="cpu")
    whole = [text for text in TEXTS if len(embedder.tokenise([text], role="document")[0]) < 48]
    vectors = opened.forward(prepared(opened, *(EmbedItem(text) for text in whole)))
    assert cosines(vectors, embedder.encode_documents(whole)).min() >= COSINE


def test_opened_to_tokenise_loads_no_weights(export, monkeypatch):
    from transformers import AutoModel

    def refuse(*_, **__):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(AutoModel, "from_pretrained", refuse)
    opened = open_model(config(export), forwards=False)
    assert opened.forward is None
    assert prepared(opened, EmbedItem("why", "query"))
    with pytest.raises(AssertionError, match="weights were loaded"):
        open_model(config(export))


def test_an_ingress_loads_nothing_heavy(export):
    code = (
        "import sys\n"
        "from reasonembed.config import ServeConfig\n"
        "from reasonembed.serving.backend import open_model\n"
        "open_model(ServeConfig(model=sys.argv[1]), forwards=False)\n"
        "print({'torch', 'transformers', 'vllm', 'ray', 'faiss'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, str(export)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("kind", [{}, {"with_bos": True}, {"appends": True}])
def test_without_transformers_inputs_become_the_same(tmp_path, kind):
    made = make_export(save_checkpoint(tmp_path / "tiny", **kind))
    items = [
        EmbedItem(text, role, truncate=truncate)
        for text in [*TEXTS, "a 汉字 🤷🏽\u200d♀️ " * 40]
        for role in ("query", "document")
        for truncate in ("end", "start")
    ]
    items += [EmbedItem((0, 9, 40, 333)), EmbedItem("<|im_end|> a <s>")]
    whole, bare = (
        open_model(config(made), forwards=forwards).preparer for forwards in (True, False)
    )
    assert whole.prepare(items) == bare.prepare(items)
    assert whole.detokenise(range(300)) == bare.detokenise(range(300))
    assert whole.tokenise("a <s> 汉") == bare.tokenise("a <s> 汉")


def test_where_transformers_does_more_it_is_used(copy):
    file = copy / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    contract = read_contract(copy)
    assert bare_tokenizer(copy, contract) is not None
    file.write_text(json.dumps(settings | {"clean_up_tokenization_spaces": True}))
    assert bare_tokenizer(copy, contract) is None
    assert prepared(open_model(config(copy), forwards=False), EmbedItem("why"))


# ---- lanes and warming up ---------------------------------------------------------------------


def test_a_lane_has_its_own_threads_of_the_maths_library(export):
    import torch

    before = torch.get_num_threads()
    try:
        opened = open_model(
            config(export, embedder={"threads": 4}, batching={"lanes": 2, "batch_tokens": 99})
        )
        assert (opened.lanes, opened.batch_tokens) == (2, 99)
        inputs = prepared(opened, *(EmbedItem(text) for text in TEXTS))
        expected = opened.forward(inputs)
        meet = threading.Barrier(2)

        def lane(_):
            meet.wait()
            return opened.forward(inputs), torch.get_num_threads()

        with ThreadPoolExecutor(2) as pool:
            for vectors, threads in pool.map(lane, range(2)):
                assert threads == 2
                assert cosines(vectors, expected).min() >= COSINE
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("changes", "lanes"),
    [({}, "cores"), ({"embedder": {"threads": 3}}, 3), ({"batching": {"lanes": 5}}, 5)],
)
def test_a_core_is_a_lane_unless_configured(export, changes, lanes):
    import torch

    before = torch.get_num_threads()
    opened = open_model(config(export, **changes))
    assert opened.lanes == (before if lanes == "cores" else lanes)
    assert opened.batch_tokens == 2_048
    assert torch.get_num_threads() == before


def test_warming_up_embeds_a_longest_text(opened):
    lengths = []

    def forward(batch):
        lengths.extend(len(one.ids) for one in batch)
        return opened.forward(batch)

    assert replace(opened, forward=forward).warm_up() > 0
    assert lengths[0] < 10 and lengths[1:] == [LIMIT]


def test_warming_up_refuses_vectors_that_are_none(opened):
    broken = replace(opened, forward=lambda batch: np.full((len(batch), 32), np.nan, np.float32))
    with pytest.raises(ModelError, match="0 of them finite"):
        broken.warm_up()


def test_echo(echo_config, echo_model):
    assert echo_model.served.name == "echo"
    assert (echo_model.served.dimension, echo_model.served.max_query_tokens) == (32, 64)
    assert echo_model.served.vocabulary_size > 1_000
    assert (echo_model.lanes, echo_model.batch_tokens) == (1, 2_048)
    assert 0 <= echo_model.warm_up() < 1
    front = open_model(echo_config, forwards=False)
    assert front.forward is None and front.served == echo_model.served
    inputs = front.preparer.prepare([EmbedItem("a b"), EmbedItem("a b", "query")])
    assert echo_model.forward(inputs).shape == (2, 32)


# ---- other programs ---------------------------------------------------------------------------


def weights_of(name):
    try:
        return resolve(name)
    except ModelError as error:
        pytest.skip(str(error))


def test_vectors_are_those_of_sentence_transformers():
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(weights_of("all-minilm-l6-v2")), device="cpu")
    opened = open_model(config("all-minilm-l6-v2"))
    texts = [*TEXTS, "汉字 and 🤷🏽\u200d♀️", "word " * 300]
    assert reference.max_seq_length == opened.served.max_document_tokens == 256
    expected = reference.encode(texts, normalize_embeddings=True)
    for role in ("document", "query"):
        items = [EmbedItem(text, role, truncate="end") for text in texts]
        vectors = opened.forward(opened.preparer.prepare(items))
        assert cosines(vectors, expected).min() >= COSINE


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pooling": Pooling.MEAN}, "its pooling is mean, not last"),
        ({"attention": Attention.BIDIRECTIONAL}, "its attention is bidirectional"),
        ({"layers": 1}, "it uses its first 1 layers only"),
        ({"normalise": False}, "its vectors are not normalised"),
    ],
)
def test_what_vllm_cannot_serve_is_refused_before_it_starts(changes, reason):
    fine = contract(Pooling.LAST)
    check_vllm_serves(fine, where="tiny", is_export=True)
    with pytest.raises(ModelError, match=f"tiny cannot be served by vLLM: {reason}.*torch$"):
        check_vllm_serves(replace(fine, **changes), where="tiny", is_export=True)
    with pytest.raises(ModelError, match="no golden vectors"):
        check_vllm_serves(fine, where="tiny", is_export=False)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_vllm_gives_the_golden_vectors_or_is_refused(tmp_path):
    """In a process of its own: vLLM changes settings of torch for good."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    base = save_checkpoint(tmp_path / "tiny")
    wide = Qwen3Config.from_pretrained(base, head_dim=32)  # vLLM has no CPU kernel for 8
    Qwen3ForCausalLM(wide).save_pretrained(base)
    export = make_export(base)
    copy = Path(shutil.copytree(export, tmp_path / "damaged"))
    opened = open_model(config(export))
    inputs = prepared(opened, *(EmbedItem(text) for text in TEXTS), EmbedItem("why", "query"))
    longest = prepared(opened, EmbedItem("q " * 99, truncate="end"))
    np.savez(copy / "expected.npz", vectors=opened.forward([*inputs, *longest]))
    (copy / "ids.json").write_text(json.dumps([one.ids for one in [*inputs, *longest]]))
    rows = json.loads((copy / GOLDEN_FILE).read_text())
    rows[0]["vector"] = rows[0]["vector"][::-1]
    (copy / GOLDEN_FILE).write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, "-c", VLLM, str(export), str(copy)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stdout.splitlines()[-1] == "refused"


VLLM = """
import json, sys
from pathlib import Path
import numpy as np
from reasonembed.config import ServeConfig
from reasonembed.errors import ModelError
from reasonembed.serving.backend import open_model
from reasonembed.serving.protocol import Prepared

export, damaged = sys.argv[1:]
settings = {"embedder": {"backend": "vllm"}, "engine": {"kv_cache_gib": 1}}
opened = open_model(ServeConfig.model_validate({"model": export} | settings))
assert opened.lanes == 1 and opened.warm_up() > 0
ids = json.loads(Path(damaged, "ids.json").read_text())
found = opened.forward([Prepared(tuple(one)) for one in ids])
expected = np.load(Path(damaged, "expected.npz"))["vectors"]
assert (found * expected).sum(axis=1).min() > 0.99999, (found * expected).sum(axis=1)
try:
    open_model(ServeConfig.model_validate({"model": damaged} | settings))
except ModelError as error:
    assert "has cosine" in str(error), error
    print("refused")
"""
