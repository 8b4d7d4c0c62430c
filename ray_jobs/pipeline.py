"""Every stage in order: from a corpus to a trained, evaluated, servable embedder.

One driver for all of them: a stage's actors end with the stage, and no stage leaves a placement
group behind (an engine on several GPUs keeps them inside one node and one actor), so between two
stages the cluster holds nothing and can shrink.
"""

from collections.abc import Callable
from typing import Any

from ray_jobs import (
    annotate,
    assemble,
    audit,
    corpus,
    embed,
    evaluate,
    export,
    filter,
    generate,
    mine,
    plan,
    rewrite,
    train,
)
from ray_jobs.job import Job, explained, parser_of, perform, session
from reasonembed.config import RunConfig, load
from reasonembed.errors import ConfigError
from reasonembed.planner.show import planned_and_actual
from reasonembed.report import write_report
from reasonembed.run import Run, statuses_from

RUNNERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "corpus": corpus.run,
    "filter": filter.run,
    "plan": plan.run,
    "generate": generate.run,
    "embed": embed.run,
    "mine": mine.run,
    "annotate": annotate.run,
    "audit": audit.run,
    "rewrite": rewrite.run,
    "assemble": assemble.run,
    "train": train.run,
    "export": export.run,
    "evaluate": evaluate.run,
}
"""What runs each stage."""


def selected(run: Run, first: str | None, last: str | None) -> tuple[str, ...]:
    """The run's stages from `first` to `last`, both included.

    Raises:
        ConfigError: A stage is unknown or none of this configuration's, or the range is empty.
    """
    stages = run.stages
    for name in (first, last):
        if name is not None and name not in stages:
            raise ConfigError(f"no stage {name!r} in this run; its stages are {', '.join(stages)}")
    start = stages.index(first) if first else 0
    stop = stages.index(last) if last else len(stages) - 1
    if start > stop:
        raise ConfigError(f"stage {first!r} comes after {last!r}; nothing to run")
    return stages[start : stop + 1]


def run_stages(job: Job, stages: tuple[str, ...]) -> None:
    """Runs stages, says what each gave, and writes the report after the last."""
    for number, stage in enumerate(stages, start=1):
        job.reporter.say(f"[{number}/{len(stages)}] {stage}")
        perform(job, stage, RUNNERS[stage])
    for line in planned_and_actual(job.run):
        job.reporter.say(line)
    file = write_report(job.run)
    job.reporter.say(f"Report: {file}")


def run_pipeline(
    config: RunConfig,
    *,
    first: str | None = None,
    last: str | None = None,
    retry: str = "",
    is_fresh: bool = False,
    is_growing: bool = False,
    mine_with: str | None = None,
) -> None:
    """Runs a configuration's stages in a session of their own.

    Args:
        config: Of the run.
        first: See `selected`.
        last: See `selected`.
        retry: Statuses of rows that are computed again, with commas between.
        is_fresh: Whether what the first stage and those after it have made is discarded.
        is_growing: See `Run`.
        mine_with: Another run, whose rows are taken over and whose model is the miner.
    """
    first_round = Run.existing(mine_with) if mine_with else None
    if first_round:
        config = first_round.next_round(config)
    stages = selected(Run(config), first, last)
    again = statuses_from(retry)

    def prepare(target: Run) -> None:
        if is_fresh:
            target.discard_from(stages[0])
        if first_round:
            target.adopt(first_round)

    with session(config, retry=again, prepare=prepare, is_growing=is_growing, stages=stages) as job:
        run_stages(job, stages)


def main() -> None:
    """Runs the job from the command line: as a stage's, and with the options of `run`."""
    parser = parser_of(__doc__)
    parser.add_argument("--from", dest="first", metavar="STAGE", help="first stage")
    parser.add_argument("--to", dest="last", metavar="STAGE", help="last stage")
    parser.add_argument("--fresh", action="store_true", help="discard what there is from there on")
    parser.add_argument("--grow", action="store_true", help="documents were added: keep all rows")
    parser.add_argument("--mine-with", metavar="RUN", help="a second round, after this run")
    arguments = parser.parse_args()
    with explained():
        run_pipeline(
            load(arguments.config, overrides=arguments.set),
            first=arguments.first,
            last=arguments.last,
            retry=arguments.retry,
            is_fresh=arguments.fresh,
            is_growing=arguments.grow,
            mine_with=arguments.mine_with,
        )


if __name__ == "__main__":
    main()
