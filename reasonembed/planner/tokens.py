"""Tokens of texts: by a model's tokenizer where that is at hand, else by characters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from reasonembed.planner.shapes import folder_of

CHARS_A_TOKEN = 3.5  # of the texts of this field, code and formulae among them; within 20 %


def token_counts(
    texts: Sequence[str], model: str, *, cache_dir: str | None = None
) -> tuple[float, ...]:
    """Tokens of texts: by the model's tokenizer where that is at hand, else by characters."""
    return _token_counts(tuple(texts), model, cache_dir)


@lru_cache(maxsize=64)
def _token_counts(texts: tuple[str, ...], model: str, cache_dir: str | None) -> tuple[float, ...]:
    folder = folder_of(model, cache_dir=cache_dir)
    if folder is None or not (folder / "tokenizer.json").is_file():
        return tuple(len(text) / CHARS_A_TOKEN for text in texts)
    tokenizer = _tokenizer(str(folder))
    return tuple(
        float(len(one.ids)) for one in tokenizer.encode_batch(texts, add_special_tokens=False)
    )


@lru_cache(maxsize=8)
def _tokenizer(folder: str) -> Any:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
