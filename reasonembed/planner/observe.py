"""What a run was seen to do: its timeline, commits and rows become measurements.

Blocks that one actor commits one after another give rates free of start-up; several actors, or
blocks that overlap, give one measurement of them all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from reasonembed.artifacts import Artifact
from reasonembed.config import DenseRetriever, EncoderConfig, LLMPool, LLMStageConfig
from reasonembed.planner.answers import Seen, Yields, known_answers, seen_ends
from reasonembed.planner.calibration import Calibration, Measurement
from reasonembed.planner.formulae import Device
from reasonembed.planner.inputs import Inputs
from reasonembed.planner.loads import (
    Load,
    Site,
    embed_key,
    embed_work,
    engine_bits,
    engine_for,
    llm_key,
    llm_work,
    loads,
    planned_training,
    prompts,
    train_key,
    train_work,
)
from reasonembed.redapter.log import TrainLog
from reasonembed.remixer.mine import read_documents
from reasonembed.run import Run
from reasonembed.schemas import Status

_LLM = {
    "filter": ("domains", "filter"),
    "generate": ("queries", "generate"),
    "annotate": ("judgments", "annotate"),
    "audit": ("audit", "annotate"),
    "rewrite": ("rewrites", "rewrite"),
}
_COLUMNS = [
    "prompt_tokens", "cached_tokens", "completion_tokens", "tries", "finish_reason", "status"
]  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """When a stage was at work."""

    stage: str
    started: float
    seconds: float

    @property
    def ended(self) -> float:
        """Seconds since 1970."""
        return self.started + self.seconds

    def holds(self, at_ns: int) -> bool:
        """Whether a commit fell into it."""
        return self.started <= at_ns / 1e9 <= self.ended + 1


@dataclass
class _Found:
    measurements: list[Measurement] = field(default_factory=list)
    seen: dict[str, Seen] = field(default_factory=dict)


@dataclass(frozen=True)
class _Block:
    """A committed block: when, and the work in it."""

    at: float
    load: Load


def observed(run: Run, calibration: Calibration, device: Device, inputs: Inputs) -> Calibration:
    """A calibration with everything that a run shows.

    Args:
        run: Finished stages count, whatever the others do.
        calibration: Of the device that it ran on.
        device: As planned for.
        inputs: Of the run's corpus.
    """
    device = calibration.on(device)
    site = Site(run.config, inputs, device, calibration.statistics)
    attempts = _attempts(run)
    found = _Found()
    parts = list(_parts(site, run, attempts, found))
    yields = _yields(run, calibration)
    draft = calibration.with_measurements(found.measurements, seen=found.seen, yields=yields)
    site = replace(site, statistics=draft.statistics)
    starts = [
        one
        for attempt in attempts
        for one in _starts(
            site, attempt, [part for part in parts if part.attempt is attempt], draft
        )
    ]
    return draft.with_measurements(starts)


def _attempts(run: Run) -> list[Attempt]:
    """The last attempt of each stage, if it was done in one go."""
    last: dict[str, dict[str, Any]] = {}
    count: dict[str, int] = {}
    for note in run.timeline():
        last[note["stage"]] = note
        count[note["stage"]] = count.get(note["stage"], 0) + 1
    return [
        Attempt(name, note["started"], note["seconds"])
        for name, note in last.items()
        if note["outcome"] == "done" and count[name] == 1 and name in run.stages
    ]


@dataclass(frozen=True)
class _Part:
    """One model's work in a stage: its blocks, or of training the seconds that steps took."""

    attempt: Attempt
    key: str
    kind: str
    blocks: tuple[_Block, ...] = ()
    took: float = 0.0


def _parts(site: Site, run: Run, attempts: Sequence[Attempt], found: _Found) -> Iterator[_Part]:
    for attempt in attempts:
        if attempt.stage in _LLM:
            yield from _llm_parts(site, run, attempt, found)
        elif attempt.stage in ("embed", "evaluate"):
            yield from _embed_parts(site, run, attempt, found)
        elif attempt.stage == "train":
            yield from _train_parts(site, run, attempt, found)


# ---- language models ----------------------------------------------------------------------------


def _llm_parts(site: Site, run: Run, attempt: Attempt, found: _Found) -> Iterator[_Part]:
    kind, attribute = _LLM[attempt.stage]
    stage: LLMStageConfig = getattr(run.config, attribute)
    pool: LLMPool = getattr(run.config.runtime, attribute)
    if stage.llm.engine != "vllm":
        return
    artifact = run.artifact(kind)
    commits = artifact.commits()
    held = [one for one in commits if one.rows and attempt.holds(one.committed_at_ns)]
    if not held:
        return
    rows: dict[str, list[dict[str, Any]]] = {}
    for part, _, table in artifact.row_groups(columns=_COLUMNS):
        rows.setdefault(part, []).extend(table.to_pylist())
    _see(site, attempt.stage, stage, [row for one in held for row in rows[one.part]], found)
    blocks = [
        _Block(one.committed_at_ns / 1e9, llm_block(site, stage, rows[one.part])) for one in held
    ]
    key = llm_key(stage, engine_for(run.config.runtime.engine, site.device))
    workers = float(pool.max_actors)
    if any(one.replaces for one in held):  # merged: when each block was done is gone
        found.measurements.append(_measured(key, "llm", blocks, attempt.seconds * workers))
        return
    _note(found, key, "llm", blocks, workers=workers, is_serial=workers == pool.overlap == 1)
    yield _Part(attempt, key, "llm", tuple(blocks))


def llm_block(site: Site, stage: LLMStageConfig, rows: Sequence[dict[str, Any]]) -> Load:
    """The work that rows of an LLM stage were."""
    engine = engine_for(site.config.runtime.engine, site.device)
    shape, bits = site.shape(stage.llm.model), engine_bits(engine, stage.llm.dtype)
    written = math.fsum(row["completion_tokens"] for row in rows)
    read = math.fsum(row["prompt_tokens"] for row in rows)
    cached = math.fsum(row["cached_tokens"] or 0 for row in rows)
    tries = math.fsum(row["tries"] for row in rows)
    many = -(-len(rows) // engine.max_num_seqs)
    steps = max(row["completion_tokens"] for row in rows)
    if many > 1:
        steps = max(steps, written / engine.max_num_seqs)
    context = read / max(1.0, tries) + written / max(1.0, tries) / 2
    work = llm_work(
        shape, computed=read - cached, written=written, steps=steps, context=context, bits=bits
    )
    return Load(
        "llm",
        "",
        rows=len(rows),
        flops=work.read,
        written=work.written,
        traffic=work.traffic,
    )


def _see(
    site: Site, name: str, stage: LLMStageConfig, rows: list[dict[str, Any]], found: _Found
) -> None:
    """Notes how long answers were, how often they were asked for again, and how much was read."""
    base = known_answers(name, site.config)
    tries = math.fsum(row["tries"] for row in rows)
    per_row = base.samples * base.grades  # a token of a grade each
    tokens = [max(0.0, row["completion_tokens"] - per_row) for row in rows]
    # An answer that reached the limit, or whose tries did together, did not end by itself.
    full = [token >= row["tries"] * base.samples * base.limit for token, row in
            zip(tokens, rows, strict=True)]  # fmt: skip
    ends = seen_ends(tokens, [not one for one in full]) if base.limit > 1 else 1.0
    again = (tries - len(rows)) / tries
    draft = Seen(ends, again)
    planned = _planned_prompt(site, name, stage, draft)
    asked = tries * base.samples + len(rows) * per_row
    read = math.fsum(row["prompt_tokens"] for row in rows) / asked
    computed = read - math.fsum(row["cached_tokens"] or 0 for row in rows) / asked
    failed = sum(row["status"] not in (Status.OK, Status.FILTERED) for row in rows) / len(rows)
    found.seen[f"{name}|{stage.llm.model}"] = Seen(
        ends,
        again,
        prompt_ratio=_ratio(read, planned[0]),
        computed_ratio=_ratio(computed, planned[1]),
        failed=failed,
    )


def _planned_prompt(
    site: Site, name: str, stage: LLMStageConfig, draft: Seen
) -> tuple[float, float]:
    seen = {**site.statistics.seen, f"{name}|{stage.llm.model}": draft}
    with_draft = replace(site, statistics=replace(site.statistics, seen=seen))
    prompt = with_draft.statistics.corrected(name, site.config, prompts(with_draft)[name])
    return prompt.tokens, prompt.computed


def _ratio(measured: float, planned: float) -> float:
    return min(4.0, max(0.25, measured / planned)) if planned > 0 else 1.0


# ---- embedding ----------------------------------------------------------------------------------


def _embed_parts(site: Site, run: Run, attempt: Attempt, found: _Found) -> Iterator[_Part]:
    pool = run.config.runtime.embed
    chars = _chars(run)
    for encoder, artifact in _vectors(run, attempt.stage):
        lengths_of = _Lengths(site, encoder, chars)
        ids: dict[str, list[str]] = {}
        for part, _, table in artifact.row_groups(columns=["id"]):
            ids.setdefault(part, []).extend(table.column("id").to_pylist())
        blocks = [
            _Block(commit.committed_at_ns / 1e9, lengths_of.load(ids[commit.part]))
            for commit in artifact.commits()
            if attempt.holds(commit.committed_at_ns)
        ]
        if blocks:
            key = embed_key(encoder, pool.threads)
            workers = float(pool.max_actors)
            _note(found, key, "embed", blocks, workers=workers, is_serial=workers == 1)
            yield _Part(attempt, key, "embed", tuple(blocks))


def _vectors(run: Run, stage: str) -> Iterator[tuple[EncoderConfig, Artifact]]:
    """The encoders of a stage and what they wrote, in the order in which they ran."""
    encoders = run.encoders
    if stage == "embed":
        also = run.config.mine.also.values()
        others = [one.encoder for one in also if isinstance(one, DenseRetriever)]
        pairs = [(one, one) for one in (encoders.miner, *others)]
    else:  # the exported model is as fast as what it was made of
        pairs = [(encoders.backbone, encoders.backbone), (encoders.backbone, encoders.trained)]
    for known_as, encoder in pairs:
        artifact = run.vectors(encoder, dimension=1)
        if artifact.commits():
            yield known_as, artifact


def _chars(run: Run) -> dict[str, int]:
    table = read_documents(run.artifact("corpus")).table.select(["text_id", "chars"])
    return dict(zip(*(column.to_pylist() for column in table.columns), strict=True))


class _Lengths:
    """Tokens of texts by their ids: by characters, at the rate of the sampled documents."""

    def __init__(self, site: Site, encoder: EncoderConfig, chars: dict[str, int]) -> None:
        self._chars, self._limit = chars, encoder.max_document_tokens
        self._shape = site.shape(encoder.model).cut(encoder.layers)
        tokens = math.fsum(site.documents(encoder.model))
        self._rate = tokens / max(1, sum(site.inputs.chars))
        self._query = site.inputs.query_chars

    def load(self, ids: Sequence[str]) -> Load:
        """The work of embedding these."""
        counts = [min(self._limit, self._rate * self._chars.get(id_, self._query)) for id_ in ids]
        return Load("embed", "", rows=len(ids), flops=embed_work(self._shape, counts))


# ---- training -----------------------------------------------------------------------------------


def _train_parts(site: Site, run: Run, attempt: Attempt, found: _Found) -> Iterator[_Part]:
    config = run.config
    steps = TrainLog(run.local("train/log.jsonl")).steps()
    if not steps:
        return
    shape = site.shape(config.train.encoder.model).cut(config.train.encoder.layers)
    workers = config.runtime.train.num_workers
    plan = planned_training(site, samples=len(steps) * config.train.batch_queries)
    share = plan.tokens / max(1.0, plan.tokens + plan.rewritten)
    key = train_key(config)
    for row in steps[1:]:  # the first one warms caches up
        tokens = row["tokens_per_s"] * row["step_s"]
        flops = train_work(
            shape, tokens=tokens * share, rewritten=tokens * (1 - share),
            mean_length=plan.mean_length, tokens_a_step=tokens * share / workers, config=config,
        )  # fmt: skip
        found.measurements.append(
            Measurement(key, "train", row["step_s"] * workers, flops, rows=1.0)
        )
    took = math.fsum(row["step_s"] for row in steps)
    yield _Part(attempt, key, "train", took=took)


# ---- starts -------------------------------------------------------------------------------------


def _note(
    found: _Found, key: str, kind: str, blocks: Sequence[_Block], *, workers: float, is_serial: bool
) -> None:
    """Measurements between the first and the last commit."""
    after = list(blocks[1:])
    if not after:
        return
    if is_serial:
        for before, one in zip(blocks, after, strict=False):
            found.measurements.append(_measured(key, kind, [one], one.at - before.at))
    else:
        span = (blocks[-1].at - blocks[0].at) * min(workers, len(blocks))
        found.measurements.append(_measured(key, kind, after, span))


def _measured(key: str, kind: str, blocks: Sequence[_Block], seconds: float) -> Measurement:
    return Measurement(
        key,
        kind,
        seconds,
        math.fsum(one.load.flops for one in blocks),
        math.fsum(one.load.written for one in blocks),
        math.fsum(one.load.traffic for one in blocks),
        math.fsum(one.load.rows for one in blocks),
    )


def _starts(
    site: Site, attempt: Attempt, parts: Sequence[_Part], draft: Calibration
) -> Iterator[Measurement]:
    """What of a stage's time was no work of a model: its starts, and the rest of the stage."""
    before = attempt.started
    for part in parts:
        if part.kind == "train":
            start = max(0.0, attempt.seconds - part.took)
            yield Measurement(part.key, part.kind, start_s=start, stage=attempt.stage)
            return
        first = part.blocks[0]
        load = replace(first.load, key=part.key)
        work = draft.rates(load, site.device).work_s(load)
        start = max(0.0, first.at - before - work)
        yield Measurement(part.key, part.kind, start_s=start, stage=attempt.stage)
        before = part.blocks[-1].at
    rest = [load for load in loads(site, [attempt.stage])[attempt.stage] if load.kind == "cpu"]
    for load in rest[-1:]:
        yield Measurement(load.key, "cpu", seconds=max(0.0, attempt.ended - before), rows=load.rows)


def _yields(run: Run, calibration: Calibration) -> Yields:
    """Shares that went on from stage to stage."""
    known = calibration.yields or Yields()
    seeds, queries, samples = (run.artifact(name) for name in ("seeds", "queries", "samples"))
    kept = known.kept
    if seeds.commits() and queries.commits():
        planned = sum(commit.rows for commit in seeds.commits())
        usable = queries.statuses()[Status.OK]
        share = usable / planned if planned else known.queries
        made = known.samples
        if samples.commits() and usable:
            made = min(1.0, sum(commit.rows for commit in samples.commits()) / usable)
        return Yields(kept=kept, queries=share, samples=made)
    return known
