"""Reads the corpus into the run."""

from ray_jobs.job import Job, main
from reasonembed.corpus import read_corpus


def run(job: Job) -> dict[str, int]:
    """Commits `corpus` as one part; a corpus is read whole or not at all."""
    artifact = job.run.artifact("corpus")
    job.run.begin("corpus", artifact)
    if not artifact.commits():
        config = job.run.config.corpus
        artifact.commit("corpus", read_corpus(config.source, task=config.task, limit=config.limit))
    table = artifact.read(columns=["group_id"])
    groups = len(table.column("group_id").unique())
    return {"documents": table.num_rows, "distinct texts": groups}


if __name__ == "__main__":
    main(run, stage="corpus", description=__doc__)
