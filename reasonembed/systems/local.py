"""Computes planned rows: what the evaluation asks for, and how one process does it.

On a cluster an actor pool does the same (`ray_jobs.benchmark`); both commit block by block, so that
a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import sys
import uuid
from collections.abc import Callable
from typing import Any, Protocol

import pyarrow as pa

from reasonembed.artifacts import Ledger, Mapper, equal_blocks
from reasonembed.config import PoolConfig
from reasonembed.progress import Reporter


class Maker(Protocol):
    """Makes a mapper in two steps: what takes long and can be shared, and the mapper over it."""

    @property
    def key(self) -> str:
        """Equal keys can share what `load` gives."""

    def load(self) -> Any:
        """Loads a model, starts an engine, or opens a connection."""

    def mapper(self, loaded: Any) -> Mapper:
        """The mapper over what `load` gave."""

    def __call__(self) -> Mapper:
        """Both steps."""


class Surroundings(Protocol):
    """Where to speak, and which failed rows to try again."""

    @property
    def reporter(self) -> Reporter:
        """Where to speak."""

    @property
    def retry(self) -> frozenset[str]:
        """Statuses of rows that are computed again."""


class Work(Surroundings, Protocol):
    """Who computes rows."""

    def compute(
        self,
        planned: pa.Table,
        artifact: Ledger,
        make: Maker,
        pool: PoolConfig,
        *,
        label: str,
        overlap: int = 1,
        cut: Callable[[pa.Table, int], list[pa.Table]] | None = None,
    ) -> int:
        """Computes and commits the rows of `planned` that `artifact` lacks.

        Args:
            planned: Rows with the artifact's key; all of them, those that are done included.
            artifact: Where rows are committed.
            make: Makes the mapper; called only if a row is missing.
            pool: Rows in a block; on a cluster, actors.
            label: For the progress line.
            overlap: Blocks that an actor takes at once.
            cut: Cuts rows into blocks of at most so many; default all of that size but the last.

        Returns:
            Number of rows that were computed now.
        """


class LocalWork:
    """Does the work in this process, one block after the other.

    Args:
        reporter: Where to speak.
        retry: Statuses of rows that are computed again.
    """

    def __init__(self, reporter: Reporter, *, retry: frozenset[str] = frozenset()) -> None:
        self.reporter, self.retry = reporter, retry
        self._key = ""
        self._loaded: Any = None

    def compute(
        self,
        planned: pa.Table,
        artifact: Ledger,
        make: Maker,
        pool: PoolConfig,
        *,
        label: str,
        overlap: int = 1,  # one process has nothing to overlap
        cut: Callable[[pa.Table, int], list[pa.Table]] | None = None,
    ) -> int:
        """See `Work.compute`."""
        todo = artifact.anti_join(retry=self.retry)(planned)
        if not todo.num_rows:
            return 0
        done, attempt = planned.num_rows - todo.num_rows, uuid.uuid4().hex[:12]
        with self.reporter.watching(label, total=planned.num_rows, done=lambda: done):
            mapper = make.mapper(self._load(make))
            for number, block in enumerate((cut or equal_blocks)(todo, pool.batch_rows)):
                artifact.commit(f"{attempt}-{number:06d}", mapper(block))
                done += block.num_rows
        computed: int = todo.num_rows
        return computed

    def _load(self, make: Maker) -> Any:
        """What was loaded last, or another; one at a time, for two may not fit this machine."""
        if self._loaded is None or self._key != make.key:
            self.close()
            self._loaded, self._key = make.load(), make.key
        return self._loaded

    def close(self) -> None:
        """Frees what is loaded."""
        if self._loaded is None:
            return
        if (close := getattr(self._loaded, "close", None)) is not None:
            close()  # engines hold more than memory
        self._loaded = None
        # torch keeps the memory of what it frees, and an LLM's engine asks for nearly all of it.
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
