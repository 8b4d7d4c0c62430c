"""Files of data sets on the Hugging Face hub, fetched when they are read.

An address is `hf://datasets/<owner>/<name>[@<revision>]/<pattern>`, where the pattern may hold `*`.
Only the files that match are downloaded, into the hub's own cache.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from reasonembed.errors import ReasonEmbedError

SCHEME = "hf://datasets/"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(
    re.escape(SCHEME) + r"(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<pattern>.+)"
)


def address(repo: str, pattern: str, *, revision: str | None = None) -> str:
    """The address of a data set's files."""
    return f"{SCHEME}{repo}{f'@{revision}' if revision else ''}/{pattern}"


@dataclass(frozen=True)
class Snapshot:
    """A local copy of some files of a data set.

    Attributes:
        folder: Laid out as on the hub.
        commit: Of the data set; where the hub's cache does not tell it, what was asked for.
    """

    folder: Path
    commit: str | None


def fetch(
    repo: str,
    patterns: Sequence[str],
    *,
    error: type[ReasonEmbedError],
    revision: str | None = None,
) -> Snapshot:
    """A local copy of some files of a data set.

    Offline, the hub's cache is all there is, and it may hold fewer files than asked for; and more,
    where others were fetched before.

    Raises:
        ReasonEmbedError: As `error`: the hub cannot be reached and nothing of the data set is in
            its cache, or there is no such data set or revision.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(
                repo, repo_type="dataset", revision=revision, allow_patterns=list(patterns)
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as wrong:
        more = f" and {len(patterns) - 1} others" if len(patterns) > 1 else ""
        at = f" --revision {revision}" if revision else ""
        include = " ".join(f"--include '{pattern}'" for pattern in patterns)
        raise error(
            f"{patterns[0]}{more} of the data set {repo} cannot be had from the hub ({wrong}); "
            f"with a network: hf download {repo} --repo-type dataset{at} {include}"
        ) from wrong
    return Snapshot(folder, folder.name if _COMMIT.fullmatch(folder.name) else revision)


def fetch_address(source: str, *, error: type[ReasonEmbedError]) -> list[Path]:
    """The files of an address, sorted by name.

    Raises:
        ReasonEmbedError: As `error`: it is no address, or none of its files can be had.
    """
    parts = _ADDRESS.fullmatch(source)
    if parts is None:
        raise error(f"{source}: an address on the hub is {SCHEME}<owner>/<name>/<file>")
    repo, pattern = parts["repo"], parts["pattern"]
    snapshot = fetch(repo, [pattern], error=error, revision=parts["revision"])
    found = sorted(snapshot.folder.glob(pattern))
    if not found:
        raise error(
            f"{source}: the hub's copy of {repo} on this machine has no file {pattern}, and more "
            "cannot be fetched offline"
        )
    return found
