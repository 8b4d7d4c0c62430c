"""What became of committed rows, in numbers: how many of each status, and the tokens they took."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.artifacts import Commit
from reasonembed.schemas import Status

_TOKENS = {"prompt_tokens": "prompt", "cached_tokens": "cached", "completion_tokens": "completion"}
_GOOD = (Status.OK, Status.FILTERED)


@dataclass
class Tally:
    """Counts that are added up.

    Attributes:
        statuses: Rows by status.
        tokens: By kind: `prompt`, of these `cached` (found in the prefix cache), `completion`.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, table: pa.Table) -> Tally:
        """Of an artifact's rows; where they have no status all are ok."""
        if "status" in table.column_names:
            statuses = Counter[str](table.column("status").to_pylist())
        else:
            statuses = Counter({str(Status.OK): table.num_rows} if table.num_rows else {})
        tokens = {
            kind: int(pc.sum(table.column(name)).as_py() or 0)
            for name, kind in _TOKENS.items()
            if name in table.column_names
        }
        return cls(statuses, Counter(tokens))

    @classmethod
    def of_commit(cls, commit: Commit) -> Tally:
        """Of a part that was committed before: its tokens were counted then."""
        return cls(Counter(commit.statuses or {str(Status.OK): commit.rows}))

    @classmethod
    def loads(cls, text: str) -> Tally:
        """What `dumps` made."""
        statuses, tokens = json.loads(text)
        return cls(Counter(statuses), Counter(tokens))

    def dumps(self) -> str:
        """As a short text, to travel in a table's cell."""
        return json.dumps([self.statuses, self.tokens])

    def add(self, other: Tally) -> None:
        """Adds another's counts to these."""
        self.statuses.update(other.statuses)
        self.tokens.update(other.tokens)  # a kind that came to nothing stays, and says so

    @property
    def failed(self) -> dict[str, int]:
        """Rows that failed, by status."""
        return {name: n for name, n in sorted(self.statuses.items()) if name not in _GOOD}
