"""Machines die, announced and not, through a whole run: nothing is lost, twice, or different.

CHAOS_SEEDS=3 runs the first seeds only; CHAOS_TABLE=FILE keeps the table, which
`benchmarks/cluster_tables.py` writes into `docs/chaos.md`.
"""

import os
from pathlib import Path

import pytest

from tests.ray.chaos import (
    Machines,
    compare,
    disturbed,
    disturbed_real,
    seconds_of,
    undisturbed,
    write_real_run,
    write_run,
    write_table,
)

NUM_SEEDS = int(os.environ.get("CHAOS_SEEDS", 20))
VARIANTS = 2  # corpora; each has an undisturbed run to be compared with
REAL_EVERY = 10  # seeds whose number this divides end with a real model

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(3_600)
def test_machines_die_and_nothing_is_lost_twice_or_different(tmp_path):
    machines, lines, references = Machines(), [], []
    table = Path(os.environ.get("CHAOS_TABLE", tmp_path / "chaos.json"))
    try:
        for variant in range(min(VARIANTS, NUM_SEEDS)):
            config = write_run(tmp_path / f"undisturbed{variant}", variant=variant)
            references.append(undisturbed(config, address=machines.address))
        for seed in range(NUM_SEEDS):
            variant = seed % VARIANTS
            reference = references[variant]
            config = write_run(tmp_path / str(seed), variant=variant)
            line = disturbed(
                config,
                last="train" if seed % 4 < 2 else "assemble",
                seed=seed,
                machines=machines,
                seconds=seconds_of(reference),
            )
            compare(reference.existing(tmp_path / str(seed) / "run"), reference, line)
            lines.append(line)
            if seed % REAL_EVERY == 0:
                config = write_real_run(tmp_path / f"real{seed}")
                lines.append(disturbed_real(config, seed=seed, machines=machines))
            write_table(table, lines)
    finally:
        machines.end()
    scripted = [line for line in lines if line.engine == "scripted"]
    assert sum(len(line.stages) for line in scripted) >= 2 * len(scripted), lines
    if NUM_SEEDS >= 20:
        assert {stage for line in scripted for stage in line.stages} >= {
            *("generate", "embed", "mine", "annotate", "rewrite", "train")
        }
