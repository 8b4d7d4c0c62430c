"""What stages ask of Ray for their actors, and where those are then found."""

import subprocess
import sys
from itertools import product

import pytest

from ray._private.label_utils import validate_fallback_strategy, validate_label_selector
from ray.data import DataContext
from ray_jobs.pools import in_flight, pool_options, prepare, training_options
from reasonembed.config import LLMPool, PoolConfig, TrainRuntime
from tests.ray.processes import ROOT, environment

MARKETS = ("any", "spot", "on-demand", "spot-first")


@pytest.mark.parametrize("overlap", [1, 2, 3, 8, 64])
def test_a_pool_has_blocks_enough_in_flight_to_grow(overlap):
    threshold = DataContext.get_current().autoscaling_config.actor_pool_util_upscaling_threshold
    assert in_flight(overlap) / overlap >= threshold
    assert in_flight(overlap) <= 2 * overlap, "what waits on an actor another one cannot take"


def test_numbers_of_a_pool():
    pool = LLMPool(min_actors=2, max_actors=16, num_gpus=1, num_cpus=4)
    options = pool_options(pool, overlap=8)
    compute = options.pop("compute")
    assert (compute.min_size, compute.max_size, compute.initial_size) == (2, 16, 2)
    assert compute.max_tasks_in_flight_per_actor == 14
    assert options == {
        "num_cpus": 4,
        "num_gpus": 1,
        "max_concurrency": 8,
        "max_restarts": -1,  # machines may go as often as they like
        "max_task_retries": 8,  # a block that kills its actor may not
    }
    assert "max_concurrency" not in pool_options(PoolConfig(), overlap=1)


@pytest.mark.parametrize(
    ("market", "accelerators", "selector", "fallback"),
    [
        ("any", (), None, None),
        ("spot", (), {"ray.io/market-type": "spot"}, None),
        ("on-demand", (), {"ray.io/market-type": "!spot"}, None),
        (
            "spot-first",
            ("H100", "A100"),
            {"ray.io/market-type": "spot", "ray.io/accelerator-type": "in(H100,A100)"},
            {"ray.io/market-type": "!spot", "ray.io/accelerator-type": "in(H100,A100)"},
        ),
    ],
)
def test_labels_of_a_pool(market, accelerators, selector, fallback):
    options = pool_options(PoolConfig(market=market, accelerators=accelerators))
    assert options.get("label_selector") == selector
    expected = fallback and [{"label_selector": fallback}]
    assert options.get("fallback_strategy") == expected


@pytest.mark.parametrize(
    ("market", "accelerators"), product(MARKETS, [(), ("H100",), ("A100", "B200-x", "L4")])
)
def test_ray_knows_the_syntax(market, accelerators):
    options = pool_options(PoolConfig(market=market, accelerators=accelerators))
    assert validate_label_selector(options.get("label_selector")) is None
    assert validate_fallback_strategy(options.get("fallback_strategy")) is None


def test_training_workers():
    runtime = TrainRuntime(
        num_workers=8,
        min_workers=2,
        use_gpu=True,
        num_cpus=4,
        market="spot",
        accelerators=("H100",),
    )
    assert training_options(runtime) == {
        "num_workers": (2, 8),
        "use_gpu": True,
        "resources_per_worker": {"CPU": 4, "GPU": 1},
        "label_selector": {
            "ray.io/market-type": "spot",
            "ray.io/accelerator-type": "in(H100)",
        },
    }
    assert training_options(TrainRuntime())["label_selector"] is None


def test_a_driver_sets_patience():
    context = DataContext()
    prepare(context)
    assert context.max_errored_blocks == 0
    assert context.actor_init_retry_on_errors and context.actor_init_max_retries == 3
    assert context.max_consecutive_actor_init_deaths == 5
    assert context.execution_no_progress_timeout_s == 3_600


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_actors_go_where_they_are_sent_and_take_that_nodes_engine():
    """In a process of its own, for a `Cluster` and another Ray cannot share one."""
    command = [sys.executable, "-m", "tests.ray.pools_driver"]
    done = subprocess.run(
        command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout[-3_000:] + done.stderr[-3_000:]
