"""A tiny random model of each family of backbones."""

import torch
from transformers import (
    AutoModel,
    BertConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    MPNetConfig,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    XLMRobertaConfig,
)

from reasonembed.embedder import Attention, Pooling, TokenisationContract

VOCABULARY = 60
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # large, so that different texts get clearly different vectors
}
GROUPED = {"num_key_value_heads": 2}
SPECIAL = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
DECODERS = {
    "qwen3": lambda: Qwen3Config(**SIZES, **GROUPED, head_dim=8),
    "qwen2": lambda: Qwen2Config(**SIZES, **GROUPED),
    "llama": lambda: LlamaConfig(**SIZES, **GROUPED),
    "mistral": lambda: MistralConfig(**SIZES, **GROUPED, sliding_window=5),
}
ENCODERS = {
    "bert": lambda: BertConfig(**SIZES),
    "roberta": lambda: RobertaConfig(**SIZES, pad_token_id=1),
    "xlm-roberta": lambda: XLMRobertaConfig(**SIZES, pad_token_id=1),
    "mpnet": lambda: MPNetConfig(**SIZES),
    # One layer of each kind: every token, and those near by.
    "modernbert": lambda: ModernBertConfig(
        **SIZES, **SPECIAL, pad_token_id=0, local_attention=8, global_attn_every_n_layers=2
    ),
}
FAMILIES = DECODERS | ENCODERS


def make_model(family: str, **changes: object) -> torch.nn.Module:
    config = FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    config.use_cache = False
    torch.manual_seed(0)
    return AutoModel.from_config(config, dtype=torch.float32).eval()


def contract(pooling: Pooling, **changes: object) -> TokenisationContract:
    values: dict = {
        "model": "tiny", "weights": "", "query_template": "{query}", "append_token_id": None,
        "attention": Attention.CAUSAL,
        "max_query_tokens": 32, "max_document_tokens": 32, "dtype": "float32", "dimension": 32,
    }  # fmt: skip
    return TokenisationContract(pooling=pooling, **values | changes)


def random_texts(*lengths: int) -> list[tuple[int, ...]]:
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(VOCABULARY, (n,), generator=draw).tolist()) for n in lengths]
