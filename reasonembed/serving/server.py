"""A service as a person starts it: its settings, its port, what it says when it is up."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import ssl
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from reasonembed.config import ServeConfig, load_serve, read_mapping
from reasonembed.errors import ConfigError
from reasonembed.serving.exchange import start_access_log
from reasonembed.serving.scheduling import LANE

_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
_LEAVE_S = 0.5
_FILES = ("keys_file", "ssl_certfile", "ssl_keyfile", "cache_dir")
_HONOURED = {"name", "route_prefix", "import_path", "args"}


def settings_of(
    target: str | None,
    *,
    file: Path | None = None,
    overrides: Sequence[str] = (),
    given: Mapping[str, Any] | None = None,
) -> ServeConfig:
    """Settings of a service: the run's own, then the file's, then what the command line gives.

    Args:
        target: A run, or whatever `ServeConfig.model` takes; None where the file names it.
        file: Fields of `ServeConfig`, or a configuration of `serve deploy` with one application.
        overrides: `a.b=value`, applied last.
        given: Values by field; None stands for nothing.

    Returns:
        Paths are absolute: replicas have another working directory.

    Raises:
        ConfigError: A key is unknown, a value out of range, or no model is named.
    """
    data: dict[str, Any] = {}
    if target is not None:
        data = _of_run(target) | {"model": target}
    if file is not None:
        data = {**data, **_fields(read_mapping(file), file=file)}
        if target is not None:
            data["model"] = target
    data |= {key: value for key, value in (given or {}).items() if value is not None}
    if "model" not in data:
        raise ConfigError("serve what? name a run or a model, or give a file that names it")
    return _absolute(load_serve(data, overrides=list(overrides), where=str(file or "serve")))


def left_out(file: Path) -> str | None:
    """What of a configuration of `serve deploy` the command line does not do, as a line to say."""
    [application] = read_mapping(file).get("applications") or [{}]
    more = sorted(application.keys() - _HONOURED)
    if not more:
        return None
    return f"{file}: left out here, as they are `serve deploy`'s: {', '.join(more)}"


def _of_run(target: str) -> dict[str, Any]:
    """`runtime.serve` of a run; nothing for anything else."""
    if not (Path(target) / "config.resolved.yaml").is_file():
        return {}
    from reasonembed.run import Run

    run = Run.existing(target)
    settings: dict[str, Any] = run.config.runtime.serve.model_dump(
        mode="json", exclude_defaults=True
    )
    return settings


def _fields(data: Mapping[str, Any], *, file: Path) -> dict[str, Any]:
    """Fields of `ServeConfig` in a file of either form."""
    if "applications" not in data:
        return dict(data)
    applications = data["applications"]
    if not isinstance(applications, list) or len(applications) != 1:
        raise ConfigError(f"{file}: serve takes a file with one application; `serve deploy` any")
    http = data.get("http_options") or {}
    shared = ("host", "port", "ssl_certfile", "ssl_keyfile")
    return (applications[0].get("args") or {}) | {key: http[key] for key in shared if key in http}


def _absolute(config: ServeConfig) -> ServeConfig:
    changes: dict[str, Any] = {
        name: _path(value) for name in _FILES if (value := getattr(config, name)) is not None
    }
    changes["indexes"] = tuple(_path(folder) for folder in config.indexes)
    if config.model != "echo":
        changes["model"] = _model(config.model)
    for stage in ("rewrite", "rerank"):
        if (asked := getattr(config, stage)) is not None:
            llm = asked.llm.model_copy(update={"model": _model(asked.llm.model)})
            changes[stage] = asked.model_copy(update={"llm": llm})
    return config.model_copy(update=changes)


def _path(value: str) -> str:
    return str(Path(value).expanduser().absolute())


def _model(value: str) -> str:
    """A folder's path; a name, of the catalogue or the hub, as it is."""
    return _path(value) if Path(value).expanduser().exists() else value


def check_port(config: ServeConfig) -> None:
    """Sees that the service can listen where it is to.

    Raises:
        ConfigError: The port is in use, or not to be had.
    """
    where = f"{config.host}:{config.port}"
    try:
        [(family, kind, _, _, address), *_] = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM
        )
        with socket.socket(family, kind) as probe:
            # As servers do: what is left of ended connections is no hindrance, a listener is.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"something else listens on {where}; end it, or choose another --port"
            ) from error
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error


def base_url(config: ServeConfig) -> str:
    """Address of the service, as seen from this machine."""
    scheme = "https" if config.ssl_certfile else "http"
    host = _ANY.get(config.host, config.host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{config.port}"


def fetch(url: str) -> tuple[int, str]:
    """Status and message of a service's own route; (0, why) where there is no answer."""
    context = None
    if url.startswith("https:"):  # ourselves, by an address that the certificate need not hold
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return int(answer.status), ""
    except urllib.error.HTTPError as error:
        return error.code, _message(error.read())
    except OSError as error:
        return 0, str(error)


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def say_hints(config: ServeConfig, url: str, *, model: str, say: Callable[[str], None]) -> None:
    """What a person wants to know of a service that is up.

    Args:
        config: Its settings.
        url: See `base_url`.
        model: What requests call its model.
        say: Takes a line.
    """
    say(f"Serving {model} at {url}")
    say(f"  in a browser    {url}/")
    say(f"  its interface   {url}/docs")
    say("Try:")
    options = "-H 'Content-Type: application/json'"
    if config.keys_file:
        options += ' -H "Authorization: Bearer $KEY"'
    if config.ssl_certfile:
        options += " --cacert CERTIFICATE"
    body: dict[str, Any] = {"model": model, "input": "why is it shared?", "input_type": "query"}
    say(f"  curl {url}/v1/embeddings {options} -d '{json.dumps(body)}'")
    if config.indexes:
        body = {"query": "why is it shared?", "top_k": 5, "return_documents": True}
        say(f"  curl {url}/v1/search {options} -d '{json.dumps(body)}'")
    say(f"  curl {url}/readyz")
    say(f"Ctrl-C ends it: no new requests, and {config.drain_s:g} s for those under way.")


def serve_in_process(config: ServeConfig, *, say: Callable[[str], None]) -> None:
    """Serves from this process alone until SIGINT or SIGTERM.

    Raises:
        ConfigError: It cannot listen there.
        ModelError: The model does not load, or its check fails.
    """
    from reasonembed.serving.assembly import assemble

    check_port(config)
    app = assemble(config)
    server = _Server(
        uvicorn.Config(
            app,
            host=config.host,
            port=config.port,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
            timeout_graceful_shutdown=int(config.drain_s) or 1,
            timeout_keep_alive=75,
            log_level="warning",
            access_log=False,
        )
    )
    start_access_log()
    server.when_up = lambda: say_hints(config, base_url(config), model=app.state.model, say=say)
    server.run()
    _leave()


def _leave() -> None:
    """Ends the process while a forward pass still runs: its result is nobody's any more.

    Python would wait for its thread, for as long as a longest text takes.
    """
    passes = [one for one in threading.enumerate() if one.name.startswith(LANE)]
    for thread in passes:
        thread.join(_LEAVE_S / len(passes))
    if any(thread.is_alive() for thread in passes):
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


class _Server(uvicorn.Server):
    """Says when it listens."""

    when_up: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self.started:
            self.when_up()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal lets requests end, a second one does not; neither is raised again."""
        self.force_exit = self.should_exit
        self.should_exit = True
