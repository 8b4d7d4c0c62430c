"""What every job shares: its arguments, its Ray session, its exit codes, and its quiet console."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read by Ray when it is imported; 32 footer actors and usage pings have no place in a small run.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import ray
from rich.console import Console

from reasonembed.artifacts import locked
from reasonembed.config import PoolConfig, RunConfig, RuntimeConfig, load
from reasonembed.errors import ConfigError, explain, is_expected
from reasonembed.progress import Reporter, duration
from reasonembed.run import Run, statuses_from

_MIN_LOGICAL_CPUS = 4  # fewer starve Ray's own helpers behind a pool that holds them all


@dataclass(frozen=True)
class Job:
    """A stage's surroundings: the run, where to speak, and which failed rows to try again."""

    run: Run
    reporter: Reporter
    retry: frozenset[str] = frozenset()


@contextmanager
def session(
    config: RunConfig,
    *,
    retry: frozenset[str] = frozenset(),
    prepare: Callable[[Run], None] | None = None,
    is_growing: bool = False,
) -> Iterator[Job]:
    """Locks the run, joins or starts Ray, and keeps Ray's own noise in `logs/ray.log`.

    Args:
        config: The run's configuration.
        retry: Statuses of rows that are computed again.
        prepare: Called with the locked run before Ray starts.
        is_growing: See `Run`.
    """
    run = Run(config, is_growing=is_growing)
    with locked(run.dir), quiet(run.dir / "logs" / "ray.log") as console:
        if prepare:
            prepare(run)
        if not run.config_file.is_file():
            run.save_config()  # so that a run that fails at once can be looked at
        try:
            join_or_start(run.config.runtime)
            yield Job(run, Reporter(console), retry)
        finally:
            ray.shutdown()


def join_or_start(runtime: RuntimeConfig) -> None:
    """Joins the cluster that RAY_ADDRESS names, or starts a private one on this machine."""
    environment = {"env_vars": {"TOKENIZERS_PARALLELISM": "false"}}
    options = {"log_to_driver": False, "logging_level": "ERROR", "runtime_env": environment}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**options)
    else:
        ray.init(
            address="local",
            num_cpus=runtime.logical_cpus or max(_MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=runtime.object_store_bytes,
            **options,
        )
        _check_resources(runtime, ray.cluster_resources())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A replayed task must give as many blocks as the first time; sampled text differs in length,
    # so blocks must not be split by size.
    context.target_max_block_size = None
    context.execution_options.preserve_order = False


def _check_resources(runtime: RuntimeConfig, have: Mapping[str, float]) -> None:
    """Refuses pools that this machine can never hold; Ray would wait for them without a word."""
    wanted = {}
    for name in ("filter", "generate", "embed", "mine", "annotate", "rewrite", "distill"):
        pool: PoolConfig = getattr(runtime, name)
        wanted[name] = (pool.min_actors * pool.num_cpus, pool.min_actors * pool.num_gpus)
    train = runtime.train
    wanted["train"] = (train.num_workers * train.num_cpus, train.num_workers * train.use_gpu)
    cpus, gpus = have.get("CPU", 0), have.get("GPU", 0)
    for name, (num_cpus, num_gpus) in wanted.items():
        if num_gpus > gpus:
            raise ConfigError(
                f"runtime.{name} asks for {num_gpus:g} GPUs, this machine has {gpus:g}; lower it, "
                "or join a cluster by RAY_ADDRESS"
            )
        if num_cpus >= cpus:  # what reads and writes needs room beside the pool
            raise ConfigError(
                f"runtime.{name} asks for {num_cpus:g} CPUs and leaves nothing of this machine's "
                f"{cpus:g} logical CPUs; lower it or raise runtime.logical_cpus"
            )


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
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """One warning."""
        Reporter(self._console).say(self.format(record))


def perform(job: Job, stage: str, runner: Callable[[Job], dict[str, Any]]) -> None:
    """Runs one stage, notes its time and result, and says both."""
    with job.run.timed(stage) as note:
        note["result"] = result = runner(job)
    job.run.save_config()  # not before: a refused configuration must not pass for the run's own
    shown = ", ".join(f"{key}: {value}" for key, value in result.items() if value != 0)
    job.reporter.say(f"      {shown} ({duration(note['seconds'])})")


def main(
    runner: Callable[[Job], dict[str, Any]] | Callable[[Job], None],
    *,
    description: str | None,
    stage: str | None = None,
) -> None:
    """Runs one job from the command line: `--config FILE`, repeated `--set a.b=1`, `--retry`.

    Args:
        runner: What runs; one stage, or several that note their own time.
        description: Of the job, for `--help`.
        stage: Name of the stage, where it is one.
    """
    arguments = parse_arguments(description)
    with explained():
        config = load(arguments.config, overrides=arguments.set)
        retry = statuses_from(arguments.retry)
        with session(config, retry=retry) as job:
            if stage is None:
                runner(job)
            else:
                perform(job, stage, runner)


def parse_arguments(description: str | None) -> argparse.Namespace:
    """What every job takes: `config`, `set` and `retry`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.KEY=VALUE")
    parser.add_argument("--retry", default="", metavar="STATUS,...", help="e.g. error,truncated")
    return parser.parse_args()


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
