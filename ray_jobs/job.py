"""What every job shares: its arguments, its Ray session, its exit codes, and its quiet console.

Exit codes: 0 done; 1 failed (look at what it says); 2 configuration or cluster; 3 too many rows
failed; 4 the money is spent; 75 start again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Read by Ray when it is imported; 32 footer actors and usage pings have no place in a small run.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray
from rich.console import Console

from ray_jobs.interrupts import Interrupts, interruptible
from ray_jobs.metrics import CommitCounts, counted_by, set_gauges
from ray_jobs.pools import prepare as prepare_pools
from ray_jobs.preflight import Preflight, check_address, explain_refusal, lacking, machines, needs
from reasonembed.config import RunConfig, RuntimeConfig, load
from reasonembed.errors import ClusterError, ConfigError, DriftError, explain, is_expected
from reasonembed.leaks import check_no_secrets
from reasonembed.lease import held, let_go
from reasonembed.logs import WorkerLog, is_json_wanted, logging_to
from reasonembed.planner.budget import Budget, budget_of
from reasonembed.progress import Reporter, duration
from reasonembed.run import STAGES, Run, statuses_from
from reasonembed.shards import Shard, ShardRecords
from reasonembed.status import say_progress

_LOG = logging.getLogger(__name__)
_MIN_LOGICAL_CPUS = 4  # fewer starve Ray's own helpers behind a pool that holds them all
_EXIT_CODES = (
    "Exit codes: 0 done, 1 failed, 2 configuration or cluster, 3 too many rows failed, 4 the money "
    "is spent, 75 start again: it goes on."
)
_IN_SHARDS = ("filter", "generate", "embed", "mine", "annotate", "rewrite")


@dataclass(frozen=True)
class Job:
    """A stage's surroundings: the run, where to speak, and which rows are to be computed.

    Attributes:
        run: The run.
        reporter: Where to speak.
        retry: Statuses of rows that are computed again.
        shard: Which part of a stage's rows is this job's; None for all.
        underway: What the timeline will say of the stage that runs.
        budget: What the run has cost, and what it may; None where nobody asks.
    """

    run: Run
    reporter: Reporter
    retry: frozenset[str] = frozenset()
    shard: Shard | None = None
    underway: list[dict[str, Any]] = field(default_factory=list)
    budget: Budget | None = None

    @property
    def owner(self) -> str:
        """Names this driver, the same when it starts again; each shard is a driver of its own."""
        return str(self.run.place) if self.shard is None else f"{self.run.place}#{self.shard}"

    @property
    def on_commit(self) -> CommitCounts:
        """What actors of the present stage call with what they have committed."""
        return CommitCounts(self.run.name, self.reporter.stage)

    @property
    def worker_log(self) -> WorkerLog:
        """How actors of the present stage log."""
        return WorkerLog(self.run.name, self.reporter.stage)


@contextmanager
def session(
    config: RunConfig,
    *,
    retry: frozenset[str] = frozenset(),
    prepare: Callable[[Run], None] | None = None,
    is_growing: bool = False,
    stages: Sequence[str] | None = None,
    shard: Shard | None = None,
) -> Iterator[Job]:
    """Locks the run, joins or starts Ray, and keeps Ray's own noise in `logs/ray.log`.

    A signal ends the body by `Interrupted`, and the process if that takes too long.

    Args:
        config: The run's configuration.
        retry: Statuses of rows that are computed again.
        prepare: Called with the locked run once nothing speaks against its start: it may delete.
        is_growing: See `Run`.
        stages: What will run, for the look at the cluster; default all of the configuration's.
        shard: See `Job`.
    """
    run = Run(config, is_growing=is_growing)
    check_no_secrets(run.config.model_dump(mode="json"), where="the configuration")  # it is saved
    wanted = run.stages if stages is None else tuple(stages)
    _check_shard(shard, wanted)
    budget = budget_of(run)
    underway: list[dict[str, Any]] = []
    with (
        _signals(run, underway) as interrupts,
        held(run.place, part=f"{wanted[0]} {shard}" if shard else ""),
        quiet(run.logs / "ray.log") as console,
        _speaking(run, console, shard, budget) as reporter,
    ):
        if not run.config_file.is_file():
            run.save_config()  # so that a run that fails at once can be looked at
        try:
            join_or_start(run.config.runtime, checked=())
            interrupts.install()  # Ray, when it starts, takes SIGTERM for itself
            Preflight(
                run.config,
                run_dir=str(run.place),
                stages=wanted,
                is_private=not os.environ.get("RAY_ADDRESS"),
            ).check()
            if prepare:
                prepare(run)
            yield Job(run, reporter, retry, shard, underway, budget)
        finally:
            ray.shutdown()


@contextmanager
def _speaking(
    run: Run, console: Console, shard: Shard | None, budget: Budget
) -> Iterator[Reporter]:
    """Says progress to people, to whoever looks at the run's storage, and to Prometheus."""
    reporter = Reporter(
        console,
        interval_s=run.config.runtime.progress_s,
        as_json=is_json_wanted(),
        run=run.name,
        shard=str(shard or ""),
        counted=counted_by(budget.told),
        listeners=(set_gauges, partial(say_progress, run.place)),
    )

    def ids() -> dict[str, str]:
        return {"run": run.name, "stage": reporter.stage}

    with logging_to(run.logs / "driver.jsonl", ids):
        yield reporter


@contextmanager
def _signals(run: Run, underway: list[dict[str, Any]]) -> Iterator[Interrupts]:
    """Ends the body by a signal; the timeline says so even where the process has to be killed."""

    def late(message: str) -> None:
        for note in underway:
            run.note_attempt(note | {"outcome": "interrupted", "detail": message})
        let_go(run.place)

    stderr = os.dup(2)  # `quiet` sends the process's own to a file
    try:
        with interruptible(late, stderr=stderr) as interrupts:
            yield interrupts
    finally:
        os.close(stderr)


def _check_shard(shard: Shard | None, stages: Sequence[str]) -> None:
    if shard is None or (len(stages) == 1 and stages[0] in _IN_SHARDS):
        return
    raise ConfigError(
        f"--shard {shard} is for one stage of rows ({', '.join(_IN_SHARDS)}), not for "
        f"{', '.join(stages)}: the others need all rows at once"
    )


def join_or_start(runtime: RuntimeConfig, *, checked: Sequence[str] | None = None) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts a private one on this machine.

    Args:
        runtime: Of a private one: its size.
        checked: Stages whose pools must have room on a private one; default all.

    Raises:
        ClusterError: There is no such cluster, it is of another version, or too small.
    """
    environment = {"env_vars": _not_set_by_job({"TOKENIZERS_PARALLELISM": "false"})}
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": environment}
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_address(address)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
            raise explain_refusal(error, address) from error
    else:
        ray.init(
            address="local",
            num_cpus=runtime.logical_cpus or max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=runtime.object_store_bytes,
            **options,
        )
        if found := lacking(needs(runtime, checked), machines(), is_private=True):
            raise ClusterError("\n".join(found))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A replayed task must give as many blocks as the first time; sampled text differs in length,
    # so blocks must not be split by size.
    context.target_max_block_size = None
    context.execution_options.preserve_order = False
    prepare_pools(context)


def _not_set_by_job(variables: dict[str, str]) -> dict[str, str]:
    """Without those that the submitted job's environment sets: Ray refuses to be told twice."""
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}")
    theirs = (submitted.get("runtime_env") or {}).get("env_vars") or {}
    return {name: value for name, value in variables.items() if name not in theirs}


@contextmanager
def quiet(log: Path) -> Iterator[Console]:
    """Sends the process's stdout and stderr to a file and yields a console on the real stdout.

    By file descriptor, because most of the noise is written by C++ and by child processes. What
    this package warns of is no noise, and is said on the console.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    stream = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    with log.open("ab") as sink:
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
    console, own = Console(file=stream), logging.getLogger("reasonembed")
    warnings = _Said(console)
    own.addHandler(warnings)
    try:
        yield console
    except BaseException as error:
        traceback.print_exc()  # the whole story goes to the file; the caller shows the short one
        if not is_expected(error):
            error.add_note(f"Ray's log and the whole traceback: {log}")
        raise
    finally:
        own.removeHandler(warnings)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        stream.close()


class _Said(logging.Handler):
    """Says warnings on a console, above whatever renews itself there."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.WARNING)
        self._reporter = Reporter(console, as_json=is_json_wanted())

    def emit(self, record: logging.LogRecord) -> None:
        """One warning."""
        self._reporter.say(self.format(record))


def perform(job: Job, stage: str, runner: Callable[[Job], dict[str, Any]]) -> None:
    """Runs one stage, notes its time and result, and says both.

    Raises:
        ConfigError: An earlier stage has run in shards, and not all of them are there.
    """
    _check_whole(job.run, stage)
    with job.reporter.during(stage):
        with (
            job.budget.during(stage) if job.budget else nullcontext(),
            _logged(stage),
            job.run.timed(stage) as note,
            _noted(job, note),
            _in_shards(job, stage),
        ):
            note["result"] = result = runner(job)
        job.run.save_config()  # not before: a refused configuration must not pass for the run's own
        shown = ", ".join(f"{key}: {value}" for key, value in result.items() if value != 0)
        job.reporter.say(f"      {shown} ({duration(note['seconds'])})")


@contextmanager
def _logged(stage: str) -> Iterator[None]:
    started = time.monotonic()
    _LOG.info("stage begins")
    try:
        yield
    except BaseException as error:
        _LOG.info("stage %s ends by %s", stage, type(error).__name__)
        raise
    _LOG.info("stage done", extra={"facts": {"seconds": round(time.monotonic() - started, 2)}})


@contextmanager
def _noted(job: Job, note: dict[str, Any]) -> Iterator[None]:
    if job.shard:
        note["shard"] = str(job.shard)
    job.underway.append(note)
    try:
        yield
    finally:
        job.underway.remove(note)


@contextmanager
def _in_shards(job: Job, stage: str) -> Iterator[None]:
    """Keeps account of shards, so that stages that need the whole can ask for it."""
    records = _records(job.run, stage)
    if job.shard is None:
        yield
        if records:
            records.forget()
        return
    assert records is not None, f"{stage} is none of {_IN_SHARDS}"
    before = records.begin(job.shard)
    try:
        yield
    except (ConfigError, DriftError):
        records.restore(before)  # what is refused is no attempt
        raise
    records.end(job.shard)
    if missing := _missing(records, stage):
        job.reporter.say(f"      still to be run before the next stage: {stage} {missing}")


def _records(run: Run, stage: str) -> ShardRecords | None:
    if stage not in _IN_SHARDS:
        return None
    outputs = run.outputs(stage)
    # Vectors may be shared between runs; which shards of a run have come is the run's own.
    return ShardRecords(outputs[0].place if outputs else run.place / "embeddings")


def _missing(records: ShardRecords, stage: str) -> str:
    """How to run what is missing; empty if nothing is."""
    if missing := records.missing():
        return "with --shard " + ", ".join(map(str, missing))
    # Searching can be shared out, fusing what was found cannot.
    return "without --shard" if stage == "mine" and records.exist() else ""


def _check_whole(run: Run, stage: str) -> None:
    earlier = STAGES[: STAGES.index(stage)] if stage in STAGES else STAGES
    for name in earlier:
        records = _records(run, name)
        if records and (missing := _missing(records, name)):
            raise ConfigError(
                f"{stage} needs all rows of {name}, which has run in shards and not in all of "
                f"them; run {name} {missing}, or {name} as a whole"
            )


def main(
    runner: Callable[[Job], dict[str, Any]],
    *,
    description: str | None,
    stage: str,
) -> None:
    """Runs one stage from the command line; see `arguments_of`.

    Args:
        runner: What runs.
        description: Of the job, for `--help`.
        stage: Name of the stage.
    """
    arguments = arguments_of(description).parse_args()
    with explained():
        config = load(arguments.config, overrides=arguments.set)
        retry = statuses_from(arguments.retry)
        shard = Shard.parse(arguments.shard) if arguments.shard else None
        with session(config, retry=retry, stages=(stage,), shard=shard) as job:
            perform(job, stage, runner)


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """What every job of a run takes: `config`, `set`, `retry` and `shard`."""
    parser = parser_of(description)
    parser.add_argument(
        "--shard", default="", metavar="I/N", help="compute the I-th of N parts of the rows"
    )
    return parser


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """What every job takes: `config`, `set` and `retry`."""
    parser = argparse.ArgumentParser(description=description, epilog=_EXIT_CODES)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.KEY=VALUE")
    parser.add_argument("--retry", default="", metavar="STATUS,...", help="e.g. error,truncated")
    return parser


def parse_arguments(description: str | None) -> argparse.Namespace:
    """The arguments of a job that is about no run."""
    return parser_of(description).parse_args()


@contextmanager
def explained() -> Iterator[None]:
    """Ends the process with one message and an exit code where the body fails."""
    try:
        yield
    except Exception as error:  # the process boundary: one message, one exit code
        message, code = explain(error)
        sys.stderr.write(f"{message}\n")
        if not is_expected(error):
            sys.stderr.write(traceback.format_exc())
        sys.exit(code)
