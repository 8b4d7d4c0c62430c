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
_DOCUMENT = "{document}"
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
        self._begins = _tokens_before_text(tokenizer)
        # An exported tokenizer appends the end token by itself; it must not stand there twice.
        self._appends_itself = end is not None and tokenizer("a")["input_ids"][-1] == end

    def tokenise(
        self, texts: Sequence[str], *, role: Role, instruction: str = ""
    ) -> list[TokenIds]:
        """Token ids of each text, cut to the role's limit, in the given order.

        Args:
            texts: Bare texts; the role's template is applied here.
            role: Query or document.
            instruction: What a query asks for; documents take none.

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
            raise ValueError(f"documents take no instruction; {instruction!r} was given")
        elif contract.document_template != _DOCUMENT:
            before, _, after = contract.document_template.partition(_DOCUMENT)
            texts = [f"{before}{text}{after}" for text in texts]
        suffix = () if end is None or self._appends_itself else (end,)
        encoded = self._tokenizer(
            list(texts),
            truncation=True,
            max_length=limit - len(suffix),
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [(*ids, *suffix) for ids in encoded]

    def tokens_before_text(self, *, role: Role, instruction: str = "") -> int:
        """Tokens that stand before a text: the tokenizer's first ones, and the template's.

        The template is counted alone, as where such models were trained; together with the first
        letters of a text it may be cut into other tokens. 0 where the template begins with the
        text.
        """
        if role is Role.QUERY:
            before = self._contract.query_template.partition("{query}")[0]
            before = apply_template(before, query="", instruction=instruction)
        else:
            before = self._contract.document_template.partition(_DOCUMENT)[0]
        if not before:
            return 0
        return self._begins + len(self._tokenizer(before, add_special_tokens=False)["input_ids"])


def _tokens_before_text(tokenizer: Any) -> int:
    """Special tokens that a tokenizer puts in front of every text."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    return next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
