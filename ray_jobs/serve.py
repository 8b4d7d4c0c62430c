"""A service on Ray Serve: `reasonembed serve` here, `serve deploy configs/serve/x.yaml` elsewhere.

One application of three to five deployments: `Ingress` tokenises and admits, `Embedder` holds the
model, `Index…` one shard of an index each, `LLM` whatever rewrites queries and grades documents.
The app itself knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.exceptions import RayServeException

from ray_jobs.autoscaling import QueuedWork
from ray_jobs.job import join_or_start, quiet
from ray_jobs.serve_replicas import (
    EmbedderReplica,
    IndexReplica,
    IngressReplica,
    LLMReplica,
    why_not_running,
)
from reasonembed.config import RuntimeConfig, ServeConfig, validated
from reasonembed.errors import ConfigError, ModelError
from reasonembed.serving.keys import check_exposure
from reasonembed.serving.server import base_url, check_port, fetch, say_hints

_SHARE = 0.5
"""CPUs that an index shard and an LLM replica without GPUs are reckoned with."""
# Admission is by tokens, in the ingress; a queue of calls before the replica would only undo the
# order that the batcher keeps between requests.
_CALLS = 100_000
_REQUESTS = 2_048  # an ingress; so many more wait in a proxy, beyond that it says 503
SURROUNDINGS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "ray_jobs.proxy:middlewares",
}
"""Environment of a Ray that serves. Our code leaves the loop of its replica to itself, so Serve's
threads between the two only cost time. (The switch for them all, RAY_SERVE_THROUGHPUT_OPTIMIZED,
would open a port of its own for every ingress besides.) The last one is for requests whose ingress
dies; a Ray whose nodes have no `ray_jobs` must not have it."""
_DEAF_S = 30.0
"""That a running service may take until its address answers."""
_ROUTE = "/"
_QUIET = {"enable_access_log": False}


def build_app(args: dict[str, Any]) -> serve.Application:
    """Serve's application builder.

    Args:
        args: Fields of `ServeConfig`.

    Raises:
        ConfigError: A field is unknown or out of range.
    """
    return build(validated(ServeConfig, args, where="args"))


def build(config: ServeConfig) -> serve.Application:
    """The application of a service."""
    settings = config.model_dump(mode="json", exclude_defaults=True)
    embedder = _deployment(
        EmbedderReplica,
        "Embedder",
        config,
        num_cpus=config.embedder.num_cpus,
        num_gpus=config.embedder.num_gpus,
        **_number_of(config),
    ).bind(settings)
    parts = [
        [
            _deployment(
                IndexReplica, f"Index{number}-{Path(folder).name}-{shard}", config, num_cpus=_SHARE
            ).bind(folder, shard, config.index_shards)
            for shard in range(config.index_shards)
        ]
        for number, folder in enumerate(config.indexes)
    ]
    llm = None
    if config.rewrite or config.rerank:
        llm = _deployment(
            LLMReplica, "LLM", config, num_cpus=_SHARE, num_gpus=config.llm_gpus
        ).bind(settings)
    ingress = _deployment(
        serve.ingress()(IngressReplica),
        "Ingress",
        config,
        num_replicas=config.ingresses,
        max_ongoing_requests=_REQUESTS,
        max_queued_requests=_REQUESTS,
        backpressure_config={"status_code": 503, "retry_after_s": 1.0},
    )
    return ingress.bind(settings, embedder, parts, llm)


def _deployment(
    replica: type,
    name: str,
    config: ServeConfig,
    *,
    num_cpus: float = 1,
    num_gpus: float = 0,
    **options: Any,
) -> Any:
    """A deployment with what all of ours have in common."""
    common = {
        "max_ongoing_requests": _CALLS,
        "graceful_shutdown_timeout_s": config.drain_s,
        "graceful_shutdown_wait_loop_s": 0.5,
        "health_check_period_s": max(1.0, min(10.0, config.stall_s / 3)),
        "health_check_timeout_s": max(5.0, config.stall_s),
        "max_constructor_retry_count": 3,  # a model that fails its check fails it again
        # In an update the new replica is ready before the old one stops. A GPU more is seldom free:
        # there the old one stops first, and requests wait.
        "max_surge_percent": 0 if num_gpus else 20,
        "logging_config": _QUIET,
    }
    actor = {"num_cpus": num_cpus, "num_gpus": num_gpus}
    return serve.deployment(name=name, ray_actor_options=actor, **(common | options))(replica)


def _number_of(config: ServeConfig) -> dict[str, Any]:
    """Replicas of the embedder: a number, or what their number follows."""
    replicas = config.embedder
    if replicas.min == replicas.max:
        return {"num_replicas": replicas.min}
    policy = AutoscalingPolicy(
        policy_function=QueuedWork, policy_kwargs={"target_wait_s": replicas.target_wait_s}
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas.min,
            max_replicas=replicas.max,
            look_back_period_s=20.0,
            # A replica takes as long as its model to load: slow to give one up, quick to add one.
            upscale_delay_s=10.0,
            downscale_delay_s=300.0,
            policy=policy,
        )
    }


def start(config: ServeConfig, *, name: str) -> str:
    """Starts the service on the joined Ray and returns its base URL; the model may still load.

    Raises:
        ConfigError: The Serve that runs there listens elsewhere, or has an application in the way.
        ModelError: A replica cannot start; the message is its reason.
    """
    if client := _get_global_client(raise_if_no_controller_running=False):
        check_room(config, client.http_config, _routes(client.get_serve_details()), name=name)
    serve.start(proxy_location="EveryNode", http_options=_http(config), logging_config=_QUIET)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        serve.run(build(config), name=name, route_prefix=_ROUTE)
    except RayServeException as error:  # somebody took the route meanwhile
        raise ConfigError(str(error).rpartition("RayServeException: ")[2]) from error
    except RuntimeError as error:
        raise failure(serve.status(), name) from error
    return base_url(config)


def check_room(
    config: ServeConfig, http: HTTPOptions, routes: Mapping[str, str | None], *, name: str
) -> None:
    """Sees that a service can stand beside what runs already; Serve takes no second address.

    Args:
        config: Of the service.
        http: What the running Serve was started with.
        routes: Prefix of each application, by its name.
        name: Of the service's application; one of this name is replaced.

    Raises:
        ConfigError: Serve listens elsewhere or ends requests before we do, or another application
            has the route.
    """
    actual = {"host": http.host, "port": http.port}
    actual |= {"ssl_certfile": http.ssl_certfile, "ssl_keyfile": http.ssl_keyfile}
    if different := [key for key, value in actual.items() if value != getattr(config, key)]:
        there = ", ".join(f"{key} {actual[key]}" for key in different)
        here = ", ".join(f"{key} {getattr(config, key)}" for key in different)
        raise ConfigError(
            f"Serve runs already with {there}, and keeps to it; this service asks for {here}: give "
            f"it the same, or end that Serve (`serve shutdown`)"
        )
    if http.request_timeout_s is not None and http.request_timeout_s <= config.limits.timeout_s:
        raise ConfigError(
            f"Serve runs already and ends requests after {http.request_timeout_s:g} s; set "
            f"limits.timeout_s (now {config.limits.timeout_s:g}) below that"
        )
    if other := [one for one, route in routes.items() if route == _ROUTE and one != name]:
        raise ConfigError(
            f"the application {other[0]!r} of the running Serve has the route {_ROUTE!r}, which "
            f"{name!r} needs; remove it, or serve on another cluster"
        )


def _routes(details: Mapping[str, Any]) -> dict[str, str | None]:
    """Prefix of each application in Serve's account, without those that are being removed."""
    applications = details["applications"].items()
    return {key: one["route_prefix"] for key, one in applications if one["status"] != "DELETING"}


def _http(config: ServeConfig) -> HTTPOptions:
    return HTTPOptions(
        host=config.host,
        port=config.port,
        ssl_certfile=config.ssl_certfile,
        ssl_keyfile=config.ssl_keyfile,
        # The app ends a request itself, in the protocol's words; this is for an app that hangs.
        request_timeout_s=config.limits.timeout_s + 30,
        keep_alive_timeout_s=75,
    )


def serve_here(config: ServeConfig) -> None:
    """Serves, with Ray's own noise in a file, until SIGINT or SIGTERM.

    On the cluster that RAY_ADDRESS names, or a Ray of its own.

    Raises:
        ConfigError: The port is in use, or the machine lacks what is asked for.
        ModelError: The model does not load, or its check fails.
    """
    check_exposure(config)
    if not os.environ.get("RAY_ADDRESS"):
        check_port(config)
    log = Path(tempfile.mkdtemp(prefix="reasonembed-serve-")) / "ray.log"
    with quiet(log) as console:
        _serve(config, say=lambda line: console.print(line, markup=False, soft_wrap=True))


def _serve(config: ServeConfig, *, say: Callable[[str], None]) -> None:
    name = _application(config)
    is_joined = bool(os.environ.get("RAY_ADDRESS"))
    if not is_joined:
        config = on_all_cores(config)
        for variable, value in SURROUNDINGS.items():  # of the Ray that is started now
            os.environ.setdefault(variable, value)
    join_or_start(RuntimeConfig(logical_cpus=logical_cpus(config)))
    # Not before: Ray's own start sets a handler of its own for SIGTERM.
    with _stop_signal() as stop:
        is_ours = not serve.status().proxies  # nobody's Serve runs there yet
        if name in serve.status().applications:
            raise ConfigError(
                f"Serve has an application {name!r} already (of this model, or of another whose "
                f"folder is called so); choose another --name, or remove it"
            )
        try:
            _check_gpus(config, ray.cluster_resources())
            url = start(config, name=name)
            if not _wait_ready(url, name=name, stop=stop):
                return
            model = serve.get_app_handle(name).model_name.remote().result(timeout_s=30)
            say_hints(config, url, model=model, say=say)
            stop.wait()
            say(f"Ending: requests under way have {config.drain_s:g} s.")
            drain(name)
        finally:
            _end(name, is_ours=is_ours, is_joined=is_joined)


def logical_cpus(config: ServeConfig) -> int:
    """CPUs that a Ray of one machine is started with: as many as the service reckons with.

    They only decide what is placed; a laptop with two cores runs the five processes of a service.
    """
    embedder = config.embedder
    shards = len(config.indexes) * config.index_shards
    llm = bool(config.rewrite or config.rerank)
    wanted = config.ingresses + embedder.max * embedder.num_cpus + _SHARE * (shards + llm)
    # One more for the replica that takes another's place in an update.
    return max(4, os.cpu_count() or 1, math.ceil(wanted) + 1)


def on_all_cores(config: ServeConfig) -> ServeConfig:
    """Settings for a machine of one's own: a model on CPUs computes on all cores unless told so.

    On a cluster it keeps to `num_cpus`, which Ray sets aside for it.
    """
    embedder = config.embedder
    if embedder.threads is not None or embedder.num_gpus:
        return config
    threads = max(1, (os.cpu_count() or 1) // embedder.max)
    return config.model_copy(update={"embedder": embedder.model_copy(update={"threads": threads})})


def drain(name: str) -> None:
    """Lets a service refuse new requests and end those under way, then removes it."""
    # No ingress is up that could be told, or somebody has removed the application.
    with contextlib.suppress(RayServeException, RuntimeError, TimeoutError):
        serve.get_app_handle(name).broadcast("drain").results(timeout_s=5)
    if name in serve.status().applications:
        serve.delete(name)


def _end(name: str, *, is_ours: bool, is_joined: bool) -> None:
    """Ends what was started here; other applications of the cluster are none of our business."""
    if name in serve.status().applications:
        serve.delete(name)
    if is_ours and not (is_joined and serve.status().applications):
        serve.shutdown()
    ray.shutdown()


def _application(config: ServeConfig) -> str:
    """Name of the application: the model's, so that two models are two applications."""
    return config.name or Path(config.model).name


def _check_gpus(config: ServeConfig, have: dict[str, float]) -> None:
    """Refuses what this Ray can never place; Serve would wait for it without a word."""
    llm_gpus = config.llm_gpus if config.rewrite or config.rerank else 0
    wanted = config.embedder.min * config.embedder.num_gpus + llm_gpus
    if wanted > have.get("GPU", 0) and not os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"the service asks for {wanted:g} GPUs (embedder.min × embedder.num_gpus, llm_gpus), "
            f"this machine has {have.get('GPU', 0):g}; lower them, or join a cluster by RAY_ADDRESS"
        )


def failure(account: Any, name: str) -> Exception:
    """Serve's account of an application that does not run, as short as it can be said."""
    if reason := why_not_running(account, name):
        return ModelError(reason)
    app = account.applications.get(name)
    if app is None:
        return RuntimeError(f"somebody removed the application {name!r} from Serve")
    messages = [app.message, *(one.message for one in app.deployments.values())]
    return RuntimeError("\n".join(dict.fromkeys(filter(None, messages))))


def _wait_ready(url: str, *, name: str, stop: threading.Event) -> bool:
    """Waits until the service takes requests; False if it is to end before that.

    Raises:
        ConfigError: It runs, but nothing answers at its address.
        ModelError: A replica cannot start.
    """
    heard = time.monotonic()
    while not stop.is_set():
        status, reason = fetch(f"{url}/readyz")
        if status == 200:
            return True
        account = serve.status()
        app = account.applications.get(name)
        if app is None or app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise failure(account, name)
        if status or app.status != "RUNNING":
            heard = time.monotonic()
        elif time.monotonic() - heard > _DEAF_S:
            nodes = [one["NodeManagerAddress"] for one in ray.nodes() if one["Alive"]]
            raise ConfigError(
                f"the service runs, but {url} does not answer from this machine ({reason}); Serve "
                f"listens where it has proxies, which are some of {', '.join(nodes)}: start it "
                f"from one of those, or by `serve deploy`"
            )
        time.sleep(0.5)
    return False


@contextlib.contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set until what was started has ended."""
    stop = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
