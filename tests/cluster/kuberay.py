"""What KubeRay's operator refuses, said without a cluster: its schema and its rules across fields.

The rules are those of the operator's own validation (release 1.7), with the feature gates that are
off by default off.
"""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from packaging.version import InvalidVersion, Version

Fields = dict[str, Any]

_AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")
_DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|ms|s|m|h))+|\d+")
# A cluster's name, and services and jobs whose clusters' names are longer by a suffix.
_NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47}


def problems(manifest: Fields) -> list[str]:
    """Everything that the operator, or the API server before it, would refuse."""
    found = [
        f"{'/'.join(map(str, error.absolute_path))}: {error.message}"
        for error in _deepest(_schema(manifest.get("kind")).iter_errors(manifest))
    ]
    if found:
        return found
    kind, spec = manifest["kind"], manifest["spec"]
    found += _name_problems(kind, manifest["metadata"]["name"])
    found += _OF_KIND[kind](manifest)
    cluster = cluster_spec(manifest)
    if cluster is not None:
        found += cluster_problems(cluster, manifest["metadata"].get("annotations", {}))
    if kind != "RayCluster" and (cluster or {}).get("authOptions", {}).get("enableK8sTokenAuth"):
        found.append(f"enableK8sTokenAuth is not supported for {kind}")
    if kind != "RayCluster" and "upgradeStrategy" in (cluster or {}):
        found.append(f"upgradeStrategy of the cluster cannot be set in a {kind}")
    assert isinstance(spec, dict)
    return found


def cluster_spec(manifest: Fields) -> Fields | None:
    """The cluster that a manifest describes; None where a job picks one that runs."""
    spec: Fields = manifest["spec"]
    if manifest["kind"] == "RayJob":
        return spec.get("rayClusterSpec")
    return spec["rayClusterConfig"] if manifest["kind"] == "RayService" else spec


def groups(cluster: Fields) -> list[tuple[str, Fields]]:
    """The head and the groups of workers, by name."""
    workers = cluster.get("workerGroupSpecs", [])
    return [("head", cluster["headGroupSpec"]), *((one["groupName"], one) for one in workers)]


def cluster_problems(cluster: Fields, annotations: Fields) -> list[str]:
    """What is wrong with a cluster, by rules that hold in every kind."""
    rules = (_group_problems, _autoscaler_problems, _authentication_problems)
    return [p for rule in rules for p in rule(cluster)] + list(
        _fault_tolerance_problems(cluster, annotations)
    )


@functools.cache
def _schema(kind: str | None) -> jsonschema.Draft202012Validator:
    whole = yaml.safe_load(Path(__file__).with_name("kuberay_schema.yaml").read_text("utf-8"))
    if kind in _NAME_LENGTH:  # errors then name the field, not the alternatives
        whole = {"$defs": whole["$defs"], "$ref": f"#/$defs/{kind}"}
    return jsonschema.Draft202012Validator(whole)


def _deepest(errors: Iterator[Any]) -> list[Any]:
    return sorted(errors, key=lambda error: len(error.absolute_path), reverse=True)


def _name_problems(kind: str, name: str) -> Iterator[str]:
    if len(name) > _NAME_LENGTH[kind]:
        yield f"name {name!r} is longer than {_NAME_LENGTH[kind]}"
    if not _NAME.fullmatch(name):
        yield f"name {name!r} is no DNS label"


def _group_problems(cluster: Fields) -> Iterator[str]:
    for name, group in groups(cluster):
        start, resources = group.get("rayStartParams", {}), group.get("resources", {})
        if not group["template"]["spec"]["containers"]:
            yield f"{name} has no container"
        if resources and start.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            yield f"{name}: resources are in rayStartParams and in resources"
        if "labels" in start:
            yield f"{name}: labels belong beside rayStartParams"
        for key, value in group.get("labels", {}).items():
            if not (_LABEL_KEY.fullmatch(key) and _LABEL_VALUE.fullmatch(value)):
                yield f"{name}: label {key}={value} is none of Kubernetes"
        if name != "head":
            yield from _size_problems(cluster, name, group)


def _size_problems(cluster: Fields, name: str, group: Fields) -> Iterator[str]:
    least, most = group["minReplicas"], group["maxReplicas"]
    if least < 0 or most < 0:
        yield f"{name}: negative number of replicas"
    if least > most:
        yield f"{name}: minReplicas {least} > maxReplicas {most}"
    if group.get("suspend"):
        yield f"{name}: suspend is not for people"
    if group.get("idleTimeoutSeconds", 0) < 0:
        yield f"{name}: idleTimeoutSeconds is negative"
    if "idleTimeoutSeconds" in group and not _is_v2(cluster):
        yield f"{name}: idleTimeoutSeconds needs autoscaler v2"
    if group.get("priority"):
        if not _is_v2(cluster):
            yield f"{name}: priority needs autoscaler v2"
        if not _is_at_least(cluster, "2.56.0"):
            yield f"{name}: priority needs rayVersion 2.56.0"


def _autoscaler_problems(cluster: Fields) -> Iterator[str]:
    options, on = cluster.get("autoscalerOptions", {}), cluster.get("enableInTreeAutoscaling")
    switch = _environment(cluster).get(_AUTOSCALER_V2)
    if not on and switch in ("1", "true"):
        yield f"{_AUTOSCALER_V2} without enableInTreeAutoscaling"
    if on and "version" in options and switch is not None:
        yield f"both autoscalerOptions.version and {_AUTOSCALER_V2} are set"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "autoscalerOptions.idleTimeoutSeconds is negative"
    if any(one["name"] == "KUBERAY_GEN_AUTOSCALER_START_CMD" for one in options.get("env", [])):
        yield "KUBERAY_GEN_AUTOSCALER_START_CMD is the operator's"
    if _is_v2(cluster):
        for name, group in groups(cluster):
            policy = group["template"]["spec"].get("restartPolicy", "Never")
            if policy != "Never":
                yield f"{name}: restartPolicy {policy}; autoscaler v2 needs Never"


def _authentication_problems(cluster: Fields) -> Iterator[str]:
    options = cluster.get("authOptions")
    if options is None:
        return
    delegated = options.get("enableK8sTokenAuth")
    if options.get("mode", "token") != "token":
        if delegated:
            yield "enableK8sTokenAuth needs mode: token"
        return
    if not _is_at_least(cluster, "2.52.0"):
        yield "authOptions needs rayVersion 2.52.0"
    if delegated and not _is_at_least(cluster, "2.55.0"):
        yield "enableK8sTokenAuth needs rayVersion 2.55.0"
    if delegated and options.get("secretName"):
        yield "enableK8sTokenAuth and secretName exclude each other"


def _fault_tolerance_problems(cluster: Fields, annotations: Fields) -> Iterator[str]:
    options, start = (
        cluster.get("gcsFaultToleranceOptions"),
        cluster["headGroupSpec"].get("rayStartParams", {}),
    )
    environment = _environment(cluster)
    if "redis-username" in start or "REDIS_USERNAME" in environment:
        yield "the user of Redis belongs into gcsFaultToleranceOptions"
    if options is None:
        if "RAY_REDIS_ADDRESS" in environment and not annotations.get("ray.io/ft-enabled"):
            yield "RAY_REDIS_ADDRESS without gcsFaultToleranceOptions"
        return
    for key in ("ray.io/ft-enabled", "ray.io/external-storage-namespace"):
        if annotations.get(key):
            yield f"annotation {key} beside gcsFaultToleranceOptions"
    for key in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS"):
        if key in environment:
            yield f"{key} beside gcsFaultToleranceOptions"
    if "redis-password" in start:
        yield "redis-password beside gcsFaultToleranceOptions"


def _job_problems(manifest: Fields) -> Iterator[str]:
    spec = manifest["spec"]
    selector, mode = spec.get("clusterSelector"), spec.get("submissionMode", "K8sJobMode")
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    refused = {
        "suspend needs shutdownAfterJobFinishes": spec.get("suspend") and not shuts_down,
        "ttlSecondsAfterFinished is negative": spec.get("ttlSecondsAfterFinished", 0) < 0,
        "ttlSecondsAfterFinished needs shutdownAfterJobFinishes": (
            spec.get("ttlSecondsAfterFinished", 0) > 0 and not shuts_down
        ),
        "one of rayClusterSpec and clusterSelector is needed": (
            not selector and spec.get("rayClusterSpec") is None
        ),
        "suspend excludes clusterSelector": spec.get("suspend") and selector,
        "backoffLimit excludes clusterSelector": spec.get("backoffLimit", 0) > 0 and selector,
        "backoffLimit excludes InteractiveMode": (
            spec.get("backoffLimit", 0) > 0 and mode == "InteractiveMode"
        ),
        "backoffLimit is negative": spec.get("backoffLimit", 0) < 0,
        "activeDeadlineSeconds is not positive": spec.get("activeDeadlineSeconds", 1) <= 0,
        "clusterSelector names no cluster": selector and not selector.get("ray.io/cluster"),
    }
    yield from (message for message, holds in refused.items() if holds)
    if mode == "SidecarMode":
        excluded = {"clusterSelector", "submitterPodTemplate", "submitterConfig"} & spec.keys()
        yield from (f"{key} excludes SidecarMode" for key in sorted(excluded))
    if not isinstance(yaml.safe_load(spec.get("runtimeEnvYAML", "{}")), dict):
        yield "runtimeEnvYAML is no mapping"


def _service_problems(manifest: Fields) -> Iterator[str]:
    spec, cluster = manifest["spec"], manifest["spec"]["rayClusterConfig"]
    timeout = manifest["metadata"].get("annotations", {}).get("ray.io/initializing-timeout")
    if timeout and not (_DURATION.fullmatch(timeout) and re.search(r"[1-9]", timeout)):
        yield f"ray.io/initializing-timeout {timeout!r} is no duration"
    if cluster["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        yield "headService of a service has no name"
    (head, *_) = cluster["headGroupSpec"]["template"]["spec"]["containers"]
    ports = [one.get("name", "") for one in head.get("ports", [])]
    if ports and not any(re.fullmatch("serve(-.*)?", name) for name in ports):
        yield "no port of the head is named serve, so no Service is made"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds is negative"
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
        yield from _incremental_problems(cluster, strategy.get("clusterUpgradeOptions"))


def _incremental_problems(cluster: Fields, options: Fields | None) -> Iterator[str]:
    if not cluster.get("enableInTreeAutoscaling"):
        yield "an incremental upgrade needs the autoscaler"
    if options is None:
        yield "an incremental upgrade needs clusterUpgradeOptions"
        return
    surge, step = options.get("maxSurgePercent", 100), options["stepSizePercent"]
    if not (0 <= surge <= 100 and 0 <= step <= surge):
        yield f"stepSizePercent {step} and maxSurgePercent {surge}: 0 <= step <= surge <= 100"
    if options["intervalSeconds"] <= 0:
        yield "intervalSeconds is not positive"


_OF_KIND: dict[str, Callable[[Fields], Iterator[str] | tuple[str, ...]]] = {
    "RayCluster": lambda manifest: (),
    "RayJob": _job_problems,
    "RayService": _service_problems,
}


def _environment(cluster: Fields) -> dict[str, str | None]:
    """Of the head's first container, which is Ray's."""
    containers = cluster["headGroupSpec"]["template"]["spec"]["containers"][:1]
    return {one["name"]: one.get("value") for c in containers for one in c.get("env", [])}


def _is_v2(cluster: Fields) -> bool:
    if not cluster.get("enableInTreeAutoscaling"):
        return False
    version = cluster.get("autoscalerOptions", {}).get("version")
    if version is not None:
        return bool(version == "v2")
    return _environment(cluster).get(_AUTOSCALER_V2) in ("1", "true")


def _is_at_least(cluster: Fields, version: str) -> bool:
    try:
        return Version(cluster.get("rayVersion", "")) >= Version(version)
    except InvalidVersion:
        return False
