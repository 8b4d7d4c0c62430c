"""`reasonembed …`: the command line.

The only module that may import `ray_jobs`, and only inside the command that needs it, so that
looking at a run starts nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from reasonembed import __version__
from reasonembed.config import load
from reasonembed.errors import ConfigError, explain, is_expected
from reasonembed.run import STAGES, Run, statuses_from
from reasonembed.schemas import Status

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Retrieval that reasons: from a corpus to a trained, evaluated, servable embedder.",
)
_out = Console(highlight=False)

RunDir = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY.KEY=VALUE", help="Repeatable.")
]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file of configs/.")],
    overrides: Overrides = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last stage.")] = None,
    retry: Annotated[
        str, typer.Option(help="Compute failed rows again: error,truncated,invalid")
    ] = "",
    fresh: Annotated[
        bool, typer.Option(help="Discard what the first stage and those after it have made.")
    ] = False,
) -> None:
    """Runs the pipeline here, or on the cluster that RAY_ADDRESS names; goes on where it was."""
    settings = load(config, overrides=overrides)  # before Ray is imported: mistakes show at once
    from ray_jobs.job import session
    from ray_jobs.pipeline import run_stages, selected

    stages = selected(Run(settings), first, last)
    again = statuses_from(retry)

    def prepare(target: Run) -> None:
        if fresh:
            target.discard_from(stages[0])

    with session(settings, retry=again, prepare=prepare) as job:
        run_stages(job, stages)


@app.command()
def status(run_dir: RunDir) -> None:
    """Shows what each stage of a run has committed."""
    target = Run.existing(run_dir)
    table = Table("stage", "state", "rows", "failed", "time", title=str(run_dir))
    seconds: dict[str, float] = {}
    outcome: dict[str, str] = {}
    for note in target.timeline():
        seconds[note["stage"]] = seconds.get(note["stage"], 0.0) + note["seconds"]
        outcome[note["stage"]] = note["outcome"]
    for stage in STAGES:
        rows, failed = _rows(target, stage)
        took = f"{seconds[stage]:.0f} s" if stage in seconds else ""
        begun = any(output.stage() for output in target.outputs(stage))
        state = outcome.get(stage, "begun") if begun else "not run"
        table.add_row(stage, state, rows, failed, took if begun else "")
    _out.print(table)


@app.command(name="why-stale")
def why_stale(
    run_dir: RunDir,
    config: Annotated[
        Path | None, typer.Option(help="Compare with this configuration, not the run's own.")
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Says which stages would not be made the same way today, and which fields differ."""
    target = Run.existing(run_dir)
    if config is not None:
        wanted = load(config, overrides=overrides)
        target = Run(wanted.model_copy(update={"run_dir": str(run_dir)}))
    elif overrides:
        raise ConfigError("--set changes a configuration; give the file with --config")
    reasons = target.stale()
    for stage, lines in reasons.items():
        _out.print(f"[bold]{stage}[/bold]")
        for line in lines:
            _out.print(f"  {line}", markup=False)
    if not reasons:
        _out.print("Nothing is stale: every stage would be made the same way today.")


@app.command()
def report(run_dir: RunDir) -> None:
    """Writes report.html anew."""
    from reasonembed.report import write_report

    _out.print(str(write_report(Run.existing(run_dir))))


@app.command()
def trace(
    run_dir: RunDir,
    query_id: Annotated[str, typer.Argument(metavar="QUERY_ID", help="Such as q-0f3a….")],
) -> None:
    """Shows the descent of one query: seed, query, candidates with labels, rewrite, sample."""
    from reasonembed.trace import trace_query

    for line in trace_query(Run.existing(run_dir), query_id):
        _out.print(line, markup=False, soft_wrap=True)


@app.command()
def serve(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN|MODEL", help="A run, or an export.")],
    port: Annotated[int | None, typer.Option(help="Default: the run's, 8000.")] = None,
    host: Annotated[str | None, typer.Option(help="Default: the run's, 127.0.0.1.")] = None,
) -> None:
    """Hosts the exported model: POST /v1/embeddings, GET /v1/models, GET /health."""
    from ray_jobs.serve import serve_model

    serve_model(
        run_dir,
        host=host,
        port=port,
        say=lambda line: _out.print(line, markup=False, soft_wrap=True),
    )


@app.command()
def version() -> None:
    """Prints the version."""
    _out.print(__version__)


def _rows(target: Run, stage: str) -> tuple[str, str]:
    from reasonembed.artifacts import Artifact

    counts = [out.statuses() for out in target.outputs(stage) if isinstance(out, Artifact)]
    if not counts:
        return "", ""
    total, ok = sum(counts[0].values()), counts[0][Status.OK] + counts[0][Status.FILTERED]
    return f"{total:,}", f"{total - ok:,}" if total != ok else ""


def main() -> None:
    """Entry point: an error of ours becomes one message and an exit code (see `errors`)."""
    try:
        app()  # ends the process itself, also on wrong usage
    except Exception as error:  # the process boundary
        message, code = explain(error)
        Console(stderr=True, highlight=False).print(message, markup=False, soft_wrap=True)
        if not is_expected(error):
            raise
        sys.exit(code)


if __name__ == "__main__":
    main()
