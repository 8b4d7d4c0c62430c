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
    generate,
    mine,
    plan,
    rewrite,
    train,
)
from ray_jobs.job import Job, main, perform
from reasonembed.errors import ConfigError
from reasonembed.report import write_report
from reasonembed.run import STAGES

_RUNNERS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "corpus": corpus.run,
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


def selected(first: str | None, last: str | None) -> tuple[str, ...]:
    """The stages from `first` to `last`, both included.

    Raises:
        ConfigError: A stage is unknown, or the range is empty.
    """
    for name in (first, last):
        if name is not None and name not in STAGES:
            raise ConfigError(f"no stage {name!r}; stages are {', '.join(STAGES)}")
    start = STAGES.index(first) if first else 0
    stop = STAGES.index(last) if last else len(STAGES) - 1
    if start > stop:
        raise ConfigError(f"stage {first!r} comes after {last!r}; nothing to run")
    return STAGES[start : stop + 1]


def run_stages(job: Job, stages: tuple[str, ...] = STAGES) -> None:
    """Runs stages, says what each gave, and writes the report after the last."""
    for number, stage in enumerate(stages, start=1):
        job.reporter.say(f"[{number}/{len(stages)}] {stage}")
        perform(job, stage, _RUNNERS[stage])
    file = write_report(job.run)
    job.reporter.say(f"Report: {file}")


def run(job: Job) -> None:
    """All stages."""
    run_stages(job)


if __name__ == "__main__":
    main(run, description=__doc__)
