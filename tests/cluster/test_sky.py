"""SkyPilot's files: the fields of its own task schema that we use, and what they start.

SkyPilot is no dependency of the project; the schema below is the part of its 0.14 that our files
need, closed against everything else.
"""

import re
import shlex
import subprocess

import jsonschema
import pytest

from reasonembed.config import load
from reasonembed.errors import EXIT_RESUME
from tests.cluster.files import CLUSTER, ROOT, TAG, documents

FILES = ("sky-job", "sky-cluster")
EACH = pytest.mark.parametrize("name", FILES)
TEXTS = {"type": "object", "additionalProperties": {"type": ["string", "null"]}}
SCHEMA = {
    "type": "object",
    "required": ["name", "resources", "run"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "num_nodes": {"type": "integer"},
        "setup": {"type": "string"},
        "run": {"type": "string"},
        "envs": TEXTS,
        "secrets": TEXTS,
        "resources": {
            "type": "object",
            "additionalProperties": False,
            "properties": {
                "image_id": {"type": "string", "pattern": "^docker:"},
                "accelerators": {"type": "object", "additionalProperties": {"type": "integer"}},
                "use_spot": {"type": "boolean"},
                "disk_size": {"type": "integer"},
                "autostop": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "idle_minutes": {"type": "integer"},
                        "down": {"type": "boolean"},
                    },
                },
                "job_recovery": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "strategy": {"enum": ["FAILOVER", "EAGER_NEXT_REGION"]},
                        "max_restarts_on_errors": {"type": "integer", "minimum": 0},
                        "recover_on_exit_codes": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0, "maximum": 255},
                        },
                    },
                },
            },
        },
    },
}


@pytest.fixture
def task(name):
    return documents(f"{name}.yaml")[0]


@EACH
def test_sky_takes_it(task):
    jsonschema.validate(task, SCHEMA)


@EACH
def test_the_image_is_ours(task):
    assert task["resources"]["image_id"].endswith(f"/reasonembed:{TAG}-gpu")


@EACH
def test_bash_takes_what_is_run(task):
    subprocess.run(["bash", "-n"], input=task["run"], text=True, check=True)


def test_the_job_is_on_spot_and_goes_on_after_our_own_word_alone():
    resources = documents("sky-job.yaml")[0]["resources"]
    assert resources["use_spot"]
    assert resources["job_recovery"]["recover_on_exit_codes"] == [EXIT_RESUME]
    assert resources["job_recovery"]["max_restarts_on_errors"] == 0


def test_the_job_runs_the_pipeline_where_its_gpus_fit():
    task = documents("sky-job.yaml")[0]
    assert "exec python -m ray_jobs.pipeline" in task["run"]
    path = task["envs"]["CONFIG"].removeprefix("/opt/reasonembed/")
    runtime = load(ROOT / path, overrides=["run_dir=s3://bucket/run"]).runtime
    (gpus,) = task["resources"]["accelerators"].values()
    for stage in ("generate", "embed", "annotate", "rewrite"):
        pool = getattr(runtime, stage)
        assert pool.num_gpus * pool.max_actors <= gpus
    assert runtime.train.num_workers <= gpus


def test_the_cluster_ends_when_idle_and_needs_a_token():
    task = documents("sky-cluster.yaml")[0]
    assert task["resources"]["autostop"]["down"] and not task["resources"]["use_spot"]
    assert "RAY_AUTH_MODE=token" in task["run"] and "RAY_AUTH_TOKEN" in task["secrets"]
    assert re.search(r"--dashboard-host 127\.0\.0\.1", task["run"])


@EACH
def test_every_variable_is_given(task):
    given = task.get("envs", {}).keys() | task.get("secrets", {}).keys()
    given |= {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"}
    made = set(re.findall(r"^\s*(?:export )?(\w+)=", task["run"], re.MULTILINE))
    used = set(re.findall(r"\$\{?(\w+)", task["run"]))
    assert used <= given | made
    assert shlex.split((CLUSTER / "sky-job.yaml").read_text("utf-8").splitlines()[3].strip("# "))
