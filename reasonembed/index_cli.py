"""`reasonembed index …`: folders that the service searches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, help="Builds, shows and exports indexes on disk.")
_out = Console(highlight=False)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="An index.")]


@app.command()
def build(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A run; a collection (python-stdlib, bright:biology, a BEIR folder, …), whose "
            "queries and gold come along; or a corpus: a Parquet or JSONL file, or a folder.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The index; made.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="M",
            help="A run, an export, a system of the catalogue, a packaged name, a folder or a hub "
            "id; default a run's own.",
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(metavar="S", help="Of the catalogue, or a YAML file: its encoder and BM25."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What requests call it; default the folder's.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Of its queries, such as biology; default the source's.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Vectors.")] = True,
    bm25: Annotated[bool, typer.Option("--bm25/--no-bm25", help="Words.")] = True,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of collections that are at hand.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY.KEY=VALUE", help="Of `index`; repeatable."),
    ] = None,
) -> None:
    """Writes an index, goes on where a build was stopped; here, or on the Ray of RAY_ADDRESS."""
    from reasonembed.progress import Reporter
    from reasonembed.serving.building import build_here, index_config
    from reasonembed.systems.local import LocalWork

    given: dict[str, Any] = {"model": model, "name": name, "task": task}
    given = {key: value for key, value in given.items() if value is not None}
    given |= {} if dense else {"dense": False}
    given |= {} if bm25 else {"bm25": None}
    given |= {} if data is None else {"data_dir": str(data)}
    config = index_config(source, out=str(out), given=given, system=system, overrides=overrides)
    if os.environ.get("RAY_ADDRESS"):
        from ray_jobs.index import build_on_cluster

        build_on_cluster(config)
    else:
        build_here(config, work=LocalWork(Reporter(_out)))
    _print(*_lines(out))


@app.command()
def show(
    folder: Folder,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte and compare the digests.")
    ] = False,
) -> None:
    """Says what an index holds and what made it."""
    from reasonembed.index.store import check_files

    about = check_files(folder, with_digests=verify)
    _print(*_lines(folder), "made from")
    _print(*(f"  {key}: {value}" for key, value in about.identity.items()))
    if verify:
        _print(f"{len(about.files)} files hold what was written")


@app.command()
def export(
    folder: Folder,
    to: Annotated[str, typer.Option(metavar="FORM", help="faiss, qdrant or lance.")],
    out: Annotated[Path, typer.Option(metavar="PATH", help="Made.")],
) -> None:
    """Writes an index in another program's form."""
    from typing import cast

    from reasonembed.index.exports import Form, export_index
    from reasonembed.index.store import StoredIndex

    _print(*map(str, export_index(StoredIndex.load(folder), out, form=cast("Form", to))))


def _lines(folder: Path) -> list[str]:
    from reasonembed.index.store import read_about

    about = read_about(folder)
    facts = {
        "index": f"{about.name} ({folder})",
        "documents": f"{about.num_documents:,}",
        "searched by": ", ".join(about.kinds),
        "model": f"{about.model}, {about.dimension} dimensions" if about.dimension else "none",
        "fingerprint": about.fingerprint,
        "task": about.task,
        "instruction": about.instruction or "",
        "queries": f"{about.num_queries:,}" if about.num_queries else "",
        "on disk": f"{about.num_bytes / 2**20:,.1f} MiB",
    }
    return [f"{key}: {value}" for key, value in facts.items() if value]


def _print(*lines: str) -> None:
    for line in lines:
        _out.print(line, markup=False, soft_wrap=True)
