"""The file around a page: its head, its style, what it may do, and how it is written."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path

from reasonembed.errors import StorageError
from reasonembed.report.charts import Html, tag


def write_page(file: Path, *, title: str, body: Html, script: str = "", cure: str) -> None:
    """Writes a page that needs nothing beside it, whole or not at all.

    Args:
        file: Over an earlier one.
        title: Of the window.
        body: What is shown.
        script: Name of a file of `assets`; empty for none. No other script can run on the page.
        cure: What to do if it cannot be written, for the message.

    Raises:
        StorageError: The file cannot be written.
    """
    scratch = file.with_name(f".{file.name}")
    try:
        scratch.write_text(_page(title, body, _asset(script) if script else ""), encoding="utf-8")
        scratch.replace(file)
    except OSError as error:
        raise StorageError(f"cannot write {file}: {error}; {cure}") from error


def _page(title: str, body: Html, script: str) -> str:
    # Texts are escaped; that a browser fetches and runs nothing else is the second lock.
    allowed = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        allowed += f"; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{allowed}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{tag('title', title)}<style>\n{_asset('style.css')}</style></head>\n"
        f"<body>{body}{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("reasonembed.report") / "assets" / name).read_text(encoding="utf-8")
