"""A stage's directory: commits, manifest, resume by anti-join, drift check.

    <artifact>/data/<part>.parquet      immutable; invisible until its commit exists
    <artifact>/_commits/<part>.json     what the part holds; written after the data is on disk
    <artifact>/_stage.json              the identity that made it: configuration, prompts, inputs

Exactly once, by construction: readers see committed parts only and take one row of a key, the first
that is ok (a straggler's later row never replaces what other stages have used), else the newest;
a stage started again computes planned keys minus committed keys. The order "data, then commit" is
what makes a kill at any moment harmless.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from reasonembed.config import fingerprint
from reasonembed.errors import DriftError, QualityError, SchemaError, StorageError
from reasonembed.schemas import ARTIFACTS, Status, conform, stable_hash

_KEY_SEPARATOR = "\x1f"
_STAGE = "_stage.json"
_Record = TypeVar("_Record")
Mapper = Callable[[pa.Table], pa.Table]
"""Planned rows of an artifact → its rows."""
_ROW_GROUP = 8_192  # rows that a reader holds at once where it goes through a part
_BLOCK_BYTES = 2**30  # half of what 32-bit offsets reach, for rows are not all of one length


@dataclass(frozen=True)
class Commit:
    """One committed part."""

    part: str
    rows: int
    keys_digest: str  # of the sorted keys; the pages themselves carry checksums
    statuses: dict[str, int]
    committed_at_ns: int


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
        self._fs, self._root = _filesystem(self.uri)

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
        showed before anything was made costs nothing.

        Args:
            identity: What decides the result, flat.
            version: Of this software; kept for people.
            may_change: Which fields may differ from those that made it; the new identity is then
                noted and the rows stay.
            cure: What to do about another identity, for the message.

        Raises:
            DriftError: It was made with another identity; the fields that differ are named.
            StorageError: The directory cannot be written.
        """
        stored = self.stage()
        if stored is not None and may_change is not None:
            grown = {key: value for key, value in identity.items() if may_change(key)}
            kept = {key: value for key, value in stored.identity.items() if not may_change(key)}
            if kept | grown == identity != stored.identity:
                stored = None
        if stored is None or (stored.identity != identity and self._is_empty()):
            stage = Stage(name=self.name, identity=identity, version=version)
            self._write(f"{self._root}/{_STAGE}", _json(asdict(stage)))
            return
        if changes := differences(stored.identity, identity):
            raise DriftError(
                f"{self.uri} was made with another configuration:\n"
                + "\n".join(f"  {change}" for change in changes)
                + f"\n{cure}"
            )

    def stage(self) -> Stage | None:
        """The identity that made this; None where nothing was begun."""
        raw = self._record(f"{self._root}/{_STAGE}")
        return None if raw is None else _as(Stage, raw, f"{self._root}/{_STAGE}")

    def _is_empty(self) -> bool:
        found = self._fs.get_file_info(pafs.FileSelector(self._root, allow_not_found=True))
        return all(info.base_name == _STAGE for info in found)

    def finish(self, summary: dict[str, Any]) -> None:
        """Marks the stage as done, with what is worth knowing about it (counts, figures)."""
        self._write(f"{self._root}/_done.json", _json(summary))

    def finished(self) -> dict[str, Any] | None:
        """The summary of a stage that is done; None while it is not."""
        return self._record(f"{self._root}/_done.json")

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
            raise StorageError(_say(self.uri, error, doing="delete")) from error

    def _write(self, path: str, data: bytes) -> None:
        try:
            self._fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
            if isinstance(self._fs, pafs.LocalFileSystem):
                _write_durably(Path(path), data)
            else:  # an object store shows an object only when it is complete
                with self._fs.open_output_stream(path) as stream:
                    stream.write(data)
        except OSError as error:
            raise StorageError(_say(path, error)) from error

    def _read(self, path: str) -> bytes | None:
        try:
            with self._fs.open_input_stream(path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StorageError(_say(path, error, doing="read")) from error

    def _record(self, path: str) -> dict[str, Any] | None:
        """A JSON object; None where there is no such file."""
        raw = self._read(path)
        try:
            return None if raw is None else dict(json.loads(raw))
        except ValueError as error:
            raise StorageError(
                f"{path} is damaged ({error}); put it back, or discard this stage"
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
        self._write(f"{self._root}/data/{part}.parquet", sink.getvalue().to_pybytes())
        statuses = table.column("status").to_pylist() if "status" in table.column_names else []
        record = Commit(
            part=part,
            rows=table.num_rows,
            keys_digest=_digest_keys(keys),
            statuses=dict(Counter(statuses)),
            committed_at_ns=time.time_ns(),
        )
        self._write(f"{self._root}/_commits/{part}.json", _json(asdict(record)))
        return record

    def _is_empty(self) -> bool:
        return not self.commits() and self.finished() is None

    # ---- reading ----------------------------------------------------------------------------

    def commits(self) -> list[Commit]:
        """All commits, oldest first."""
        selector = pafs.FileSelector(f"{self._root}/_commits", allow_not_found=True)
        records = []
        for info in self._fs.get_file_info(selector):
            if not info.base_name.startswith(".") and info.base_name.endswith(".json"):
                record = self._record(info.path)
                assert record is not None, f"{info.path} vanished while it was read"
                records.append(_as(Commit, record, info.path))
        return sorted(records, key=lambda record: (record.committed_at_ns, record.part))

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
        parts = [self._read_part(commit, columns, only) for commit in self.commits()]
        schema = pa.schema([self.schema.field(name) for name in columns])
        return pa.concat_tables(parts) if parts else schema.empty_table()

    def row_groups(self, *, columns: list[str]) -> Iterator[tuple[str, int, pa.Table]]:
        """Every committed row as it lies, oldest part first, a bounded number at a time.

        Yields:
            Part, number of the row group in it, and its rows; replaced rows too.

        Raises:
            StorageError: As `read`.
        """
        for commit in self.commits():
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
            raise StorageError(f"{path} is committed but cannot be read: {error}") from error

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

    def keys(self, *, retry: Collection[str] = ()) -> set[str]:
        """Keys that need no computation: committed, and not of a status to be retried."""
        has_status = "status" in self.schema.names
        table = self.read(columns=[*self.key, *(["status"] if has_status else [])])
        if has_status and retry:
            table = table.filter(
                pc.invert(pc.is_in(table.column("status"), value_set=pa.array(list(retry))))
            )
        return set(self._keys(table))

    def missing(self, planned: pa.Table, *, retry: Collection[str] = ()) -> pa.Table:
        """The anti-join: rows of `planned` whose key is not committed (or is to be retried)."""
        done = self.keys(retry=retry)
        return planned.filter(
            pa.array([key not in done for key in self._keys(planned)], pa.bool_())
        )

    def statuses(self) -> Counter[str]:
        """Rows by status, one row a key."""
        if "status" not in self.schema.names:
            return Counter({"ok": len(self.keys())})
        return Counter(self.read(columns=["status"]).column("status").to_pylist())

    def content(self, *, columns: list[str] | None = None) -> str:
        """Hash of the rows that `read` gives; for stages whose result depends on the whole input.

        Parts, their sizes and rows that have been replaced do not matter.
        """
        sink = pa.BufferOutputStream()
        pq.write_table(self.read(columns=columns), sink)
        return hashlib.blake2b(sink.getvalue(), digest_size=16).hexdigest()

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
            raise StorageError(f"{path} is committed but cannot be read: {error}") from error
        if only is not None:
            return table
        if table.num_rows != commit.rows:
            raise StorageError(f"{path}: {table.num_rows} rows, its commit says {commit.rows}")
        if set(self.key) <= set(columns) and _digest_keys(self._keys(table)) != commit.keys_digest:
            raise StorageError(f"{path} holds other rows than were committed; put it back")
        return table


class Ledger(Protocol):
    """What computing rows asks of an artifact, or of several that are filled together."""

    def missing(self, planned: pa.Table, *, retry: Collection[str] = ()) -> pa.Table:
        """See `Artifact.missing`."""

    def commit(self, part: str, table: pa.Table) -> Commit:
        """See `Artifact.commit`."""

    def commits(self) -> list[Commit]:
        """See `Artifact.commits`."""


class CommittedRows:
    """Rows committed since it was made."""

    def __init__(self, artifact: Ledger) -> None:
        self._artifact = artifact
        self._before = self._count()

    def new(self) -> int:
        """Rows committed since then."""
        return self._count() - self._before

    def _count(self) -> int:
        return sum(commit.rows for commit in self._artifact.commits())


def equal_blocks(table: pa.Table, rows: int) -> list[pa.Table]:
    """Cuts a table into blocks of so many rows; the last one may hold fewer."""
    return [table.slice(i, rows) for i in range(0, table.num_rows, rows)]


def check_share(artifact: Artifact, limit: float) -> dict[str, int]:
    """Counts rows by status and fails the stage where too many of them failed.

    Raises:
        QualityError: The share of rows that are neither ok nor set aside by rule passes `limit`.
    """
    counts = artifact.statuses()
    total = sum(counts.values())
    failed = total - counts[Status.OK] - counts[Status.FILTERED]
    if total and failed / total > limit:
        rows = artifact.read(columns=[*artifact.key, "status", "detail"]).to_pylist()
        examples = [row for row in rows if row["status"] not in (Status.OK, Status.FILTERED)][:3]
        raise QualityError(
            f"{artifact.name}: {failed} of {total} rows failed ({failed / total:.0%}), limit "
            f"{limit:.0%}: {dict(counts)}\n"
            + "\n".join(f"  {row}" for row in examples)
            + "\nNothing is lost. If the engine failed, run again with --retry error; the other "
            "answers come out the same, so change the stage's sampling or raise max_failed_share."
        )
    return dict(counts)


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
    scratch = target.with_name(f".{target.name}-{os.getpid()}")
    try:
        shutil.copytree(source, scratch, copy_function=os.link, ignore=_unfinished)
        scratch.rename(target)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise StorageError(f"cannot take over {source} as {target}: {error}") from error


def _unfinished(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.startswith(".")}


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a log that processes append to; a line that a kill cut short is left out."""
    if not path.is_file():
        return []
    return objects(path.read_text(encoding="utf-8", errors="replace"))


def objects(text: str) -> list[dict[str, Any]]:
    """The JSON objects among the lines of a text; other lines are left out."""
    found = []
    for line in text.split("\n"):
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                found.append(row)
    return found


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Appends one object; begins on a line of its own even if the last writer was killed."""
    with path.open("a+b") as stream:
        torn = False
        if stream.tell() > 0:
            stream.seek(-1, os.SEEK_END)
            torn = stream.read() != b"\n"
        stream.write(b"\n" * torn + json.dumps(value, ensure_ascii=False).encode() + b"\n")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds a run directory for one driver; the kernel lets go when the process dies.

    Raises:
        StorageError: Another driver holds it, or the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = (run_dir / ".lock").open("w")
    except OSError as error:
        raise StorageError(_say(str(run_dir), error)) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StorageError(f"{run_dir} is in use by another driver; wait or stop it") from error
        yield


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


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).absolute())
    try:
        filesystem, path = pafs.FileSystem.from_uri(uri)
    except (pa.ArrowInvalid, OSError) as error:
        raise StorageError(
            f"{uri} is not a storage location that pyarrow.fs knows: {error}"
        ) from error
    return filesystem, path


def _write_durably(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:  # an interrupt, too, leaves nothing behind
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _say(path: str, error: OSError, *, doing: str = "write") -> str:
    cures = {
        errno.ENOSPC: "the disk is full; free space and run again, nothing committed is lost",
        errno.EACCES: f"no permission to {doing} here; choose another run_dir",
        errno.EPERM: f"no permission to {doing} here; choose another run_dir",
        errno.EROFS: "the file system is read-only; choose another run_dir",
        errno.ENOTDIR: "a part of this path is a file; choose another run_dir",
        errno.EEXIST: "a part of this path is a file; choose another run_dir",
    }
    return f"cannot {doing} {path}: {cures.get(error.errno or 0, str(error))}"


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
