"""Turns judged candidates, or samples that were made elsewhere, into training samples."""

from ray_jobs.job import Job, main
from reasonembed.config import SampleSource
from reasonembed.errors import QualityError
from reasonembed.remixer.assemble import (
    CANDIDATE_COLUMNS,
    JUDGED_COLUMNS,
    Assembler,
    Inputs,
    SampleWriter,
)
from reasonembed.remixer.formats import read_source
from reasonembed.remixer.lines import Tally


def run(job: Job) -> dict[str, int]:
    """Commits `samples` in parts; only with the last of them the stage is finished."""
    artifact = job.run.artifact("samples")
    job.run.begin("assemble", artifact)
    if (finished := artifact.finished()) is not None:
        return finished
    writer = SampleWriter(artifact)
    make = _import if job.run.config.assemble.sources else _assemble
    counts = make(job, writer)
    artifact.finish(counts | writer.counts())
    return counts | writer.counts()


def _assemble(job: Job, writer: SampleWriter) -> dict[str, int]:
    run = job.run
    if run.config.assemble.positives_from == "source":
        job.reporter.say("      a control: each query's source document is its one positive")
    assembler = Assembler(
        Inputs(
            queries=run.artifact("queries").read(),
            candidates=run.artifact("candidates").read(columns=CANDIDATE_COLUMNS),
            judgments=run.artifact("judgments").read(columns=JUDGED_COLUMNS),
            rewrites=run.artifact("rewrites").read(),
            corpus=run.corpus_store(),
        ),
        config=run.config.assemble,
        tasks=run.config.task_table,
        max_query_similarity=run.config.generate.max_query_similarity,
        max_source_rank=run.config.mine.max_source_rank,
    )
    if not writer.write(assembler.samples(), name="samples"):
        raise QualityError(
            f"no query became a sample: {assembler.funnel}. With the threshold rule a query "
            f"needs a label >= {run.config.assemble.positive_min} and one <= "
            f"{run.config.assemble.negative_max} among its candidates."
        )
    return assembler.funnel


def _import(job: Job, writer: SampleWriter) -> dict[str, int]:
    config = job.run.config
    counts = {"sample": 0, "unusable lines": 0}
    for number, source in enumerate(config.assemble.sources):
        tally = Tally(source.max_bad_share)
        rows = read_source(
            source,
            tasks=config.task_table,
            held_out_share=config.assemble.held_out_share,
            tally=tally,
            scratch=job.run.dir if job.run.place.is_local else None,
        )
        found = writer.write(rows, name=f"source-{number:02d}")
        if not found:
            raise QualityError(
                "; ".join([f"assemble.sources: {source.path} holds no sample", *tally.remarks()])
            )
        counts["sample"] += found
        counts["unusable lines"] += tally.bad
        remarks = [f"{found} samples from {source.path}", *tally.remarks(), *_remarks(source)]
        job.reporter.say(f"      {'; '.join(remarks)}")
    return counts


def _remarks(source: SampleSource) -> list[str]:
    if source.form in ("run", "parquet", "reasonembed"):
        return []
    return ["without rewritten queries all intensities are 1 and the loss is plain InfoNCE"]


if __name__ == "__main__":
    main(run, stage="assemble", description=__doc__)
