import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_jobs import autoscaling
from ray_jobs.autoscaling import BUSY, QUEUED_S, QueuedWork, wanted_replicas

SECONDS = st.lists(st.floats(0, 1e4), max_size=8)
SHARES = st.lists(st.floats(0, 1), max_size=8)


@pytest.mark.parametrize(
    ("queued_s", "busy", "wanted"),
    [
        ([0.0], [0.0], 1),  # idle
        ([0.0, 0.0], [0.75, 0.75], 2),  # busy without a queue: stay
        ([0.0, 0.0], [0.9, 0.9], 3),  # too busy to catch up with chance
        ([8.0], [1.0], 4),  # eight seconds of work in two
        ([8.0, 0.0], [1.0, 0.1], 4),  # wherever it waits
        ([2.0, 2.0], [1.0, 1.0], 3),  # as aimed at, but not a moment of rest
    ],
)
def test_examples(queued_s, busy, wanted):
    assert wanted_replicas(queued_s, busy, target_wait_s=2.0) == wanted


@given(queued_s=SECONDS, busy=SHARES, more=st.floats(0, 1e4))
def test_more_work_never_asks_for_fewer(queued_s, busy, more):
    before = wanted_replicas(queued_s, busy, target_wait_s=2.0)
    assert before >= 1
    assert wanted_replicas([*queued_s, more], busy, target_wait_s=2.0) >= before
    assert wanted_replicas(queued_s, [*busy, min(1.0, more)], target_wait_s=2.0) >= before


class Context:
    """What Serve's controller hands over, as far as the policy reads it."""

    target_num_replicas = 2
    capacity_adjusted_min_replicas, capacity_adjusted_max_replicas = 1, 4

    def __init__(self, metrics):
        self.aggregated_metrics = metrics


@pytest.mark.parametrize(
    ("metrics", "wanted"),
    [
        ({}, 2),  # nothing reported yet
        (None, 2),
        ({QUEUED_S: {"a": 0.0}, BUSY: {"a": 0.0}}, 1),
        ({QUEUED_S: {"a": 3.0, "b": 2.0}, BUSY: {"a": 1.0, "b": 1.0}}, 3),
        ({QUEUED_S: {"a": 300.0}, BUSY: {"a": 1.0}}, 4),  # no more than there may be
    ],
)
def test_policy(metrics, wanted):
    assert QueuedWork(target_wait_s=2.0)(Context(metrics))[0] == wanted


def test_the_controller_gets_a_module_that_needs_nothing_of_ours():
    loaded = f"import runpy, sys; runpy.run_path({autoscaling.__file__!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True, cwd="/"
    )
    names = done.stdout.split()
    assert not {"ray", "reasonembed", "numpy"} & set(names)
