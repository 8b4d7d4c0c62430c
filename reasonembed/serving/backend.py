"""An `Embedder` behind the service's protocol."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reasonembed import tasks
from reasonembed.serving.protocol import (
    EmbedItem,
    EmbedResult,
    InputType,
    ItemError,
    Outcome,
    ServedModel,
)

if TYPE_CHECKING:  # imported where it is used: the service itself needs no torch
    from reasonembed.embedder.encode import Embedder
    from reasonembed.embedder.tokenisation import ContractTokenizer, TokenIds

_DEFAULT_INSTRUCTION = tasks.get("generic").instruction


class EmbedderBackend:
    """Runs an embedder in a thread; to be called one batch at a time, as `MicroBatcher` does.

    Token ids are decoded and then treated as the text that they stand for: templates and end token
    are the contract's business, and special tokens in the request are dropped.

    Args:
        embedder: The model.
        tokenizer: The transformers tokenizer of the same model.
        default_instruction: Of queries that name none.
    """

    def __init__(
        self,
        embedder: Embedder,
        tokenizer: Any,
        *,
        default_instruction: str = _DEFAULT_INSTRUCTION,
    ) -> None:
        from reasonembed.embedder.tokenisation import ContractTokenizer

        self._embedder = embedder
        self._tokenizer = tokenizer
        self._default_instruction = default_instruction
        contract = embedder.contract
        # One token more than the model takes: a text that fills it is over the limit.
        self._longer = ContractTokenizer(
            tokenizer,
            replace(
                contract,
                max_query_tokens=contract.max_query_tokens + 1,
                max_document_tokens=contract.max_document_tokens + 1,
            ),
        )

    @classmethod
    def load_export(
        cls, directory: Path, *, default_instruction: str = _DEFAULT_INSTRUCTION, **options: Any
    ) -> EmbedderBackend:
        """Loads an exported model; `options` are those of `Embedder.load_export`.

        Raises:
            ModelError: The folder is no export or cannot be loaded.
        """
        from reasonembed.embedder.contract import load_tokenizer
        from reasonembed.embedder.encode import Embedder

        embedder = Embedder.load_export(directory, **options)
        return cls(embedder, load_tokenizer(directory), default_instruction=default_instruction)

    def describe(self, name: str) -> ServedModel:
        """What the service says of this model under that name."""
        contract = self._embedder.contract
        return ServedModel(
            name=name,
            dimension=contract.dimension,
            max_query_tokens=contract.max_query_tokens,
            max_document_tokens=contract.max_document_tokens,
            vocabulary_size=len(self._tokenizer),
            created=int(time.time()),
        )

    async def embed(self, items: list[EmbedItem]) -> list[Outcome]:
        """One outcome an item; see `protocol.Embed`."""
        return await asyncio.to_thread(self._embed, items)

    def _embed(self, items: Sequence[EmbedItem]) -> list[Outcome]:
        prepared = self._prepare(items)
        ready = [one.ids for one in prepared if isinstance(one, _Prepared)]
        vectors = iter(self._embedder.encode_ids(ready))
        return [
            EmbedResult(next(vectors), len(one.ids), one.is_truncated)
            if isinstance(one, _Prepared)
            else one
            for one in prepared
        ]

    def _prepare(self, items: Sequence[EmbedItem]) -> list[_Prepared | ItemError]:
        texts = [self._text(item) for item in items]
        longer = self._tokenise(self._longer, items, texts)
        return [
            self._judge(item, text, ids)
            for item, text, ids in zip(items, texts, longer, strict=True)
        ]

    def _judge(self, item: EmbedItem, text: str, ids: TokenIds) -> _Prepared | ItemError:
        contract = self._embedder.contract
        limits = {"query": contract.max_query_tokens, "document": contract.max_document_tokens}
        if not text:
            return ItemError("holds no token besides special ones", is_callers_fault=True)
        if len(ids) <= limits[item.role]:
            return _Prepared(ids, is_truncated=False)
        if item.truncate == "end":
            [cut] = self._tokenise(self._embedder, [item], [text])
            return _Prepared(cut, is_truncated=True)
        return ItemError(
            f"longer than the limit of {limits[item.role]} tokens for a {item.role}, template and "
            "special tokens included; shorten it or set truncate to 'end'",
            is_callers_fault=True,
        )

    def _text(self, item: EmbedItem) -> str:
        if isinstance(item.content, str):
            return item.content
        return str(self._tokenizer.decode(list(item.content), skip_special_tokens=True))

    def _tokenise(
        self,
        tokenizer: ContractTokenizer | Embedder,
        items: Sequence[EmbedItem],
        texts: Sequence[str],
    ) -> list[TokenIds]:
        """Token ids in the order of the items; one call for those of equal role and instruction."""
        from reasonembed.embedder.tokenisation import Role

        groups: dict[tuple[InputType, str], list[int]] = defaultdict(list)
        for index, item in enumerate(items):
            instruction = item.instruction
            if item.role == "query" and instruction is None:
                instruction = self._default_instruction
            groups[item.role, instruction or ""].append(index)
        found: dict[int, TokenIds] = {}
        for (role, instruction), members in groups.items():
            chosen = [texts[index] for index in members]
            ids = tokenizer.tokenise(chosen, role=Role(role), instruction=instruction)
            found |= zip(members, ids, strict=True)
        return [found[index] for index in range(len(items))]


@dataclass(frozen=True)
class _Prepared:
    """Token ids of an input as the model gets them."""

    ids: TokenIds
    is_truncated: bool
