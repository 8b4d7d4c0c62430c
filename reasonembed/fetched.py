"""What lies in an object store, as files of this machine: fetched into the cache once a version."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from pyarrow.fs import FileInfo, FileType

from reasonembed.errors import AccessError
from reasonembed.storage import Place


def cache_root(cache_dir: str | None = None) -> Path:
    """This machine's folder for what can be fetched or made again."""
    chosen = cache_dir or os.environ.get("REASONEMBED_CACHE") or "~/.cache/reasonembed"
    return Path(chosen).expanduser()


def fetched(uri: str, *, cache_dir: str | None = None) -> Path:
    """A copy of a file, a folder, or the files that a `*` in the last name stands for.

    Returns:
        Its path, with the name that it has there; of several files, their folder's with that
        pattern.

    Raises:
        AccessError: Nothing lies there.
        StorageError: It cannot be read.
    """
    place = Place(uri)
    if "*" in place.name:
        found = _matching(place)
        return (
            copied(uri, found, cache=cache_root(cache_dir), name="files", fetch=_each(place, found))
            / place.name
        )
    info = place.info()
    found = [info] if info.type == FileType.File else place.files()
    if not found:
        raise AccessError(f"nothing lies at {uri}; look at the address and at who may read it")
    return copied(uri, found, cache=cache_root(cache_dir), name=place.name, fetch=place.fetch)


def copied(
    uri: str,
    files: Sequence[FileInfo],
    *,
    cache: Path,
    name: str,
    fetch: Callable[[Path], object],
) -> Path:
    """A copy under its own name, in a folder named by what lies there now.

    Args:
        uri: Of what is copied.
        files: Those that count; another name, size or time of one makes another copy.
        cache: See `cache_root`.
        name: Of the copy.
        fetch: Makes it.

    Raises:
        StorageError: It cannot be read.
    """
    listed = [f"{info.path} {info.size} {info.mtime_ns}" for info in files]
    digest = hashlib.blake2b("\n".join([uri, *listed]).encode(), digest_size=8).hexdigest()
    target = cache / "fetched" / digest
    if not (target / name).exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".") as scratch:
            made = Path(scratch) / digest
            fetch(made / name)
            publish(made, target, whole=target / name)
    return target / name


def publish(made: Path, target: Path, *, whole: Path) -> None:
    """Gives a complete folder its name.

    Another process may have been faster: its folder holds the same bytes, so losing that race is
    success.
    """
    try:
        made.rename(target)
    except OSError:
        if not whole.exists():
            raise


def _matching(place: Place) -> list[FileInfo]:
    folder = place.parent
    found = [
        info
        for info in folder.files()
        if "/" not in info.path.removeprefix(f"{folder.path}/")
        and fnmatchcase(info.base_name, place.name)
    ]
    if not found:
        raise AccessError(f"no file of {folder} is called {place.name}")
    return found


def _each(place: Place, files: Sequence[FileInfo]) -> Callable[[Path], None]:
    def fetch(target: Path) -> None:
        for info in files:
            (place.parent / info.base_name).fetch(target / info.base_name)

    return fetch
