"""Which part of the method does what? Every variant of a run with every seed, and their table.

A cell, one variant with one seed, is a run of its own: it shares the base run's data and repeats
training, export and evaluation. Its folder is named by what decides its result, so a finished cell
is never computed again, variants of equal settings share one, and other settings make another.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, model_validator

from reasonembed import __version__
from reasonembed.artifacts import link_tree
from reasonembed.config import (
    EncoderConfig,
    RunConfig,
    Strict,
    changed,
    fingerprint,
    read_mapping,
    validated,
)
from reasonembed.errors import ConfigError, ReasonEmbedError
from reasonembed.evaluation.compare import SeedComparison, compare_seeds
from reasonembed.evaluation.scorecard import DEEP_METRIC, METRIC
from reasonembed.run import Run
from reasonembed.storage import is_uri

TRAINED = "after"
_REPEATED = ("train", "export", "evaluate")
_NOT_SHARED = {*_REPEATED, "logs", "annotator"}
_MAY_CHANGE = ("train.", "assemble.")
_MAY_BE_COMMON = (*_MAY_CHANGE, "export.", "evaluate.", "runtime.")
_NEEDS = {
    "before": "",
    "miner": " and mined samples, not imported ones",
    "bm25": " and evaluate.bm25: true",
}

Perform = Callable[[Path, str], None]
"""Runs a configuration file from a stage to the end."""


class Variant(Strict):
    """A row of the table."""

    name: str
    changes: dict[str, Any] = Field(
        default_factory=dict, description="values by key of train.* or assemble.*"
    )
    system: Literal["after", "before", "miner", "bm25"] = Field(
        "after",
        description="which system of the evaluation; `before` is the backbone as it is. What is "
        "not trained costs nothing: it is taken from cells that keep the run's train.encoder",
    )

    @model_validator(mode="after")
    def _keys(self) -> Variant:
        for key in self.changes:
            if not key.startswith(_MAY_CHANGE) or key == "train.seed":
                raise ValueError(
                    f"{key!r}: a variant changes keys of train.* (but not train.seed) or assemble.*"
                )
        if self.changes and not self.is_trained:
            raise ValueError(f"system {self.system!r} is not trained: no changes could act on it")
        return self

    @property
    def is_trained(self) -> bool:
        """Whether it has cells of its own."""
        return self.system == TRAINED


class AblationConfig(Strict):
    """What is compared, on which run's samples, with which seeds."""

    name: str = Field(
        "table", pattern=r"^[^/]+$", description="of the tables; default: the file's, without .yaml"
    )
    run: str = Field(description="a run whose samples are made; it is not touched")
    out_dir: str | None = Field(None, description="on the same disk; default: RUN-ablation")
    baseline: str = Field(description="name of the variant that the others are compared with")
    seeds: tuple[int, ...] = Field(description="of training; the same for every variant")
    common: dict[str, Any] = Field(
        default_factory=dict,
        description="values by key of train.*, assemble.*, export.*, evaluate.* or runtime.*, for "
        "every variant",
    )
    variants: tuple[Variant, ...]

    @model_validator(mode="after")
    def _common_keys(self) -> AblationConfig:
        for key in self.common:
            if not key.startswith(_MAY_BE_COMMON) or key == "train.seed":
                raise ValueError(
                    f"common {key!r}: what all variants share are keys of train.* (but not "
                    "train.seed: see seeds), assemble.*, export.*, evaluate.* or runtime.*; no "
                    "other acts on a cell"
                )
        return self

    @model_validator(mode="after")
    def _names_and_seeds(self) -> AblationConfig:
        names = [variant.name for variant in self.variants]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two variants are called {twice[0]!r}")
        if self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no variant; there are {names}")
        if not any(variant.is_trained for variant in self.variants):
            raise ValueError("no variant is trained, so nothing would be measured")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)} must be at least one, each once")
        return self


@dataclass(frozen=True)
class Cell:
    """A variant with a seed.

    Attributes:
        variant: Its name.
        seed: Of training.
        config: The whole run; its `run_dir` is named by what decides the result.
        first: The stage from which it differs from the base run.
        untrained: Systems whose figures here are those of the plan: what is trained from another
            backbone has another `before`.
    """

    variant: str
    seed: int
    config: RunConfig
    first: str
    untrained: frozenset[str]

    def card(self) -> dict[str, Any] | None:
        """The evaluation; None while the cell is not finished."""
        return Run(self.config).directory("evaluate").finished()


def load_ablation(path: str | Path, *, run: str | None = None) -> AblationConfig:
    """Reads a file of `configs/ablation/`.

    Args:
        path: The file.
        run: Another run than the one that the file names.

    Raises:
        ConfigError: The file is missing or wrong.
    """
    data = {"name": Path(path).stem} | read_mapping(path) | ({"run": run} if run else {})
    return validated(AblationConfig, data, where=str(path))


def plan_cells(plan: AblationConfig) -> list[Cell]:
    """Every trained variant with every seed, variants in their order.

    Raises:
        ConfigError: The base run has no finished samples, a variant does not fit it, or no cell
            measures a system that is not trained.
    """
    base = Run.existing(plan.run)
    if not base.place.is_local or is_uri(plan.out_dir or ""):
        raise ConfigError(
            f"{base.place} lies in an object store, and an ablation shares a run's files by links "
            "on one disk; copy the run to a folder and name that one with --run"
        )
    if base.artifact("samples").finished() is None:
        raise ConfigError(f"{plan.run} has no finished samples; run it up to assemble first")
    cells = [
        _cell(plan, base, variant, seed)
        for variant in plan.variants
        if variant.is_trained
        for seed in plan.seeds
    ]
    for variant in plan.variants:
        if not any(_is_row_of(variant, cell) for cell in cells):
            raise ConfigError(
                f"variant {variant.name!r}: no cell measures {variant.system}, which needs a "
                f"trained variant with the run's own train.encoder{_NEEDS[variant.system]}"
            )
    return cells


def output_dir(plan: AblationConfig) -> Path:
    """Where the cells lie, which plans of one run share, and the tables of each plan."""
    return Path(plan.out_dir or f"{plan.run.rstrip('/')}-ablation").absolute()


def _cell(plan: AblationConfig, base: Run, variant: Variant, seed: int) -> Cell:
    changes = plan.common | variant.changes | {"train.seed": seed}
    config = changed(base.config, changes, where=f"variant {variant.name!r}")
    is_remade = any(key.startswith("assemble.") for key in changes)
    stages = (*(("assemble",) if is_remade else ()), *_REPEATED)
    # In the base's own folder, so that the inputs of the identities are the base's.
    there = Run(config.model_copy(update={"run_dir": str(base.dir)}))
    identity = {
        f"{stage}.{field}": value
        for stage in stages
        for field, value in there.identity(stage).items()
        # What the base run itself has trained and exported is no input of a cell.
        if not field.startswith(("input.train", "input.export"))
    }
    place = output_dir(plan) / "cells" / fingerprint(identity)[:16]
    common = changed(base.config, plan.common, where="common")
    return Cell(
        variant.name,
        seed,
        config.model_copy(update={"run_dir": str(place)}),
        first=stages[0],
        untrained=_untrained(there, backbone=common.train.encoder),
    )


def _untrained(run: Run, *, backbone: EncoderConfig) -> frozenset[str]:
    """What a cell measures besides its trained model; nothing if `backbone` is not its own."""
    if run.config.train.encoder != backbone:
        return frozenset()
    is_measured = {
        "before": True,
        "miner": "mine" in run.stages,
        "bm25": run.config.evaluate.bm25,
    }
    return frozenset(system for system in is_measured if is_measured[system])


def _is_row_of(variant: Variant, cell: Cell) -> bool:
    """Whether a variant's figures stand in a cell."""
    if variant.is_trained:
        return cell.variant == variant.name
    return variant.system in cell.untrained


def run_ablation(plan: AblationConfig, *, perform: Perform, say: Callable[[str], None]) -> Path:
    """Computes the cells that are missing and writes the table after each.

    Args:
        plan: What is compared.
        perform: Runs a cell; see `in_own_process`.
        say: Takes lines for a person.

    Returns:
        The table in Markdown, named as the plan; the `.json` beside it holds its figures.

    Raises:
        ConfigError: See `plan_cells`.
        ReasonEmbedError: A cell failed. Those that are finished are kept.
    """
    cells = plan_cells(plan)
    base = Run.existing(plan.run)
    for number, cell in enumerate(cells, start=1):
        if cell.card() is not None:
            continue
        say(f"({number} of {len(cells)}) {cell.variant}, seed {cell.seed}: {cell.config.run_dir}")
        perform(_prepare(cell, base), cell.first)
        if cell.card() is None:
            raise ReasonEmbedError(f"{cell.config.run_dir} ended without an evaluation")
        _write_table(plan, cells)
    return _write_table(plan, cells)


def _prepare(cell: Cell, base: Run) -> Path:
    place = Path(cell.config.run_dir)
    place.mkdir(parents=True, exist_ok=True)
    own = _NOT_SHARED | ({"samples"} if cell.first == "assemble" else set())
    for folder in sorted(base.dir.iterdir()):
        target = place / folder.name
        if folder.is_dir() and folder.name not in own and not target.exists():
            link_tree(folder, target)
    file = place / "cell.yaml"
    text = yaml.safe_dump(cell.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    file.write_text(text, encoding="utf-8")
    return file


def in_own_process(config: Path, first: str) -> None:
    """`reasonembed run CONFIG --from FIRST` in a process that takes its memory with it.

    Raises:
        ReasonEmbedError: It failed.
    """
    command = [sys.executable, "-m", "reasonembed.cli", "run", str(config), "--from", first]
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise ReasonEmbedError(
            f"{config.parent} failed, see above and its logs/; run the ablation again: finished "
            "cells are kept, and this one goes on where it was"
        )


# ---- the table ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Attributes:
        variant: Its name.
        by_seed: Mean nDCG@10 over the queries, by seed.
        recall: Mean recall@100 over queries and seeds.
        cells: Folders of the cells.
        against: nDCG@10 compared with the baseline, over the seeds that both have; None for the
            baseline.
    """

    variant: str
    by_seed: dict[int, float]
    recall: float
    cells: list[str]
    against: SeedComparison | None

    @property
    def mean(self) -> float:
        """nDCG@10 over the seeds."""
        return statistics.fmean(self.by_seed.values())

    @property
    def spread(self) -> float | None:
        """Standard deviation of nDCG@10 over the seeds; None for one seed."""
        values = list(self.by_seed.values())
        return statistics.stdev(values) if len(values) > 1 else None


_Card = Mapping[str, Any]


def table(plan: AblationConfig, cells: Sequence[Cell]) -> list[Row]:
    """The rows of every variant that has a finished cell, in the order of the variants."""
    finished = [(cell, card) for cell in cells if (card := cell.card()) is not None]
    found = {  # what is not trained is the same in every such cell of a seed
        variant.name: {one[0].seed: one for one in finished if _is_row_of(variant, one[0])}
        for variant in plan.variants
    }
    return [_row(plan, variant, found) for variant in plan.variants if found.get(variant.name)]


def _row(
    plan: AblationConfig, variant: Variant, found: Mapping[str, Mapping[int, tuple[Cell, _Card]]]
) -> Row:
    base = next(one for one in plan.variants if one.name == plan.baseline)
    own, other = _by_query(variant, found), _by_query(base, found)
    both = [seed for seed in own if seed in other]
    against = None
    if variant is not base and both:
        against = compare_seeds([own[seed] for seed in both], [other[seed] for seed in both])
    cards = [card for _, card in found[variant.name].values()]
    return Row(
        variant=variant.name,
        by_seed={seed: statistics.fmean(values.values()) for seed, values in own.items()},
        recall=statistics.fmean(card["systems"][variant.system][DEEP_METRIC] for card in cards),
        cells=[cell.config.run_dir for cell, _ in found[variant.name].values()],
        against=against,
    )


def _by_query(
    variant: Variant, found: Mapping[str, Mapping[int, tuple[Cell, _Card]]]
) -> dict[int, dict[str, float]]:
    cards = found[variant.name].items()
    return {seed: card["per_query"][variant.system] for seed, (_, card) in cards}


def _write_table(plan: AblationConfig, cells: Sequence[Cell]) -> Path:
    rows = table(plan, cells)
    folder = output_dir(plan)
    folder.mkdir(parents=True, exist_ok=True)
    written = {
        "version": __version__,
        "metric": METRIC,
        "run": plan.run,
        "baseline": plan.baseline,
        "seeds": plan.seeds,
        "common": _yaml(plan.common),
        "changes": {variant.name: _yaml(variant.changes) for variant in plan.variants},
        "rows": [asdict(row) | {"mean": row.mean, "spread": row.spread} for row in rows],
    }
    figures = json.dumps(written, indent=1) + "\n"
    (folder / f"{plan.name}.json").write_text(figures, encoding="utf-8")
    file = folder / f"{plan.name}.md"
    file.write_text(markdown(plan, rows), encoding="utf-8")
    return file


def _yaml(changes: Mapping[str, Any]) -> str:
    """As one line, and with an infinite κ, which JSON has no number for."""
    text: str = yaml.safe_dump(dict(changes), default_flow_style=True, allow_unicode=True)
    return text.strip()


def markdown(plan: AblationConfig, rows: Sequence[Row]) -> str:
    """The table for a page."""
    head = [
        f"{METRIC}: mean over {len(plan.seeds)} seeds ± their standard deviation. Difference to "
        f"{plan.baseline} with paired 95 % intervals: over the queries (bootstrap of each query's "
        "mean over the seeds) and over the seeds (Student's t).",
        "",
        f"| variant | seeds | {METRIC} | difference | over queries | over seeds | {DEEP_METRIC} |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*head, *map(_line, rows)]) + "\n"


def _line(row: Row) -> str:
    spread = "" if row.spread is None else f" ± {row.spread:.4f}"
    differences = ["–", "–", "–"]
    if row.against is not None:
        queries = row.against.over_queries
        differences = [
            f"{queries.mean_difference:+.4f}",
            interval(queries.low, queries.high),
            interval(row.against.low, row.against.high),
        ]
    cells = [row.variant, str(len(row.by_seed)), f"{row.mean:.4f}{spread}", *differences]
    return "| " + " | ".join([*cells, f"{row.recall:.4f}"]) + " |"


def interval(low: float | None, high: float | None) -> str:
    """`+0.0100 to +0.0200`, or a dash where there is none."""
    return "–" if low is None or high is None else f"{low:+.4f} to {high:+.4f}"
