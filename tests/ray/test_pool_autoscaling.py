"""Pools and machines follow the work, under Ray's own autoscaler over made-up machines.

AUTOSCALING_TIMELINE=FILE keeps the timeline, which `benchmarks/cluster_tables.py` draws for
`docs/autoscaling.md`.
"""

import os
from pathlib import Path

import pytest

import ray
from tests.ray.autoscaled import MAX_MACHINES, autoscaled, timeline, write_run, write_timeline

pytestmark = pytest.mark.chaos


@pytest.mark.timeout(600)
def test_pools_and_machines_follow_the_work(tmp_path):
    config = write_run(tmp_path)
    with autoscaled(tmp_path) as address:
        try:
            moments = timeline(config, address=address)
        finally:
            ray.shutdown()
    write_timeline(
        Path(os.environ.get("AUTOSCALING_TIMELINE", tmp_path / "autoscaling.json")), moments
    )
    assert moments[0].machines == 0, "there is nothing before there is work"
    for stage in ("generate", "annotate"):
        during = [moment for moment in moments if moment.stage == stage]
        assert max(one.actors for one in during) == MAX_MACHINES, stage
        assert max(one.machines for one in during) == MAX_MACHINES, stage
        first = next(one.actors for one in during if one.actors)
        assert first < MAX_MACHINES, f"{stage}: the pool did not grow, it was there"
    assert moments[-1].machines == moments[-1].actors == 0, "there is nothing when the work is done"
