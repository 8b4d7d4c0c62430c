"""What is sent to a cluster: small, without secrets, under a name that tells runs apart."""

from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
import yaml

from ray.job_submission import JobStatus
from ray.runtime_env import RuntimeEnv
from ray_jobs import submit as submit_module
from ray_jobs.submit import (
    DEFAULT_ENVIRONMENT,
    Cluster,
    Order,
    check_order,
    outcome,
    packaged,
    read_environment,
)
from reasonembed.config import changed, load
from reasonembed.errors import ClusterError, ConfigError
from reasonembed.shards import Shard
from tests.ray.processes import ROOT, free_ports

FILES = sorted((ROOT / "cluster" / "runtime-env").glob("*.yaml"))


@pytest.fixture
def config():
    return load(ROOT / "configs/quickstart.yaml", overrides=["run_dir=/shared/runs/Quick start"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_runtime_environments_are_rays_small_and_without_secrets(file, config):
    environment = read_environment(file)
    RuntimeEnv(**{key: value for key, value in environment.items() if key != "working_dir"})
    for kind in ("pip", "uv"):
        for line in environment.get(kind, {}).get("packages", ()):
            assert (ROOT / line.partition("}/")[2]).is_file(), line
    with packaged(Order(config), environment) as sent:
        folder = Path(sent["working_dir"])
        names = {entry.name for entry in folder.iterdir()}
        assert names == {"job.yaml", "ray_jobs", "reasonembed", "requirements"}
        assert sum(one.stat().st_size for one in folder.rglob("*") if one.is_file()) < 5 * 2**20
        assert not list(folder.rglob("__pycache__"))
        assert load(folder / "job.yaml") == config
        assert "excludes" not in sent
    # By Ray's own command the whole checkout is the folder, so these must keep it small.
    for heavy in (".*", "runs", "results", "tests", "docs"):
        assert f"/{heavy}" in environment["excludes"]


def test_the_three_are_there_and_the_default_is_the_images():
    assert [file.stem for file in FILES] == ["image", "pip", "uv"]
    image = yaml.safe_load(FILES[0].read_text())
    assert {key: value for key, value in image.items() if key != "excludes"} == DEFAULT_ENVIRONMENT


def test_an_image_that_holds_the_code_gets_the_configuration_alone(config):
    with packaged(Order(config), {"env_vars": {}}) as sent:
        assert [one.name for one in Path(sent["working_dir"]).iterdir()] == ["job.yaml"]


def test_names_tell_runs_stages_and_shards_apart_and_last(config):
    names = {
        Order(config).name,
        Order(config, stage="annotate").name,
        Order(config, stage="annotate", shard=Shard(1, 2)).name,
        Order(config, stage="annotate", shard=Shard(2, 2)).name,
    }
    assert len(names) == 4 and all(name.startswith("Quick-start-") for name in names)
    faster = config.model_copy(update={"runtime": config.runtime.model_copy()})
    assert Order(faster).name == Order(config).name
    assert Order(faster).metadata == Order(config).metadata


def test_the_command_says_everything(config):
    order = Order(config, stage="annotate", shard=Shard(1, 2), retry="error")
    assert order.entrypoint == (
        "python -m ray_jobs.annotate --config job.yaml --retry error --shard 1/2"
    )
    pipeline = Order(config, first="plan", last="mine")
    assert "ray_jobs.pipeline --config job.yaml --from plan --to mine" in pipeline.entrypoint
    again = Order(config, is_fresh=True, is_growing=True, mine_with="s3://bucket/one run")
    assert again.entrypoint.endswith("--mine-with 's3://bucket/one run' --fresh --grow")


def test_what_cannot_be_sent_is_refused(config, tmp_path):
    check_order(Order(config))
    cases = {
        "run_dir 'runs/x' is relative.*--set run_dir=": Order(
            config.model_copy(update={"run_dir": "runs/x"})
        ),
        "--mine-with 'runs/x' is relative": Order(config, mine_with="runs/x"),
        "corpus.source 'data/corpus' is relative": Order(
            changed(config, {"corpus.source": "data/corpus"}, where="here")
        ),
        "evaluate.collection './gold' is relative": Order(
            changed(config, {"evaluate.collection": "./gold"}, where="here")
        ),
        r"assemble.sources\[0\].path 'data/made' is relative": Order(
            changed(config, {"assemble.sources": [{"path": "data/made"}]}, where="here")
        ),
        "name it with --stage": Order(config, shard=Shard(1, 2)),
        "are for the pipeline": Order(config, stage="mine", last="mine"),
        "--fresh and --grow are for": Order(config, stage="mine", is_fresh=True),
        "looks like a secret": Order(
            config.model_copy(update={"run_dir": "s3://AKIAABCDEFGH12345678:x@bucket/run"})
        ),
    }
    for message, order in cases.items():
        with pytest.raises(ConfigError, match=message):
            check_order(order)
    file = tmp_path / "env.yaml"
    for text, message in (
        ("env_vars: {OPENAI_API_KEY: abc}", "env_vars.OPENAI_API_KEY looks like a secret"),
        ("env_vars: [a]", "no runtime environment"),
        ("- a", "no runtime environment"),
        ("working_dir: s3://bucket/code.zip", "working_dir 's3://bucket/code.zip' would not be"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_environment(file)
    with pytest.raises(ConfigError, match="no runtime environment"):
        read_environment(tmp_path / "missing.yaml")


def test_a_cluster_that_is_not_there_is_said_with_its_cure():
    (port,) = free_ports(1)
    with pytest.raises(ClusterError, match="no jobs can be sent to"):
        Cluster(f"http://127.0.0.1:{port}", say=str)
    with pytest.raises(ClusterError, match="jobs are sent to the dashboard"):
        Cluster("head:6379", say=str)


@pytest.mark.parametrize(
    ("status", "code", "error_type", "expected"),
    [
        (JobStatus.SUCCEEDED, 0, None, 0),
        (JobStatus.STOPPED, 75, None, 75),
        (JobStatus.STOPPED, -9, None, 75),
        (JobStatus.FAILED, 3, "JOB_ENTRYPOINT_COMMAND_ERROR", 3),
        (JobStatus.FAILED, 75, "JOB_ENTRYPOINT_COMMAND_ERROR", 75),
        (JobStatus.FAILED, -9, "JOB_ENTRYPOINT_COMMAND_ERROR", 75),
        (JobStatus.FAILED, 137, "JOB_ENTRYPOINT_COMMAND_ERROR", 75),
        (JobStatus.FAILED, None, "RUNTIME_ENV_SETUP_FAILURE", 2),
        (JobStatus.FAILED, None, "JOB_SUPERVISOR_ACTOR_DIED", 75),
        (JobStatus.FAILED, None, None, 1),
    ],
)
def test_exit_codes_of_jobs(status, code, error_type, expected):
    details = SimpleNamespace(
        status=status,
        driver_exit_code=code,
        error_type=error_type,
        message="why",
        submission_id="run-1",
    )
    assert outcome(details)[0] == expected


class Jobs:
    """A cluster with one job, whose log is cut off once and whose state is given."""

    def __init__(self, status, metadata=None):
        self._details = SimpleNamespace(
            submission_id="run-1",
            status=status,
            metadata=metadata,
            driver_exit_code=None,
            error_type=None,
            message="",
        )
        self._is_cut = True

    def list_jobs(self):
        return [self._details]

    def get_job_info(self, _):
        return self._details

    def stop_job(self, _):
        """Says yes, as a cluster does."""

    async def tail_job_logs(self, _):
        yield "one\n"
        if self._is_cut:
            self._is_cut = False
            raise aiohttp.ClientError
        yield "two\n"


def cluster_of(jobs, monkeypatch):
    monkeypatch.setattr(submit_module, "JobSubmissionClient", lambda address: jobs)
    monkeypatch.setattr(submit_module, "_POLL_S", 0.01)
    monkeypatch.setattr(submit_module, "_STOP_S", -submit_module.GRACE_S)
    return Cluster("http://head:8265", say=str)


def test_a_job_that_ends_while_its_log_is_cut_off_is_shown_to_its_end(monkeypatch, capsys):
    assert cluster_of(Jobs(JobStatus.SUCCEEDED), monkeypatch).follow("run-1") == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_a_job_that_does_not_stop_is_not_called_stopped(config, monkeypatch):
    order = Order(config)
    running = Jobs(JobStatus.RUNNING, order.metadata)
    with pytest.raises(ClusterError, match="run-1 was told to stop and has not ended yet"):
        cluster_of(running, monkeypatch).stop(order)
    other = Jobs(JobStatus.RUNNING, order.metadata | {"run": "/another"})
    assert cluster_of(other, monkeypatch).stop(order) == []
