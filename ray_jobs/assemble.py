"""Turns judged candidates into training samples."""

from ray_jobs.job import Job, main
from reasonembed.errors import QualityError
from reasonembed.remixer.assemble import JUDGED_COLUMNS, assemble_samples


def run(job: Job) -> dict[str, int]:
    """Commits `samples` as one part."""
    artifact = job.run.artifact("samples")
    job.run.begin("assemble", artifact)
    queries = job.run.artifact("queries").read()
    names = queries.column("task").unique().to_pylist()
    assembly = assemble_samples(
        queries,
        job.run.artifact("judgments").read(columns=JUDGED_COLUMNS),  # the analyses are long
        job.run.artifact("rewrites").read(),
        corpus=job.run.corpus_store(),
        config=job.run.config.assemble,
        instructions={name: job.run.config.task_table[name].instruction for name in names},
    )
    if not assembly.samples.num_rows:
        raise QualityError(
            f"no query became a sample: {assembly.funnel}. With the threshold rule a query "
            f"needs a label >= {job.run.config.assemble.positive_min} and one <= "
            f"{job.run.config.assemble.negative_max} among its candidates."
        )
    if not artifact.commits():
        artifact.commit("samples", assembly.samples)
    return assembly.funnel


if __name__ == "__main__":
    main(run, stage="assemble", description=__doc__)
