"""`reasonembed …`: the command line.

The only module that may import `ray_jobs`, and only inside the command that needs it, so that
looking at a run starts nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from reasonembed import __version__, evaluate_cli, index_cli, keys_cli
from reasonembed.artifacts import COMPACTED
from reasonembed.config import load
from reasonembed.errors import ConfigError, explain, is_expected
from reasonembed.lease import held
from reasonembed.logs import moment
from reasonembed.run import Run, statuses_from

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Retrieval that reasons: from a corpus to a trained, evaluated, servable embedder.",
)
app.add_typer(evaluate_cli.app, name="evaluate")
app.add_typer(index_cli.app, name="index")
app.add_typer(keys_cli.app, name="keys")
_out = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # pipes, CI

RunDir = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or its URI.")]
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
    grow: Annotated[
        bool,
        typer.Option(help="Documents were added: keep all rows, compute what is missing, train."),
    ] = False,
    mine_with: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="A second round: take over this run's rows and mine with its trained model.",
        ),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop at a commit when so much money is spent.")
    ] = None,
) -> None:
    """Runs the pipeline here, or on the cluster that RAY_ADDRESS names; goes on where it was."""
    settings = load(config, overrides=_with_limit(overrides, max_cost))  # before Ray is imported
    from ray_jobs.pipeline import run_pipeline

    run_pipeline(
        settings,
        first=first,
        last=last,
        retry=retry,
        is_fresh=fresh,
        is_growing=grow,
        mine_with=mine_with,
    )


def _with_limit(overrides: list[str] | None, max_cost: float | None) -> list[str]:
    limit = [] if max_cost is None else [f"runtime.cost.max_cost={max_cost}"]
    return [*(overrides or []), *limit]


@app.command()
def submit(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file of configs/.")],
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Of the dashboard; default $RAY_API_SERVER_ADDRESS."),
    ] = None,
    stage: Annotated[str | None, typer.Option(help="One stage, not the pipeline.")] = None,
    shard: Annotated[
        str | None, typer.Option(metavar="I/N", help="Of --stage: the I-th of N parts of its rows.")
    ] = None,
    first: Annotated[str | None, typer.Option("--from", help="First stage.")] = None,
    last: Annotated[str | None, typer.Option("--to", help="Last stage.")] = None,
    retry: Annotated[
        str, typer.Option(help="Compute failed rows again: error,truncated,invalid")
    ] = "",
    fresh: Annotated[
        bool, typer.Option(help="Discard what the first stage and those after it have made.")
    ] = False,
    grow: Annotated[
        bool,
        typer.Option(help="Documents were added: keep all rows, compute what is missing, train."),
    ] = False,
    mine_with: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="A second round: take over this run's rows and mine with its trained model.",
        ),
    ] = None,
    max_cost: Annotated[
        float | None, typer.Option(help="Stop at a commit when so much money is spent.")
    ] = None,
    runtime_env: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Of cluster/runtime-env/; default image.")
    ] = None,
    driver: Annotated[
        Literal["head", "on-demand"], typer.Option(help="The node that the driver runs on.")
    ] = "head",
    follow: Annotated[bool, typer.Option(help="Show the log until the job ends.")] = True,
    stop: Annotated[
        bool, typer.Option("--stop", help="End the jobs of this run instead; it can be resumed.")
    ] = False,
) -> None:
    """Runs the pipeline, or one stage, as a job of a Ray cluster; ends with the job's exit code.

    The same command again goes on where the run was, after a stop, a failure, or a lost machine;
    with --fresh it begins anew.
    """
    settings = load(config, overrides=_with_limit(overrides, max_cost))
    statuses_from(retry)
    stages = (*Run(settings).stages, "distill")
    if unknown := [name for name in (stage, first, last) if name and name not in stages]:
        raise ConfigError(f"no stage {unknown[0]!r} in this run; its stages: {', '.join(stages)}")
    from ray_jobs.submit import Order
    from ray_jobs.submit import stop as stop_jobs
    from ray_jobs.submit import submit as submit_job
    from reasonembed.shards import Shard

    part = Shard.parse(shard) if shard else None
    order = Order(
        settings,
        stage=stage,
        first=first,
        last=last,
        shard=part,
        retry=retry,
        is_fresh=fresh,
        is_growing=grow,
        mine_with=mine_with,
    )
    if stop:
        stop_jobs(order, address=address, say=_say)
        return
    code = submit_job(
        order,
        address=address,
        environment_file=runtime_env,
        on_demand=driver == "on-demand",
        is_followed=follow,
        say=_say,
    )
    raise typer.Exit(code)


def _say(line: str) -> None:
    _out.print(line, markup=False, soft_wrap=True)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML file of configs/.")],
    overrides: Overrides = None,
    shape: Annotated[
        str | None, typer.Option(help="Kind of cluster, of the file of prices; or this-machine.")
    ] = None,
    documents: Annotated[
        int | None, typer.Option(min=1, help="Of the corpus, where it is not here.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="First run a few rows of each stage and measure them.")
    ] = False,
    rows: Annotated[int, typer.Option(min=8, help="Of each LLM stage of the probe.")] = 240,
    learn_from: Annotated[
        str | None, typer.Option(metavar="RUN", help="First measure the hours of a run.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
) -> None:
    """Hours, memory, disk and money of each stage, before anything starts."""
    from reasonembed.planner import command

    settings = load(config, overrides=overrides)
    if probe:
        from ray_jobs.probe import probe as run_probe

        with TemporaryDirectory() as folder:
            run = run_probe(settings, Path(folder), rows=rows)
            command.learn(run, settings, shape=shape)
        run.place.delete()
    elif learn_from:
        command.learn(Run.existing(learn_from), settings, shape=shape)
    found = command.plan(settings, shape=shape, documents=documents)
    command.show(found, console=_out, say=typer.echo, as_json=as_json)


@app.command()
def distill(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="With a section distill:.")],
    overrides: Overrides = None,
    retry: Annotated[
        str, typer.Option(help="Ask again where the teacher failed: error,truncated,invalid")
    ] = "",
    fresh: Annotated[
        bool, typer.Option(help="Discard the student; the teacher's answers are kept.")
    ] = False,
    grow: Annotated[
        bool, typer.Option(help="Documents were added: ask about new pairs, teach anew.")
    ] = False,
) -> None:
    """Teaches a small annotator from a run that is mined; writes RUN/annotator/model."""
    settings = load(config, overrides=overrides)
    Run(settings).distill_config()  # as above
    again = statuses_from(retry)
    from ray_jobs.distill import run as runner
    from ray_jobs.job import perform, session

    def prepare(target: Run) -> None:
        if fresh:
            target.directory("annotator").discard()

    with session(
        settings, retry=again, prepare=prepare, is_growing=grow, stages=("distill",)
    ) as job:
        perform(job, "distill", runner)


@app.command()
def ablate(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A YAML file of configs/ablation/.")],
    run_dir: Annotated[
        str | None, typer.Option("--run", metavar="RUN", help="Another run than the plan names.")
    ] = None,
) -> None:
    """Trains and measures variants of a run over seeds; prints their table; goes on where it was.

    Each variant and seed is a run of its own beside RUN, which is not touched.
    """
    from reasonembed.ablation import in_own_process, load_ablation, run_ablation

    def say(line: str) -> None:
        _out.print(line, markup=False, soft_wrap=True)

    table = run_ablation(load_ablation(plan, run=run_dir), perform=in_own_process, say=say)
    say(table.read_text(encoding="utf-8"))
    say(str(table))


@app.command()
def status(run_dir: RunDir) -> None:
    """Shows what each stage of a run has committed."""
    from reasonembed.status import look

    found = look(Run.existing(run_dir))
    table = Table("stage", "state", "rows", "failed", "time", title=str(run_dir))
    for one in found.stages:
        took = f"{one.seconds:.0f} s" if one.seconds is not None else ""
        rows = "" if one.rows is None else f"{one.rows:,}"
        if one.planned is not None and one.planned != one.rows:
            rows += f" of {one.planned:,}"
        table.add_row(one.stage, one.state, rows, f"{one.failed:,}" if one.failed else "", took)
    _out.print(table)
    for driver in found.drivers:
        since = moment(driver.claim.taken_ns / 1e9)
        _out.print(f"Driven by {driver.claim} since {since}", markup=False)
    for said in found.progress:
        _out.print(f"Last progress: {said}", markup=False)


@app.command()
def compact(run_dir: RunDir) -> None:
    """Merges the many small files of a run into few large ones; no row changes."""
    target = Run.existing(run_dir)
    with held(target.place):
        for kind in COMPACTED:
            if gone := target.artifact(kind).compact():
                _out.print(f"{kind}: {gone:,} files fewer", markup=False)


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
    query_id: Annotated[
        str | None, typer.Argument(metavar="QUERY_ID", help="Such as q-0f3a….")
    ] = None,
    from_doc: Annotated[
        str | None,
        typer.Option(metavar="DOC_ID", help="The other way round: what a document went into."),
    ] = None,
) -> None:
    """Shows the descent of one query, from seed to sample, or what became of one document."""
    from reasonembed.trace import trace_document, trace_query

    target = Run.existing(run_dir)
    if query_id is not None and from_doc is None:
        lines = trace_query(target, query_id)
    elif from_doc is not None and query_id is None:
        lines = trace_document(target, from_doc)
    else:
        raise ConfigError("trace needs one of the two: a QUERY_ID, or --from-doc DOC_ID")
    for line in lines:
        _out.print(line, markup=False, soft_wrap=True)


@app.command()
def blame(
    run_dir: RunDir,
    query_id: Annotated[
        str, typer.Argument(metavar="QUERY_ID", help="Of the evaluation, such as py-001.")
    ],
) -> None:
    """Shows what the trained model returned for an evaluated query, and what it learnt near it."""
    from reasonembed.report.blame import blame_lines

    for line in blame_lines(Run.existing(run_dir), query_id):
        _out.print(line, markup=False, soft_wrap=True)


@app.command()
def samples(
    run_dir: RunDir,
    out: Annotated[Path, typer.Option(help="A file; for the form reasonembed a folder.")],
    form: Annotated[
        Literal["parquet", "reasonembed", "flagembedding", "sentence-transformers"],
        typer.Option(help="For which program."),
    ] = "parquet",
    split: Annotated[
        Literal["train", "held_out", "all"], typer.Option(help="Which samples.")
    ] = "train",
) -> None:
    """Writes a run's training samples in another program's form."""
    from reasonembed.embedder.tokenisation import apply_template
    from reasonembed.remixer.formats import export_samples, finished_samples

    settings = Run.existing(run_dir).config.train
    template = settings.encoder.query_template
    written = export_samples(
        finished_samples(run_dir),
        out,
        form=form,
        split=split,
        anchor=lambda instruction, query: apply_template(
            template, query=query, instruction=instruction
        ),
        max_negatives=settings.group_size - 1,
    )
    counts = f"{written.samples:,} samples, {written.rows:,} rows: {out}"
    _out.print(counts, markup=False, soft_wrap=True)
    if written.note:
        _out.print(written.note, markup=False, soft_wrap=True)


@app.command()
def serve(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL|RUN", help="A run, an export, a system's name, a folder, a hub id; echo."
        ),
    ] = None,
    index: Annotated[
        list[str] | None, typer.Option(metavar="DIR", help="An index to search in. Repeatable.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file of configs/serve/, or its args alone.")
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="What requests call the model.")] = None,
    host: Annotated[str | None, typer.Option(help="Default 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Default 8000.")] = None,
    keys: Annotated[
        str | None, typer.Option(metavar="FILE", help="Of `reasonembed keys`: who may ask.")
    ] = None,
    in_process: Annotated[
        bool, typer.Option("--in-process", help="Without Ray: one process, one replica.")
    ] = False,
) -> None:
    """Serves embeddings, and searches in indexes, in the protocols of OpenAI, Cohere and TEI."""
    from reasonembed.serving.server import left_out, serve_in_process, settings_of

    given = {
        "indexes": tuple(index) if index else None,
        "name": name,
        "host": host,
        "port": port,
        "keys_file": keys,
    }
    settings = settings_of(target, file=config, overrides=overrides or (), given=given)
    if config is not None and (line := left_out(config)):
        _out.print(line, markup=False, soft_wrap=True)
    if in_process:
        serve_in_process(settings, say=lambda line: _out.print(line, markup=False, soft_wrap=True))
        return
    from ray_jobs.serve import serve_here

    serve_here(settings)


@app.command()
def version() -> None:
    """Prints the version."""
    _out.print(__version__)


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
