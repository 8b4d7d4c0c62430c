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
_QUERY, _DOCUMENT = "{query}", "{document}"
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
        self._begins, ends = _tokens_around_text(tokenizer)
        # An exported tokenizer appends the end token by itself; it must not stand there twice.
        appends_itself = end is not None and tokenizer("a")["input_ids"][-1] == end
        self.suffix: TokenIds = () if end is None or appends_itself else (end,)
        """What stands behind all that the tokenizer gives."""
        self._tail = ends + len(self.suffix)

    def limit(self, role: Role) -> int:
        """Largest length of such a text, template and special tokens included."""
        is_query = role is Role.QUERY
        return self._contract.max_query_tokens if is_query else self._contract.max_document_tokens

    def around(self, *, role: Role, instruction: str = "") -> tuple[str, str]:
        """What the role's template puts before and after a text.

        Raises:
            ValueError: An instruction was given for documents.
        """
        if role is Role.QUERY:
            before, _, after = self._contract.query_template.partition(_QUERY)
            return (
                apply_template(before, query="", instruction=instruction),
                apply_template(after, query="", instruction=instruction),
            )
        if instruction:
            raise ValueError(f"documents take no instruction; {instruction!r} was given")
        before, _, after = self._contract.document_template.partition(_DOCUMENT)
        return before, after

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
        before, after = self.around(role=role, instruction=instruction)
        encoded = self._tokenizer(
            [f"{before}{text}{after}" for text in texts],
            truncation=True,
            max_length=self.limit(role) - len(self.suffix),
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        return [(*ids, *self.suffix) for ids in encoded]

    def cut(self, ids: TokenIds, *, limit: int) -> TokenIds:
        """The cut that `tokenise` makes, of ids that were not cut: special tokens stay.

        Args:
            ids: Of a whole text, `suffix` included.
            limit: Of all tokens.
        """
        if len(ids) <= limit:
            return ids
        return (*ids[: limit - self._tail], *ids[len(ids) - self._tail :])

    def tokens_before_text(self, *, role: Role, instruction: str = "") -> int:
        """Tokens that stand before a text: the tokenizer's first ones, and the template's.

        The template is counted alone, as where such models were trained; together with the first
        letters of a text it may be cut into other tokens. 0 where the template begins with the
        text.
        """
        before, _ = self.around(role=role, instruction=instruction)
        if not before:
            return 0
        return self._begins + len(self._tokenizer(before, add_special_tokens=False)["input_ids"])


def _tokens_around_text(tokenizer: Any) -> tuple[int, int]:
    """Special tokens that a tokenizer puts in front of every text, and behind it."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    begins = next(n for n in range(len(whole)) if whole[n : n + len(bare)] == bare)
    return begins, len(whole) - len(bare) - begins
