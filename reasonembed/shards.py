"""A stage in several jobs: which rows are whose, who is at work, and whether all have been.

Rows belong to a shard by the hash of their key, so the same rows are a shard's whatever has been
committed already, and shards of one stage commit to one artifact without knowing of each other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from reasonembed.errors import ConfigError
from reasonembed.storage import Place

FOLDER = "_shards"


@dataclass(frozen=True)
class Shard:
    """One of `of` parts of a stage's rows; counted from 1."""

    index: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Reads `2/4`.

        Raises:
            ConfigError: It is no such thing.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", text)
        shard = cls(*map(int, found.groups())) if found else None
        if shard is None or not 1 <= shard.index <= shard.of:
            raise ConfigError(f"--shard {text!r}: expected I/N with 1 <= I <= N, such as 2/4")
        return shard

    def __str__(self) -> str:
        return f"{self.index}/{self.of}"


def of_shard(table: pa.Table, key: str, shard: Shard) -> pa.Table:
    """The rows of a table that belong to a shard; those of one key are never parted.

    Args:
        table: Any rows.
        key: The column that decides, of strings.
        shard: Which.
    """
    keys = table.column(key).combine_chunks().dictionary_encode()
    owner = np.array([_owner(one, shard.of) for one in keys.dictionary.to_pylist()], dtype=np.int64)
    mine = owner[keys.indices.to_numpy(zero_copy_only=False)] == shard.index
    return table.filter(pa.array(mine))


def own_rows(
    planned: pa.Table | Iterable[pa.Table], key: str, shard: Shard | None
) -> pa.Table | Iterable[pa.Table]:
    """`of_shard` of one table or of a stream of them; all rows where there are no shards."""
    if shard is None:
        return planned
    if isinstance(planned, pa.Table):
        return of_shard(planned, key, shard)
    return (of_shard(table, key, shard) for table in planned)


def _owner(key: str, count: int) -> int:
    digest = hashlib.blake2b(str(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % count + 1


class ShardRecords:
    """Which shards of an artifact have begun, and which of those have ended.

    Args:
        artifact: Where it lies.
    """

    def __init__(self, artifact: Place) -> None:
        self._folder = artifact / FOLDER

    def begin(self, shard: Shard) -> dict[Shard, bool | None]:
        """Notes that a shard is wanted; what is known of other numbers of shards is forgotten.

        Returns:
            What was known before of those that this changes, for `restore`.
        """
        before: dict[Shard, bool | None] = {shard: None}
        known = list(self._all())
        self._note(shard, ended=False)  # first: without any record the stage would pass for whole
        for place, noted, ended in known:
            if noted.of != shard.of:
                place.delete()
            if noted.of != shard.of or noted == shard:
                before[noted] = ended
        return before

    def restore(self, before: dict[Shard, bool | None]) -> None:
        """Undoes `begin`."""
        for shard, ended in before.items():
            if ended is None:
                self._file(shard).delete()
            else:
                self._note(shard, ended=ended)

    def end(self, shard: Shard) -> None:
        """Notes that all rows of a shard are committed."""
        self._note(shard, ended=True)

    def forget(self) -> None:
        """The stage has run as a whole."""
        self._folder.delete()

    def missing(self) -> list[Shard]:
        """The shards that have not ended; none where the stage was never cut into shards."""
        noted = [(shard, ended) for _, shard, ended in self._all()]
        if not noted:
            return []
        count = max(shard.of for shard, _ in noted)
        ended = {shard.index for shard, has_ended in noted if has_ended and shard.of == count}
        return [Shard(index, count) for index in range(1, count + 1) if index not in ended]

    def exist(self) -> bool:
        """Whether the stage has run in shards since it last ran as a whole."""
        return bool(self._folder.children())

    def _note(self, shard: Shard, *, ended: bool) -> None:
        self._file(shard).write(json.dumps({"ended": ended}).encode())

    def _file(self, shard: Shard) -> Place:
        return self._folder / f"{shard.index}-of-{shard.of}.json"

    def _all(self) -> Iterator[tuple[Place, Shard, bool]]:
        for place in self._folder.children():
            if found := re.fullmatch(r"(\d+)-of-(\d+)\.json", place.name):
                shard = Shard(*map(int, found.groups()))
                yield place, shard, bool(json.loads(place.read() or b"{}").get("ended"))
