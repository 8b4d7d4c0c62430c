"""`reasonembed keys …`: who may use a service."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from reasonembed.serving.keys import add_key, read_keys, remove_key

app = typer.Typer(no_args_is_help=True, help="API keys of a service: made, listed, removed.")
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)

KeysFile = Annotated[Path, typer.Argument(metavar="FILE", help="The service's keys_file.")]
Name = Annotated[str, typer.Argument(metavar="NAME", help="Whom the key is for.")]


@app.command()
def add(
    file: KeysFile,
    name: Name,
    comment: Annotated[str, typer.Option(help="Kept beside it; default today's date.")] = "",
) -> None:
    """Makes a key and prints it, this once; the file keeps its hash."""
    key = add_key(file, name, comment=comment or f"{datetime.now(UTC):%Y-%m-%d}")
    _err.print(f"The key of {name}; it is shown this once:", markup=False, soft_wrap=True)
    _out.print(key, markup=False, soft_wrap=True)  # alone on stdout, for `KEY=$(…)`


@app.command(name="list")
def list_keys(file: KeysFile) -> None:
    """Shows names, first digits of the hashes, and comments."""
    table = Table("name", "sha256", "comment")
    for key in read_keys(file):
        table.add_row(key.name, f"{key.sha256[:12]}…", Text(key.comment))
    _out.print(table)


@app.command()
def remove(file: KeysFile, name: Name) -> None:
    """Takes a key away; a running service refuses it a second later."""
    remove_key(file, name)
    _err.print(f"{name} is removed from {file}", markup=False, soft_wrap=True)
