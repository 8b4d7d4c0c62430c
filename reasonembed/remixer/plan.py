"""Seeds: which documents queries are written from, and under which conditions.

Reads `corpus`, writes `seeds`. The fan-out (documents × variants, with length and reader) is
decided here, before any model runs, from hashes of the ids: never from a shared random state, so
that the plan is the same on any number of workers and after any restart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa

from reasonembed.config import PlanConfig
from reasonembed.schemas import SEEDS, from_rows, row_seed, stable_hash

_T = TypeVar("_T")


@dataclass(frozen=True)
class SeedPlan:
    """The seeds, and what became of every document of the corpus.

    Attributes:
        seeds: Table of `schemas.SEEDS`.
        funnel: Documents by fate, in the order in which the rules apply.
    """

    seeds: pa.Table
    funnel: dict[str, int]


def query_id(source_doc_id: str, variant: int) -> str:
    """The id of a query before it is written."""
    return f"q-{stable_hash(source_doc_id, variant)}"


def plan_seeds(corpus: pa.Table, config: PlanConfig, *, held_out: Collection[str]) -> SeedPlan:
    """Chooses seed documents and draws each query's conditions (arXiv:2510.08252, stage 1).

    Args:
        corpus: Table of `schemas.CORPUS`.
        config: Lengths in characters, the cap per task, the weights of the conditions.
        held_out: Documents that an evaluation names, as gold or as excluded; they and their exact
            duplicates are no seeds.

    Returns:
        One seed for each chosen document and variant. Of exact duplicates one document is used.
    """
    rows = corpus.select(["doc_id", "text", "task", "group_id"]).to_pylist()
    shut = {row["group_id"] for row in rows if row["doc_id"] in held_out}
    funnel = dict.fromkeys(
        ("held out for evaluation", "too short", "too long", "exact duplicate", "over the cap"), 0
    )
    by_task: dict[str, list[str]] = defaultdict(list)
    used: set[str] = set()
    for row in sorted(rows, key=lambda row: str(row["doc_id"])):
        fate = _fate(row, config, shut, used)
        if fate:
            funnel[fate] += 1
            continue
        used.add(row["group_id"])
        by_task[row["task"]].append(row["doc_id"])
    seeds = []
    for task in sorted(by_task):
        chosen = _stable_sample(by_task[task], config)
        funnel["over the cap"] += len(by_task[task]) - len(chosen)
        seeds += [_seed(doc, i, task, config) for doc in chosen for i in range(config.variants)]
    return SeedPlan(from_rows(seeds, SEEDS, where="seeds"), funnel)


def _fate(row: dict[str, str], config: PlanConfig, shut: set[str], used: set[str]) -> str | None:
    if row["group_id"] in shut:
        return "held out for evaluation"
    if len(row["text"]) < config.min_chars:
        return "too short"
    if len(row["text"]) > config.max_chars:
        return "too long"
    return "exact duplicate" if row["group_id"] in used else None


def _stable_sample(doc_ids: list[str], config: PlanConfig) -> list[str]:
    """The documents with the smallest hashes: adding one to the corpus moves at most one other."""
    ranked = sorted(doc_ids, key=lambda doc: stable_hash(config.seed, doc))
    return ranked[: config.max_seeds_per_task]


def _seed(doc_id: str, variant: int, task: str, config: PlanConfig) -> dict[str, object]:
    bucket = _draw(
        config.lengths,
        [bucket.weight for bucket in config.lengths],
        row_seed(config.seed, doc_id, variant, "length"),
    )
    level = _draw(
        list(config.education_levels),
        list(config.education_levels.values()),
        row_seed(config.seed, doc_id, variant, "level"),
    )
    return {
        "query_id": query_id(doc_id, variant),
        "source_doc_id": doc_id,
        "task": task,
        "min_words": bucket.min_words,
        "max_words": bucket.max_words,
        "education_level": level,
        "seed": row_seed(config.seed, doc_id, variant, "text"),
    }


def _draw(options: Sequence[_T], weights: list[float], seed: int) -> _T:
    """One option, by weight, at the point that a uniform 31-bit seed marks."""
    point = seed / 2**31 * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        point -= weight
        if point < 0:
            return option
    return options[-1]
