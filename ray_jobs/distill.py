"""Teaches a small annotator: a teacher's trajectories, fine-tuning, agreement on held-out pairs."""

import json
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.train

from ray_jobs.job import Job, main
from ray_jobs.ledger import run_planned
from ray_jobs.train import (
    check_finished,
    in_worker,
    trainer,
    until,
    watched_log,
    working_folder,
)
from reasonembed.artifacts import Artifact, Mapper, check_share
from reasonembed.config import DistillConfig, LLMConfig, TrainRuntime, flatten
from reasonembed.errors import ConfigError
from reasonembed.llm.protocol import Engine, WithEngine
from reasonembed.logs import WorkerLog
from reasonembed.models import resolve, weights_fingerprint
from reasonembed.redapter.sft import ChatTokenizer, Example, StepPlan, fine_tune, save_student
from reasonembed.redapter.trackers import Trackers, require
from reasonembed.remixer.annotate import JudgedQuery, query_blocks
from reasonembed.remixer.distill import (
    Analyst,
    Selection,
    compare,
    held_out_queries,
    keep_planned,
    plan_trajectories,
    select_trajectories,
)
from reasonembed.run import Run
from reasonembed.schemas import Status
from reasonembed.storage import Place

_FOLDER = "annotator"


@dataclass(frozen=True)
class _Make:
    """Builds the teacher, or the student, inside an actor."""

    config: DistillConfig
    llm: LLMConfig
    role: str
    run: Run
    queries: dict[str, JudgedQuery]

    def __call__(self, engine: Engine) -> Mapper:
        return Analyst(
            self.config,
            llm=self.llm,
            role=self.role,
            engine=engine,
            corpus=self.run.corpus_store(),
            queries=self.queries,
            tasks=self.run.config.task_table,
        )


@dataclass(frozen=True)
class _Payload:
    """What a training worker gets; small, the trajectories are read where they are needed."""

    config: DistillConfig
    runtime: TrainRuntime
    run: Run
    until: float


def run(job: Job) -> dict[str, Any]:
    """Commits `trajectories`; writes `annotator/`: the model, and how far it agrees."""
    config, queries = job.run.distill_config(), _queries(job.run)
    planned = _plan(job.run, config, known=queries)
    held_out = held_out_queries(
        {id_: queries[id_]["source_doc_id"] for id_ in planned.column("query_id").to_pylist()},
        share=config.held_out_share,
        seed=config.seed,
    )
    asked = {id_: JudgedQuery(row["query"], row["task"]) for id_, row in queries.items()}
    trajectories = job.run.artifact("trajectories")
    job.run.begin("trajectories", trajectories)
    _ask(job, planned, trajectories, _Make(config, config.llm, "teacher", job.run, asked))
    # A gate for the teacher alone: a student that fails is a finding.
    check_share(trajectories, config.max_failed_share)
    directory = job.run.directory("annotator")
    job.run.begin("annotator", directory)
    if (finished := directory.finished()) is not None:
        return finished
    written = keep_planned(trajectories.read(), planned)
    summary = _teach(job, config, select_trajectories(written, held_out=held_out, config=config))
    if held_out:
        of_held_out = pc.is_in(planned.column("query_id"), pa.array(sorted(held_out), pa.string()))
        summary |= _examine(job, config, planned.filter(of_held_out), written, asked)
    directory.finish(summary)
    return summary


def _queries(run: Run) -> dict[str, dict[str, Any]]:
    columns = ["query_id", "query", "source_doc_id", "task", "status"]
    rows = run.artifact("queries").read(columns=columns).to_pylist()
    return {row["query_id"]: row for row in rows if row["status"] == Status.OK}


def _plan(run: Run, config: DistillConfig, *, known: Collection[str]) -> pa.Table:
    candidates = run.artifact("candidates").read(columns=["query_id", "task", "doc_ids"])
    candidates = candidates.filter(
        pc.is_in(candidates.column("query_id"), pa.array(sorted(known), pa.string()))
    )
    planned = plan_trajectories(
        candidates, max_pairs=config.max_pairs, samples=config.samples, seed=config.seed
    )
    if not planned.num_rows:
        raise ConfigError(
            f"{run.place} has no candidates to be judged; run it up to the stage mine first"
        )
    return planned


def _ask(job: Job, planned: pa.Table, artifact: Artifact, make: _Make) -> None:
    runtime = job.run.config.runtime
    engine = WithEngine(make.llm, runtime.engine, runtime.cache_dir, make)
    pool = runtime.distill
    run_planned(
        job, planned, artifact, engine, pool,
        label=make.role, overlap=pool.overlap, cut=query_blocks,
    )  # fmt: skip


# ---- the student learns -----------------------------------------------------------------------


def _teach(job: Job, config: DistillConfig, selection: Selection) -> dict[str, Any]:
    """Trains and saves the student; it is not trained again if it lies there already."""
    _training(job.run).commit("selected", selection.rows)
    job.reporter.say(f"      trajectories: {_counts(selection.funnel)}")
    for task, labels in selection.labels.items():
        job.reporter.say(f"      {task}, by label: {_counts(labels)}")
    examples = _examples(job.run, config)
    steps = StepPlan(examples, config).total_steps
    if not (job.run.annotator_place / "config.json").is_file():
        _train(job, config, steps=steps)
    return {
        "asked": selection.funnel["asked"],
        "kept": selection.funnel["kept"],
        "too long": selection.rows.num_rows - len(examples),
        "steps": steps,
    }


def _training(run: Run) -> Artifact:
    return Artifact.declared(str(run.annotator_place.parent / "training"), "trajectories")


def _student(run: Run, config: DistillConfig) -> Path:
    return resolve(config.student, cache_dir=run.config.runtime.cache_dir)


def _examples(run: Run, config: DistillConfig) -> list[Example]:
    """What is learnt, as tokens; what does not fit is left out, for without its end it is none."""
    tokenizer = ChatTokenizer(
        _student(run, config), template_arguments=config.llm.chat_template_kwargs
    )
    rows = _training(run).read(columns=["prompt", "answer"]).to_pylist()
    examples = [tokenizer.example(row["prompt"], answer=row["answer"]) for row in rows]
    return [example for example in examples if len(example.ids) <= config.max_tokens]


def _worker(payload: dict[str, _Payload]) -> None:
    work = payload["payload"]
    WorkerLog(work.run.name, "distill").start()
    folder = working_folder(work.run, _FOLDER)
    in_worker(
        partial(
            fine_tune,
            work.config,
            _examples(work.run, work.config),
            weights=_student(work.run, work.config),
            runtime=work.runtime,
        ),
        storage=work.run.annotator_place.parent,
        folder=folder,
        trackers=Trackers(
            work.runtime.trackers,
            directory=folder,
            settings=flatten(work.config, prefix="distill"),
        ),
        until=work.until,
    )


def _train(job: Job, config: DistillConfig, *, steps: int) -> None:
    runtime, place = job.run.config.runtime.train, job.run.annotator_place.parent
    require(runtime.trackers)
    log = watched_log(job.run, _FOLDER)
    payload = _Payload(config, runtime, job.run, until=until(job))
    with job.reporter.watching(
        "student", total=steps, done=lambda: len(log.steps()), unit="steps", note=log.summary
    ):
        result = trainer(_worker, payload, runtime=runtime, storage=place).fit()
    check_finished(job, result, steps=steps)
    assert result.checkpoint is not None, "training ended without a checkpoint"
    ray.get(_save.remote(config, result.checkpoint, run=job.run))


@ray.remote(num_cpus=1)
def _save(config: DistillConfig, checkpoint: ray.train.Checkpoint, *, run: Run) -> None:
    weights, place = _student(run, config), run.annotator_place
    with checkpoint.as_directory() as folder, tempfile.TemporaryDirectory() as scratch:
        output = place.local if place.is_local else Path(scratch) / place.name
        save_student(config, Path(folder), weights=weights, output_dir=output)
        if not place.is_local:
            _put_model(output, place)


def _put_model(folder: Path, place: Place) -> None:
    """What says that the model is there goes last."""
    first = [child for child in folder.iterdir() if child.name != "config.json"]
    for child in [*first, folder / "config.json"]:
        (place / child.name).put(child)


# ---- the student is measured ------------------------------------------------------------------


def _examine(
    job: Job,
    config: DistillConfig,
    planned: pa.Table,
    written: pa.Table,
    queries: dict[str, JudgedQuery],
) -> dict[str, Any]:
    """The student judges the held-out pairs; `agreement.json` compares it with the teacher."""
    place = job.run.annotator_place
    answers = Artifact.declared(str(place.parent / "held_out"), "trajectories")
    model = resolve(place.uri, cache_dir=job.run.config.runtime.cache_dir)
    answers.begin({"student": weights_fingerprint(model)})
    llm = student_llm(config, model).model_copy(update={"model": place.uri})
    _ask(job, planned, answers, _Make(config, llm, "student", job.run, queries))
    found = compare(
        keep_planned(written, planned), answers.read(), min_agreement=config.min_agreement
    )
    found["engines"] = {"teacher": config.llm.engine, "student": llm.engine}
    (place.parent / "agreement.json").write(json.dumps(found, indent=1).encode())
    return _told(job, found)


def student_llm(config: DistillConfig, model: Path) -> LLMConfig:
    """The student as an LLM: on vLLM, or rehearsed where the teacher is scripted, too."""
    settings = json.loads((model / "config.json").read_text(encoding="utf-8"))
    positions = settings.get("max_position_embeddings") or config.llm.max_model_len
    changes = {
        "model": str(model),
        "engine": "scripted" if config.llm.engine == "scripted" else "vllm",
        "dtype": config.dtype,
        "max_model_len": min(config.llm.max_model_len, positions),
    }
    return config.llm.model_copy(update=changes)


def _told(job: Job, found: dict[str, Any]) -> dict[str, Any]:
    for side in ("teacher", "student"):
        cost, repeats = found[side]["cost"], found[side]["consistency"]
        job.reporter.say(
            f"      {side} ({found['engines'][side]}), a thousand pairs: "
            f"{cost['read_per_1000']:,.0f} tokens read, {cost['written_per_1000']:,.0f} written"
            + (f"; two analyses agree: {repeats['exact']:.2f}" if repeats else "")
        )
    agreement = found["agreement"]
    if agreement is None:
        return {"held-out pairs": found["pairs"], "pairs that both label": 0}
    kappa = agreement["weighted_kappa"]
    return {
        "held-out pairs": found["pairs"],
        "pairs that both label": agreement["num_pairs"],
        "exact": round(agreement["exact"], 3),
        "within one": round(agreement["within_one"], 3),
        "same side of 3": round(agreement["binary"], 3),
        "weighted kappa": None if kappa is None else round(kappa, 3),
    }


def _counts(found: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in found.items())


if __name__ == "__main__":
    main(run, stage="distill", description=__doc__)
