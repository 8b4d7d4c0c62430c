"""The files of Ray's launcher: Ray's own schema and checks, then what we want of every cluster."""

import copy
import re

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import cli

from tests.cluster.files import CLUSTER, LAUNCHERS, TAG, documents

CONFIGS = {name: documents(f"{name}.yaml")[0] for name in LAUNCHERS}
EACH = pytest.mark.parametrize("name", LAUNCHERS)


@pytest.fixture
def config(name):
    return copy.deepcopy(CONFIGS[name])


def is_spot(node):
    market = node.get("InstanceMarketOptions", {}).get("MarketType") == "spot"
    return market or any(one.get("preemptible") for one in node.get("scheduling", []))


@EACH
def test_ray_takes_it(config):
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["available_node_types"]["head"]["max_workers"] == 0


@EACH
def test_ray_s_schema_refuses_what_is_misspelt(config):
    config["available_node_types"]["cpu"]["maxworkers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="maxworkers"):
        validate_config(prepare_config(config))


@EACH
def test_the_head_takes_no_work_and_stays(config):
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"] == {"CPU": 0}
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    assert not is_spot(head["node_config"])


def test_on_aws_the_head_may_do_more_than_the_workers():
    """Workers have a role, so the head must be given one that may hand it on."""
    types = CONFIGS["aws"]["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"] for name, kind in types.items()}
    head = profiles.pop("head")
    assert len({one["Arn"] for one in profiles.values()}) == 1
    assert head not in profiles.values()


def test_on_google_cloud_every_disk_is_of_a_kind_that_a3_takes():
    config = CONFIGS["gcp"]
    zone = config["provider"]["availability_zone"]
    for kind in config["available_node_types"].values():
        (disk,) = kind["node_config"]["disks"]
        assert disk["initializeParams"]["diskType"] == f"zones/{zone}/diskTypes/pd-balanced"


@EACH
def test_labels_say_what_is_bought(config):
    for group, kind in config["available_node_types"].items():
        market = kind["labels"]["ray.io/market-type"]
        assert (market == "spot") == is_spot(kind["node_config"]), group
        has_gpu = kind["resources"].get("GPU", 0) > 0
        accelerator = kind["labels"].get("ray.io/accelerator-type")
        assert has_gpu == (accelerator is not None), group
        if has_gpu:
            assert kind["resources"][f"accelerator_type:{accelerator}"] == 1


@EACH
def test_spot_is_preferred_among_equals(config):
    types = config["available_node_types"]
    assert types["gpu-spot"]["resources"] == types["gpu-on-demand"]["resources"]
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]


@EACH
def test_at_rest_only_the_head_runs(config):
    workers = {k: v for k, v in config["available_node_types"].items() if k != "head"}
    assert all(kind["min_workers"] == 0 for kind in workers.values())
    assert sum(kind["max_workers"] for kind in workers.values()) == config["max_workers"]
    assert config["idle_timeout_minutes"] <= 15
    assert config["provider"].get("cache_stopped_nodes", False) is False


@EACH
def test_the_image_is_ours_and_nothing_is_installed_at_the_start(config):
    assert config["docker"]["image"].endswith(f"/reasonembed:{TAG}-gpu")
    for commands in ("setup", "head_setup", "worker_setup", "initialization"):
        assert config[f"{commands}_commands"] == []


@EACH
def test_everybody_needs_the_token(config):
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    head = " ".join(config["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head and "0.0.0.0" not in head
    groups = config["provider"].get("security_group", {}).get("IpPermissions", [])
    assert not any(r["CidrIp"] == "0.0.0.0/0" for one in groups for r in one["IpRanges"])


@EACH
@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_knows_how_it_is_started(config, role):
    known = {name for option in cli.commands["start"].params for name in option.opts}
    commands = config[f"{role}_start_ray_commands"]
    start = [one for one in commands if "ray start" in one]
    assert len(start) == 1
    assert set(re.findall(r"--[a-z-]+", start[0])) <= known


@EACH
def test_workers_watch_for_a_notice(config):
    watcher = config["worker_start_ray_commands"][-1]
    assert (
        "python /opt/reasonembed/spot_watcher.py --address $RAY_HEAD_IP:6379 >" in watcher
        and watcher.endswith("&")
    )
    assert (CLUSTER / "spot_watcher.py").is_file()
    assert not any("spot_watcher" in one for one in config["head_start_ray_commands"])


@EACH
def test_a_machine_that_does_not_come_is_not_waited_for_an_hour(config):
    patience = "--env RAY_AUTOSCALER_RECONCILE_ALLOCATE_STATUS_TIMEOUT_S=600"
    assert patience in config["docker"]["run_options"]
