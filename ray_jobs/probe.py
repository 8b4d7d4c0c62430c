"""The planner's probe: stages over few rows, by the jobs and on the pools of the run itself."""

from __future__ import annotations

from pathlib import Path

from ray_jobs.job import perform, session
from ray_jobs.pipeline import RUNNERS
from reasonembed.config import RunConfig
from reasonembed.errors import ConfigError, ModelError, QualityError
from reasonembed.lease import held
from reasonembed.planner.probe import probe_config
from reasonembed.run import Run


def probe(config: RunConfig, folder: Path, *, rows: int) -> Run:
    """Runs the scratch run beside `config`'s, from the beginning; gives it.

    A stage that fails by its rows ends the probe, not the plan: what came before was measured.

    Args:
        config: Of the real run.
        folder: For the sampled texts.
        rows: Of each LLM stage, about.

    Raises:
        ConfigError: No stage could be run.
    """
    scratch = probe_config(config, folder, rows=rows)
    run, done = Run(scratch), 0
    with held(run.place):  # another probe of this run may be at work
        pass
    run.place.delete()
    with session(scratch) as job:
        for stage in run.stages:
            job.reporter.say(f"[probe] {stage}")
            try:
                perform(job, stage, RUNNERS[stage])
            except (ConfigError, ModelError, QualityError) as error:
                if not done:
                    raise
                job.reporter.say(f"      not measured from here on: {error}")
                break
            done += 1
    return run
