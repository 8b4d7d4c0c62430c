"""Clouds' notices, told by a made-up metadata server: the node is drained, and once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster import spot_watcher
from cluster.spot_watcher import AWS, GCP, Azure, Metadata, Notice, find_cloud, watch

NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
IN_TWO_MINUTES = "2027-01-15T08:02:00Z"


class Server(ThreadingHTTPServer):
    """Answers what stands in `pages`: a text, a status, or a dictionary as JSON."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages, self.asked, self.tokens = {}, [], 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def metadata(self):
        return Metadata(self.address, timeout_s=1)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, dict(self.headers)))
        page = self.server.pages.get(self.path, 404)
        page = page(self.headers) if callable(page) else page
        status, text = (page, "") if isinstance(page, int) else (200, page)
        body = (text if isinstance(text, str) else json.dumps(text)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_PUT = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def aws_pages(server, **pages):
    def token(headers):
        assert headers["X-aws-ec2-metadata-token-ttl-seconds"]
        server.tokens += 1
        return f"token{server.tokens}"

    def guarded(page):
        return lambda headers: (
            page if headers["X-aws-ec2-metadata-token"] == f"token{server.tokens}" else 401
        )

    server.pages["/latest/api/token"] = token
    for name, page in ({"instance-id": "i-1", "spot/instance-action": 404} | pages).items():
        server.pages[f"/latest/meta-data/{name}"] = guarded(page)


def gcp_pages(server, **pages):
    def guarded(page):
        return lambda headers: page if headers["Metadata-Flavor"] == "Google" else 403

    for name, page in ({"id": "17", "preempted": "FALSE"} | pages).items():
        server.pages[f"/computeMetadata/v1/instance/{name}"] = guarded(page)


def azure_pages(server, *events):
    compute = "/metadata/instance/compute?api-version=2021-02-01"
    server.pages[compute] = lambda headers: {"name": "gpu_3"} if headers["Metadata"] else 400
    server.pages["/metadata/scheduledevents?api-version=2020-07-01"] = {
        "DocumentIncarnation": 1,
        "Events": list(events),
    }


def event(kind="Preempt", *, resources=("gpu_3",), not_before="Fri, 15 Jan 2027 08:00:30 GMT"):
    return {"EventType": kind, "Resources": list(resources), "NotBefore": not_before}


def clock():
    return NOW


def test_aws_says_when(server):
    aws_pages(server)
    cloud = AWS(server.metadata, clock=clock)
    assert cloud.is_here() and cloud.notice() is None
    action = {"action": "terminate", "time": IN_TWO_MINUTES}
    aws_pages(server, **{"spot/instance-action": action})
    assert cloud.notice() == Notice("AWS will terminate it", NOW + 120)
    assert server.tokens == 1, "a token is asked for once in hours"


def test_aws_token_that_is_refused_is_renewed(server):
    aws_pages(server)
    cloud = AWS(server.metadata, clock=clock)
    cloud.notice()
    server.tokens = 7  # what was given is worth nothing now
    with pytest.raises(OSError, match="401"):
        cloud.notice()
    assert cloud.notice() is None


@pytest.mark.parametrize(("rebalance", "said"), [(False, None), (True, "recommends")])
def test_aws_recommendation_counts_where_it_is_wanted(server, rebalance, said):
    aws_pages(server, **{"events/recommendations/rebalance": {"noticeTime": IN_TWO_MINUTES}})
    notice = AWS(server.metadata, clock=clock, rebalance=rebalance).notice()
    assert (notice is None) if said is None else said in notice.reason


@pytest.mark.parametrize(
    ("pages", "said"),
    [
        ({}, None),
        ({"maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, None),
        ({"preempted": "TRUE"}, "GCP preempts it"),
        ({"maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}, "GCP ends it for maintenance"),
    ],
)
def test_gcp(server, pages, said):
    gcp_pages(server, **pages)
    cloud = GCP(server.metadata, clock=clock)
    assert cloud.is_here()
    assert cloud.notice() == (said and Notice(said, NOW + 30))


@pytest.mark.parametrize(
    ("events", "deadline_s"),
    [
        ([], None),
        ([event("Reboot")], None),
        ([event(resources=["gpu_4"])], None),
        ([event("Freeze"), event(resources=["gpu_4", "gpu_3"])], NOW + 30),
        ([event("Terminate", not_before="")], NOW + 30),
    ],
)
def test_azure_looks_for_its_own_name(server, events, deadline_s):
    azure_pages(server, *events)
    cloud = Azure(server.metadata, clock=clock)
    assert cloud.is_here()
    notice = cloud.notice()
    assert (notice and notice.deadline_s) == deadline_s


@pytest.mark.parametrize(
    ("pages", "kind"), [(aws_pages, AWS), (gcp_pages, GCP), (azure_pages, Azure)]
)
def test_the_cloud_is_found(server, pages, kind):
    pages(server)
    clouds = [one(server.metadata, clock=clock) for one in (AWS, GCP, Azure)]
    assert type(find_cloud(clouds)) is kind


def test_no_cloud(server):
    dead = Metadata("http://127.0.0.1:9", timeout_s=0.2)
    clouds = [
        one(place, clock=clock) for one in (AWS, GCP, Azure) for place in (server.metadata, dead)
    ]
    assert find_cloud(clouds) is None


class Watched:
    """Runs `watch` over a list of answers without waiting."""

    def __init__(self, *answers, refusals=0):
        self.answers, self.refusals = list(answers), refusals
        self.drained, self.said, self.waited = [], [], []

    def run(self):
        return watch(self.probe, self.drain, wait=self.wait, say=self.said.append, every_s=5)

    def probe(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def drain(self, notice):
        if self.refusals:
            self.refusals -= 1
            raise RuntimeError("no head")
        self.drained.append(notice)

    def wait(self, seconds):
        self.waited.append(seconds)
        return seconds == 5 and not self.answers


GOES = Notice("it goes", NOW + 30)


def test_drains_once_and_ends():
    watched = Watched(None, None, GOES, GOES)
    assert watched.run() == GOES
    assert watched.drained == [GOES]
    assert watched.waited == [5, 5]


def test_a_server_that_is_silent_is_asked_again_and_mentioned_once():
    silent = [OSError("no route"), TimeoutError(), json.JSONDecodeError("no", "", 0)]
    watched = Watched(*silent, None, KeyError("Events"), GOES)
    assert watched.run() == GOES
    complaints = [line for line in watched.said if "does not answer" in line]
    assert len(complaints) == 2, "once for each time that it falls silent"


def test_a_head_that_is_away_is_told_again():
    watched = Watched(GOES, refusals=3)
    watched.run()
    assert watched.drained == [GOES]
    assert sum("does not take it" in line for line in watched.said) == 3


def test_a_head_that_never_takes_it_is_an_error():
    with pytest.raises(RuntimeError, match="no head"):
        Watched(GOES, refusals=1_000).run()


def test_ends_when_it_is_told_to():
    watched = Watched(None)
    assert watched.run() is None
    assert not watched.drained


def start_script(*arguments):
    return subprocess.Popen(
        [sys.executable, str(Path(spot_watcher.__file__)), *arguments],
        stdout=subprocess.PIPE,
        text=True,
    )


def test_is_a_script_that_needs_nothing_of_this_project(server):
    gcp_pages(server)
    process = start_script(
        "--provider", "gcp", "--metadata-address", server.address, "--every", "0.05"
    )
    while len(server.asked) < 4:
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    said, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "watching GCP every 0.05 s" in said


def test_no_machine_of_a_cloud_is_a_configuration_error(server):
    process = start_script("--metadata-address", server.address)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "no machine of a cloud" in said
