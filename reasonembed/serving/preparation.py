"""Inputs of requests to token ids under the model's contract, in threads, several at once.

Special tokens in an input of token ids are dropped, and the rest is treated as the text that it
stands for: template and end token are the contract's business.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from reasonembed.embedder.contract import TokenisationContract
from reasonembed.embedder.tokenisation import ContractTokenizer, Role, TokenIds
from reasonembed.serving.protocol import EmbedItem, ItemError, Prepared, Truncate

_Outcome = Prepared | ItemError
# Of a longer text so many characters a token of the limit are looked at first: 4 or 5 are usual.
_CHARS_A_TOKEN = 16
_LOOKED_AT = 1_000


def too_long(*, role: str, limit: int, count: str) -> ItemError:
    """Refuses an input over the limit that may not be cut; `count` says how many tokens it has."""
    return ItemError(
        f"longer than the limit of {limit} tokens for a {role}: it has {count}, template and "
        "special tokens included; shorten it",
        is_callers_fault=True,
        is_too_long=True,
    )


def no_room(*, role: str, limit: int) -> ItemError:
    """Refuses an input whose template leaves no room for a text."""
    return ItemError(
        f"the instruction takes all of the {limit} tokens of a {role} and leaves no room for a "
        "text; shorten it",
        is_callers_fault=True,
    )


def wrong_id(token_id: int, *, size: int) -> ItemError:
    """Refuses a token id of another vocabulary."""
    return ItemError(
        f"token id {token_id} is outside 0..{size - 1}, the model's vocabulary; send text "
        "(langchain: check_embedding_ctx_length=False)",
        is_callers_fault=True,
    )


def long_frame(*, role: str, most: int) -> ItemError:
    """Refuses an instruction that is not worth tokenising; `most` is in characters."""
    return ItemError(
        f"the instruction of a {role} may have {most} characters, the template's included; "
        "shorten it",
        is_callers_fault=True,
    )


EMPTY = ItemError("holds no token besides special ones", is_callers_fault=True)
NO_TEXT = ItemError("holds half a surrogate pair, which is no character", is_callers_fault=True)
NO_INSTRUCTION = ItemError("documents take no instruction", is_callers_fault=True)


def is_unicode(text: str) -> bool:
    """Whether a text has a form in UTF-8; JSON can bring half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class _Form:
    """What stands around a text, and how long the whole may be."""

    role: Role
    before: str
    after: str
    limit: int
    skip: int

    def around(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"

    @property
    def window(self) -> int:
        """Characters that are looked at first."""
        return self.limit * _CHARS_A_TOKEN


class ContractPreparer:
    """Keeps a contract for the inputs of requests; see `protocol.Preparer`.

    Args:
        tokenizer: A fast tokenizer of transformers. It is the preparer's own from now on: settings
            of the tokenizer, truncation among them, are shared by all threads that use it.
        contract: What to keep to.
        default_instruction: Of queries that name none.
    """

    def __init__(
        self, tokenizer: Any, contract: TokenisationContract, *, default_instruction: str
    ) -> None:
        self._rules = ContractTokenizer(tokenizer, contract)
        self._tokenizer, self._contract = tokenizer, contract
        self.default_instruction = default_instruction
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.vocabulary_size = len(tokenizer)

    def prepare(self, items: Sequence[EmbedItem]) -> list[_Outcome]:
        """One outcome an item, in order; one pass of the tokenizer for each instruction."""
        found: dict[int, _Outcome] = {}
        texts: dict[int, str] = {}
        cut: set[int] = set()
        groups: dict[tuple[Role, str], list[int]] = defaultdict(list)
        # Once each: a request may repeat one of megabytes for every input.
        are_good = {one: is_unicode(one) for one in {item.instruction or "" for item in items}}
        for place, item in enumerate(items):
            text = self._text(item) if are_good[item.instruction or ""] else NO_TEXT
            if isinstance(text, ItemError):
                found[place] = text
            else:
                texts[place] = self._first(text, item.max_tokens)
                if texts[place] is not text:
                    cut.add(place)
                groups[Role(item.role), self._instruction(item)].append(place)
        for (role, instruction), places in groups.items():
            given = [(texts[place], items[place].truncate) for place in places]
            outcomes = self._prepare(given, role=role, instruction=instruction)
            found |= zip(places, outcomes, strict=True)
        for place in cut:
            if isinstance(outcome := found[place], Prepared):
                found[place] = replace(outcome, is_truncated=True)
        return [found[place] for place in range(len(items))]

    def tokenise(self, text: str) -> list[int]:
        """Ids of a bare text, without template, special tokens or limit."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def detokenise(self, ids: Sequence[int]) -> list[str]:
        """What each id stands for.

        Raises:
            ValueError: An id is none of the vocabulary.
        """
        if (wrong := self._strange(ids)) is not None:
            raise ValueError(wrong_id(wrong, size=self.vocabulary_size).message)
        return [str(self._tokenizer.decode([one])) for one in ids]

    def _strange(self, ids: Sequence[int]) -> int | None:
        return next((one for one in ids if not 0 <= one < self.vocabulary_size), None)

    def _text(self, item: EmbedItem) -> str | ItemError:
        if item.role == "document" and item.instruction:
            return NO_INSTRUCTION
        text = item.content
        if not isinstance(text, str):
            if (wrong := self._strange(text)) is not None:
                return wrong_id(wrong, size=self.vocabulary_size)
            text = str(self._tokenizer.decode(list(text), skip_special_tokens=True))
        if not is_unicode(text):
            return NO_TEXT
        return EMPTY if self._is_empty(text) else text

    def _first(self, text: str, max_tokens: int | None) -> str:
        """What the first tokens of a text stand for; the text itself where it has no more."""
        if max_tokens is None:
            return text
        size = 0
        ends: list[int] = []
        while size < len(text) and len(ends) < 2 * max_tokens:
            size = 4 * size or max_tokens * _CHARS_A_TOKEN
            encoding = self._backend.encode(text[:size], add_special_tokens=False)
            ends = [stop for _, stop in encoding.offsets]
        return text if len(ends) <= max_tokens else text[: max(1, ends[max_tokens - 1])]

    def _is_empty(self, text: str) -> bool:
        """Whether the tokenizer makes nothing of a text; a letter or digit is always a token."""
        if re.search(r"\w", text):
            return False
        looked_at = {text[:_LOOKED_AT], text.strip()[:_LOOKED_AT]}
        return not any(self.tokenise(part) for part in looked_at)

    def _instruction(self, item: EmbedItem) -> str:
        if item.role == "document" or "{instruction}" not in self._contract.query_template:
            return ""
        return self.default_instruction if item.instruction is None else item.instruction

    def _ids(self, encoding: Any) -> TokenIds:
        return (*encoding.ids, *self._rules.suffix)

    def _prepare(
        self, given: Sequence[tuple[str, Truncate]], *, role: Role, instruction: str
    ) -> list[_Outcome]:
        form = self._form(role, instruction)
        if isinstance(form, ItemError):
            return [form] * len(given)
        parts = [_part(text, form.window, truncate) for text, truncate in given]
        # The fast form knows no offsets, which takes half the time; it lets other threads run.
        encoded = self._backend.encode_batch_fast([form.around(part) for part in parts])
        return [
            self._judge(form, text, truncate, part=part, ids=self._ids(encoding))
            for (text, truncate), part, encoding in zip(given, parts, encoded, strict=True)
        ]

    def _form(self, role: Role, instruction: str) -> _Form | ItemError:
        """What stands around the texts; an error where that alone fills the limit.

        It is repeated for each of them, so that few tokens of many characters (blanks, say) are
        refused as well.
        """
        rules, limit = self._rules, self._rules.limit(role)
        before, after = rules.around(role=role, instruction=instruction)
        frame, most = before + after, limit * _CHARS_A_TOKEN
        if len(frame) > most:
            return long_frame(role=role, most=most)
        if frame and len(self._ids(self._backend.encode(frame))) >= limit:
            return no_room(role=role, limit=limit)
        skip = 0
        if not self._contract.pool_template:
            skip = rules.tokens_before_text(role=role, instruction=instruction)
        return _Form(role, before, after, limit, skip)

    def _judge(
        self, form: _Form, text: str, truncate: Truncate, *, part: str, ids: TokenIds
    ) -> _Outcome:
        # Twice the limit, so that where the part was cut off is far from where the text will be.
        enough, size = 2 * form.limit, form.window
        while len(part) < len(text) and len(ids) < enough:
            size *= 4
            part = _part(text, size, truncate)
            ids = self._ids(self._backend.encode(form.around(part)))
        if len(ids) <= form.limit:
            return Prepared(ids, form.skip)
        if truncate == "none":
            count = str(len(ids)) if part == text else f"more than {enough - 1}"
            return too_long(role=form.role, limit=form.limit, count=count)
        if truncate == "end":
            return Prepared(self._rules.cut(ids, limit=form.limit), form.skip, is_truncated=True)
        cut = self._cut_start(form, part)
        if cut is None:
            return no_room(role=form.role, limit=form.limit)
        return Prepared(cut, form.skip, is_truncated=True)

    def _cut_start(self, form: _Form, text: str) -> TokenIds | None:
        """Ids of the end of a text; None where not one character of it fits.

        Cut off is what the surplus tokens stand for. The rest is tokenised anew: without what
        stood before, its beginning may be other tokens, and more.
        """
        while text:
            encoding = self._backend.encode(form.around(text))
            ids = self._ids(encoding)
            surplus = len(ids) - form.limit
            if surplus <= 0:
                return ids
            begin = len(form.before)
            starts = _starts(encoding, begin=begin, end=begin + len(text))
            text = text[max(1, starts[min(surplus, len(starts) - 1)]) :] if starts else ""
        return None


def _part(text: str, size: int, truncate: Truncate) -> str:
    if len(text) <= size:
        return text
    return text[-size:] if truncate == "start" else text[:size]


def _starts(encoding: Any, *, begin: int, end: int) -> list[int]:
    """Where in the text each of its tokens starts; several may share a character."""
    found = zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [
        max(0, start - begin)
        for (start, stop), is_special in found
        if not is_special and start < end and stop > begin
    ]
