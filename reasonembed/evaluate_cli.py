"""`reasonembed evaluate …`: figures of systems and of run files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from reasonembed.config import load_benchmark
from reasonembed.errors import ConfigError
from reasonembed.progress import Reporter
from reasonembed.run import statuses_from

app = typer.Typer(invoke_without_command=True)
_out = Console(highlight=False)


@app.callback()
def evaluate(
    context: typer.Context,
    systems: Annotated[
        list[str] | None,
        typer.Option("--system", metavar="S", help="Of the catalogue, or a YAML file; repeatable."),
    ] = None,
    on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="C",
            help="python-stdlib, bright, bright:biology, r2med, a BEIR folder, …; repeatable.",
        ),
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="bright, reasonembed or mteb-v1.1; default bright.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Such as configs/benchmark/bright.yaml.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of collections that are at hand.")
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of results; default results.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.KEY=VALUE", help="Repeatable.")
    ] = None,
    retry: Annotated[
        str, typer.Option(help="Ask an LLM again where it failed: error,truncated,invalid")
    ] = "",
) -> None:
    """Figures that can be trusted: of systems on collections, and of any run file.

    Without a subcommand: makes what is missing, goes on where it was stopped, prints a table.
    """
    if context.invoked_subcommand is not None:
        _refuse_options_before(context, context.invoked_subcommand)
        return
    given = {
        "systems": systems,
        "collections": on,
        "protocol": protocol,
        "data_dir": None if data is None else str(data),
        "results_dir": None if results is None else str(results),
    }
    settings = load_benchmark(
        config,
        given={name: value for name, value in given.items() if value},
        overrides=overrides,
    )
    again = statuses_from(retry)
    if os.environ.get("RAY_ADDRESS"):
        from ray_jobs.benchmark import measure_on_cluster

        lines = measure_on_cluster(settings, retry=again)
    else:
        from reasonembed.systems.benchmark import measure_here

        lines = measure_here(settings, Reporter(_out), retry=again)
    _print(*lines)  # before the report, which reads everything that lies in the folder
    from reasonembed.report.benchmark import write_benchmark_report

    _print(f"Report, query by query: {write_benchmark_report(Path(settings.results_dir))}")


def _print(*lines: str) -> None:
    for line in lines:
        _out.print(line, markup=False, soft_wrap=True)


def _refuse_options_before(context: typer.Context, subcommand: str) -> None:
    """Options that stand before a subcommand would be read and forgotten."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"{option.opts[0]} stands before {subcommand}; put it after {subcommand}"
            )


@app.command()
def score(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN", help="TREC, JSON {query: {document: score}} or Parquet; .gz or not."
        ),
    ],
    qrels: Annotated[
        Path,
        typer.Argument(
            metavar="QRELS", help="TREC, BEIR TSV or JSON {query: {document: relevance}}."
        ),
    ],
    metrics: Annotated[
        str | None,
        typer.Option(metavar="ndcg@10,recall@100,…", help="ndcg, map, recall, p; recip_rank."),
    ] = None,
    excluded: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Documents to remove first: `query_id doc_id`, or JSON lines of excluded_ids.",
        ),
    ] = None,
    per_query: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write each query's figures: .json, or between tabs."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, unrounded.")] = False,
) -> None:
    """Scores a run file against judgments by trec_eval's rules, missing queries counted 0."""
    from reasonembed.evaluation.metrics import METRICS, parse_metrics
    from reasonembed.evaluation.score import notes_of, score_files, table_of, write_per_query

    names = METRICS if metrics is None else parse_metrics(metrics)
    found = score_files(run, qrels, metrics=names, excluded=excluded)
    if per_query is not None:
        write_per_query(found.per_query, per_query)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
        return
    _print(str(run), *table_of(found.mean), *notes_of(found))


@app.command()
def compare(
    systems: Annotated[
        list[str],
        typer.Argument(
            metavar="SYSTEM",
            help="Each: a system in --results, a result.json, a folder, or FOLDER:SYSTEM (also of "
            "a run, such as runs/quickstart:after); seeds of one system with commas between. The "
            "others are compared with the first.",
        ),
    ],
    results: Annotated[Path, typer.Option(help="Folder of results.")] = Path("results"),
    protocol: Annotated[str | None, typer.Option(help="Where there are several.")] = None,
    on: Annotated[
        list[str] | None, typer.Option(help="A collection or a benchmark; repeatable.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Such as recall@100; default the headline.")
    ] = None,
    show: Annotated[
        int, typer.Option(min=0, metavar="N", help="The N queries won and the N lost most.")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, unrounded.")] = False,
) -> None:
    """Tells whether systems differ beyond chance, by collection and over all of them."""
    from reasonembed.evaluation.comparison_text import (
        comparison_json,
        comparison_lines,
        moved_lines,
    )
    from reasonembed.evaluation.sources import load_systems
    from reasonembed.evaluation.standings import compare_systems

    found = load_systems(systems, results=results, protocol=protocol, collections=on or ())
    compared = compare_systems(found, metric=metric)
    if as_json:
        typer.echo(json.dumps(comparison_json(compared), indent=1, ensure_ascii=False))
        return
    _print(*comparison_lines(compared), *moved_lines(compared, found, show=show))


@app.command()
def leaderboard(
    results: Annotated[
        Path | None, typer.Argument(metavar="[RESULTS]", help="Folder of our results.")
    ] = None,
    benchmark: Annotated[
        str, typer.Option(help="bright, bright+gpt4_reason, r2med, or another of our results.")
    ] = "bright",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with sources.")] = False,
) -> None:
    """Shows our figures beside those that others published, task by task."""
    from reasonembed.evaluation.leaderboard import leaderboard as board_of
    from reasonembed.evaluation.leaderboard import leaderboard_json, leaderboard_lines
    from reasonembed.evaluation.results import find_result_files

    board = board_of(find_result_files(results) if results else [], benchmark=benchmark)
    if as_json:
        typer.echo(json.dumps(leaderboard_json(board), indent=1, ensure_ascii=False))
        return
    _print(*leaderboard_lines(board))
