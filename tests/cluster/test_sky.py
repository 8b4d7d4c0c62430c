"""SkyPilot's files: the fields of its own task schema that we use, and what they start.

SkyPilot is no dependency of the project; the schema below is the part of its 0.14 that our files
need, closed against everything else.
"""

import os
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from string import Template

import jsonschema
import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

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
                        "wait_for": {"enum": ["jobs_and_ssh", "jobs", "none"]},
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
    values = {**task["envs"], "RUN_DIR": "s3://bucket/run"}
    words = shlex.split(task["run"].split("exec ", 1)[1].replace("\\\n", ""))
    given = [after for word, after in pairwise(words) if word == "--set"]
    config = load(ROOT / path, overrides=[Template(one).substitute(values) for one in given])
    for name in (config.corpus.source, config.evaluate.collection):  # what the image lacks
        assert not Path(name).is_absolute() and "/" not in name.partition("://")[0], name
    runtime = config.runtime
    (gpus,) = task["resources"]["accelerators"].values()
    for stage in ("generate", "embed", "annotate", "rewrite"):
        pool = getattr(runtime, stage)
        assert pool.num_gpus * pool.max_actors <= gpus
    assert runtime.train.num_workers <= gpus


def test_the_cluster_ends_when_idle_and_needs_a_token():
    task = documents("sky-cluster.yaml")[0]
    autostop = task["resources"]["autostop"]
    assert autostop["down"] and autostop["wait_for"] == "jobs"
    assert not task["resources"]["use_spot"]
    assert "RAY_AUTH_MODE=token" in task["run"] and "RAY_AUTH_TOKEN" in task["secrets"]
    assert re.search(r"--dashboard-host 127\.0\.0\.1", task["run"])


FAKE_RAY = """#!/bin/bash
echo "$1 $2" >> calls
case "$1 $2" in
  "start --head") exec {sleep} 600 ;;
  "job list") line=$(head --lines 1 answers); sed --in-place 1d answers; echo "$line" ;;
esac
"""
"""Answers of `ray job list` are the lines of a file; without any there are no jobs."""


def run_on(tmp_path, rank, *answers):
    """What the script of sky-cluster.yaml asks of Ray until it ends, minutes taking no time."""
    fakes = {"ray": FAKE_RAY.format(sleep=shutil.which("sleep")), "sleep": "#!/bin/bash\n"}
    for name, text in fakes.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "answers").write_text("".join(f"{one}\n" for one in answers))
    (tmp_path / "calls").touch()
    given = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    given |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": str(rank)}
    script = documents("sky-cluster.yaml")[0]["run"]
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=given, check=True, timeout=60)
    return (tmp_path / "calls").read_text().splitlines()


def jobs(status, **fields):
    return repr([JobDetails(type=JobType.SUBMISSION, status=status, entrypoint="x", **fields)])


def test_the_head_s_script_lives_as_long_as_jobs_and_half_an_hour_more(tmp_path):
    running, pending = jobs(JobStatus.RUNNING), jobs(JobStatus.PENDING)
    ended = jobs(JobStatus.FAILED, message="it was RUNNING")
    calls = run_on(tmp_path, 0, *[running] * 50, *[ended] * 29, pending, *[ended] * 5)
    assert sorted(calls) == ["job list"] * (50 + 29 + 1 + 30) + ["start --head"]


def test_a_worker_s_script_ends_well_with_its_ray(tmp_path):
    assert run_on(tmp_path, 1) == ["health-check --address", "start --block"]


@EACH
def test_every_variable_is_given(task):
    given = task.get("envs", {}).keys() | task.get("secrets", {}).keys()
    given |= {"SKYPILOT_NODE_IPS", "SKYPILOT_NODE_RANK"}
    made = set(re.findall(r"^\s*(?:export )?(\w+)=", task["run"], re.MULTILINE))
    used = set(re.findall(r"\$\{?(\w+)", task["run"]))
    assert used <= given | made
    assert shlex.split((CLUSTER / "sky-job.yaml").read_text("utf-8").splitlines()[3].strip("# "))
