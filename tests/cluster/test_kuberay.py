"""Our manifests are what KubeRay's operator takes, and each of its rules refuses what breaks it."""

import copy

import pytest

from tests.cluster.files import KUBERAY, ray_manifest
from tests.cluster.kuberay import cluster_spec, problems


def changed(name, path, value):
    """A manifest of ours with one field set; "-" removes it."""
    manifest = copy.deepcopy(ray_manifest(name))
    *parents, last = path
    place = manifest
    for key in parents:
        place = place.setdefault(key, {}) if isinstance(place, dict) else place[key]
    if value == "-":
        del place[last]
    else:
        place[last] = value
    return manifest


HEAD = ("spec", "headGroupSpec")
POD = (*HEAD, "template", "spec")
ENV = (*POD, "containers", 0, "env", 0)
WORKERS = ("spec", "workerGroupSpecs")
JOB, SERVICE = ("spec",), ("spec",)

BROKEN = [
    # Schema: unknown, missing, of another type, behind a gate.
    ("cluster", ("spec", "autoScaling"), True, "autoScaling"),
    ("cluster", ("kind",), "RayClusters", "not valid under any"),
    ("cluster", HEAD, "-", "headGroupSpec"),
    ("cluster", (*WORKERS, 0, "maxReplicas"), "-", "maxReplicas"),
    ("cluster", (*WORKERS, 0, "maxReplicas"), "4", "not of type 'integer'"),
    ("cluster", (*HEAD, "rayStartParams", "num-cpus"), 0, "not of type 'string'"),
    ("cluster", (*WORKERS, 0, "groupname"), "x", "groupname"),
    ("cluster", ("spec", "autoscalerOptions", "version"), "v3", "v3"),
    ("cluster", ("spec", "networkPolicy"), {"mode": "DenyAll"}, "networkPolicy"),
    ("cluster", ("spec", "gcsFaultToleranceOptions"), {"backend": "rocksdb"}, "'redis' was"),
    ("job", (*JOB, "submissionMode"), "Sidecar", "Sidecar"),
    ("job", (*JOB, "preRunningDeadlineSeconds"), 0, "minimum"),
    ("job", (*JOB, "deletionStrategy"), {}, "deletionStrategy"),
    ("service", (*SERVICE, "rayClusterSpec"), {}, "rayClusterSpec"),
    ("service", (*SERVICE, "serveConfigV2"), {"applications": []}, "not of type 'string'"),
    # Names.
    ("cluster", ("metadata", "name"), "a" * 54, "longer than 53"),
    ("job", ("metadata", "name"), "a" * 48, "longer than 47"),
    ("service", ("metadata", "name"), "a" * 48, "longer than 47"),
    ("cluster", ("metadata", "name"), "8b", "DNS label"),
    ("cluster", ("metadata", "name"), "Big", "DNS label"),
    # Groups.
    ("cluster", (*POD, "containers"), [], "head has no container"),
    ("cluster", (*WORKERS, 0, "template", "spec", "containers"), [], "gpu-spot has no container"),
    ("cluster", (*HEAD, "resources"), {"CPU": "0"}, "head: resources are in"),
    ("cluster", (*WORKERS, 0, "resources"), {"CPU": "1"}, "gpu-spot: resources are in"),
    ("cluster", (*HEAD, "rayStartParams", "labels"), "a=b", "labels belong beside"),
    ("cluster", (*WORKERS, 0, "labels"), {"ray.io/": "spot"}, "label ray.io/=spot"),
    ("cluster", (*WORKERS, 0, "labels"), {"market": "in(spot)"}, "label market=in(spot)"),
    ("cluster", (*WORKERS, 0, "minReplicas"), 9, "minReplicas 9 > maxReplicas 2"),
    ("cluster", (*WORKERS, 0, "minReplicas"), -1, "negative number"),
    ("cluster", (*WORKERS, 0, "suspend"), True, "suspend"),
    ("cluster", (*WORKERS, 0, "idleTimeoutSeconds"), -1, "idleTimeoutSeconds is negative"),
    # The autoscaler.
    ("cluster", (*POD, "restartPolicy"), "Always", "head: restartPolicy Always"),
    (
        "cluster",
        (*WORKERS, 1, "template", "spec", "restartPolicy"),
        "OnFailure",
        "gpu-on-demand: restartPolicy OnFailure",
    ),
    ("cluster", ("spec", "autoscalerOptions", "version"), "v1", "priority needs autoscaler v2"),
    ("cluster", ("spec", "rayVersion"), "2.55.1", "priority needs rayVersion"),
    ("cluster", ("spec", "rayVersion"), "latest", "authOptions needs rayVersion"),
    ("cluster", ENV, {"name": "RAY_enable_autoscaler_v2", "value": "1"}, "both autoscalerOptions"),
    ("cluster", ("spec", "autoscalerOptions", "idleTimeoutSeconds"), -1, "is negative"),
    (
        "cluster",
        ("spec", "autoscalerOptions", "env", 0, "name"),
        "KUBERAY_GEN_AUTOSCALER_START_CMD",
        "the operator's",
    ),
    # Authentication.
    ("cluster", ("spec", "rayVersion"), "2.51.0", "authOptions needs rayVersion 2.52.0"),
    (
        "cluster",
        ("spec", "authOptions"),
        {"mode": "disabled", "enableK8sTokenAuth": True},
        "needs mode: token",
    ),
    (
        "cluster",
        ("spec", "authOptions"),
        {"enableK8sTokenAuth": True, "secretName": "x"},
        "exclude each other",
    ),
    ("job", ("spec", "rayClusterSpec", "authOptions", "enableK8sTokenAuth"), True, "for RayJob"),
    (
        "service",
        ("spec", "rayClusterConfig", "authOptions", "enableK8sTokenAuth"),
        True,
        "for RayService",
    ),
    ("job", ("spec", "rayClusterSpec", "upgradeStrategy"), {"type": "Recreate"}, "upgradeStrategy"),
    # Fault tolerance of the head.
    ("cluster", ENV, {"name": "RAY_REDIS_ADDRESS", "value": "r"}, "without gcsFaultTolerance"),
    ("cluster", ENV, {"name": "REDIS_USERNAME", "value": "r"}, "the user of Redis"),
    (
        "service",
        ("metadata", "annotations", "ray.io/ft-enabled"),
        "true",
        "annotation ray.io/ft-enabled",
    ),
    (
        "service",
        ("spec", "rayClusterConfig", "headGroupSpec", "rayStartParams", "redis-password"),
        "x",
        "redis-password beside",
    ),
    (
        "service",
        (*("spec", "rayClusterConfig", "headGroupSpec", "template", "spec"),
         *("containers", 0, "env", 0)),
        {"name": "REDIS_PASSWORD", "value": "x"},
        "REDIS_PASSWORD beside",
    ),
    # Jobs.
    ("job", (*JOB, "rayClusterSpec"), "-", "one of rayClusterSpec and clusterSelector"),
    ("job", (*JOB, "shutdownAfterJobFinishes"), False, "ttlSecondsAfterFinished needs"),
    ("job", (*JOB, "ttlSecondsAfterFinished"), -1, "is negative"),
    ("job", (*JOB, "backoffLimit"), -1, "backoffLimit is negative"),
    ("job", (*JOB, "activeDeadlineSeconds"), 0, "activeDeadlineSeconds is not positive"),
    ("job", (*JOB, "clusterSelector"), {"ray.io/cluster": "x"}, "backoffLimit excludes cluster"),
    ("job", (*JOB, "clusterSelector"), {"name": "x"}, "names no cluster"),
    ("job", (*JOB, "submissionMode"), "InteractiveMode", "backoffLimit excludes Interactive"),
    ("job", (*JOB, "submissionMode"), "SidecarMode", "submitterConfig excludes SidecarMode"),
    ("job", (*JOB, "runtimeEnvYAML"), "- pip", "runtimeEnvYAML is no mapping"),
    # Services.
    (
        "service",
        ("metadata", "annotations", "ray.io/initializing-timeout"),
        "soon",
        "is no duration",
    ),
    (
        "service",
        ("spec", "rayClusterConfig", "headGroupSpec", "template", "spec", "containers", 0, "ports"),
        [{"containerPort": 8080, "name": "metrics"}],
        "no port of the head is named serve",
    ),
    ("service", (*SERVICE, "rayClusterDeletionDelaySeconds"), -1, "is negative"),
    (
        "service",
        ("spec", "rayClusterConfig", "headGroupSpec", "headService"),
        {"metadata": {"name": "x"}},
        "headService",
    ),
    (
        "service",
        (*SERVICE, "upgradeStrategy"),
        {"type": "NewClusterWithIncrementalUpgrade"},
        "needs clusterUpgradeOptions",
    ),
    (
        "service",
        (*SERVICE, "upgradeStrategy"),
        {
            "type": "NewClusterWithIncrementalUpgrade",
            "clusterUpgradeOptions": {
                "maxSurgePercent": 50,
                "stepSizePercent": 60,
                "intervalSeconds": 10,
                "gatewayClassName": "istio",
            },
        },
        "step <= surge",
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", KUBERAY)
def test_the_operator_takes_our_manifests(name):
    assert problems(ray_manifest(name)) == []


@pytest.mark.parametrize(("name", "path", "value", "said"), BROKEN)
def test_what_the_operator_refuses_is_refused_here(name, path, value, said):
    assert any(said in problem for problem in problems(changed(name, path, value)))


def test_a_cluster_without_autoscaler_may_not_ask_for_its_second_version():
    manifest = changed("cluster", ENV, {"name": "RAY_enable_autoscaler_v2", "value": "true"})
    manifest["spec"]["enableInTreeAutoscaling"] = False
    del manifest["spec"]["autoscalerOptions"]
    said = problems(manifest)
    assert any("without enableInTreeAutoscaling" in problem for problem in said)
    manifest["spec"]["workerGroupSpecs"][0]["idleTimeoutSeconds"] = 60
    assert any(
        "idleTimeoutSeconds needs autoscaler v2" in problem for problem in problems(manifest)
    )


def test_a_suspended_job_shuts_its_cluster_down_and_picks_none():
    manifest = ray_manifest("job")
    manifest["spec"] |= {"suspend": True, "shutdownAfterJobFinishes": False}
    manifest["spec"]["clusterSelector"] = {"ray.io/cluster": "x"}
    said = problems(manifest)
    assert "suspend needs shutdownAfterJobFinishes" in said
    assert "suspend excludes clusterSelector" in said


def test_one_cluster_is_described_once():
    """The cluster that stays and the one of a job are the same: what runs there runs here."""
    assert cluster_spec(ray_manifest("job")) == cluster_spec(ray_manifest("cluster"))
