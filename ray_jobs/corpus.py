"""Reads the corpus into the run."""

from ray_jobs.job import Job, main
from reasonembed.corpus import check_only_added, read_corpus


def run(job: Job) -> dict[str, int]:
    """Commits `corpus`; a corpus is read whole or not at all, and grows by whole parts."""
    artifact, config = job.run.artifact("corpus"), job.run.config.corpus
    if job.run.is_growing or not artifact.commits():
        found = read_corpus(config.source, task=config.task, limit=config.limit)
        check_only_added(artifact.read(columns=["doc_id", "text_hash"]), found)
        job.run.begin("corpus", artifact)
        new = artifact.missing(found)
        if new.num_rows:
            artifact.commit(f"corpus-{len(artifact.commits()):06d}", new)
    else:
        job.run.begin("corpus", artifact)
    table = artifact.read(columns=["group_id"])
    groups = len(table.column("group_id").unique())
    return {"documents": table.num_rows, "distinct texts": groups}


if __name__ == "__main__":
    main(run, stage="corpus", description=__doc__)
