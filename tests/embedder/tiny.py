"""A complete checkpoint in a few kilobytes: random Qwen3 weights and a trained byte-level BPE."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from reasonembed.config import EncoderConfig

WORDS = (
    "why does a dictionary keep the order of insertion while a set does not and what follows "
    "for a loop that removes keys from the mapping it walks over instruct query task"
)
SPECIAL = ["<|endoftext|>", "<|im_end|>", "<s>"]


def save_tokenizer(
    folder: Path,
    *,
    with_bos: bool = False,
    appends: bool = False,
    special: list[str] = SPECIAL,
    begins: str | None = "<s>",
    ends: str = "<|im_end|>",
) -> None:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS] * 4, trainer)
    if with_bos or appends:
        form = f"{f'{begins} ' if with_bos else ''}$A{f' {ends}' if appends else ''}"
        ids = [(token, backend.token_to_id(token)) for token in special]
        backend.post_processor = processors.TemplateProcessing(single=form, special_tokens=ids)
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=begins,
        eos_token=ends,
        # As in Qwen3: padding and end token are one id, so masks made of ids would go wrong.
        pad_token=special[0],
    ).save_pretrained(folder)


def save_checkpoint(folder: Path, *, with_bos: bool = False, appends: bool = False) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        initializer_range=0.3,  # large, so that different texts get clearly different vectors
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, with_bos=with_bos, appends=appends)
    return folder


def encoder_config(folder: Path, **changes: object) -> EncoderConfig:
    values: dict[str, object] = {
        "model": str(folder),
        "max_query_tokens": 48,
        "max_document_tokens": 48,
    }
    return EncoderConfig.model_validate(values | changes)
