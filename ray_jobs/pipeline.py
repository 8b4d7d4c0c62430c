"""Every stage in order: from a corpus to a trained, evaluated, servable embedder."""

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
from ray_jobs.job import Job, main, perform
from reasonembed.errors import ConfigError
from reasonembed.report import write_report
from reasonembed.run import Run

_RUNNERS: dict[str, Callable[[Job], dict[str, Any]]] = {
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
        perform(job, stage, _RUNNERS[stage])
    file = write_report(job.run)
    job.reporter.say(f"Report: {file}")


def run(job: Job) -> None:
    """All stages."""
    run_stages(job, job.run.stages)


if __name__ == "__main__":
    main(run, description=__doc__)
