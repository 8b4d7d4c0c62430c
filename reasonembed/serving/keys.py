"""API keys: a file of names and hashes, read again when it changes.

A line is `NAME SHA256 [COMMENT]`; empty lines and those that begin with # are passed over. The file
holds no key: one is shown once, when it is made. Keys are 32 random bytes, so that one round of
SHA-256 is enough; a password chosen by a person would need a slow hash.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from reasonembed.config import ServeConfig
from reasonembed.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "reasonembed_"
"""Keys begin with it, so that people and scanners of secrets know one when they see it."""
CHECK_EVERY_S = 1.0
_HEADER = "# NAME SHA256 [COMMENT]; written by `reasonembed keys`\n"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}", re.ASCII)
_HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)
_Version = tuple[int, ...]


@dataclass(frozen=True)
class StoredKey:
    """A line of the file.

    Attributes:
        name: Of whom the key was made for; goes into logs.
        sha256: Of the key, 64 hex digits.
        comment: What else the line says.
    """

    name: str
    sha256: str
    comment: str = ""

    def line(self) -> str:
        """As the file holds it."""
        return " ".join(part for part in (self.name, self.sha256, self.comment) if part)


class KeyFile:
    """The keys that a service takes.

    Args:
        path: The file; it is looked at again at most once in `CHECK_EVERY_S` seconds, so a key that
            was added or removed counts without a restart. A file that vanishes or breaks leaves the
            last good keys in force and logs an error; an empty one refuses everybody.
        clock: Seconds; tests give their own.

    Raises:
        ConfigError: The file cannot be read or has a line that is none.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = Path(path), clock
        self._checked = clock()
        self._complaint = ""
        self._keys, self._version = _load(self._path)
        self._note()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the keys in force."""
        return tuple(key.name for key in self._keys)

    def name_of(self, key: bytes) -> str | None:
        """Whose key this is; None where it is nobody's.

        Every stored hash is compared, each in constant time: how long it takes tells nothing.
        """
        self._refresh()
        given = hashlib.sha256(key).hexdigest()
        found = None
        for stored in self._keys:
            if hmac.compare_digest(stored.sha256, given):
                found = stored.name
        return found

    def _refresh(self) -> None:
        now = self._clock()
        if now - self._checked < CHECK_EVERY_S:
            return
        self._checked = now
        try:
            if _version_of(self._path.stat()) == self._version and not self._complaint:
                return
            keys, version = _load(self._path)
        except (OSError, ConfigError) as error:
            self._complain(str(error))
            return
        is_changed, self._complaint = version != self._version, ""
        self._keys, self._version = keys, version
        if is_changed:
            log.warning("the keys were read again: %s", ", ".join(self.names) or "none")
            self._note()

    def _complain(self, reason: str) -> None:
        if reason != self._complaint:  # once, not every second
            log.error("the last good keys stay in force (%s): %s", ", ".join(self.names), reason)
        self._complaint = reason

    def _note(self) -> None:
        if not self._keys:
            log.error(
                "%s holds no key: every request is refused; add one with `reasonembed keys add`",
                self._path,
            )


def check_exposure(settings: ServeConfig) -> None:
    """Refuses to listen beyond this machine with neither keys nor the word that none are wanted.

    Raises:
        ConfigError: Names both cures.
    """
    if settings.keys_file or settings.allow_anonymous or is_loopback(settings.host):
        return
    raise ConfigError(
        f"host {settings.host} can be reached from other machines, and there are no keys. Make one "
        "with `reasonembed keys add keys.txt NAME` and set keys_file: keys.txt; or set "
        "allow_anonymous: true to serve whoever asks"
    )


def is_loopback(host: str) -> bool:
    """Whether an address or name to listen on is this machine's own.

    Names other than localhost are not looked up: what they stand for may change.
    """
    import ipaddress

    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> list[StoredKey]:
    """The lines of a key file.

    Raises:
        ConfigError: It cannot be read, or a line is none; what stands there is not repeated, for it
            may be a key.
    """
    return list(_load(path)[0])


def add_key(path: Path, name: str, *, comment: str = "") -> str:
    """Makes a key, stores its hash, and gives the key back; the file is made if it is not there.

    Raises:
        ConfigError: The name is none or is taken, or the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a key: 1 to 64 of A-Z a-z 0-9 . _ @ -")
    key = PREFIX + secrets.token_urlsafe(32)
    with _rewriting(path) as stored:
        if any(one.name == name for one in stored):
            raise ConfigError(
                f"{path} has a key of {name} already; remove it, or take another name"
            )
        digest = hashlib.sha256(key.encode()).hexdigest()
        one_line = " ".join(comment.split())
        stored.append(StoredKey(name, digest, one_line))
    return key


def remove_key(path: Path, name: str) -> None:
    """Takes a key out of the file; a running service refuses it from its next look on.

    Raises:
        ConfigError: There is none of that name, or the file cannot be read or written.
    """
    with _rewriting(path) as stored:
        kept = [one for one in stored if one.name != name]
        if len(kept) == len(stored):
            names = ", ".join(one.name for one in stored) or "none"
            raise ConfigError(f"{path} has no key of {name}; there are: {names}")
        stored[:] = kept


def _version_of(status: os.stat_result) -> _Version:
    """Changes when a file is written or replaced."""
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _load(path: Path) -> tuple[tuple[StoredKey, ...], _Version]:
    """The keys of a file, and the version that was read.

    Raises:
        ConfigError: It cannot be read, or a line is none.
    """
    text, version = _read(path)
    return tuple(_parse(text, path)), version


def _read(path: Path) -> tuple[str, _Version]:
    """The text of a file, and its version.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:  # of the open file: the name may be another's by now
            version = _version_of(os.fstat(stream.fileno()))
            return stream.read().decode("utf-8-sig"), version
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"keys_file {path}: {reason}; make one with `reasonembed keys add`"
        ) from error


def _parse(text: str, path: Path) -> Iterator[StoredKey]:
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = line.split(maxsplit=2)
        if not _NAME.fullmatch(parts[0]) or len(parts) < 2 or not _HASH.fullmatch(parts[1]):
            raise ConfigError(
                f"keys_file {path}, line {number}: must be NAME SHA256 [COMMENT], the hash in 64 "
                "lower-case hex digits, as `reasonembed keys add` writes it"
            )
        if parts[0] in seen:
            raise ConfigError(f"keys_file {path}, line {number}: its name stands above already")
        seen.add(parts[0])
        yield StoredKey(parts[0], parts[1], parts[2].strip() if len(parts) > 2 else "")


@contextlib.contextmanager
def _rewriting(path: Path) -> Iterator[list[StoredKey]]:
    """The keys of a file, to be changed; written when the block ends, whole or not at all.

    Lines that are no keys (comments) are kept in front. The file keeps its owner, group and mode:
    a service that could read it must be able to read what takes its place.
    """
    target = path.resolve()  # a link stays one
    temporary = target.with_name(f".{target.name}.new")
    try:
        # Made before anything is read, it keeps others from writing at the same time.
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise ConfigError(
            f"{path} is being written; if nobody does that, remove {temporary}"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            text = _HEADER
            if target.exists():
                text = _read(target)[0]
                _liken(stream.fileno(), target)
            keys = list(_parse(text, target))
            yield keys
            remarks = [line for line in text.splitlines() if line.lstrip().startswith("#")]
            lines = [*remarks, *(key.line() for key in keys)]
            stream.write("".join(f"{line}\n" for line in lines))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(target)
    except BaseException as error:  # an interrupt, too, leaves nothing behind
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        raise


def _liken(handle: int, original: Path) -> None:
    """Gives an open file the owner, group and mode of another.

    Raises:
        ConfigError: This user may not.
    """
    wanted, made = original.stat(), os.fstat(handle)
    try:
        if (wanted.st_uid, wanted.st_gid) != (made.st_uid, made.st_gid):
            os.fchown(handle, wanted.st_uid, wanted.st_gid)
        os.fchmod(handle, stat.S_IMODE(wanted.st_mode))
    except OSError as error:
        raise ConfigError(
            f"{original} belongs to user {wanted.st_uid}, group {wanted.st_gid}, and what takes "
            f"its place could not ({error.strerror}): the service might not read it; run this as "
            "root or as that user"
        ) from error
