"""Lines of files that others have written, and what to do with those that cannot be used."""

from __future__ import annotations

import gzip
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from reasonembed.errors import SchemaError

# A share means nothing yet in the first lines of a file.
_FEW = 10_000


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a plain or gzipped file with their numbers from 1; blank ones are passed over.

    Raises:
        SchemaError: The file cannot be read.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise SchemaError(f"{file} cannot be read: {error}") from error


@dataclass
class _Kind:
    """Where the lines of one kind began."""

    seen_before: int = 0
    bad_before: int = 0
    first: str | None = None


@dataclass
class Tally:
    """Counts of one source while it is read.

    Attributes:
        max_bad_share: Of the lines of each kind (see `close`); more that cannot be used are an
            error.
        seen: Lines and references that were looked at.
        bad: Those of them that cannot be used.
        first: Where the first of those stands, and what is wrong with it.
        left_out: Queries that no sample was made of although nothing is wrong, by reason.
    """

    max_bad_share: float = 0.0
    seen: int = 0
    bad: int = 0
    first: str | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    _kind: _Kind = field(default_factory=_Kind, repr=False)

    def refuse(self, why: str) -> None:
        """Notes one that cannot be used; `why` begins with its place.

        Raises:
            SchemaError: None may be unusable, or these are too many already.
        """
        self.bad += 1
        self.first = self.first or why
        self._kind.first = self._kind.first or why
        if not self.max_bad_share:
            raise SchemaError(why)
        self._check(at_least=_FEW)

    def close(self) -> None:
        """Everything of one kind is read; what comes next is judged by itself.

        Else a long file would hide that much of a short one is unusable.

        Raises:
            SchemaError: Too many of the kind could not be used.
        """
        self._check()
        self._kind = _Kind(self.seen, self.bad)

    def _check(self, *, at_least: int = 0) -> None:
        seen, bad = self.seen - self._kind.seen_before, self.bad - self._kind.bad_before
        if bad > self.max_bad_share * max(seen, at_least):
            raise SchemaError(
                f"{bad} of {seen} lines cannot be used, more than max_bad_share "
                f"{self.max_bad_share:g} of assemble.sources allows; the first: {self._kind.first}"
            )

    def remarks(self) -> list[str]:
        """What a person should know of it; empty if everything was used."""
        found = [f"{count:,} queries {why}" for why, count in sorted(self.left_out.items())]
        if self.bad:
            found.append(f"{self.bad:,} of {self.seen:,} lines unusable, the first: {self.first}")
        return found
