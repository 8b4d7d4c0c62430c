"""Sends a run, or one stage of it, to a Ray cluster as a job; follows, stops and continues it.

A job is resumed by its run's folder, not by its name: submitting the same again after a stop, a
failure or a lost machine computes what is missing. Names only count attempts.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import ray_jobs
import reasonembed
from ray_jobs.interrupts import GRACE_S
from ray_jobs.pools import MARKET_LABEL
from reasonembed import __version__
from reasonembed.config import RunConfig, fingerprint, flatten
from reasonembed.errors import EXIT_CONFIG, EXIT_FAILED, EXIT_RESUME, ClusterError, ConfigError
from reasonembed.leaks import check_no_secrets
from reasonembed.schemas import stable_hash
from reasonembed.shards import Shard
from reasonembed.storage import Place, is_uri

DEFAULT_ENVIRONMENT: dict[str, Any] = {
    "working_dir": ".",
    "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"},
}
"""As `cluster/runtime-env/image.yaml`: packages are in the image, the code travels."""

_CONFIG_FILE = "job.yaml"
_POLL_S = 1.0
_STOP_S = 30.0
_MAX_PACKAGE_BYTES = 50 * 2**20
_SETUP_FAILED = "RUNTIME_ENV_SETUP_FAILURE"


@dataclass(frozen=True)
class Order:
    """What a job is to do.

    Attributes:
        config: Of the run, overrides applied.
        stage: One stage alone; None for the pipeline.
        first: First stage of the pipeline; None for the first that there is.
        last: Last stage of the pipeline; None for the last that there is.
        shard: Of `stage`.
        retry: Statuses of rows that are computed again, with commas between.
        is_fresh: Of the pipeline; see `run_pipeline`.
        is_growing: Of the pipeline.
        mine_with: Of the pipeline.
    """

    config: RunConfig
    stage: str | None = None
    first: str | None = None
    last: str | None = None
    shard: Shard | None = None
    retry: str = ""
    is_fresh: bool = False
    is_growing: bool = False
    mine_with: str | None = None

    @property
    def entrypoint(self) -> str:
        """The command of the driver, in the folder that travels."""
        words = ["python", "-m", f"ray_jobs.{self.stage or 'pipeline'}", "--config", _CONFIG_FILE]
        given = {"--from": self.first, "--to": self.last, "--retry": self.retry}
        given |= {"--shard": str(self.shard or ""), "--mine-with": self.mine_with}
        words += [word for name, value in given.items() if value for word in (name, value)]
        flags = {"--fresh": self.is_fresh, "--grow": self.is_growing}
        words += [name for name, is_given in flags.items() if is_given]
        return shlex.join(words)

    @property
    def name(self) -> str:
        """What all attempts of the same are called, up to their number."""
        place = Place(self.config.run_dir)
        what = stable_hash(place.uri, str(self.stage), str(self.shard), size=4)
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '-', place.name).strip('-') or 'run'}-{what}"

    @property
    def metadata(self) -> dict[str, str]:
        """What the dashboard shows, and `stop` looks for."""
        settings = self.config.model_dump(mode="json", exclude={"runtime"})
        found = {
            "run": Place(self.config.run_dir).uri,
            "config": fingerprint(flatten(settings)),
            "stage": self.stage or "pipeline",
            "version": __version__,
        }
        return found | ({"shard": str(self.shard)} if self.shard else {})


def check_order(order: Order) -> None:
    """Refuses what cannot be sent.

    Raises:
        ConfigError: A path of this machine alone, a secret, or a shard of several stages.
    """
    config = order.config
    for name, path in {"run_dir": config.run_dir, "--mine-with": order.mine_with or "/"}.items():
        if not is_uri(path) and not Path(path).is_absolute():
            raise ConfigError(
                f"{name} {path!r} is relative, and would lie in a folder that is deleted with the "
                "job: give an address such as s3://bucket/runs/one, or an absolute path that all "
                f"nodes see ({'--set run_dir=…' if name == 'run_dir' else '--mine-with …'})"
            )
    sources = {
        f"assemble.sources[{i}].path": one.path for i, one in enumerate(config.assemble.sources)
    }
    read = {
        "corpus.source": config.corpus.source,
        "evaluate.collection": config.evaluate.collection,
    }
    for name, path in (read | sources).items():
        if _is_of_here(path):
            raise ConfigError(
                f"{name} {path!r} is relative, and does not travel with the job: give an address "
                "such as s3://bucket/corpus, files on the hub, or an absolute path that all nodes "
                f"see (--set {name}=…)"
            )
    if order.stage and (order.first or order.last or order.is_fresh or order.is_growing):
        raise ConfigError(
            "--stage runs one stage alone; --from, --to, --fresh and --grow are for the pipeline"
        )
    if order.shard and not order.stage:
        raise ConfigError(f"--shard {order.shard} is of one stage; name it with --stage")
    check_no_secrets(order.config.model_dump(mode="json"), where="the configuration")


def _is_of_here(path: str) -> bool:
    """Whether it names files by where a command was typed; names of collections name none."""
    is_relative = not is_uri(path) and not Path(path).is_absolute()
    return is_relative and ("/" in path or Path(path).exists())


def read_environment(file: Path | None) -> dict[str, Any]:
    """A runtime environment from a YAML file.

    Raises:
        ConfigError: There is none, Ray does not take it, it holds a secret, or names other code.
    """
    if file is None:
        return DEFAULT_ENVIRONMENT
    from ray.runtime_env import RuntimeEnv

    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        RuntimeEnv(**{key: value for key, value in found.items() if key != "working_dir"})
    except (OSError, yaml.YAMLError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{file} is no runtime environment that Ray takes: {error}") from error
    check_no_secrets(found, where=str(file), by_name=True)
    if found.get("working_dir") not in (None, DEFAULT_ENVIRONMENT["working_dir"]):
        raise ConfigError(
            f"{file}: working_dir {found['working_dir']!r} would not be used, for the code that "
            "this command runs is sent; write . there, leave it out where the image has the code, "
            "or send other code by `ray job submit`"
        )
    return dict(found)


@contextmanager
def packaged(order: Order, environment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The runtime environment with a small folder of its own as `working_dir`.

    In it lie the resolved configuration and, if the environment has a working_dir, the code: this
    installation's two packages and the locks, whatever lies around them.
    """
    with tempfile.TemporaryDirectory(prefix="reasonembed-job-") as scratch:
        folder = Path(scratch)
        text = yaml.safe_dump(order.config.model_dump(mode="json"), sort_keys=False)
        (folder / _CONFIG_FILE).write_text(text, encoding="utf-8")
        if environment.get("working_dir"):
            _copy_code(folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        assert size < _MAX_PACKAGE_BYTES, f"{size} bytes of code: something lies in the packages"
        rest = {key: value for key, value in environment.items() if key != "excludes"}
        yield rest | {"working_dir": str(folder)}


def _copy_code(folder: Path) -> None:
    for module in (reasonembed, ray_jobs):
        source = Path(module.__path__[0])
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(source, folder / source.name, ignore=ignored)
    locks = Path(reasonembed.__path__[0]).parent / "requirements"
    if locks.is_dir():  # an installed package has none
        shutil.copytree(locks, folder / "requirements")


class Cluster:
    """The jobs of a Ray cluster.

    Args:
        address: Of its dashboard, such as http://head:8265; default $RAY_API_SERVER_ADDRESS, else
            this machine's.
        say: Where to speak.

    Raises:
        ClusterError: It cannot be reached, or refuses the token.
    """

    def __init__(self, address: str | None, *, say: Callable[[str], None]) -> None:
        self._address = address or os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
        self._say = say
        if not self._address.startswith(("http://", "https://")):
            raise ClusterError(
                f"--address {self._address}: jobs are sent to the dashboard, such as "
                "http://HEAD:8265 (through `ray dashboard cluster.yaml` or `kubectl port-forward`)"
            )
        logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of every package and socket
        try:
            self._client = JobSubmissionClient(self._address)
            self._client.list_jobs()
        except (ConnectionError, RuntimeError, OSError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> ClusterError:
        cure = "start it, open the way to it, or give another --address"
        if any(sign in str(error) for sign in ("401", "403", "token", "Unauthor")):
            cure = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        return ClusterError(f"no jobs can be sent to {self._address} ({error}); {cure}")

    def submit(self, order: Order, environment: dict[str, Any], *, on_demand: bool = False) -> str:
        """Sends a job.

        Args:
            order: What it does.
            environment: See `read_environment`.
            on_demand: The driver goes to any node that does not vanish, not to the head.

        Returns:
            Its name, with the number of this attempt.

        Raises:
            ClusterError: The cluster does not take it.
        """
        place = {"entrypoint_num_cpus": 1, "entrypoint_label_selector": {MARKET_LABEL: "!spot"}}
        name = f"{order.name}-{self._attempts(order.name) + 1}"
        with packaged(order, environment) as runtime_env:
            try:
                self._client.submit_job(
                    entrypoint=order.entrypoint,
                    submission_id=name,
                    runtime_env=runtime_env,
                    metadata=order.metadata,
                    **(place if on_demand else {}),
                )
            except (ConnectionError, RuntimeError) as error:
                raise ClusterError(f"{self._address} does not take {name}: {error}") from error
        return name

    def _attempts(self, name: str) -> int:
        found = [re.fullmatch(re.escape(name) + r"-(\d+)", one) for one in self._names()]
        return max((int(one[1]) for one in found if one), default=0)

    def _names(self) -> list[str]:
        return [job.submission_id for job in self._client.list_jobs() if job.submission_id]

    def stop(self, order: Order) -> list[str]:
        """Stops every job that works on a run; of one stage, or one shard, where that is given.

        Returns:
            Names of those that were stopped.

        Raises:
            ClusterError: One of them does not end.
        """
        wanted = {
            key: value
            for key, value in order.metadata.items()
            if key in ("run", "shard") or (key == "stage" and order.stage)
        }
        stopped = [
            job.submission_id
            for job in self._client.list_jobs()
            if job.submission_id
            and not job.status.is_terminal()
            and wanted.items() <= (job.metadata or {}).items()
        ]
        for name in stopped:
            self._client.stop_job(name)
        for name in stopped:
            if not self._wait(name, _STOP_S + GRACE_S).status.is_terminal():
                raise ClusterError(
                    f"{name} was told to stop and has not ended yet; look at it with `ray job "
                    f"status {name} --address {self._address}`"
                )
        return stopped

    def follow(self, name: str) -> int:
        """Says what a job says until it ends; its driver's exit code.

        Raises:
            ClusterError: The cluster could not be reached again.
        """
        said = 0
        while True:
            said = asyncio.run(self._tail(name, said))
            details = self._wait(name, _POLL_S)
            if details.status.is_terminal():
                break
        asyncio.run(self._tail(name, said))  # what came while no connection was
        code, remark = outcome(details)
        if remark:
            self._say(remark)
        return code

    async def _tail(self, name: str, said: int) -> int:
        """Says a job's log from a position on; a connection that breaks is no end of the job."""
        seen = 0
        try:
            async for text in self._client.tail_job_logs(name):
                fresh = text[max(0, said - seen) :]
                seen += len(text)
                if fresh:
                    sys.stdout.write(fresh)
                    sys.stdout.flush()
        except (aiohttp.ClientError, RuntimeError, OSError):
            await asyncio.sleep(_POLL_S)
        return max(said, seen)

    def _wait(self, name: str, seconds: float) -> JobDetails:
        """A job's state when it has ended, or after some seconds; a lost connection is retried."""
        until = time.monotonic() + seconds
        failures: list[Exception] = []
        while True:
            try:
                details = self._client.get_job_info(name)
                if details.status.is_terminal() or time.monotonic() > until:
                    return details
            except (ConnectionError, RuntimeError, OSError) as error:
                failures.append(error)
                if len(failures) > 10:
                    raise ClusterError(
                        f"{self._address} is gone while {name} was followed ({error}). The run's "
                        "folder keeps what was committed; submit again to go on"
                    ) from error
            time.sleep(0.3 + len(failures))


def outcome(details: JobDetails) -> tuple[int, str]:
    """The exit code of a job that has ended, and what is to be said besides its log.

    A driver's own code where it has one; a job that was stopped, or lost with its machine, can be
    started again.
    """
    status, code = details.status, details.driver_exit_code
    again = "What is committed stays; submit again to go on."
    if status == JobStatus.SUCCEEDED:
        return 0, ""
    if status == JobStatus.STOPPED:
        return EXIT_RESUME, f"{details.submission_id} was stopped. {again}"
    if code is not None and code > 0 and code < 128:
        return code, ""
    if code is not None:  # by a signal: a machine that went, too little memory, a lost head
        return EXIT_RESUME, f"The driver was killed (exit code {code}). {again}"
    if details.error_type and _SETUP_FAILED in str(details.error_type):
        return EXIT_CONFIG, f"The job's environment could not be made: {details.message}"
    if details.error_type:  # its supervisor was lost, or never found a place
        return EXIT_RESUME, f"{details.message} {again}"
    return EXIT_FAILED, str(details.message)


def submit(
    order: Order,
    *,
    address: str | None,
    environment_file: Path | None = None,
    on_demand: bool = False,
    is_followed: bool = True,
    say: Callable[[str], None],
) -> int:
    """Sends an order and follows it; see `Cluster`.

    Returns:
        The driver's exit code; 0 where it is not followed.
    """
    check_order(order)
    environment = read_environment(environment_file)
    cluster = Cluster(address, say=say)
    name = cluster.submit(order, environment, on_demand=on_demand)
    say(f"Submitted {name}: {order.entrypoint}")
    if not is_followed:
        return 0
    try:
        return cluster.follow(name)
    except KeyboardInterrupt:
        say(f"No longer followed; {name} goes on. To end it: the same command with --stop.")
        return 0


def stop(order: Order, *, address: str | None, say: Callable[[str], None]) -> Sequence[str]:
    """Stops what works on an order's run; says what that was."""
    names = Cluster(address, say=say).stop(order)
    say(f"Stopped {', '.join(names)}." if names else "Nothing of this run is at work there.")
    return names
