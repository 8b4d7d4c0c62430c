"""Samples from MS MARCO's passages in their published files.

Reads a folder that holds one of these (each may end in `.gz`), and yields rows of `samples`:

- `msmarco-triples`: `qidpidtriples.train.*.tsv` (query id, positive id, negative id) with
  `collection.tsv` (id, passage) and `queries.train.tsv` (id, query);
- `msmarco-text-triples`: `triples.train.*.tsv` (query, positive, negative), the texts themselves;
- `msmarco-hard-negatives`: sentence-transformers' `msmarco-hard-negatives.jsonl` (`qid`, `pos`:
  ids, `neg`: ids by system) with `collection.tsv` and `queries.train.tsv`.

Two passes, so that memory holds numbers and the queries only: the first chooses the passages of
every query, the second copies their texts to a scratch file, from where the rows take them. Which
negatives are chosen depends on (seed, query, passage) alone, never on the order of a file.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any

import numpy as np

from reasonembed.config import SampleSource
from reasonembed.corpus import text_hash
from reasonembed.errors import ConfigError, SchemaError
from reasonembed.remixer.assemble import Placed, Row, split_of
from reasonembed.remixer.lines import Tally, numbered_lines
from reasonembed.schemas import row_seed, stable_hash
from reasonembed.tasks import Task

_TRIPLES = {
    "msmarco-triples": ("qidpidtriples.train*.tsv", 3),
    "msmarco-text-triples": ("triples.train*.tsv", 3),
    "msmarco-hard-negatives": ("msmarco-hard-negatives*.jsonl", 0),
}
_COLLECTION, _QUERIES = "collection*.tsv", "queries.train*.tsv"
_MAX_NUMBER = 2**32  # of a passage or a line; larger than any of MS MARCO's
_MASK = 2**64 - 1
_SPARE = 16  # passages drawn beside, for those that turn out to be positives; a query has few

Query = int | str
"""What tells queries apart: an id, or the text itself where there are no ids."""


def msmarco_files(source: SampleSource) -> list[Path]:
    """The files that a source reads: the triples or hard negatives first, then texts.

    Raises:
        ConfigError: One is missing, or several could be meant.
    """
    pattern, _ = _TRIPLES[source.form]
    patterns = [pattern]
    if source.form != "msmarco-text-triples":
        patterns += [_COLLECTION, _QUERIES]
    return [_one_file(Path(source.path), pattern, source.form) for pattern in patterns]


def _one_file(folder: Path, pattern: str, form: str) -> Path:
    found = sorted({*folder.glob(pattern), *folder.glob(f"{pattern}.gz")})
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ConfigError(
            f"assemble.sources: form {form} needs exactly one file {pattern} or {pattern}.gz in "
            f"the folder {folder}; there is {names}"
        )
    return found[0]


# ---- what is chosen -------------------------------------------------------------------------


class _Drawn:
    """The `most` passages of a query with the smallest hashes: a sample without replacement.

    What was drawn depends neither on the order of what is offered nor on repeats. A key is 8
    bytes: the hash above, the passage's number below. A few more are kept, because that a passage
    is a positive may be learnt after it was offered.
    """

    __slots__ = ("_keys", "_most", "_salt")

    def __init__(self, salt: int, most: int | None) -> None:
        self._keys = array("Q")
        self._most = most or _MAX_NUMBER
        self._salt = salt

    def offer(self, passage: int, number: int) -> None:
        """Takes a passage in if its hash is small enough.

        Args:
            passage: What tells it apart from others; 64 bits.
            number: Where its text is found, below 2^32.
        """
        key = _mixed(self._salt ^ passage) << 32
        keys = self._keys
        if len(keys) == self._most + _SPARE and key > keys[-1]:
            return
        place = bisect_left(keys, key)
        if place < len(keys) and keys[place] >> 32 == key >> 32:
            return  # it is there already
        keys.insert(place, key | number)
        if len(keys) > self._most + _SPARE:
            keys.pop()

    def numbers(self, *, but: Iterable[int]) -> list[int]:
        """Numbers of the passages that were drawn; some take no place among them."""
        known = {_mixed(self._salt ^ passage) for passage in but}
        drawn = [key % _MAX_NUMBER for key in self._keys if key >> 32 not in known]
        return drawn[: self._most]


def _mixed(value: int) -> int:
    """32 bits that depend on all of 64 (the finaliser of SplitMix64)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return (value ^ value >> 31) >> 32


@dataclass(slots=True)
class _Choice:
    """Passages of one query, as numbers of texts; of a positive also what tells it apart."""

    negatives: _Drawn
    positives: dict[int, int] = field(default_factory=dict)


class _Choices:
    """Passages of every query."""

    def __init__(self, source: SampleSource) -> None:
        self._seed, self._most = source.seed, source.max_negatives
        self.by_query: dict[Query, _Choice] = {}

    def of(self, query: Query) -> _Choice:
        choice = self.by_query.get(query)
        if choice is None:
            salt = row_seed(self._seed, "msmarco", query) << 32 | row_seed(self._seed, query)
            choice = self.by_query[query] = _Choice(_Drawn(salt, self._most))
        return choice

    def usable(self, tally: Tally) -> dict[Query, tuple[list[int], list[int]]]:
        """Numbers of positives and negatives by query; a positive is no negative."""
        found: dict[Query, tuple[list[int], list[int]]] = {}
        for query, choice in self.by_query.items():
            positives = list(choice.positives.values())
            negatives = choice.negatives.numbers(but=choice.positives)
            if positives and negatives:
                found[query] = positives, negatives
            else:
                missing = "negatives" if positives else "a positive"
                tally.left_out[f"without {missing}"] += 1
        return found


def _from_ids(file: Path, choices: _Choices, tally: Tally) -> None:
    for number, line in numbered_lines(file):
        tally.seen += 1
        try:  # not `_id`: the file has hundreds of millions of lines
            query, positive, negative = map(int, line.split(b"\t"))
            if min(query, positive, negative) < 0 or max(positive, negative) >= _MAX_NUMBER:
                raise ValueError("there is none below 0, nor of 2^32 or more")
        except ValueError as error:
            tally.refuse(f"{file} line {number}: three ids are needed: {error}")
            continue
        choice = choices.of(query)
        choice.positives[positive] = positive
        choice.negatives.offer(negative, negative)


def _from_json(file: Path, choices: _Choices, tally: Tally) -> None:
    for number, line in numbered_lines(file):
        tally.seen += 1
        try:
            query, positives, negatives = _named(line)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            tally.refuse(
                f"{file} line {number}: a qid, a list pos and lists neg by system are needed: "
                f"{type(error).__name__}: {error}"
            )
            continue
        choice = choices.of(query)
        choice.positives |= dict(zip(positives, positives, strict=True))
        for negative in negatives:
            if negative not in choice.positives:  # so that it takes no place
                choice.negatives.offer(negative, negative)


def _named(line: bytes) -> tuple[int, list[int], list[int]]:
    fields = json.loads(line)
    lists = fields["neg"].values()
    negatives = [_id(one) for ids in lists for one in ids]
    return _id(fields["qid"]), [_id(one) for one in fields["pos"]], negatives


def _id(value: Any) -> int:
    """An id as a number; ids are numbers or their digits."""
    number = int(value) if isinstance(value, (bytes, str)) else value
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < _MAX_NUMBER:
        raise ValueError(f"{value!r} is no id")
    return number


def _from_texts(file: Path, choices: _Choices, tally: Tally) -> None:
    """A text's number is twice its line's, one more for the negative."""
    for number, line in numbered_lines(file):
        tally.seen += 1
        try:
            query, positive, negative = _texts(line)
        except ValueError as error:
            tally.refuse(f"{file} line {number}: {error}")
            continue
        choice = choices.of(query)
        choice.positives.setdefault(_hash64(positive), 2 * number)
        choice.negatives.offer(_hash64(negative), 2 * number + 1)


def _texts(line: bytes) -> tuple[str, str, str]:
    """Query, positive, negative of a line."""
    texts = [text.strip() for text in line.decode().split("\t")]
    if len(texts) != 3 or not all(texts):
        raise ValueError(f"three texts are needed, tabs between them; there are {len(texts)}")
    query, positive, negative = texts
    return query, positive, negative


def _hash64(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big")


# ---- their texts ----------------------------------------------------------------------------


class _ScratchTexts:
    """Texts by number, in a scratch file.

    Args:
        wanted: Their numbers; others are passed over.
        file: Empty; its descriptor is read.
    """

    def __init__(self, wanted: Iterable[int], file: IO[bytes]) -> None:
        unique = np.unique(np.fromiter(wanted, dtype=np.uint64))
        self._numbers = array("Q", unique.tobytes())
        self._starts = array("q", [-1]) * len(self._numbers)
        self._sizes = array("I", [0]) * len(self._numbers)
        self._file = file
        self._end = 0

    def _place(self, number: int) -> int | None:
        place = bisect_left(self._numbers, number)
        known = place < len(self._numbers) and self._numbers[place] == number
        return place if known else None

    def wants(self, number: int) -> bool:
        """Whether the text is asked for and not there yet."""
        place = self._place(number)
        return place is not None and self._starts[place] < 0

    def put(self, number: int, text: str) -> None:
        place = self._place(number)
        assert place is not None, "asked by `wants` before"
        content = text.encode()
        self._file.write(content)
        self._starts[place], self._sizes[place] = self._end, len(content)
        self._end += len(content)

    def flush(self) -> None:
        """Makes what was put readable."""
        self._file.flush()

    def get(self, number: int) -> str | None:
        place = self._place(number)
        if place is None or self._starts[place] < 0:
            return None
        return os.pread(self._file.fileno(), self._sizes[place], self._starts[place]).decode()


def _read_collection(file: Path, texts: _ScratchTexts, tally: Tally) -> None:
    for passage, text in _id_and_text(file, tally, texts.wants):
        texts.put(passage, text)
    texts.flush()


def _id_and_text(
    file: Path, tally: Tally, wants: Callable[[int], bool]
) -> Iterator[tuple[int, str]]:
    """Texts of a file of two columns that are wanted."""
    for number, line in numbered_lines(file):
        tally.seen += 1
        name, tab, rest = line.partition(b"\t")
        try:
            known = _id(name)
            if not wants(known):
                continue
            text = rest.decode().strip()
            if not tab or not text:
                raise ValueError("there is no text")
        except ValueError as error:
            tally.refuse(f"{file} line {number}: an id, a tab and a text are needed: {error}")
            continue
        yield known, text


def _reread_texts(file: Path, texts: _ScratchTexts) -> None:
    for number, line in numbered_lines(file):
        wanted = [side for side in (0, 1) if texts.wants(2 * number + side)]
        if wanted:  # then the line was read before, and was well
            columns = _texts(line)
            for side in wanted:
                texts.put(2 * number + side, columns[1 + side])
    texts.flush()


# ---- rows -----------------------------------------------------------------------------------


def read_msmarco(
    source: SampleSource,
    *,
    task: Task,
    held_out_share: float,
    tally: Tally,
    scratch: Path | None = None,
) -> Iterator[Placed]:
    """Rows of `schemas.SAMPLES` in order of queries, one a query, without rewritten queries.

    Args:
        source: Folder, form, seed and number of negatives.
        task: Gives name and instruction.
        held_out_share: Of the queries, by a hash of their text.
        tally: Receives what was left out and what could not be used.
        scratch: Folder for the scratch file, as large as the chosen passages.

    Raises:
        ConfigError: A file is missing.
        SchemaError: A file cannot be read, or too much of it cannot be used.
    """
    first, *others = msmarco_files(source)
    choices = _Choices(source)
    _READERS[source.form](first, choices, tally)
    tally.close()
    chosen = choices.usable(tally)
    choices.by_query.clear()
    numbers = (number for sides in chosen.values() for side in sides for number in side)
    # Without a name: it vanishes with the process, however that ends.
    with tempfile.TemporaryFile(dir=scratch) as file:
        texts = _ScratchTexts(numbers, file)
        queries: dict[Query, str] = {}
        if others:
            _read_collection(others[0], texts, tally)
            tally.close()
            queries |= _id_and_text(others[1], tally, chosen.__contains__)
            tally.close()
        else:
            _reread_texts(first, texts)
            queries |= {query: str(query) for query in chosen}
        form = _RowForm(first, task, held_out_share, texts, is_named=bool(others))
        for query in sorted(chosen):  # all ids, or all texts
            tally.seen += 1
            try:
                yield form.placed(query, queries.get(query), *chosen[query])
            except SchemaError as error:
                tally.refuse(str(error))
    tally.close()


_READERS: dict[str, Callable[[Path, _Choices, Tally], None]] = {
    "msmarco-triples": _from_ids,
    "msmarco-text-triples": _from_texts,
    "msmarco-hard-negatives": _from_json,
}


@dataclass(frozen=True)
class _RowForm:
    """How a row is made of numbers."""

    file: Path
    task: Task
    held_out_share: float
    texts: _ScratchTexts
    is_named: bool

    def placed(
        self, query: Query, text: str | None, positives: list[int], negatives: list[int]
    ) -> Placed:
        """A row.

        Raises:
            SchemaError: Query or passage are named, but their text is nowhere.
        """
        place = f"{self.file} query {query if self.is_named else stable_hash(query)}"
        if text is None:
            raise SchemaError(f"{place}: its text is not among the queries")
        row = {
            "query_id": f"{self.task.name}-{query if self.is_named else stable_hash(query)}",
            "task": self.task.name,
            "instruction": self.task.instruction,
            "query": text,
            "rewritten_query": text,
            "positives": [self._passage(number, place) for number in positives],
            "negatives": [self._passage(number, place) for number in negatives],
            "source_doc_id": None,
            "split": split_of(text_hash(text), self.held_out_share),
        }
        return Placed(place, row)

    def _passage(self, number: int, place: str) -> Row:
        text = self.texts.get(number)
        if text is None:
            raise SchemaError(f"{place}: passage {number} is not in the collection")
        hashed = text_hash(text)
        doc_id = str(number) if self.is_named else hashed
        return {"doc_id": doc_id, "text": text, "label": None, "text_hash": hashed}
