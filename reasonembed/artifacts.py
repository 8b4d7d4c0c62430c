"""A stage's directory: commits, manifest, resume by anti-join, drift check.

    <artifact>/data/<part>.parquet      immutable; invisible until its commit exists
    <artifact>/_commits/<part>.json     what the part holds; written after the data is on disk
    <artifact>/_stage.json              the identity that made it: configuration, prompts, inputs

Exactly once, by construction: readers see committed parts only and take one row of a key, the first
that is ok (a straggler's later row never replaces what other stages have used), else the newest;
a stage started again computes planned keys minus committed keys. The order "data, then commit" is
what makes a kill at any moment harmless.

Many small parts become few large ones by `Artifact.compact`: new data, then one commit that names
the parts that it replaces, which hides them, then their deletion. No row is left out, not even one
that another has replaced, and their order stays.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from reasonembed.config import fingerprint
from reasonembed.errors import AccessError, DriftError, QualityError, SchemaError, StorageError
from reasonembed.keyset import AntiJoin, KeySet, KeySpool, NotIn, StatusCodes, content_of, mapped
from reasonembed.schemas import ARTIFACTS, Status, conform, stable_hash
from reasonembed.shards import FOLDER as SHARDS
from reasonembed.storage import Place, storage_error

_KEY_SEPARATOR = "\x1f"
_STAGE = "_stage.json"
COMPACTED = ("domains", "queries", "hits", "judgments", "audit", "rewrites", "trajectories")
"""Kinds that actors fill block by block, and to whose parts no later stage holds on."""
TODO = "_todo"  # of planned rows that wait, see `blocks`
_Record = TypeVar("_Record")
_Result = TypeVar("_Result")
Mapper = Callable[[pa.Table], pa.Table]
"""Planned rows of an artifact → its rows."""
_ROW_GROUP = 8_192  # rows that a reader holds at once where it goes through a part
_READERS = 32  # of commit records in an object store, where each costs a round trip
_MERGED_ROWS = 65_536  # a part's keys are held and compared at once
_MERGED_BYTES = 64 * 2**20
_BLOCK_BYTES = 2**30  # half of what 32-bit offsets reach, for rows are not all of one length


@dataclass(frozen=True, slots=True)
class Commit:
    """One committed part."""

    part: str
    rows: int
    keys_digest: str  # of the sorted keys; the pages themselves carry checksums
    statuses: dict[str, int]
    committed_at_ns: int
    # Parts that this one stands for. They stay hidden for good: a straggler that commits one of
    # them once more, while it is being deleted, must not show up without its data.
    replaces: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """What `_stage.json` holds: which configuration, prompts, models and inputs made this."""

    name: str
    identity: dict[str, Any]
    version: str

    @property
    def fingerprint(self) -> str:
        """Hash of the identity; equal fingerprints mean interchangeable artifacts."""
        return fingerprint(self.identity)


class StageDirectory:
    """A directory that belongs to one identity; what lies in it is its stage's own business."""

    def __init__(self, uri: str | Path, *, name: str) -> None:
        self.name, self.uri = name, str(uri)
        self.place = Place(uri)
        self._fs, self._root = self.place.fs, self.place.path

    def begin(
        self,
        identity: dict[str, Any],
        *,
        version: str = "",
        may_change: Callable[[str], bool] | None = None,
        cure: str = "Use another run_dir, restore these values, or discard this stage and those "
        "after it with --from and --fresh.",
    ) -> None:
        """Claims the directory for `identity`, or checks that it already belongs to it.

        A directory that holds no result yet changes hands: a mistake in the configuration that
        showed before anything was made costs nothing. Not where another shard may be at work.

        Args:
            identity: What decides the result, flat.
            version: Of this software; kept for people.
            may_change: Which fields may differ from those that made it; the new identity is then
                noted and the rows stay.
            cure: What to do about another identity, for the message.

        Raises:
            DriftError: It was made with another identity; the fields that differ are named. Or it
                holds rows and no identity, as a copy that was killed does.
            StorageError: The directory cannot be written.
        """
        stored = self.stage()
        if stored is None and self._has_rows():
            raise DriftError(
                f"{self.uri} holds rows, but not whose they are; adopt them again, or discard this "
                "stage with --from and --fresh"
            )
        if stored is not None and may_change is not None:
            grown = {key: value for key, value in identity.items() if may_change(key)}
            kept = {key: value for key, value in stored.identity.items() if not may_change(key)}
            if kept | grown == identity != stored.identity:
                stored = None
        if stored is None or (stored.identity != identity and self._is_empty()):
            stage = Stage(name=self.name, identity=identity, version=version)
            self._write(_STAGE, _json(asdict(stage)))
            return
        if changes := differences(stored.identity, identity):
            raise DriftError(
                f"{self.uri} was made with another configuration:\n"
                + "\n".join(f"  {change}" for change in changes)
                + f"\n{cure}"
            )

    def stage(self) -> Stage | None:
        """The identity that made this; None where nothing was begun."""
        raw = self._record(_STAGE)
        return None if raw is None else _as(Stage, raw, str(self.place / _STAGE))

    def _is_empty(self) -> bool:
        return all(child.name == _STAGE for child in self.place.children())

    def _has_rows(self) -> bool:
        return False

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the stage as done, with what is worth knowing about it (counts, figures)."""
        self._write("_done.json", _json(summary))

    def finished(self) -> dict[str, Any] | None:
        """The summary of a stage that is done; None while it is not."""
        return self._record("_done.json")

    def discard(self) -> None:
        """Deletes everything in it: the commits first, the identity last.

        Killed half way, it leaves a directory that still belongs to its old identity, so that none
        of the rows left over can pass for rows of a new one.

        Raises:
            StorageError: Something in it cannot be deleted.
        """
        try:
            found = self._fs.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
            for info in sorted(found, key=lambda info: (info.base_name == _STAGE, info.base_name)):
                if info.type == pafs.FileType.Directory:
                    self._fs.delete_dir(info.path)
                else:
                    self._fs.delete_file(info.path)
            if found:
                self._fs.delete_dir(self._root)
        except OSError as error:
            raise storage_error(self.uri, error, doing="delete") from error

    def _write(self, name: str, data: bytes) -> None:
        (self.place / name).write(data)

    def _record(self, name: str) -> dict[str, Any] | None:
        """A JSON object; None where there is no such file, or an empty one.

        Some stores make an object before they fill it, so a kill leaves an empty one.
        """
        file = self.place / name
        raw = file.read()
        try:
            return dict(json.loads(raw)) if raw else None
        except ValueError as error:
            raise StorageError(
                f"{file} is damaged ({error}); put it back, or discard this stage"
            ) from error


class Artifact(StageDirectory):
    """A stage directory of committed Parquet parts with one schema and key."""

    def __init__(
        self,
        uri: str | Path,
        *,
        schema: pa.Schema,
        key: tuple[str, ...],
        name: str,
        latest_wins: bool = False,
    ) -> None:
        super().__init__(uri, name=name)
        self.schema, self.key, self._latest_wins = schema, key, latest_wins

    @classmethod
    def declared(cls, uri: str | Path, kind: str) -> Artifact:
        """The artifact `kind` of `schemas.ARTIFACTS` at `uri`."""
        return cls(uri, name=kind, **vars(ARTIFACTS[kind]))

    # ---- writing ----------------------------------------------------------------------------

    def commit(self, part: str, table: pa.Table) -> Commit:
        """Writes one part and then its commit record; committing a part again replaces it.

        Raises:
            SchemaError: The table does not have the artifact's columns, types or unique keys.
            StorageError: The disk is full or the directory cannot be written.
        """
        table = conform(table, self.schema, where=f"{self.uri} part {part}")
        keys = self._keys(table)
        if len(set(keys)) != len(keys):
            double = [key for key, count in Counter(keys).items() if count > 1]
            raise SchemaError(f"{self.uri} part {part}: keys occur twice: {double[:3]}")
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, write_page_checksum=True, row_group_size=_ROW_GROUP)
        self._write(f"data/{part}.parquet", sink.getvalue().to_pybytes())
        statuses = table.column("status").to_pylist() if "status" in table.column_names else []
        record = Commit(
            part=part,
            rows=table.num_rows,
            keys_digest=_digest_keys(keys),
            statuses=dict(Counter(statuses)),
            committed_at_ns=time.time_ns(),
        )
        self._write(f"_commits/{part}.json", _json(asdict(record)))
        return record

    def compact(self, *, beyond: int = 1) -> int:
        """Merges small parts into large ones; killed at any moment, it loses nothing.

        For who holds the run alone: planned rows and half-written files that killed drivers have
        left are deleted. A straggler may yet commit whole data that has no commit, so that stays.

        Not for artifacts to which something holds on by their parts: names that a writer counts
        up, digests in the identity of a later stage (`samples`, `corpus`).

        Args:
            beyond: Nothing is done while there are no more parts than this.

        Returns:
            Number of parts that are gone.

        Raises:
            StorageError: As `read`, or the directory cannot be written.
        """
        self._delete_leftovers()
        if len(self._listed("_commits")) <= beyond:
            return 0
        commits, merged = self.commits(), 0
        self._delete_replaced(commits)  # what a compaction that was killed has left
        for run in self._runs(commits):
            if len(run) > 1:
                self._delete_replaced([self._merged(run)])
                merged += len(run) - 1
        return merged

    def _listed(self, folder: str) -> dict[str, int]:
        """Sizes of a folder's files by their names without the ending."""
        found = (self.place / folder).files()
        return {info.base_name.rpartition(".")[0]: info.size for info in found}

    def _runs(self, commits: list[Commit]) -> Iterator[list[Commit]]:
        """Neighbours in time that fit into one part; so the order of rows stays."""
        sizes = self._listed("data")
        run: list[Commit] = []
        rows = held = 0
        for commit in commits:
            size = sizes.get(commit.part, 0)
            if run and (rows + commit.rows > _MERGED_ROWS or held + size > _MERGED_BYTES):
                yield run
                run, rows, held = [], 0, 0
            run, rows, held = [*run, commit], rows + commit.rows, held + size
        if run:
            yield run

    def _merged(self, run: list[Commit]) -> Commit:
        names = [commit.part for commit in run]
        part, statuses = f"merged-{stable_hash(*names)}", Counter[str]()
        keys: list[str] = []
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, self.schema, write_page_checksum=True) as writer:
            for table in self._row_groups_of(run):
                keys += self._keys(table)
                writer.write_table(table, row_group_size=_ROW_GROUP)
        for commit in run:
            statuses.update(commit.statuses)
        record = Commit(
            part=part,
            rows=len(keys),
            keys_digest=_digest_keys(keys),
            statuses=dict(statuses),
            # Its place in time is theirs: between what came before and what came after them.
            committed_at_ns=run[-1].committed_at_ns,
            replaces=[*names, *(name for commit in run for name in commit.replaces)],
        )
        self._write(f"data/{part}.parquet", sink.getvalue())
        self._write(f"_commits/{part}.json", _json(asdict(record)))
        return record

    def _row_groups_of(self, run: list[Commit]) -> Iterator[pa.Table]:
        """The rows of some parts, all checked, as many at a time as a row group holds."""
        held: list[pa.Table] = []
        rows = 0
        for commit in run:
            table = self._read_part(commit, self.schema.names, None)
            held, rows = [*held, table], rows + table.num_rows
            if rows >= _ROW_GROUP:
                yield pa.concat_tables(held)
                held, rows = [], 0
        if held:
            yield pa.concat_tables(held)

    def _delete_leftovers(self) -> None:
        (self.place / TODO).delete()
        if self.place.is_local:
            for folder in ("data", "_commits"):
                for child in (self.place / folder).children():
                    if child.name.startswith(".tmp-"):
                        child.delete()

    def _delete_replaced(self, commits: list[Commit]) -> None:
        replaced = {part for commit in commits for part in commit.replaces}
        # Records first: a reader that finds one gone looks again, and then at what replaces it.
        for folder, ending in (("_commits", "json"), ("data", "parquet")):
            for part in sorted(replaced & self._listed(folder).keys()):
                (self.place / f"{folder}/{part}.{ending}").delete()

    def _is_empty(self) -> bool:
        return (
            not self._has_rows()
            and self.finished() is None
            and len((self.place / SHARDS).children()) < 2  # of which one is this driver's own
        )

    def _has_rows(self) -> bool:
        return bool(self.commits())

    # ---- reading ----------------------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """All commits, oldest first."""
        while (records := self._records()) is None:
            pass  # a compaction took some of them away meanwhile, and put another in their place
        replaced = {part for record in records for part in record.replaces}
        visible = [record for record in records if record.part not in replaced]
        return sorted(visible, key=lambda record: (record.committed_at_ns, record.part))

    def _records(self) -> list[Commit] | None:
        """All records; None where one vanished while they were read."""
        # An empty one is none, see `_record`.
        names = [info.base_name for info in (self.place / "_commits").files() if info.size]
        names = [name for name in names if name.endswith(".json") and not name.startswith(".")]
        if self.place.is_local or len(names) < _READERS:
            found = [self._commit_named(name) for name in names]
        else:
            with ThreadPoolExecutor(_READERS) as readers:
                found = list(readers.map(self._commit_named, names))
        whole = [record for record in found if record is not None]
        return whole if len(whole) == len(names) else None

    def _commit_named(self, name: str) -> Commit | None:
        record = self._record(f"_commits/{name}")
        return None if record is None else _as(Commit, record, f"{self._root}/_commits/{name}")

    def committed(self, part: str) -> Commit | None:
        """The commit of one part; None where it is not committed, or was compacted."""
        return self._commit_named(f"{part}.json")

    def read(
        self, *, columns: list[str] | None = None, only: pc.Expression | None = None
    ) -> pa.Table:
        """Committed rows, one of each key (see above), sorted by key.

        Args:
            columns: Of the schema; None for all.
            only: A condition on key columns; rows that do not meet it are not loaded.

        Raises:
            StorageError: A committed part is missing, damaged, or not the one that was committed.
        """
        status = ["status"] if "status" in self.schema.names else []
        wanted = list(dict.fromkeys([*self.key, *status, *(columns or self.schema.names)]))
        history = self.history(columns=wanted, only=only)
        table = _one_a_key(history, self.key, latest_wins=self._latest_wins)
        return table.select(columns or self.schema.names)

    def history(self, *, columns: list[str], only: pc.Expression | None = None) -> pa.Table:
        """Every row that was ever committed, oldest first, replaced ones too; else as `read`."""
        schema = pa.schema([self.schema.field(name) for name in columns])

        def rows(commits: list[Commit]) -> pa.Table:
            parts = [self._read_part(commit, columns, only) for commit in commits]
            return pa.concat_tables(parts) if parts else schema.empty_table()

        return self._steadily(rows)

    def _steadily(self, work: Callable[[list[Commit]], _Result]) -> _Result:
        """Works on all commits, and anew where a compaction took parts away meanwhile."""
        commits = self.commits()
        while True:
            try:
                return work(commits)
            except StorageError:
                before, commits = commits, self.commits()
                if commits == before:
                    raise

    def row_groups(self, *, columns: list[str]) -> Iterator[tuple[str, int, pa.Table]]:
        """Every committed row as it lies, oldest part first, a bounded number at a time.

        Yields:
            Part, number of the row group in it, and its rows; replaced rows too.

        Raises:
            StorageError: As `read`.
        """
        yield from self._row_groups(self.commits(), columns)

    def _row_groups(
        self, commits: list[Commit], columns: list[str]
    ) -> Iterator[tuple[str, int, pa.Table]]:
        for commit in commits:
            with self._opened(commit.part) as file:
                if file.metadata.num_rows != commit.rows:
                    raise StorageError(
                        f"{self.uri} part {commit.part}: {file.metadata.num_rows} rows, its commit "
                        f"says {commit.rows}"
                    )
                for number in range(file.num_row_groups):
                    yield commit.part, number, file.read_row_group(number, columns=columns)

    def row_group(self, part: str, number: int, *, columns: list[str]) -> pa.Table:
        """The rows of one row group of a committed part.

        Raises:
            StorageError: As `read`.
        """
        with self._opened(part) as file:
            return file.read_row_group(number, columns=columns)

    @contextmanager
    def _opened(self, part: str) -> Iterator[pq.ParquetFile]:
        path = f"{self._root}/data/{part}.parquet"
        try:
            with pq.ParquetFile(path, filesystem=self._fs, page_checksum_verification=True) as file:
                yield file
        except (OSError, pa.ArrowInvalid) as error:
            raise _unreadable(path, error) from error

    def parts(self) -> Iterator[pa.Table]:
        """The rows of `read`, one committed part after the other, for more than memory holds.

        For artifacts of which the first row of a key counts: without `status` or `latest_wins`.

        Raises:
            StorageError: As in `read`.
        """
        seen: set[str] = set()
        for commit in self.commits():
            table = self._read_part(commit, self.schema.names, None)
            keys = self._keys(table)
            yield table.filter(pa.array([key not in seen for key in keys], pa.bool_()))
            seen.update(keys)

    def rows(self, *, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows of `read`, one row group after the other, in the order of their commits.

        Memory does not grow with the number of rows. As `row_groups` it looks at counts and
        checksums, not at `keys_digest`.

        Args:
            columns: Of the schema; None for all.

        Raises:
            StorageError: As `read`.
        """
        commits = self.commits()
        spool, _ = self._spooled(commits)
        chosen, start = mapped(spool.rows, np.bool_), 0
        for entries in spool.one_a_key(good=self._good):
            chosen[entries["row"]] = True
        for _, _, table in self._row_groups(commits, columns or self.schema.names):
            mask = pa.array(np.array(chosen[start : start + table.num_rows]))
            yield table.filter(mask)
            start += table.num_rows

    def keys(self, *, retry: Collection[str] = ()) -> set[str]:
        """Keys that need no computation: committed, and not of a status to be retried."""
        has_status = "status" in self.schema.names
        table = self.read(columns=[*self.key, *(["status"] if has_status else [])])
        if has_status and retry:
            table = table.filter(
                pc.invert(pc.is_in(table.column("status"), value_set=pa.array(list(retry))))
            )
        return set(self._keys(table))

    def anti_join(self, *, retry: Collection[str] = ()) -> AntiJoin:
        """What keeps planned rows whose key is not committed now (or is to be retried).

        Keys lie in temporary files, so that memory does not grow with their number.

        Raises:
            StorageError: As `row_groups`.
        """
        spool, codes = self._steadily(self._spooled)
        again = [number for number, name in enumerate(codes.names) if name in retry]
        entries = spool.one_a_key(good=self._good)
        if again and "status" in self.schema.names:
            entries = (some[~np.isin(some["status"], again)] for some in entries)
        return NotIn(KeySet(entries), self.key)

    def missing(self, planned: pa.Table, *, retry: Collection[str] = ()) -> pa.Table:
        """The anti-join: rows of `planned` whose key is not committed (or is to be retried)."""
        return self.anti_join(retry=retry)(planned)

    def statuses(self) -> Counter[str]:
        """Rows by status, one row a key."""
        spool, codes = self._steadily(self._spooled)
        counts = np.zeros(len(codes.names), np.int64)
        for entries in spool.one_a_key(good=self._good):
            counts += np.bincount(entries["status"], minlength=len(counts))
        return Counter({name: int(n) for name, n in zip(codes.names, counts, strict=True) if n})

    @property
    def _good(self) -> int | None:
        return None if self._latest_wins else 0

    def _spooled(self, commits: list[Commit]) -> tuple[KeySpool, StatusCodes]:
        """Keys and statuses of every committed row; without a status all are ok."""
        spool, codes = KeySpool(), StatusCodes(Status.OK)
        has_status = "status" in self.schema.names
        columns = [*self.key, *(["status"] if has_status else [])]
        for _, _, table in self._row_groups(commits, columns):
            of = codes.of(table.column("status")) if has_status else np.uint8(0)
            spool.add(table, key=self.key, statuses=np.broadcast_to(of, table.num_rows))
        return spool, codes

    def content(self, *, columns: list[str] | None = None) -> str:
        """Hash of the rows that `read` gives; for stages whose result depends on the whole input.

        Parts, their sizes and rows that have been replaced do not matter.
        """
        return content_of(self.read(columns=columns))

    def _keys(self, table: pa.Table) -> list[str]:
        columns = [table.column(name).to_pylist() for name in self.key]
        return [_KEY_SEPARATOR.join(parts) for parts in zip(*columns, strict=True)]

    def _read_part(
        self, commit: Commit, columns: list[str], only: pc.Expression | None
    ) -> pa.Table:
        path = f"{self._root}/data/{commit.part}.parquet"
        try:
            table = pq.read_table(
                path,
                columns=columns,
                filters=only,
                filesystem=self._fs,
                page_checksum_verification=True,
            )
        except (OSError, pa.ArrowInvalid) as error:
            raise _unreadable(path, error) from error
        if only is not None:
            return table
        if table.num_rows != commit.rows:
            raise StorageError(f"{path}: {table.num_rows} rows, its commit says {commit.rows}")
        if set(self.key) <= set(columns) and _digest_keys(self._keys(table)) != commit.keys_digest:
            raise StorageError(f"{path} holds other rows than were committed; put it back")
        return table


class Ledger(Protocol):
    """What computing rows asks of an artifact, or of several that are filled together."""

    @property
    def place(self) -> Place:
        """A folder of its own."""

    @property
    def key(self) -> tuple[str, ...]:
        """Names of the key columns of planned rows."""

    def anti_join(self, *, retry: Collection[str] = ()) -> AntiJoin:
        """See `Artifact.anti_join`."""

    def commit(self, part: str, table: pa.Table) -> Commit:
        """See `Artifact.commit`."""

    def committed(self, part: str) -> Commit | None:
        """See `Artifact.committed`."""

    def compact(self, *, beyond: int = 1) -> int:
        """See `Artifact.compact`."""


def equal_blocks(table: pa.Table, rows: int) -> list[pa.Table]:
    """Cuts a table into blocks of so many rows; the last one may hold fewer."""
    return [table.slice(i, rows) for i in range(0, table.num_rows, rows)]


def check_share(artifact: Artifact, limit: float) -> dict[str, int]:
    """Counts rows by status and fails the stage where too many of them failed.

    Raises:
        QualityError: The share of rows that are neither ok nor set aside by rule passes `limit`.
    """
    counts = artifact.statuses()
    total = counts.total()
    failed = total - counts[Status.OK] - counts[Status.FILTERED]
    if total and failed / total > limit:
        examples = list(islice(_failed(artifact), 3))
        raise QualityError(
            f"{artifact.name}: {failed} of {total} rows failed ({failed / total:.0%}), limit "
            f"{limit:.0%}: {dict(counts)}\n"
            + "\n".join(f"  {row}" for row in examples)
            + "\nNothing is lost. If the engine failed, run again with --retry error; the other "
            "answers come out the same, so change the stage's sampling or raise max_failed_share."
        )
    return dict(counts)


def _failed(artifact: Artifact) -> Iterator[dict[str, Any]]:
    for table in artifact.rows(columns=[*artifact.key, "status", "detail"]):
        for row in table.to_pylist():
            if row["status"] not in (Status.OK, Status.FILTERED):
                yield row


def _unreadable(path: str, error: OSError | pa.ArrowInvalid) -> StorageError:
    if isinstance(error, OSError):
        explained = storage_error(path, error, doing="read")
        if isinstance(explained, AccessError):
            return explained
    return StorageError(f"{path} is committed but cannot be read: {error}")


def _digest_keys(keys: list[str]) -> str:
    return stable_hash(*sorted(keys), size=16)


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """One line for each field of two flat identities that differs."""
    absent = "(absent)"
    return [
        f"{field}: made with {stored.get(field, absent)!r}, now {wanted.get(field, absent)!r}"
        for field in sorted(stored.keys() | wanted.keys())
        if stored.get(field, absent) != wanted.get(field, absent)
    ]


def digest(file: Path) -> str:
    """Short hash of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()[:16]


def link_tree(source: Path, target: Path) -> None:
    """A second name for every file below `source`; whole or not there.

    Parts are immutable and records are replaced, never changed, so two runs can share the bytes.

    Raises:
        StorageError: A file cannot be linked (another file system) or the folder not written.
    """
    scratch = target.with_name(f".{target.name}-{uuid.uuid4().hex[:12]}")
    try:
        shutil.copytree(source, scratch, copy_function=os.link, ignore=_unfinished)
        scratch.rename(target)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise StorageError(f"cannot take over {source} as {target}: {error}") from error


def _unfinished(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(".") or name == TODO}


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds a run directory for one driver; the kernel lets go when the process dies.

    Raises:
        StorageError: Another driver holds it, or the directory cannot be written.
    """
    with _flock(run_dir / ".lock", fcntl.LOCK_EX):
        yield


@contextmanager
def locked_part(run_dir: Path, part: str) -> Iterator[None]:
    """Holds one shard of a stage; other shards of the same cut may be held, the whole may not.

    Args:
        run_dir: Of the run.
        part: Such as `generate 2/4`.

    Raises:
        StorageError: As `locked`; or a driver works on this shard, or on shards of another number.
    """
    stage, _, shard = part.partition(" ")
    index, _, of = shard.partition("/")
    with ExitStack() as held:
        held.enter_context(_flock(run_dir / ".lock", fcntl.LOCK_SH))
        mine = run_dir / f".lock-{stage}-of-{of}"
        held.enter_context(_flock(mine, fcntl.LOCK_SH))
        for other in run_dir.glob(f".lock-{stage}-of-*"):
            if other != mine:  # shards of another number share rows with all of these
                with _flock(other, fcntl.LOCK_EX):
                    pass
        held.enter_context(_flock(run_dir / f".lock-{stage}-{index}-of-{of}", fcntl.LOCK_EX))
        yield


@contextmanager
def _flock(file: Path, kind: int) -> Iterator[None]:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+")
    except OSError as error:
        raise storage_error(str(file.parent), error) from error
    with handle:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as error:
            handle.seek(0)
            who = handle.read().strip() or "another driver"
            raise StorageError(f"{file.parent} is in use by {who}; wait or stop it") from error
        except OSError as error:
            raise storage_error(str(file.parent), error, doing="lock") from error
        handle.truncate(0)
        # Of many that share a lock, the last to come may be the first to go.
        handle.write(_myself() if kind == fcntl.LOCK_EX else "another driver, for a shard")
        handle.flush()
        yield


def _myself() -> str:
    """Who holds a lock, for whom it is refused: a job's name, or a process."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    job = (submitted.get("metadata") or {}).get("job_submission_id")
    here = f"process {os.getpid()} on {os.uname().nodename}"
    return f"another driver (job {job}, {here})" if job else f"another driver ({here})"


def _one_a_key(table: pa.Table, key: tuple[str, ...], *, latest_wins: bool) -> pa.Table:
    """The first ok row of each key, else the newest; rows without a status count as ok."""
    position = pa.array(range(table.num_rows), pa.int64())
    good = pa.nulls(table.num_rows, pa.int64()) if latest_wins else position
    if not latest_wins and "status" in table.column_names:
        good = pc.if_else(pc.equal(table.column("status"), "ok"), position, None)
    numbered = table.append_column("__row", position).append_column("__good", good)
    found = numbered.group_by(list(key)).aggregate([("__row", "max"), ("__good", "min")])
    order = found.sort_by([(name, "ascending") for name in key])
    return _take(table, pc.coalesce(order.column("__good_min"), order.column("__row_max")))


def _take(table: pa.Table, rows: pa.ChunkedArray) -> pa.Table:
    """Rows of a table of any size; `Table.take` fails once a column holds 2 GiB of strings."""
    wide = table.cast(
        pa.schema([field.with_type(_wide(field.type)) for field in table.schema])
    ).combine_chunks()
    step = max(1, _BLOCK_BYTES * table.num_rows // max(1, table.nbytes))
    starts = range(0, max(1, len(rows)), step)
    return pa.concat_tables(wide.take(rows.slice(i, step)).cast(table.schema) for i in starts)


def _wide(kind: pa.DataType) -> pa.DataType:
    """The same type with 64-bit offsets."""
    if pa.types.is_string(kind):
        return pa.large_string()
    if pa.types.is_list(kind):
        return pa.large_list(kind.value_field.with_type(_wide(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_wide(field.type)) for field in kind])
    return kind


def _as(kind: type[_Record], record: dict[str, Any], path: str) -> _Record:
    try:
        return kind(**record)
    except TypeError as error:
        raise StorageError(
            f"{path} has fields of another version of this software ({error}); read it with that "
            "one, or use another run_dir"
        ) from error


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=False).encode()
