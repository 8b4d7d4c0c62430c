"""Tells Ray that this machine is about to be taken away, so that work leaves it in time.

Clouds announce it on an address that only the machine itself can ask: AWS two minutes ahead, GCP
and Azure half a minute. This asks every few seconds and, once, drains the node: pools send it no
more blocks, training writes a checkpoint. Ray itself asks no cloud.

    python -m cluster.spot_watcher --provider auto

Runs beside `ray start` on every spot machine; needs Ray and the standard library, no rights and no
keys. Without it nothing is lost either, only what was being computed is computed again. On
Kubernetes it is not needed: there the SIGTERM of the pod drains (`ray start --block`).
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

_TIMEOUT_S = 2.0
_TOKEN_TTL_S = 21_600
_NOTICE_S = 30.0  # what GCP and Azure promise, and what is assumed where no time is told
_REBALANCE_S = 120.0  # it has no date; what follows it has two minutes
_DRAIN_TRIES = 20
_PREEMPTION = "DRAIN_NODE_REASON_PREEMPTION"
# What a server that is down, busy, or another cloud's makes of a question.
_NO_ANSWER = (
    OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError,
)  # fmt: skip


@dataclass(frozen=True)
class Notice:
    """This machine goes.

    Attributes:
        reason: What the cloud said.
        deadline_s: When, in seconds of the epoch.
    """

    reason: str
    deadline_s: float


class Metadata:
    """The metadata server of a cloud.

    Args:
        base: Its address.
        timeout_s: Of one request.
    """

    def __init__(self, base: str, *, timeout_s: float = _TIMEOUT_S) -> None:
        self._base, self._timeout_s = base, timeout_s
        # Never through a proxy: it would answer for its own machine.
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def ask(
        self, path: str, *, headers: Mapping[str, str] | None = None, method: str = "GET"
    ) -> str | None:
        """The text at a path; None where there is none (404).

        Raises:
            OSError: It does not answer, or not as it should.
        """
        request = urllib.request.Request(
            f"{self._base}{path}", headers=dict(headers or {}), method=method
        )
        try:
            with self._open(request, timeout=self._timeout_s) as answer:
                text: str = answer.read().decode()
                return text
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 404:
                return None
            raise


class AWS:
    """Spot interruptions of EC2 and, less urgent, its recommendations to rebalance.

    Args:
        server: The metadata server; version 2 alone, which wants a token.
        clock: Seconds of the epoch.
        rebalance: Whether a recommendation counts as a notice; the machine may still live for
            hours after one, and does nothing more when it is drained.
    """

    address = "http://169.254.169.254"

    def __init__(
        self, server: Metadata, *, clock: Callable[[], float], rebalance: bool = False
    ) -> None:
        self._server, self._clock, self._rebalance = server, clock, rebalance
        self._token: str | None = None
        self._renew_at = 0.0

    def is_here(self) -> bool:
        """Whether this machine is one of AWS."""
        return self._ask("instance-id") is not None

    def notice(self) -> Notice | None:
        """What is announced now, if anything."""
        if text := self._ask("spot/instance-action"):
            told = json.loads(text)
            # A machine that stops or hibernates is as gone as one that is terminated.
            return Notice(f"AWS will {told['action']} it", _epoch(told["time"]))
        if self._rebalance and self._ask("events/recommendations/rebalance"):
            return Notice("AWS recommends to leave it", self._clock() + _REBALANCE_S)
        return None

    def _ask(self, name: str) -> str | None:
        if self._token is None or self._clock() >= self._renew_at:
            self._token = self._server.ask(
                "/latest/api/token",
                headers={"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_TTL_S)},
                method="PUT",
            )
            self._renew_at = self._clock() + _TOKEN_TTL_S / 2
        try:
            return self._server.ask(
                f"/latest/meta-data/{name}",
                headers={"X-aws-ec2-metadata-token": self._token or ""},
            )
        except urllib.error.HTTPError as error:
            if error.code == 401:  # the token is none any more; the next question gets another
                self._token = None
            raise


class GCP:
    """Preemption of Compute Engine's spot machines.

    Args:
        server: The metadata server.
        clock: Seconds of the epoch.
    """

    address = "http://metadata.google.internal"

    def __init__(self, server: Metadata, *, clock: Callable[[], float]) -> None:
        self._server, self._clock = server, clock

    def is_here(self) -> bool:
        """Whether this machine is one of GCP."""
        return self._ask("id") is not None

    def notice(self) -> Notice | None:
        """What is announced now, if anything."""
        if (self._ask("preempted") or "").strip().upper() == "TRUE":
            return Notice("GCP preempts it", self._clock() + _NOTICE_S)
        if (self._ask("maintenance-event") or "").strip() == "TERMINATE_ON_HOST_MAINTENANCE":
            return Notice("GCP ends it for maintenance", self._clock() + _NOTICE_S)
        return None

    def _ask(self, name: str) -> str | None:
        return self._server.ask(
            f"/computeMetadata/v1/instance/{name}", headers={"Metadata-Flavor": "Google"}
        )


class Azure:
    """Scheduled events of Azure: a spot machine is evicted by `Preempt`.

    Args:
        server: The metadata server.
        clock: Seconds of the epoch.
    """

    address = "http://169.254.169.254"
    _ends = frozenset({"Preempt", "Terminate", "Redeploy"})

    def __init__(self, server: Metadata, *, clock: Callable[[], float]) -> None:
        self._server, self._clock = server, clock
        self._name: str | None = None

    def is_here(self) -> bool:
        """Whether this machine is one of Azure."""
        return self._own_name() is not None

    def notice(self) -> Notice | None:
        """What is announced for this machine now, if anything.

        A scale set is told of all its machines, so each looks for its own name.
        """
        text = self._ask("scheduledevents?api-version=2020-07-01")
        for event in json.loads(text)["Events"] if text else ():
            if event["EventType"] in self._ends and self._own_name() in event["Resources"]:
                told = event.get("NotBefore")  # empty once it has begun
                deadline_s = _http_date(told) if told else self._clock() + _NOTICE_S
                return Notice(f"Azure: {event['EventType']}", deadline_s)
        return None

    def _own_name(self) -> str | None:
        if self._name is None:
            text = self._ask("instance/compute?api-version=2021-02-01")
            self._name = json.loads(text)["name"] if text else None
        return self._name

    def _ask(self, path: str) -> str | None:
        return self._server.ask(f"/metadata/{path}", headers={"Metadata": "true"})


Cloud = AWS | GCP | Azure
CLOUDS: dict[str, type[AWS] | type[GCP] | type[Azure]] = {"aws": AWS, "gcp": GCP, "azure": Azure}


def _epoch(told: str) -> float:
    moment = datetime.fromisoformat(told.replace("Z", "+00:00"))
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _http_date(told: str) -> float:
    moment = datetime.strptime(told, "%a, %d %b %Y %H:%M:%S GMT")
    return moment.replace(tzinfo=UTC).timestamp()


def find_cloud(clouds: list[Cloud]) -> Cloud | None:
    """The cloud that this machine belongs to; None where none of them answers."""
    for cloud in clouds:
        try:
            if cloud.is_here():
                return cloud
        except _NO_ANSWER:
            continue  # another cloud's server on the same address, or none at all
    return None


def watch(
    probe: Callable[[], Notice | None],
    drain: Callable[[Notice], None],
    *,
    wait: Callable[[float], bool],
    say: Callable[[str], None],
    every_s: float = 5.0,
) -> Notice | None:
    """Asks until the machine is announced to go, then drains it once.

    A server that does not answer, or answers nonsense, is asked again: the machine is not worse
    off than without a watcher.

    Args:
        probe: Asks the cloud.
        drain: Tells Ray.
        wait: Waits for so many seconds; says whether it is time to stop instead.
        say: Writes one line.
        every_s: Between two questions.

    Returns:
        What was announced; None where it was stopped before.
    """
    is_silent = False
    while True:
        try:
            notice = probe()
            is_silent = False
        except _NO_ANSWER as error:
            notice = None
            if not is_silent:  # one line for each time that it falls silent
                say(f"the metadata server does not answer as it should: {error!r}")
            is_silent = True
        if notice is not None:
            say(f"{notice.reason}, at {_shown(notice.deadline_s)}; draining this node")
            _insist(drain, notice, wait=wait, say=say)
            return notice
        if wait(every_s):
            return None


def _insist(
    drain: Callable[[Notice], None],
    notice: Notice,
    *,
    wait: Callable[[float], bool],
    say: Callable[[str], None],
) -> None:
    """Ray's head may be busy or away for a moment; the machine has not much more than that."""
    for attempt in range(1, _DRAIN_TRIES + 1):
        try:
            drain(notice)
        # Ray has errors of many kinds here, and none of them is a reason to leave it at that.
        except Exception as error:
            say(f"Ray does not take it (try {attempt} of {_DRAIN_TRIES}): {error!r}")
            if attempt == _DRAIN_TRIES:
                raise
            if wait(1.0):
                return
        else:
            say("the node is draining")
            return


def _shown(moment_s: float) -> str:
    return datetime.fromtimestamp(moment_s, tz=UTC).isoformat(timespec="seconds")


def drain_by_ray(address: str, node_id: str | None = None) -> Callable[[Notice], None]:
    """Tells the GCS of a cluster that a node goes.

    Args:
        address: `host:port` of the GCS.
        node_id: Which node; default the live one that has this machine's address.
    """

    def drain(notice: Notice) -> None:
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        client = GcsClient(address=address)
        accepted, why_not = client.drain_node(
            node_id or _own_node(address),
            autoscaler_pb2.DrainNodeReason.Value(_PREEMPTION),
            notice.reason,
            # In the past it would be refused; then it goes at once.
            int(max(notice.deadline_s, time.time() + 1) * 1_000),
        )
        if not accepted:
            raise RuntimeError(f"the drain was refused: {why_not}")

    return drain


def _own_node(address: str) -> str:
    import ray
    from ray._private.services import get_node_ip_address
    from ray._raylet import GcsClient

    own = get_node_ip_address(address)
    for node_id, node in GcsClient(address=address).get_all_node_info().items():
        is_alive = node.state == 0  # GcsNodeInfo.ALIVE
        if is_alive and node.node_manager_address == own and not node.is_head_node:
            return str(node_id.hex())
    raise RuntimeError(f"no live node of Ray {ray.__version__} at {own} in the cluster {address}")


def main(arguments: list[str] | None = None) -> int:
    """Watches until the machine goes or until SIGTERM.

    Returns:
        0 where it drained or was stopped, 2 where this is no machine of a known cloud.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--provider", choices=["auto", *CLOUDS], default="auto")
    parser.add_argument("--address", default=os.environ.get("RAY_ADDRESS", "127.0.0.1:6379"))
    parser.add_argument("--node-id", help="default: the node of this machine")
    parser.add_argument("--metadata-address", help="default: the cloud's own")
    parser.add_argument("--every", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument(
        "--rebalance", action="store_true", help="AWS: leave when it is only recommended, too"
    )
    given = parser.parse_args(arguments)
    cloud = find_cloud(_clouds(given))
    if cloud is None:
        _say(f"no metadata server of {given.provider} answers; this is no machine of a cloud")
        return 2
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    _say(f"watching {type(cloud).__name__} every {given.every:g} s for the node's end")
    drain = drain_by_ray(given.address, given.node_id)
    watch(cloud.notice, drain, wait=stop.wait, say=_say, every_s=given.every)
    return 0


def _clouds(given: argparse.Namespace) -> list[Cloud]:
    clouds: list[Cloud] = []
    for name, kind in CLOUDS.items():
        if given.provider in ("auto", name):
            server = Metadata(given.metadata_address or kind.address)
            if kind is AWS:
                clouds.append(AWS(server, clock=time.time, rebalance=given.rebalance))
            else:
                clouds.append(kind(server, clock=time.time))
    return clouds


def _say(line: str) -> None:
    sys.stdout.write(f"{_shown(time.time())} spot_watcher: {line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
