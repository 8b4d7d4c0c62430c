"""An export's tokenizer without transformers, which would load torch: 180 MiB for each ingress."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reasonembed.embedder.contract import TokenisationContract
from reasonembed.embedder.golden import verify_golden_ids
from reasonembed.embedder.tokenisation import ContractTokenizer
from reasonembed.errors import ModelError


class BareTokenizer:
    """What `ContractTokenizer` and `ContractPreparer` ask of a fast tokenizer of transformers.

    Args:
        file: A `tokenizer.json`.
    """

    def __init__(self, file: Path) -> None:
        from tokenizers import Tokenizer

        self.backend_tokenizer = Tokenizer.from_file(str(file))
        self.backend_tokenizer.no_padding()

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool = True,
        truncation: bool = False,
        max_length: int = 0,
        **_: Any,  # what else transformers would return
    ) -> dict[str, Any]:
        """Token ids of a text, or of each text of a list."""
        backend = self.backend_tokenizer
        if truncation:
            backend.enable_truncation(max_length)
        else:
            backend.no_truncation()
        texts = [text] if isinstance(text, str) else text
        found = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        ids = [one.ids for one in found]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text that ids stand for."""
        return str(self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def bare_tokenizer(directory: Path, contract: TokenisationContract) -> BareTokenizer | None:
    """The tokenizer of an export, if it alone gives the golden token ids and needs no more.

    Args:
        directory: Folder of the export.
        contract: Of it.

    Returns:
        None where transformers does something besides what `tokenizer.json` says.
    """
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    if not file.is_file() or not settings.is_file():
        return None
    if json.loads(settings.read_text(encoding="utf-8")).get("clean_up_tokenization_spaces"):
        return None  # changes what ids are decoded to
    tokenizer = BareTokenizer(file)
    try:
        verify_golden_ids(ContractTokenizer(tokenizer, contract), directory)
    except ModelError:  # whether transformers gives them is checked by the caller
        return None
    return tokenizer
