"""A service under more load than it can take, with replicas killed, and exchanged, under load.

Minutes long: `make chaos`. The load is open-loop (`benchmarks.load`): requests leave when they are
due, whatever the service does.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.load import Call, Load, run
from ray import serve
from ray_jobs.serve import start
from reasonembed.config import ServeConfig
from reasonembed.serving.server import fetch
from tests.ray.processes import free_ports
from tests.ray.serving import serve_here

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

TEXTS, WORDS = 16, 100
TOKENS = TEXTS * (WORDS + 1)  # of a request to the echo model: a word is a token, and one ends it
SPEED = 20_000  # tokens a second of an echo replica
APP = f"overload-{os.getpid()}"
OVERLOAD_S = 60.0
BATCH = 2_048  # tokens, the default of CPUs


@pytest.fixture(scope="module", autouse=True)
def cluster():
    with serve_here(logical_cpus=12, object_store_bytes=300_000_000):
        yield


@pytest.fixture(scope="module")
def port():
    [one] = free_ports(1)  # Serve keeps to the port that it was started with
    return one


def settings(port, **fields):
    given = {"model": "echo", "echo": {"tokens_per_s": SPEED}, "batching": {"batch_tokens": 4096}}
    given |= {"port": port, "drain_s": 30, "cache_mib": 0}
    return ServeConfig.model_validate(given | fields)


@contextlib.contextmanager
def service(config):
    url = start(config, name=APP)
    try:
        until_ready(url)
        yield url
    finally:
        serve.delete(APP)


def until_ready(url):
    end = time.monotonic() + 90
    while fetch(f"{url}/readyz")[0] != 200:
        assert time.monotonic() < end, fetch(f"{url}/readyz")
        time.sleep(0.2)


def request(number, *, texts=TEXTS, words=WORDS, model="echo"):
    """A request of texts that differ from all others."""
    inputs = ", ".join(f'"r{number}t{i} {"word " * (words - 1)}"' for i in range(texts))
    body = f'{{"model": "{model}", "encoding_format": "base64", "input": [{inputs}]}}'
    return Call("/v1/embeddings", body.encode(), tokens=texts * (words + 1))


def replicas(deployment=""):
    """Process ids of this module's replicas."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_bytes().decode(errors="replace")
            if f"ServeReplica:{APP}:{deployment}" in title:
                found.append(int(entry.name))
    return found


def resident_mib():
    """Of all replicas together."""
    total = 0
    for pid in replicas():
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            total += int(status.split("VmRSS:")[1].split()[0])
    return total / 1024


def say(line):
    """Figures of a run; shown with `-s`, and where a test fails."""
    sys.stderr.write(f"\n{line}\n")


def in_background(load):
    thread = ThreadPoolExecutor(1)
    return thread.submit(run, load)


def check_refusals(load, statuses):
    """Only these statuses, and whoever is refused is told when to come again."""
    odd = [one for one in load.outcomes if one.status not in statuses]
    assert not odd, [(one.status, one.error) for one in odd[:5]]
    refused = [one for one in load.outcomes if one.status != 200]
    assert all(one.retry_after and int(one.retry_after) >= 1 for one in refused)


def overload(url, make, *, capacity, bound_s):
    """Three times capacity for a minute; returns the summary, having checked what always holds."""
    before = resident_mib()
    load = Load(url, make, rate=3 * capacity, duration_s=OVERLOAD_S)
    running, peak = in_background(load), before
    while not running.done():
        peak = max(peak, resident_mib())
        time.sleep(1)
    summary = running.result()
    say(f"{summary}, capacity {capacity:.2f}/s, MiB {before:.0f} -> {peak:.0f}")
    check_refusals(load, {200, 429})
    assert summary.statuses[429] > summary.statuses[200]
    assert summary.p99_s <= bound_s
    assert peak - before < 400  # MiB; the bodies that were sent are several times as many
    return summary


def stated_bound(queue, speed):
    """See docs/serving.md; the largest pass is 4,096 tokens, and a second is for the ways."""
    return (queue + 19 * BATCH + 4096) / speed + 1


def test_three_times_the_capacity_of_a_known_speed(port):
    queue = 100_000
    limits = {"max_queued_tokens": queue, "max_request_tokens": 50_000}
    with service(settings(port, limits=limits)) as url:
        capacity = SPEED / TOKENS
        bound_s = stated_bound(queue, SPEED)
        summary = overload(url, request, capacity=capacity, bound_s=bound_s)
        assert summary.tokens_per_s >= 0.9 * SPEED


def test_three_times_the_capacity_of_a_real_model(port):
    limits = {"max_queued_tokens": 40_000, "max_request_tokens": 20_000}
    model = {"model": "all-minilm-l6-v2", "name": "minilm", "embedder": {"threads": 1}}
    with service(settings(port, limits=limits, **model)) as url:

        def make(number):
            return request(number, words=60, model="minilm")

        capacity = measured_capacity(url, make)
        bound_s = stated_bound(limits["max_queued_tokens"], capacity * tokens_of(url, make))
        summary = overload(url, make, capacity=capacity, bound_s=bound_s)
        assert summary.requests_per_s >= 0.9 * capacity


def measured_capacity(url, make, *, seconds=15.0, clients=4):
    """Requests a second of clients that each wait for their answers."""
    numbers, done = iter(range(1_000_000, 2_000_000)), []
    end = time.monotonic() + seconds

    def ask():
        while time.monotonic() < end:
            post(url, make(next(numbers)))
            done.append(time.monotonic())

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return (len(done) - clients) / (sorted(done)[-clients] - (end - seconds))


def post(url, call):
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(url + call.path, call.body, headers), timeout=60
    ) as answer:
        return answer.read()


def tokens_of(url, make):
    return json.loads(post(url, make(999_999)))["usage"]["prompt_tokens"]


def test_a_killed_replica_loses_no_accepted_request(port):
    embedder = {"min": 2, "max": 2, "num_cpus": 0.5}
    with service(settings(port, embedder=embedder)) as url:
        load = Load(url, request, rate=0.35 * 2 * SPEED / TOKENS, duration_s=30)
        running = in_background(load)
        time.sleep(8)
        first, _ = replicas("Embedder")
        os.kill(first, signal.SIGKILL)
        summary = running.result()
        say(f"{summary}")
        check_refusals(load, {200, 429, 503})
        assert summary.statuses[200] > 0.8 * len(load.outcomes)
        deadline = time.monotonic() + 60
        while len(replicas("Embedder")) < 2 or first in replicas("Embedder"):
            assert time.monotonic() < deadline, "the replica was not replaced"
            time.sleep(0.5)


def test_the_only_replica_killed_is_a_pause_and_no_error(port):
    with service(settings(port, stall_s=20)) as url:
        load = Load(url, request, rate=0.3 * SPEED / TOKENS, duration_s=30)
        running = in_background(load)
        time.sleep(8)
        [only] = replicas("Embedder")
        os.kill(only, signal.SIGKILL)
        summary = running.result()
        say(f"{summary}")
        check_refusals(load, {200, 429, 503})
        last = max(load.outcomes, key=lambda one: one.due_s)
        assert last.status == 200, "it did not come back"


def test_a_rolling_update_loses_no_request(port):
    before = settings(port)
    with service(before) as url:
        old = set(replicas())
        load = Load(url, request, rate=0.3 * SPEED / TOKENS, duration_s=45)
        running = in_background(load)
        time.sleep(5)
        # Both the ingress and the embedder have other settings, so both are exchanged.
        start(before.model_copy(update={"cache_mib": 7}), name=APP)
        summary = running.result()
        say(f"{summary}")
        assert summary.statuses == {200: len(load.outcomes)}, [
            (one.status, one.error) for one in load.outcomes if one.status != 200
        ][:5]
        deadline = time.monotonic() + 60
        while old & set(replicas()):
            assert time.monotonic() < deadline, "old replicas stay"
            time.sleep(0.5)


def test_replicas_follow_the_load(port):
    embedder = {"min": 1, "max": 2, "num_cpus": 0.5}
    with service(settings(port, embedder=embedder)) as url:
        assert len(replicas("Embedder")) == 1
        load = Load(url, request, rate=1.3 * SPEED / TOKENS, duration_s=60)
        running = in_background(load)
        while not running.done() and len(replicas("Embedder")) < 2:
            time.sleep(0.5)
        assert len(replicas("Embedder")) == 2
        summary = running.result()
        say(summary)
        assert summary.statuses == {200: len(load.outcomes)}
