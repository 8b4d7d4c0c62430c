"""Systems of the catalogue: they load, and their texts and vectors are what their authors' are.

The weights cannot be had here: each system runs with random ones of its architecture, and a small
tokenizer that begins and ends texts as the real one does.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen3Config,
)

from reasonembed.config import DenseRetriever, HybridRetriever
from reasonembed.embedder import Attention, Embedder, Pooling, Role, resolve_contract
from reasonembed.errors import ConfigError
from reasonembed.models import PACKAGED
from reasonembed.systems.catalogue import load_system, system_names
from tests.embedder.tiny import save_tokenizer

ROOT = Path(__file__).parents[2]
SIZES = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.3,
}  # fmt: skip
LONG = {"num_key_value_heads": 2, "max_position_embeddings": 131_072}
ARCHITECTURES = {
    "qwen2": lambda: Qwen2Config(**SIZES, **LONG),
    "qwen3": lambda: Qwen3Config(**SIZES, **LONG, head_dim=8),
    "llama": lambda: LlamaConfig(**SIZES, **LONG),
    "bert": lambda: BertConfig(**SIZES, max_position_embeddings=512),
    "mpnet": lambda: MPNetConfig(**SIZES, max_position_embeddings=514),
}
_QWEN = {"special": ["<|endoftext|>", "<|im_end|>"], "begins": None, "ends": "<|im_end|>"}
_ENDED = _QWEN | {"ends": "<|endoftext|>", "appends": True}
_LLAMA = {
    "special": ["<|begin_of_text|>", "<|end_of_text|>"], "begins": "<|begin_of_text|>",
    "ends": "<|end_of_text|>", "with_bos": True,
}  # fmt: skip
_BERT = {"special": ["[CLS]", "[SEP]"], "begins": "[CLS]", "ends": "[SEP]"}
_MPNET = {"special": ["<s>", "<pad>", "</s>"], "begins": "<s>", "ends": "</s>"}
_WRAPS = {"with_bos": True, "appends": True}
TOKENIZERS = {
    "bare": _QWEN, "ended": _ENDED, "llama": _LLAMA, "bert": _BERT | _WRAPS,
    "mpnet": _MPNET | _WRAPS,
}  # fmt: skip

INSTRUCTIONS = {
    "none": "",
    "instruct": "Given a biology post, retrieve relevant passages that help answer the post",
    "represent": "Represent this biology post for searching relevant passages: ",
}
QUERY, DOCUMENT = "why {query}?", "because\n{document}"
_TASK = "Instruct: Given a biology post, retrieve relevant passages that help answer the post\n"
_LAST, _BOTH = (Pooling.LAST, Attention.CAUSAL), Attention.BIDIRECTIONAL
_REASONEMBED = (f"{_TASK}Query: why {{query}}?<|endoftext|>", "because\n{document}<|endoftext|>")
_MINILM = ("[CLS]why {query}?[SEP]", "[CLS]because\n{document}[SEP]")
# Architecture, tokenizer, pooling and attention; a query and a document as the model reads them.
GOLDEN = {
    "gte-qwen2-7b-instruct": (
        ("qwen2", "bare", Pooling.LAST, _BOTH),
        f"{_TASK}Query: why {{query}}?<|endoftext|>",
        "because\n{document}<|endoftext|>",
    ),
    "reasonir-8b": (
        ("llama", "llama", Pooling.MEAN, _BOTH),
        "<|begin_of_text|><|user|>\nGiven a biology post, retrieve relevant passages that help "
        "answer the post\n<|embed|>\nwhy {query}?",
        "<|begin_of_text|><|embed|>\nbecause\n{document}",
    ),
    "diver-retriever-4b": (
        ("qwen3", "ended", *_LAST),
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:why {query}?<|endoftext|>",
        "Represent this text:because\n{document}<|endoftext|>",
    ),
    **{
        f"qwen3-embedding-{size}": (
            ("qwen3", "ended", *_LAST),
            f"{_TASK}Query:why {{query}}?<|endoftext|>",
            "because\n{document}<|endoftext|>",
        )
        for size in ("0.6b", "4b", "8b")
    },
    **{f"reasonembed-qwen3-{s}": (("qwen3", "ended", *_LAST), *_REASONEMBED) for s in ("4b", "8b")},
    "reasonembed-llama-3.1-8b": (
        ("llama", "llama", *_LAST),
        f"<|begin_of_text|>{_TASK}Query: why {{query}}?<|end_of_text|>",
        "<|begin_of_text|>because\n{document}<|end_of_text|>",
    ),
    **{f"qwen3-{size}-ms": (("qwen3", "bare", *_LAST), *_REASONEMBED) for size in ("4b", "8b")},
    "llama-3.1-8b-ms": (
        ("llama", "llama", *_LAST),
        f"<|begin_of_text|>{_TASK}Query: why {{query}}?<|end_of_text|>",
        "<|begin_of_text|>because\n{document}<|end_of_text|>",
    ),
    "all-mpnet-base-v2": (
        ("mpnet", "mpnet", Pooling.MEAN, _BOTH),
        "<s>why {query}?</s>",
        "<s>because\n{document}</s>",
    ),
    "all-minilm-l6-v2": (("bert", "bert", Pooling.MEAN, _BOTH), *_MINILM),
    "bge-large-en-v1.5": (
        ("bert", "bert", Pooling.CLS, _BOTH),
        "[CLS]Represent this biology post for searching relevant passages: why {query}?[SEP]",
        "[CLS]because\n{document}[SEP]",
    ),
}
LIMITS = {
    "reasonir-8b": 32_768, "diver-retriever-4b": 16_384, "all-mpnet-base-v2": 384,
    "all-minilm-l6-v2": 256, "bge-large-en-v1.5": 512,
}  # fmt: skip


@pytest.mark.parametrize("name", system_names())
def test_every_system_loads_under_its_name_and_says_where_it_is_from(name):
    system = load_system(name)
    assert system.name == name and system.source
    asks = "{instruction}" in str(system.retrieve.model_dump())
    assert asks == (system.instruction != "none")


def test_every_system_of_the_papers_table_is_there():
    others = {
        "bm25", "bm25-query-side", "text-embedding-3-large", "hybrid-minilm-bm25",
        "hybrid-reasonembed-qwen3-8b", "reasonembed-qwen3-8b-rewritten",
        "reasonembed-qwen3-8b-reranked", "all-minilm-l6-v2-short",
    }  # fmt: skip
    assert set(system_names()) == set(GOLDEN) | others
    assert load_system("bm25").retrieve.variant == "standard"
    assert load_system("bm25-query-side").retrieve.variant == "query-side"
    endpoint = load_system("text-embedding-3-large").retrieve
    assert (endpoint.query_template, endpoint.dimension) == ("{query}", 3072)
    assert load_system("reasonembed-qwen3-8b-rewritten").rewrite is not None
    assert load_system("reasonembed-qwen3-8b-reranked").rerank.annotate.samples > 1


def test_a_system_that_is_built_on_another_uses_its_encoder():
    base = load_system("reasonembed-qwen3-8b").retrieve
    for kind in ("rewritten", "reranked"):
        assert load_system(f"reasonembed-qwen3-8b-{kind}").retrieve == base
    for name, inner in (
        ("hybrid-reasonembed-qwen3-8b", base),
        ("hybrid-minilm-bm25", load_system("all-minilm-l6-v2").retrieve),
    ):
        hybrid = load_system(name).retrieve
        assert isinstance(hybrid, HybridRetriever) and hybrid.parts["dense"] == inner


SMALL = {
    *("all-minilm-l6-v2", "all-mpnet-base-v2", "BAAI/bge-large-en-v1.5"),
    "Qwen/Qwen3-Embedding-0.6B",
}  # below a thousand million parameters


def encoders_of(value):
    """Every section of a YAML that names an encoder's weights."""
    if isinstance(value, dict):
        if "encoder" in value:
            yield value["encoder"]
        for inner in value.values():
            yield from encoders_of(inner)


@pytest.mark.parametrize(
    "file",
    [*ROOT.glob("reasonembed/systems/catalogue/*.yaml"), *ROOT.glob("configs/*.yaml")],
    ids=lambda file: file.stem,
)
def test_no_large_encoder_runs_in_float16(file):
    for encoder in encoders_of(yaml.safe_load(file.read_text(encoding="utf-8"))):
        assert encoder.get("dtype") != "float16"
        # The default, float32, would take twice the memory of a GPU.
        is_small = encoder["model"] in SMALL or encoder["model"] in PACKAGED
        assert is_small or encoder["dtype"] == "bfloat16"


def test_the_short_model_is_the_long_one_cut():
    short, long = (
        load_system(name).retrieve.encoder
        for name in ("all-minilm-l6-v2-short", "all-minilm-l6-v2")
    )
    limits = {"max_query_tokens": 128, "max_document_tokens": 64}
    assert short == long.model_copy(update=limits)


def test_systems_that_need_no_hub_name_packaged_weights():
    for name in ("all-mpnet-base-v2", "all-minilm-l6-v2"):
        assert load_system(name).retrieve.encoder.model in PACKAGED


def test_an_unknown_name_lists_those_that_exist():
    with pytest.raises(ConfigError, match=r"unknown system 'bm52'.*bm25, bm25-query-side"):
        load_system("bm52")


def test_a_system_of_the_users_own_is_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\nretrieve: {kind: bm25, b: 0.5}\n")
    assert load_system(file).retrieve.b == load_system(str(file)).retrieve.b == 0.5
    file.write_text("name: mine\nretrieve: {kind: bm25, B: 0.5}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml:\n  retrieve\.bm25\.B: unknown key"):
        load_system(file)
    with pytest.raises(ConfigError, match="no configuration file"):
        load_system(tmp_path / "other.yaml")


# ---- golden texts and vectors -----------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Makes a folder of an architecture and a tokenizer, once."""
    made = {}

    def make(architecture, tokenizer):
        if (architecture, tokenizer) not in made:
            folder = tmp_path_factory.mktemp(f"{architecture}-{tokenizer}")
            torch.manual_seed(0)
            AutoModel.from_config(ARCHITECTURES[architecture]()).save_pretrained(folder)
            save_tokenizer(folder, **TOKENIZERS[tokenizer])
            made[architecture, tokenizer] = folder
        return made[architecture, tokenizer]

    return make


@pytest.mark.parametrize("name", GOLDEN)
def test_texts_and_vectors_are_those_of_its_authors(name, checkpoints):
    (architecture, tokenizer, pooling, attention), query, document = GOLDEN[name]
    system = load_system(name)
    assert isinstance(system.retrieve, DenseRetriever)
    folder = checkpoints(architecture, tokenizer)
    config = system.retrieve.encoder.model_copy(update={"model": str(folder), "dtype": "float32"})
    contract = resolve_contract(folder, config)
    assert (contract.pooling, contract.attention) == (pooling, attention)
    limits = {contract.max_query_tokens, contract.max_document_tokens}
    assert limits == {LIMITS.get(name, 8_192)}
    ours, instruction = Embedder(folder, contract, device="cpu"), INSTRUCTIONS[system.instruction]
    found = {
        query: ours.encode_queries([QUERY], instruction=instruction)[0],
        document: ours.encode_documents([DOCUMENT])[0],
    }
    for role, text, expected, asked in (
        (Role.QUERY, QUERY, query, instruction),
        (Role.DOCUMENT, DOCUMENT, document, ""),
    ):
        (ids,) = ours.tokenise([text], role=role, instruction=asked)
        assert ours._tokenizer._tokenizer.decode(ids) == expected
        states = reference_states(folder, ids, attention)
        skip = 0
        if not contract.pool_template:
            prompt = expected.removesuffix(text)
            skip = len(ours._tokenizer._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        vector = {
            Pooling.LAST: states[-1], Pooling.CLS: states[0], Pooling.MEAN: states[skip:].mean(0),
        }[pooling]  # fmt: skip
        vector = vector / vector.norm()
        # Kernels of attention sum in another order than the plain products do.
        np.testing.assert_allclose(found[expected], vector.numpy(), atol=1e-5)


def reference_states(folder, ids, attention):
    """Plain products with a mask written out, one text at a time."""
    model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = {"input_ids": torch.tensor([ids])}
    if model.config.model_type in ("qwen2", "llama") and attention is Attention.BIDIRECTIONAL:
        inputs["attention_mask"] = torch.zeros(1, 1, len(ids), len(ids))  # added: nothing hidden
    with torch.no_grad():
        return model(**inputs).last_hidden_state[0]
