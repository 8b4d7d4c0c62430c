"""What would keep a run from its end, said before a GPU is taken, and all of it at once.

Ray waits without a word for machines that can never come, and a path that only the head sees fails
after the first batch has been paid for.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_jobs.pools import ACCELERATOR_LABEL, MARKET_LABEL, label_selectors
from reasonembed.config import LLMConfig, PoolConfig, RunConfig, RuntimeConfig, TrainRuntime
from reasonembed.errors import ClusterError, ConfigError, ReasonEmbedError
from reasonembed.leaks import check_no_secrets
from reasonembed.storage import Place

_CONNECT_S = 5.0
_ANSWER_S = 10.0
_PROBE_S = 60.0  # a worker process must start and import first
_INSTALL_S = 600.0  # Ray's own patience
_PROBED_NODES = 16  # one of each kind would do; so many are surely some of each
_OPENAI = "https://api.openai.com/v1"
_LLM_STAGES = ("filter", "generate", "annotate", "rewrite", "distill")
_POOLS = {"audit": "annotate", "evaluate": "embed"}
_WITH_POOLS = (*_LLM_STAGES, "embed", "mine")
_NODE_GROUP = "ray.io/node-group"


# ---- is there a cluster -------------------------------------------------------------------------


def check_address(address: str) -> None:
    """Refuses an address where nothing answers; Ray itself would try for minutes.

    Args:
        address: What RAY_ADDRESS holds.

    Raises:
        ClusterError: It is no address of a cluster, or nothing listens there.
    """
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"RAY_ADDRESS is {address}, which is where jobs are submitted, not where drivers join: "
            "use `reasonembed submit --address`, or give RAY_ADDRESS as HOST:6379"
        )
    found = re.fullmatch(r"(?:ray://)?(\[.+\]|[^:/]+):(\d+)", address)
    if found is None:
        return  # `auto`, or a name that Ray knows
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), _CONNECT_S).close()
    except (OSError, OverflowError) as error:  # the other is of a port beyond 65535
        raise ClusterError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start one (ray start "
            "--head), open the way to it, or unset RAY_ADDRESS to run on this machine alone"
        ) from error


def explain_refusal(error: Exception, address: str) -> ReasonEmbedError:
    """Says why a cluster cannot be joined that listens at its address."""
    if "Version mismatch" in str(error):
        lines = " ".join(str(error).split())
        return ClusterError(
            f"{lines} Run with the cluster's versions: submit the job (`reasonembed submit`), so "
            "that its driver runs there, or make this environment from the image's lock"
        )
    if type(error).__name__ == "AuthenticationError":
        return ClusterError(
            f"the cluster at {address} refuses this token: set RAY_AUTH_MODE=token and a valid "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH (`ray get-auth-token`)"
        )
    return ClusterError(f"cannot join the Ray cluster at {address}: {error}")


# ---- is it large enough -------------------------------------------------------------------------


@dataclass(frozen=True)
class Need:
    """Actors that must all have room before a stage can begin.

    Attributes:
        name: Of the part of `runtime` that asks.
        count: How many.
        resources: Of each.
        selectors: Labels of the nodes that will do; the first choice, then others.
    """

    name: str
    count: int
    resources: Mapping[str, float]
    selectors: tuple[Mapping[str, str], ...] = ({},)

    def total(self, resource: str) -> float:
        """Of all of them."""
        return self.count * self.resources.get(resource, 0)


@dataclass(frozen=True)
class Machine:
    """A node, or so many that the autoscaler may start.

    Attributes:
        resources: Of one.
        labels: None where they are not known beforehand.
        count: How many.
    """

    resources: Mapping[str, float]
    labels: Mapping[str, str] | None
    count: int = 1

    def fits(self, need: Need) -> bool:
        """Whether its labels are among those asked for."""
        if self.labels is None:
            kinds = {key.partition(":")[2] for key in self.resources if key.startswith("accel")}
            if not kinds:
                return True
            return any(
                _matches(selector.get(ACCELERATOR_LABEL), kind)
                for selector in need.selectors
                for kind in kinds
            )
        return any(
            all(_matches(wanted, self.labels.get(key)) for key, wanted in selector.items())
            for selector in need.selectors
        )

    def room(self, need: Need) -> int:
        """How many of the need's actors it holds."""
        asked = [(name, amount) for name, amount in need.resources.items() if amount > 0]
        each = [int(self.resources.get(name, 0) / amount + 1e-6) for name, amount in asked]
        return self.count * min(each, default=need.count)


def _matches(wanted: str | None, value: str | None) -> bool:
    """Ray's syntax of label selectors: `a`, `!a`, `in(a,b)`, `!in(a,b)`."""
    if wanted is None:
        return True
    positive = wanted.removeprefix("!")
    listed = re.fullmatch(r"in\((.*)\)", positive)
    values = listed[1].split(",") if listed else [positive]
    return (value in values) is (positive == wanted)


def needs(runtime: RuntimeConfig, stages: Iterable[str] | None = None) -> list[Need]:
    """What stages hold at least.

    Args:
        runtime: Pools and workers.
        stages: Those that will run; default all that there are.
    """
    stages = (*_WITH_POOLS, "train") if stages is None else stages
    wanted = {_POOLS.get(stage, stage) for stage in stages}
    found = [_of_pool(name, getattr(runtime, name)) for name in _WITH_POOLS if name in wanted]
    if wanted & {"train", "distill"}:
        found.append(_of_training(runtime.train))
    return found


def _of_pool(name: str, pool: PoolConfig) -> Need:
    resources = {"CPU": pool.num_cpus, "GPU": pool.num_gpus}
    selectors = label_selectors(pool.market, pool.accelerators)
    return Need(name, pool.min_actors, resources, tuple(selectors))


def _of_training(train: TrainRuntime) -> Need:
    resources = {"CPU": train.num_cpus, "GPU": float(train.use_gpu)}
    selectors = label_selectors(train.market, train.accelerators)
    return Need("train", train.min_workers or train.num_workers, resources, tuple(selectors))


def machines() -> list[Machine]:
    """The nodes that are there, and those that the autoscaler may add."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    found = [Machine(node["Resources"], node.get("Labels") or {}) for node in alive]
    config = ray._private.state.state.get_cluster_config()
    for group in config.node_group_configs if config else ():
        count = 10**6 if group.max_count < 0 else group.max_count
        if count and group.resources:
            found.append(Machine(dict(group.resources), None, count))
    if config is None and any(_NODE_GROUP in (machine.labels or {}) for machine in found):
        # Launched by an autoscaler or by KubeRay, which tell nobody what else they may start; what
        # is not there yet cannot be called missing.
        found.append(Machine(dict.fromkeys(("CPU", "GPU"), 1e9), None, 1))
    return found


def lacking(wanted: Iterable[Need], have: list[Machine], *, is_private: bool) -> list[str]:
    """What machines can never hold; one line for each need.

    Args:
        wanted: Of the stages; one after the other, so each may take everything.
        have: See `machines`.
        is_private: Whether they are this machine alone, and not a cluster that was joined.
    """
    return [line for need in wanted if (line := _lack(need, have, is_private=is_private))]


def _lack(need: Need, have: list[Machine], *, is_private: bool) -> str | None:
    where = "this machine" if is_private else "the cluster"
    cures = {"CPU": "raise runtime.logical_cpus", "GPU": "join a cluster by RAY_ADDRESS"}
    for resource in ("GPU", "CPU"):
        total = sum(machine.count * machine.resources.get(resource, 0) for machine in have)
        asked, cure = need.total(resource), cures[resource] if is_private else "add nodes"
        if resource == "CPU" and asked >= total:  # what reads and writes needs room beside it
            return (
                f"runtime.{need.name} asks for {asked:g} CPUs and leaves nothing of {where}'s "
                f"{total:g} logical CPUs; lower it, or {cure}"
            )
        if asked > total:
            return (
                f"runtime.{need.name} asks for {asked:g} {resource}s, {where} has {total:g}; "
                f"lower it, or {cure}"
            )
    fitting = [machine for machine in have if machine.fits(need)]
    room = sum(machine.room(need) for machine in fitting)
    if room >= need.count:
        return None
    each = ", ".join(f"{amount:g} {name}" for name, amount in need.resources.items() if amount)
    return (
        f"runtime.{need.name} asks for {need.count} × ({each}){_labels(need)}; {where} has room "
        f"for {room}{'' if fitting == have else f' ({_known_labels(have)})'}"
    )


def _labels(need: Need) -> str:
    said = [
        " and ".join(f"{key} {value}" for key, value in selector.items())
        for selector in need.selectors
        if selector
    ]
    return f" on nodes with {' or '.join(said)}" if said else ""


def _known_labels(have: list[Machine]) -> str:
    counts: dict[str, int] = {}
    for machine in have:
        labels = machine.labels or {}
        kind, market = labels.get(ACCELERATOR_LABEL), labels.get(MARKET_LABEL)
        said = f"{kind or 'no accelerator label'}, {market or 'no market label'}"
        counts[said] = counts.get(said, 0) + machine.count
    return "its nodes: " + "; ".join(f"{count} × {said}" for said, count in counts.items())


# ---- do its workers see what they need ----------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """What a node must be able to do; carried there and back.

    Attributes:
        run_dir: Where the driver has left a marker.
        marker: Name of it.
        folders: Where models lie, by the key that names them.
        key_env: Variables that must hold a key, by the key that names them.
    """

    run_dir: str
    marker: str
    folders: Mapping[str, str] = field(default_factory=dict)
    key_env: Mapping[str, str] = field(default_factory=dict)

    def problems(self, answer: str) -> list[str]:
        """Looks; leaves `answer` beside the marker."""
        found = self._storage(answer)
        for key, folder in self.folders.items():
            if not (Path(folder) / "config.json").is_file():
                found.append(
                    f"{key}: {folder} is no checkpoint there (no config.json in it): give an "
                    "address, such as s3://…, or a folder that all nodes mount, from the root"
                )
        for key, name in self.key_env.items():
            if not os.environ.get(name):
                found.append(f"{key}: the variable {name} is not set there")
        return found

    def _storage(self, answer: str) -> list[str]:
        place = Place(self.run_dir)
        try:
            if (place / self.marker).read() is None:
                return [
                    f"run_dir {self.run_dir} is not the driver's folder there: give an address, "
                    "such as s3://…, or a folder that all nodes mount"
                ]
            (place / answer).write(b"seen")
        except ReasonEmbedError as error:
            return [f"run_dir: {error}"]
        return []


@ray.remote(num_cpus=0, max_retries=0)
def _look(probe: Probe, answer: str) -> list[str]:
    return probe.problems(answer)


class Preflight:
    """Everything that is looked at before a run's first stage, on a cluster that is joined.

    Args:
        config: Of the run.
        run_dir: Where it lies, absolute.
        stages: That will run.
        is_private: Whether Ray was started by this process, for it alone.
    """

    def __init__(
        self, config: RunConfig, *, run_dir: str, stages: Iterable[str], is_private: bool
    ) -> None:
        self._config, self._run_dir = config, run_dir
        self._stages, self._is_private = tuple(stages), is_private

    def check(self) -> None:
        """Looks at everything.

        Raises:
            ClusterError: The cluster, its storage or a server is not what the run needs; every
                reason is a line.
        """
        wanted = needs(self._config.runtime, self._stages)
        found = lacking(wanted, machines(), is_private=self._is_private)
        for look in (self._secrets, self._nodes, self._servers):
            found += look()
        if len(found) == 1:
            raise ClusterError(found[0])
        if found:
            raise ClusterError(
                f"{len(found)} things keep this run from its end:\n"
                + "\n".join(f"  - {line}" for line in found)
            )

    def _secrets(self) -> list[str]:
        if self._is_private:
            return []
        environment = dict(ray.get_runtime_context().runtime_env)
        try:
            check_no_secrets(environment, where="the job's runtime_env", by_name=True)
        except ConfigError as error:
            return [str(error)]
        return []

    # ---- nodes ----------------------------------------------------------------------------------

    def _nodes(self) -> list[str]:
        place, token = Place(self._run_dir), uuid.uuid4().hex[:8]
        probe = Probe(self._run_dir, f".preflight-{token}", self._folders, self._keys)
        here = ray.get_runtime_context().get_node_id()
        others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
        answers = {node["NodeID"]: f"{probe.marker}-{node['NodeID'][:8]}" for node in others}
        try:
            (place / probe.marker).write(b"here")
            if not others:
                return [line.replace(" there", "") for line in probe.problems(probe.marker)]
            return self._asked(probe, others[:_PROBED_NODES], answers)
        except ReasonEmbedError as error:
            return [f"run_dir: {error}"]
        finally:
            for name in (probe.marker, *answers.values()):
                _forget(place / name)

    def _asked(
        self, probe: Probe, nodes: list[dict[str, Any]], answers: Mapping[str, str]
    ) -> list[str]:
        """What nodes find missing; the same of several is said once."""
        asked = {
            _look.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(probe, answers[node["NodeID"]]): node
            for node in nodes
        }
        patience_s = _patience_s(ray.get_runtime_context().runtime_env)
        ray.wait(list(asked), num_returns=len(asked), timeout=patience_s)
        still_there = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        said: dict[str, list[str]] = {}
        for answer, node in asked.items():
            if node["NodeID"] not in still_there:
                continue  # a machine that goes is no fault of the run
            for line in self._answer(answer, probe, answers[node["NodeID"]]):
                said.setdefault(line, []).append(node["NodeManagerAddress"])
        return [f"{line} (node {', '.join(sorted(set(on)))})" for line, on in said.items()]

    def _answer(self, reference: Any, probe: Probe, name: str) -> list[str]:
        try:
            found: list[str] = ray.get(reference, timeout=0)
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            return ["a node has started no worker in time"]
        except ray.exceptions.RayError as error:
            return [f"a node cannot run what was sent: {error}"]
        if not found and (Place(probe.run_dir) / name).read() is None:
            return [f"run_dir {probe.run_dir}: what is written there is not seen by the driver"]
        return found

    @property
    def _folders(self) -> dict[str, str]:
        """Models that are folders of a machine, by the key that names them."""
        named = {f"{stage}.llm.model": llm.model for stage, llm in self._llms.items()}
        named = {
            key: model
            for key, model in named.items()
            if self._llms[key.split(".", 1)[0]].engine == "vllm"
        }
        if {"embed", "mine", "evaluate", "audit"} & set(self._stages):
            named["mine.encoder.model"] = self._config.mine.encoder.model
        if {"train", "export", "evaluate"} & set(self._stages):
            named["train.encoder.model"] = self._config.train.encoder.model
        return {
            key: model
            for key, model in named.items()
            if Path(model).is_absolute() or (Path(model) / "config.json").is_file()
        }

    @cached_property
    def _llms(self) -> dict[str, LLMConfig]:
        """The model of each stage that will ask one."""
        wanted = {"annotate" if stage == "audit" else stage for stage in self._stages}
        sections = {name: getattr(self._config, name) for name in _LLM_STAGES if name in wanted}
        return {name: section.llm for name, section in sections.items() if section is not None}

    @property
    def _asks_server(self) -> bool:
        return any(llm.engine == "openai" for llm in self._llms.values())

    @property
    def _keys(self) -> dict[str, str]:
        engine = self._config.runtime.engine
        if self._asks_server and engine.base_url is None:
            return {"runtime.engine.api_key_env": engine.api_key_env}
        return {}

    # ---- servers --------------------------------------------------------------------------------

    def _servers(self) -> list[str]:
        engine = self._config.runtime.engine
        found = []
        if self._asks_server:
            key = os.environ.get(engine.api_key_env)
            found += check_engine(engine.base_url or _OPENAI, key, name=engine.api_key_env)
        if {"embed", "mine"} & set(self._stages):
            for name, address in self._config.runtime.endpoints.items():
                found += check_listens(address, f"runtime.endpoints.{name}")
        return found


def _patience_s(environment: Mapping[str, Any]) -> float:
    """How long a node may take to answer: where it has to install packages first, so much more."""
    if not {"pip", "uv", "conda"} & environment.keys():
        return _PROBE_S
    config = environment.get("config") or {}
    return _PROBE_S + float(config.get("setup_timeout_seconds", _INSTALL_S))


def _forget(place: Place) -> None:
    try:
        place.delete()
    except ReasonEmbedError:  # said already, by what could not be written
        return


def check_engine(base_url: str, key: str | None, *, name: str) -> list[str]:
    """Whether an OpenAI-compatible server is there and takes the key.

    Args:
        base_url: Of it.
        key: What is sent; None for none.
        name: Variable that held it, for the message.
    """
    request = urllib.request.Request(
        f"{base_url.rstrip('/')}/models", headers={"Authorization": f"Bearer {key or 'none'}"}
    )
    try:
        urllib.request.urlopen(request, timeout=_ANSWER_S).close()
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return [
                f"runtime.engine: {base_url} refuses the key in {name} ({error.code}): it is not "
                "set, wrong or expired"
            ]
        return []  # a server that lists no models, or is busy, still is one
    except (OSError, ValueError, http.client.HTTPException) as error:
        return [f"runtime.engine.base_url {base_url} does not answer: {error}"]
    return []


def check_listens(address: str, key: str) -> list[str]:
    """Whether something listens at an HTTP address."""
    parts = urlsplit(address)
    try:
        port = parts.port or {"http": 80}.get(parts.scheme, 443)
        socket.create_connection((parts.hostname or "", port), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        return [f"{key}: nothing listens at {address} ({error})"]
    return []
