"""What an LLM is asked about several collections, in one go: its engines take long to start.

Each collection has an artifact of its own, for ids of queries repeat from one to the next. The rows
of all of them are computed as one table whose blocks belong to one collection each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import Artifact, Commit, Mapper, equal_blocks
from reasonembed.config import LLMConfig, LLMPool, RuntimeConfig
from reasonembed.keyset import AntiJoin
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.storage import Place
from reasonembed.systems.local import Work

_NUMBER = "number_of_share"
_Cut = Callable[[pa.Table, int], list[pa.Table]]


@dataclass(frozen=True)
class Share:
    """What is asked about one collection.

    Attributes:
        planned: Rows with the artifact's key; all of them, those that are done included.
        artifact: Where answers are committed; all shares have one schema.
        make: Makes the stage over a started engine.
    """

    planned: pa.Table
    artifact: Artifact
    make: Callable[[Engine], Mapper]


def ask_together(
    shares: Sequence[Share],
    llm: LLMConfig,
    *,
    pool: LLMPool,
    runtime: RuntimeConfig,
    work: Work,
    label: str,
    cut: _Cut = equal_blocks,
) -> None:
    """Computes and commits what the artifacts lack; the engine starts once for all shares.

    Args:
        shares: One for each collection.
        llm: Who is asked.
        pool: Rows in a block; on a cluster, actors.
        runtime: How the engine runs.
        work: Who computes.
        label: For the progress line.
        cut: Cuts the rows of a share into blocks of at most so many.
    """
    if not shares:
        return
    numbered = [_numbered(share.planned, number) for number, share in enumerate(shares)]
    make = _MakeAll(tuple(share.make for share in shares))
    work.compute(
        pa.concat_tables(numbered),
        _Artifacts([share.artifact for share in shares]),
        WithEngine(llm, runtime.engine, runtime.cache_dir, make),
        pool,
        label=label,
        overlap=pool.overlap,
        cut=partial(_cut_apart, cut=cut),
    )


class _Artifacts:
    """Several artifacts as one; see `artifacts.Ledger`."""

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        self._artifacts = artifacts

    @property
    def place(self) -> Place:
        return self._artifacts[0].place

    @property
    def key(self) -> tuple[str, ...]:
        return self._artifacts[0].key

    def anti_join(self, *, retry: Collection[str] = ()) -> AntiJoin:
        joins = [artifact.anti_join(retry=retry) for artifact in self._artifacts]
        return lambda planned: pa.concat_tables(
            join(_of_share(planned, number)) for number, join in enumerate(joins)
        )

    def commit(self, part: str, table: pa.Table) -> Commit:
        number, rows = _unnumbered(table)
        return self._artifacts[number].commit(part, rows)

    def committed(self, part: str) -> Commit | None:
        found = (artifact.committed(part) for artifact in self._artifacts)
        return next((commit for commit in found if commit is not None), None)

    def compact(self, *, beyond: int = 1) -> int:
        return sum(artifact.compact(beyond=beyond) for artifact in self._artifacts)


@dataclass(frozen=True)
class _MakeAll:
    makes: tuple[Callable[[Engine], Mapper], ...]

    def __call__(self, engine: Engine) -> Mapper:
        # An annotator holds a corpus; of two, because one share ends while the next begins.
        @lru_cache(maxsize=2)
        def stage(number: int) -> Mapper:
            return self.makes[number](engine)

        def map_block(block: pa.Table) -> pa.Table:
            number, rows = _unnumbered(block)
            return _numbered(stage(number)(rows), number)

        return map_block


def _cut_apart(table: pa.Table, rows: int, *, cut: _Cut) -> list[pa.Table]:
    numbers = table.column(_NUMBER).unique().to_pylist()
    return [block for number in numbers for block in cut(_of_share(table, number), rows)]


def _of_share(table: pa.Table, number: int) -> pa.Table:
    return table.filter(pc.equal(table.column(_NUMBER), number))


def _numbered(table: pa.Table, number: int) -> pa.Table:
    return table.append_column(_NUMBER, pa.repeat(pa.scalar(number, pa.int32()), table.num_rows))


def _unnumbered(block: pa.Table) -> tuple[int, pa.Table]:
    (number,) = block.column(_NUMBER).unique().to_pylist()
    return number, block.drop_columns([_NUMBER])
