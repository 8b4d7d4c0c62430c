"""Pods and the rest of Kubernetes' objects: its own schemas, then what we want of every cluster."""

import importlib.util
import math
import shlex

import jsonschema
import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.constants import AUTOSCALER_METRIC_PORT
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr as autoscaling_config,
)
from ray.runtime_env import RuntimeEnv
from ray.serve.schema import ServeDeploySchema

from reasonembed.config import load
from tests.cluster.files import (
    CLUSTER,
    KUBERAY,
    LAUNCHERS,
    PYTHON,
    RAY,
    ROOT,
    TAG,
    documents,
    lock,
    ray_manifest,
)
from tests.cluster.kuberay import cluster_spec, groups

KUBERNETES = "1.33"
NAMES = ["support", "redis", "network-policy", "pod-monitor", *KUBERAY]
OBJECTS = [
    (name, one)
    for name in NAMES
    for one in documents(f"kuberay/{name}.yaml")
    if not one["apiVersion"].startswith(("ray.io", "monitoring.coreos.com"))
]
CLUSTERS = {name: cluster_spec(ray_manifest(name)) for name in KUBERAY}
GROUPS = [(name, group, spec) for name, of in CLUSTERS.items() for group, spec in groups(of)]
WORKERS = [(name, group, spec) for name, group, spec in GROUPS if group != "head"]
TRAINED = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem != "quickstart")


def named(rows):
    return pytest.mark.parametrize(
        ("name", "group", "spec"), rows, ids=[f"{name}-{group}" for name, group, _ in rows]
    )


def environment(container):
    return {one["name"]: one.get("value") for one in container["env"]}


def quantity(text):
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3}
    for unit, factor in units.items():
        if str(text).endswith(unit):
            return float(str(text).removesuffix(unit)) * factor
    return float(text)


def node_types(name):
    """What Ray's autoscaler makes of a cluster, checked by its own schema on the way."""
    config = autoscaling_config(
        {"metadata": {"name": name, "namespace": "x"}, "spec": CLUSTERS[name]}
    )
    return config["available_node_types"]


@pytest.mark.parametrize(("name", "one"), OBJECTS, ids=[f"{n}-{o['kind']}" for n, o in OBJECTS])
def test_kubernetes_takes_our_objects(name, one):
    kubernetes_validate.validate(one, KUBERNETES, strict=True)


@named(GROUPS)
def test_kubernetes_takes_our_pods(name, group, spec):
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": group}}
    kubernetes_validate.validate(template | {"template": spec["template"]}, KUBERNETES, strict=True)


def test_kubernetes_refuses_what_is_misspelt():
    template = ray_manifest("cluster")["spec"]["headGroupSpec"]["template"]
    template["spec"]["terminationGracePeriodSecond"] = 5
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {}, "template": template},
            KUBERNETES,
            strict=True,
        )


@named(GROUPS)
def test_a_pod_is_no_root_has_bounds_and_is_asked_how_it_is(name, group, spec):
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert {"livenessProbe", "readinessProbe"} <= container.keys()
    for kind in ("cpu", "memory"):  # Ray counts the limits; a request below would oversell the node
        requested = container["resources"]["requests"][kind]
        assert requested == container["resources"]["limits"][kind]


@named(GROUPS)
def test_shared_memory_is_a_third_of_the_memory_and_part_of_it(name, group, spec):
    pod = spec["template"]["spec"]
    memory = quantity(pod["containers"][0]["resources"]["limits"]["memory"])
    (shm,) = [one["emptyDir"] for one in pod["volumes"] if one["name"] == "shm"]
    assert shm["medium"] == "Memory"
    asked = spec["rayStartParams"].get("object-store-memory")
    share = int(asked) / memory if asked else 0.2
    assert share * memory <= quantity(shm["sizeLimit"]) <= 0.35 * memory
    mounts = {one["name"]: one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert mounts["shm"] == "/dev/shm" and mounts["shared"] == "/shared"
    assert mounts.keys() == {one["name"] for one in pod["volumes"]}


@pytest.mark.parametrize("name", KUBERAY)
def test_the_head_takes_no_work_and_stays(name):
    head = CLUSTERS[name]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == head["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert is_never_on_spot(head["template"]["spec"])
    assert head["labels"]["ray.io/market-type"] == "on-demand"
    # The autoscaler's rights are bound to the head's account, and to no worker's.
    head_account = head["template"]["spec"]["serviceAccountName"]
    for _, group in groups(CLUSTERS[name])[1:]:
        pod = group["template"]["spec"]
        assert pod["serviceAccountName"] != head_account
        assert pod["automountServiceAccountToken"] is False


def is_never_on_spot(pod):
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    ((expressions,),) = [[term["matchExpressions"] for term in terms["nodeSelectorTerms"]]]
    keys = {one["key"]: one["operator"] for one in expressions}
    return keys == {
        "cloud.google.com/gke-spot": "DoesNotExist",
        "eks.amazonaws.com/capacityType": "NotIn",
        "karpenter.sh/capacity-type": "NotIn",
    } and not any("spot" in one["key"] for one in pod.get("tolerations", []))


@named(WORKERS)
def test_a_group_is_where_its_label_says(name, group, spec):
    pod, market = spec["template"]["spec"], spec["labels"]["ray.io/market-type"]
    tolerated = {one["key"] for one in pod.get("tolerations", [])}
    if market == "spot":
        assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
        assert "cloud.google.com/gke-spot" in tolerated
        assert spec["minReplicas"] == 0
    else:
        assert is_never_on_spot(pod)
    gpus = pod["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
    kind = spec["labels"].get("ray.io/accelerator-type")
    assert (gpus is None) == (kind is None) == ("nvidia.com/gpu" not in tolerated)
    if kind:
        assert f"accelerator_type:{kind}" in spec["rayStartParams"]["resources"]
        assert kind.lower() in pod["nodeSelector"]["cloud.google.com/gke-accelerator"]


@named(WORKERS)
def test_a_pod_that_goes_drains_within_its_grace(name, group, spec):
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    command = shlex.split(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert command[2:4] == ["ray", "drain-node"]
    announcing = int(command[command.index("timeout") + 1])
    deadline = int(command[command.index("--deadline-remaining-seconds") + 1])
    draining = int(environment(container)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    grace = pod["terminationGracePeriodSeconds"]
    assert announcing + draining < grace
    assert draining <= deadline < grace


@pytest.mark.parametrize("name", KUBERAY)
def test_a_head_that_goes_drains_within_its_grace(name):
    pod = CLUSTERS[name]["headGroupSpec"]["template"]["spec"]
    (container,) = pod["containers"]
    draining = int(environment(container)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
    assert draining < pod["terminationGracePeriodSeconds"]


def test_ray_knows_the_command_that_drains():
    from ray.scripts.scripts import cli

    options = {name for one in cli.commands["drain-node"].params for name in one.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= options


@pytest.mark.parametrize("name", KUBERAY)
def test_spot_is_preferred_among_equals(name):
    """Ray looks at the priority of groups only where their resources make them equally good."""
    types = node_types(name)
    spot, on_demand = types["gpu-spot"], types["gpu-on-demand"]
    assert spot["resources"] == on_demand["resources"]
    assert spot["priority"] > on_demand["priority"]
    assert (
        spot["labels"]["ray.io/accelerator-type"] == on_demand["labels"]["ray.io/accelerator-type"]
    )
    assert types["headgroup"]["resources"]["CPU"] == types["headgroup"]["resources"]["GPU"] == 0


@pytest.mark.parametrize("name", ["cluster", "job"])
def test_at_rest_only_the_head_runs(name):
    assert all(group["minReplicas"] == 0 for group in CLUSTERS[name]["workerGroupSpecs"])


@pytest.mark.parametrize("name", KUBERAY)
def test_everybody_needs_the_token(name):
    """Whoever reaches the dashboard runs code; it listens beyond the pod only behind a token."""
    cluster = CLUSTERS[name]
    assert cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert cluster["authOptions"]["mode"] == "token"


def test_versions_are_those_of_the_locks():
    assert lock("cpu")["ray"] == lock("gpu")["ray"] == RAY
    for name, group, spec in GROUPS:
        assert CLUSTERS[name]["rayVersion"] == RAY
        (container,) = spec["template"]["spec"]["containers"]
        target = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert container["image"].endswith(f"/reasonembed:{TAG}-{target}"), group
    (submitter,) = ray_manifest("job")["spec"]["submitterPodTemplate"]["spec"]["containers"]
    assert submitter["image"].endswith(f":{TAG}-cpu")
    assert PYTHON.startswith("3.")


def test_fault_tolerance_of_the_head_is_the_service_s():
    """A job's cluster is thrown away with its head: there the ledger is what resumes."""
    assert "gcsFaultToleranceOptions" not in CLUSTERS["job"]
    options = CLUSTERS["service"]["gcsFaultToleranceOptions"]
    service, state = documents("kuberay/redis.yaml")
    assert options["redisAddress"] == f"redis://{service['metadata']['name']}:6379"
    (container,) = state["spec"]["template"]["spec"]["containers"]
    secret = options["redisPassword"]["valueFrom"]
    assert secret in [one["valueFrom"] for one in container["env"]]


def test_the_service_is_the_one_of_the_configuration():
    text = (ROOT / "configs" / "serve" / "cluster-qwen3-8b.yaml").read_text("utf-8")
    served = yaml.safe_load(ray_manifest("service")["spec"]["serveConfigV2"])
    assert served == yaml.safe_load(text)
    ServeDeploySchema(**served)


def test_the_service_fits_its_nodes():
    types = [one["resources"] for name, one in node_types("service").items() if name != "headgroup"]
    (application,) = yaml.safe_load(ray_manifest("service")["spec"]["serveConfigV2"])[
        "applications"
    ]
    for deployment in application["deployments"]:
        options = dict(deployment.get("ray_actor_options", {}))
        wanted = {
            "CPU": options.get("num_cpus", 1),
            "GPU": options.get("num_gpus", 0),
            "memory": options.get("memory", 0),
        }
        if "accelerator_type" in options:
            wanted[f"accelerator_type:{options['accelerator_type']}"] = 0.001
        assert any(
            all(resources.get(kind, 0) >= much for kind, much in wanted.items())
            for resources in types
        ), deployment["name"]


def test_the_service_has_gpus_at_rest_and_under_load():
    arguments = yaml.safe_load(ray_manifest("service")["spec"]["serveConfigV2"])["applications"][0]
    embedder, llm = arguments["args"]["embedder"], arguments["args"]["llm_gpus"]
    (surge,) = [
        one["max_surge_percent"] for one in arguments["deployments"] if one["name"] == "Embedder"
    ]
    kinds = node_types("service").values()
    gpus = {"min": 0, "max": 0}
    for kind in kinds:
        for bound in gpus:
            gpus[bound] += kind[f"{bound}_workers"] * kind["resources"].get("GPU", 0)
    assert gpus["min"] >= embedder["min"] * embedder["num_gpus"] + llm
    most = math.ceil(embedder["max"] * (1 + surge / 100)) * embedder["num_gpus"]
    assert gpus["max"] >= most + llm
    index = node_types("service")["index"]
    shards = sum(
        one["ray_actor_options"]["memory"]
        for one in arguments["deployments"]
        if one["name"].startswith("Index")
    )
    assert index["min_workers"] * index["resources"]["memory"] >= shards
    assert index["min_workers"] >= arguments["args"]["ingresses"]


def test_memory_of_the_index_leaves_room_for_the_object_store():
    group = dict(groups(CLUSTERS["service"]))["index"]
    start = group["rayStartParams"]
    limit = quantity(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
    assert int(start["memory"]) + int(start["object-store-memory"]) <= 0.9 * limit


def test_a_disruption_takes_one_worker_of_the_service():
    budget = documents("kuberay/service.yaml")[1]["spec"]
    assert_selects_the_service(budget.pop("selector"))
    at_rest = sum(group["minReplicas"] for _, group in groups(CLUSTERS["service"])[1:])
    # Pods of a RayCluster, which has no scale: Kubernetes takes a number here and nothing else.
    assert budget == {"minAvailable": at_rest - 1}


def assert_selects_the_service(selector):
    for _, group in groups(CLUSTERS["service"])[1:]:
        labels = group["template"]["metadata"]["labels"]
        assert selector["matchLabels"].items() <= labels.items()


def test_only_who_must_gets_in():
    policies = {
        one["metadata"]["name"]: one["spec"] for one in documents("kuberay/network-policy.yaml")
    }
    assert policies["nothing-comes-in"] == {"podSelector": {}, "policyTypes": ["Ingress"]}
    for name, policy in policies.items():
        for rule in policy.get("ingress", []):
            assert rule["from"] and all(rule["from"]), f"{name} lets everybody in"
    between, *others = policies["ray"]["ingress"]
    assert "ports" not in between and between["from"] == [
        {"podSelector": policies["ray"]["podSelector"]}
    ]
    assert all(rule["ports"] for rule in others)
    (requests,) = policies["service"]["ingress"]
    assert [one["port"] for one in requests["ports"]] == [8000]
    assert_selects_the_service(policies["service"]["podSelector"])


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
POD_MONITOR = {
    "type": "object",
    "required": ["selector", "podMetricsEndpoints"],
    "additionalProperties": False,
    "properties": {
        "selector": {"type": "object"},
        "podMetricsEndpoints": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["port"],
                "additionalProperties": False,
                "properties": {
                    "port": {"type": "string"},
                    "path": {"type": "string"},
                    "authorization": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {"type": {"type": "string"}, "credentials": TEXTS},
                    },
                },
            },
        },
    },
}
"""The part of the operator's schema that our file needs, closed against everything else."""


def ports_of(*, is_head):
    """Named ports of Ray's pods, as a monitor finds them."""
    found = {}
    for name, group, spec in GROUPS:
        if (group == "head") == is_head:
            (container,) = spec["template"]["spec"]["containers"]
            for one in container["ports"]:
                found.setdefault(one["name"], {})[name, group] = one["containerPort"]
    return found


def test_prometheus_sees_nodes_the_autoscaler_and_the_service():
    nodes, service = documents("kuberay/pod-monitor.yaml")
    for one in (nodes, service):
        assert (one["apiVersion"], one["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
        jsonschema.validate(one["spec"], POD_MONITOR)
    heads, workers = ports_of(is_head=True), ports_of(is_head=False)
    assert [one["port"] for one in nodes["spec"]["podMetricsEndpoints"]] == [
        "metrics",
        "as-metrics",
    ]
    assert set((heads["metrics"] | workers["metrics"]).values()) == {8080}
    assert len(heads["metrics"] | workers["metrics"]) == len(GROUPS)
    assert heads["as-metrics"] == {(name, "head"): AUTOSCALER_METRIC_PORT for name in KUBERAY}
    # One target: a proxy asks any ingress, and two would count all of them twice.
    assert service["spec"]["selector"] == {"matchLabels": {"ray.io/node-type": "head"}}
    (scraped,) = service["spec"]["podMetricsEndpoints"]
    assert heads[scraped["port"]] == {("service", "head"): 8000}
    assert scraped["authorization"]["credentials"].keys() == {"name", "key"}


def test_prometheus_is_let_in():
    (rule,) = [
        rule
        for policy in documents("kuberay/network-policy.yaml")
        for rule in policy["spec"].get("ingress", [])
        if "monitoring" in str(rule["from"])
    ]
    assert {8080, AUTOSCALER_METRIC_PORT, 8000} <= {one["port"] for one in rule["ports"]}


def test_what_is_named_exists():
    claims = {
        one["persistentVolumeClaim"]["claimName"]
        for _, _, spec in GROUPS
        for one in spec["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in one
    }
    accounts = {spec["template"]["spec"]["serviceAccountName"] for _, _, spec in GROUPS}
    have = {(one["kind"], one["metadata"]["name"]) for one in documents("kuberay/support.yaml")}
    assert {("PersistentVolumeClaim", name) for name in claims} <= have
    assert {("ServiceAccount", name) for name in accounts} <= have
    namespaces = {
        one["metadata"]["namespace"]
        for name in NAMES
        for one in documents(f"kuberay/{name}.yaml")
        if one["kind"] != "Namespace"
    }
    assert {("Namespace", name) for name in namespaces} <= have


def test_the_job_runs_the_pipeline_and_goes_on():
    spec = ray_manifest("job")["spec"]
    python, flag, module, *arguments = shlex.split(spec["entrypoint"])
    assert (python, flag) == ("python", "-m") and importlib.util.find_spec(module)
    given = list(zip(arguments[::2], arguments[1::2], strict=True))
    path = dict(given)["--config"].removeprefix("/opt/reasonembed/")
    config = load(ROOT / path, overrides=[value for flag, value in given if flag == "--set"])
    assert config.run_dir.startswith("/shared/")  # where every pod mounts the same volume
    assert config.corpus.source.startswith("hf://")  # the image has none
    assert config.evaluate.collection.startswith("bright:")
    assert spec["backoffLimit"] >= 3
    environment = yaml.safe_load(spec["runtimeEnvYAML"])
    assert RuntimeEnv(**environment)["env_vars"] == environment["env_vars"]
    assert "shutdownAfterJobFinishes" in spec


def gpu_node_types():
    for name in ("cluster", "job"):
        yield name, node_types(name)
    for name in LAUNCHERS:
        yield name, documents(f"{name}.yaml")[0]["available_node_types"]


@pytest.mark.parametrize("config", TRAINED, ids=lambda path: path.stem)
def test_the_gpus_of_each_configuration_fit(config):
    """An actor fits one node, training fits the groups together."""
    runtime = load(config).runtime
    pools = {name: getattr(runtime, name) for name in ("generate", "embed", "annotate", "rewrite")}
    for name, types in gpu_node_types():
        nodes = [one["resources"].get("GPU", 0) for one in types.values()]
        total = sum(
            one["resources"].get("GPU", 0) * one.get("max_workers", 0) for one in types.values()
        )
        for stage, pool in pools.items():
            assert pool.num_gpus <= max(nodes), (name, stage)
            assert pool.num_gpus * pool.max_actors <= total, (name, stage)
        assert runtime.train.num_workers <= total, name


def test_no_file_of_kubernetes_is_left_out():
    assert {path.stem for path in (CLUSTER / "kuberay").glob("*.yaml")} == set(NAMES)
