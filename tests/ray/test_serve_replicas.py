"""Replicas on a Ray Serve of this process: what readiness says while they load, fail or stall."""

import contextlib
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import ray_jobs.serve
from ray import serve
from ray_jobs.serve import failure, start
from reasonembed.config import ServeConfig
from reasonembed.embedder.contract import CONTRACT_FILE, resolve_contract
from reasonembed.embedder.encode import Embedder
from reasonembed.embedder.golden import GOLDEN_FILE, write_golden
from reasonembed.errors import ConfigError, ModelError
from tests.embedder.tiny import encoder_config, save_checkpoint
from tests.ray.odd_replicas import SlowEmbedder, StallingEmbedder
from tests.ray.processes import free_ports
from tests.ray.serving import serve_here

[PORT] = free_ports(1)
APP = f"replicas-{os.getpid()}"
URL = f"http://127.0.0.1:{PORT}"


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with serve_here(logical_cpus=6, object_store_bytes=150_000_000):
        yield


def get(path):
    """Status and body; (0, "") where nobody answers."""
    try:
        with urllib.request.urlopen(URL + path, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def embed(text, timeout=60):
    body = json.dumps({"model": "echo", "input": text}).encode()
    request = urllib.request.Request(
        f"{URL}/v1/embeddings", body, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)["data"]


def refusal():
    status, body = get("/readyz")
    assert status != 200
    return status, body


def until(condition, timeout_s):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {timeout_s} s")


@contextlib.contextmanager
def service(**fields):
    """Starts a service beside the test; yields what starting it raised, when it has."""
    raised = []

    def begin():
        try:
            start(ServeConfig(port=PORT, **fields), name=APP)
        except Exception as error:  # handed to the test
            raised.append(error)

    starting = threading.Thread(target=begin)
    starting.start()
    try:
        yield raised
    finally:
        starting.join(60)
        serve.delete(APP)


def test_health_answers_while_the_model_loads_and_ready_says_503(monkeypatch):
    monkeypatch.setattr(ray_jobs.serve, "EmbedderReplica", SlowEmbedder)
    with service(model="echo"):
        status, body = until(lambda: get("/readyz") if get("/livez")[0] == 200 else None, 30)
        assert status == 503
        assert "the model is being loaded" in json.loads(body)["error"]["message"]
        assert json.loads(get("/health")[1])["status"] == "starting"
        with pytest.raises(urllib.error.HTTPError) as refused:
            embed("too early")
        assert refused.value.code == 503
        assert int(refused.value.headers["Retry-After"]) >= 1
        until(lambda: get("/readyz")[0] == 200, 40)
        assert len(embed("now it answers")) == 1
        # As the replica has measured it; the ingress runs no forward pass.
        assert json.loads(get("/info")[1])["speed"]["short_query_waits_s"] > 0


@pytest.mark.slow  # that it is refused, and how that is told, are tests of their own
def test_a_model_that_fails_its_check_is_never_ready_and_says_why(tmp_path):
    checkpoint = save_checkpoint(tmp_path / "model")
    contract = resolve_contract(checkpoint, encoder_config(checkpoint))
    (checkpoint / CONTRACT_FILE).write_text(json.dumps(contract.to_json()))
    embedder = Embedder(checkpoint, contract, device="cpu")
    write_golden(embedder, ["a set", "why"], instruction="Find.", directory=checkpoint)
    golden = json.loads((checkpoint / GOLDEN_FILE).read_text())
    for row in golden:
        row["vector"] = np.roll(row["vector"], 1).tolist()
    (checkpoint / GOLDEN_FILE).write_text(json.dumps(golden))
    with service(model=str(checkpoint)):
        status, body = until(lambda: refusal() if "golden" in refusal()[1] else None, 60)
        assert status == 503 and "golden" in json.loads(body)["error"]["message"]
        # What the command line ends with, when Serve has given up.
        error = failure(serve.status(), APP)
        assert isinstance(error, ModelError) and "golden" in str(error)


def test_a_stalled_forward_is_not_ready_but_alive(monkeypatch):
    monkeypatch.setattr(ray_jobs.serve, "EmbedderReplica", StallingEmbedder)
    with service(model="echo", batching={"lanes": 1}, stall_s=2):
        until(lambda: get("/readyz")[0] == 200, 40)
        stalling = threading.Thread(target=_ignore, args=("word " * 400,))
        stalling.start()
        until(lambda: get("/readyz")[0] == 503, 15)
        assert get("/livez")[0] == get("/health")[0] == 200
        stalling.join()
        until(lambda: get("/readyz")[0] == 200, 40)  # another replica has taken its place


def _ignore(text):
    with contextlib.suppress(OSError):
        embed(text)


@pytest.fixture(scope="module")
def running():
    """A service for the tests below, the last ones: the others have services of their own."""
    # Two seconds for a longest text.
    echo = {"tokens_per_s": 100, "max_tokens": 200}
    with service(model="echo", echo=echo, drain_s=1, stall_s=6):
        until(lambda: get("/readyz")[0] == 200, 40)
        yield


def test_another_service_in_the_way_is_said_before_anything_starts(running):
    with pytest.raises(ConfigError, match=f"'{APP}'"):
        start(ServeConfig(model="echo", port=PORT), name="another")
    with pytest.raises(ConfigError, match=f"port {PORT}"):
        start(ServeConfig(model="echo", port=PORT + 1), name="another")
    assert set(serve.status().applications) == {APP}


def test_what_a_killed_ingress_leaves_behind_is_to_be_sent_again(running):
    refused = []
    asking = threading.Thread(target=lambda: refused.append(_error("word " * 190)))
    asking.start()
    time.sleep(0.7)
    [ingress] = processes("Ingress")
    os.kill(ingress, signal.SIGKILL)
    asking.join()
    status, headers, body = refused[0]
    assert status == 503 and int(headers["Retry-After"]) >= 1
    assert json.loads(body)["error"]["code"] == "unavailable"
    assert headers["X-Request-ID"]
    until(lambda: get("/readyz")[0] == 200, 60)


def _error(text):
    try:
        return embed(text)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def processes(deployment):
    """Process ids of a deployment's replicas."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if f"ServeReplica:{APP}:{deployment}" in title:
                found.append(int(entry.name))
    return found
