"""Seeds: which documents queries are written from, and under which conditions.

Reads `corpus`, writes `seeds`. The fan-out (documents × variants, with length and reader) is
decided here, before any model runs, from hashes of the ids: never from a shared random state, so
that the plan is the same on any number of workers and after any restart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from reasonembed.config import PlanConfig
from reasonembed.evaluation.datasets import Collection as EvaluationCollection
from reasonembed.remixer.duplicates import near_duplicates
from reasonembed.schemas import SEEDS, Status, from_rows, row_seed, stable_hash

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


@dataclass(frozen=True)
class Sifted:
    """Documents that the rules which need no model leave, and what became of the others.

    Attributes:
        tasks: Task of each document that is left, by its id, in the order of ids.
        funnel: The others by fate.
    """

    tasks: dict[str, str]
    funnel: dict[str, int]


def held_out_documents(
    corpus: pa.Table, collection: EvaluationCollection, config: PlanConfig
) -> frozenset[str]:
    """What an evaluation names, as gold or as excluded, and near-duplicates of the gold.

    Exact duplicates of all of these are shut out by `sift`, which knows the groups. Near-duplicates
    of excluded documents stay: they are no answers, and there may be more of them than of others.

    Args:
        corpus: Table of `schemas.CORPUS`.
        collection: The evaluation.
        config: `max_gold_similarity`.
    """
    named = collection.named_documents()
    if config.max_gold_similarity == 1:
        return named
    ids, texts = (corpus.column(name).to_pylist() for name in ("doc_id", "text"))
    gold = frozenset(doc_id for judged in collection.qrels.values() for doc_id in judged)
    return named | near_duplicates(
        dict(zip(ids, texts, strict=True)), of=gold, max_similarity=config.max_gold_similarity
    )


def query_id(source_doc_id: str, variant: int) -> str:
    """The id of a query before it is written."""
    return f"q-{stable_hash(source_doc_id, variant)}"


def sift(corpus: pa.Table, config: PlanConfig, *, held_out: Collection[str]) -> Sifted:
    """Applies the rules that need no model: held out, length, exact duplicates.

    Args:
        corpus: Table of `schemas.CORPUS`.
        config: Lengths in characters.
        held_out: Documents that are no seeds, nor are their exact duplicates; see
            `held_out_documents`.

    Returns:
        Of exact duplicates the one with the smallest id that meets the other rules.
    """
    columns = corpus.select(["doc_id", "task", "group_id"])
    lengths = pc.utf8_length(corpus.column("text"))
    rows = columns.append_column("chars", lengths).sort_by("doc_id").to_pylist()
    shut = {row["group_id"] for row in rows if row["doc_id"] in held_out}
    funnel = dict.fromkeys(
        ("held out for evaluation", "too short", "too long", "exact duplicate"), 0
    )
    tasks: dict[str, str] = {}
    used: set[str] = set()
    for row in rows:
        fate = _fate(row, config, shut, used)
        if fate:
            funnel[fate] += 1
        else:
            used.add(row["group_id"])
            tasks[row["doc_id"]] = row["task"]
    return Sifted(tasks, funnel)


def _fate(row: dict[str, Any], config: PlanConfig, shut: set[str], used: set[str]) -> str | None:
    if row["group_id"] in shut:
        return "held out for evaluation"
    if row["chars"] < config.min_chars:
        return "too short"
    if row["chars"] > config.max_chars:
        return "too long"
    return "exact duplicate" if row["group_id"] in used else None


def plan_seeds(
    corpus: pa.Table,
    config: PlanConfig,
    *,
    held_out: Collection[str],
    domains: pa.Table | None = None,
    min_probability: float = 0.0,
) -> SeedPlan:
    """Chooses seed documents and draws each query's conditions (arXiv:2510.08252, stage 1).

    Args:
        corpus: Table of `schemas.CORPUS`.
        config: Lengths in characters, the cap per task, the weights of the conditions.
        held_out: See `sift`.
        domains: Table of `schemas.DOMAINS`; None where the run has no domain filter.
        min_probability: Of belonging to the domain, for a document to be a seed.

    Returns:
        One seed for each chosen document and variant. Of exact duplicates one document is used.
    """
    sifted = sift(corpus, config, held_out=held_out)
    funnel = sifted.funnel | {"domain unknown": 0, "other domain": 0, "over the cap": 0}
    belongs = None if domains is None else _belonging(domains, min_probability)
    by_task: dict[str, list[str]] = defaultdict(list)
    for doc_id, task in sifted.tasks.items():
        if belongs is not None and not belongs.get(doc_id):
            funnel["other domain" if doc_id in belongs else "domain unknown"] += 1
        else:
            by_task[task].append(doc_id)
    seeds = []
    for task in sorted(by_task):
        chosen = _stable_sample(by_task[task], config)
        funnel["over the cap"] += len(by_task[task]) - len(chosen)
        seeds += [_seed(doc, i, task, config) for doc in chosen for i in range(config.variants)]
    return SeedPlan(from_rows(seeds, SEEDS, where="seeds"), funnel)


def _belonging(domains: pa.Table, min_probability: float) -> dict[str, bool]:
    """Whether a document belongs to its domain; those that no answer came for are not in it."""
    return {
        row["doc_id"]: row["probability"] >= min_probability
        for row in domains.select(["doc_id", "probability", "status"]).to_pylist()
        if row["status"] == Status.OK
    }


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
