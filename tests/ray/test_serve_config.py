"""The configurations that ship, and the application that is made of them; no cluster is started."""

import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

import ray_jobs.serve
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve._private.build_app import build_app as build_for_ray
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ServeDeploySchema, ServeStatus
from ray_jobs.serve import (
    _routes,
    _wait_ready,
    build_app,
    check_room,
    drain,
    failure,
    logical_cpus,
    on_all_cores,
)
from ray_jobs.serve_replicas import why_not_running
from reasonembed.config import ServeConfig
from reasonembed.errors import ConfigError, ModelError
from reasonembed.serving.keys import check_exposure
from reasonembed.serving.server import settings_of
from tests.ray.processes import ROOT, free_ports

FILES = sorted((ROOT / "configs" / "serve").glob("*.yaml"))


def built(args):
    """Deployments of an application by name, as `serve deploy` builds them."""
    app = call_user_app_builder_with_args_if_necessary(build_app, args)
    return {one.name: one for one in build_for_ray(app, name="x", route_prefix="/").deployments}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_file_is_what_serve_and_we_take(file):
    data = yaml.safe_load(file.read_text())
    [application] = ServeDeploySchema(**data).applications
    assert application.import_path == "ray_jobs.serve:build_app"
    config = ServeConfig.model_validate(application.args)
    deployments = built(application.args)
    # A field of Serve's that is misspelt is passed over by Ray itself.
    assert data.keys() <= ServeDeploySchema.model_fields.keys()
    named = {one.name for one in application.deployments}
    assert named <= deployments.keys(), "a deployment is named that does not exist"
    assert len(deployments) == 2 + len(config.indexes) * config.index_shards + bool(
        config.rewrite or config.rerank
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_command_line_takes_the_same_file(file):
    data = yaml.safe_load(file.read_text())
    settings = settings_of(None, file=file)
    assert settings.model == data["applications"][0]["args"]["model"]
    assert (settings.host, settings.port) == (
        data["http_options"]["host"],
        data["http_options"]["port"],
    )
    check_exposure(settings)
    # Serve must not end a request before we do, in our own words.
    assert data["http_options"].get("request_timeout_s", 1e9) > settings.limits.timeout_s


def test_the_shards_of_the_cluster_are_placed_by_the_memory_that_they_need():
    [application] = yaml.safe_load((ROOT / "configs/serve/cluster-qwen3-8b.yaml").read_text())[
        "applications"
    ]
    args = ServeConfig.model_validate(application["args"])
    vectors = 10_000_000 * 4_096 * np.dtype(np.float32).itemsize / args.index_shards
    memory = {
        one["name"]: one["ray_actor_options"]["memory"]
        for one in application["deployments"]
        if one["name"].startswith("Index")
    }
    assert memory.keys() == {name for name in built(application["args"]) if "Index" in name}
    assert all(vectors < one < 1.2 * vectors for one in memory.values())


HTTP = HTTPOptions(host="127.0.0.1", port=8000, request_timeout_s=630)


@pytest.mark.parametrize(
    ("http", "routes"),
    [
        (HTTP, {}),
        (HTTP, {"x": "/", "other": "/y", "no-http": None}),  # ours is replaced
        (HTTP.model_copy(update={"request_timeout_s": None}), {}),
    ],
)
def test_there_is_room_beside_what_runs(http, routes):
    check_room(ServeConfig(model="echo"), http, routes, name="x")


@pytest.mark.parametrize(
    ("changes", "routes", "said"),
    [
        ({"host": "0.0.0.0", "port": 8100}, {}, "host 0.0.0.0, port 8100"),
        ({"ssl_certfile": "c"}, {}, "ssl_certfile c"),
        ({"request_timeout_s": 60.0}, {}, "after 60 s"),
        ({}, {"other": "/"}, "'other'"),
    ],
)
def test_what_runs_already_is_named_where_it_is_in_the_way(changes, routes, said):
    with pytest.raises(ConfigError, match=said):
        check_room(ServeConfig(model="echo"), HTTP.model_copy(update=changes), routes, name="x")


def test_an_application_that_is_being_removed_is_not_in_the_way():
    applications = {
        "a": {"route_prefix": "/", "status": ApplicationStatus.DELETING},
        "b": {"route_prefix": "/b", "status": ApplicationStatus.RUNNING},
    }
    assert _routes({"applications": applications}) == {"b": "/b"}


def test_a_misspelt_field_is_named():
    with pytest.raises(ConfigError, match="embeder: unknown key"):
        build_app({"model": "echo", "embeder": {}})


def test_a_fixed_number_of_replicas_is_no_autoscaling():
    [fixed] = [built({"model": "echo", "embedder": {"min": 2, "max": 2}})["Embedder"]]
    assert fixed.num_replicas == 2
    assert fixed._deployment_config.autoscaling_config is None


def test_a_range_of_replicas_follows_queued_work():
    scaled = built({"model": "echo", "embedder": {"min": 1, "max": 4, "target_wait_s": 3}})
    config = scaled["Embedder"]._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert type(policy).__name__ == "QueuedWork"


def test_replicas_drain_for_as_long_as_asked_and_take_any_number_of_calls():
    for deployment in built({"model": "echo", "drain_s": 7, "indexes": ["a/x"]}).values():
        assert deployment._deployment_config.graceful_shutdown_timeout_s == 7
        if deployment.name != "Ingress":
            assert deployment.max_ongoing_requests > 10_000


def test_one_machine_is_reckoned_to_have_room_for_what_is_configured():
    config = ServeConfig(model="echo", indexes=("a", "b"), index_shards=3, ingresses=2)
    assert logical_cpus(config) >= 2 + 1 + 0.5 * 6


@pytest.mark.parametrize(
    ("fields", "threads"),
    [
        ({}, os.cpu_count()),
        ({"max": 10_000}, 1),
        ({"threads": 3}, 3),
        ({"num_gpus": 1}, None),
    ],
)
def test_a_model_on_a_machine_of_its_own_uses_its_cores(fields, threads):
    config = ServeConfig.model_validate({"model": "echo", "embedder": fields})
    assert on_all_cores(config).embedder.threads == threads


def account(*messages, status="DEPLOY_FAILED"):
    """Serve's account of an application `x`, as far as it is read."""
    deployments = {str(i): SimpleNamespace(message=one) for i, one in enumerate(messages)}
    app = SimpleNamespace(message="", status=status, deployments=deployments)
    return SimpleNamespace(applications={"x": app})


OURS = """The deployment failed to start 3 times in a row. Error:
ray::ServeReplica:x:Embedder() (pid=1)
  File "/a/secret/path.py", line 7, in load
reasonembed.errors.ModelError: golden vectors differ by 0.3"""


def test_an_error_of_ours_is_the_reason():
    assert why_not_running(account("", OURS), "x") == "golden vectors differ by 0.3"
    error = failure(account("", OURS), "x")
    assert isinstance(error, ModelError) and str(error) == "golden vectors differ by 0.3"


def test_another_error_is_for_the_operator_alone():
    other = OURS.replace("reasonembed.errors.ModelError", "OSError")
    assert why_not_running(account(other), "x") is None
    assert "secret" in str(failure(account(other), "x"))
    assert "removed" in str(failure(account(), "y"))


def test_a_service_that_somebody_has_removed_is_no_failure_at_the_end(monkeypatch):
    def gone(name):
        raise RayServeException(f"Application {name!r} does not exist.")

    def nothing_to_delete(name):
        raise AssertionError(name)

    monkeypatch.setattr(ray_jobs.serve.serve, "get_app_handle", gone)
    monkeypatch.setattr(ray_jobs.serve.serve, "delete", nothing_to_delete)
    monkeypatch.setattr(ray_jobs.serve.serve, "status", ServeStatus)
    drain("x")


def test_a_service_that_runs_where_nothing_answers_is_no_endless_wait(monkeypatch):
    """As where Serve's proxies stand on other nodes than the command."""
    monkeypatch.setattr(ray_jobs.serve.serve, "status", lambda: account(status="RUNNING"))
    monkeypatch.setattr(
        ray_jobs.serve.ray, "nodes", lambda: [{"NodeManagerAddress": "10.1.2.3", "Alive": True}]
    )
    monkeypatch.setattr(ray_jobs.serve, "_DEAF_S", 0.2)
    [port] = free_ports(1)
    with pytest.raises(ConfigError, match=r"does not answer .* 10\.1\.2\.3"):
        _wait_ready(f"http://127.0.0.1:{port}", name="x", stop=threading.Event())
