"""The model `echo`: hashes in place of a model, to test clients, faults and load against.

A word is a token. Equal words give similar vectors, so that searching finds something; a vector
depends on the token ids alone. Two words are faults: a text with `poison-echo` in it makes its
whole forward pass fail, one with `nan-echo` in it gets a vector that is not finite. `#7` is the
word whose token id is 7, and what that id is shown as; ids below 4 are special.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence

import numpy as np

from reasonembed.config import EchoConfig
from reasonembed.serving.preparation import (
    EMPTY,
    NO_INSTRUCTION,
    NO_TEXT,
    is_unicode,
    no_room,
    too_long,
    wrong_id,
)
from reasonembed.serving.protocol import EmbedItem, ItemError, Prepared, TokenIds, Vectors

VOCABULARY_SIZE = 16_384
_END, _QUERY, _POISON, _NAN, _FIRST_WORD = range(5)
_FAULTS = {"poison-echo": _POISON, "nan-echo": _NAN}
_ID = re.compile(r"#(\d{1,9})")
# Of order, role and instruction in a vector, against 1 of the words.
_WEIGHT_OF_ALL = 0.25


class EchoModel:
    """Tokenises and embeds; both sides of the service in one.

    Args:
        config: Size, limit and speed.
        default_instruction: Of queries that name none.
    """

    def __init__(self, config: EchoConfig, *, default_instruction: str) -> None:
        self._config, self._default_instruction = config, default_instruction
        shape = (VOCABULARY_SIZE, config.dimension)
        self._signs_VD = np.random.default_rng(0).integers(0, 2, shape, dtype=np.int8) * 2 - 1

    def prepare(self, items: Sequence[EmbedItem]) -> list[Prepared | ItemError]:
        """One outcome an item, in order."""
        befores = {
            one: self._before(one) for one in {item.instruction for item in items}
        }  # once each: a request may repeat one of megabytes for every input
        return [self._prepare(item, befores[item.instruction]) for item in items]

    def tokenise(self, text: str) -> list[int]:
        """An id a word."""
        return [_word_id(word) for word in text.split()]

    def detokenise(self, ids: Sequence[int]) -> list[str]:
        """`#7` for 7, which `tokenise` makes 7 of.

        Raises:
            ValueError: An id is none of the vocabulary.
        """
        if wrong := [one for one in ids if not 0 <= one < VOCABULARY_SIZE]:
            raise ValueError(wrong_id(wrong[0], size=VOCABULARY_SIZE).message)
        return [f"#{one}" for one in ids]

    def forward(self, batch: list[Prepared]) -> Vectors:
        """Vectors of norm 1, float32 [B, D]; takes as long as `tokens_per_s` says.

        Raises:
            RuntimeError: A text holds `poison-echo`.
        """
        started = time.perf_counter()
        vectors_BD = np.stack([self._vector(one) for one in batch])
        if rate := self._config.tokens_per_s:
            padded = len(batch) * max(len(one.ids) for one in batch)
            time.sleep(max(0.0, padded / rate - (time.perf_counter() - started)))
        if any(_POISON in one.ids for one in batch):
            raise RuntimeError("poison-echo: the model was asked to fail")
        return vectors_BD

    def _vector(self, one: Prepared) -> Vectors:
        words_D = self._signs_VD[list(one.ids[one.skip : -1])].sum(axis=0, dtype=np.float32)
        seed = hashlib.blake2b(np.asarray(one.ids, dtype="<i8").tobytes(), digest_size=16).digest()
        rng = np.random.default_rng(int.from_bytes(seed))
        all_D = rng.standard_normal(self._config.dimension, dtype=np.float32)
        vector_D = words_D / (np.linalg.norm(words_D) or 1)
        vector_D += _WEIGHT_OF_ALL * all_D / np.linalg.norm(all_D)
        if _NAN in one.ids:
            vector_D[0] = np.nan
        return np.asarray(vector_D / np.linalg.norm(vector_D), dtype=np.float32)

    def _before(self, instruction: str | None) -> list[int] | ItemError:
        """What stands before a query."""
        if not is_unicode(instruction or ""):
            return NO_TEXT
        told = self._default_instruction if instruction is None else instruction
        return [*self.tokenise(told), _QUERY]

    def _prepare(self, item: EmbedItem, before: list[int] | ItemError) -> Prepared | ItemError:
        words = self._words(item)
        if isinstance(words, ItemError):
            return words
        if item.role == "document":
            before = []
        if isinstance(before, ItemError):
            return before
        limit = self._config.max_tokens
        room = limit - len(before) - 1
        if room < 1:
            return no_room(role=item.role, limit=limit)
        first = words[: item.max_tokens]
        is_cut, is_over = len(first) < len(words), len(first) > room
        if is_over and item.truncate == "none":
            count = str(len(before) + len(first) + 1)
            return too_long(role=item.role, limit=limit, count=count)
        kept = first[-room:] if item.truncate == "start" else first[:room]
        return Prepared((*before, *kept, _END), skip=len(before), is_truncated=is_cut or is_over)

    def _words(self, item: EmbedItem) -> Sequence[int] | ItemError:
        if item.role == "document" and item.instruction:
            return NO_INSTRUCTION
        words: list[int] | TokenIds
        if isinstance(item.content, str):
            if not is_unicode(item.content):
                return NO_TEXT
            words = self.tokenise(item.content)
        else:
            wrong = next((one for one in item.content if not 0 <= one < VOCABULARY_SIZE), None)
            if wrong is not None:
                return wrong_id(wrong, size=VOCABULARY_SIZE)
            words = tuple(one for one in item.content if one >= _FIRST_WORD)
        return words or EMPTY


def _word_id(word: str) -> int:
    for fault, token_id in _FAULTS.items():
        if fault in word:
            return token_id
    if (said := _ID.fullmatch(word)) and _FIRST_WORD <= int(said[1]) < VOCABULARY_SIZE:
        return int(said[1])
    digest = hashlib.blake2b(word.casefold().encode(), digest_size=8).digest()
    return _FIRST_WORD + int.from_bytes(digest) % (VOCABULARY_SIZE - _FIRST_WORD)
