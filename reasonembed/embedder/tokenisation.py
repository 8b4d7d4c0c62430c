"""Texts to token ids under a contract.

Two traps are closed here. Content is cut one token early, so that the end token always stays and is
the one that is pooled. And nothing compares ids with a padding id: in Qwen3 padding and end token
are the same id, so a mask made that way loses the pooled position.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from reasonembed.embedder.contract import TokenisationContract

TokenIds = tuple[int, ...]
_SLOT = re.compile(r"\{(instruction|query)\}")


class Role(StrEnum):
    """Which side of the retrieval a text stands on."""

    QUERY = "query"
    DOCUMENT = "document"


def apply_template(template: str, *, query: str, instruction: str) -> str:
    """Fills the two slots in one pass, so that braces inside either text stay as they are."""
    values = {"query": query, "instruction": instruction}
    return _SLOT.sub(lambda slot: values[slot[1]], template)


class ContractTokenizer:
    """A tokenizer that keeps to a contract.

    Args:
        tokenizer: A fast tokenizer of transformers.
        contract: What to keep to.
    """

    def __init__(self, tokenizer: Any, contract: TokenisationContract) -> None:
        self._tokenizer = tokenizer
        self._contract = contract
        end = contract.append_token_id
        # An exported tokenizer appends the end token by itself; it must not stand there twice.
        self._appends_itself = end is not None and tokenizer("a")["input_ids"][-1] == end

    def tokenise(
        self, texts: Sequence[str], *, role: Role, instruction: str = ""
    ) -> list[TokenIds]:
        """Token ids of each text, cut to the role's limit, in the given order.

        Args:
            texts: Bare texts; the template is applied to queries here.
            role: Query or document.
            instruction: What the query asks for; documents take none.

        Raises:
            ValueError: An instruction was given for documents.
        """
        if not texts:
            return []
        contract, end = self._contract, self._contract.append_token_id
        limit = contract.max_document_tokens
        if role is Role.QUERY:
            limit = contract.max_query_tokens
            template = contract.query_template
            texts = [apply_template(template, query=t, instruction=instruction) for t in texts]
        elif instruction:
            raise ValueError(f"documents are embedded bare; instruction {instruction!r} was given")
        suffix = () if end is None or self._appends_itself else (end,)
        encoded = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=limit - len(suffix),
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [(*ids, *suffix) for ids in encoded]
