"""Where things lie: a folder of this machine, or a prefix of an object store (`pyarrow.fs` URI).

A write is whole or not there: renamed into place where the file system has that, one PUT where it
has not. Nothing here knows what is stored.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from reasonembed.errors import AccessError, StorageError

_CHUNK = 2**22
_AT_ONCE = 16  # requests for small objects; each waits for most of its time
KEY_IN_QUERY = r"[?&](?i:sig|[\w.-]*(secret|password|token|_key))=[^&\s]"
_UNQUOTED = "/=+,:@~!$&'()*"


class Place:
    """A file or folder at a URI or a path; whether it is there is another question.

    Keys of an object store come from where its own programs look for them (`AWS_…` variables, a
    role, a profile), on every machine for itself; they are never part of a URI.

    Args:
        uri: `s3://bucket/prefix`, `gs://…`, `file:///…`, or a path, made absolute. A query part,
            such as `?endpoint_override=localhost:9000&scheme=http`, stands behind all places below.

    Raises:
        AccessError: `pyarrow.fs` does not know such a location, or a key stands in it.
        StorageError: The store cannot be asked where it lies.
    """

    fs: pafs.FileSystem
    path: str
    _head: str
    _query: str

    def __init__(self, uri: str | Path | Place) -> None:
        if isinstance(uri, Place):
            self.fs, self.path, self._head, self._query = uri.fs, uri.path, uri._head, uri._query
        elif not is_uri(text := str(uri)):
            self.fs, self.path = pafs.LocalFileSystem(), str(Path(text).absolute())
            self._head, self._query = self.path, ""
        else:
            head, mark, query = text.partition("?")
            self.fs, self.path = _filesystem(text)
            self._head, self._query = head.rstrip("/"), mark + query
            if self.is_local:
                self._head, self._query = self.path, ""

    def _beside(self, path: str, head: str) -> Place:
        """Another place of the same store; nothing is looked up for it."""
        place = object.__new__(Place)
        place.fs, place.path, place._head, place._query = self.fs, path, head, self._query
        return place

    @property
    def is_local(self) -> bool:
        """Whether it lies on a file system of this machine."""
        return isinstance(self.fs, pafs.LocalFileSystem)

    @property
    def uri(self) -> str:
        """What makes this place again, on any machine."""
        return self._head + self._query

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def parent(self) -> Place:
        """The folder that it lies in."""
        return self._beside(self.path.rpartition("/")[0], self._head.rpartition("/")[0])

    @property
    def local(self) -> Path:
        """As a path of this machine.

        Raises:
            StorageError: It lies in an object store.
        """
        if not self.is_local:
            raise StorageError(
                f"{self.uri} is no folder of this machine, and one is needed here; copy it to one "
                "with the store's own program"
            )
        return Path(self.path)

    def __truediv__(self, name: str) -> Place:
        part = name if self.is_local else quote(name, safe=_UNQUOTED)
        return self._beside(f"{self.path}/{name}", f"{self._head}/{part}")

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"Place({self.uri!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Place) and self.uri == other.uri

    def __hash__(self) -> int:
        return hash(self.uri)

    def __reduce__(self) -> tuple[type[Place], tuple[str]]:
        return Place, (self.uri,)

    def info(self) -> pafs.FileInfo:
        """Kind, size and time of change.

        Raises:
            StorageError: The store cannot be asked.
        """
        try:
            return self.fs.get_file_info(self.path)
        except OSError as error:
            raise storage_error(self.uri, error, doing="read") from error

    def is_file(self) -> bool:
        """Whether a file is there."""
        return bool(self.info().type == pafs.FileType.File)

    def is_dir(self) -> bool:
        """Whether a folder is there; in an object store, whether anything lies below it."""
        return bool(self.info().type == pafs.FileType.Directory)

    def children(self) -> list[Place]:
        """What lies directly in it, by name; nothing where it is not there.

        Raises:
            StorageError: The store cannot be asked.
        """
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        try:
            found = self.fs.get_file_info(selector)
        except OSError as error:
            raise storage_error(self.uri, error, doing="read") from error
        return [self / name for name in sorted(info.base_name for info in found)]

    def read(self) -> bytes | None:
        """A file's bytes; None where there is none.

        Raises:
            StorageError: It cannot be read.
        """
        try:
            with self.fs.open_input_stream(self.path) as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(self.uri, error, doing="read") from error

    def write(self, data: bytes) -> None:
        """Writes a file, whole or not at all, and its folder where that is missing.

        Raises:
            StorageError: Full, read-only, or not permitted.
        """
        try:
            if self.is_local:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                _write_durably(self.local, data)
            else:  # an object store shows an object only when it is complete
                self._put_object(data)
        except OSError as error:
            raise storage_error(self.uri, error) from error

    def _put_object(self, data: bytes) -> None:
        try:
            with self.fs.open_output_stream(self.path) as stream:
                stream.write(data)
        except FileNotFoundError:  # a store that has folders, such as HDFS
            self.fs.create_dir(self.path.rpartition("/")[0], recursive=True)
            with self.fs.open_output_stream(self.path) as stream:
                stream.write(data)

    def delete(self) -> None:
        """Deletes a file, or a folder with everything in it; nothing where it is not there.

        Raises:
            StorageError: Something in it cannot be deleted.
        """
        try:
            kind = self.fs.get_file_info(self.path).type
            if kind == pafs.FileType.Directory:
                self.fs.delete_dir(self.path)
            elif kind == pafs.FileType.File:
                self.fs.delete_file(self.path)
        except OSError as error:
            raise storage_error(self.uri, error, doing="delete") from error

    def append(self, row: dict[str, Any]) -> None:
        """Adds an object to a log that several processes may add to; see `rows`.

        Raises:
            StorageError: It cannot be written.
        """
        if self.is_local:
            try:
                self.local.parent.mkdir(parents=True, exist_ok=True)
                append_json_line(self.local, row)
            except OSError as error:
                raise storage_error(self.uri, error) from error
        else:  # objects cannot grow, so each row is one
            name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.json"
            (self._rows / name).write(json.dumps(row, ensure_ascii=False).encode())

    def rows(self) -> list[dict[str, Any]]:
        """What was added by `append`, oldest first.

        Raises:
            StorageError: It cannot be read.
        """
        if self.is_local:
            return json_lines(self.local)
        found = self._rows.children()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            parts = list(pool.map(Place.read, found))
        return objects("\n".join((part or b"").decode() for part in parts))

    @property
    def _rows(self) -> Place:
        return self._beside(f"{self.path}.d", f"{self._head}.d")

    def put(self, source: Path) -> None:
        """Copies a file or a folder of this machine to here, over what is here.

        Raises:
            StorageError: It cannot be written.
        """
        try:
            _copy(pafs.LocalFileSystem(), str(source), self.fs, self.path)
        except OSError as error:
            raise storage_error(self.uri, error) from error

    def fetch(self, target: Path) -> bool:
        """Copies the file or folder that lies here to this machine, in place of what is there.

        Returns:
            Whether anything lies here; if not, nothing is there afterwards either.

        Raises:
            StorageError: It cannot be read, or not be written there.
        """
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")
        kind = self.info().type
        if kind == pafs.FileType.NotFound:
            _remove(target)
            return False
        try:
            _remove(scratch)
            # Object stores have no folders, so nobody else makes this one.
            folder = scratch if kind == pafs.FileType.Directory else scratch.parent
            folder.mkdir(parents=True, exist_ok=True)
            _copy(self.fs, self.path, pafs.LocalFileSystem(), str(scratch))
        except OSError as error:
            _remove(scratch)
            raise storage_error(self.uri, error, doing="read") from error
        _remove(target)
        scratch.replace(target)
        return True

    def share(self, target: Place) -> None:
        """Copies a stage's folder from one place to another, its identity last.

        Within one store no byte passes this machine. Killed half way, the target has no identity,
        and is copied again.

        Raises:
            StorageError: It cannot be read or written.
        """
        last, waiting = "_stage.json", "_todo"
        try:
            for child in sorted(self.children(), key=lambda child: child.name == last):
                if not child.name.startswith(".") and child.name != waiting:
                    _copy(child.fs, child.path, target.fs, f"{target.path}/{child.name}")
        except OSError as error:
            raise storage_error(target.uri, error) from error

    def digest(self) -> str:
        """Short hash of a file's bytes, which need not fit into memory.

        Raises:
            StorageError: It cannot be read.
        """
        total = hashlib.blake2b()
        try:
            with self.fs.open_input_stream(self.path) as stream:
                while chunk := stream.read(_CHUNK):
                    total.update(chunk)
        except OSError as error:
            raise storage_error(self.uri, error, doing="read") from error
        return total.hexdigest()[:16]

    def files(self) -> list[pafs.FileInfo]:
        """All files below it, by path; one request for a thousand.

        Raises:
            StorageError: The store cannot be asked.
        """
        selector = pafs.FileSelector(self.path, allow_not_found=True, recursive=True)
        try:
            found = self.fs.get_file_info(selector)
        except OSError as error:
            raise storage_error(self.uri, error, doing="read") from error
        return sorted(
            (one for one in found if one.type == pafs.FileType.File), key=lambda one: str(one.path)
        )

    def check(self) -> None:
        """Finds out whether the store answers and the bucket is there; a local place is fine.

        Raises:
            StorageError: What is wrong, with the cure.
        """
        if self.is_local:
            return
        bucket = self.path.partition("/")[0]
        if not bucket:
            return
        try:
            kind = self.fs.get_file_info(bucket).type
        except OSError as error:
            raise storage_error(self.uri, error, doing="read") from error
        if kind == pafs.FileType.NotFound:
            raise AccessError(f"cannot read {self.uri}: {_NO_BUCKET}")


def is_uri(text: str) -> bool:
    """Whether a text is an address, not a path of this machine."""
    return "://" in text


def last_part(text: str) -> str:
    """The name of what a path, a hub id or a URI names, without the URI's query part."""
    return Path(text.partition("?")[0] if is_uri(text) else text).name


def check_uri(uri: str) -> None:
    """Refuses what can be told from the text of a location alone; nothing is asked for.

    Raises:
        AccessError: There is no such kind of location, or a key stands in it.
    """
    if not is_uri(uri):
        return
    parts = urlsplit(uri)
    if parts.scheme not in _SCHEMES:
        raise AccessError(
            f"{uri} is not a storage location that pyarrow.fs knows; give a folder, or one of "
            f"{', '.join(f'{scheme}://' for scheme in _SCHEMES)}"
        )
    shown = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    is_named = parts.password is not None or (parts.scheme == "s3" and parts.username)
    if is_named or re.search(KEY_IN_QUERY, f"?{unquote(parts.query)}"):
        raise AccessError(
            f"{shown}: a key stands in this address, and would be written down with the "
            "configuration; take it out and give it by the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AZURE_CLIENT_SECRET, or a role) of every machine"
        )
    if "#" in uri:  # what follows would be lost
        raise AccessError(f"{shown}: an address ends at its #; write it as %23")


_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file", "mock")


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


def _filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    check_uri(uri)
    parts = urlsplit(uri)
    query = parts.query
    if parts.scheme == "s3" and "allow_delayed_open" not in query:
        query += f"{'&' * bool(query)}allow_delayed_open=true"  # a small object is one request
    root = f"{parts.scheme}://{parts.netloc}/"
    try:
        filesystem, top = _connect(root + (f"?{query}" if query else ""))
        # Only pyarrow knows what of an address is the path; it asks nobody for that.
        path = pafs.FileSystem.from_uri(uri)[1] if parts.scheme not in ("s3", "mock") else ""
    except OSError as error:  # the store was asked for its region
        raise storage_error(uri, error, doing="read") from error
    except pa.ArrowInvalid as error:
        raise AccessError(
            f"{uri} is not a storage location that pyarrow.fs knows: {error}; see the URIs in its "
            "documentation"
        ) from error
    if not path:
        path = "/".join(filter(None, (top.strip("/"), unquote(parts.path).strip("/"))))
    return filesystem, path.rstrip("/") if len(path) > 1 else path


@lru_cache(maxsize=64)
def _connect(root: str) -> tuple[pafs.FileSystem, str]:
    """A store, once in a process: every connection begins with threads and a look for a key."""
    filesystem, top = pafs.FileSystem.from_uri(root)
    return filesystem, str(top)


def _copy(source_fs: pafs.FileSystem, source: str, target_fs: pafs.FileSystem, target: str) -> None:
    def copy() -> None:
        pafs.copy_files(
            source, target, source_filesystem=source_fs, destination_filesystem=target_fs
        )

    try:
        copy()
    except FileNotFoundError:  # the target has folders
        is_folder = source_fs.get_file_info(source).type == pafs.FileType.Directory
        target_fs.create_dir(target if is_folder else target.rpartition("/")[0], recursive=True)
        copy()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _write_durably(path: Path, data: bytes) -> None:
    # Pods that share a disk may share a process number, and threads do.
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex[:12]}")
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


_NO_BUCKET = "there is no such bucket; create it, or correct run_dir"
_AGAIN = "start again, nothing that is committed is lost"
_CURES = {
    errno.ENOSPC: "the disk is full; free space and run again, nothing committed is lost",
    errno.EACCES: "no permission to {doing} here; choose another run_dir",
    errno.EPERM: "no permission to {doing} here; choose another run_dir",
    errno.EROFS: "the file system is read-only; choose another run_dir",
    errno.ENOTDIR: "a part of this path is a file; choose another run_dir",
    errno.EEXIST: "a part of this path is a file; choose another run_dir",
}
# Stores say it in words: those of S3 as Arrow hands them on, of GCS and of Azure.
_SAID: tuple[tuple[str, str, type[StorageError]], ...] = (
    (r"NO_SUCH_BUCKET|NoSuchBucket|Bucket '.*' not found|bucket does not exist|ContainerNotFound",
     _NO_BUCKET, AccessError),
    (r"EXPIRED|ExpiredToken|TokenRefreshRequired|invalid_grant",
     "the key has expired; fetch a new one (AWS_SESSION_TOKEN, aws sso login, …) on every machine, "
     "then " + _AGAIN, AccessError),
    (r"INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|InvalidToken|UNRECOGNIZED_CLIENT|"
     r"SIGNATURE_DOES_NOT_MATCH|InvalidAccessKeyId|SignatureDoesNotMatch|AuthenticationFailed",
     "the store does not know this key; correct AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or "
     "the role, or the profile) on every machine", AccessError),
    (r"ACCESS_DENIED|AccessDenied|FORBIDDEN|PERMISSION_DENIED|AuthorizationFailure|"
     r"AuthorizationPermissionMismatch|status(?: code)?:? 40[13]",
     "no permission to {doing} here: there is no key on this machine, or its owner may not "
     "{doing}; give AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role that may, on every "
     "machine", AccessError),
    (r"MOVED_PERMANENTLY|PERMANENT_REDIRECT|PermanentRedirect|status(?: code)?:? 301",
     "the bucket lies in another region; name it: …?region=eu-central-1, or AWS_REGION",
     AccessError),
    (r"status(?: code)?:? 400",
     "the store refuses without a reason, as it does with an expired or mistyped key and with a "
     "wrong region; fetch a new key, then " + _AGAIN, AccessError),
    (r"(?i)quota|StorageFull|InsufficientStorage|no space|status(?: code)?:? 507",
     "the storage is full; free space, then " + _AGAIN, StorageError),
    (r"NETWORK_CONNECTION|Could not resolve|Could not connect|Timeout was reached",
     "the store cannot be reached from this machine; look at the address, AWS_ENDPOINT_URL and "
     "the network, then " + _AGAIN, StorageError),
    (r"SLOW_DOWN|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|INTERNAL_FAILURE|THROTTLING|"
     r"status(?: code)?:? 50[0234]",
     "the store is overloaded; " + _AGAIN, StorageError),
)  # fmt: skip


def storage_error(path: str, error: OSError, *, doing: str = "write") -> StorageError:
    """An error of a store as one of ours: why the place cannot be used, and what to do."""
    start = f"cannot {doing} {path}: "
    if cure := _CURES.get(error.errno or 0):
        kind = StorageError if error.errno == errno.ENOSPC else AccessError
        return kind(start + cure.format(doing=doing))
    said = str(error)
    for pattern, cure, kind in _SAID:
        if re.search(pattern, said):
            return kind(f"{start}{cure.format(doing=doing)} ({said})")
    return StorageError(start + said)
